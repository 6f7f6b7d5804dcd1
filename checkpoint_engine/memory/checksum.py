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
from checkpoint_engine.memory import crew

FORMULA = "odd factors, 2047"
"""Names what is below, between two ends that may be of different releases."""
PERIOD = 2047
"""Words in a row. Odd, so that blocks and pages are no multiple of it apart; its 16 KB of sums stay
in the nearest cache."""
_WORDS = ALIGNMENT // 8
_SMALLEST_PIECE, _LARGEST_PIECE = 2 << 20, 16 << 20
"""Words that a thread sums at a time. With less, threads wait for Python more than for memory."""
_TENSORS_AT_ONCE = 512
"""Each may take a row of ``PERIOD`` words beside the checkpoint's memory."""
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
    begun, whole, ended = _in_rows(words, first)
    columns[first % PERIOD :][: len(begun)] += begun
    columns += whole.sum(0)
    columns[: len(ended)] += ended
    return (columns * factors).sum()


def _in_rows(words: Any, first: int) -> tuple[Any, Any, Any]:
    """What is left of the row that had begun before, the rows that are whole, and the rest."""
    head = min(-first % PERIOD, len(words))
    count = (len(words) - head) // PERIOD
    body = head + count * PERIOD
    return words[:head], words[head:body].reshape(count, PERIOD), words[body:]


# ---------------------------------------------------------------------- of what a rank registers


def add_sums(
    buffers: Sequence[MemoryBuffer], on_progress: Callable[[float], None] | None = None
) -> None:
    """Sum the tensors of all buffers of a rank, and note the sums with them.

    Args:
        on_progress: called in this thread with the share that is done; what it raises ends it.
    """
    total = sum(buffer.size for buffer in buffers) // 8
    threads = min(crew.MAX_THREADS, len(os.sched_getaffinity(0)))
    step = min(max(total // (4 * threads), _SMALLEST_PIECE), _LARGEST_PIECE)
    tables = []
    tasks = []
    first = 0
    for buffer in buffers:
        tables.append(_TensorSums(buffer, first))
        count = tables[-1].word_count
        first += count
        for start in range(0, count, step):
            end = min(start + step, count)
            tasks.append((end - start, partial(tables[-1].add, start, end)))
    left = first

    def summed(words: int) -> None:
        nonlocal left
        left -= words
        if on_progress is not None:
            on_progress(1 - left / first)

    crew.work(tasks, summed)
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
        self._sums = np.zeros(len(counts), dtype=np.int64)
        self._lock = threading.Lock()

    def add(self, start: int, end: int) -> None:
        """Add the words from ``start`` to ``end``. Any thread."""
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, end)) + 1
        for some in range(first, last, _TENSORS_AT_ONCE):
            tensors = slice(some, min(some + _TENSORS_AT_ONCE, last))
            stop = min(int(self._ends[tensors.stop - 1]), end)
            ends = np.minimum(self._ends[tensors], stop) - start
            sums = _sums_of_tensors(self._words(start, stop), ends, self._first + start)
            with self._lock:
                self._sums[self._with_bytes[tensors]] += sums
            start = stop

    def _words(self, start: int, end: int) -> np.ndarray:
        piece = self._memory[8 * start : 8 * end]
        missing = 8 * (end - start) - len(piece)  # a file mapped in place may end within padding
        if missing:
            piece = np.concatenate([piece, np.zeros(missing, np.uint8)])
        return piece.view(np.int64)

    def encode(self) -> str:
        return f"{FORMULA}:{base64.b64encode(self._sums.astype('<i8').tobytes()).decode()}"


def _sums_of_tensors(words: np.ndarray, ends: np.ndarray, first: int) -> np.ndarray:
    """Of tensors that fill ``words`` one behind the other, up to ``ends``. For all of them at once:
    many threads that call Python for each tensor wait for each other more than for memory."""
    shift = first % PERIOD
    begun, whole, ended = _in_rows(words, first)
    skipped = 1 if shift else 0  # the row that had begun before these words
    rows, columns = np.divmod(np.concatenate([[0], ends]) + shift, PERIOD)  # of all borders

    used, lines = np.unique(rows, return_inverse=True)
    with_borders = np.zeros((len(used), PERIOD), dtype=np.int64)
    inside = (used >= skipped) & (used < skipped + len(whole))
    with_borders[inside] = whole[used[inside] - skipped]
    with_borders[0, shift : shift + len(begun)] += begun
    with_borders[-1, : len(ended)] += ended
    with_borders *= _FACTORS
    places = lines * PERIOD + columns
    sums = np.add.reduceat(with_borders.reshape(-1)[: places[-1]], places[:-1])

    running = np.zeros(len(whole) + 1, dtype=np.int64)
    np.cumsum(np.einsum("rp,p->r", whole, _FACTORS), out=running[1:])
    large = np.diff(rows) > 1
    between = running[rows[1:][large] - skipped] - running[rows[:-1][large] + 1 - skipped]
    sums[large] += between
    return sums


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
            if all(formula == FORMULA for formula, _, _ in parts):
                metas = [meta for buffer in buffers for meta in buffer.metas]
                raw = b"".join(base64.b64decode(text, validate=True) for _, _, text in parts)
                sizes = np.array([meta.aligned_size // ALIGNMENT for meta in metas], dtype=np.int64)
                sums = np.frombuffer(raw, dtype="<u8")
                if len(sums) != len(metas):
                    raise ValueError(f"owner {owner} has {len(sums)} sums of {len(metas)} tensors")
                self._tables[owner] = (
                    {meta.name: index for index, meta in enumerate(metas)},
                    np.cumsum(sizes) - sizes,
                    np.concatenate([np.zeros(1, np.uint64), np.cumsum(sums, dtype=np.uint64)]),
                )

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
