"""The inference side. Imported inside every inference worker, so it stays cheap to import."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import zmq

from checkpoint_engine.data_types import ALIGNMENT, tensor_nbytes
from checkpoint_engine.device_utils import DeviceManager, worker_index
from checkpoint_engine.errors import WireError
from checkpoint_engine.handover.ipc import open_buffer
from checkpoint_engine.handover.link import ServerLink
from checkpoint_engine.handover.wire import (
    ACK,
    CHECKSUM,
    DELIVERED,
    JSON_BUCKETS,
    PART,
    Abort,
    Bucket,
    FlattenedTensorMetadata,
    Handle,
    NothingMore,
    decode_handle,
    decode_message,
    encode_acceptance,
    encode_failure,
    split_extensions,
)
from checkpoint_engine.loading.delivery import Delivery
from checkpoint_engine.loading.parts import Parts
from checkpoint_engine.loading.reload import EngineReload
from checkpoint_engine.loading.replay.recording import NamedTensors
from checkpoint_engine.loading.version import WeightVersion
from checkpoint_engine.memory.checksum import FORMULA, check_bytes

__all__ = ["FlattenedTensorMetadata", "VllmColocateWorkerExtension", "update_weights_from_ipc"]

SERVER_TIMEOUT = 600.0
"""Seconds that a worker waits for the next message of a server that sets no deadline."""

PATIENCE_WITH_0_2 = 30.0
"""Seconds that a worker waits for a foreign server's second ``None``, before it does without."""


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
    version = version or WeightVersion()
    loader = run if isinstance(run, BucketLoader) else _DecodedBuckets(run)
    with (
        contextlib.closing(ServerLink(zmq_ctx, zmq_handle, SERVER_TIMEOUT)) as link,
        _failing_unless_complete(version),
        _abandoned_on_failure(loader),
    ):
        handle, buffer = _receive_buffer(link, device_id)
        device_type = buffer.device.type
        begin = partial(version.begin, handle.extensions.get("weight_version"))
        try:
            failure = _load_buckets(link, buffer, loader, begin)
        finally:
            del buffer
            _release_device_memory(device_type)
        _acknowledge(link, failure)
        server_waits = _server_waits_for_post_hook(link, handle, failure)
        failure = failure or _attempt(partial(_finish, loader, post_hook, device_type))
        if failure is None:
            version.complete()
        if server_waits:
            _acknowledge(link, failure)
        if failure is not None:
            try:
                raise failure.error
            finally:
                del failure  # this frame lives on in its traceback


@contextlib.contextmanager
def _failing_unless_complete(version: WeightVersion) -> Iterator[None]:
    try:
        yield
    finally:
        version.fail()


@runtime_checkable
class BucketLoader(Protocol):
    """A ``run`` that recognises buckets by their messages, which then need not be decoded.

    ``reload.EngineReload`` and ``replay.Replayed`` are such; any other gets every bucket decoded.
    """

    def knows(self, message: bytes) -> bool:
        """Whether a bucket with this message can be replayed."""
        ...

    def replay(self, message: bytes, buffer: torch.Tensor) -> None:
        """Load such a bucket out of the double buffer."""
        ...

    def load_bucket(self, weights: NamedTensors, message: bytes, buffer: torch.Tensor) -> None:
        """Load any other one; nothing may refer to the tensors afterwards."""
        ...

    def finish(self) -> None:
        """All buckets are loaded, and the buffer is gone."""
        ...

    def abandon(self) -> None:
        """The update failed. Also called after ``finish``, when something later fails."""
        ...


class _DecodedBuckets:
    """Any callable as a ``BucketLoader``."""

    def __init__(self, run: Callable[[NamedTensors], Any]) -> None:
        self._run = run

    def knows(self, message: bytes) -> bool:
        return False

    def replay(self, message: bytes, buffer: torch.Tensor) -> None:
        raise RuntimeError("it knows no message")

    def load_bucket(self, weights: NamedTensors, message: bytes, buffer: torch.Tensor) -> None:
        self._run(weights)

    def finish(self) -> None:
        """It is not told."""

    def abandon(self) -> None:
        """It is not told."""


@contextlib.contextmanager
def _abandoned_on_failure(loader: BucketLoader) -> Iterator[None]:
    try:
        yield
    except BaseException:
        loader.abandon()
        raise


def _receive_buffer(link: ServerLink, device_id: int | None) -> tuple[Handle, torch.Tensor]:
    message = link.receive()
    handle: Handle | Abort | None = None
    try:
        handle = decode_handle(message)
        if isinstance(handle, Abort):
            raise handle.error
        buffer = open_buffer(handle.rebuild, handle.args, device_id)
    except Exception:
        if isinstance(handle, Abort):
            raise
        link.reply(encode_failure(traceback.format_exc()))
        with contextlib.suppress(WireError, TimeoutError):
            link.receive()  # the server's reason to abort, whatever it says
        raise
    if "timeout" in handle.extensions:
        link.set_deadline(handle.extensions["timeout"])
    accepted = {"version": 1, CHECKSUM: FORMULA, PART: True, DELIVERED: True}
    accepted |= {key: True for key in (JSON_BUCKETS,) if key in handle.extensions}
    link.reply(encode_acceptance(accepted) if handle.extensions else ACK)
    return handle, buffer


def _load_buckets(
    link: ServerLink, buffer: torch.Tensor, loader: BucketLoader, begin: Callable[[], None]
) -> _Failure | None:
    """Load buckets until there are no more. Returns the first failure; nothing is loaded after
    it. ``begin``: called before anything is written."""
    failure: _Failure | None = None
    begun = False
    parts, delivery = Parts(), Delivery()
    try:
        while True:
            received = link.receive()
            try:
                received, extensions = split_extensions(received)
                known, failure = _knows(loader, received, failure)
                message = None if known else decode_message(received)
            except WireError as error:  # the server waits for a reply to it all the same
                _acknowledge(link, _Failure.of(error))
                raise
            if not begun and not isinstance(message, Abort):
                begin()
                begun = True
            if isinstance(message, NothingMore):
                return failure or _attempt(partial(_check_end, extensions, parts, delivery))
            if isinstance(message, Abort):
                raise message.error from (failure and failure.error)
            failure = failure or _attempt(
                partial(_load, received, message, extensions, buffer, parts, delivery, loader)
            )
            _acknowledge(link, failure)
    finally:
        del buffer, parts  # this frame lives on in the traceback of what is raised


def _load(
    received: bytes,
    bucket: Bucket | None,
    extensions: dict[str, Any],
    buffer: torch.Tensor,
    parts: Parts,
    delivery: Delivery,
    loader: BucketLoader,
) -> None:
    """Load what lies in the double buffer. ``bucket``: ``None`` if it can be replayed."""
    source: torch.Tensor | None = buffer
    if PART in extensions:
        source = parts.add(received, extensions[PART], buffer)
    if source is not None:
        _check_bytes(extensions.get(CHECKSUM), source)
        if bucket is None:
            loader.replay(received, source)
        else:
            loader.load_bucket(extract_weights(bucket.tensors, source), received, source)
        delivery.note(received)
    _synchronize(buffer.device.type)


def _check_end(extensions: dict[str, Any], parts: Parts, delivery: Delivery) -> None:
    """Raise unless everything was loaded once, as far as the server says what there was."""
    parts.check_complete()
    if DELIVERED in extensions:
        delivery.check(extensions[DELIVERED])


def _check_bytes(expected: Any, buffer: torch.Tensor) -> None:
    """Raise unless a bucket's bytes are those that its owner registered."""
    match expected:
        case None:
            return
        case [int(start), int(nbytes), int(first_block), int(total)] if (
            min(start, nbytes, first_block) >= 0
            and start + nbytes <= buffer.numel()
            and start % ALIGNMENT == nbytes % ALIGNMENT == 0
        ):
            where = f"the bucket at {start}"
            check_bytes(buffer[start : start + nbytes], first_block, total, where)
        case _:
            raise WireError(f"no checksum of bytes in the buffer: {expected!r:.100}")


def _knows(
    loader: BucketLoader, message: bytes, failure: _Failure | None
) -> tuple[bool, _Failure | None]:
    """Whether a bucket can be replayed; nothing is after a failure."""
    if failure is not None:
        return False, failure
    try:
        return loader.knows(message), None
    except Exception as error:
        return False, _Failure.of(error)


def extract_weights(tensors: list[FlattenedTensorMetadata], buffer: torch.Tensor) -> NamedTensors:
    """The tensors of a bucket as views of the double buffer.

    Raises:
        ValueError: one reaches beyond the buffer.
    """
    weights = []
    for entry in tensors:
        dtype, shape, start = entry["dtype"], entry["shape"], entry["offset"]
        end = start + tensor_nbytes(dtype, shape)
        if end > buffer.nbytes:
            raise ValueError(f"tensor {entry['name']!r} ends at {end} of {buffer.nbytes} bytes")
        weights.append((entry["name"], buffer[start:end].view(dtype).view(shape)))
    return weights


class _Failure(NamedTuple):
    """What went wrong, without the frames it went wrong in: they hold views of the buffer."""

    error: Exception
    text: str

    @staticmethod
    def of(error: Exception) -> _Failure:
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
        return _Failure(error, text)


def _attempt(action: Callable[[], None]) -> _Failure | None:
    try:
        action()
    except Exception as error:
        return _Failure.of(error)
    return None


def _acknowledge(link: ServerLink, failure: _Failure | None) -> None:
    link.reply() if failure is None else link.reply(encode_failure(failure.text))


def _server_waits_for_post_hook(link: ServerLink, handle: Handle, failure: _Failure | None) -> bool:
    """Whether the second ``None`` came. Senders of release 0.2 leave after the first, or wait for
    the engine to answer their request."""
    try:
        received = link.receive(PATIENCE_WITH_0_2)
    except (WireError, TimeoutError):
        if handle.extensions:  # a server of ours never leaves early unless it died
            raise
        return False
    message = decode_message(received)
    if isinstance(message, Abort):
        raise message.error from (failure and failure.error)
    if isinstance(message, Bucket):
        raise WireError("the server sent a bucket after it had said there are no more")
    return True


def _finish(loader: BucketLoader, post_hook: Callable[[], Any] | None, device_type: str) -> None:
    loader.finish()
    if post_hook is not None:
        post_hook()
    _synchronize(device_type)


def _synchronize(device_type: str) -> None:
    DeviceManager(device_type).synchronize()


def _release_device_memory(device_type: str) -> None:
    DeviceManager(device_type).release_cached_memory()


class VllmColocateWorkerExtension:
    """Mixed into vLLM's workers by ``--worker-extension-cls``; called over ``/collective_rpc``.

    Any engine can use it whose workers have ``device``, ``local_rank`` and
    ``model_runner.model.load_weights``.
    """

    device: torch.device
    local_rank: int
    model_runner: Any

    def update_weights_from_ipc(self, zmq_handles: dict[str, str]) -> dict[str, Any]:
        """Load the weights that the parameter server sends to this worker's device.

        Args:
            zmq_handles: device identity to address, of at least this engine's devices.

        Returns:
            By model (``model``, ``drafter``), what it took: ``tensors``, ``bytes``, ``missing``
            parameters, ``unused`` tensors and more; see ``reload.ModelReport``.

        Raises:
            KeyError: this worker's device is not among them.
        """
        device_manager = DeviceManager(self.device.type)
        index = self.device.index if self.device.index is not None else self.local_rank
        identity = device_manager.identity(worker_index(self.device.type, index))
        if identity not in zmq_handles:
            raise KeyError(
                f"this worker is {identity}, but the parameter server serves {sorted(zmq_handles)}"
            )
        habits = self.__dict__.setdefault("_loader_habits", {})
        with contextlib.closing(EngineReload(self, habits)) as reload, zmq.Context() as context:
            update_weights_from_ipc(
                context,
                zmq_handles[identity],
                device_id=index,
                run=reload,
                version=self._weight_version(),
            )
            return reload.summary()

    def weight_version(self) -> dict[str, str | None]:
        """Which weights this worker's model holds; callable over ``/collective_rpc``.

        Returns:
            ``state``: ``initial``, ``updating``, ``complete`` or ``failed`` (partly written).
            ``version``: the id of the update, where it is complete and its server gave one.
            ``updating``: the id of one that is, or was left, half-way.
        """
        return self._weight_version().describe()

    def _weight_version(self) -> WeightVersion:
        return self.__dict__.setdefault("_weights_held", WeightVersion())
