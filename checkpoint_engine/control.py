"""The control plane: how the ranks of one world agree, apart from any process group.

Everything goes through one key-value store that rank 0 hosts. A collective call is an
``Operation``: its ranks exchange what they have to say, do their work, and end with one outcome,
the same for all. A rank that fails writes the outcome at once; the others, watching it, stop.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist
from loguru import logger

from checkpoint_engine.deadline import Deadline, poll
from checkpoint_engine.device_utils import get_ip
from checkpoint_engine.errors import GroupError, UpdateError, kind_of
from checkpoint_engine.store import NO_ANSWER, Alone, World, world_number

_SUCCESS = b"ok"
_LONGEST_PAUSE = 0.01  # seconds between two looks at what other ranks wrote
_MEETING_SECONDS = 300.0  # for the ranks to meet where the caller sets no time
_RETURN_SECONDS = 2.0  # for a rank that was lost to be there again
_CLEANING_UP = 1.5  # seconds that a rank may need after its deadline before it says so
_FAREWELL = 1.0  # seconds that rank 0 waits for the others to read a failure


def master_port(port: int | None = None) -> int:
    """``port``, or else the one after ``MASTER_PORT``, which the launcher's own store has.

    Raises:
        RuntimeError: neither is given.
    """
    if port is not None:
        return port
    if "MASTER_PORT" not in os.environ:
        raise RuntimeError(
            "give master_port=, or set MASTER_PORT: the ranks meet at MASTER_PORT + 1"
        )
    return int(os.environ["MASTER_PORT"]) + 1


def master_addr(addr: str | None = None) -> str:
    """``addr``, or else ``MASTER_ADDR``: the host of rank 0."""
    if addr is not None:
        return addr
    if "MASTER_ADDR" not in os.environ:
        raise RuntimeError("give master_addr=, or set MASTER_ADDR: the host of rank 0")
    return os.environ["MASTER_ADDR"]


class ControlPlane:
    """One rank's place in its world. Called by all ranks concerned, in the same order."""

    def __init__(self, rank: int, world_size: int, addr: str | None, port: int | None) -> None:
        """Nothing is connected before the first operation. ``addr``, ``port``: see
        ``store.connect_store``.
        """
        self.rank = rank
        self.world_size = world_size
        self._addr = addr
        self._port = port
        self._number = 0
        self._world: World | Alone | None = Alone() if world_size == 1 else None
        self._circles: dict[tuple[int, ...], _Circle] = {}

    def store(self) -> Any:
        """The world's store; a single rank needs none but its own memory."""
        return self._meet(Deadline(_MEETING_SECONDS)).store

    def local_ip(self) -> str:
        """This host's address on the interface that leads to rank 0."""
        known = self.world_size > 1 and (self._addr or os.environ.get("MASTER_ADDR"))
        return get_ip(known or None)

    def reachable_ip(self) -> str:
        """The same, unless that is the loopback interface: hosts of other worlds must reach it."""
        address = self.local_ip()
        return get_ip() if ipaddress.ip_address(address).is_loopback else address

    def operation(
        self, name: str, timeout: timedelta | float, ranks: Sequence[int] | None = None
    ) -> Operation:
        """Begin a collective call; use it as a context manager on every rank concerned.

        ``ranks``: those ranks, sorted; default: the world.
        """
        deadline = Deadline(timeout)
        with self._asking_first(name):
            circle = self._circle(ranks, deadline)
            circle.begin_operation(self.rank)
            return Operation(circle, self.rank, name, deadline)

    def await_others(self, name: str, timeout: timedelta | float, ranks: Sequence[int]) -> float:
        """Return when the operation of ``ranks`` that this rank has no part in is over; returns
        the seconds that took.

        Its n-th call waits for their n-th operation, and for one that is running.

        Raises:
            UpdateError: that operation failed.
            TimeoutError: it did not end in time.
        """
        began = time.monotonic()
        deadline = Deadline(timeout)
        with self._asking_first(name):
            circle = self._circle(ranks, deadline)
            circle.visit(name, deadline)
            circle.expect_end(None)
        return time.monotonic() - began

    @contextlib.contextmanager
    def _asking_first(self, name: str) -> Iterator[None]:
        """Make the loss of the store, before an operation has begun, an error of its call."""
        try:
            yield
        except BaseException as error:
            if self._world is not None:
                self._world.peers.expect_end(None)
            if not isinstance(error, dist.DistError):
                raise
            lost = NO_ANSWER if self._world is None else self._world.why_lost
            cause = _describe(error, lost)
            raise UpdateError(name, self.rank, "start", cause, kind_of(error)) from error

    def _circle(self, ranks: Sequence[int] | None, deadline: Deadline) -> _Circle:
        """From now on the store's answers are awaited until the deadline."""
        world = self._meet(deadline)
        world.peers.expect_end(deadline.remaining() + _CLEANING_UP)
        members = tuple(range(self.world_size)) if ranks is None else tuple(ranks)
        if members not in self._circles:
            name = "all" if ranks is None else "ranks-" + "-".join(map(str, members))
            circle = self._circles[members] = _Circle(name, members, world)
            if world.peers.replaces:
                circle.join_late()
        return self._circles[members]

    def _meet(self, deadline: Deadline) -> World | Alone:
        """This rank's world, met anew where the last one is lost."""
        if self._world is not None and not self._world.is_lost:
            return self._world
        addr, port = master_addr(self._addr), master_port(self._port)
        self._number = self._number or world_number(addr, port)
        lost = self._world
        if lost is not None:  # whoever calls may try again; nobody shall wait for one that is dead
            deadline = Deadline(max(min(deadline.remaining(), _RETURN_SECONDS), 0.001))
        try:
            world = World(self.rank, self.world_size, addr, port, self._number, deadline)
        except (RuntimeError, TimeoutError) as error:
            if lost is None:
                raise
            raise dist.DistNetworkError(str(error)) from error
        if lost is None or lost.id != world.id:
            self._circles.clear()  # rank 0 was started again, and counts from 0
        for circle in self._circles.values():
            circle.world = world
        if lost is not None:
            lost.close()
        self._world = world
        return world


class _Circle:
    """Some ranks that have operations in common, and their part of the store.

    The n-th operation of every member is the same one, however late a member comes to it: then it
    finds the outcome. Only where the others gave up waiting for this very member, it goes on to the
    next, for it has not made that call.
    """

    def __init__(self, name: str, members: tuple[int, ...], world: World | Alone) -> None:
        self.members = members
        self.world = world
        self._name = name
        self._count = 0
        self._visits = 0
        self.old_keys: list[str] = []

    @property
    def store(self) -> Any:
        return dist.PrefixStore(self._name, self.world.store)

    @property
    def prefix(self) -> str:
        """Of the running operation's keys."""
        return str(self._count)

    def operations_part(self, store: Any) -> Any:
        """The running operation's part of a store of the world."""
        return dist.PrefixStore(self.prefix, dist.PrefixStore(self._name, store))

    def begin_operation(self, rank: int) -> None:
        self._count += 1
        while rank in self._missed_by():
            self._count += 1

    def join_late(self) -> None:
        """Go on where the others are: this process took another one's place."""
        if self.store.check(["last"]):
            self._count = _Last.decode(self.store.get("last")).number

    def end_operation(self, outcome: bytes) -> None:
        """Called by the first member, last of all."""
        self.store.set("last", _Last(self._count, outcome).encode())
        self.store.add("finished", 1)

    def expect_end(self, seconds: float | None) -> None:
        """Give up the store if it does not answer until so long from now."""
        self.world.peers.expect_end(seconds)

    def gone(self) -> list[int]:
        """The members that are not there any more."""
        return sorted(self.world.peers.gone.intersection(self.members))

    def describe(self, error: BaseException) -> str:
        return _describe(error, self.world.why_lost)

    def _missed_by(self) -> list[int]:
        """The members that the others gave up waiting for, if they did."""
        key = f"{self.prefix}/outcome"
        outcome = self.store.get(key) if self.store.check([key]) else _SUCCESS
        return [] if outcome == _SUCCESS else list(_Failure.decode(outcome).missing)

    def forget(self) -> None:
        """Drop what this rank wrote in operations that every member has left."""
        for key in self.old_keys:
            self.store.delete_key(key)
        self.old_keys.clear()

    def visit(self, name: str, deadline: Deadline) -> None:
        self._visits += 1

        def check() -> None:
            deadline.check(f"{name} of ranks {list(self.members)}")
            if (gone := self.gone()) and not self._is_over():
                raise GoneError(gone, name)

        poll(self._is_over, check)
        self._visits = self.store.add("finished", 0)
        outcome = _Last.decode(self.store.get("last")).outcome
        if outcome != _SUCCESS:
            raise _Failure.decode(outcome).error(name)

    def _is_over(self) -> bool:
        finished = self.store.add("finished", 0)
        return finished >= self._visits and self.store.add("started", 0) <= finished


class Operation:
    """One collective call on one rank: a deadline, what the ranks tell each other, one outcome.

    Attributes:
        state: what this rank's engine holds, for ``UpdateError.engines``.
        history: what this rank began when, by the monotonic clock.
        total_bytes, done_bytes: how far an update has come on this rank.
        waited_for: seconds that an update waited for buckets, by the rank that they came from.
        on_advance: called when ``done_bytes`` has grown.
        on_phase: called with the name of a phase when that begins for the first time.
    """

    def __init__(self, circle: _Circle, rank: int, name: str, deadline: Deadline) -> None:
        self.name = name
        self.deadline = deadline
        self.phase = "start"
        self.seconds: dict[str, float] = {}
        self.total_bytes = self.done_bytes = 0
        self.waited_for: dict[int, float] = {}
        self.on_advance: Callable[[], None] | None = None
        self.on_phase: Callable[[str], None] | None = None
        self._began = time.monotonic()
        self.history = [(self.phase, self._began)]
        self.store = circle.operations_part(circle.world.store)
        self._watched = circle.operations_part(circle.world.watched)
        self._circle = circle
        self.rank = rank
        self._outcome: bytes | None = None
        self._keys: list[str] = []
        self._watcher: threading.Thread | None = None
        self.state: Callable[[], str] | None = None
        self._failure_trace: _FailureTrace | None = None
        self._absent = circle.gone()
        self._awaits_return_until = self._began + _RETURN_SECONDS
        if self._leads:
            self._keys += ["done", "left"]
            circle.store.add("started", 1)

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that take part, in order."""
        return self._circle.members

    @contextlib.contextmanager
    def store_to_block(self) -> Iterator[Any]:
        """This operation's part of the store, for calls in C++ that wait by themselves; whoever is
        still blocked when this is left by an error is freed."""
        world = self._circle.world
        try:
            yield self._circle.operations_part(world.store_to_block(self.deadline))
        except BaseException:
            world.free_blocked()
            raise

    @property
    def _leads(self) -> bool:
        return self.rank == self.members[0]

    @property
    def _is_shared(self) -> bool:
        return len(self.members) > 1

    def begin(self, phase: str) -> None:
        """What this rank does from now on, for errors and for ``seconds``."""
        now = time.monotonic()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self._began
        self.phase, self._began = phase, now
        self.history.append((phase, now))
        if self.on_phase is not None and phase not in self.seconds:
            self.on_phase(phase)

    def arrived(self, sender: int) -> None:
        """What this phase has waited for so far came from ``sender``."""
        waited = time.monotonic() - self._began
        self.waited_for[sender] = self.waited_for.get(sender, 0.0) + waited

    def advance(self, nbytes: int) -> None:
        """This rank's worker has loaded so much more."""
        self.done_bytes += nbytes
        if self.on_advance is not None:
            self.on_advance()

    def check(self) -> None:
        """Raise if another rank failed or is gone, or the time is up; every wait of the operation
        calls it."""
        if self._outcome is None and (gone := self._gone()):
            self._look_for_outcome()  # it may have ended in order
            if self._outcome is None:
                # A rank that was stopped until its deadline finds that the others have left.
                self.deadline.check(f"{self.phase} of {self.name}")
                raise GoneError(gone, self.name)
        if self._outcome not in (None, _SUCCESS):
            raise _Failure.decode(self._outcome).error(self.name)
        self.deadline.check(f"{self.phase} of {self.name}")

    def watch(self) -> None:
        """From now on ``check`` sees the failure of other ranks as soon as it happens."""
        if self._is_shared and self._watcher is None:
            self._watcher = threading.Thread(
                target=self._await_outcome, name="checkpoint-engine-watch", daemon=True
            )
            self._watcher.start()

    def all_gather(self, what: str, value: bytes) -> list[bytes]:
        """Every rank's ``value``, in rank order. Called by all ranks.

        Raises:
            TimeoutError: naming the ranks that did not come.
        """
        values = self.gather_from(self.members, what, value)
        self._circle.forget()
        return values

    def gather_from(self, ranks: Sequence[int], what: str, value: bytes) -> list[bytes]:
        """The ``value`` of each of ``ranks``, which all ranks name alike. Called by all ranks."""
        if self.rank in ranks:
            self._put(f"{what}/{self.rank}", value)
        if list(ranks) in ([], [self.rank]):
            return [value] * len(ranks)
        keys = [f"{what}/{rank}" for rank in ranks]
        self._wait(keys)
        return self.store.multi_get(keys)

    def gather_at(self, reader: int, what: str, value: bytes) -> list[bytes]:
        """On rank ``reader``, which waits for them, every rank's ``value``; nothing elsewhere."""
        self._put(f"{what}/{self.rank}", value)
        if self.rank != reader:
            return []
        keys = [f"{what}/{rank}" for rank in self.members]
        self._wait(keys)
        return self.store.multi_get(keys)

    def trace_failure(
        self,
        part: Callable[[], bytes],
        writers: Sequence[int],
        write: Callable[[Sequence[bytes], UpdateError], str | None],
    ) -> None:
        """If this fails, have the first of ``writers`` that is there ``write`` the ``part`` of each
        rank that says it soon, as ``UpdateError.trace``. Called by all ranks."""
        self._failure_trace = _FailureTrace(part, writers, write)

    def tell(self, key: str, value: bytes) -> None:
        """Say something that other ranks may look for."""
        self._put(key, value)

    def is_told(self, key: str) -> bool:
        """Whether some rank has said this."""
        return bool(self.store.check([key]))

    def __enter__(self) -> Operation:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc is None:
                self._succeed()
            else:
                self._fail(exc)
        finally:
            del exc  # this frame lives on in the traceback of what is raised
            self._circle.expect_end(None)
            self.state = self._failure_trace = None
            self._circle.old_keys += [f"{self._circle.prefix}/{key}" for key in self._keys]
            if self._watcher is not None:
                self._watcher.join(_FAREWELL)

    def _put(self, key: str, value: bytes) -> None:
        self.store.set(key, value)
        self._keys.append(key)

    def _wait(self, keys: list[str]) -> None:
        """Until all ``keys`` are there. Polls: a wait that the store times out would be logged."""
        pause = 0.0001
        while not self.store.check(keys):
            if self._outcome is None:
                self._look_for_outcome()
            if self.deadline.remaining() == 0.0:
                missing = [int(k.rpartition("/")[2]) for k in keys if not self.store.check([k])]
                raise MissingRanksError(
                    f"gave up after {self.deadline.seconds:g} s", self.name, missing
                )
            self.check()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _gone(self) -> list[int]:
        """Members that are not there any more. One that was not when this began may come back."""
        gone = self._circle.gone()
        if gone and time.monotonic() < self._awaits_return_until:
            return [rank for rank in gone if rank not in self._absent]
        return gone

    def _look_for_outcome(self) -> None:
        if self.store.check(["outcome"]):
            self._outcome = self.store.get("outcome")

    def _succeed(self) -> None:
        """Return only once every rank has done its part."""
        self.begin("completion")
        if self._is_shared:
            self._await_others()
        self._leave(_SUCCESS, self.deadline)
        self.on_phase = None
        self.begin("done")

    def _await_others(self) -> None:
        """The last rank to arrive writes the outcome."""
        try:
            self.check()  # a rank that was stopped until the deadline is too late
            if self.store.add("done", 1) == len(self.members):
                self.store.compare_set("outcome", "", _SUCCESS.decode())
            poll(lambda: self.store.check(["outcome"]), self.check)
            self._outcome = self.store.get("outcome")
            if self._outcome != _SUCCESS:
                raise _Failure.decode(self._outcome).error(self.name)
        except BaseException as error:
            if isinstance(error, Exception) and self.publish(error) == _SUCCESS:
                return  # the last rank arrived while this one gave up
            self._fail(error)
            raise

    def publish(self, error: BaseException) -> bytes:
        """Make ``error`` the outcome on every rank, unless another was first; returns the
        outcome."""
        error = self._cause_of(error)
        missing = getattr(error, "missing_ranks", [])
        culprit = getattr(error, "rank_at_fault", self.rank)
        mine = _Failure(
            culprit, self.phase, self._circle.describe(error), missing, kind_of(error)
        ).encode()
        with contextlib.suppress(RuntimeError):  # the store may be what failed
            return self.store.compare_set("outcome", "", mine.decode())
        return mine

    def _cause_of(self, error: BaseException) -> BaseException:
        """Where a broadcast fails, another rank knows why, or is gone itself."""
        if not isinstance(error, GroupError):
            return error
        soon = Deadline(_FAREWELL / 2)
        try:
            poll(lambda: soon.remaining() == 0.0, self._look_around)
        except (RuntimeError, TimeoutError) as cause:
            return cause.with_traceback(None)  # which leads to the frame that will hold it
        return error

    def _look_around(self) -> None:
        self._look_for_outcome()
        self.check()

    def _fail(self, error: BaseException) -> None:
        """End the operation everywhere, and raise the one error that every rank raises."""
        self._circle.expect_end(1.2 * _FAREWELL)
        outcome = self.publish(error)
        self.on_phase = None
        self.begin("failed")
        trace = self._failure_trace
        parts = [] if trace is None else [trace.part()]
        states: dict[int, str] = {}
        with contextlib.suppress(RuntimeError):
            for part in parts:
                self._put(f"part/{self.rank}", part)
            states = self._exchange_states()
            parts = self._parts_of(list(states))
            self._leave(outcome, Deadline(_FAREWELL))
        failure = (
            error if isinstance(error, UpdateError) else _Failure.decode(outcome).error(self.name)
        )
        failure.engines, failure.seconds = states, dict(self.seconds)
        if trace is not None and self.rank in trace.writers and parts:
            failure.trace = trace.write(parts, failure)
        try:
            if failure is error:
                raise failure
            if isinstance(error, Exception):
                raise failure from error
        finally:
            del error, failure, trace  # this frame lives on in their traceback

    def _parts_of(self, ranks: Sequence[int]) -> list[bytes]:
        """On the rank that writes the trace of a failure, what ``ranks`` put there for it."""
        writers = () if self._failure_trace is None else self._failure_trace.writers
        if next((rank for rank in writers if rank in ranks), None) != self.rank:
            return []
        return [
            self.store.get(key)
            for key in (f"part/{rank}" for rank in ranks)
            if self.store.check([key])
        ]

    def _exchange_states(self) -> dict[int, str]:
        """What the engine of each rank holds; of those that say so soon."""
        if self.state is None:
            return {}
        self._put(f"state/{self.rank}", self.state().encode())
        there = [rank for rank in self.members if rank not in self._circle.gone()]
        keys = [f"state/{rank}" for rank in there]
        soon = Deadline(_FAREWELL / 2)
        with contextlib.suppress(TimeoutError):
            poll(lambda: self.store.check(keys), lambda: soon.check("the other ranks' states"))
        said = [rank for rank in there if self.store.check([f"state/{rank}"])]
        return {rank: self.store.get(f"state/{rank}").decode() for rank in said}

    def _leave(self, outcome: bytes, deadline: Deadline) -> None:
        """The first member leaves last: as rank 0 it takes the store along. It tells visitors."""
        if not self._leads:
            self.store.add("left", 1)
            return
        with contextlib.suppress(TimeoutError):
            poll(self._have_left, lambda: deadline.check("the other ranks to leave"))
            self._keys.append("outcome")  # otherwise it stays for those that come late
        self._circle.end_operation(outcome)

    def _have_left(self) -> bool:
        """Whether all others have; not waiting for those that never will."""
        return self.store.add("left", 0) >= len(self.members) - 1 - len(self._circle.gone())

    def _await_outcome(self) -> None:
        try:
            self._watched.wait(
                ["outcome"], timedelta(seconds=self.deadline.remaining() + _FAREWELL)
            )
            self._outcome = self._watched.get("outcome")
        except RuntimeError as error:
            logger.debug("{}: no longer watching the other ranks: {}", self.name, error)


class _FailureTrace(NamedTuple):
    part: Callable[[], bytes]
    writers: Sequence[int]
    write: Callable[[Sequence[bytes], UpdateError], str | None]


class MissingRanksError(TimeoutError):
    """Some ranks did not make a collective call."""

    kind = "rank_missing"

    def __init__(self, why: str, operation: str, ranks: list[int]) -> None:
        super().__init__(f"{why}: ranks {ranks} did not join {operation}")
        self.missing_ranks = ranks


class GoneError(RuntimeError):
    """Ranks of an operation whose process has ended, or whose host is cut off."""

    kind = "rank_gone"

    def __init__(self, ranks: list[int], operation: str) -> None:
        one = f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {ranks} are"
        super().__init__(
            f"{one} gone before {operation} was over: its process has ended, or its host is cut "
            "off; start it again"
        )
        self.missing_ranks = ranks
        self.rank_at_fault = ranks[0]


class _Last(NamedTuple):
    """The operation that a circle finished last: its number and outcome."""

    number: int
    outcome: bytes

    def encode(self) -> str:
        return f"{self.number} {self.outcome.decode()}"

    @staticmethod
    def decode(last: bytes) -> _Last:
        number, _, outcome = last.partition(b" ")
        return _Last(int(number), outcome)


class _Failure(NamedTuple):
    """A failed operation's outcome, as it stands in the store."""

    rank: int
    phase: str
    cause: str
    missing: list[int]
    kind: str = "failed"

    def encode(self) -> bytes:
        return json.dumps(self).encode()

    @staticmethod
    def decode(outcome: bytes) -> _Failure:
        return _Failure(*json.loads(outcome))

    def error(self, operation: str) -> UpdateError:
        return UpdateError(operation, self.rank, self.phase, self.cause, self.kind)


def _describe(error: BaseException, lost: str) -> str:
    """An error as other ranks shall read it. ``lost``: what is wrong where the store fails."""
    if isinstance(error, dist.DistError):
        return f"{lost}: {str(error).splitlines()[0]}"
    plain = isinstance(error, (ValueError, RuntimeError, TimeoutError))
    return str(error) if plain else f"{type(error).__name__}: {error}"
