"""A discrete-event engine: tasks that wait for one another and take their turns on links.

A task first takes ``fixed`` seconds, then puts an amount on each of its links at once. It ends when
the last of them has carried it. A link carries the amounts in the order in which tasks begin.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class Span:
    """When a task ran, in seconds since the start. ``kind`` is its author's.

    ``after``: the task whose end let it begin; ``None`` at the start.
    """

    kind: str
    begin: float = 0.0
    end: float = 0.0
    after: int | None = None


@dataclass
class _Task:
    span: Span
    fixed: float
    amounts: dict[str, float]
    waits_for: int
    followers: list[int] = field(default_factory=list)


class Simulation:
    """Add tasks, in any order that names predecessors first; then ``run`` once."""

    def __init__(self, links: Mapping[str, float]) -> None:
        """``links``: what each can carry per second; amounts on it have the same unit."""
        self._links = links
        self._tasks: list[_Task] = []

    def task(
        self,
        kind: str,
        *,
        fixed: float = 0.0,
        amounts: Mapping[str, float] | None = None,
        after: Sequence[int | None] = (),
    ) -> int:
        """Add a task; returns its number, for the ``after`` of later ones.

        Args:
            amounts: by link.
            after: the tasks that must have ended; ``None`` counts as none.
        """
        work = {link: amount for link, amount in (amounts or {}).items() if amount > 0}
        predecessors = {one for one in after if one is not None}
        self._tasks.append(_Task(Span(kind), fixed, work, len(predecessors)))
        for one in predecessors:
            self._tasks[one].followers.append(len(self._tasks) - 1)
        return len(self._tasks) - 1

    def run(self) -> list[Span]:
        """When each task ran, in the order in which they were added."""
        idle_from = dict.fromkeys(self._links, 0.0)
        ready = [(0.0, number) for number, task in enumerate(self._tasks) if not task.waits_for]
        while ready:
            # No task that is still to come begins earlier: each begins when another one ends.
            begin, number = heapq.heappop(ready)
            task = self._tasks[number]
            start = end = begin + task.fixed
            for link, amount in task.amounts.items():
                idle_from[link] = max(idle_from[link], start) + amount / self._links[link]
                end = max(end, idle_from[link])
            task.span.end = end
            for place in task.followers:
                follower = self._tasks[place]
                follower.waits_for -= 1
                if end >= follower.span.begin:
                    follower.span.begin, follower.span.after = end, number
                if not follower.waits_for:
                    heapq.heappush(ready, (follower.span.begin, place))
        return [task.span for task in self._tasks]


def critical_path(spans: Sequence[Span]) -> list[Span]:
    """The spans that set the time of all, from the first to the one that ended last: each began
    when the one before it ended."""
    path: list[Span] = []
    last: Span | None = max(spans, key=lambda span: span.end, default=None)
    while last is not None:
        path.append(last)
        last = None if last.after is None else spans[last.after]
    return path[::-1]
