"""One collective call on one rank: a deadline, what the ranks tell each other, one outcome."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from checkpoint_engine.errors import CollectiveError, UpdateError, kind_of
from checkpoint_engine.ground.deadline import Deadline, check_cancelled, poll
from checkpoint_engine.world.clock import Clock
from checkpoint_engine.world.exchange import PAUSE, UNRUNG, gather
from checkpoint_engine.world.hello import Hello, check_agreement
from checkpoint_engine.world.membership import Membership
from checkpoint_engine.world.outcome import (
    SUCCESS,
    decode_failure,
    encode_failure,
    error_of,
    gone,
    missing,
)
from checkpoint_engine.world.packing import peek

_LOOK_AROUND = 0.1  # seconds between two looks at what missing ranks do instead
_FAREWELL = 1.0  # seconds that rank 0 waits for the others to read a failure


class Call:
    """A context manager, entered by every member. Made by ``ControlPlane.call``.

    Attributes:
        name: of the method that was called.
        clock: what this rank spends its time with.
        state: what this rank's engine holds, for ``UpdateError.engines``; ``None``: no engine is
            concerned.
        on_success: called when every rank has succeeded, before another call may begin.
        on_failure: called with the error before it is raised.
    """

    def __init__(
        self, membership: Membership, name: str, checkpoint: str, deadline: Deadline
    ) -> None:
        self.name = name
        self._checkpoint = checkpoint
        self.deadline = deadline
        self.clock = Clock(name, checkpoint)
        self.state: Callable[[], str] | None = None
        self.on_success: Callable[[], None] | None = None
        self.on_failure: Callable[[UpdateError], None] | None = None
        self.rank = membership.rank
        self.store = membership.part_of(membership.world.store)
        self.membership = membership
        self._hello: Hello | None = None
        self._guards: list[Callable[[], None]] = []
        self._announced = self._started = self._stays_out = self._came_first = False
        self._watches = self._has_to_announce = False
        self._looks_around_at = time.monotonic() + _LOOK_AROUND
        self.heard: int | None = None  # what ``Liveness.rings`` was when this looked last
        self._outcome: bytes | None = None
        self.seen = hashlib.sha256()  # of what all exchanges of this call have brought
        self.keys: list[str] = []  # that this rank has written

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that take part, in order."""
        return self.membership.members

    @property
    def leads(self) -> bool:
        """Whether this is the first member."""
        return self.rank == self.members[0]

    @property
    def _is_shared(self) -> bool:
        """Whether others have a say in the outcome; see ``Membership.check_apart``, too."""
        return len(self.members) > 1 or self._announced

    def begin(self, phase: str) -> None:
        """What this rank does from now on."""
        self.clock.begin(phase)

    # ------------------------------------------------------------------ what ranks tell each other

    def exchange(self, mine: Hello) -> list[Hello]:
        """Every member's hello, in rank order. The first exchange of a call, by all members.

        Raises:
            CollectiveError: ranks make different calls (at once), or do not come; names them.
            ValueError: two ranks are on one device.
        """
        if self._hello is None:
            self.claim(mine)
        hellos = Hello.decode_all(self.all_gather("hello", mine.encode()))
        check_agreement(hellos)
        self.membership.agreed()
        return hellos

    def claim(self, mine: Hello) -> None:
        """Say which call this is, before anything is exchanged. ``exchange`` does it otherwise.

        Raises:
            CollectiveError: another rank makes a call that does not go together with it.
        """
        self._hello = mine
        try:
            if len(self.members) > 1 and self.membership.claim(mine.terms()):
                self._came_first = True
                self.keys.append("call")
        except CollectiveError as error:
            self._stays_out = self.rank in error.missing
            raise
        finally:  # it may be another number now
            self.store = self.membership.part_of(self.membership.world.store)
        self._start()
        if mine.call == "update" and self.membership.world_size > 1:
            self._has_to_announce = True
            if not self.membership.host.follows:
                self.announce()
            if mine.ranks is not None:
                others = [rank for rank in range(self.membership.world_size) if rank != self.rank]
                self.membership.check_apart(mine, others)

    def announce(self) -> None:
        """Let ranks that wait for this one elsewhere see what it does. One that follows a leader
        puts it off: nobody has to wait where all come at once."""
        if self._has_to_announce and self._hello is not None:
            self.membership.announce(self._hello)
            self._announced, self._has_to_announce = True, False

    def all_gather(self, what: str, value: bytes) -> list[bytes]:
        """Every member's ``value``, in rank order. Called by all members."""
        values = gather(self, what, value)
        self.membership.forget()
        return values

    def gather_from(self, ranks: Sequence[int], what: str, value: bytes) -> list[bytes]:
        """The ``value`` of each of ``ranks``, which all members name alike. Called by all."""
        if self.rank in ranks:
            self.tell(f"{what}/{self.rank}", value)
        if list(ranks) in ([], [self.rank]):
            return [value] * len(ranks)
        return self.read([f"{what}/{rank}" for rank in ranks])

    def tell(self, key: str, value: bytes) -> None:
        """Say something that other ranks may look for."""
        self.store.set(key, value)
        self.keys.append(key)

    def read(self, keys: Sequence[str]) -> list[bytes]:
        """What other ranks tell under these keys; waits for it. A key ends in ``/<rank>``."""
        _wait_for(self, keys)
        return list(self.store.multi_get(list(keys)))

    # ------------------------------------------------------------------ waiting

    def wait(self, done: Callable[[], bool]) -> None:
        """Return once ``done()``; raises as ``check`` does."""
        poll(done, self.check)

    def check(self) -> None:
        """Raise if another rank failed or is gone, the time is up, or a guard raises. Every wait
        of the call does this."""
        if self._watches and self.heard != self.membership.world.liveness.rings:
            self.look_for_outcome()
        if self.is_late():
            self.deadline.check(f"{self.clock.phase} of {self.name}")

    def is_late(self) -> bool:
        """Whether the time is up; raises what else ``check`` raises."""
        if self._outcome is None and (absent := self.membership.lost()):
            self.look_for_outcome()  # it may have ended in order
            # A rank that was stopped until its deadline finds that the others have left.
            if self._outcome is None and self.deadline.remaining() > 0.0:
                raise gone(absent, self.name)
        self._raise_failure()
        check_cancelled()
        if self.deadline.remaining() == 0.0:
            return True
        for guard in self._guards:
            guard()
        return False

    @contextlib.contextmanager
    def guarded(self, guard: Callable[[], None]) -> Iterator[None]:
        """While this is entered, every wait of the call also runs ``guard``, which may raise."""
        self._guards.append(guard)
        try:
            yield
        finally:
            self._guards.remove(guard)

    def watch(self) -> None:
        """From now on ``check`` sees the failure of other ranks as soon as it happens. Called once
        the ranks agree which call this is."""
        self._watches = self._is_shared

    def store_to_block(self) -> contextlib.AbstractContextManager[Any]:
        """This call's part of the store, for calls in C++ that wait by themselves."""
        return self.membership.store_to_block(self.deadline)

    # ------------------------------------------------------------------ the end

    def __enter__(self) -> Call:
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
            self.membership.expect_end(None)
            self.state = self.on_success = self.on_failure = None
            self.membership.old_keys += [f"{self.membership.part}/{key}" for key in self.keys]
            if self._stays_out:
                self.membership.skip()

    def publish(self, error: BaseException) -> bytes:
        """Make ``error`` the outcome on all ranks, unless another was first; returns what it is."""
        error = _cause_of(error, self)
        if self._outcome is not None and not self._stays_out:
            return self._outcome  # whether the store still answers or not
        lost = self.membership.world.why_lost
        mine = encode_failure(error, self.rank, self.clock.phase, lost)
        if not self._stays_out:
            with contextlib.suppress(RuntimeError):  # the store may be what failed
                return self.membership.end(self.store, mine)
        return mine

    # ------------------------------------------------------------------ parts of the above

    def _start(self) -> None:
        """Tell visitors that a call has begun."""
        if self.leads and not self._started:
            self._started = True
            self.keys += ["done", "left"]
            self.membership.store.add("started", 1)

    def look_for_outcome(self) -> None:
        if self._outcome is None:
            self.heard = self.membership.world.liveness.rings  # first: who rings then has more
            self._outcome = peek(self.store, "outcome")

    def look_around(self, absent: Callable[[], list[int]]) -> None:
        """Now and then, whether members that are missing are in another call. The first one to
        come does it for all."""
        may_look = self._announced and self._came_first
        if may_look and self._hello is not None and time.monotonic() > self._looks_around_at:
            self.membership.check_apart(self._hello, absent())
            self._looks_around_at = time.monotonic() + _LOOK_AROUND

    def _raise_failure(self) -> None:
        if self._outcome is not None and self._outcome != SUCCESS:
            raise error_of(self._outcome, self.name)

    def _succeed(self) -> None:
        """Return only once every rank has done its part."""
        self.begin("completion")
        if self._is_shared:
            self._await_others()
        self._end_in_success(self.deadline)

    def _end_in_success(self, deadline: Deadline) -> None:
        self._leave(SUCCESS, deadline)
        self.clock.on_phase = None
        self.begin("done")
        if self.on_success is not None:
            self.on_success()

    def _await_others(self) -> None:
        """The last rank to arrive writes the outcome."""
        try:
            self.check()  # a rank that was stopped until the deadline is too late
            if self.store.add("done", 1) == len(self.members):
                self._outcome = self.membership.end(self.store, SUCCESS)
            _await_outcome(self)
            self._raise_failure()
        except BaseException as error:
            if isinstance(error, Exception) and self.publish(error) == SUCCESS:
                return  # the last rank arrived while this one gave up
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        """End the call everywhere, and raise the one error that every rank raises."""
        self.membership.expect_end(1.2 * _FAREWELL)
        self._guards.clear()
        outcome = self.publish(error)
        if outcome == SUCCESS:  # all ranks had succeeded when this one was interrupted
            self._end_in_success(Deadline(_FAREWELL))
            return
        if not self._stays_out:
            self.membership.learn(decode_failure(outcome), self._hello)
        self.clock.on_phase = None
        self.begin("failed")
        states: dict[int, str] = {}
        with contextlib.suppress(RuntimeError):
            if self.state is not None and not self._stays_out:
                self.keys.append(f"state/{self.rank}")
                states = self.membership.exchange_states(self.state(), _FAREWELL / 2)
            self._leave(outcome, Deadline(_FAREWELL))
        failure = error if isinstance(error, UpdateError) else error_of(outcome, self.name)
        failure.engines, failure.seconds = states, dict(self.clock.seconds)
        if self.on_failure is not None:
            self.on_failure(failure)
        try:
            if failure is error:
                raise failure
            if isinstance(error, Exception):
                raise failure from error
        finally:
            del error, failure  # this frame lives on in their traceback

    def _leave(self, outcome: bytes, deadline: Deadline) -> None:
        if self._announced:
            self.membership.withdraw()
        if not self._stays_out:
            self._start()
            if self.membership.leave(self._checkpoint, outcome, deadline):
                self.keys.append("outcome")  # otherwise it stays for those that come late


def _wait_for(call: Call, keys: Sequence[str]) -> None:
    """Until all ``keys`` are there. Polls: a wait that the store times out would be logged."""
    pause = 0.0001
    while not call.store.check(list(keys)):
        call.look_for_outcome()
        if call.is_late():
            raise missing(call.deadline.seconds, call.name, _missing(call, keys))
        call.look_around(lambda: _missing(call, keys))
        time.sleep(pause)
        pause = min(2 * pause, PAUSE)


def _missing(call: Call, keys: Sequence[str]) -> list[int]:
    return [int(key.rpartition("/")[2]) for key in keys if not call.store.check([key])]


def _await_outcome(call: Call) -> None:
    """Return once the call has one; raises as ``check`` does."""
    call._watches = True
    looks_at = time.monotonic() + UNRUNG
    while call._outcome is None:
        if call.heard is not None:
            call.membership.world.liveness.await_ring(call.heard, PAUSE)
        if time.monotonic() > looks_at:
            looks_at = time.monotonic() + UNRUNG
            call.look_for_outcome()
        call.check()


def _cause_of(error: BaseException, call: Call) -> BaseException:
    """Where a broadcast fails, another rank knows why, or is gone itself."""
    soon = Deadline(_FAREWELL / 2)
    try:
        while kind_of(error) == "broadcast_failed" and soon.remaining() > 0.0:
            call.look_for_outcome()
            call.check()
            time.sleep(PAUSE)
    except (RuntimeError, TimeoutError) as cause:
        return cause.with_traceback(None)  # which leads to the frame that will hold it
    return error
