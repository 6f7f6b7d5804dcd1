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

from checkpoint_engine.loading.replay.geometry import Copy

FEWEST_COPIES = 32
"""Below, a launch for each costs less than building and reading a table."""

_DIMS = 4
_BLOCK = 1024
_UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


class Table(NamedTuple):
    """Copies as the kernel reads them, on the device.

    ``copies``: source, target, then sizes, source strides and target strides of four dimensions.
    ``blocks``: of each program, the copy and the first element that it moves.
    """

    copies: torch.Tensor
    blocks: torch.Tensor


def fits(copies: Sequence[Copy], device: torch.device) -> bool:
    """Whether these copies are worth a table."""
    return (
        device.type == "cuda"
        and len(copies) >= FEWEST_COPIES
        and all(0 < len(copy.sizes) <= _DIMS for copy in copies)
        and _works_on(device)
    )


def build_table(copies: Sequence[Copy], dtype: torch.dtype, device: torch.device) -> Table:
    """For ``copies`` in elements of ``dtype``; valid as long as the copies are."""
    per_element = dtype.itemsize // _UNITS[dtype.itemsize].itemsize
    rows, blocks = [], []
    for number, copy in enumerate(copies):
        sizes, sources, targets = copy.sizes, copy.source_strides, copy.target_strides
        if per_element > 1:  # innermost elements lie side by side, or they would not be so wide
            sizes = (*sizes[:-1], sizes[-1] * per_element)
            sources = (*(s * per_element for s in sources[:-1]), 1)
            targets = (*(s * per_element for s in targets[:-1]), 1)
        missing = _DIMS - len(sizes)
        rows.append(
            [copy.source * per_element, copy.target * per_element]
            + [1] * missing
            + list(sizes)
            + [0] * missing
            + list(sources)
            + [0] * missing
            + list(targets)
        )
        blocks += [(number, begin) for begin in range(0, torch.Size(sizes).numel(), _BLOCK)]
    return Table(
        torch.tensor(rows, dtype=torch.int64).to(device),
        torch.tensor(blocks, dtype=torch.int64).to(device),
    )


def gather_scatter(target: torch.Tensor, source: torch.Tensor, table: Table) -> None:
    """Execute a table's copies from one flat memory into another.

    Args:
        target, source: one-dimensional, of the dtype that the table was built for.
    """
    unit = _UNITS[source.itemsize]
    _kernel()[(len(table.blocks),)](
        target.view(unit), source.view(unit), table.copies, table.blocks, BLOCK=_BLOCK
    )


@cache
def _works_on(device: torch.device) -> bool:
    """Triton may be missing, or lack a compiler or a driver: tried out once."""
    if importlib.util.find_spec("triton") is None:
        return False
    source = torch.arange(8, dtype=torch.int64, device=device)
    target = torch.zeros_like(source)
    try:
        copies = [Copy(2, 1, (2, 3), (3, 1), (3, 1))]
        gather_scatter(target, source, build_table(copies, source.dtype, device))
        return target.tolist() == [0, 2, 3, 4, 5, 6, 7, 0]
    except Exception as error:
        logger.warning("no fused copies, Triton does not work here: {}", error)
        return False


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    def copy_blocks(target, source, copies, blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        block = tl.program_id(0).to(tl.int64)
        copy = copies + 14 * tl.load(blocks + 2 * block)
        index = tl.load(blocks + 2 * block + 1) + tl.arange(0, BLOCK).to(tl.int64)
        size_0, size_1 = tl.load(copy + 2), tl.load(copy + 3)
        size_2, size_3 = tl.load(copy + 4), tl.load(copy + 5)
        within = index < size_0 * size_1 * size_2 * size_3
        i3 = index % size_3
        rest = index // size_3
        i2 = rest % size_2
        rest = rest // size_2
        i1 = rest % size_1
        i0 = rest // size_1
        from_ = (
            tl.load(copy)
            + i0 * tl.load(copy + 6)
            + i1 * tl.load(copy + 7)
            + i2 * tl.load(copy + 8)
            + i3 * tl.load(copy + 9)
        )
        to = (
            tl.load(copy + 1)
            + i0 * tl.load(copy + 10)
            + i1 * tl.load(copy + 11)
            + i2 * tl.load(copy + 12)
            + i3 * tl.load(copy + 13)
        )
        tl.store(target + to, tl.load(source + from_, mask=within), mask=within)

    copy_blocks.__globals__["tl"] = tl  # where Triton looks names up
    return triton.jit(copy_blocks)
