"""What a loader was seen to do, as data: copies from a checkpoint's tensors to a model's.

A ``Recording`` says it of whole tensors; a ``Program`` is the part of it that one bucket has,
compiled for where the bucket's tensors lie, in as few copies as possible.
"""

from __future__ import annotations

import gc
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch

from checkpoint_engine.ground.needs import Needs, Region
from checkpoint_engine.loading.replay.canvas import Source
from checkpoint_engine.loading.replay.geometry import Copy, View, whole_storage
from checkpoint_engine.loading.replay.memory import (
    Places,
    Slot,
    Traced,
    as_columns,
    columns_of,
)
from checkpoint_engine.loading.replay.program import ModulePart, Move, Placed, Program, Route

NamedTensors = list[tuple[str, torch.Tensor]]

KEEPS_TENSORS = (
    "the model's loader keeps tensors that it was given, whose memory the next buckets overwrite: "
    "update again, it will be given copies from now on"
)


class ReceivedBucket(NamedTuple):
    """A bucket as it came: the server's message, and the buffer that its tensors are in.

    ``needs``: the digest of the needs that its bytes suffice for; empty: they are all there.
    """

    message: bytes
    buffer: torch.Tensor
    needs: str = ""

    def check(self, needs: str) -> None:
        """Raise unless its bytes suffice for a loader that reads by these needs; empty: by none."""
        if self.needs and self.needs != needs:
            raise RuntimeError(
                "the server sent only the bytes that this loader read before, and it reads others "
                "now: update again, and it will get all of them"
            )


class Placement(NamedTuple):
    """Tensors of a bucket in one buffer; ``key`` is the same for tensors that lie alike."""

    key: Hashable
    buffer: torch.Tensor
    placed: list[Placed]


def placements_of(weights: NamedTensors, received: ReceivedBucket | None) -> list[Placement]:
    """Where tensors lie: in the buffer that they were received in, or in storages of their own."""
    found: dict[int, Placement] = {}
    start = 0 if received is None else int(received.buffer.storage_offset())
    for name, tensor in weights:
        tensor = tensor if tensor.is_contiguous() else tensor.detach().contiguous()
        key = tensor.untyped_storage()._cdata
        if (placement := found.get(key)) is None:
            buffer = whole_storage(tensor, torch.uint8) if received is None else received.buffer
            placement = found[key] = Placement(None, buffer, [])
        source = Source(sys.intern(name), tensor.dtype, tuple(tensor.shape))
        offset = int(tensor.storage_offset()) * tensor.itemsize - start
        placement.placed.append(Placed(source, offset))
    message = None if received is None else received.message
    return [one._replace(key=message or tuple(one.placed)) for one in found.values()]


class Entry(NamedTuple):
    """One copy out of a source; counts elements from the source's start."""

    route: Route
    copy: Copy

    def region(self) -> Region:
        """The bytes that it reads, in as few runs as possible."""
        copy, itemsize = self.copy, self.route.dtype.itemsize
        strides = copy.source_strides
        simple = Copy(copy.source, 0, copy.sizes, strides, strides).simplified()
        dims = [(n, s) for n, s in zip(simple.sizes, simple.source_strides, strict=True) if s]
        length = dims.pop()[0] if dims and dims[-1][1] == 1 else 1
        counts, distances = tuple(n for n, _ in dims), tuple(s * itemsize for _, s in dims)
        return Region(simple.source * itemsize, length * itemsize, counts, distances)


class Fill(NamedTuple):
    """A constant that the loader wrote, as the padding of an embedding."""

    slot: Slot
    view: View
    value: bool | int | float


class Needed(NamedTuple):
    """What a worker needs of one tensor of the checkpoint."""

    name: str
    nbytes: int
    regions: list[Region]


class Outcome(NamedTuple):
    """What some buckets come to: the parameters that they fill, the tensors that the loader does
    nothing with, and those that are needed and not among them."""

    loaded: set[str]
    unused: set[str]
    absent: set[str]


class Model(Protocol):
    """What a recording looks at of ``adapter.ModelAdapter``."""

    modules: Mapping[str, torch.nn.Module]

    def names(self) -> list[Any]: ...

    def memory(self, slot: Slot) -> torch.Tensor: ...


@dataclass(eq=False)
class Recording:
    """What a loader was seen to do with a checkpoint.

    Attributes:
        entries: by tensor that it was given, the copies that make up for the loader.
        counts: by tensor and module, how many elements the engine counted as loaded.
        constants: tensors of the model that the loader looked at, as they were.
        together: whether what happens to a tensor may depend on which others there are.
        fills: by module.
        version: of the engine.
        names, places: of what the loader may write into, which must stay the same.
        loaded: the parameters that were written; ``None`` if it is not known.
        buckets: how many calls of the loader an update was.
        programs: compiled for the buckets of the last update, by what tells buckets apart.
    """

    entries: dict[Source, list[Entry]]
    counts: dict[Source, Counter[str]]
    constants: dict[Slot, torch.Tensor]
    together: bool
    fills: dict[str, list[Fill]] = field(default_factory=lambda: defaultdict(list))
    version: str = ""
    names: list[Any] = field(default_factory=list)
    places: Places = field(default_factory=dict)
    loaded: set[str] | None = None
    buckets: int = 0
    programs: dict[Hashable, Program] = field(default_factory=dict)
    _outcome: tuple[object, Outcome] | None = None

    def add(self, traced: Traced, shared: dict[Any, Any]) -> None:
        """What was copied into a slot. ``shared`` has each route once."""
        slot = traced.slots[0]  # tied weights: the others have the same memory
        for origin, copy in traced.canvas.contents():
            if origin.source is not None:
                route = Route(slot, origin.dtype, origin.casts)
                entry = Entry(shared.setdefault(route, route), copy)
                self.entries[origin.source].append(entry)
            else:
                view = View(origin.arrives_as, copy.target, copy.sizes, copy.target_strides)
                self.fills[slot.module].append(Fill(slot, view, origin.number()))

    def holds(self, version: str, model: Model) -> bool:
        """Whether the model is as it was, where the loader looked at it, and where some of its
        tensors are."""
        if self.version != version or self.names != model.names():
            return False
        # A GPU waits. What a bucket writes is looked at before it is written, in any case.
        some = list(self.places)[:: max(1, len(self.places) // _LOOKED_AT)]
        places = as_columns(self.places[slot] for slot in some)
        return columns_of([model.memory(slot) for slot in some]) == places and all(
            _is_still(getattr(model.modules.get(slot.module), slot.name, None), seen)
            for slot, seen in self.constants.items()
        )

    @cached_property
    def addresses(self) -> list[int]:
        """Of ``places``."""
        return [place.address for place in self.places.values()]

    def does_as(self, other: Recording) -> bool:
        """Whether both are of the same deeds, whatever order the tensors came in."""
        return self._deeds == other._deeds and (
            self.entries == other.entries or self._unordered == other._unordered
        )

    @property
    def _unordered(self) -> dict[Source, frozenset[Entry]]:
        return {source: frozenset(entries) for source, entries in self.entries.items()}

    @property
    def _deeds(self) -> Any:
        fills = (fill for some in self.fills.values() for fill in some)
        return (
            {(*fill[:2], repr(fill.value)) for fill in fills},  # a NaN is one, 0.0 is not -0.0
            self.counts,
            self.constants.keys(),
            self.loaded,
        )

    def program_for(self, placement: Placement) -> Program:
        """What to do with tensors that lie as these do; compiled once if all are known."""
        program = self.programs.get(placement.key) or self.compile(placement.placed)
        if not program.unknown:
            self.programs[placement.key] = program
        return program

    def prepare(self, device: torch.device, at_once: bool) -> None:
        """Work out how the programs are executed: ``at_once``, or a module at a time."""
        for program in self.programs.values() if device.type == "cuda" else ():
            for batch in [program.batch] if at_once else [part.batch for part in program.parts]:
                batch.prepare(device)

    def compile(self, bucket: Sequence[Placed]) -> Program:
        """What to do with tensors that lie at these places.

        Raises:
            ValueError: a tensor lies between elements of its dtype.
        """
        known, unknown = [], []
        copies: dict[str, dict[Route, list[Copy]]] = defaultdict(lambda: defaultdict(list))
        total, nbytes, numel = 0, defaultdict[str, int](int), defaultdict[str, int](int)
        for placed in bucket:
            source, offset = placed
            total += (size := source.nbytes)
            if (entries := self.entries.get(source)) is None:
                unknown.append(placed)
                continue
            known.append(source.name)
            for route, copy in entries:
                begin, odd = divmod(offset, route.dtype.itemsize)
                if odd:
                    raise ValueError(f"tensor {source.name!r} lies at {offset}")
                module = route.slot.module
                copies[module][route].append(Copy(begin + copy.source, *copy[1:]))
                nbytes[module] += size
            for module, count in self.counts.get(source, {}).items():
                numel[module] += count
        parts = []
        for module in {**numel, **nbytes}:
            moves = [Move.of(route, some) for route, some in copies[module].items()]
            parts.append(ModulePart(module, moves, nbytes[module], numel[module]))
        return Program(
            tensors=len(bucket),
            nbytes=total,
            parts=parts,
            names=frozenset(known),
            unknown=unknown,
        )

    def written(self, bucket: list[Program] | None = None) -> set[Slot]:
        """The slots that it copies or fills; ``bucket``: just with these programs."""
        if bucket is None:
            slots = {entry.route.slot for some in self.entries.values() for entry in some}
            modules = set(self.fills)
        else:
            slots = {move.route.slot for program in bucket for move in program.moves}
            modules = {part.module for program in bucket for part in program.parts}
        return slots | {fill.slot for module in modules for fill in self.fills.get(module, ())}

    def outcome(
        self, programs: Mapping[Hashable, Program], held: frozenset[str] = frozenset()
    ) -> Outcome:
        """Worked out once for the buckets that every update has. ``held``: the tensors that were
        loaded before, and are not sent again."""
        basis = frozenset(programs), held
        if self._outcome is None or self._outcome[0] != basis:
            arrived = set[str]().union(*(program.names for program in programs.values()))
            there = arrived | held
            found = Outcome(self._loaded_from(there), self.unused & arrived, self.copied - there)
            self._outcome = basis, found
        return self._outcome[1]

    def _loaded_from(self, arrived: set[str]) -> set[str]:
        """The parameters that are written if just these tensors arrive."""
        if self.copied <= arrived:
            return set(self.loaded or ())
        filled: dict[bool, set[str]] = {True: set(), False: set()}
        for source, entries in self.entries.items():
            filled[source.name in arrived] |= {entry.route.slot.qualified for entry in entries}
        return set(self.loaded or ()) - (filled[False] - filled[True])

    @cached_property
    def copied(self) -> set[str]:
        """The tensors that are copied from."""
        return {source.name for source, entries in self.entries.items() if entries}

    @cached_property
    def unused(self) -> set[str]:
        """The tensors that the loader does nothing with."""
        return {one.name for one, entries in self.entries.items() if not entries and one.nbytes}

    @property
    def needed(self) -> list[Needed]:
        """Which bytes of which tensors the model needs; those that it does not are left out."""
        return [
            Needed(
                source.name,
                _needed_of(source, entries),
                list(dict.fromkeys(entry.region() for entry in entries)),
            )
            for source, entries in self.entries.items()
            if entries
        ]

    @cached_property
    def needs(self) -> Needs | None:
        """The same, to be told, of all tensors that it was given; ``None``: it cannot be told."""
        return Needs.of(
            {
                source: {entry.region() for entry in entries}
                for source, entries in self.entries.items()
            }
        )

    @property
    def needs_digest(self) -> str:
        """Empty where they cannot be told."""
        return "" if self.needs is None else self.needs.digest

    @cached_property
    def figures(self) -> dict[str, Any]:
        """For reports. Each asks, and large models take a while: they are worked out once."""
        total = sum(source.nbytes for source in self.entries)
        nbytes = sum(_needed_of(source, entries) for source, entries in self.entries.items())
        return {
            "needed_tensors": len(self.copied),
            "needed_bytes": nbytes,
            "needed_share": nbytes / max(1, total),
            "plan_bytes": self._plan_bytes,
        }

    @property
    def _plan_bytes(self) -> int:
        """About how many bytes of host memory it takes: to look at all of them takes as long as to
        learn them."""
        moves = [move for program in self.programs.values() for move in program.moves]
        every = (self.entries.items(), self.counts.items(), self.loaded or (), moves)
        return sum(_memory_of_many(list(things)) for things in every) + _memory_of(self.fills)


_LOOKED_AT = 50


def _needed_of(source: Source, entries: list[Entry]) -> int:
    """How many bytes of a tensor are read."""
    if len(entries) == 1 and 0 not in entries[0].copy.source_strides:
        (route, copy) = entries[0]
        return copy.numel * route.dtype.itemsize
    regions = {entry.region() for entry in entries}
    return min(source.nbytes, sum(one.length * math.prod(one.counts) for one in regions))


def _memory_of_many(things: list[Any]) -> int:
    some = things[:: max(1, len(things) // _LOOKED_AT)]
    return _memory_of(some) * len(things) // max(1, len(some))


def _memory_of(thing: Any) -> int:
    """About how many bytes of host memory a thing holds."""
    sizes: dict[int, int] = {}
    found = [thing]
    while found:
        one = found.pop()
        if id(one) not in sizes and not isinstance(one, (type, torch.dtype, torch.Tensor)):
            sizes[id(one)] = sys.getsizeof(one)
            found += gc.get_referents(one)
    return sum(sizes.values())


def _is_still(tensor: Any, seen: torch.Tensor) -> bool:
    return (
        isinstance(tensor, torch.Tensor)
        and (tensor.dtype, tensor.device) == (seen.dtype, seen.device)
        and torch.equal(tensor, seen)
    )
