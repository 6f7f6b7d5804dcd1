"""How a receiver gets the bytes of a bucket: from its own host memory, or from another rank's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from typing import Any, Protocol

import torch

from checkpoint_engine.checksum import clear_gaps
from checkpoint_engine.data_types import (
    H2DBucket,
    MemoryBuffer,
    MemoryBufferMetaList,
    align_up,
)
from checkpoint_engine.deadline import Deadline, poll
from checkpoint_engine.device_utils import DeviceManager
from checkpoint_engine.p2p_store import P2PError, P2PStore, StaleSourceError
from checkpoint_engine.plan import Step
from checkpoint_engine.trace import UNTRACED, Tracer

_FAREWELL = 2.0  # seconds that a failed update waits for a read under way
_BOUNCE_BYTES = 64 << 20
"""Each half of the host memory that bytes pass through on their way to a device."""

Check = Callable[[], None]


class Arrival(Protocol):
    """Something that will have happened."""

    def query(self) -> bool:
        """Whether it has; raises what went wrong."""
        ...


class InThread:
    """What a thread does for somebody who looks from time to time."""

    def __init__(self, thread: Executor, action: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        self._closed = False
        self._future = thread.submit(self._run, action)

    def query(self) -> bool:
        """Whether it is over; raises what went wrong, once."""
        if not self.is_over:
            return False
        if self._future.cancelled():
            raise RuntimeError("the update has ended")
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error  # this frame lives on in its traceback
        return True

    @property
    def is_over(self) -> bool:
        return self._future.done()

    def close(self, deadline: Deadline) -> None:
        """Wait so long for it at most, and forget it."""
        if not self._future.cancelled():  # which ``wait`` takes for one that goes on
            wait([self._future], deadline.remaining())
        self.forget()

    def forget(self) -> None:
        self._closed = True
        self._error = None

    def _run(self, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:
            if not self._closed:  # nobody asks any more, and its traceback leads to the memory
                self._error = error


class Loader(Protocol):
    """Fetches the bytes of a step."""

    @property
    def blocks_stream(self) -> bool:
        """Whether work queued later on the current stream waits for the bytes by itself."""
        ...

    @property
    def only_queues(self) -> bool:
        """Whether buckets can be started without waiting for anything."""
        ...

    def start(self, step: Step, target: torch.Tensor, after: Arrival) -> Arrival:
        """Begin to write the bucket into ``target``, once ``after`` has happened."""
        ...

    def lying(self, step: Step) -> torch.Tensor | None:
        """The bucket's bytes where they lie, if that is one piece of this rank's host memory."""
        ...

    def source_of(self, step: Step) -> str:
        """Where its bytes come from, for errors."""
        ...


def copy_from_host(
    buffers: Sequence[MemoryBuffer], bucket: H2DBucket, target: torch.Tensor
) -> None:
    """Copy a bucket from this rank's registered memory, ordered on the current stream."""
    sources = [buffer.buffer for buffer in buffers if buffer.metas]
    position = 0
    for index, offset, size in bucket.ranges:
        source = sources[index][offset : offset + size]
        target[position : position + size].copy_(source, non_blocking=True)
        clear_gaps(target, position, size)
        position += align_up(size)


def lying_on_host(buffers: Sequence[MemoryBuffer], bucket: H2DBucket) -> torch.Tensor | None:
    """A bucket's bytes in this rank's registered memory, if they are one piece of it."""
    if len(bucket.ranges) != 1 or bucket.ranges[0].size != bucket.size:
        return None
    index, offset, size = bucket.ranges[0]
    return [buffer.buffer for buffer in buffers if buffer.metas][index][offset : offset + size]


class HostLoader:
    """Loads from this rank's own registered memory."""

    only_queues = True

    def __init__(
        self,
        load: Callable[[H2DBucket, torch.Tensor], None],
        lying: Callable[[H2DBucket], torch.Tensor | None],
        streams: Any,
        tracer: Tracer,
    ) -> None:
        self._load = load
        self._tracer = tracer
        self._lying = lying
        self._streams = streams

    @property
    def blocks_stream(self) -> bool:
        return bool(self._streams.are_queues)

    def start(self, step: Step, target: torch.Tensor, after: Arrival) -> Arrival:
        def copy() -> None:
            with self._tracer.copying(step):
                self._load(step.bucket, target)

        arrival: Arrival = self._streams.copy(copy, after)
        return arrival

    def lying(self, step: Step) -> torch.Tensor | None:
        return self._lying(step.bucket)

    def source_of(self, step: Step) -> str:
        return f"rank {step.owner}"


class RemoteLoader:
    """Loads from the owners' memory by P2P, checking that they still hold it. Two threads read:
    while one looks whether a bucket's owner does, the other has the next."""

    blocks_stream = False

    def __init__(
        self,
        store: P2PStore,
        owners: Mapping[int, MemoryBufferMetaList],
        device_manager: DeviceManager,
        device: torch.device,
        tracer: Tracer = UNTRACED,
        only_queues: bool = False,
    ) -> None:
        """``only_queues``: nothing else has to be done with a bucket that has been read."""
        self.only_queues = only_queues
        self._store = store
        self._tracer = tracer
        self._owners = owners
        self._device_manager = device_manager
        self._device = device
        self._checked: set[int] = set()
        self._ended = threading.Event()
        # Not daemons: Python kills those inside C++, which takes the process along.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="checkpoint-engine-read")
        self._reads: list[InThread] = []
        self._bounce: torch.Tensor | None = None
        if not store.reads_into_device_memory:
            self._bounce = torch.empty(2, _BOUNCE_BYTES, dtype=torch.uint8, pin_memory=True)

    def start(self, step: Step, target: torch.Tensor, after: Arrival) -> Arrival:
        def read() -> None:
            poll(after.query, self._check)
            with self._tracer.reading(step):
                self.read(step.owner, step.bucket, target, self._check)

        begun = InThread(self._threads, read)
        self._reads = [*(one for one in self._reads if not one.is_over), begun]
        return begun

    def lying(self, step: Step) -> torch.Tensor | None:
        return None

    def source_of(self, step: Step) -> str:
        return f"{self._owners[step.owner].p2p_store_addr} (owner {step.owner})"

    def close(self) -> None:
        """End a read that is under way; the store keeps what it might still write into."""
        self._ended.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        farewell = Deadline(_FAREWELL)
        for read in self._reads:
            read.close(farewell)
        self._reads.clear()

    def _check(self) -> None:
        if self._ended.is_set():
            raise P2PError("the update has ended")

    def read(
        self, owner: int, bucket: H2DBucket, target: torch.Tensor, check: Check | None = None
    ) -> None:
        """Read a bucket of ``owner`` into ``target``; returns when it is there and known good.

        Args:
            check: called while waiting; ends the read by raising. Default: ten minutes.

        Raises:
            P2PError: the source is gone, or holds another checkpoint now.
        """
        owned = self._owners[owner]
        address = str(owned.p2p_store_addr)
        try:
            self._read_checked(owner, address, owned, bucket, target, check)
        except P2PError:
            self._say_if_stale(address, owned)
            raise
        for size, offset in zip(*_regions(owned, bucket)[::2], strict=True):
            clear_gaps(target, offset, size)

    def _say_if_stale(self, address: str, owned: MemoryBufferMetaList) -> None:
        """Memory that its owner has unregistered cannot be read; that is why, if it lives."""
        if owned.lease is None:
            return
        soon = Deadline(_FAREWELL)
        try:
            self._store.check_lease(address, owned.lease, lambda: soon.check("a sign of life"))
        except StaleSourceError:
            raise
        except (P2PError, TimeoutError):
            pass  # it is gone

    def _read_checked(
        self,
        owner: int,
        address: str,
        owned: MemoryBufferMetaList,
        bucket: H2DBucket,
        target: torch.Tensor,
        check: Check | None,
    ) -> None:
        # A lease that holds after a read held all along. The look before the first one is for the
        # sake of the error: the memory may not be readable any more.
        if owned.lease is not None and owner not in self._checked:
            self._store.check_lease(address, owned.lease, check)
            self._checked.add(owner)
        if self._bounce is None:
            lengths, remote, offsets = _regions(owned, bucket)
            local = [target.data_ptr() + offset for offset in offsets]
            self._store.batch_transfer_sync_read(
                address, local, remote, lengths, memory=target, check=check
            )
        else:
            self._read_through_host(address, owned, bucket, target, self._bounce, check)
        if owned.lease is not None:
            self._store.check_lease(address, owned.lease, check)

    def _read_through_host(
        self,
        address: str,
        owned: MemoryBufferMetaList,
        bucket: H2DBucket,
        target: torch.Tensor,
        bounce: torch.Tensor,
        check: Check | None,
    ) -> None:
        """One half of ``bounce`` is read into while the other is copied to the device."""
        module = self._device_manager.device_module
        module.set_device(self._device)
        stream = module.Stream()
        copied = [module.Event(), module.Event()]
        try:
            for turn, (remote, offset, size) in enumerate(_pieces(owned, bucket)):
                half = turn % 2
                copied[half].synchronize()
                self._store.batch_transfer_sync_read(
                    address,
                    [bounce[half].data_ptr()],
                    [remote],
                    [size],
                    memory=bounce,
                    check=check,
                )
                with module.stream(stream):
                    target[offset : offset + size].copy_(bounce[half][:size], non_blocking=True)
                    copied[half].record()
        finally:
            stream.synchronize()  # also after a failure: ``target`` is given up then


def _regions(
    owned: MemoryBufferMetaList, bucket: H2DBucket
) -> tuple[list[int], list[int], list[int]]:
    """Of each range of a bucket: its bytes, its address at the owner, its offset in the bucket."""
    lengths, remote, offsets = [], [], []
    position = 0
    for index, offset, size in bucket.ranges:
        lengths.append(size)
        remote.append(owned.memory_buffer_metas_list[index].ptr + offset)
        offsets.append(position)
        position += align_up(size)
    return lengths, remote, offsets


def _pieces(owned: MemoryBufferMetaList, bucket: H2DBucket) -> Iterator[tuple[int, int, int]]:
    """The same as (address, offset, bytes), in pieces that fit one half of the bounce memory."""
    for size, remote, offset in zip(*_regions(owned, bucket), strict=True):
        for start in range(0, size, _BOUNCE_BYTES):
            yield remote + start, offset + start, min(_BOUNCE_BYTES, size - start)


class MixedLoader:
    """Loads what this rank owns itself from its memory, and the rest by P2P."""

    blocks_stream = False

    def __init__(self, own_rank: int | None, host: HostLoader, remote: RemoteLoader) -> None:
        """``own_rank``: the owner that is this very rank, if it is among the owners."""
        self._own_rank = own_rank
        self._host = host
        self._remote = remote

    @property
    def only_queues(self) -> bool:
        return self._remote.only_queues

    def start(self, step: Step, target: torch.Tensor, after: Arrival) -> Arrival:
        loader = self._host if step.owner == self._own_rank else self._remote
        return loader.start(step, target, after)

    def lying(self, step: Step) -> torch.Tensor | None:
        return self._host.lying(step) if step.owner == self._own_rank else None

    def source_of(self, step: Step) -> str:
        return self._remote.source_of(step)
