"""Host memory of checkpoints: allocate, pin, fill, reuse, release.

An arena is one anonymous mapping of huge pages. Threads fill it straight from files and tensors,
bringing its pages into being as they go; then it is registered with CUDA in one piece. That costs
a fraction of ``torch.empty(pin_memory=True)``. On the cpu device the memory stays unregistered.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import resource
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from loguru import logger

from checkpoint_engine import crew
from checkpoint_engine.checkpoint_files import (
    FileParts,
    FileSlice,
    TensorSource,
    natural_key,
    open_files,
)
from checkpoint_engine.checkpoint_folder import Inode, check_same_file
from checkpoint_engine.data_types import ALIGNMENT, MemoryBuffer, ParameterMeta, align_up

MAX_BUFFER_BYTES = 4 << 30
"""Most bytes of one host buffer, unless a single tensor needs more."""
CHUNK_BYTES = 16 << 20
"""Bytes that one thread fills at a time, and about the most it reads at once."""
SHM_DIR = "/dev/shm"
CGROUP_ROOT = "/sys/fs/cgroup"

_REUSE_SLACK = 1.25
"""A retained arena may be this many times larger than the buffer it is taken for."""
_HUGE_PAGE = 2 << 20
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_MADV_DONTFORK = 10
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23
_MAP_FAILED = ctypes.c_void_p(-1).value
_lingering: deque[tuple[float, int, int]] = deque()
"""Address ranges to unmap: from when on, address, bytes."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By item size: a dtype that every dtype of this size can be copied as, bit for bit."""

_address, _size, _int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _address
_libc.mmap.argtypes = (_address, _size, _int, _int, _int, ctypes.c_long)
_libc.munmap.argtypes = (_address, _size)
_libc.madvise.argtypes = (_address, _size, _int)


# Layout: which tensor lies where


def pack(sources: Mapping[str, TensorSource]) -> list[list[ParameterMeta]]:
    """The tensors of each host buffer: natural order, padded, consecutive from offset 0.

    No buffer takes more than ``MAX_BUFFER_BYTES``, or the largest tensor if that is larger.
    """
    metas = _sorted_metas(sources)
    limit = max([MAX_BUFFER_BYTES, *(meta.aligned_size for meta in metas)])
    return list(_next_fit(metas, itertools.repeat(limit)))


def pack_into(
    sources: Mapping[str, TensorSource], capacities: list[int]
) -> list[list[ParameterMeta]]:
    """As ``pack``, but into buffers of these sizes in bytes. One list for each, maybe empty.

    Raises:
        ValueError: they do not fit.
    """
    metas = _sorted_metas(sources)
    layout = list(_next_fit(metas, iter(capacities)))
    if sum(map(len, layout)) < len(metas):
        raise ValueError(
            f"the shared memory pool has buffers of {capacities} bytes; {len(metas)} tensors of "
            f"{packed_size(metas)} bytes, the largest of "
            f"{max(meta.aligned_size for meta in metas)}, do not fit: free the pool first with "
            f"unregister_checkpoint(name, force=True)"
        )
    return layout + [[] for _ in capacities[len(layout) :]]


def packed_size(metas: Iterable[ParameterMeta]) -> int:
    """Bytes of tensors that lie one behind the other, padding included."""
    return sum(meta.aligned_size for meta in metas)


def _sorted_metas(sources: Mapping[str, TensorSource]) -> list[ParameterMeta]:
    return [_parameter_meta(sources[name]) for name in sorted(sources, key=natural_key)]


def _parameter_meta(source: TensorSource) -> ParameterMeta:
    return ParameterMeta(
        name=source.name,
        dtype=source.dtype,
        shape=source.shape,
        aligned_size=align_up(source.nbytes),
    )


def _next_fit(
    metas: list[ParameterMeta], capacities: Iterator[int]
) -> Iterator[list[ParameterMeta]]:
    """Fills one buffer after the other; ends early when no buffer is left."""
    waiting = iter(metas)
    meta = next(waiting, None)
    while meta is not None:
        room = next(capacities, None)
        if room is None:
            return
        bin_: list[ParameterMeta] = []
        while meta is not None and meta.aligned_size <= room:
            bin_.append(meta)
            room -= meta.aligned_size
            meta = next(waiting, None)
        yield bin_


# Lending


class MemoryUsage(NamedTuple):
    """Bytes of host memory: lent out as buffers, and kept for later ones."""

    in_use: int
    retained: int


@dataclass
class _Linger:
    """How long addresses outlive their memory; apart, so that arenas need not hold their owner."""

    seconds: float = 0.0


class HostMemory:
    """The host memory of one process: lends buffers filled with tensors, and takes them back.

    Used by one thread at a time, on cuda with the rank's device current. The memory is pinned on
    cuda and npu. All of it is freed when neither this object nor a view of it is left.

    Args:
        device_type: "cuda", "npu" or "cpu".
        retain_bytes: how much released memory is kept, still pinned, for the next ``fill``;
            0 gives all of it back to the system at once. ``None``: as much as the largest ``fill``
            has taken, so that one checkpoint after the other allocates nothing.
        cpus: where threads that bring memory into being and fill it run, for its sake: the
            processors of the device's own NUMA node. Default: anywhere.
    """

    def __init__(
        self,
        device_type: str,
        retain_bytes: int | None = 0,
        cpus: Set[int] | None = None,
    ) -> None:
        self._device_type = device_type
        self._retain_bytes = retain_bytes
        self._largest_fill = 0
        self._cpus = cpus
        self._linger = _Linger()
        self._lent: dict[torch.Tensor, _Arena] = {}
        self._retained: list[_Arena] = []

    def keep_addresses(self, seconds: float) -> None:
        """Addresses of freed memory stay readable so long, for a transfer that is under way."""
        self._linger.seconds = seconds

    @property
    def usage(self) -> MemoryUsage:
        """What is held now. A file pinned in place counts as in use. Any thread."""
        in_use = sum(arena.nbytes for arena in set(self._lent.values()))
        return MemoryUsage(in_use, sum(arena.nbytes for arena in self._retained))

    def fill(
        self,
        sources: Mapping[str, TensorSource],
        reuse: list[MemoryBuffer] | None = None,
        on_progress: Callable[[float], None] | None = None,
    ) -> list[MemoryBuffer]:
        """Copies the tensors into host buffers. Once it returns, the sources may change or go.

        Args:
            sources: what to copy, by name; laid out by ``pack``.
            reuse: buffers of an earlier ``fill`` whose tensors nobody needs any more. The new
                tensors are laid out in them by ``pack_into``, and nothing is allocated.
            on_progress: called in this thread with the share that is filled; what it raises ends
                the filling.

        Returns:
            The buffers, of which the first ``size`` bytes hold tensors. With ``reuse``, those of
            the given buffers' memory that hold tensors now.

        Raises:
            ValueError: ``reuse`` is too small or was released, or a file ends too early.
            MemoryError: the host has too little memory.
            RuntimeError: a file cannot be read, or memory cannot be pinned.
            On any of them, and when interrupted, everything allocated here is freed again.
        """
        if reuse is not None:
            return self._refill(sources, reuse, on_progress)
        layout = pack(sources)
        sizes = [max(packed_size(metas), ALIGNMENT) for metas in layout]
        with ExitStack() as undo:
            arenas = self._take(sizes, undo)
            _fill_arenas(arenas, layout, sources, self._cpus, on_progress)
            undo.pop_all()
        self._largest_fill = max(self._largest_fill, sum(arena.nbytes for arena in arenas))
        return [
            _memory_buffer(self._lend(arena, 0, size), metas, arena)
            for arena, size, metas in zip(arenas, sizes, layout, strict=True)
        ]

    def pin_in_place(
        self,
        files: Iterable[str | os.PathLike[str]],
        allowed_folders: Sequence[str] | None = None,
        before_deleting: Callable[[list[MemoryBuffer]], None] = lambda pinned: None,
    ) -> list[MemoryBuffer]:
        """Takes over safetensors files in shared memory: maps and pins them, then deletes them.

        Every tensor is a buffer of its own. Its ``size`` is its padded size, so its last bytes may
        be its neighbour's; it is smaller only where the file's last page ends.

        Args:
            before_deleting: called with the buffers; what it raises keeps the files.

        Raises:
            ValueError: as ``open_files``, or a file is no safetensors file in /dev/shm.
            RuntimeError: a file cannot be mapped or pinned.
            On any of them, and when interrupted, no file is deleted.
        """
        sources = open_files(files, allowed_folders)
        parts = {name: _shm_slice(source) for name, source in sources.items()}
        inodes = {part.path: part.inode for part in parts.values()}
        arenas: dict[str, _Arena] = {}
        with ExitStack() as undo:
            for path, inode in inodes.items():
                arenas[path] = _map_file(path, inode, self._device_type, self._linger)
                undo.callback(arenas[path].free)
            room = {arena: _room(0, arena.nbytes) for arena in arenas.values()}
            _work(room, _Arena.pin, self._cpus)
            buffers = [
                self._lend_part(source, parts[name], arenas) for name, source in sources.items()
            ]
            undo.callback(self.release, buffers)
            before_deleting(buffers)
            undo.pop_all()
        for path, inode in inodes.items():
            _unlink(path, inode)
        return buffers

    def release(self, buffers: Iterable[MemoryBuffer]) -> None:
        """Takes buffers back: frees or retains their memory, and empties their ``buffer`` tensor.

        Other views of that memory must not be used any more: they may point nowhere. A file pinned
        in place is unmapped with its last buffer. Buffers released before are passed over.
        """
        for buffer in buffers:
            arena = self._lent.pop(buffer.buffer, None)
            buffer.buffer = torch.empty(0, dtype=torch.uint8)
            if arena is not None:
                arena.lent -= 1
                if arena.lent == 0:
                    self._retire(arena)

    def trim(self) -> None:
        """Frees the retained memory."""
        while self._retained:
            self._retained.pop().free()

    def _refill(
        self,
        sources: Mapping[str, TensorSource],
        buffers: list[MemoryBuffer],
        on_progress: Callable[[float], None] | None,
    ) -> list[MemoryBuffer]:
        arenas = [arena for b in buffers if (arena := self._lent.get(b.buffer)) is not None]
        if len(arenas) < len(buffers):
            raise ValueError(
                f"{len(buffers) - len(arenas)} of {len(buffers)} buffers to reuse are not lent out"
            )
        layout = pack_into(sources, [buffer.buffer.numel() for buffer in buffers])
        _fill_arenas(arenas, layout, sources, self._cpus, on_progress)
        return [
            _memory_buffer(buffer.buffer, metas, arena)
            for buffer, metas, arena in zip(buffers, layout, arenas, strict=True)
            if metas
        ]

    def _take(self, sizes: list[int], undo: ExitStack) -> list[_Arena]:
        """An arena for each size in bytes: a retained one that fits, else a new one."""
        taken = [self._take_retained(size) for size in sizes]
        for arena in taken:
            if arena is not None:
                undo.callback(arena.free)
        self.trim()  # what does not fit the new layout must not add to the peak
        _check_available(sum(n for n, arena in zip(sizes, taken, strict=True) if arena is None))
        for i, arena in enumerate(taken):
            if arena is None:
                taken[i] = arena = _new_arena(sizes[i], self._device_type, self._linger)
                undo.callback(arena.free)
        return [arena for arena in taken if arena is not None]

    def _take_retained(self, size: int) -> _Arena | None:
        fitting = [a for a in self._retained if size <= a.nbytes <= size * _REUSE_SLACK]
        best = min(fitting, key=lambda arena: arena.nbytes, default=None)
        if best is not None:
            self._retained.remove(best)
        return best

    def _retire(self, arena: _Arena) -> None:
        limit = self._largest_fill if self._retain_bytes is None else self._retain_bytes
        if arena.reusable and self.usage.retained + arena.nbytes <= limit:
            self._retained.append(arena)
        else:
            arena.free()

    def _lend(self, arena: _Arena, offset: int, size: int) -> torch.Tensor:
        tensor = arena.memory[offset : offset + size]
        self._lent[tensor] = arena
        arena.lent += 1
        return tensor

    def _lend_part(
        self, source: TensorSource, part: FileSlice, arenas: Mapping[str, _Arena]
    ) -> MemoryBuffer:
        arena, meta = arenas[part.path], _parameter_meta(source)
        size = min(meta.aligned_size, arena.nbytes - part.offset)
        return MemoryBuffer(
            buffer=self._lend(arena, part.offset, size),
            size=size,
            metas=[meta],
            manually_pinned=arena.pinned,
        )


def _memory_buffer(tensor: torch.Tensor, metas: list[ParameterMeta], arena: _Arena) -> MemoryBuffer:
    return MemoryBuffer(
        buffer=tensor, size=packed_size(metas), metas=metas, manually_pinned=arena.pinned
    )


# Arenas: mapping, pinning, freeing


@dataclass(eq=False)
class _Arena:
    """One block of memory. Freed by ``free``, or when neither it nor a view of it is left."""

    memory: torch.Tensor
    device_type: str
    undo: ExitStack
    free: Callable[[], object]
    reusable: bool = True
    fresh: bool = True
    """Its pages have not been populated yet."""
    pinned: bool = False
    lent: int = 0
    """Buffers that are lent out of it."""

    @property
    def nbytes(self) -> int:
        return self.memory.numel()

    def pin(self) -> None:
        """On cuda, registers the memory, which must not be freed while a copy from it runs."""
        if self.device_type == "cuda" and not self.pinned:
            address = self.memory.data_ptr()
            # A fork would copy pinned pages on the spot.
            _libc.madvise(address, self.nbytes, _MADV_DONTFORK)
            _cuda_register(address, self.nbytes)
            self.undo.callback(_cuda_unregister, address)
            self.pinned = True


def _new_arena(nbytes: int, device_type: str, linger: _Linger) -> _Arena:
    if device_type == "npu":
        return _npu_arena(nbytes)
    nbytes = align_up(nbytes, mmap.PAGESIZE)
    slack = _HUGE_PAGE if nbytes >= _HUGE_PAGE else 0
    start = _map(nbytes + slack, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = align_up(start, _HUGE_PAGE) if slack else start
    _unmap(start, address - start)
    _unmap(address + nbytes, start + slack - address)
    _libc.madvise(address, nbytes, _MADV_HUGEPAGE)  # only an advice: may be refused
    return _arena_at(address, nbytes, device_type, linger)


def _npu_arena(nbytes: int) -> _Arena:
    """CANN pins only memory of its own."""
    undo = ExitStack()
    memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return _Arena(memory, "npu", undo, undo.close, fresh=False, pinned=True)


def _map_file(path: str, inode: Inode | None, device_type: str, linger: _Linger) -> _Arena:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise RuntimeError(f"{path} cannot be pinned in place: {error}") from error
    try:
        check_same_file(path, fd, inode)
        nbytes = align_up(os.fstat(fd).st_size, mmap.PAGESIZE)
        address = _map(nbytes, mmap.MAP_SHARED, fd)
        return _arena_at(address, nbytes, device_type, linger, reusable=False)
    finally:
        os.close(fd)


def _arena_at(
    address: int, nbytes: int, device_type: str, linger: _Linger, reusable: bool = True
) -> _Arena:
    undo = ExitStack()
    undo.callback(_free_pages, address, nbytes, linger)
    block = (ctypes.c_ubyte * nbytes).from_address(address)
    free = weakref.finalize(block, undo.close)  # every view of the memory keeps the block alive
    free.atexit = False
    memory = torch.frombuffer(block, dtype=torch.uint8)
    return _Arena(memory, device_type, undo, free, reusable)


def _map(nbytes: int, flags: int, fd: int = -1) -> int:
    address = _libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    if address == _MAP_FAILED:
        raise MemoryError(
            f"cannot map {nbytes} bytes of host memory: {os.strerror(ctypes.get_errno())}; "
            f"{_describe_limits()}"
        )
    return int(address)


def _free_pages(address: int, nbytes: int, linger: _Linger) -> None:
    """Frees the memory at once, and its addresses once nobody can be reading there any more.

    A transfer engine may be sending from this memory to a reader on another host, and would take
    this process along if the addresses were gone. Until then they hold an empty page.
    """
    now = time.monotonic()
    while _lingering and _lingering[0][0] < now:
        _unmap(*_lingering.popleft()[1:])
    if nbytes == 0 or linger.seconds == 0:
        return _unmap(address, nbytes)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
    _libc.mmap(address, nbytes, mmap.PROT_READ, flags, -1, 0)
    _lingering.append((now + linger.seconds, address, nbytes))


def _unmap(address: int, nbytes: int) -> None:
    if nbytes > 0:
        _libc.munmap(address, nbytes)


def _populate(address: int, nbytes: int) -> None:
    """Brings the pages of a range into being. Kernels that cannot do it do so on first use.

    Raises:
        MemoryError: there is no memory for them.
    """
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    length = align_up(address + nbytes - start, mmap.PAGESIZE)
    if _libc.madvise(start, length, _MADV_POPULATE_WRITE) == 0:
        return
    code = ctypes.get_errno()
    if code != errno.EINVAL:
        raise MemoryError(
            f"cannot populate {nbytes} bytes of host memory: {os.strerror(code)}; "
            f"{_describe_limits()}"
        )


def _cuda_register(address: int, nbytes: int) -> None:
    cudart = torch.cuda.cudart()
    code = cudart.cudaHostRegister(address, nbytes, 0)
    if int(code) != 0:
        _clear_cuda_error()
        raise RuntimeError(
            f"cudaHostRegister of {nbytes} bytes failed with error {int(code)} "
            f"({cudart.cudaGetErrorString(code)}); {_describe_limits()}"
        )


def _cuda_unregister(address: int) -> None:
    cudart = torch.cuda.cudart()
    code = cudart.cudaHostUnregister(address)
    if int(code) != 0:
        _clear_cuda_error()
        logger.warning("cudaHostUnregister failed with error {}", int(code))


def _clear_cuda_error() -> None:
    """CUDA reports an error once more, to the next kernel launch: let that be this one."""
    with suppress(Exception):
        torch.zeros(1, device="cuda")


# Limits of host memory


def _check_available(nbytes: int) -> None:
    available, limit = available_host_memory()
    if nbytes > available:
        raise MemoryError(
            f"the checkpoint needs {nbytes} more bytes of host memory, but only {available} are "
            f"available ({limit}); unregister another checkpoint, or give this rank fewer tensors"
        )


def available_host_memory() -> tuple[int, str]:
    """Bytes that can still be allocated here, and the limit that says so."""
    limits = [(_mem_available(), "MemAvailable of /proc/meminfo")]
    with suppress(OSError):  # no cgroups here
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                limits += _cgroup_limits(Path(CGROUP_ROOT, line[4:]))
    return min(limits)


def _cgroup_limits(own: Path) -> Iterator[tuple[int, str]]:
    for group in (own, *own.parents):
        if group.is_relative_to(CGROUP_ROOT):
            yield from _cgroup_available(group)


def _mem_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def _cgroup_available(group: Path) -> Iterator[tuple[int, str]]:
    """What a cgroup's limit leaves, file cache counted as free; nothing without a limit."""
    with suppress(FileNotFoundError):
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            used = int((group / "memory.current").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cache = int(stat["active_file"]) + int(stat["inactive_file"])
            yield max(0, int(limit) - used + cache), f"{group}/memory.max"


def _describe_limits() -> str:
    available, limit = available_host_memory()
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    locked = "unlimited" if memlock == resource.RLIM_INFINITY else f"{memlock} bytes"
    return f"available are {available} bytes ({limit}), RLIMIT_MEMLOCK is {locked}"


# Filling


@dataclass(frozen=True)
class _Piece:
    """``nbytes`` bytes at ``at`` of an arena that one thread sees to; here, only populates."""

    at: int
    nbytes: int

    def write(self, memory: torch.Tensor, files: _Reader) -> None:
        """Puts the bytes where they belong."""


@dataclass(frozen=True)
class _FileRun(_Piece):
    """Consecutive bytes of a tensor, from ``offset`` of a file."""

    tensor: str
    path: str
    inode: Inode | None
    offset: int

    def write(self, memory: torch.Tensor, files: _Reader) -> None:
        files.read(self, memory[self.at : self.at + self.nbytes])


@dataclass(frozen=True)
class _FileRows(_FileRun):
    """``rows`` rows of a tensor, of which one shard holds the columns (bytes) from ``column``."""

    rows: int
    column: int
    width: int

    def write(self, memory: torch.Tensor, files: _Reader) -> None:
        shard = torch.empty(self.rows * self.width, dtype=torch.uint8)
        files.read(self, shard)
        block = memory[self.at : self.at + self.nbytes].view(self.rows, -1)
        block[:, self.column : self.column + self.width] = shard.view(self.rows, -1)


@dataclass(frozen=True)
class _MemoryRun(_Piece):
    """Consecutive bytes of a tensor, from ``address`` in this process."""

    address: int

    def write(self, memory: torch.Tensor, files: _Reader) -> None:
        ctypes.memmove(memory.data_ptr() + self.at, self.address, self.nbytes)


@dataclass(frozen=True, eq=False)
class _StridedPart(_Piece):
    """A CPU tensor of any strides whose elements lie one behind the other at ``at``."""

    tensor: torch.Tensor

    def write(self, memory: torch.Tensor, files: _Reader) -> None:
        source = _bits(self.tensor)
        target = memory[self.at : self.at + self.nbytes].view(source.dtype)
        target.view(source.shape).copy_(source)


class _Reader:
    """Reads files into memory; keeps the last one open. One per thread."""

    def __init__(self) -> None:
        self._path = ""
        self._fd = -1

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def read(self, run: _FileRun, out: torch.Tensor) -> None:
        """Fills ``out`` from ``run.offset`` of its file.

        Raises:
            ValueError: the file ends too early, or is another than the one that was opened first.
            RuntimeError: it cannot be read.
        """
        left, offset = out.numpy().data, run.offset
        while left:
            try:
                count = os.preadv(self._open(run), [left], offset)
            except OSError as error:
                raise RuntimeError(f"{run.path}: tensor {run.tensor!r}: {error}") from error
            if count == 0:
                size = os.fstat(self._fd).st_size
                raise ValueError(
                    f"{run.path}: truncated since it was opened: it ends at byte {size}, "
                    f"tensor {run.tensor!r} needs {offset + len(left)}"
                )
            left, offset = left[count:], offset + count

    def _open(self, run: _FileRun) -> int:
        if run.path != self._path:
            fd = os.open(run.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            self.__exit__()
            self._path, self._fd = run.path, fd
            check_same_file(run.path, fd, run.inode)
        return self._fd


class _DeviceCopies:
    """Copies from device memory into host memory, on streams of their own."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def start(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copies behind the work that the current stream already has."""
        module = getattr(torch, source.device.type)
        stream = self._streams.get(source.device)
        if stream is None:
            stream = self._streams[source.device] = module.Stream(source.device)
            stream.wait_stream(module.current_stream(source.device))
        with module.stream(stream):
            source = source.resolve_conj().resolve_neg().contiguous()
            target.copy_(source.view(-1).view(torch.uint8), non_blocking=True)

    def finish(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()


def _fill_arenas(
    arenas: list[_Arena],
    layout: list[list[ParameterMeta]],
    sources: Mapping[str, TensorSource],
    cpus: Set[int] | None,
    on_progress: Callable[[float], None] | None,
) -> None:
    """Puts the tensors of each list into the arena of the same index, and pins the arenas.

    An arena is pinned, and the copies from devices into it begin, while the next one is filled.
    """
    places = {
        arena: list(_places(metas, sources)) for arena, metas in zip(arenas, layout, strict=True)
    }
    copies = _DeviceCopies()

    def finish(arena: _Arena) -> None:
        arena.pin()
        for at, source in places[arena]:
            if isinstance(source.data, torch.Tensor) and source.data.device.type != "cpu":
                copies.start(source.data, arena.memory[at : at + source.nbytes])

    try:
        _work({arena: _pieces(where) for arena, where in places.items()}, finish, cpus, on_progress)
    finally:
        copies.finish()


def _places(
    metas: list[ParameterMeta], sources: Mapping[str, TensorSource]
) -> Iterator[tuple[int, TensorSource]]:
    """Offset in the buffer and source of every tensor that has bytes."""
    at = 0
    for meta in metas:
        if meta.aligned_size > 0:
            yield at, sources[meta.name]
        at += meta.aligned_size


def _work(
    pieces: Mapping[_Arena, Iterable[_Piece]],
    finish: Callable[[_Arena], None],
    cpus: Set[int] | None,
    on_progress: Callable[[float], None] | None = None,
) -> None:
    """Writes all pieces, by several threads, and in this one calls ``finish`` for each done arena.

    However it ends, no thread touches the memory any more.
    """
    batches = [(arena, batch) for arena in pieces for batch in _batches(pieces[arena])]
    left = Counter(arena for arena, _ in batches)

    def wrote_batch(arena: _Arena) -> None:
        left[arena] -= 1
        if left[arena] == 0:
            arena.fresh = False
            finish(arena)
        if on_progress is not None:
            on_progress(1 - left.total() / len(batches))

    tasks = [(arena, partial(_write_batch, arena, batch)) for arena, batch in batches]
    crew.work(tasks, wrote_batch, cpus)


def _write_batch(arena: _Arena, batch: list[_Piece]) -> None:
    if arena.fresh and batch:
        end = batch[-1].at + batch[-1].nbytes
        _populate(arena.memory.data_ptr() + batch[0].at, end - batch[0].at)
    with _Reader() as files:
        for piece in batch:
            piece.write(arena.memory, files)


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Neighbours together until they have ``CHUNK_BYTES``. At least one batch, maybe empty."""
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += piece.nbytes
        if size >= CHUNK_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _pieces(places: Iterable[tuple[int, TensorSource]]) -> Iterator[_Piece]:
    for at, source in places:
        data = source.data
        if isinstance(data, FileParts):
            yield from _file_pieces(source.name, data, at)
        elif data.device.type == "cpu":
            yield from _tensor_pieces(data, at)
        else:
            yield from _room(at, source.nbytes)


def _room(at: int, nbytes: int) -> Iterator[_Piece]:
    for offset in range(0, nbytes, CHUNK_BYTES):
        yield _Piece(at + offset, min(CHUNK_BYTES, nbytes - offset))


def _file_pieces(name: str, data: FileParts, at: int) -> Iterator[_Piece]:
    stride = sum(part.nbytes for part in data.parts) // data.rows
    if data.rows == 1 or stride >= CHUNK_BYTES:
        yield from _file_runs(name, data, at)
        return
    block = CHUNK_BYTES // stride
    for row in range(0, data.rows, block):
        rows, column = min(block, data.rows - row), 0
        for part in data.parts:
            width = part.nbytes // data.rows
            if width == 0:
                continue
            yield _FileRows(
                at=at + row * stride,
                nbytes=rows * stride,
                tensor=name,
                path=part.path,
                inode=part.inode,
                offset=part.offset + row * width,
                rows=rows,
                column=column,
                width=width,
            )
            column += width


def _file_runs(name: str, data: FileParts, at: int) -> Iterator[_Piece]:
    """Row by row, part by part, chunk by chunk: in the order of the tensor's bytes."""
    for row, part in itertools.product(range(data.rows), data.parts):
        width = part.nbytes // data.rows
        for piece in _room(at, width):
            offset = part.offset + row * width + piece.at - at
            yield _FileRun(piece.at, piece.nbytes, name, part.path, part.inode, offset)
        at += width


def _tensor_pieces(tensor: torch.Tensor, at: int) -> Iterator[_Piece]:
    if tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
        address = tensor.data_ptr() - at
        for piece in _room(at, tensor.nbytes):
            yield _MemoryRun(piece.at, piece.nbytes, address + piece.at)
        return
    for part in _split(tensor):
        yield _StridedPart(at, part.nbytes, part)
        at += part.nbytes


def _split(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Parts of about ``CHUNK_BYTES``, but whole transposes: for those torch has a faster copy."""
    if tensor.nbytes <= CHUNK_BYTES or tensor.dim() < 2:
        yield tensor
    elif tensor.dim() > 2:
        for part in tensor:
            yield from _split(part)
    elif tensor.stride(1) != 1:
        yield tensor
    else:
        yield from torch.split(tensor, max(1, CHUNK_BYTES * tensor.size(0) // tensor.nbytes))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers of the same size, so that a copy keeps every bit."""
    plain = tensor.resolve_conj().resolve_neg()
    return plain.view(_BITS.get(plain.dtype.itemsize, plain.dtype))


# Files in shared memory


def _shm_slice(source: TensorSource) -> FileSlice:
    """Where in /dev/shm the tensor lies, symbolic links resolved."""
    if not isinstance(source.data, FileParts) or len(source.data.parts) != 1:
        raise ValueError(
            f"tensor {source.name!r} is not in one piece and cannot be pinned in place"
        )
    part = source.data.parts[0]
    path = os.path.realpath(part.path)
    if not path.endswith(".safetensors") or not Path(path).is_relative_to(SHM_DIR):
        raise ValueError(
            f"{part.path}: only .safetensors files in {SHM_DIR} can be pinned in place; "
            f"register it without use_inplace_pin_memory"
        )
    return FileSlice(path, part.offset, part.nbytes, part.inode)


def _unlink(path: str, inode: Inode | None) -> None:
    """Deletes a file that was pinned, but not one that has taken its place since."""
    try:
        found = os.lstat(path)
        if (found.st_dev, found.st_ino) == inode:
            os.unlink(path)
        else:
            logger.warning("{} is another file than the one that was pinned: it is kept", path)
    except OSError as error:
        logger.warning("{} was pinned in place, but cannot be deleted: {}", path, error)
