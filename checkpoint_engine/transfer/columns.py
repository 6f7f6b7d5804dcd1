"""Puts the columns that were read out of a column copy where they belong in a bucket."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from checkpoint_engine.ground.checksum import check_bytes
from checkpoint_engine.planning.columns import WORD, ColumnRead


def place_columns(target: torch.Tensor, reads: Iterable[ColumnRead], whose: str) -> None:
    """On the current stream. ``target``: the bucket, with the columns as they were read.

    Raises:
        ValueError: the bytes are not those that were registered.
    """
    for read in reads:
        arrived = target[read.at : read.at + read.nbytes]
        if read.expected is not None:
            check_bytes(arrived, *read.expected, f"columns from {whose}")
        rows, parts, width = read.shape
        whole = target[read.at : read.at + math.prod(read.shape)].view(torch.int64)
        matrix = whole.view(rows, parts, width // WORD)
        some = arrived.clone().view(torch.int64).view(-1, rows, width // WORD)  # it is overwritten
        matrix[:, read.first : read.first + len(some)].copy_(some.transpose(0, 1))
