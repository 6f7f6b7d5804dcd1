"""Puts the columns that were read out of a column copy where they belong in a bucket."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from checkpoint_engine.ground.checksum import check_bytes
from checkpoint_engine.ground.devices import DeviceManager
from checkpoint_engine.planning.columns import WORD, ColumnRead


def place_columns(
    target: torch.Tensor,
    reads: Iterable[ColumnRead],
    whose: str,
    device_manager: DeviceManager,
    device: torch.device,
) -> None:
    """Once it returns, or raises, the device is done with it.

    Args:
        target: the bucket, on ``device``, with the columns as they were read.

    Raises:
        ValueError: the bytes are not those that were registered.
    """
    if not device_manager.is_accelerator:
        return _place(target, reads, whose)
    module = device_manager.device_module
    module.set_device(device)
    stream = module.Stream()
    try:
        with module.stream(stream):
            _place(target, reads, whose)
    finally:
        stream.synchronize()


def _place(target: torch.Tensor, reads: Iterable[ColumnRead], whose: str) -> None:
    for read in reads:
        arrived = target[read.at : read.at + read.nbytes]
        if read.expected is not None:
            check_bytes(arrived, *read.expected, f"columns from {whose}")
        rows, parts, width = read.shape
        whole = target[read.at : read.at + math.prod(read.shape)].view(torch.int64)
        matrix = whole.view(rows, parts, width // WORD)
        some = arrived.clone().view(torch.int64).view(-1, rows, width // WORD)  # it is overwritten
        matrix[:, read.first : read.first + len(some)].copy_(some.transpose(0, 1))
