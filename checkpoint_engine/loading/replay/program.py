"""What was learned of a loader, as data: copies from a checkpoint's tensors to a model's.

Compiled for a bucket, whose tensors lie at certain places, copies at equal distances become one.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from checkpoint_engine.data_types import tensor_nbytes
from checkpoint_engine.loading.replay.fused_copies import Table
from checkpoint_engine.loading.replay.geometry import Copy, View, coalesced
from checkpoint_engine.loading.replay.recorder import Entry, Recording, Slot


class Placed(NamedTuple):
    """A tensor of a bucket: ``offset`` in bytes from the start of the buffer."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.dtype, self.shape)


class Region(NamedTuple):
    """Bytes of a tensor: ``length`` at ``offset``, repeated ``counts[i]`` times at ``strides[i]``
    bytes."""

    offset: int
    length: int
    counts: tuple[int, ...]
    strides: tuple[int, ...]


class Needed(NamedTuple):
    """What a worker needs of one tensor of the checkpoint."""

    name: str
    nbytes: int
    regions: list[Region]


class Move(NamedTuple):
    """Copies between a bucket and one slot, in elements of ``dtype``, from the buffer's start.

    ``casts`` as in ``Entry``; empty where bits are moved, of whatever dtype is widest.
    """

    slot: int
    dtype: torch.dtype
    casts: tuple[torch.dtype, ...]
    copies: tuple[Copy, ...]


class Step(NamedTuple):
    """What a bucket has for one owner; ``numel`` as the engine counts."""

    owner: str
    moves: tuple[Move, ...]
    nbytes: int
    numel: int


@dataclass
class Program:
    """A bucket's part of a plan, compiled for where its tensors lie."""

    tensors: int
    nbytes: int
    steps: tuple[Step, ...]
    replayed: int
    sources: frozenset[int]
    plain: tuple[Placed, ...]
    unknown: tuple[Placed, ...]
    targets: dict[tuple[int, int], list[torch.Tensor]] = field(default_factory=dict)
    """By step and move, views of memory that stays."""
    tables: dict[tuple[int, int], Table] = field(default_factory=dict)
    """By step and move, the same for the fused kernel."""


class Plan:
    """What a loader does with a checkpoint, frozen."""

    def __init__(
        self,
        recording: Recording,
        fingerprint: Hashable,
        loaded: set[str] | None,
        buckets: int,
    ) -> None:
        """
        Args:
            fingerprint: of the model's memory, which must stay the same.
            loaded: the parameters that the loader says it loaded.
            buckets: how many calls of the loader an update was.
        """
        self.recording = recording
        self.fingerprint = fingerprint
        self.loaded = loaded
        self.buckets = buckets
        self.programs: dict[Hashable, Program] = {}
        self._numbers = {source.name: i for i, source in enumerate(recording.sources)}

    def holds(self, fingerprint: Hashable, modules: Mapping[str, torch.nn.Module]) -> bool:
        """Whether the model is as it was, where the loader looked at it."""
        return self.fingerprint == fingerprint and all(
            slot.owner in modules and _is_still(getattr(modules[slot.owner], slot.name, None), seen)
            for slot, seen in self.recording.constants.items()
        )

    def combine(self, other: Plan) -> None:
        """Note what only another plan of the same deeds shows, whose buckets were cut otherwise."""
        together = self.recording.together or other.recording.together
        self.recording = replace(self.recording, together=together)

    def does_as(self, other: Plan | None) -> bool:
        """Whether another plan was recorded of the same deeds."""
        return (
            other is not None
            and self.loaded == other.loaded
            and self.recording.identity == other.recording.identity
        )

    def written(self, bucket: list[Program] | None = None) -> set[Slot]:
        """The slots that it copies or fills; ``bucket``: just with these programs."""
        recording = self.recording
        if bucket is None:
            numbers = {entry.slot for some in recording.entries.values() for entry in some}
            owners = set(recording.fills)
        else:
            steps = [step for program in bucket for step in program.steps]
            numbers = {move.slot for step in steps for move in step.moves}
            owners = {step.owner for step in steps}
        numbers |= {fill.slot for owner in owners for fill in recording.fills.get(owner, ())}
        return {recording.slots[number] for number in numbers}

    def number_of(self, placed: Placed) -> int | None:
        """Its source, unless it is not the tensor that was recorded."""
        number = self._numbers.get(placed.name)
        if number is None:
            return None
        source = self.recording.sources[number]
        same = source.dtype == placed.dtype and source.shape == tuple(placed.shape)
        return number if same else None

    def compile(self, bucket: Sequence[Placed]) -> Program:
        """Raises ``ValueError`` for tensors at odd places."""
        recording = self.recording
        moves: dict[str, dict[Any, list[Copy]]] = {}
        nbytes: dict[str, int] = {}
        numel: dict[str, int] = {}
        sources: list[int] = []
        plain: list[Placed] = []
        unknown: list[Placed] = []
        for placed in bucket:
            number = self.number_of(placed)
            if number is None:
                unknown.append(placed)
                continue
            sources.append(number)
            if number in recording.plain:
                plain.append(placed)
                continue
            for entry in recording.entries.get(number, ()):
                owner = recording.slots[entry.slot].owner
                key, copy = _copy_of(entry, placed)
                moves.setdefault(owner, {}).setdefault(key, []).append(copy)
                nbytes[owner] = nbytes.get(owner, 0) + recording.sources[number].nbytes
            for owner, count in recording.counts.get(number, {}).items():
                numel[owner] = numel.get(owner, 0) + count
                moves.setdefault(owner, {})
        steps = tuple(
            Step(
                owner,
                tuple(
                    _widened(Move(slot, dtype, casts, tuple(coalesced(copies))))
                    for (slot, dtype, casts), copies in of_owner.items()
                ),
                nbytes.get(owner, 0),
                numel.get(owner, 0),
            )
            for owner, of_owner in moves.items()
        )
        return Program(
            tensors=len(bucket),
            nbytes=sum(placed.nbytes for placed in bucket),
            steps=steps,
            replayed=len(bucket) - len(plain) - len(unknown),
            sources=frozenset(sources),
            plain=tuple(plain),
            unknown=tuple(unknown),
        )

    @cached_property
    def needed_bytes(self) -> int:
        return sum(one.nbytes for one in self.needed)

    @cached_property
    def needed(self) -> list[Needed]:
        """Which bytes of which tensors the model needs; those that it does not are left out."""
        needed = []
        for number, source in enumerate(self.recording.sources):
            if number in self.recording.plain:
                regions = [Region(0, source.nbytes, (), ())]
            else:
                entries = self.recording.entries.get(number, ())
                regions = list(dict.fromkeys(_region_of(entry.region) for entry in entries))
            if regions:
                total = sum(_volume(region) for region in regions)
                needed.append(Needed(source.name, min(total, source.nbytes), regions))
        return needed

    def loaded_from(self, sources: frozenset[int]) -> set[str]:
        """The parameters that the loader names as loaded, if just these tensors arrived."""
        loaded = set(self.loaded or ())
        if sources >= self.replayable:
            return loaded
        recording = self.recording
        absent = set(range(len(recording.sources))) - sources - recording.plain.keys()
        filled = {e.slot for n, some in recording.entries.items() if n in sources for e in some}
        for number in absent:
            for entry in recording.entries.get(number, ()):
                if entry.slot not in filled:
                    loaded.discard(recording.slots[entry.slot].qualified)
        return loaded

    @cached_property
    def replayable(self) -> frozenset[int]:
        """The tensors that are copied from."""
        return frozenset(self.recording.entries)

    def unused_of(self, sources: frozenset[int] | None) -> set[str]:
        """Of those that arrived, the tensors that the loader does nothing with."""
        unused = self.recording.unused if sources is None else self.recording.unused & sources
        named = (self.recording.sources[number] for number in unused)
        return {source.name for source in named if source.nbytes}

    @cached_property
    def total_bytes(self) -> int:
        return sum(source.nbytes for source in self.recording.sources)

    @cached_property
    def memory(self) -> int:
        """About how many bytes of host memory the plan holds, as it was when first asked."""
        return _sizeof([self.recording, list(self.programs.values()), self._numbers], set())


def _is_still(tensor: Any, seen: torch.Tensor) -> bool:
    return (
        isinstance(tensor, torch.Tensor)
        and (tensor.dtype, tensor.device) == (seen.dtype, seen.device)
        and torch.equal(tensor, seen)
    )


def _copy_of(entry: Entry, placed: Placed) -> tuple[Any, Copy]:
    itemsize = entry.region.dtype.itemsize
    begin, odd = divmod(placed.offset, itemsize)
    if odd:
        raise ValueError(f"tensor {placed.name!r} lies at {placed.offset}")
    region, target = entry.region, entry.target
    copy = Copy(begin + region.offset, target.offset, region.sizes, region.strides, target.strides)
    return (entry.slot, region.dtype, entry.casts), copy


_WIDER = (torch.complex128, torch.int64, torch.int32, torch.int16)


def _widened(move: Move) -> Move:
    """Bits that are only moved are moved in the largest units that fit."""
    if move.casts:
        return move
    for dtype in _WIDER:
        times, odd = divmod(dtype.itemsize, move.dtype.itemsize)
        if not odd and times > 1 and all(_fits(copy, times) for copy in move.copies):
            copies = tuple(_in_units(copy, times) for copy in move.copies)
            return move._replace(dtype=dtype, copies=copies)
    return move


def _fits(copy: Copy, times: int) -> bool:
    if not copy.sizes or copy.source_strides[-1] != 1 or copy.target_strides[-1] != 1:
        return False
    outer = (*copy.source_strides[:-1], *copy.target_strides[:-1])
    lengths = (copy.source, copy.target, copy.sizes[-1], *outer)
    return all(length % times == 0 for length in lengths)


def _in_units(copy: Copy, times: int) -> Copy:
    return Copy(
        copy.source // times,
        copy.target // times,
        (*copy.sizes[:-1], copy.sizes[-1] // times),
        (*(s // times for s in copy.source_strides[:-1]), 1),
        (*(s // times for s in copy.target_strides[:-1]), 1),
    )


def _region_of(view: View) -> Region:
    """The bytes of a view, as few runs as can be."""
    simple = coalesced([Copy(view.offset, 0, view.sizes, view.strides, view.strides)])[0]
    itemsize = view.dtype.itemsize
    dims = [(n, s) for n, s in zip(simple.sizes, simple.source_strides, strict=True) if s != 0]
    length = 1
    if dims and dims[-1][1] == 1:
        length = dims.pop()[0]
    counts = tuple(n for n, _ in dims)
    strides = tuple(s * itemsize for _, s in dims)
    return Region(simple.source * itemsize, length * itemsize, counts, strides)


def _volume(region: Region) -> int:
    volume = region.length
    for count in region.counts:
        volume *= count
    return volume


def _sizeof(thing: Any, seen: set[int]) -> int:
    if id(thing) in seen or isinstance(thing, (torch.dtype, type)):
        return 0
    seen.add(id(thing))
    size = sys.getsizeof(thing)
    if isinstance(thing, dict):
        return size + sum(_sizeof(k, seen) + _sizeof(v, seen) for k, v in thing.items())
    if isinstance(thing, (list, tuple, set, frozenset)):
        return size + sum(_sizeof(one, seen) for one in thing)
    if hasattr(thing, "__dict__") and not isinstance(thing, torch.Tensor):
        return size + _sizeof(vars(thing), seen)
    return size
