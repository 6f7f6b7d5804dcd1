"""The host memory of one process: lends buffers that hold a checkpoint's tensors."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import ExitStack
from typing import NamedTuple

import torch
from loguru import logger

from checkpoint_engine.data_types import ALIGNMENT, MemoryBuffer, ParameterMeta
from checkpoint_engine.ground.limits import check_available
from checkpoint_engine.memory.arena import Arena, Arenas
from checkpoint_engine.memory.filling import fill_arenas, pin_arenas
from checkpoint_engine.memory.folder import Inode
from checkpoint_engine.memory.layout import pack, pack_into, packed_size
from checkpoint_engine.memory.sources import FileSlice, TensorSource, file_of

SHM_DIR = "/dev/shm"
_REUSE_SLACK = 1.25
"""A retained arena may be this many times larger than the buffer it is taken for."""


class MemoryUsage(NamedTuple):
    """Bytes of host memory: lent out as buffers, and kept for later ones."""

    in_use: int
    retained: int


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
        self, device_type: str, retain_bytes: int | None = 0, cpus: Set[int] | None = None
    ) -> None:
        self._arenas = Arenas(device_type)
        self._retain_bytes = retain_bytes
        self._largest_fill = 0
        self._cpus = cpus
        self._lent: dict[torch.Tensor, Arena] = {}
        self._retained: list[Arena] = []

    def keep_addresses(self, seconds: float) -> None:
        """Addresses of freed memory stay readable so long, for a transfer that is under way."""
        self._arenas.keep_seconds = seconds

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
        with ExitStack() as undo:
            if reuse is None:
                layout = pack(sources)
                sizes = [max(packed_size(metas), ALIGNMENT) for metas in layout]
                arenas = self._take(sizes, undo)
            else:
                arenas = self._arenas_of(reuse)
                sizes = [buffer.buffer.numel() for buffer in reuse]
                layout = pack_into(sources, sizes)
            fill_arenas(arenas, layout, sources, self._cpus, on_progress)
            undo.pop_all()
        if reuse is None:
            self._largest_fill = max(self._largest_fill, sum(arena.nbytes for arena in arenas))
            tensors = list(map(self._lend, arenas, itertools.repeat(0), sizes))
        else:
            tensors = [buffer.buffer for buffer in reuse]
        filled = zip(tensors, layout, arenas, strict=True)
        return [_memory_buffer(*one, packed_size(one[1])) for one in filled if one[1]]

    def pin_in_place(
        self,
        sources: Mapping[str, TensorSource],
        unused: Set[str] = frozenset(),
        before_deleting: Callable[[list[MemoryBuffer]], None] = lambda pinned: None,
    ) -> list[MemoryBuffer]:
        """Takes over safetensors files in shared memory: maps and pins them, then deletes them.

        Every tensor is a buffer of its own. Its ``size`` is its padded size, so its last bytes may
        be its neighbour's; it is smaller only where the file's last page ends.

        Args:
            sources: all tensors of the files that count, by name.
            unused: names of those that need no buffer.
            before_deleting: called with the buffers; what it raises keeps the files.

        Raises:
            ValueError: a tensor does not lie in a safetensors file in /dev/shm, or its file was
                replaced.
            RuntimeError: a file cannot be mapped or pinned.
            On any of them, and when interrupted, no file is deleted.
        """
        slices = {name: _shm_slice(source) for name, source in sources.items()}
        inodes = {place.path: place.inode for place in slices.values()}
        arenas: dict[str, Arena] = {}
        with ExitStack() as undo:
            for path, inode in inodes.items():
                arenas[path] = self._arenas.of_file(path, inode)
                undo.callback(arenas[path].free)
            pin_arenas(arenas.values(), self._cpus)
            buffers = []
            for name in (name for name in sources if name not in unused):
                meta, place = sources[name].meta, slices[name]
                arena = arenas[place.path]
                size = min(meta.aligned_size, arena.nbytes - place.offset)
                tensor = self._lend(arena, place.offset, size)
                buffers.append(_memory_buffer(tensor, [meta], arena, size))
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

    def _arenas_of(self, buffers: list[MemoryBuffer]) -> list[Arena]:
        arenas = [arena for b in buffers if (arena := self._lent.get(b.buffer)) is not None]
        if len(arenas) < len(buffers):
            raise ValueError(
                f"{len(buffers) - len(arenas)} of {len(buffers)} buffers to reuse are not lent out"
            )
        return arenas

    def _take(self, sizes: list[int], undo: ExitStack) -> list[Arena]:
        """An arena for each size in bytes: a retained one that fits, else a new one."""
        retained = [self._take_retained(size) for size in sizes]
        for kept in filter(None, retained):
            undo.callback(kept.free)
        self.trim()  # what does not fit the new layout must not add to the peak
        check_available(sum(n for n, arena in zip(sizes, retained, strict=True) if arena is None))
        arenas = []
        for size, arena in zip(sizes, retained, strict=True):
            arenas.append(self._arenas.new(size) if arena is None else arena)
            undo.callback(arenas[-1].free)
        return arenas

    def _take_retained(self, size: int) -> Arena | None:
        fitting = [a for a in self._retained if size <= a.nbytes <= size * _REUSE_SLACK]
        best = min(fitting, key=lambda arena: arena.nbytes, default=None)
        if best is not None:
            self._retained.remove(best)
        return best

    def _retire(self, arena: Arena) -> None:
        limit = self._largest_fill if self._retain_bytes is None else self._retain_bytes
        if arena.reusable and self.usage.retained + arena.nbytes <= limit:
            self._retained.append(arena)
        else:
            arena.free()

    def _lend(self, arena: Arena, offset: int, size: int) -> torch.Tensor:
        tensor = arena.memory[offset : offset + size]
        self._lent[tensor] = arena
        arena.lent += 1
        return tensor


def _memory_buffer(
    tensor: torch.Tensor, metas: list[ParameterMeta], arena: Arena, size: int
) -> MemoryBuffer:
    return MemoryBuffer(buffer=tensor, size=size, metas=metas, manually_pinned=arena.pinned)


def can_be_pinned(path: str) -> bool:
    """Whether ``pin_in_place`` takes this file."""
    return path.endswith(".safetensors") and os.path.realpath(path).startswith(f"{SHM_DIR}/")


def _shm_slice(source: TensorSource) -> FileSlice:
    """Where in /dev/shm the tensor lies, symbolic links resolved."""
    if not can_be_pinned(file_of(source)):
        raise ValueError(
            f"{file_of(source)}: only .safetensors files in {SHM_DIR} can be pinned in place; "
            f"register it without use_inplace_pin_memory"
        )
    part = source.files.parts[0]  # safetensors files hold a tensor in one piece
    return FileSlice(os.path.realpath(part.path), part.offset, part.nbytes, part.inode)


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
