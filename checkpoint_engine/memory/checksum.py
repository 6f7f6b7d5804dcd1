"""Sums that show whether the bytes that a worker is about to load are those that were registered.

Every 64-bit word is multiplied by a factor that is odd, random, and depends on its place among all
that its owner registered; a tensor, or a bucket, counts as the sum of its words, modulo 2**64. So
every changed bit changes the sum; so do, but by the rarest chance, bytes that are zeroed, stale,
doubled or exchanged, unless they are a multiple of ``PERIOD`` words apart, when they have the same
factors. Of changes to nothing but the topmost bits of words many go unnoticed. It guards against
accidents, not against forgery. Words of the same factor can be added up first, row below row, which
runs at the speed of memory.
"""

from __future__ import annotations

import base64
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from checkpoint_engine.data_types import (
    ALIGNMENT,
    H2DBucket,
    MemoryBuffer,
    MemoryBufferMetaList,
    align_up,
)
from checkpoint_engine.memory import threads

FORMULA = "odd factors, 2047"
"""Names what is below, between two ends that may be of different releases."""
PERIOD = 2047
"""Words in a row. Odd, so that blocks and pages are no multiple of it apart; its 16 KB of sums stay
in the nearest cache."""
_WORDS = ALIGNMENT // 8
_SMALLEST_PIECE, _LARGEST_PIECE = 2 << 20, 16 << 20
"""Words that a thread sums at a time. With less, threads wait for Python more than for memory."""
_BLOCK = 1 << 19
"""Words that are multiplied at a time; their products take as much memory beside the checkpoint."""
_MASK = (1 << 64) - 1
_SUMS = re.compile(r"[\w ,.-]+:[A-Za-z0-9+/]*={0,2}")
"""A formula's name, and base64."""


def _make_factors() -> np.ndarray:
    """SplitMix64 (Steele, Lea, Flood 2014) of each place, made odd."""
    z = np.arange(1, PERIOD + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)


_FACTORS = _make_factors()
_REPEATED = np.resize(_FACTORS, _BLOCK + PERIOD)


def checksum(memory: torch.Tensor, first_block: int) -> int:
    """The sum of bytes whose first block of ``ALIGNMENT`` has this place. On the device that they
    are on, for which it waits.

    Args:
        memory: contiguous uint8, of whole words.
    """
    first = first_block * _WORDS
    if memory.device.type == "cpu":
        words = memory.numpy().view(np.int64)
        return int(_sum(words, first, np.zeros(PERIOD, np.int64), _FACTORS)) & _MASK
    factors = torch.from_numpy(_FACTORS).to(memory.device)
    return int(_sum(memory.view(torch.int64), first, torch.zeros_like(factors), factors)) & _MASK


def _sum(words: Any, first: int, columns: Any, factors: Any) -> Any:
    """Of words, the first of which has this place.

    Args:
        words: int64; these and the others are arrays of numpy, or tensors of one device.
        columns: zeros, one for each of ``factors``.
    """
    head = min(-first % PERIOD, len(words))  # the rest of a row that began before
    count = (len(words) - head) // PERIOD
    body = head + count * PERIOD
    columns[first % PERIOD :][:head] += words[:head]
    columns += words[head:body].reshape(count, PERIOD).sum(0)
    columns[: len(words) - body] += words[body:]
    return (columns * factors).sum()


# ---------------------------------------------------------------------- of what a rank registers


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
        for begin in range(start, end, _BLOCK):
            stop = min(begin + _BLOCK, end)
            words, place = self._words(begin, stop), self._first + begin
            first = np.searchsorted(self._ends, begin, side="right")
            tensors = slice(first, np.searchsorted(self._ends, stop) + 1)
            borders = np.maximum(self._starts[tensors] - begin, 0)
            if len(borders) == 1:  # without the products, at the speed of memory
                sums = _sum(words, place, np.zeros(PERIOD, np.int64), _FACTORS)
            else:  # of all tensors at once: threads that call Python for each wait for each other
                factors = _REPEATED[place % PERIOD :][: len(words)]
                sums = np.add.reduceat(words * factors, borders)
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


# ---------------------------------------------------------------------- of a bucket on its way


def check_bytes(memory: torch.Tensor, first_block: int, total: int, what: str) -> None:
    """Raise ``ValueError`` unless ``memory`` adds up to ``total``, padding included.

    ``first_block``: the place of its first block.
    """
    found = checksum(memory, first_block)
    if found != total:
        raise ValueError(
            f"the bytes of {what} are not those that were registered: their checksum is "
            f"{found:016x}, not {total:016x}; something wrote into host memory, or into a "
            "buffer on their way"
        )


def check_sums(sums: str | None, whose: str) -> None:
    """Raise ``ValueError`` unless these are sums of some formula, or none."""
    if sums is not None and not _SUMS.fullmatch(sums):
        raise ValueError(f"{whose} hold damaged checksums: {sums!r:.80}")


class Checksums:
    """What every owner's tensors add up to, from the metas that were gathered or loaded."""

    def __init__(self, owners: Mapping[int, MemoryBufferMetaList]) -> None:
        """Owners whose metas have no sums of this formula are not checked: the original's, or with
        ``PS_CHECKSUM=off``."""
        self._tables: dict[int, tuple[dict[str, int], np.ndarray, np.ndarray]] = {}
        for owner, owned in owners.items():
            buffers = owned.memory_buffer_metas_list
            parts = [(buffer.checksums or "").rpartition(":") for buffer in buffers]
            if any(formula != FORMULA for formula, _, _ in parts):
                continue
            metas = [meta for buffer in buffers for meta in buffer.metas]
            raw = b"".join(base64.b64decode(text, validate=True) for _, _, text in parts)
            sums = np.frombuffer(raw, dtype="<u8")
            if len(sums) != len(metas):
                raise ValueError(f"owner {owner} has {len(sums)} sums of {len(metas)} tensors")
            sizes = np.array([meta.aligned_size // ALIGNMENT for meta in metas], dtype=np.int64)
            index_of = {meta.name: index for index, meta in enumerate(metas)}
            running = np.cumsum(np.concatenate([np.zeros(1, np.uint64), sums]), dtype=np.uint64)
            self._tables[owner] = index_of, np.cumsum(sizes) - sizes, running

    def of(self, owner: int, bucket: H2DBucket) -> tuple[int, int] | None:
        """Of one bucket: the place of its first block, and the sum. ``None`` if its owner gave no
        sums, or it has no bytes."""
        if owner not in self._tables or not bucket.size:
            return None
        index_of, firsts, running = self._tables[owner]
        index = index_of[bucket.items[0].name]
        total = int(running[index + len(bucket.items)]) - int(running[index])
        return int(firsts[index]), total & _MASK


def clear_gaps(target: torch.Tensor, position: int, size: int) -> None:
    """Zero what follows ``size`` bytes at ``position`` up to the next tensor: a file that is mapped
    in place may end before its last tensor's padding does."""
    end = min(align_up(position + size), target.numel())
    if position + size < end:
        target[position + size : end].zero_()
