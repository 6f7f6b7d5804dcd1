"""The checkpoints that one rank holds in host memory. ``Checkpoints`` alone changes them."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from loguru import logger

from checkpoint_engine import settings
from checkpoint_engine.data_types import (
    DataToGather,
    H2DBucket,
    Lease,
    MemoryBuffer,
    align_up,
    placed,
    tensor_nbytes,
)
from checkpoint_engine.errors import BusyError
from checkpoint_engine.ground.deadline import check_cancelled
from checkpoint_engine.ground.details import log_detail
from checkpoint_engine.ground.local_rank import LocalRank
from checkpoint_engine.ground.progress import Progress, drawn_bar
from checkpoint_engine.memory import checksum, content
from checkpoint_engine.memory.checksum import clear_gaps
from checkpoint_engine.memory.columns import CopiedColumns, copy_columns
from checkpoint_engine.memory.files import open_files
from checkpoint_engine.memory.folder import expand_folders
from checkpoint_engine.memory.host_memory import HostMemory, can_be_pinned
from checkpoint_engine.memory.sources import file_of, tensor_sources
from checkpoint_engine.planning.columns import Columns
from checkpoint_engine.planning.layouts import Layout, encode_layout, layout_digest

POOL = "__shared_memory_pool__"
"""The memory that checkpoints with ``use_shared_memory_pool`` occupy one after the other."""

OnProgress = Callable[[Progress], None]
_serials = itertools.count(1)


@dataclass(eq=False)
class Checkpoint:
    """This rank's part of one checkpoint: a registration, which never changes.

    Attributes:
        buffers: host buffers, in the order of bucket ranges; those without tensors come last.
        describe: ``Readers.place``.
        lease: what other ranks check when they read it by P2P; ``None``: they cannot.
        pooled: whether its memory is the shared memory pool.
        columns: the column copies of some buffers, read under the same lease.
        serial: tells this registration from others of the same name; 0: of none.
        uses: calls that read it now.
    """

    name: str
    buffers: list[MemoryBuffer]
    describe: Callable[[Checkpoint], DataToGather]
    lease: Lease | None = None
    pooled: bool = False
    columns: list[CopiedColumns] = field(default_factory=list)
    serial: int = field(default_factory=lambda: next(_serials))
    uses: int = 0

    @cached_property
    def filled(self) -> list[MemoryBuffer]:
        """The buffers that hold tensors; bucket ranges count these."""
        return [buffer for buffer in self.buffers if buffer.metas]

    @cached_property
    def layout(self) -> bytes:
        """Names, dtypes and shapes, as the ranks exchange them."""
        return encode_layout(Layout.of([buffer.metas for buffer in self.filled]))

    @cached_property
    def layout_digest(self) -> str:
        return layout_digest(self.layout)

    @property
    def owned(self) -> DataToGather:
        """What this rank owns, and how others read it."""
        return self.describe(self)

    @property
    def tensor_count(self) -> int:
        return sum(len(buffer.metas) for buffer in self.buffers)

    @property
    def nbytes(self) -> int:
        return sum(buffer.size for buffer in self.buffers)

    def copy(self, bucket: H2DBucket, target: torch.Tensor) -> None:
        """Copy the bytes of ``bucket`` into ``target``, ordered on the current stream."""
        position = 0
        for index, offset, size in bucket.ranges:
            source = self.filled[index].buffer[offset : offset + size]
            target[position : position + size].copy_(source, non_blocking=True)
            clear_gaps(target, position, size)
            position += align_up(size)

    def in_one_piece(self, bucket: H2DBucket) -> torch.Tensor | None:
        """The bytes of ``bucket`` in host memory, if they are one piece of it."""
        if len(bucket.ranges) != 1 or bucket.ranges[0].size != bucket.size:
            return None
        index, offset, size = bucket.ranges[0]
        return self.filled[index].buffer[offset : offset + size]

    def hashes(self, names: Set[str]) -> dict[str, str]:
        """A 128-bit BLAKE2b hash, in hexadecimal, of the bytes of each tensor in ``names``.

        Equal content has an equal hash, wherever it lies: padding is not part of it. The sums of
        ``checksum`` depend on a tensor's place, and show only that its bytes arrived.
        """
        hashes = {}
        for buffer in self.filled:
            memory = buffer.buffer.numpy().data
            for start, meta in placed(buffer.metas):
                if meta.name in names:
                    own = memory[start : start + tensor_nbytes(meta.dtype, meta.shape)]
                    hashes[meta.name] = hashlib.blake2b(own, digest_size=16).hexdigest()
        return hashes

    def content_hashes(self, check: Callable[[], None]) -> bytes:
        """See ``content.content_hashes``. Empty without checksums: what is sent may then be other
        bytes than those that were hashed, and nobody would notice."""
        if any(buffer.checksums is None for buffer in self.filled):
            return b""
        return content.content_hashes(self.filled, check)


class Readers(Protocol):
    """What lets other ranks read memory by P2P: ``transfer.p2p.P2P``.

    Attributes:
        wanted_columns: what hosts need of tensors with short rows, by name, as far as is known.
    """

    wanted_columns: Mapping[str, Columns]

    def offer(self, place: str, buffers: Sequence[MemoryBuffer]) -> Lease | None:
        """Let others read ``buffers`` until ``withdraw`` of ``place``."""

    def revoke(self, lease: Lease) -> None:
        """From now on reads under ``lease`` fail."""

    def place(self, checkpoint: Checkpoint) -> DataToGather:
        """What this rank owns of a checkpoint, and how others read it."""

    def withdraw(self, place: str) -> None:
        """The buffers of ``place`` are about to be freed."""


class Checkpoints:
    """All checkpoints of one rank, and the pool. Any thread may call it.

    One lock orders registering and freeing; what is registered is replaced in one assignment, so
    that readers never wait for a registration.
    """

    def __init__(self, memory: HostMemory, readers: Readers, here: LocalRank) -> None:
        self.memory = memory
        self.filling: Progress | None = None
        self._readers = readers
        self._here = here
        self._log = logger.bind(rank=here.rank)
        self._changing = threading.Lock()
        self._lock = threading.Lock()
        self._registered: Mapping[str, Checkpoint] = {}
        self._pool: list[MemoryBuffer] = []

    # ------------------------------------------------------------------ looking

    def get(self, name: str) -> Checkpoint | None:
        return self._registered.get(name)

    def all(self) -> list[Checkpoint]:
        return list(self._registered.values())

    @property
    def pool_user(self) -> str | None:
        return next((one.name for one in self.all() if one.pooled), None)

    def by_name(self) -> dict[str, list[MemoryBuffer]]:
        """The buffers of each checkpoint, and of the pool: ``ParameterServer._memory_pool``."""
        held = {one.name: one.buffers for one in self.all()}
        return held | ({POOL: self._pool} if self._pool or self.pool_user is not None else {})

    @contextlib.contextmanager
    def pin(self, name: str) -> Iterator[Checkpoint]:
        """Keep a checkpoint from being unregistered; an empty one if there is none of that name."""
        with self._lock:
            nothing = Checkpoint(name, [], self._readers.place, serial=0)
            checkpoint = self._registered.get(name) or nothing
            checkpoint.uses += 1
        try:
            yield checkpoint
        finally:
            with self._lock:
                checkpoint.uses -= 1

    # ------------------------------------------------------------------ changing

    def register(
        self,
        name: str,
        files: Sequence[str],
        named_tensors: Mapping[str, torch.Tensor],
        *,
        pooled: bool,
        in_place: bool,
        allowed_folders: Sequence[str] | None,
        on_progress: OnProgress | None,
    ) -> None:
        """See ``ParameterServer.register_checkpoint``."""
        with self._changing, ExitStack() as undo:
            check_cancelled()  # while it waited for another registration
            self._check_can_register(name, pooled)
            in_place = in_place and not pooled
            paths = expand_folders(files, allowed_folders)
            if in_place:
                paths.sort(key=can_be_pinned)  # of equal tensors, the one in such a file counts
            from_files = open_files(paths, allowed_folders)
            pinned = {
                key: source
                for key, source in from_files.items()
                if in_place and can_be_pinned(file_of(source))
            }
            copied = {key: one for key, one in from_files.items() if key not in pinned}
            sources = {**copied, **tensor_sources(named_tensors)}
            nbytes = sum(source.nbytes for source in sources.values())
            reused = self._pool if pooled and self._pool else None
            with self._observed("filling", name, nbytes, on_progress) as advance:
                buffers = self.memory.fill(sources, reused, advance)
            if reused is None:
                undo.callback(self.memory.release, buffers)

            def add_sums(pinned: list[MemoryBuffer]) -> None:
                if settings.checksum() == "on":
                    every = [*buffers, *pinned]
                    summed = sum(buffer.size for buffer in every)
                    with self._observed("summing", name, summed, on_progress) as advance:
                        checksum.add_sums(every, advance)

            columns: list[CopiedColumns] = []
            undo.callback(self._release_columns, columns)
            if not pooled and settings.copies_columns():
                self._copy_columns(buffers, columns)  # before those in place are among them
            buffers += self.memory.pin_in_place(pinned, named_tensors.keys(), add_sums)
            place, offered = (POOL, self._pool or buffers) if pooled else (name, buffers)
            if reused is None:
                undo.callback(self._readers.withdraw, place)
            lease = self._offer(place, offered, columns) if buffers else None
            checkpoint = Checkpoint(name, buffers, self._readers.place, lease, pooled, columns)
            undo.pop_all()
            with self._lock:
                self._registered = {**self._registered, name: checkpoint}
                self._pool = offered if pooled else self._pool
        size = f"{checkpoint.tensor_count} tensors, {checkpoint.nbytes / 1e9:.3f} GB"
        log_detail(self._here.rank, "registered {}: {} in {} buffers", name, size, len(buffers))

    def unregister(self, name: str, force: bool) -> None:
        """See ``ParameterServer.unregister_checkpoint``."""
        with self._changing:
            checkpoint = self._take_out(name)
            if checkpoint is None:
                self._log.warning("rank {}: checkpoint {} is not registered", self._here.rank, name)
                return
            if checkpoint.lease is not None:
                self._readers.revoke(checkpoint.lease)
            if not checkpoint.pooled:
                copies = [one.memory for one in checkpoint.columns]
                self._free(name, [*checkpoint.buffers, *copies])
            elif force:
                pool, self._pool = self._pool, []
                self._free(POOL, pool)
            if force:
                self.memory.trim()

    # ------------------------------------------------------------------ parts of the above

    def _check_can_register(self, name: str, pooled: bool) -> None:
        if name == POOL:
            raise ValueError(f"{name!r} is the name of the shared memory pool itself")
        if name in self._registered:
            raise ValueError(
                f"checkpoint {name!r} is registered already: unregister_checkpoint() it first"
            )
        if pooled and self.pool_user is not None:
            raise ValueError(
                f"checkpoint {self.pool_user!r} occupies the shared memory pool: "
                "unregister it first"
            )

    def _copy_columns(self, buffers: list[MemoryBuffer], columns: list[CopiedColumns]) -> None:
        """None where there is no memory for them: they only spare time."""
        try:
            wanted = self._readers.wanted_columns
            for one in copy_columns(self.memory, buffers, wanted, lambda _: check_cancelled()):
                columns.append(one)  # one by one: the next may fail
        except (MemoryError, RuntimeError) as error:
            check_cancelled()  # rather than that there is no memory
            self._release_columns(columns)
            self._log.warning("no column copies are made: {}", error)
        for one in columns if settings.checksum() == "on" else ():
            checksum.add_sums([one.memory])

    def _release_columns(self, columns: list[CopiedColumns]) -> None:
        self.memory.release([one.memory for one in columns])
        columns.clear()

    def _offer(
        self, place: str, buffers: list[MemoryBuffer], columns: list[CopiedColumns]
    ) -> Lease | None:
        """With the column copies if that can be, else without them."""
        lease = self._readers.offer(place, [*buffers, *(one.memory for one in columns)])
        if lease is None and columns:
            self._readers.withdraw(place)  # it may have failed once they were registered
            self._release_columns(columns)
            lease = self._readers.offer(place, buffers)
        return lease

    def _take_out(self, name: str) -> Checkpoint | None:
        """Nobody finds the checkpoint any more.

        Raises:
            BusyError: a call is reading it.
        """
        with self._lock:
            checkpoint = self._registered.get(name)
            if checkpoint is not None and checkpoint.uses:
                raise BusyError(f"checkpoint {name!r} is being updated from: try again after it")
            self._registered = {key: one for key, one in self._registered.items() if key != name}
            return checkpoint

    def _free(self, place: str, buffers: list[MemoryBuffer]) -> None:
        try:
            self._readers.withdraw(place)
        finally:
            self.memory.release(buffers)

    @contextlib.contextmanager
    def _observed(
        self, phase: str, name: str, total: int, on_progress: OnProgress | None
    ) -> Iterator[Callable[[float], None]]:
        """A phase of registering. Gives what to call with the share that is done."""
        with ExitStack() as stack:
            show = on_progress
            if show is None and total and self._here.draws_bars:
                show = stack.enter_context(drawn_bar(f"register: {phase}", total))
            about: dict[str, Any] = {"call": "register", "checkpoint": name, "phase": phase}

            def advance(share: float) -> None:
                check_cancelled()
                done = int(share * total)
                self.filling = Progress(**about, done_bytes=done, total_bytes=total)
                if show is not None:
                    show(self.filling)

            try:
                yield advance
            finally:
                self.filling = None
