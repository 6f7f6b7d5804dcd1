"""Sums that show whether the bytes that a worker is about to load are those that were registered.

The sum of a tensor is that of its blocks of 256 bytes, modulo 2**64, so that the sum of any bucket
is that of its tensors. A block counts by a hash of its content and its place among everything that
its owner registered: single bits, zeroed, doubled and exchanged blocks change the sum. It guards
against accidents, not against forgery.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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

_WORDS = ALIGNMENT // 8
_PIECE_BYTES = 4 << 20
_DEVICE_PIECE_BYTES = 64 << 20
_MAX_THREADS = 16
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _mixed(value: int) -> int:
    """The finaliser of splitmix64."""
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


_WEIGHTS = [_mixed((i + 1) * _GOLDEN & _MASK) | 1 for i in range(_WORDS)]
"""Of the words of a block. Odd: no change of a single word is lost."""
_HOST_WEIGHTS = np.array(_WEIGHTS, dtype=np.uint64).view(np.int64)


def is_wanted() -> bool:
    """Whether checkpoints are registered with sums: with ``PS_CHECKSUM=on``.

    Raises:
        ValueError: the variable is neither ``on`` nor ``off``.
    """
    value = os.environ.get("PS_CHECKSUM", "off")
    if value not in ("on", "off"):
        raise ValueError(f"PS_CHECKSUM must be on or off, got {value!r}")
    return value == "on"


def checksum(memory: torch.Tensor, first_block: int) -> int:
    """The sum of bytes whose first block has this place. On the device that they are on.

    Args:
        memory: contiguous uint8; a last block that is not whole counts as if zeros followed.
    """
    whole = memory.numel() // ALIGNMENT * ALIGNMENT
    total = 0
    step = _PIECE_BYTES if memory.device.type == "cpu" else _DEVICE_PIECE_BYTES
    for start in range(0, whole, step):
        piece = memory[start : min(start + step, whole)]
        total += _sum_of(piece, first_block + start // ALIGNMENT)
    if whole < memory.numel():
        last = memory.new_zeros(ALIGNMENT)
        last[: memory.numel() - whole].copy_(memory[whole:])
        total += _sum_of(last, first_block + whole // ALIGNMENT)
    return total & _MASK


def _sum_of(piece: torch.Tensor, first_block: int) -> int:
    if piece.device.type == "cpu":
        return int(_block_hashes(piece.numpy(), first_block).sum(dtype=np.uint64))
    return int(_block_hashes_on_device(piece, first_block).sum().item())


def _block_hashes(piece: np.ndarray, first_block: int) -> np.ndarray:
    """Of whole blocks, as uint64."""
    if piece.ctypes.data % 8:  # a tensor of a file mapped in place may begin anywhere
        piece = piece.copy()
    words = piece.view(np.int64).reshape(-1, _WORDS)
    value = np.einsum("ij,j->i", words, _HOST_WEIGHTS).view(np.uint64)
    value += np.arange(first_block, first_block + len(words), dtype=np.uint64) * np.uint64(_GOLDEN)
    value ^= value >> np.uint64(30)
    value *= np.uint64(_FIRST)
    value ^= value >> np.uint64(27)
    value *= np.uint64(_SECOND)
    value ^= value >> np.uint64(31)
    return value


def _block_hashes_on_device(piece: torch.Tensor, first_block: int) -> torch.Tensor:
    """The same with torch, whose 64-bit integers are signed."""

    def shifted(value: torch.Tensor, by: int) -> torch.Tensor:
        return (value >> by) & ((1 << (64 - by)) - 1)

    words = piece.view(torch.int64).view(-1, _WORDS)
    weights = torch.tensor([_signed(weight) for weight in _WEIGHTS], device=piece.device)
    value = (words * weights).sum(1)
    places = torch.arange(first_block, first_block + len(words), device=piece.device)
    value += places * _signed(_GOLDEN)
    value ^= shifted(value, 30)
    value *= _signed(_FIRST)
    value ^= shifted(value, 27)
    value *= _signed(_SECOND)
    return value ^ shifted(value, 31)


# ---------------------------------------------------------------------- of what a rank registers


def sums_of_buffers(buffers: Sequence[MemoryBuffer]) -> list[str | None]:
    """The sums of every buffer's tensors, as ``MemoryBufferMetas.checksums`` has them."""
    owned = [buffer for buffer in buffers if buffer.metas]
    firsts = _first_blocks([[meta.aligned_size for meta in buffer.metas] for buffer in owned])
    hashes = [np.empty(_blocks_of(buffer), dtype=np.uint64) for buffer in owned]
    tasks = [
        (buffer.buffer[: buffer.size], start, first, found)
        for buffer, first, found in zip(owned, firsts, hashes, strict=True)
        for start in range(0, len(found), _PIECE_BYTES // ALIGNMENT)
    ]
    threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)), max(1, len(tasks)))
    if threads == 1:
        for task in tasks:
            _hash_piece(*task)
    else:
        with ThreadPoolExecutor(threads, thread_name_prefix="checkpoint-engine-sum") as pool:
            list(pool.map(lambda task: _hash_piece(*task), tasks))
    return [_encoded(buffer, found) for buffer, found in zip(owned, hashes, strict=True)]


def _blocks_of(buffer: MemoryBuffer) -> int:
    return sum(meta.aligned_size for meta in buffer.metas) // ALIGNMENT


def _hash_piece(memory: torch.Tensor, start: int, first_block: int, found: np.ndarray) -> None:
    end = min(start + _PIECE_BYTES // ALIGNMENT, len(found))
    piece = memory[start * ALIGNMENT : end * ALIGNMENT].numpy()
    missing = (end - start) * ALIGNMENT - piece.nbytes
    if missing:
        piece = np.concatenate([piece, np.zeros(missing, dtype=np.uint8)])
    found[start:end] = _block_hashes(piece, first_block + start)


def _first_blocks(sizes: Sequence[Sequence[int]]) -> list[int]:
    """Of each buffer, the place of its first block among all of an owner."""
    ends = np.cumsum([0, *(sum(one) // ALIGNMENT for one in sizes)])
    return [int(end) for end in ends[:-1]]


def _encoded(buffer: MemoryBuffer, hashes: np.ndarray) -> str:
    counts = np.array([meta.aligned_size // ALIGNMENT for meta in buffer.metas])
    running = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashes, dtype=np.uint64)])
    ends = np.cumsum(counts)
    sums = running[ends] - running[ends - counts]
    return base64.b64encode(sums.astype("<u8").tobytes()).decode()


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
        """Owners whose metas have no sums are not checked: the original's, or without
        ``PS_CHECKSUM=on``."""
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
