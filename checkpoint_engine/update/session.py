"""What a server rank tells its worker in one update, and what the worker holds then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from enum import Enum
from functools import wraps
from typing import Any, Concatenate, ParamSpec

from checkpoint_engine.errors import EngineError, WireError
from checkpoint_engine.ground.checksum import FORMULA
from checkpoint_engine.ground.deadline import Deadline, poll
from checkpoint_engine.ground.needs import HASH_BYTES, digest_of
from checkpoint_engine.ground.report import InstanceFailure
from checkpoint_engine.handover import wire
from checkpoint_engine.handover.ipc import SharedBuffer
from checkpoint_engine.handover.link import WorkerLink
from checkpoint_engine.update.order import check_request
from checkpoint_engine.world.call import Call

_FAREWELL_OF_0_2 = 30.0  # seconds for req_func where a worker of 0.2 has left, perhaps in order


P = ParamSpec("P")


class EngineState(Enum):
    """What an update has done to the weights of an engine."""

    UNTOUCHED = "untouched"
    PARTLY_WRITTEN = "partly written"
    HOLDS = "holds"


def _step(
    method: Callable[Concatenate[WorkerSession, P], None],
) -> Callable[Concatenate[WorkerSession, P], None]:
    """Something that the engine may fail in: ``WorkerSession.attempt`` decides what follows."""

    @wraps(method)
    def attempt(self: WorkerSession, /, *args: P.args, **kwargs: P.kwargs) -> None:
        self.attempt(lambda: method(self, *args, **kwargs))

    return attempt


class WorkerSession:
    """One update as seen by this rank's worker: handle, buckets, release, finish.

    Attributes:
        state: what the worker's model holds by now.
        statement: what it says that the update wrote; see ``UpdateReport.engines``.
        unmapped: why the worker has not mapped the other ranks' buffers; empty if it has, ``None``
            while it is not known.
        needs: what the worker's loader reads, as it stated last; empty: everything. Of the update
            before, until this one says something else.
        held: a bit for each tensor that the worker holds and that may be left out; ``None``: it
            loads nothing, and needs nothing.
        failed: engine instances that were not updated; none, for a session that fails raises.
    """

    failed: Sequence[InstanceFailure] = ()

    def __init__(self, link: WorkerLink, call: Call, version: str) -> None:
        self._link = link
        self._call = call
        self._version = version
        self._extensions: dict[str, Any] = {}
        self._accepted = False
        self.needs = ""
        self.unmapped: str | None = None
        self.held: bytes | None = None
        self._told_to_release = self._told_to_finish = self._may_leave = False
        self._loading = 0  # buckets that it was sent, and has not answered
        self.state = EngineState.UNTOUCHED
        self.statement: dict[str, Any] = {}

    def attempt(self, action: Callable[[], None]) -> None:
        """Run a step; what it raises fails the update."""
        action()

    def _check(self) -> None:
        """Ends a wait for the engine by raising."""
        self._call.check()

    def describe_state(self) -> str:
        """For ``UpdateError.engines``: ``untouched``, ``partly written`` or ``holds VERSION``."""
        if self.state is EngineState.HOLDS:
            return f"{self.state.value} {self._version}"
        return self.state.value

    @_step
    def hand_over(
        self,
        buffer: SharedBuffer,
        seconds_left: float,
        in_parts: bool = False,
        sources: Sequence[bytes] | None = None,
        must_map: bool = False,
        needs: str = "",
        asks_needs: bool = False,
        asks_held: bool = False,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Share the double buffer; returns when the worker has mapped it.

        Args:
            meanwhile: as of ``await_reload``.
            in_parts: whether some tensors are going to come in parts.
            sources: handles of the other ranks' buffers; ``None``: it needs none.
            must_map: whether the worker can be updated only if it maps those.
            needs: what it reads, as far as is known.
            asks_needs: whether it is to say what it reads.
            asks_held: whether it is going to be asked what it holds.
        """
        offered: dict[str, Any] = {"timeout": seconds_left, "weight_version": self._version}
        offered |= {wire.JSON_BUCKETS: True, wire.STATEMENT: True, wire.SOURCES: len(sources or ())}
        self.needs = needs
        if asks_needs:
            offered[wire.NEEDS] = digest_of(needs)
        if asks_held:
            offered[wire.HELD] = True
        handle = wire.encode_handle(*buffer.handle(), offered)
        self._link.send(handle, self._check)
        reply = self._await_reply(meanwhile)
        extensions = wire.decode_acceptance(reply)
        if extensions is None:
            raise _failed("the handshake", reply)
        self._extensions = extensions
        self._accepted = True
        if in_parts and not self.worker_joins_parts:
            raise EngineError(
                "this worker cannot put tensors together that travel in parts, as they must for "
                "want of memory, or as the worker before it could: update again, and they will "
                "travel whole"
            )
        if sources is not None:
            self.unmapped = self._share(sources, meanwhile)
        if must_map and self.unmapped:
            raise EngineError(
                f"{self.unmapped}, as it, or the worker before it, did in the last update: update "
                "again, and it will get whole buckets from its server rank"
            )

    def _share(self, sources: Sequence[bytes], meanwhile: Callable[[], None]) -> str:
        """Have the worker map other ranks' buffers; returns why it cannot."""
        if not self.finds_sources:
            return "the worker, of another release or library, cannot read other ranks' buffers"
        if not sources:
            return ""
        self._link.send(wire.encode_sources(sources), self._check)
        reply = self._await_reply(meanwhile)
        said = wire.decode_acceptance(reply) or {}
        if wire.SOURCES not in said:
            raise _failed("the handshake", reply)
        why = said[wire.SOURCES]
        return f"the worker cannot map other ranks' buffers: {why}" if why else ""

    @_step
    def ask_held(self, tensors: str, hashes: bytes) -> None:
        """Learn what the worker holds of the tensors that have these hashes: ``held``."""
        self.held = bytes(-(-len(hashes) // HASH_BYTES // 8))
        if self._extensions.get(wire.HELD):
            self.held = self._hear_held(wire.encode_contents(tensors, hashes))

    @_step
    def leave_out(self, bits: bytes, is_settled: bool) -> None:
        """Tell the worker what is left out, or would be: then ``held`` is as much of it as may be.

        Raises ``EngineError`` if it is settled, and the worker does not hold all of it.
        """
        if not self._extensions.get(wire.HELD):
            self.held = bytes(len(bits))
        else:
            self.held = self._hear_held(wire.encode_left_out(bits, is_settled))
        if is_settled and self.held != bits:
            raise EngineError("the worker does not hold what is left out of this update")

    def _hear_held(self, message: bytes) -> bytes:
        self._link.send(message, self._check)
        reply = self._await_reply(lambda: None)
        said = wire.decode_acceptance(reply)
        if said is None:
            raise _failed("telling what it holds", reply)
        bits = wire.decode_bits(said.get(wire.HELD))
        if self.held is not None and len(bits) != len(self.held):
            raise WireError(f"the worker tells what it holds in {len(bits)} bytes")
        return bits

    @property
    def worker_is_ours(self) -> bool:
        """Whether the worker is of this release or a later one, or at least knows extensions."""
        return bool(self._extensions)

    @property
    def reads_needs(self) -> bool:
        """Whether the worker is going to read no more than ``needs``, as it has said."""
        return self.needs != "" and self._extensions.get(wire.NEEDS) == digest_of(self.needs)

    @property
    def finds_sources(self) -> bool:
        """Whether the worker is told with each bucket which buffer it is in, and where."""
        return bool(self._extensions.get(wire.SOURCES))

    @property
    def encode_bucket(self) -> Callable[[list[dict[str, Any]]], bytes]:
        """How this worker reads buckets."""
        as_json = self._extensions.get(wire.JSON_BUCKETS)
        return wire.encode_bucket_as_json if as_json else wire.encode_bucket

    @property
    def worker_checks_sums(self) -> bool:
        """Whether the worker looks at checksums itself, right before it loads."""
        return bool(self._extensions.get(wire.CHECKSUM) == FORMULA)

    @property
    def worker_joins_parts(self) -> bool | None:
        """Whether the worker takes tensors in parts; ``None`` if it has not said."""
        return bool(self._extensions.get(wire.PART)) if self._accepted else None

    def check(self) -> None:
        """Raise if this rank's engine is gone. A guard of the call, see ``Call.guarded``."""
        if not self._may_leave:
            self._link.check()

    @property
    def phase(self) -> str:
        """What the engine fails in, if it fails now. It loads while this rank waits for the next
        bucket."""
        return "reload" if self._loading else self._call.clock.phase

    @_step
    def begin_reload(self, message: bytes) -> None:
        self.state = EngineState.PARTLY_WRITTEN
        self._loading += 1
        self._link.send(message, self._check)

    def has_answered(self) -> bool:
        """Whether ``await_reload`` would not wait."""
        return self._link.has_reply()

    @_step
    def await_reload(self, what: str, meanwhile: Callable[[], None]) -> None:
        """``meanwhile``: called again and again until the worker is ready.

        Raises ``EngineError`` with the worker's traceback if it could not load the bucket.
        """
        _expect_ack(self._await_reply(meanwhile), what)
        self._loading -= 1

    def _await_reply(self, meanwhile: Callable[[], None]) -> bytes:
        def is_there() -> bool:
            if self._link.has_reply():  # first: what the engine says of a failure is its cause
                return True
            meanwhile()
            return self._link.has_reply()

        def check() -> None:
            self._check()
            self._link.check()

        poll(is_there, check)
        return self._link.receive(self._check)

    def _await_statement(self) -> dict[str, Any]:
        reply = self._link.receive(self._check)
        said = wire.decode_acceptance(reply)
        if said is None:
            raise _failed("its post hook", reply)
        if wire.NEEDS in said and said[wire.NEEDS] is not True:
            self.needs = wire.decode_needs(said[wire.NEEDS])
        found = said.get(wire.STATEMENT, {})
        return found if isinstance(found, dict) else {}

    @_step
    def announce_end(self, planned: Sequence[str | None], go_on: bool = True) -> None:
        """Tell a worker of ours which buckets it was to load, and let it go on by itself after the
        last one; it does not go on after a failure. Workers of other releases wait to be told.

        Args:
            planned: the digest of each bucket's message; ``None`` for a part that does not end its
                tensor.
            go_on: to its post hook; otherwise only until it has dropped the double buffer.
        """
        if self._extensions:
            told = b""
            if self._extensions.get(wire.DELIVERED):
                told = wire.encode_extensions({wire.DELIVERED: planned})
            self._link.send(wire.NOTHING_MORE + told, self._check)
            self._told_to_release = True
            if go_on:
                self._link.send(wire.NOTHING_MORE, self._check)
                self._told_to_finish = True

    @_step
    def release(self) -> None:
        """Have the worker drop the double buffer."""
        if not self._told_to_release:
            self._link.send(wire.NOTHING_MORE, self._check)
        _expect_ack(self._link.receive(self._check), "the release of the buffer")
        self._may_leave = not self._extensions  # workers of release 0.2 may have finished

    @_step
    def finish(self, request: Future[Any]) -> None:
        """Have the worker run its post hook; returns when the engine has answered too.

        Workers of release 0.2 ran theirs before they released the buffer, and may have left. Then
        the engine's answer alone tells whether they succeeded.
        """
        self.state = EngineState.PARTLY_WRITTEN
        self._may_leave = True
        try:
            if not self._told_to_finish:
                self._link.send(wire.NOTHING_MORE, self._check)
            self.statement = self._await_statement()
        except WireError:
            if self._extensions:
                raise
            grace = Deadline(_FAREWELL_OF_0_2)
            poll(lambda: request.done() or grace.remaining() == 0.0, self._check)
            if not request.done():
                raise
        poll(request.done, self._check)
        check_request(request)
        self.state = EngineState.HOLDS


def _expect_ack(reply: bytes, what: str) -> None:
    if reply != wire.ACK:
        raise _failed(what, reply)


def _failed(what: str, reply: bytes) -> EngineError:
    traceback = reply.decode(errors="replace")
    return EngineError(f"the inference worker failed in {what}:\n{traceback}")
