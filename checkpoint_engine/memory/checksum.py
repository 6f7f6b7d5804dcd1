"""The sums of what a rank registers, and those of the buckets that owners send; the formula is in
``ground.checksum``."""

from __future__ import annotations

import base64
import os
import re
import threading
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from checkpoint_engine.data_types import (
    ALIGNMENT,
    H2DBucket,
    MemoryBuffer,
    MemoryBufferMetaList,
    align_up,
)
from checkpoint_engine.ground.checksum import FACTORS, FORMULA, MASK, PERIOD
from checkpoint_engine.memory import threads

_SMALLEST_PIECE, _LARGEST_PIECE = 2 << 20, 16 << 20
"""Words that a thread sums at a time. With less, threads wait for Python more than for memory."""
_LARGE = 1 << 15  # words of a tensor of many rows
_BLOCK = 1 << 19
"""Words that are multiplied at a time; their products take as much memory beside the checkpoint."""
_SUMS = re.compile(r"[\w ,.-]+:[A-Za-z0-9+/]*={0,2}")
"""A formula's name, and base64."""


_REPEATED = np.resize(FACTORS, _BLOCK + PERIOD)


def add_sums(
    buffers: Sequence[MemoryBuffer], on_progress: Callable[[float], None] | None = None
) -> None:
    """Sum the tensors of all buffers of a rank, and note the sums with them.

    Args:
        on_progress: called in this thread with the share that is done; what it raises ends it.
    """
    total = sum(buffer.size for buffer in buffers) // 8
    count = min(threads.MAX_THREADS, len(os.sched_getaffinity(0)))
    step = min(max(total // (4 * count), _SMALLEST_PIECE), _LARGEST_PIECE)
    tables: list[_TensorSums] = []
    tasks = []
    count = done = 0
    for buffer in buffers:
        table = _TensorSums(buffer, first=count)
        tables.append(table)
        count += table.word_count
        for start in range(0, table.word_count, step):
            end = min(start + step, table.word_count)
            tasks.append((end - start, partial(table.add, start, end)))

    def summed(words: int) -> None:
        nonlocal done
        done += words
        if on_progress is not None:
            on_progress(done / count)

    threads.run_tasks(tasks, summed)
    for buffer, table in zip(buffers, tables, strict=True):
        buffer.checksums = table.encode()


class _TensorSums:
    """The sums of one buffer's tensors, added up from those of its pieces."""

    def __init__(self, buffer: MemoryBuffer, first: int) -> None:
        """``first``: the place of its first word."""
        counts = np.array([meta.aligned_size // 8 for meta in buffer.metas], dtype=np.int64)
        self.word_count = int(counts.sum())
        self._memory = buffer.buffer[: buffer.size].numpy()
        self._first = first
        self._with_bytes = np.flatnonzero(counts)
        self._ends = np.cumsum(counts)[self._with_bytes]
        self._starts = self._ends - counts[self._with_bytes]
        self._sums = np.zeros(len(counts), dtype=np.int64)
        self._lock = threading.Lock()

    def add(self, start: int, end: int) -> None:
        """Add the words from ``start`` to ``end``. Any thread."""
        first, last = np.searchsorted(self._ends, [start, end])
        large = end - start >= _LARGE * (last - first + 1)
        step = end - start if large else _BLOCK
        for begin in range(start, end, step):
            stop = min(begin + step, end)
            first = np.searchsorted(self._ends, begin, side="right")
            tensors = slice(first, np.searchsorted(self._ends, stop) + 1)
            borders = np.maximum(self._starts[tensors] - begin, 0)
            factors = _REPEATED[(self._first + begin) % PERIOD :]
            sums = (_sums_by_row if large else _sums)(self._words(begin, stop), borders, factors)
            with self._lock:
                self._sums[self._with_bytes[tensors]] += sums

    def _words(self, start: int, end: int) -> np.ndarray:
        piece = self._memory[8 * start : 8 * end]
        missing = 8 * (end - start) - len(piece)  # a file mapped in place may end within padding
        if missing:
            piece = np.concatenate([piece, np.zeros(missing, np.uint8)])
        return piece.view(np.int64)

    def encode(self) -> str:
        return f"{FORMULA}:{base64.b64encode(self._sums.astype('<i8').tobytes()).decode()}"


# Threads that come back from numpy wait for each other: both take few calls, for many tensors.


def _sums(words: np.ndarray, borders: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Of tensors that lie one behind the other and begin at ``borders``, the first of them 0."""
    return np.add.reduceat(words * factors[: len(words)], borders)


def _sums_by_row(words: np.ndarray, borders: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The same for tensors of many rows, whose products are never in memory: a sum is that of all
    words before a tensor's end, less that of those before its beginning."""
    factors = factors[:PERIOD]
    rows, columns = np.divmod(np.append(borders, len(words)), PERIOD)
    whole = words[: len(words) // PERIOD * PERIOD].reshape(-1, PERIOD)
    before = np.zeros(len(whole) + 1, dtype=np.int64)
    np.cumsum(np.einsum("rp,p->r", whole, factors), out=before[1:])
    begun = np.zeros((len(rows), PERIOD), dtype=np.int64)
    inside = rows < len(whole)
    begun[inside] = whole[rows[inside]]
    begun[~inside, : len(words) % PERIOD] = words[whole.size :]
    begun *= np.arange(PERIOD) < columns[:, None]
    return np.diff(before[rows] + np.einsum("rp,p->r", begun, factors))


def check_sums(sums: str | None, whose: str) -> None:
    """Raise ``ValueError`` unless these are sums of some formula, or none."""
    if sums is not None and not _SUMS.fullmatch(sums):
        raise ValueError(f"{whose} hold damaged checksums: {sums!r:.80}")


Sums = tuple[dict[str, int], np.ndarray, np.ndarray]
"""Of one owner: the index of each tensor, the place of its first block, and the sum of all before
it, and of all."""


def sums_of(owner: int, owned: MemoryBufferMetaList) -> Sums | None:
    """What an owner's metas say of its tensors' sums. ``None``: they have none of this formula, as
    the original's, or with ``PS_CHECKSUM=off``, and are not checked."""
    buffers = owned.memory_buffer_metas_list
    parts = [(buffer.checksums or "").rpartition(":") for buffer in buffers]
    if any(formula != FORMULA for formula, _, _ in parts):
        return None
    metas = [meta for buffer in buffers for meta in buffer.metas]
    raw = b"".join(base64.b64decode(text, validate=True) for _, _, text in parts)
    sums = np.frombuffer(raw, dtype="<u8")
    if len(sums) != len(metas):
        raise ValueError(f"owner {owner} has {len(sums)} sums of {len(metas)} tensors")
    sizes = np.array([meta.aligned_size // ALIGNMENT for meta in metas], dtype=np.int64)
    index_of = {meta.name: index for index, meta in enumerate(metas)}
    before = np.cumsum(np.concatenate([np.zeros(1, np.uint64), sums]), dtype=np.uint64)
    return index_of, np.cumsum(sizes) - sizes, before


def sum_of(sums: Sums | None, bucket: H2DBucket) -> tuple[int, int] | None:
    """Of one bucket: the place of its first block, and the sum. ``None`` if its owner gave no
    sums, or it has no bytes."""
    if sums is None or not bucket.size:
        return None
    index_of, firsts, before = sums
    index = index_of[bucket.items[0].name]
    total = int(before[index + len(bucket.items)]) - int(before[index])
    return int(firsts[index]), total & MASK


def clear_gaps(target: torch.Tensor, position: int, size: int) -> None:
    """Zero what follows ``size`` bytes at ``position`` up to the next tensor: a file that is mapped
    in place may end before its last tensor's padding does."""
    end = min(align_up(position + size), target.numel())
    if position + size < end:
        target[position + size : end].zero_()
