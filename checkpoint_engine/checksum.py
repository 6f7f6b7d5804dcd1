"""Sums that show whether the bytes that a worker is about to load are those that were registered.

A block of 256 bytes counts as the sum of its 64-bit words, the first of them three times, times an
odd number that its place among everything that its owner registered gives; a tensor, or a bucket,
as the sum of its blocks; all modulo 2**64. Every changed bit changes the sum, because all factors
are odd; zeroed, stale, doubled or exchanged blocks do, but by the rarest chance. Words that change
places within a block do not, but for the first. It guards against accidents, not against forgery,
at nearly the speed of a plain sum, for which torch reads memory as fast as that can be read.
"""

from __future__ import annotations

import base64
import ctypes
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch

from checkpoint_engine.data_types import (
    ALIGNMENT,
    H2DBucket,
    MemoryBuffer,
    MemoryBufferMetaList,
    align_up,
)

MAX_BLOCKS = 1 << 60
"""More than any owner can have; the places of blocks are counted in 64 bits."""
_WORDS = ALIGNMENT // 8
_PIECE_BYTES = 32 << 20
"""For each thread. With less, threads would wait for Python more than for memory."""
_DEVICE_PIECE_BYTES = 64 << 20
_MAX_THREADS = 16
_MASK = (1 << 64) - 1


def is_wanted() -> bool:
    """Whether checkpoints are registered with sums: unless ``PS_CHECKSUM=off``.

    Raises:
        ValueError: the variable is neither ``on`` nor ``off``.
    """
    value = os.environ.get("PS_CHECKSUM", "on")
    if value not in ("on", "off"):
        raise ValueError(f"PS_CHECKSUM must be on or off, got {value!r}")
    return value == "on"


def checksum(memory: torch.Tensor, first_block: int) -> int:
    """The sum of bytes whose first block has this place. On the device that they are on.

    Args:
        memory: contiguous uint8; a last block that is not whole counts as if zeros followed.
    """
    step = _piece_bytes() if memory.device.type == "cpu" else _DEVICE_PIECE_BYTES
    pieces = [
        _blocks(memory[start : start + step], first_block + start // ALIGNMENT).sum()
        for start in range(0, memory.numel(), step)
    ]
    return int(torch.stack(pieces).sum()) & _MASK if pieces else 0  # a device is waited for once


def _piece_bytes() -> int:
    return min(_PIECE_BYTES * torch.get_num_threads(), _DEVICE_PIECE_BYTES)


def _blocks(memory: torch.Tensor, first_block: int) -> torch.Tensor:
    """What each block counts for, modulo 2**64, as int64."""
    words = _words(memory)
    counts = words.sum(1).add_(words[:, 0], alpha=2)
    first, end = 2 * first_block + 1, 2 * (first_block + len(words)) + 1
    return counts.mul_(torch.arange(first, end, 2, device=memory.device))


def _words(memory: torch.Tensor) -> torch.Tensor:
    """By block; a last one that is not whole is filled up with zeros."""
    missing = -memory.numel() % ALIGNMENT
    if missing:
        memory = torch.cat([memory, memory.new_zeros(missing)])
    elif memory.data_ptr() % 8 or memory.storage_offset() % 8:
        memory = memory.clone()  # a tensor of a file mapped in place may begin anywhere
    return memory.view(torch.int64).view(-1, _WORDS)


# ---------------------------------------------------------------------- of what a rank registers


def sums_of_buffers(buffers: Sequence[MemoryBuffer]) -> list[str | None]:
    """The sums of every buffer's tensors, as ``MemoryBufferMetas.checksums`` has them."""
    tables = []
    first_block = 0
    for buffer in buffers:
        if buffer.metas:
            tables.append(_TensorSums(buffer, first_block))
            first_block += tables[-1].block_count
    step = _PIECE_BYTES // ALIGNMENT
    tasks = [
        (table, start, min(start + step, table.block_count))
        for table in tables
        for start in range(0, table.block_count, step)
    ]
    for (table, *_), part in zip(tasks, _parts_of(tasks), strict=True):
        table.add(part)
    return [table.encode() for table in tables]


def _parts_of(tasks: list[tuple[_TensorSums, int, int]]) -> list[_Part]:
    threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)), len(tasks))
    if threads < 2:
        return [table.of_piece(start, end) for table, start, end in tasks]
    with ThreadPoolExecutor(threads, "checkpoint-engine-sum", _confine_torch) as pool:
        return list(pool.map(lambda task: task[0].of_piece(*task[1:]), tasks))


def _confine_torch() -> None:
    """Have torch compute in this thread alone, not start as many again in each of many threads.

    ``torch.set_num_threads`` would be for all threads that begin later, the caller's too; OpenMP's
    own setting is for this one. Without OpenMP nothing is confined, and only speed is lost.
    """
    torch.get_num_threads()  # makes torch's own setting for this thread, if it is the first use
    with suppress(OSError, AttributeError):
        ctypes.CDLL(torch._C.__file__).omp_set_num_threads(1)


class _Part(NamedTuple):
    """What some tensors add up to in one piece of a buffer."""

    tensors: np.ndarray
    sums: np.ndarray


class _TensorSums:
    """The sums of one buffer's tensors, added up from those of its pieces."""

    def __init__(self, buffer: MemoryBuffer, first_block: int) -> None:
        counts = np.array([meta.aligned_size // ALIGNMENT for meta in buffer.metas])
        self.block_count = int(counts.sum())
        self._memory = buffer.buffer[: buffer.size]
        self._first_block = first_block
        self._with_bytes = np.flatnonzero(counts)
        self._ends = np.cumsum(counts)[self._with_bytes]
        self._begins = self._ends - counts[self._with_bytes]
        self._sums = np.zeros(len(counts), dtype=np.uint64)

    def of_piece(self, start: int, end: int) -> _Part:
        """Of the blocks from ``start`` to ``end``. Any thread."""
        piece = self._memory[start * ALIGNMENT : end * ALIGNMENT]
        blocks = _blocks(piece, self._first_block + start).numpy().view(np.uint64)
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._begins, end))
        begins = np.maximum(self._begins[first:last] - start, 0)
        return _Part(self._with_bytes[first:last], np.add.reduceat(blocks, begins))

    def add(self, part: _Part) -> None:
        self._sums[part.tensors] += part.sums

    def encode(self) -> str:
        return base64.b64encode(self._sums.astype("<u8").tobytes()).decode()


# ---------------------------------------------------------------------- of a bucket on its way


class Expected(NamedTuple):
    """What a bucket must add up to, and the place of its first block."""

    first_block: int
    sum: int

    def check(self, memory: torch.Tensor, what: str) -> None:
        """Raise ``ValueError`` unless ``memory`` holds these bytes, padding included."""
        found = checksum(memory, self.first_block)
        if found != self.sum:
            raise ValueError(
                f"the bytes of {what} are not those that were registered: their checksum is "
                f"{found:016x}, not {self.sum:016x}; something wrote into host memory, or into a "
                "buffer on their way"
            )


class Checksums:
    """What every owner's tensors add up to, from the metas that were gathered or loaded."""

    def __init__(self, owners: Mapping[int, MemoryBufferMetaList]) -> None:
        """Owners whose metas have no sums are not checked: the original's, or with
        ``PS_CHECKSUM=off``."""
        self._tables: dict[int, tuple[dict[str, int], np.ndarray, np.ndarray]] = {}
        for owner, owned in owners.items():
            buffers = owned.memory_buffer_metas_list
            if all(buffer.checksums is not None for buffer in buffers):
                metas = [meta for buffer in buffers for meta in buffer.metas]
                raw = b"".join(base64.b64decode(buffer.checksums or "") for buffer in buffers)
                sizes = np.array([meta.aligned_size // ALIGNMENT for meta in metas], dtype=np.int64)
                sums = np.frombuffer(raw, dtype="<u8")
                if len(sums) != len(metas):
                    raise ValueError(f"owner {owner} has {len(sums)} sums of {len(metas)} tensors")
                self._tables[owner] = (
                    {meta.name: index for index, meta in enumerate(metas)},
                    np.cumsum(sizes) - sizes,
                    np.concatenate([np.zeros(1, np.uint64), np.cumsum(sums, dtype=np.uint64)]),
                )

    def of(self, owner: int, bucket: H2DBucket) -> Expected | None:
        """Of one bucket; ``None`` if its owner gave no sums, or it has no bytes."""
        if owner not in self._tables or not bucket.size:
            return None
        index_of, firsts, running = self._tables[owner]
        index = index_of[bucket.items[0].name]
        total = int(running[index + len(bucket.items)]) - int(running[index])
        return Expected(int(firsts[index]), total & _MASK)


def clear_gaps(target: torch.Tensor, position: int, size: int) -> None:
    """Zero what follows ``size`` bytes at ``position`` up to the next tensor: a file that is mapped
    in place may end before its last tensor's padding does."""
    end = min(align_up(position + size), target.numel())
    if position + size < end:
        target[position + size : end].zero_()
