"""Ranks that make collective calls together, and how their calls pair up."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from checkpoint_engine.errors import CollectiveError
from checkpoint_engine.ground.deadline import Deadline, check_cancelled, poll
from checkpoint_engine.world.hello import Hello, disagreement
from checkpoint_engine.world.host import Host
from checkpoint_engine.world.outcome import (
    SUCCESS,
    decode_failure,
    encode_failure,
    error_of,
    gone,
    publish,
)
from checkpoint_engine.world.packing import came, peek
from checkpoint_engine.world.store import World

RETURN_SECONDS = 2.0  # for a rank that was lost to be there again
_REMEMBERED = 64  # calls whose outcome a visitor that comes late still finds


class Membership:
    """Some ranks that make collective calls together, and their part of the store.

    The n-th call of every member is the same one, however late a member comes to it: it finds the
    outcome then. Two exceptions keep members in step after a failure. A member that the others
    gave up waiting for goes on to the next number, for it has not made that call. And after ranks
    disagreed, a member that comes to a call which the other side has left already is behind: it
    fails alone, and the others go on waiting for it.
    """

    def __init__(
        self, name: str, members: tuple[int, ...], rank: int, world_size: int, world: World
    ) -> None:
        self.members = members
        self.rank = rank
        self.world_size = world_size
        self.world = world
        self.old_keys: list[str] = []
        self._name = name
        self._has_announced = False
        self._awaits_return_until = 0.0
        self._count = 0
        self._visits = 0
        self._left_by_me: list[str] = []
        self._left_by_others: list[str] = []

    # ------------------------------------------------------------------ the running call

    @property
    def store(self) -> Any:
        return dist.PrefixStore(self._name, self.world.store)

    @property
    def part(self) -> str:
        """What the running call's keys begin with."""
        return f"{self._name}/{self._count}"

    @property
    def host(self) -> Host:
        """The ranks of this one's host; of calls of some ranks alone nobody, as the leader may not
        take part."""
        return self.world.host if len(self.members) == self.world_size else World.host

    def part_of(self, store: Any) -> Any:
        """The running call's part of a store of the world."""
        return dist.PrefixStore(self.part, store)

    def begin(self) -> None:
        """Go on to the next call that this rank has part in."""
        if self._has_announced:  # the store did not answer when that call ended
            self.withdraw()
        self._awaits_return_until = time.monotonic() + RETURN_SECONDS
        self._count += 1
        while self.rank in self._missed_by():
            self._count += 1

    def skip(self) -> None:
        """This rank has not made the running call."""
        self._count -= 1

    def join_late(self) -> None:
        """Go on where the others are: this process took another one's place."""
        self.withdraw()  # what that process announced
        if (last := peek(self.store, "last")) is not None:
            self._count = int(last)
        outcome = SUCCESS
        while ended := self._end_of_call_before(self._count + 1):
            outcome = ended
            self._count += 1
        if self.rank == self.members[0]:  # that process did not say that its call was over
            for _ in range(self.store.add("started", 0) - self.store.add("finished", 0)):
                self._end("", outcome)

    def _end_of_call_before(self, number: int) -> bytes:
        """The outcome of a call that this process cannot take part in: it is over, or members that
        have died began it. Empty if it may."""
        store = dist.PrefixStore(str(number), self.store)
        dead = [self.rank, *self.gone()]
        there = came(store, "hello")
        begun = [rank for rank in dead if rank in there]
        if not begun:
            return peek(store, "outcome") or b""
        return self.end(store, self._failure(gone(begun, "this call"), begun[0]))

    def exchange_states(self, mine: str, seconds: float) -> dict[int, str]:
        """What the engine of each member holds; of those that say so in ``seconds``."""
        store = self.part_of(self.world.store)
        store.set(f"state/{self.rank}", mine)
        there = [rank for rank in self.members if rank not in self.gone()]
        keys = [f"state/{rank}" for rank in there]
        soon = Deadline(seconds)
        with contextlib.suppress(TimeoutError):
            poll(lambda: store.check(keys), lambda: soon.check("the other ranks' states"))
        said = [rank for rank in there if store.check([f"state/{rank}"])]
        return {rank: store.get(f"state/{rank}").decode() for rank in said}

    def leave(self, checkpoint: str, outcome: bytes, deadline: Deadline) -> bool:
        """The running call is over. The first member leaves last, for as rank 0 it takes the store
        along. Returns whether it has seen all others leave."""
        store = self.part_of(self.world.store)
        if self.rank != self.members[0]:
            store.add("left", 1)
            return False

        def have_left() -> bool:
            """All but those that never will."""
            return bool(store.add("left", 0) >= len(self.members) - 1 - len(self.gone()))

        all_left = False
        with contextlib.suppress(TimeoutError):
            # A thousand ranks take long, and rank 0, which serves them, shall not ask all the time.
            poll(have_left, lambda: deadline.check("the other ranks to leave"), longest=0.01)
            all_left = True
        self._end(checkpoint, outcome)
        return all_left

    def _end(self, checkpoint: str, outcome: bytes) -> None:
        """Tell visitors, and processes that take another one's place. The first member alone."""
        self.store.set("last", str(self._count))
        if len(self.members) < self.world_size:  # others may visit
            number = self.store.add("finished", 0) + 1
            self.store.set(f"ended/{number}", json.dumps([checkpoint, outcome.decode()]))
            self.store.delete_key(f"ended/{number - _REMEMBERED}")
        self.store.add("finished", 1)

    def forget(self) -> None:
        """Drop what this rank wrote in calls that every member has left."""
        for key in self.old_keys:
            self.world.store.delete_key(key)
        self.old_keys.clear()

    def expect_end(self, seconds: float | None) -> None:
        """Cut the store's connections if the running call has not ended after ``seconds``."""
        self.world.liveness.expect_end(seconds)

    def gone(self) -> list[int]:
        """The members that are not there any more."""
        return sorted(self.world.liveness.gone.intersection(self.members))

    def lost(self) -> list[int]:
        """Those whose call has ended by that. One that had not come to it may still return."""
        may_return = time.monotonic() < self._awaits_return_until
        return [rank for rank in self.gone() if not may_return or self._has_come(rank)]

    def _has_come(self, rank: int) -> bool:
        """To the running call. Rank 0 takes the store along, and nobody can come any more."""
        return rank == 0 or rank in came(self.part_of(self.world.store), "hello")

    def end(self, store: Any, outcome: bytes) -> bytes:
        """Make this the outcome of the call that ``store`` is a part for, unless it has one, and
        have its ranks look; returns what it has."""
        published = publish(store, outcome)
        self.world.liveness.ring()
        return published

    @contextlib.contextmanager
    def store_to_block(self, deadline: Deadline) -> Iterator[Any]:
        """The running call's part of a store that calls in C++ may block; whoever is still blocked
        when this is left by an error is freed."""
        try:
            yield self.part_of(self.world.store_to_block(deadline))
        except BaseException:
            self.world.free_blocked()
            raise

    def _missed_by(self) -> list[int]:
        """The members that the others gave up waiting for in the call of this number."""
        outcome = peek(self.part_of(self.world.store), "outcome")
        return [] if outcome in (None, SUCCESS) else decode_failure(outcome).missing

    def _failure(self, error: CollectiveError, rank: int) -> bytes:
        """The outcome of a call that has not begun."""
        return encode_failure(error, rank, "start", self.world.why_lost)

    # ------------------------------------------------------------------ which call it is

    def claim(self, mine: Hello) -> bool:
        """Say which call this rank makes; the first member to come decides what the others must
        make, too. Returns whether this one was the first.

        Raises:
            CollectiveError: it makes another one. ``missing`` holds this rank if only this
                rank fails.
        """
        while True:
            store = self.part_of(self.world.store)
            first = Hello.decode(store.compare_set("call", "", mine.encode().decode()))
            if not first.differs_from(mine):
                return first.rank == mine.rank
            if first.wish == mine.wish or first.wish not in self._left_by_me:
                is_behind = first.wish != mine.wish and mine.wish in self._left_by_others
                raise disagreement(mine, first, [self.rank] if is_behind else [])
            # The first rank is behind: it fails, and this one goes on to the next number.
            behind = disagreement(first, mine, [self.rank])
            self.end(store, self._failure(behind, first.rank))
            self.begin()

    def agreed(self) -> None:
        """All members make the same call: what was left before does not matter any more."""
        self._left_by_me, self._left_by_others = [], []

    def learn(self, failure: CollectiveError, mine: Hello | None) -> None:
        """The running call of this rank failed."""
        if failure.other:
            # Its rank may not have come to that yet, and this one's next call may have its number.
            part, outcome = failure.other
            with contextlib.suppress(dist.DistError):
                self.end(dist.PrefixStore(part, self.world.store), outcome.encode())
        if failure.calls and mine is not None:
            self._left_by_me.append(mine.wish)
            self._left_by_others += [call for call in failure.calls if call != mine.wish]

    # ------------------------------------------------------------------ calls of other ranks

    def announce(self, mine: Hello) -> None:
        """Let ranks that wait for this one in another call see what it does."""
        said = {"hello": mine.encode().decode(), "part": self.part}
        self._has_announced = True
        self.world.store.set(f"doing/{self.rank}", json.dumps(said))

    def withdraw(self) -> None:
        """The key stays: a rank that has just seen it would wait for it for minutes."""
        self.world.store.set(f"doing/{self.rank}", "")
        self._has_announced = False

    def check_apart(self, mine: Hello, others: list[int]) -> None:
        """Compare this rank's update with those that ``others`` have announced.

        Raises:
            CollectiveError: one of them updates from the same checkpoint, but not the same
                ranks, and there are ranks in both. That call fails, too.
        """
        store = self.world.store
        for key in (f"doing/{rank}" for rank in others):
            if announced := peek(store, key):
                said = json.loads(announced)
                self._check_apart_from(
                    mine, Hello.decode(said["hello"]), dist.PrefixStore(said["part"], store)
                )

    def _check_apart_from(self, mine: Hello, theirs: Hello, part: Any) -> None:
        is_over = theirs.rank in self.world.liveness.gone or part.check(["outcome"])
        if is_over or not _overlap(mine, theirs):
            return
        # The ranks of a P2P update have not made the other call, which goes without them.
        not_in_theirs = [
            rank
            for rank in mine.ranks or [mine.rank]
            if theirs.ranks is None or rank in theirs.ranks
        ]
        not_in_mine = [rank for rank in theirs.ranks or [theirs.rank] if rank in self.members]
        ours = disagreement(mine, theirs, not_in_mine)
        error = disagreement(mine, theirs, not_in_theirs)
        error.other = [self.part, self._failure(ours, self.rank).decode()]
        if self.end(part, self._failure(error, self.rank)) == SUCCESS:
            return  # it has just ended
        raise ours

    # ------------------------------------------------------------------ ranks that only wait

    def visit(self, name: str, checkpoint: str, deadline: Deadline) -> None:
        """Wait for the members' next call with this checkpoint, or the one that is running, to end.

        A visitor that comes late finds how its call ended, and one that has skipped calls passes
        over those with other checkpoints. Calls with one checkpoint look alike: whoever visits one
        of them visits all.
        """
        ended: list[bytes] = []

        def is_over() -> bool:
            finished = self.store.add("finished", 0)
            while not ended and self._visits < finished:
                self._visits += 1
                ended.extend(self._outcome_of(checkpoint, finished))
            return bool(ended) and self.store.add("started", 0) <= finished

        def check() -> None:
            check_cancelled()
            deadline.check(f"{name} of ranks {list(self.members)}")
            if (absent := self.gone()) and not is_over():
                raise gone(absent, name)

        try:
            poll(is_over, check)
        except BaseException:  # the call that is running is not the one to wait for next
            finished = self.store.add("finished", 0)
            self._visits = max(self._visits, min(finished + 1, self.store.add("started", 0)))
            raise
        if ended[0] != SUCCESS:
            raise error_of(ended[0], name)

    def _outcome_of(self, checkpoint: str, finished: int) -> list[bytes]:
        """How the call ended that is visited now, if it had this checkpoint. A call whose first
        member died is anybody's."""
        if self._visits <= finished - _REMEMBERED:
            return []
        of, outcome = json.loads(self.store.get(f"ended/{self._visits}"))
        return [outcome.encode()] if of in ("", checkpoint) else []


def _overlap(one: Hello, other: Hello) -> bool:
    """Whether two updates from one checkpoint have different members, and some in common."""
    same = (one.call, one.checkpoint) == (other.call, other.checkpoint)
    if not same or one.ranks == other.ranks:
        return False
    return one.ranks is None or other.ranks is None or bool(set(one.ranks) & set(other.ranks))
