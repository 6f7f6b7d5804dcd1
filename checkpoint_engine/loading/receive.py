"""One update as an inference worker receives it: the double buffer, the buckets, the end."""

from __future__ import annotations

import contextlib
import traceback
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import zmq

from checkpoint_engine.data_types import ALIGNMENT
from checkpoint_engine.errors import WireError
from checkpoint_engine.ground.checksum import FORMULA, check_bytes
from checkpoint_engine.ground.devices import DeviceManager
from checkpoint_engine.handover import wire
from checkpoint_engine.handover.ipc import open_buffer
from checkpoint_engine.handover.link import ServerLink
from checkpoint_engine.loading.loaded import LoadedBuckets, Parts, extract_weights
from checkpoint_engine.loading.replay.adapter import ModelUpdate
from checkpoint_engine.loading.replay.recording import NamedTensors
from checkpoint_engine.loading.version import WeightVersion

SERVER_TIMEOUT = 600.0
"""Seconds that a worker waits for the next message of a server that sets no deadline."""

PATIENCE_WITH_0_2 = 30.0
"""Seconds that a worker waits for a foreign server's second ``None``, before it does without."""

_Result = TypeVar("_Result")

_received: deque[str] = deque(maxlen=64)
"""The addresses of updates of our servers that are over. SGLang calls a second time, for its draft
model."""


@runtime_checkable
class BucketLoader(Protocol):
    """A ``run`` that recognises buckets by their messages, which then need not be decoded.

    ``reload.EngineReload`` and ``replay.Replayed`` are such; any other gets every bucket decoded.
    One may also have ``check()``, called before the worker accepts the update, which raises if the
    engine cannot be updated; ``begin()``, called next, while nothing has arrived yet; and
    ``statement()``, what was written, see ``UpdateReport.engines``.

    One that reads a part of the checkpoint may have ``needs``, what its next updates will read at
    most, and ``reads_next``, the digest of what the update that begins will read, or an empty text.
    ``load_bucket`` and ``replay`` then get ``needs=`` with buckets that hold nothing else, and must
    raise if they would read by other needs than those.

    One that may go without what its model holds has ``held``, an ``adapter.ModelUpdate`` or
    ``None``, which says what of a checkpoint that is.
    """

    def load_bucket(self, weights: NamedTensors, message: bytes, buffer: torch.Tensor) -> None:
        """Load a bucket; nothing may refer to the tensors afterwards."""
        ...

    def knows(self, message: bytes) -> bool:
        """Whether a bucket with this message can be replayed."""
        return False

    def replay(self, message: bytes, buffer: torch.Tensor) -> None:
        """Load such a bucket out of the double buffer."""
        raise RuntimeError("it knows no message")

    def finish(self) -> None:
        """All buckets are loaded, and the buffer is gone."""
        return

    def abandon(self) -> None:
        """The update failed. Also called after ``finish``, when something later fails."""
        return


class _DecodedBuckets(BucketLoader):
    """Any callable as a ``BucketLoader``."""

    def __init__(self, run: Callable[[NamedTensors], Any]) -> None:
        self._run = run

    def load_bucket(self, weights: NamedTensors, message: bytes, buffer: torch.Tensor) -> None:
        self._run(weights)


def update_weights_from_ipc(
    zmq_ctx: zmq.Context,
    zmq_handle: str,
    device_id: int | None,
    *,
    run: Callable[[NamedTensors], Any] | BucketLoader,
    post_hook: Callable[[], Any] | None = None,
    version: WeightVersion | None = None,
) -> None:
    """Receive one update. Called by each inference worker, with its own address.

    Args:
        zmq_ctx: a context of the caller's.
        zmq_handle: where this worker's server rank listens.
        device_id: this worker's device, as this process counts them.
        run: gets each bucket as ``[(name, tensor)]``. The tensors are views of memory that is
            overwritten as soon as it returns: copy what is kept. ``replay.replayed(run)`` learns it
            in the first two updates and replays it in later ones.
        post_hook: called when all weights are loaded and the buffer is gone.
        version: told what the model holds, before its first byte is written and at the end.

    Raises:
        WireError: the server is gone, or broke the protocol.
        TimeoutError: the server stopped sending.
        Exception: what ``run`` or ``post_hook`` raised, or the server's reason to abort. The
            weights are then partly written; another update repairs them.
    """
    if zmq_handle in _received:
        raise RuntimeError(
            f"this process has received the update at {zmq_handle} already, and gets it once: give "
            "a draft model its weights in the same call, by a run= that loads both, or in an "
            "update of its own"
        )
    version = version or WeightVersion()
    loader = run if isinstance(run, BucketLoader) else _DecodedBuckets(run)
    with contextlib.closing(ServerLink(zmq_ctx, zmq_handle, SERVER_TIMEOUT)) as link:
        try:
            _Reception(link, loader, version).run(device_id, post_hook)
        except BaseException:
            loader.abandon()
            raise
        finally:
            version.fail()  # unless it is complete


def own_address(zmq_handles: dict[str, str], identity: str) -> str:
    """Where the server of the device ``identity`` waits. Raises ``KeyError`` if none serves it."""
    if identity not in zmq_handles:
        raise KeyError(
            f"this worker is {identity}, but the parameter server serves {sorted(zmq_handles)}"
        )
    return zmq_handles[identity]


class _Reception:
    """One update. The first failure is told to the server; nothing is loaded after it."""

    _buffers: list[torch.Tensor]
    _found: torch.Tensor  # the bucket that came last
    _device: DeviceManager

    def __init__(self, link: ServerLink, loader: BucketLoader, version: WeightVersion) -> None:
        self._link = link
        self._loader = loader
        self._version = version
        self._parts = Parts()
        self._own = torch.empty(0, dtype=torch.uint8)
        self._loaded = LoadedBuckets()
        self._needs = ""
        self._held: ModelUpdate | None = None
        self._failure: Exception | None = None

    def run(self, device_id: int | None, post_hook: Callable[[], Any] | None) -> None:
        extensions = self._receive_buffer(device_id)
        self._device = DeviceManager(self._buffers[0].device.type)
        with self._device.at(self._buffers[0].device):  # whatever the caller's current device is
            try:
                if extensions.get(wire.SOURCES):
                    self._receive_sources(device_id)
                if self._held is not None:
                    self._agree_on_left_out(self._held)
                self._load_buckets(extensions.get("weight_version"))
            finally:
                # The traceback of what is raised leads to this object.
                del self._buffers, self._parts, self._own, self._found
                self._device.release_cached_memory()
            self._acknowledge()
            server_waits = self._server_waits_for_post_hook(is_ours=bool(extensions))
            self._attempt(partial(self._finish, post_hook))
            if self._failure is None:
                self._version.complete()
                if extensions:  # servers of the original use an address again after a restart
                    _received.append(self._link.address)
            if server_waits and self._failure is None and wire.STATEMENT in extensions:
                stated: dict[str, Any] = getattr(self._loader, "statement", dict)()
                self._link.reply(
                    wire.encode_extensions({wire.STATEMENT: stated} | self._needs_now(extensions))
                )
            elif server_waits:
                self._acknowledge()
            if self._failure is not None:
                try:
                    raise self._failure
                finally:
                    self._failure = None  # no circle from its traceback back to it

    def _needs_now(self, offered: dict[str, Any]) -> dict[str, Any]:
        """What the loader needs from now on, where the server asks."""
        if wire.NEEDS not in offered:
            return {}
        needs = getattr(self._loader, "needs", None)
        return {wire.NEEDS: wire.encode_needs(needs, offered[wire.NEEDS])}

    def _receive_buffer(self, device_id: int | None) -> dict[str, Any]:
        """Map the double buffer; returns the extensions that the server offers."""
        refusal = self._make_ready()
        message = self._link.receive()
        try:
            handle = wire.decode_handle(message)
            if isinstance(handle, wire.Handle):
                if refusal is not None:
                    raise refusal
                self._buffers = [open_buffer(handle.rebuild, handle.args, device_id)]
                self._found = self._buffers[0]
                if wire.NEEDS in handle.extensions:
                    self._needs = getattr(self._loader, "reads_next", "")
        except Exception:
            self._link.reply(wire.encode_failure(traceback.format_exc()))
            with contextlib.suppress(WireError, TimeoutError):
                self._link.receive()  # the server's reason to abort, whatever it says
            raise
        finally:
            refusal = None  # its traceback leads here
        if isinstance(handle, Exception):
            try:
                raise handle
            finally:
                del handle  # no circle from its traceback back to it
        offered = handle.extensions
        if "timeout" in offered:
            self._link.set_deadline(offered["timeout"])
        accepted = {"version": 1, wire.CHECKSUM: FORMULA, wire.PART: True, wire.DELIVERED: True}
        accepted |= {one: True for one in (wire.JSON_BUCKETS, wire.SOURCES) if one in offered}
        if wire.NEEDS in offered:
            accepted[wire.NEEDS] = self._needs
        if wire.HELD in offered and (held := getattr(self._loader, "held", None)) is not None:
            self._held, accepted[wire.HELD] = held, True
        self._link.reply(wire.encode_extensions(accepted) if offered else wire.ACK)
        return offered

    def _make_ready(self) -> Exception | None:
        """What can be done before the server has connected its ranks; returns why it cannot."""
        try:
            getattr(self._loader, "check", lambda: None)()
            getattr(self._loader, "begin", lambda: None)()
        except Exception as error:
            return error
        return None

    def _receive_sources(self, device_id: int | None) -> None:
        """Map the buffers of the other ranks, or say why that cannot be done."""
        handles = _unless_error(wire.decode_sources(self._link.receive()))
        why = ""
        try:
            self._buffers += [
                open_buffer(one.rebuild, one.args, device_id, True) for one in handles
            ]
        except Exception as error:  # of any kind: this rank's server serves it without them
            del self._buffers[1:]
            why = f"{type(error).__name__}: {error}"
        self._link.reply(wire.encode_extensions({wire.SOURCES: why}))

    def _agree_on_left_out(self, held: ModelUpdate) -> None:
        """Say what of the checkpoint the model holds, until all ranks leave out the same of it."""
        is_settled = False
        while not is_settled and self._failure is None:
            asked = _unless_error(wire.decode_held(self._link.receive()))
            is_settled = asked[:2] == (wire.LEFT_OUT, True)
            bits = self._attempt(partial(_answer, held, *asked))
            if bits is not None:
                self._link.reply(wire.encode_extensions({wire.HELD: wire.encode_bits(bits)}))
            else:
                self._acknowledge()

    def _load_buckets(self, version: str | None) -> None:
        """Load buckets until there are no more."""
        while True:
            received = self._link.receive()
            try:
                received, extensions = wire.split_extensions(received)
                is_known = bool(self._attempt(partial(self._loader.knows, received)))
                self._attempt(partial(self._find, extensions, is_known))
                message = received if is_known else wire.decode_message(received)
            except WireError as error:  # the server waits for a reply to it all the same
                self._link.reply(_told(_without_frames(error)))
                raise
            if isinstance(message, Exception):
                try:
                    raise message from self._failure
                finally:
                    del message
            self._version.begin(version)
            if message is None:
                self._attempt(partial(self._check_end, extensions))
                return
            self._attempt(partial(self._load, received, message, extensions))
            self._acknowledge()

    def _load(
        self, received: bytes, bucket: wire.Bucket | bytes, extensions: dict[str, Any]
    ) -> None:
        """Load a bucket that has arrived. ``bucket``: its message, if that can be replayed."""
        source: torch.Tensor | None = self._found
        if wire.PART in extensions:
            source = self._parts.add(received, extensions[wire.PART], self._found)
        if source is not None:
            _check_bytes(extensions.get(wire.CHECKSUM), source)
            part = self._part_of(extensions)
            if isinstance(bucket, bytes):
                self._loader.replay(bucket, source, **part)
            else:
                self._device.synchronize()  # a copy; a loader may go on in another stream
                self._loader.load_bucket(extract_weights(bucket, source), received, source, **part)
            self._loaded.note(received)
        self._device.synchronize()

    def _part_of(self, extensions: dict[str, Any]) -> dict[str, str]:
        """What a loader is told of a bucket that does not hold everything.

        Raises:
            WireError: this worker has not said that it reads by those needs.
        """
        needs = extensions.get(wire.NEEDS, "")
        if not needs:
            return {}
        if needs != self._needs:
            raise WireError("a bucket holds less than this worker said that it reads")
        return {"needs": needs}

    def _find(self, extensions: dict[str, Any], is_known: bool) -> None:
        """Where a bucket is. One that is not known sets out to where only this worker has it, while
        its message is decoded: other ranks read the buffers, too, and a loader may write into what
        it is given, as that of GPT-OSS into biases."""
        self._found = self._buffers[0]
        if wire.SOURCE not in extensions:
            return
        self._found = found = _place_of(self._buffers, extensions[wire.SOURCE])
        if len(self._buffers) > 1 and not is_known and wire.PART not in extensions:
            if len(self._own) < len(found) or self._own.device != found.device:
                self._own = found[:0]  # so that there are never two of them
                self._own = torch.empty_like(found)
            self._found = self._own[: len(found)].copy_(found, non_blocking=True)

    def _check_end(self, extensions: dict[str, Any]) -> None:
        """Raise unless everything was loaded once, as far as the server says what there was."""
        self._parts.check_complete()
        if wire.DELIVERED in extensions:
            self._loaded.check(extensions[wire.DELIVERED])

    def _server_waits_for_post_hook(self, is_ours: bool) -> bool:
        """Whether the second ``None`` came. Senders of release 0.2 leave after the first, or wait
        for the engine to answer their request."""
        try:
            received = self._link.receive(PATIENCE_WITH_0_2)
        except (WireError, TimeoutError):
            if is_ours:  # it never leaves early unless it died
                raise
            return False
        message = wire.decode_message(received)
        if isinstance(message, Exception):
            try:
                raise message from self._failure
            finally:
                del message
        if message is not None:
            raise WireError("the server sent a bucket after it had said there are no more")
        return True

    def _finish(self, post_hook: Callable[[], Any] | None) -> None:
        self._loader.finish()
        if post_hook is not None:
            post_hook()
        self._device.synchronize()

    def _attempt(self, action: Callable[[], _Result]) -> _Result | None:
        """What ``action`` returns; ``None`` if it, or anything before it, failed."""
        if self._failure is None:
            try:
                return action()
            except Exception as error:
                self._failure = _without_frames(error)
        return None

    def _acknowledge(self) -> None:
        self._link.reply(wire.ACK if self._failure is None else _told(self._failure))


def _answer(held: ModelUpdate, what: str, about: Any, content: bytes) -> bytes:
    if what == wire.HELD:
        return held.offer(about, content)
    if about:
        held.leave_out(content)
        return content
    return held.narrow(content)


def _unless_error(said: _Result | Exception) -> _Result:
    """What the server said; if that is why it aborts, that is raised."""
    if isinstance(said, Exception):
        try:
            raise said
        finally:
            del said  # no circle from its traceback back to it
    return said


def _without_frames(error: Exception) -> Exception:
    """``error`` without the frames it was raised in, which hold views of the buffer. Its traceback
    is its last note."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    chain: list[BaseException | None] = [error]
    seen: set[int] = set()
    while chain:
        link = chain.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            link.__traceback__ = None
            chain += [link.__cause__, link.__context__, *getattr(link, "exceptions", ())]
    error.__notes__ = [*getattr(error, "__notes__", []), text]
    return error


def _told(failure: Exception) -> bytes:
    return wire.encode_failure(failure.__notes__[-1])


def _place_of(buffers: list[torch.Tensor], place: Any) -> torch.Tensor:
    """A bucket in one of the buffers."""
    match place:
        case [int(number), int(start), int(nbytes)] if (
            0 <= number < len(buffers)
            and min(start, nbytes) >= 0
            and start + nbytes <= buffers[number].numel()
            and start % ALIGNMENT == 0
        ):
            return buffers[number][start : start + nbytes]
    raise WireError(f"no place of a bucket in {len(buffers)} buffers: {place!r:.100}")


def _check_bytes(expected: Any, buffer: torch.Tensor) -> None:
    """Raise unless a bucket's bytes are those that its owner registered."""
    match expected:
        case [int(start), int(nbytes), int(first_block), int(total)] if (
            min(start, nbytes, first_block) >= 0
            and start + nbytes <= buffer.numel()
            and start % ALIGNMENT == nbytes % ALIGNMENT == 0
        ):
            where = f"the bucket at {start}"
            check_bytes(buffer[start : start + nbytes], first_block, total, where)
        case _ if expected is not None:
            raise WireError(f"no checksum of bytes in the buffer: {expected!r:.100}")
