"""A discrete-event engine: tasks that wait for one another and share links.

A task first takes ``fixed`` seconds, then works through the amounts that it puts on links. Tasks
that share a link too slow for all of them are slowed down alike: each runs at the same fraction of
the speed that it would have alone.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class Span:
    """When a task ran, in seconds since the start. ``kind`` is its author's.

    ``after``: the task whose end let it begin; ``None`` at the start.
    """

    kind: str
    begin: float
    end: float
    after: int | None = None


@dataclass
class _Task:
    kind: str
    fixed: float
    amounts: dict[str, float]
    solo: float
    """Seconds of its work on idle links."""
    waits_for: int
    followers: list[int] = field(default_factory=list)
    begin: float = 0.0
    end: float = 0.0
    after: int | None = None
    left: float = 1.0
    """Share of the work that is to do, at ``as_of``."""
    as_of: float = 0.0
    speed: float = 0.0
    """Share of the work per second."""
    version: int = 0


class Simulation:
    """Add tasks, in any order that names predecessors first; then ``run`` once."""

    def __init__(self, links: Mapping[str, float]) -> None:
        """``links``: what each can carry per second; amounts on it have the same unit."""
        self._links = dict(links)
        self._tasks: list[_Task] = []
        self._on_link: defaultdict[str, set[int]] = defaultdict(set)
        self._agenda: list[tuple[float, int, int]] = []
        """(time, task, version); a version that has passed is void."""

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
            amounts: by link; all are worked off together.
            after: the tasks that must have ended; ``None`` counts as none.
        """
        work = {link: amount for link, amount in (amounts or {}).items() if amount > 0}
        solo = max((amount / self._links[link] for link, amount in work.items()), default=0.0)
        number = len(self._tasks)
        predecessors = {one for one in after if one is not None}
        self._tasks.append(_Task(kind, fixed, work, solo, len(predecessors)))
        for one in predecessors:
            self._tasks[one].followers.append(number)
        return number

    def run(self) -> list[Span]:
        """When each task ran, in the order in which they were added."""
        for number, task in enumerate(self._tasks):
            if task.waits_for == 0:
                self._begin(number, 0.0, after=None)
        while self._agenda:
            now, number, version = heapq.heappop(self._agenda)
            task = self._tasks[number]
            if version != task.version:
                continue
            if task.speed == 0.0 and task.solo > _NEGLIGIBLE:
                self._join_links(number, now)
            else:
                self._finish(number, now)
        return [Span(task.kind, task.begin, task.end, task.after) for task in self._tasks]

    def _begin(self, number: int, now: float, after: int | None) -> None:
        task = self._tasks[number]
        task.begin, task.after = now, after
        heapq.heappush(self._agenda, (now + task.fixed, number, task.version))

    def _join_links(self, number: int, now: float) -> None:
        task = self._tasks[number]
        task.as_of = now
        for link in task.amounts:
            self._on_link[link].add(number)
        self._share_links(task.amounts, now)

    def _finish(self, number: int, now: float) -> None:
        task = self._tasks[number]
        task.end = now
        task.version += 1
        for link in task.amounts:
            self._on_link[link].discard(number)
        for follower in task.followers:
            self._tasks[follower].waits_for -= 1
            if self._tasks[follower].waits_for == 0:
                self._begin(follower, now, after=number)
        self._share_links(task.amounts, now)

    def _share_links(self, changed: Mapping[str, float], now: float) -> None:
        """Set the speeds of all tasks that the use of ``changed`` can have an effect on."""
        tasks = self._connected(changed)
        speeds = self._fair_speeds(tasks)
        for number in tasks:
            task = self._tasks[number]
            if task.speed == speeds[number]:
                continue
            task.left = max(0.0, task.left - (now - task.as_of) * task.speed)
            task.as_of, task.speed = now, speeds[number]
            task.version += 1
            heapq.heappush(self._agenda, (now + task.left / task.speed, number, task.version))

    def _connected(self, links: Mapping[str, float]) -> list[int]:
        found: set[int] = set()
        seen = set(links)
        todo = list(links)
        while todo:
            for number in self._on_link[todo.pop()] - found:
                found.add(number)
                fresh = self._tasks[number].amounts.keys() - seen
                seen |= fresh
                todo.extend(fresh)
        return sorted(found)

    def _fair_speeds(self, tasks: Sequence[int]) -> dict[int, float]:
        """Progressive filling: all speed up alike until a link is full; those on it stay there."""
        demand: defaultdict[str, dict[int, float]] = defaultdict(dict)
        for number in tasks:
            task = self._tasks[number]
            for link, amount in task.amounts.items():
                demand[link][number] = amount / task.solo
        room = {link: self._links[link] for link in demand}
        open_tasks = set(tasks)
        fractions: dict[int, float] = {}
        while open_tasks:
            fullest, fraction = self._fullest(demand, room, open_tasks)
            settled = open_tasks if fraction >= 1.0 else open_tasks & demand[fullest].keys()
            for number in settled:
                fractions[number] = min(fraction, 1.0)
                for link in self._tasks[number].amounts:
                    room[link] -= fractions[number] * demand[link][number]
            open_tasks = open_tasks - settled
        return {number: fractions[number] / self._tasks[number].solo for number in tasks}

    @staticmethod
    def _fullest(
        demand: Mapping[str, Mapping[int, float]], room: Mapping[str, float], open_tasks: set[int]
    ) -> tuple[str, float]:
        """The link that fills up first, and the fraction of their speed that its tasks then
        have."""
        fractions = {}
        for link, wanted in demand.items():
            total = sum(rate for number, rate in wanted.items() if number in open_tasks)
            if total > 0:
                fractions[link] = max(room[link], _NEGLIGIBLE) / total
        fullest = min(fractions, key=lambda link: fractions[link])
        return fullest, fractions[fullest]


def critical_path(spans: Sequence[Span]) -> list[Span]:
    """The spans that set the time of all, from the first to the one that ended last: each began
    when the one before it ended."""
    path: list[Span] = []
    last: Span | None = max(spans, key=lambda span: span.end, default=None)
    while last is not None:
        path.append(last)
        last = None if last.after is None else spans[last.after]
    return path[::-1]
