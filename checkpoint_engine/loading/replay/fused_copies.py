"""Many small copies between two memories in one launch, where Triton is installed.

Copies at equal distances have been merged before. What is left is irregular, as experts in the
order of their names' letters, and launches of its own would cost more than the bytes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from loguru import logger

from checkpoint_engine.loading.replay.geometry import UNITS, Copy

FEWEST_COPIES = 32
"""Below, a launch for each costs less than building and reading a table."""

_DIMS = 4
_BLOCK = 1024


class Table(NamedTuple):
    """Copies as the kernel reads them, on the device.

    ``copies``: source, target, then sizes, source strides and target strides of four dimensions,
    the last one first. ``blocks``: of each program, the copy and the first element that it moves.
    """

    copies: torch.Tensor
    blocks: torch.Tensor


def fits(copies: Sequence[Copy], device: torch.device) -> bool:
    """Whether these copies are worth a table."""
    return (
        device.type == "cuda"
        and len(copies) >= FEWEST_COPIES
        and all(len(copy.sizes) <= _DIMS for copy in copies)
        and _works_on(device)
    )


def build_table(copies: Sequence[Copy], device: torch.device) -> Table:
    """Valid as long as the copies are."""
    rows, blocks = [], []
    for number, copy in enumerate(copies):
        row = [copy.source, copy.target]
        for values, missing in zip(copy[2:], (1, 0, 0), strict=True):
            row += [*reversed(values), *[missing] * (_DIMS - len(values))]
        rows.append(row)
        blocks += [(number, begin) for begin in range(0, copy.numel, _BLOCK)]
    return Table(torch.tensor(rows).to(device), torch.tensor(blocks).to(device))


def gather_scatter(target: torch.Tensor, source: torch.Tensor, table: Table) -> None:
    """Execute a table's copies from one flat memory into another.

    Args:
        target, source: one-dimensional, of the dtype that the copies count in.
    """
    unit = UNITS[source.itemsize]
    _kernel()[(len(table.blocks),)](
        target.view(unit), source.view(unit), table.copies, table.blocks, BLOCK=_BLOCK, DIMS=_DIMS
    )


@cache
def _works_on(device: torch.device) -> bool:
    """Triton may be missing, or lack a compiler or a driver: tried out once."""
    if importlib.util.find_spec("triton") is None:
        return False
    source = torch.arange(8, device=device)
    target = torch.zeros_like(source)
    try:
        copies = [Copy(2, 1, (2, 3), (3, 1), (3, 1))]
        gather_scatter(target, source, build_table(copies, device))
        return target.tolist() == [0, 2, 3, 4, 5, 6, 7, 0]
    except Exception as error:
        logger.warning("no fused copies, Triton does not work here: {}", error)
        return False


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    def copy_blocks(target, source, copies, blocks, BLOCK: tl.constexpr, DIMS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        block = tl.program_id(0).to(tl.int64)
        copy = copies + (2 + 3 * DIMS) * tl.load(blocks + 2 * block)
        rest = tl.load(blocks + 2 * block + 1) + tl.arange(0, BLOCK).to(tl.int64)
        from_ = tl.load(copy) + tl.zeros([BLOCK], tl.int64)
        to = tl.load(copy + 1) + tl.zeros([BLOCK], tl.int64)
        for dim in tl.static_range(DIMS):
            size = tl.load(copy + 2 + dim)
            index = rest % size
            rest = rest // size
            from_ += index * tl.load(copy + 2 + DIMS + dim)
            to += index * tl.load(copy + 2 + 2 * DIMS + dim)
        within = rest == 0  # an element beyond the copy's last one has a rest
        tl.store(target + to, tl.load(source + from_, mask=within), mask=within)

    copy_blocks.__globals__["tl"] = tl  # where Triton looks names up
    return triton.jit(copy_blocks)
