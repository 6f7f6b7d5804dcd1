"""A discrete-event engine: tasks that wait for one another and take their turns on links.

A task first takes ``fixed`` seconds, then keeps each of its links busy. It ends when the last of
them is done with it. A link serves tasks in the order in which they begin.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class Task:
    """When a task ran, in seconds since the start. ``kind`` is its author's.

    ``after``: the task whose end let it begin; ``None`` at the start.
    """

    kind: str
    begin: float = 0.0
    end: float = 0.0
    after: int | None = None
    fixed: float = field(default=0.0, compare=False)
    busy: Mapping[str, float] = field(default_factory=dict, compare=False)
    waits_for: int = field(default=0, compare=False)
    followers: list[int] = field(default_factory=list, compare=False)


class Simulation:
    """Add tasks, each after its predecessors or with ``follow`` afterwards; then ``run`` once."""

    def __init__(self) -> None:
        self._tasks: list[Task] = []

    def task(
        self,
        kind: str,
        *,
        fixed: float = 0.0,
        busy: Mapping[str, float] | None = None,
        after: Sequence[int | None] = (),
    ) -> int:
        """Add a task; returns its number, for the ``after`` of later ones.

        Args:
            busy: the seconds that it takes on each link.
            after: the tasks that must have ended; ``None`` counts as none.
        """
        # A task does not wait for a link that it does not use.
        used = {link: seconds for link, seconds in (busy or {}).items() if seconds > 0}
        self._tasks.append(Task(kind, fixed=fixed, busy=used))
        self.follow(len(self._tasks) - 1, {one for one in after if one is not None})
        return len(self._tasks) - 1

    def follow(self, number: int, after: Collection[int]) -> None:
        """Have a task that was added begin no sooner than these distinct ones end."""
        for one in after:
            self._tasks[one].followers.append(number)
        self._tasks[number].waits_for += len(after)

    def ends(self) -> list[int]:
        """The tasks that no other follows yet."""
        return [number for number, task in enumerate(self._tasks) if not task.followers]

    def run(self) -> list[Task]:
        """The tasks, in the order in which they were added."""
        idle_from: defaultdict[str, float] = defaultdict(float)
        ready = [(0.0, number) for number, task in enumerate(self._tasks) if not task.waits_for]
        while ready:
            # No task that is still to come begins earlier: each begins when another one ends.
            begin, number = heapq.heappop(ready)
            task = self._tasks[number]
            start = task.end = begin + task.fixed
            for link, seconds in task.busy.items():
                idle_from[link] = max(idle_from[link], start) + seconds
                task.end = max(task.end, idle_from[link])
            for place in task.followers:
                follower = self._tasks[place]
                follower.waits_for -= 1
                if task.end >= follower.begin:
                    follower.begin, follower.after = task.end, number
                if not follower.waits_for:
                    heapq.heappush(ready, (follower.begin, place))
        return self._tasks


def critical_path(tasks: Sequence[Task]) -> list[Task]:
    """The tasks that set the time of all, from the first to the one that ended last: each began
    when the one before it ended."""
    path: list[Task] = []
    last = max(tasks, key=lambda task: task.end, default=None)
    while last is not None:
        path.append(last)
        last = None if last.after is None else tasks[last.after]
    return path[::-1]
