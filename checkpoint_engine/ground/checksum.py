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

from typing import Any

import numpy as np
import torch

from checkpoint_engine.data_types import ALIGNMENT

FORMULA = "odd factors, 2047"
"""Version of the algorithm; both ends must agree on it."""
PERIOD = 2047
"""Words in a row. Odd, so that blocks and pages are no multiple of it apart; its 16 KB of sums stay
in the nearest cache."""
MASK = (1 << 64) - 1
_WORDS = ALIGNMENT // 8


def _make_factors() -> np.ndarray:
    """SplitMix64 (Steele, Lea, Flood 2014) of each place, made odd."""
    z = np.arange(1, PERIOD + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)


FACTORS = _make_factors()


def checksum(memory: torch.Tensor, first_block: int) -> int:
    """The sum of bytes whose first block of ``ALIGNMENT`` has this place. On the device that they
    are on, for which it waits.

    Args:
        memory: contiguous uint8, of whole words.
    """
    first = first_block * _WORDS
    if memory.device.type == "cpu":
        return int(sum_words(memory.numpy().view(np.int64), first, FACTORS)) & MASK
    factors = torch.from_numpy(FACTORS).to(memory.device)
    return int(sum_words(memory.view(torch.int64), first, factors)) & MASK


def sum_words(words: Any, first: int, factors: Any) -> Any:
    """Of int64 words, the first of which has this place. Arrays of numpy, or tensors of one
    device."""
    columns = factors * 0
    head = min(-first % PERIOD, len(words))  # the rest of a row that began before
    count = (len(words) - head) // PERIOD
    body = head + count * PERIOD
    columns[first % PERIOD :][:head] += words[:head]
    columns += words[head:body].reshape(count, PERIOD).sum(0)
    columns[: len(words) - body] += words[body:]
    return (columns * factors).sum()


def check_bytes(memory: torch.Tensor, first_block: int, total: int, what: str) -> None:
    """Raise ``ValueError`` unless ``memory`` adds up to ``total``, padding included.

    ``first_block``: the place of its first block.
    """
    check_sum(checksum(memory, first_block), total, what)


def start_sum(memory: torch.Tensor, first_block: int, factors: torch.Tensor) -> torch.Tensor:
    """The same sum as a tensor, queued on the current stream: nothing is waited for. ``factors``:
    ``FACTORS`` on that device."""
    total: torch.Tensor = sum_words(memory.view(torch.int64), first_block * _WORDS, factors)
    return total


def check_sum(found: int, total: int, what: str) -> None:
    """Raise ``ValueError`` unless a sum is the one that was registered."""
    if found != total:
        raise ValueError(
            f"the bytes of {what} are not those that were registered: their checksum is "
            f"{found:016x}, not {total:016x}; something wrote into host memory, or into a "
            "buffer on their way"
        )
