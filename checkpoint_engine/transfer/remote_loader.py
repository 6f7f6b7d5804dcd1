"""Reads the buckets of other ranks out of their host memory, by P2P."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from loguru import logger

from checkpoint_engine.data_types import H2DBucket, MemoryBufferMetaList, align_up
from checkpoint_engine.ground.deadline import Deadline, poll
from checkpoint_engine.ground.devices import DeviceManager
from checkpoint_engine.ground.needs import Runs
from checkpoint_engine.ground.sockets import unreachable
from checkpoint_engine.memory.checksum import clear_gaps
from checkpoint_engine.planning.columns import ColumnRead
from checkpoint_engine.planning.plan import Step
from checkpoint_engine.transfer.columns import place_columns
from checkpoint_engine.transfer.p2p_store import P2PError, P2PStore, StaleSourceError
from checkpoint_engine.transfer.streams import Event, InThread
from checkpoint_engine.transfer.tracer import READ, RankTracer

_FAREWELL = 2.0  # seconds that a failed update waits for a read under way
_ANSWERS_WITHIN = 5.0  # seconds; an owner that takes longer is not asked where others hold the same
_LATE_BYTES = 60.0
"""Seconds that bytes of a failed read may still be on their way: Mooncake drops a TCP connection
that has been silent for 30 s, and tries to connect anew for what waited behind it."""
_BOUNCE_BYTES = 64 << 20
"""Each half of the host memory that bytes pass through on their way to a device."""

Check = Callable[[], None]
ByColumns = tuple[Runs, Sequence[ColumnRead]]
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
        gone: Callable[[], Collection[int]] = tuple,
    ) -> None:
        """``gone``: the owners that are known to have ended by now."""
        self._store = store
        self._tracer = tracer
        self._gone = gone
        self._owners = owners
        self._device_manager = device_manager
        self._device = device
        self._checked: set[int] = set()
        self._lost: dict[int, P2PError] = {}  # why, of owners that are not asked any more
        self._greets = threading.Lock()
        self._ended = threading.Event()
        # Not daemons: Python kills those inside C++, which takes the process along.
        threads = 2 if store.reads_into_device_memory else 1
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="checkpoint-engine-read")
        self._reads: list[InThread] = []
        self._answers: list[InThread] = []
        self._bounce: torch.Tensor | None = None
        if not store.reads_into_device_memory:
            self._bounce = torch.empty(2, _BOUNCE_BYTES, dtype=torch.uint8, pin_memory=True)

    def start(
        self, step: Step, sources: Mapping[int, H2DBucket], target: torch.Tensor, after: Event
    ) -> Event:
        """Begin to ``read_any`` of the step's bucket into ``target``, once ``after`` has
        happened."""

        def read() -> None:
            with nullcontext() if self._tracer is None else self._tracer.on_host(READ, step):
                self.read_any(sources, target)

        return self.begin(read, after)

    def begin(self, read: Callable[[], None], after: Event) -> Event:
        """Have a thread ``read``, once ``after`` has happened."""

        def wait_and_read() -> None:
            poll(after.query, self._check)
            read()

        begun = InThread(self._threads, wait_and_read)
        self._reads = [*(one for one in self._reads if not one.is_over), begun]
        return begun

    def find_lost(self, owners: Collection[int], check: Check) -> Mapping[int, P2PError]:
        """Ask all these owners for a sign of life, at once. From now on those that give none in
        time are not asked for buckets.

        Args:
            check: called while waiting; ends the wait by raising.

        Returns why, of all that have been lost so far.
        """
        unasked = [owner for owner in owners if owner not in self._checked | self._lost.keys()]
        addresses = {owner: str(self._owners[owner].p2p_store_addr) for owner in unasked}
        # Mooncake reaches one host after the other: those behind a silent one would answer late.
        silent = unreachable(set(addresses.values()), _ANSWERS_WITHIN, check)
        for owner in unasked:
            if why := silent.get(addresses[owner]):
                self._lose(owner, P2PError(f"{addresses[owner]} cannot be reached: {why}"))
        self._greet([owner for owner in unasked if owner not in self._lost], check)
        return self._lost

    def _greet(self, owners: Sequence[int], check: Check) -> None:
        """Look at the leases of owners that can be reached, and lose those that do not hold."""
        # Not by the threads that read, which a process that was stopped may block for long.
        threads = ThreadPoolExecutor(len(owners) or 1, "checkpoint-engine-greet")
        answers = {owner: InThread(threads, partial(self._look_at, owner)) for owner in owners}
        threads.shutdown(wait=False)
        self._answers += answers.values()
        ends = Deadline(_ANSWERS_WITHIN)
        for owner, answer in answers.items():
            try:
                poll(lambda: answer.is_over or ends.remaining() == 0.0, check)  # noqa: B023
                if not answer.query():
                    address = self._owners[owner].p2p_store_addr
                    raise P2PError(f"{address} has not answered within {ends.seconds:g} s")
            except P2PError as error:
                self._check()
                self._lose(owner, error)

    def _look_at(self, owner: int) -> None:
        self._check_lease(self._owners[owner], partial(self._check_owner, owner))
        self._checked.add(owner)

    def source_of(self, owners: Iterable[int]) -> str:
        """Where bytes that all of these hold come from, for errors."""
        return " or ".join(f"{self._owners[one].p2p_store_addr} (owner {one})" for one in owners)

    def close(self) -> None:
        """End a read that is under way; the store keeps what it might still write into."""
        self._ended.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        farewell = Deadline(_FAREWELL)
        for read in (*self._reads, *self._answers):
            read.close(farewell)
        self._reads.clear()
        self._answers.clear()

    @property
    def is_closed(self) -> bool:
        return self._ended.is_set()

    def _check(self) -> None:
        if self.is_closed:
            raise P2PError("the update has ended")

    def read_any(
        self,
        sources: Mapping[int, H2DBucket],
        target: torch.Tensor,
        runs: Runs | None = None,
        by_columns: Mapping[int, ByColumns] = MappingProxyType({}),
    ) -> int:
        """Read a bucket from the first of ``sources`` that can be read; ends when this is closed.
        None is asked while a read from the one before may still write.

        Args:
            sources: by owner, the bucket as it lies there.
            runs: as of ``read``.
            by_columns: by owner, what is read instead of ``runs``.

        Returns how many bytes were read.

        Raises:
            P2PError: all of them are gone, or hold another checkpoint now; names them.
        """
        for owner, bucket in sources.items():
            left = sources.keys() - self._lost.keys()
            if len(left) > 1:
                with self._greets:  # behind another thread's read the answer would come late
                    self.find_lost([owner] if left == sources.keys() else left, self._check)
            if owner in self._lost:
                continue
            if sources.keys() & self._lost.keys() and not self._late_bytes_end(target):
                break  # by now of another checkpoint, they would replace the next owner's
            try:
                part = by_columns.get(owner, (runs, ()))
                return self.read(owner, bucket, target, partial(self._check_owner, owner), *part)
            except P2PError as error:
                self._check()
                self._lose(owner, error)
        raise self._error_of(sources)

    def read(
        self,
        owner: int,
        bucket: H2DBucket,
        target: torch.Tensor,
        check: Check | None = None,
        runs: Runs | None = None,
        columns: Sequence[ColumnRead] = (),
    ) -> int:
        """Read a bucket of ``owner`` into ``target``; returns when it is there and known good.

        Args:
            check: called while waiting; ends the read by raising. Default: ten minutes.
            runs: the bytes of the bucket to be read. Default: all. The others, and the rest of the
                tensors in ``columns``, are of no use afterwards.
            columns: what is read out of the owner's column copies, beside ``runs``.

        Returns how many bytes were read.

        Raises:
            P2PError: the source is gone, or holds another checkpoint now.
            ValueError: what was read of columns is not what was registered.
        """
        owned = self._owners[owner]
        regions = _regions(owned, bucket)
        if runs is not None:
            regions = _within(regions, runs)
        regions += [(one.at, one.address, one.nbytes) for one in columns]
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
            if not self.is_closed and owner not in self._gone():
                self._raise_if_stale(owned)
            raise
        if columns:
            whose = self.source_of([owner])
            place_columns(target, columns, whose, self._device_manager, self._device)
        for at, _, nbytes in regions if runs is None else ():
            clear_gaps(target, at, nbytes)
        return sum(nbytes for _, _, nbytes in regions)

    def _check_owner(self, owner: int) -> None:
        """While an owner is read from."""
        self._check()
        if owner in self._gone():
            raise P2PError(f"rank {owner} is gone: its process has ended, or its host is cut off")

    def _lose(self, owner: int, error: P2PError) -> None:
        logger.warning("owner {} is not read from any more: {}", owner, error)
        self._lost[owner] = type(error)(str(error))  # the other's traceback leads to the memory

    def _error_of(self, owners: Iterable[int]) -> P2PError:
        """Why none of them can be read."""
        lost = {owner: self._lost[owner] for owner in owners if owner in self._lost}
        is_stale = all(isinstance(error, StaleSourceError) for error in lost.values())
        said = "; ".join(f"owner {owner}: {error}" for owner, error in lost.items())
        return StaleSourceError(said) if is_stale else P2PError(said)

    def _late_bytes_end(self, target: torch.Tensor) -> bool:
        """Wait until no byte of a failed read can arrive in ``target`` any more."""
        memory = target if self._bounce is None else self._bounce
        ends = Deadline(_LATE_BYTES)

        def over() -> bool:
            return not self._store.may_still_write(memory)

        poll(lambda: over() or ends.remaining() == 0.0, self._check, longest=0.01)
        return over()

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
