"""Reads the buckets of other ranks out of their host memory, by P2P."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch

from checkpoint_engine.data_types import H2DBucket, MemoryBufferMetaList, align_up
from checkpoint_engine.device_utils import DeviceManager
from checkpoint_engine.ground.deadline import Deadline, poll
from checkpoint_engine.memory.checksum import clear_gaps
from checkpoint_engine.p2p_store import P2PError, P2PStore, StaleSourceError
from checkpoint_engine.planning.plan import Step
from checkpoint_engine.transfer.streams import Event, InThread
from checkpoint_engine.transfer.tracer import RankTracer

_FAREWELL = 2.0  # seconds that a failed update waits for a read under way
_BOUNCE_BYTES = 64 << 20
"""Each half of the host memory that bytes pass through on their way to a device."""

Check = Callable[[], None]


class RemoteLoader:
    """Reads buckets from the owners' memory by P2P, and checks that the owners still hold them.

    Two threads read: while one checks a bucket's lease, the other reads the next bucket.
    """

    def __init__(
        self,
        store: P2PStore,
        owners: Mapping[int, MemoryBufferMetaList],
        device_manager: DeviceManager,
        device: torch.device,
        tracer: RankTracer | None = None,
    ) -> None:
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

    def start(self, step: Step, target: torch.Tensor, after: Event) -> Event:
        """Begin to read the bucket into ``target``, once ``after`` has happened."""

        def read() -> None:
            poll(after.query, self._check)
            with nullcontext() if self._tracer is None else self._tracer.reading(step):
                self.read(step.owner, step.bucket, target, self._check)

        begun = InThread(self._threads, read)
        self._reads = [*(one for one in self._reads if not one.is_over), begun]
        return begun

    def source_of(self, step: Step) -> str:
        """Where its bytes come from, for errors."""
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
