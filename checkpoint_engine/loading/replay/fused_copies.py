"""Many small copies out of one memory into many others in one launch, where Triton is installed.

Copies at equal distances have been merged before. What is left is irregular, as experts in the
order of their names' letters, and launches of its own would cost more than the bytes. Strided ones
are faster here as well: torch reads a peer's memory at two thirds of its rate where rows are short.
"""

from __future__ import annotations

import importlib.util
import threading
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from loguru import logger

from checkpoint_engine.loading.replay.digests import digests
from checkpoint_engine.loading.replay.geometry import UNITS, Copy

FEWEST_COPIES = 32
"""Below, a launch for each copy of bytes in a row costs less than a table."""

_DIMS = (1, 2, 4)  # of a copy in a table: each one more takes a division for every element
_BLOCK = 1024
_STEPS = 4  # blocks that a program moves
_MOST = 1 << 30  # elements of a copy: they are counted in 32 bits


class Table(NamedTuple):
    """Copies as the kernel reads them, on the device.

    ``copies``: the number of the target, the first element of source and target, how many there
    are, then sizes, source strides and target strides of ``dims`` dimensions, the last one first.
    ``blocks``: of each program, the copy and the first element that it moves.
    """

    copies: torch.Tensor
    blocks: torch.Tensor
    dims: int


def fits(copies: Sequence[Copy], device: torch.device) -> bool | None:
    """Whether these copies are worth tables; ``None``: they are, as soon as the kernel is there."""
    is_worth_it = (
        device.type == "cuda"
        and (len(copies) >= FEWEST_COPIES or any(len(copy.sizes) > 1 for copy in copies))
        and all(len(copy.sizes) <= _DIMS[-1] and copy.numel <= _MOST for copy in copies)
    )
    if is_worth_it and (thread := _warming.get(device)) is not None and thread.is_alive():
        return None
    return is_worth_it and _try_out(device)


def build_tables(copies: Sequence[tuple[int, Copy]], device: torch.device) -> list[Table]:
    """Of copies into targets, which are told by number. Valid as long as the copies are."""
    by_dims: dict[int, list[tuple[int, Copy]]] = defaultdict(list)
    for number, copy in copies:
        dims = next(dims for dims in _DIMS if len(copy.sizes) <= dims)
        by_dims[dims].append((number, copy))
    return [_build(some, dims, device) for dims, some in by_dims.items()]


def _build(copies: Sequence[tuple[int, Copy]], dims: int, device: torch.device) -> Table:
    rows = []
    for number, copy in copies:
        row = [number, copy.source, copy.target, copy.numel]
        for values, missing in zip(copy[2:], (1, 0, 0), strict=True):
            row += [*reversed(values), *[missing] * (dims - len(values))]
        rows.append(row)
    table, each = np.array(rows, dtype=np.int64), _BLOCK * _STEPS
    programs = (table[:, 3] + each - 1) // each
    begins = np.repeat(programs.cumsum() - programs, programs)
    of_copy = np.repeat(np.arange(len(rows)), programs)
    blocks = np.stack([of_copy, (np.arange(len(begins)) - begins) * each], 1).astype(np.int32)
    there = torch.from_numpy(table).to(device, non_blocking=True)
    return Table(there, torch.from_numpy(blocks).to(device, non_blocking=True), dims)


def places_of(targets: Sequence[torch.Tensor], unit: torch.dtype) -> torch.Tensor:
    """Where the storages of targets begin, for the kernel; by number, counted in elements of
    ``unit`` from the result's own memory. Valid as long as the targets are where they are."""
    device = targets[0].device
    places = torch.empty(len(targets), dtype=torch.int64, device=device)
    here, size = places.data_ptr(), unit.itemsize
    distances = [target.untyped_storage().data_ptr() - here for target in targets]
    if any(distance % size for distance in distances) or {t.device for t in targets} != {device}:
        raise ValueError(f"targets that are not aligned to {size} bytes, or on several devices")
    found = torch.tensor([distance // size for distance in distances], device="cpu")
    return places.copy_(found, non_blocking=True)


def gather_scatter(places: torch.Tensor, source: torch.Tensor, table: Table) -> None:
    """Execute a table's copies.

    Args:
        places: of the targets, as of ``places_of``.
        source: one-dimensional, of the dtype that the copies and places count in.
    """
    unit = UNITS[source.itemsize]
    arguments = places.view(unit), source.view(unit), places, table.copies, table.blocks
    with torch.cuda.device_of(source):  # where Triton launches
        _kernel()[(len(table.blocks),)](*arguments, BLOCK=_BLOCK, STEPS=_STEPS, DIMS=table.dims)


def warm_up(device: torch.device) -> None:
    """Have what the next updates execute loaded and compiled aside, which takes longer than a small
    update."""
    if device.type != "cuda" or device in _warming:
        return
    # Copies mostly move units of 8 bytes, which is what is tried out there.
    # No daemon: where the program ends meanwhile, Python would kill it inside the compiler.
    thread = threading.Thread(target=_load_and_compile, args=(device,), name="warm-up")
    _warming[device] = thread
    thread.start()


def _load_and_compile(device: torch.device) -> None:
    words = torch.zeros(1 << 18, dtype=torch.int64, device=device)
    digests([words[:8], words[8:16], words, words.view(-1, 8)[:, :4]])
    _try_out(device)


_warming: dict[torch.device, threading.Thread] = {}


@cache
def _try_out(device: torch.device) -> bool:
    """Triton may be missing, or lack a compiler or a driver: tried out once."""
    if importlib.util.find_spec("triton") is None:
        return False
    source = torch.arange(32, device=device)
    targets = [torch.zeros_like(source) for _ in range(2)]
    copies = [(0, Copy(1, 2, (5,), (1,), (1,))), (1, Copy(2, 1, (2, 3), (3, 1), (3, 1)))]
    copies.append((1, Copy(3, 9, (2, 2, 2), (1, 2, 4), (4, 2, 1))))
    try:
        places = places_of(targets, source.dtype)
        for table in build_tables(copies, device):
            gather_scatter(places, source, table)
        found = [target.tolist() for target in targets]
    except Exception as error:
        logger.warning("no fused copies, Triton does not work here: {}", error)
        return False
    expected = [[0, 0, 1, 2, 3, 4, 5], [0, 2, 3, 4, 5, 6, 7, 0, 0, 3, 7, 5, 9, 4, 8, 6, 10]]
    return all(one == [*e, *[0] * (32 - len(e))] for one, e in zip(found, expected, strict=True))


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    def copy_blocks(  # type: ignore[no-untyped-def]
        target, source, places, copies, blocks,
        BLOCK: tl.constexpr, STEPS: tl.constexpr, DIMS: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        block = blocks + 2 * tl.program_id(0)
        copy = copies + (4 + 3 * DIMS) * tl.load(block)
        from_ = source + tl.load(copy + 1)
        to = target + tl.load(places + tl.load(copy)) + tl.load(copy + 2)
        numel = tl.load(copy + 3)
        for step in range(STEPS):
            rest = tl.load(block + 1) + step * BLOCK + tl.arange(0, BLOCK)
            within = rest < numel
            read = tl.zeros([BLOCK], tl.int64)
            written = tl.zeros([BLOCK], tl.int64)
            for dim in tl.static_range(DIMS):
                index = rest
                if dim < DIMS - 1:
                    size = tl.load(copy + 4 + dim).to(tl.int32)
                    index = rest % size
                    rest = rest // size
                read += index * tl.load(copy + 4 + DIMS + dim)
                written += index * tl.load(copy + 4 + 2 * DIMS + dim)
            tl.store(to + written, tl.load(from_ + read, mask=within), mask=within)

    copy_blocks.__globals__["tl"] = tl  # where Triton looks names up
    return triton.jit(copy_blocks)
