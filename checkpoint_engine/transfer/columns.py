"""Puts the columns that were read out of a column copy where they belong in a bucket."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from checkpoint_engine.ground.checksum import check_bytes
from checkpoint_engine.planning.columns import WORD, ColumnRead


def place_columns(target: torch.Tensor, reads: Iterable[ColumnRead], whose: str) -> None:
    """On the current stream. ``target``: the bucket, with the parts as they were read.

    Raises:
        ValueError: the bytes are not those that were registered.
    """
    for read in reads:
        pieces = list(read.pieces())
        for at, _, nbytes, span in pieces:
            if (expected := read.expected_of(span)) is not None:
                check_bytes(target[at : at + nbytes], *expected, f"columns from {whose}")
        last, _, nbytes, _ = pieces[-1]
        arrived = target[read.at : last + nbytes].clone().view(torch.int64)
        tensor = read.tensor
        whole = target[read.at : read.at + tensor.rows * tensor.row].view(torch.int64)
        matrix = whole.view(tensor.rows, tensor.parts, tensor.width // WORD)
        for at, _, nbytes, (first, past) in pieces:
            begin = (at - read.at) // WORD
            some = arrived[begin : begin + nbytes // WORD]
            parts = some.view(past - first, tensor.rows, tensor.width // WORD)
            matrix[:, first:past].copy_(parts.transpose(0, 1))
