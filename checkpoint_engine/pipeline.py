"""Executes a plan on one rank: host to device, broadcast and reload, each bucket behind the other.

While the worker reloads one bucket, the next is being broadcast into the other half of the double
buffer, and the owners copy the ones after that into staging. The first buckets set out before the
worker has answered at all.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

from checkpoint_engine.checksum import FORMULA, Checksums
from checkpoint_engine.control import Operation
from checkpoint_engine.data_types import TensorPart
from checkpoint_engine.deadline import Deadline, poll
from checkpoint_engine.delivery import digest
from checkpoint_engine.device_utils import DeviceManager
from checkpoint_engine.distributed.weights_group import WeightsGroup
from checkpoint_engine.errors import GroupError, RequestError, WireError, WorkerError
from checkpoint_engine.ipc import SharedBuffer
from checkpoint_engine.link import WorkerLink
from checkpoint_engine.loaders import Arrival, InThread, Loader
from checkpoint_engine.plan import Step, TransferPlan, to_named_tensor
from checkpoint_engine.report import InstanceFailure
from checkpoint_engine.trace import TracedBroadcast, Tracer
from checkpoint_engine.wire import (
    ACK,
    CHECKSUM,
    DELIVERED,
    JSON_BUCKETS,
    NOTHING_MORE,
    PART,
    decode_acceptance,
    encode_bucket,
    encode_bucket_as_json,
    encode_extensions,
    encode_handle,
)

_FAREWELL = 1.0  # seconds that a failed update waits for req_func to return
_FAREWELL_OF_0_2 = 30.0  # the same where a worker of release 0.2 has left, perhaps in order

SocketPaths = list[tuple[str, str]]
RequestFunction = Callable[[SocketPaths], Any]
BucketEncoder = Callable[[list[dict[str, Any]]], bytes]


class Request:
    """The caller's ``req_func``, running in a thread of its own while the update goes on."""

    def __init__(self, req_func: RequestFunction, socket_paths: SocketPaths) -> None:
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(
            target=self._run,
            args=(req_func, socket_paths),
            name="checkpoint-engine-request",
            daemon=True,  # a request that never returns must not keep the process
        )
        self._thread.start()

    def _run(self, req_func: RequestFunction, socket_paths: SocketPaths) -> None:
        try:
            req_func(socket_paths)
        except BaseException as error:
            if not self._closed:  # nobody asks any more, and its traceback leads back here
                self._error = error

    def check(self) -> None:
        """Raise what ``req_func`` raised."""
        if self._error is not None:
            error = self._error
            raise RequestError(f"req_func raised {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """After a failure: let the engine answer before the next update asks it again."""
        self._thread.join(_FAREWELL)
        self._closed = True
        self._error = None

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def join(self, check: Callable[[], None]) -> None:
        """Wait for ``req_func`` to return."""
        poll(lambda: self.is_over, check)
        self.check()


class Session(Protocol):
    """What an update tells the engine of this rank."""

    @property
    def state(self) -> str: ...
    @property
    def worker_checks_sums(self) -> bool: ...
    @property
    def worker_joins_parts(self) -> bool | None: ...
    @property
    def failed(self) -> Sequence[InstanceFailure]: ...
    @property
    def encode_bucket(self) -> BucketEncoder: ...
    def hand_over(
        self, buffer: SharedBuffer, seconds_left: float, in_parts: bool = False
    ) -> None: ...
    def check(self) -> None: ...
    def begin_reload(self, message: bytes) -> None: ...
    def await_reload(self, what: str) -> None: ...
    def announce_end(self, planned: Sequence[str | None]) -> None: ...
    def release(self) -> None: ...
    def finish(self, request: Request) -> None: ...


class WorkerSession:
    """One update as seen by this rank's worker: handle, buckets, release, finish.

    Attributes:
        state: what the worker's model holds by now.
        failed: of a session that fails, nothing is noted: it raises.
    """

    failed: Sequence[InstanceFailure] = ()

    def __init__(self, link: WorkerLink, check: Callable[[], None], version: str) -> None:
        self._link = link
        self._check = check
        self._version = version
        self._extensions: dict[str, Any] = {}
        self._accepted = False
        self._told_to_release = self._told_to_finish = False
        self.state = "untouched"

    def hand_over(self, buffer: SharedBuffer, seconds_left: float, in_parts: bool = False) -> None:
        """Share the double buffer; returns when the worker has mapped it.

        Args:
            in_parts: whether some tensors are going to come in parts.
        """
        offered = {"timeout": seconds_left, "weight_version": self._version, JSON_BUCKETS: True}
        handle = encode_handle(*buffer.handle(), offered)
        self._link.send(handle, self._check)
        reply = self._link.receive(self._check)
        extensions = decode_acceptance(reply)
        if extensions is None:
            raise _failed("the handshake", reply)
        self._extensions = extensions
        self._accepted = True
        if in_parts and not self.worker_joins_parts:
            raise WorkerError(
                "this worker cannot put tensors together that travel in parts, which the one "
                "before it could: update again, and they will travel whole"
            )

    @property
    def encode_bucket(self) -> BucketEncoder:
        """How this worker reads buckets."""
        return encode_bucket_as_json if self._extensions.get(JSON_BUCKETS) else encode_bucket

    @property
    def worker_checks_sums(self) -> bool:
        """Whether the worker looks at checksums itself, right before it loads."""
        return bool(self._extensions.get(CHECKSUM) == FORMULA)

    @property
    def worker_joins_parts(self) -> bool | None:
        """Whether the worker takes tensors in parts; ``None`` if it has not said."""
        return bool(self._extensions.get(PART)) if self._accepted else None

    def check(self) -> None:
        """Raise if the update cannot go on: it failed elsewhere, or this rank's engine is gone."""
        self._check()
        self._link.check()

    def begin_reload(self, message: bytes) -> None:
        self.state = "partly written"
        self._link.send(message, self._check)

    def await_reload(self, what: str) -> None:
        """Raises ``WorkerError`` with the worker's traceback if it could not load the bucket."""
        reply = self._link.receive(self._check)
        if reply != ACK:
            raise _failed(what, reply)

    def announce_end(self, planned: Sequence[str | None], go_on: bool = True) -> None:
        """Tell a worker of ours which buckets it was to load, and let it go on by itself after the
        last one; it does not go on after a failure. Workers of other releases wait to be told.

        Args:
            planned: as ``Messages.planned`` gives them.
            go_on: to its post hook; otherwise only until it has dropped the double buffer.
        """
        if self._extensions:
            told = b""
            if self._extensions.get(DELIVERED):
                told = encode_extensions({DELIVERED: planned})
            self._link.send(NOTHING_MORE + told, self._check)
            self._told_to_release = True
            if go_on:
                self._link.send(NOTHING_MORE, self._check)
                self._told_to_finish = True

    def release(self) -> None:
        """Have the worker drop the double buffer."""
        if not self._told_to_release:
            self._link.send(NOTHING_MORE, self._check)
        self.await_reload("the release of the buffer")

    def finish(self, request: Request) -> None:
        """Have the worker run its post hook; returns when the engine has answered too.

        Workers of release 0.2 ran theirs before they released the buffer, and may have left. Then
        the engine's answer alone tells whether they succeeded.
        """
        self.state = "partly written"
        try:
            if not self._told_to_finish:
                self._link.send(NOTHING_MORE, self._check)
            self.await_reload("its post hook")
        except WireError:
            if self._extensions:
                raise
            grace = Deadline(_FAREWELL_OF_0_2)
            poll(lambda: request.is_over or grace.remaining() == 0.0, self._check)
            if not request.is_over:
                raise
        request.join(self._check)
        self.state = f"holds {self._version}"


def _failed(what: str, reply: bytes) -> WorkerError:
    traceback = reply.decode(errors="replace")
    return WorkerError(f"the inference worker failed in {what}:\n{traceback}")


class Streams(Protocol):
    """How copies and broadcasts are ordered on a device."""

    @property
    def are_queues(self) -> bool:
        """Whether copies and broadcasts that are begun later wait by themselves."""
        ...

    def copying(self) -> contextlib.AbstractContextManager[Any]: ...
    def broadcasting(self) -> contextlib.AbstractContextManager[Any]: ...
    def event(self) -> Arrival: ...
    def wait(self, event: Arrival) -> None: ...

    def copy(self, action: Callable[[], None], after: Arrival) -> Arrival:
        """Have ``action`` copy on the current stream, once ``after`` has happened."""
        ...

    def close(self) -> None:
        """Return when no copy is under way on the host any more."""
        ...


class _AcceleratorStreams:
    """One stream for host-to-device copies, one for what enters the double buffer."""

    are_queues = True

    def __init__(self, device_module: Any) -> None:
        self._module = device_module
        self._copy = device_module.Stream()
        self._broadcast = device_module.Stream()

    def copying(self) -> contextlib.AbstractContextManager[Any]:
        return self._module.stream(self._copy)

    def broadcasting(self) -> contextlib.AbstractContextManager[Any]:
        return self._module.stream(self._broadcast)

    def event(self) -> Any:
        """Marks the point that the current stream has reached."""
        event = self._module.Event()
        event.record()
        return event

    def wait(self, event: Any) -> None:
        """The current stream goes on once ``event`` has happened; the host does not wait."""
        self._module.current_stream().wait_event(event)

    def copy(self, action: Callable[[], None], after: Any) -> Any:
        self.wait(after)
        action()
        return self.event()

    def close(self) -> None:
        """The device's own order protects memory that is freed."""


class _Done:
    """The event of a device where every call has finished when it returns."""

    def query(self) -> bool:
        return True


class _HostStreams:
    """One thread that copies, beside the one that runs the update."""

    def __init__(self, are_queues: bool) -> None:
        self.are_queues = are_queues
        self._failed = False
        self._begun: list[InThread] = []
        self._ended = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-engine-copy")

    def copying(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def broadcasting(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def event(self) -> Arrival:
        return _Done()

    def wait(self, event: Arrival) -> None:
        poll(event.query, self._check)

    def copy(self, action: Callable[[], None], after: Arrival) -> Arrival:
        def wait_and_copy() -> None:
            if self._failed:  # what is ordered after a copy may count on it
                raise RuntimeError("an earlier copy of this update failed")
            try:
                self.wait(after)
                action()
            except BaseException:
                self._failed = True
                raise

        self._begun.append(InThread(self._thread, wait_and_copy))
        return self._begun[-1]

    def close(self) -> None:
        self._ended.set()
        self._thread.shutdown(cancel_futures=True)
        for copy in self._begun:
            copy.forget()

    def _check(self) -> None:
        if self._ended.is_set():
            raise RuntimeError("the update has ended")


def make_streams(device_manager: DeviceManager, order_broadcasts: bool = False) -> Streams:
    """The streams of one update on the current device. Close them before the memory is freed.

    ``order_broadcasts``: on the cpu device, whether broadcasts are in the streams, too.
    """
    if device_manager.is_accelerator:
        return _AcceleratorStreams(device_manager.device_module)
    return _HostStreams(order_broadcasts)


class Staging:
    """A receiver's next bucket, fetched while other ranks' buckets are broadcast."""

    def __init__(
        self, buffer: torch.Tensor, steps: list[Step], loader: Loader, streams: Streams
    ) -> None:
        self._buffer = buffer
        self._steps = deque(steps)
        self._loader = loader
        self._streams = streams
        self._filled = self._prefetch(after=streams.event())

    def deliver(self, step: Step, target: torch.Tensor, check: Callable[[], None]) -> None:
        """Put the bytes of ``step`` into ``target``, on the broadcast stream; fetch the next."""
        if self._loader.blocks_stream:
            self._streams.wait(self._filled)
        else:
            poll(self._filled.query, check)
        target.copy_(self._buffer[: step.bucket.size])
        self._filled = self._prefetch(after=self._streams.event())

    def _prefetch(self, after: Arrival) -> Arrival:
        if not self._steps:
            return after
        step = self._steps.popleft()
        with self._streams.copying():
            return self._loader.start(step, self._buffer[: step.bucket.size], after)


class Pipeline:
    """One rank's execution of a plan. Made for one update."""

    def __init__(
        self,
        plan: TransferPlan,
        messages: Messages,
        rank: int,
        buffer: torch.Tensor,
        staging: torch.Tensor | None,
        group: WeightsGroup | None,
        loader: Loader,
        streams: Streams,
        checksums: Checksums,
        tracer: Tracer,
    ) -> None:
        """
        Args:
            messages: what workers are told of the plan's buckets.
            checksums: what their bytes must add up to.
            buffer: the double buffer that this rank's worker maps.
            staging: as large as the largest bucket; ``None``: receive into ``buffer`` directly.
            group: ``None`` where this rank is the only one.
        """
        self._plan = plan
        self._messages = messages
        self._rank = rank
        self._buffer = buffer
        self._group = group
        self._loader = loader
        self._streams = streams
        self._checksums = checksums
        self._tracer = tracer
        self._staging: Staging | None = None
        if staging is not None:
            self._staging = Staging(staging, plan.loads_of(rank), loader, streams)
        self._waiting = deque(plan.steps)
        self._in_flight: deque[tuple[Step, list[Arrival]]] = deque()

    def begin(self, check: Callable[[], None]) -> None:
        """Send the first buckets on their way, where that takes no waiting."""
        if self._loader.only_queues:
            self._start_next(check)
            self._start_next(check)

    def run(self, operation: Operation, session: Session) -> None:
        """Move every bucket. Returns when the worker has loaded the last one.

        A half of the double buffer is free once its bucket is loaded. Where starting a bucket only
        queues work, that is the moment to start the next in it; where it takes waiting, the worker
        is first given what has arrived, to load it meanwhile.
        """
        count = len(self._plan.steps)
        if not count:
            session.announce_end([])
        operation.begin("transfer")
        if not self._in_flight:
            self._start_next(session.check)
        for index in range(count):
            operation.begin("transfer")
            step, arrivals = self._in_flight.popleft()
            self._await(step, arrivals, session.check)
            operation.arrived(step.receiver)
            operation.begin("reload")
            message = self._messages.of(index, session.encode_bucket)
            message += self._extensions(step, session)
            with self._tracer.reloading(step):
                session.begin_reload(message)
                if index + 1 == count:
                    session.announce_end(self._messages.planned(session.encode_bucket))
                if not self._loader.only_queues:
                    self._start_next(session.check)
                if index + 1 < count:
                    self._messages.of(index + 1, session.encode_bucket)  # while the worker loads
                session.await_reload(f"bucket {index + 1} of {count}")
            operation.advance(step.bucket.size)
            if self._loader.only_queues:
                self._start_next(session.check)

    def _start_next(self, check: Callable[[], None]) -> None:
        """Start one bucket on its way into its half of the double buffer."""
        if not self._waiting:
            return
        step = self._waiting.popleft()
        start = step.slot * self._plan.bucket_bytes
        target = self._buffer[start : start + step.bucket.size]
        arrivals: list[Arrival] = []
        with self._streams.broadcasting():
            payload = target
            if step.receiver == self._rank:
                with self._naming_source(step):
                    payload = self._receive(step, target, check, arrivals)
            if self._group is not None and step.bucket.size:
                broadcast = self._tracer.broadcasting(step)
                work = self._group.broadcast(payload, step.receiver)
                broadcast.follow(work)
                arrivals.append(_Broadcast(work, broadcast))
            arrivals.append(self._streams.event())
        self._in_flight.append((step, arrivals))

    def _extensions(self, step: Step, session: Session) -> bytes:
        """What follows the message of a bucket, for workers of ours: its sum, for those that check
        that themselves, and where a part of a tensor lies.

        The bytes are checked here for workers that do not check them, such as the original's.
        """
        extensions: dict[str, Any] = {}
        bucket, start = step.bucket, step.slot * self._plan.bucket_bytes
        lies_at, nbytes = start, bucket.size
        if isinstance(bucket, TensorPart):
            extensions[PART] = [start, bucket.size, bucket.begin, bucket.total, step.owner]
            lies_at, nbytes = 0, bucket.total  # once it has been put together
        expected = self._checksums.of(step.owner, bucket)
        if expected is not None and session.worker_checks_sums:
            extensions[CHECKSUM] = [lies_at, nbytes, *expected]
        elif expected is not None:
            where = f"a bucket from {self._loader.source_of(step)}"
            expected.check(self._buffer[start : start + bucket.size], where)
        return encode_extensions(extensions) if extensions else b""

    def _await(self, step: Step, arrivals: list[Arrival], check: Callable[[], None]) -> None:
        with self._naming_source(step):
            for arrival in arrivals:
                poll(arrival.query, check)

    @contextlib.contextmanager
    def _naming_source(self, step: Step) -> Iterator[None]:
        """If the time runs out in here, say whose bucket did not arrive."""
        try:
            yield
        except TimeoutError as error:
            source = self._loader.source_of(step)
            raise TimeoutError(f"{error}: a bucket from {source} did not arrive") from None

    def _receive(
        self,
        step: Step,
        target: torch.Tensor,
        check: Callable[[], None],
        arrivals: list[Arrival],
    ) -> torch.Tensor:
        """Begin to fill ``target``; returns memory that holds the same bytes for a broadcast."""
        if self._staging is not None:
            self._staging.deliver(step, target, check)
            return target
        arrival = self._loader.start(step, target, after=self._streams.event())
        arrivals.append(arrival)
        if self._group is None or self._loader.blocks_stream:
            return target
        lying = self._loader.lying(step)
        if lying is None:
            poll(arrival.query, check)  # only then may it be broadcast
            return target
        return lying


class Messages:
    """What workers are told of a plan's buckets, each encoded once, however often it is sent."""

    def __init__(self, plan: TransferPlan) -> None:
        self._plan = plan
        self._encoded: dict[tuple[BucketEncoder, int], tuple[bytes, str]] = {}

    def of(self, index: int, encode: BucketEncoder) -> bytes:
        """The message of the plan's step ``index``."""
        return self._message(index, encode)[0]

    def planned(self, encode: BucketEncoder) -> list[str | None]:
        """The digest of each step's message, ``None`` for a part that does not end its tensor."""
        return [
            None
            if isinstance(step.bucket, TensorPart) and not step.bucket.is_last
            else self._message(index, encode)[1]
            for index, step in enumerate(self._plan.steps)
        ]

    def _message(self, index: int, encode: BucketEncoder) -> tuple[bytes, str]:
        if (encode, index) not in self._encoded:
            step = self._plan.steps[index]
            start = step.slot * self._plan.bucket_bytes
            if isinstance(step.bucket, TensorPart):
                start = 0  # of the tensor that the worker puts together
            message = encode(to_named_tensor(step.bucket.items, start))
            self._encoded[encode, index] = message, digest(message)
        return self._encoded[encode, index]


class _Broadcast:
    """A broadcast that has begun."""

    def __init__(self, work: Any, traced: TracedBroadcast) -> None:
        self._work = work
        self._traced = traced

    def query(self) -> bool:
        if not self._work.is_completed():
            return False
        try:
            self._work.wait()
        except RuntimeError as error:
            raise GroupError(f"a broadcast failed: {error}") from error
        self._traced.seen()
        return True
