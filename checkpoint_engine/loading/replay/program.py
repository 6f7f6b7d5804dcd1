"""What is done with one bucket: copies into a model's memory, compiled once and executed at once.

A bucket lies the same in every update, wherever its buffer is, and the model's memory stays where
it is. So whatever can be worked out beforehand is: an update copies no single tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from checkpoint_engine.loading.replay import fused_copies
from checkpoint_engine.loading.replay.canvas import Source
from checkpoint_engine.loading.replay.geometry import UNITS, Copy, coalesced, whole_storage
from checkpoint_engine.loading.replay.memory import Columns, Places, Slot

MemoryOf = Callable[[Slot], torch.Tensor]


class Placed(NamedTuple):
    """A tensor of a bucket: ``offset`` in bytes from the start of the buffer."""

    source: Source
    offset: int


class Route(NamedTuple):
    """How elements get into a slot: read as ``dtype`` and converted to each of ``casts`` in order;
    bits are moved where there are none."""

    slot: Slot
    dtype: torch.dtype
    casts: tuple[torch.dtype, ...]

    @property
    def arrives_as(self) -> torch.dtype:
        return (self.dtype, *self.casts)[-1]


class Flat(dict[torch.dtype, torch.Tensor]):
    """A bucket's buffer as a flat tensor of each dtype that is asked for."""

    def __init__(self, buffer: torch.Tensor) -> None:
        super().__init__()
        self.buffer = buffer

    def __missing__(self, dtype: torch.dtype) -> torch.Tensor:
        buffer = self.buffer
        if buffer.storage_offset() % dtype.itemsize:  # no buffer of ours
            buffer = buffer.clone()
        flat = buffer[: buffer.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        return self.setdefault(dtype, flat)


class Move(NamedTuple):
    """Copies between a bucket and one slot, in elements of the route's dtype, from the buffer's
    start and from the start of the slot's storage."""

    route: Route
    copies: list[Copy]

    @staticmethod
    def of(route: Route, copies: list[Copy]) -> Move:
        """In as few copies as possible, and the largest units that fit where bits are moved."""
        copies = coalesced(copies)
        for size in () if route.casts else sorted(UNITS, reverse=True):
            times = size // route.dtype.itemsize
            units = [unit for copy in copies if times and (unit := copy.in_units(times))]
            if len(units) == len(copies):
                return Move(Route(route.slot, UNITS[size], ()), units)
        return Move(route, copies)

    @property
    def is_of_units(self) -> bool:
        """Whether bits are moved, in units that there are."""
        return not self.route.casts and self.route.dtype.itemsize in UNITS

    def sources(self, flat: Flat) -> list[torch.Tensor]:
        """What it copies, of the dtype before the last."""
        return _sources(self.copies, flat[self.route.dtype], self.route.casts)

    def targets(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """Where it copies to, in the slot's memory."""
        storage = whole_storage(memory, self.route.arrives_as)
        return [storage.as_strided(c.sizes, c.target_strides, c.target) for c in self.copies]


def _sources(
    copies: list[Copy], whole: torch.Tensor, casts: tuple[torch.dtype, ...]
) -> list[torch.Tensor]:
    at = whole.storage_offset()
    sources = [
        whole.as_strided(sizes, strides, at + begin) for begin, _, sizes, strides, _ in copies
    ]
    for dtype in casts[:-1]:
        sources = [source.to(dtype) for source in sources]
    return sources


class _Views(NamedTuple):
    """Moves that read and convert alike; ``copies`` are those of all of them."""

    moves: list[Move]
    copies: list[Copy]

    @staticmethod
    def of(moves: list[Move]) -> list[_Views]:
        alike: dict[Any, list[Move]] = defaultdict(list)
        for move in moves:
            alike[move.route[1:]].append(move)
        return [_Views(some, [c for move in some for c in move.copies]) for some in alike.values()]

    def targets(self, memory_of: MemoryOf) -> list[torch.Tensor]:
        return [one for move in self.moves for one in move.targets(memory_of(move.route.slot))]

    def sources(self, flat: Flat) -> list[torch.Tensor]:
        _, dtype, casts = self.moves[0].route
        return _sources(self.copies, flat[dtype], casts)


class _Fused(NamedTuple):
    """Moves of one unit as a table, whose targets are the slots."""

    unit: torch.dtype
    slots: list[Slot]
    table: fused_copies.Table

    def places(self, memory_of: MemoryOf) -> torch.Tensor:
        return fused_copies.places_of([memory_of(slot) for slot in self.slots], self.unit)

    def execute(self, places: torch.Tensor, flat: Flat) -> None:
        fused_copies.gather_scatter(places, flat[self.unit], self.table)


class Batch:
    """Moves that are executed together: with a kernel where there is one, or view by view."""

    def __init__(self, moves: list[Move]) -> None:
        self.moves = moves
        self._prepared_for: torch.device | None = None
        self._fused: list[_Fused] = []
        self._views: list[_Views] = []
        self._places: list[torch.Tensor] = []
        self._targets: list[list[torch.Tensor]] = []

    def execute(self, buffer: torch.Tensor, memory_of: MemoryOf, stays: bool) -> None:
        """Copy out of a bucket's buffer into the slots' memory. ``stays``: that is where it was the
        last time, and will be the next time."""
        self.prepare(buffer.device)
        flat = Flat(buffer)
        if self._fused and not (stays and self._places):
            self._places = [fused.places(memory_of) for fused in self._fused]
        for fused, places in zip(self._fused, self._places, strict=True):
            fused.execute(places, flat)
        targets = self._targets or [views.targets(memory_of) for views in self._views]
        # A GPU's owner may want its memory back, and views made in inference mode serve only there.
        if stays and buffer.device.type == "cpu" and not torch.is_inference_mode_enabled():
            self._targets = targets
        for some, views in zip(targets, self._views, strict=True):
            torch._foreach_copy_(some, views.sources(flat))

    def prepare(self, device: torch.device) -> None:
        """Work out how to execute it there, unless that is known."""
        if self._prepared_for == device:
            return
        self._fused, self._places, self._targets = [], [], []
        by_unit: dict[torch.dtype, list[Move]] = defaultdict(list)
        for move in self.moves:
            if move.is_of_units:
                by_unit[UNITS[move.route.dtype.itemsize]].append(move)
        single = [move for move in self.moves if not move.is_of_units]
        for unit, moves in by_unit.items():
            copies = [(move.route.slot, copy) for move in moves for copy in move.copies]
            if not fused_copies.fits([copy for _, copy in copies], unit, device):
                single += moves
                continue
            numbers = {slot: n for n, slot in enumerate(dict.fromkeys(slot for slot, _ in copies))}
            table = fused_copies.build_table([(numbers[s], c) for s, c in copies], device)
            self._fused.append(_Fused(unit, list(numbers), table))
        self._views = _Views.of(single)
        self._prepared_for = device


@dataclass(eq=False)
class ModulePart:
    """What a bucket has for one module; ``numel`` as the engine counts."""

    module: str
    moves: list[Move]
    nbytes: int
    numel: int

    @cached_property
    def batch(self) -> Batch:
        """For engines that open a module at a time."""
        return Batch(self.moves)


@dataclass(eq=False)
class Program:
    """What is done with a bucket.

    Attributes:
        tensors, nbytes: of the bucket.
        names: of its tensors that the recording knows.
        unknown: its tensors that the recording lacks; they go through the engine's loader.
        targets: the slots that it writes, and where those of a model's places are that it wrote
            last.
    """

    tensors: int
    nbytes: int
    parts: list[ModulePart]
    names: frozenset[str]
    unknown: list[Placed]
    targets: tuple[Places, list[Slot], Columns] | None = None

    @property
    def moves(self) -> Iterator[Move]:
        return (move for part in self.parts for move in part.moves)

    @cached_property
    def batch(self) -> Batch:
        """All of it at once."""
        return Batch(list(self.moves))

    def release(self) -> None:
        """Let go of the model's memory."""
        vars(self).pop("batch", None)
