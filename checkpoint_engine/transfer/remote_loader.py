"""Reads the buckets of other ranks out of their host memory, by P2P."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import torch
from loguru import logger

from checkpoint_engine.data_types import H2DBucket, MemoryBufferMetaList, align_up
from checkpoint_engine.ground.deadline import Deadline, poll
from checkpoint_engine.ground.devices import DeviceManager
from checkpoint_engine.ground.needs import Runs
from checkpoint_engine.memory.checksum import clear_gaps
from checkpoint_engine.planning.plan import Step
from checkpoint_engine.transfer.p2p_store import P2PError, P2PStore, StaleSourceError
from checkpoint_engine.transfer.streams import Event, InThread
from checkpoint_engine.transfer.tracer import READ, RankTracer

_FAREWELL = 2.0  # seconds that a failed update waits for a read under way
_BOUNCE_BYTES = 64 << 20
"""Each half of the host memory that bytes pass through on their way to a device."""

Check = Callable[[], None]
Region = tuple[int, int, int]
"""A range of a bucket: its offset in the bucket, its address at the owner, its bytes."""


class RemoteLoader:
    """Reads buckets from the owners' memory by P2P, and checks that the owners still hold them.

    Two threads read: while one checks a bucket's lease, the other reads the next bucket. Only one
    where bytes pass through host memory: all buckets share that.
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
        threads = 2 if store.reads_into_device_memory else 1
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="checkpoint-engine-read")
        self._reads: list[InThread] = []
        self._bounce: torch.Tensor | None = None
        if not store.reads_into_device_memory:
            self._bounce = torch.empty(2, _BOUNCE_BYTES, dtype=torch.uint8, pin_memory=True)

    def start(self, step: Step, target: torch.Tensor, after: Event) -> Event:
        """Begin to read the bucket into ``target``, once ``after`` has happened."""

        def read() -> None:
            with nullcontext() if self._tracer is None else self._tracer.on_host(READ, step):
                self.read(step.owner, step.bucket, target, self._check)

        return self.begin(read, after)

    def begin(self, read: Callable[[], None], after: Event) -> Event:
        """Have a thread ``read``, once ``after`` has happened."""

        def wait_and_read() -> None:
            poll(after.query, self._check)
            read()

        begun = InThread(self._threads, wait_and_read)
        self._reads = [*(one for one in self._reads if not one.is_over), begun]
        return begun

    def check(self, owner: int) -> None:
        """Raise ``P2PError`` unless the owner's memory can be read; ends when this is closed."""
        self._check_lease(self._owners[owner], self._check)

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

    def read_any(
        self,
        sources: Mapping[int, H2DBucket],
        target: torch.Tensor,
        runs: Runs | None,
    ) -> int:
        """Read a bucket from the first of ``sources`` that can be read; ends when this is closed.
        None is asked while a read from the one before may still write.

        Args:
            sources: by owner, the bucket as it lies there.

        Returns how many bytes were read. Raises as ``read`` does, for the last of them.
        """
        *others, last = sources.items()
        for owner, bucket in others:
            try:
                return self.read(owner, bucket, target, self._check, runs)
            except P2PError as error:
                if self._store.may_still_write(target if self._bounce is None else self._bounce):
                    raise  # late bytes, by now of another checkpoint, would replace the others
                logger.warning("{}; asking another owner of the same bytes", error)
        return self.read(*last, target, self._check, runs)

    def read(
        self,
        owner: int,
        bucket: H2DBucket,
        target: torch.Tensor,
        check: Check | None = None,
        runs: Runs | None = None,
    ) -> int:
        """Read a bucket of ``owner`` into ``target``; returns when it is there and known good.

        Args:
            check: called while waiting; ends the read by raising. Default: ten minutes.
            runs: the bytes of the bucket to be read; the others stay as they are. Default: all.

        Returns how many bytes were read.

        Raises:
            P2PError: the source is gone, or holds another checkpoint now.
        """
        owned = self._owners[owner]
        regions = _regions(owned, bucket)
        if runs is not None:
            regions = _within(regions, runs)
        if not regions:
            return 0
        try:
            if owner not in self._checked:  # for a better error: its memory may not be readable
                self._check_lease(owned, check)
                self._checked.add(owner)
            if self._bounce is None:
                here = [(target.data_ptr() + at, ptr, nbytes) for at, ptr, nbytes in regions]
                self._read(here, owned, target, check)
            else:
                self._read_through_host(regions, owned, target, self._bounce, check)
            self._check_lease(owned, check)  # a lease that holds now has held all along
        except P2PError:
            self._raise_if_stale(owned)
            raise
        for at, _, nbytes in regions if runs is None else ():
            clear_gaps(target, at, nbytes)
        return sum(nbytes for _, _, nbytes in regions)

    def _check_lease(self, owned: MemoryBufferMetaList, check: Check | None) -> None:
        """Raise unless the owner still holds the checkpoint. The original's owners give no lease,
        and are trusted."""
        if owned.lease is not None:
            self._store.check_lease(str(owned.p2p_store_addr), owned.lease, check)

    def _raise_if_stale(self, owned: MemoryBufferMetaList) -> None:
        """Memory that its owner has unregistered cannot be read; that is why, if it lives."""
        soon = Deadline(_FAREWELL)
        try:
            self._check_lease(owned, lambda: soon.check("a sign of life"))
        except StaleSourceError:
            raise
        except (P2PError, TimeoutError):
            pass  # it is gone

    def _read(
        self,
        regions: Sequence[Region],
        owned: MemoryBufferMetaList,
        memory: torch.Tensor,
        check: Check | None,
    ) -> None:
        """``regions``: here with addresses in ``memory``."""
        columns = zip(*regions, strict=True) if regions else ((), (), ())
        address = str(owned.p2p_store_addr)
        self._store.batch_transfer_sync_read(address, *columns, memory=memory, check=check)

    def _read_through_host(
        self,
        regions: Sequence[Region],
        owned: MemoryBufferMetaList,
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
            for turn, group in enumerate(_groups(_pieces(regions))):
                half = turn % 2
                copied[half].synchronize()
                start = bounce[half].data_ptr()
                here = [(start + at, remote, nbytes) for at, _, remote, nbytes in group]
                self._read(here, owned, bounce, check)
                with module.stream(stream):
                    for at, to, _, nbytes in group:
                        piece = bounce[half][at : at + nbytes]
                        target[to : to + nbytes].copy_(piece, non_blocking=True)
                    copied[half].record()
        finally:
            stream.synchronize()  # also after a failure: ``target`` is given up then


def _regions(owned: MemoryBufferMetaList, bucket: H2DBucket) -> list[Region]:
    starts = itertools.accumulate((align_up(part.size) for part in bucket.ranges), initial=0)
    return [
        (start, owned.memory_buffer_metas_list[part.idx].ptr + part.offset, part.size)
        for start, part in zip(starts, bucket.ranges, strict=False)
    ]


def _within(regions: Sequence[Region], runs: Runs) -> list[Region]:
    """What of the regions lies within the runs."""
    found: list[Region] = []
    for at, remote, nbytes in regions:
        begins, ends = (np.clip(one, at, at + nbytes) for one in runs)
        some = begins < ends
        begins, sizes = begins[some], (ends - begins)[some]
        columns = begins.tolist(), (begins + (remote - at)).tolist(), sizes.tolist()
        found += zip(*columns, strict=True)
    return found


def _pieces(regions: Sequence[Region]) -> Iterator[Region]:
    """The same in pieces that fit one half of the bounce memory."""
    for at, remote, nbytes in regions:
        for start in range(0, nbytes, _BOUNCE_BYTES):
            yield at + start, remote + start, min(_BOUNCE_BYTES, nbytes - start)


def _groups(pieces: Iterable[Region]) -> Iterator[list[tuple[int, int, int, int]]]:
    """As many pieces at a time as one half of the bounce memory takes, each with its place there in
    front."""
    group: list[tuple[int, int, int, int]] = []
    end = 0
    for at, remote, nbytes in pieces:
        if end + nbytes > _BOUNCE_BYTES:
            yield group
            group, end = [], 0
        group.append((end, at, remote, nbytes))
        end += nbytes
    if group:
        yield group
