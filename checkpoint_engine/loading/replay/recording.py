"""What a loader was seen to do, as data: copies from a checkpoint's tensors to a model's."""

from __future__ import annotations

import gc
import math
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

from checkpoint_engine.loading.replay.canvas import Constant, Origin, Source
from checkpoint_engine.loading.replay.geometry import Copy, View
from checkpoint_engine.loading.replay.memory import Slot
from checkpoint_engine.loading.replay.program import ModulePart, Move, Placed, Program


class Entry(NamedTuple):
    """One copy out of a source, read as ``dtype`` and converted to each of ``casts`` in order.

    ``copy`` counts elements from the start of the source, and of the slot's storage.
    """

    slot: Slot
    dtype: torch.dtype
    casts: tuple[torch.dtype, ...]
    copy: Copy

    def region(self) -> Region:
        """The bytes that it reads, in as few runs as possible."""
        copy, itemsize = self.copy, self.dtype.itemsize
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


@dataclass(eq=False)
class Recording:
    """What a loader was seen to do with a checkpoint.

    Attributes:
        entries: by tensor that it was given, the copies that make up for the loader.
        counts: by tensor and module, how many elements the engine counted as loaded.
        plain: the tensors that go to modules which the engine loads itself, and why; they have
            neither entries nor counts.
        constants: tensors of the model that the loader looked at, as they were.
        together: whether what happens to a tensor may depend on which others there are.
        fills: by module.
        fingerprint: of the model's memory, which must stay the same.
        loaded: the parameters that the loader says it loaded; ``None`` if it does not say.
        buckets: how many calls of the loader an update was.
        programs: compiled for the buckets of the last update, by what tells buckets apart.
    """

    entries: dict[Source, list[Entry]]
    counts: dict[Source, dict[str, int]]
    plain: dict[Source, str]
    constants: dict[Slot, torch.Tensor]
    together: bool
    fills: dict[str, list[Fill]] = field(default_factory=lambda: defaultdict(list))
    fingerprint: Hashable = None
    loaded: set[str] | None = None
    buckets: int = 0
    programs: dict[Hashable, Program] = field(default_factory=dict)
    _shared: dict[Any, Any] = field(default_factory=dict)

    def add(self, slot: Slot, contents: Iterable[tuple[Origin | Constant, Copy]]) -> None:
        """What was copied into a slot."""
        for origin, copy in contents:
            # Models repeat a few shapes thousands of times: hold each once.
            copy = Copy(*(self._shared.setdefault(one, one) for one in copy.simplified()))
            if isinstance(origin, Origin):
                entry = Entry(slot, origin.dtype, origin.casts, copy)
                self.entries[origin.source].append(entry)
            else:
                view = View(origin.arrives_as, copy.target, copy.sizes, copy.target_strides)
                self.fills[slot.module].append(Fill(slot, view, origin.value))

    def holds(self, fingerprint: Hashable, modules: Mapping[str, torch.nn.Module]) -> bool:
        """Whether the model is as it was, where the loader looked at it."""
        return self.fingerprint == fingerprint and all(
            _is_still(getattr(modules.get(slot.module), slot.name, None), seen)
            for slot, seen in self.constants.items()
        )

    def does_as(self, other: Recording | None) -> bool:
        """Whether both are of the same deeds, whatever order the tensors came in."""
        return other is not None and self._deeds == other._deeds

    @property
    def _deeds(self) -> Any:
        fills = (fill for some in self.fills.values() for fill in some)
        return (
            {source: frozenset(entries) for source, entries in self.entries.items()},
            {(*fill[:2], repr(fill.value)) for fill in fills},  # a NaN is one, 0.0 is not -0.0
            self.counts,
            self.plain.keys(),
            self.constants.keys(),
            self.loaded,
        )

    def compile(self, bucket: Sequence[Placed]) -> Program:
        """What to do with tensors that lie at these places.

        Raises:
            ValueError: a tensor lies between elements of its dtype.
        """
        known = [placed for placed in bucket if placed.source in self.entries]
        copies: dict[str, dict[Any, list[Copy]]] = defaultdict(lambda: defaultdict(list))
        nbytes: dict[str, int] = defaultdict(int)
        numel: dict[str, int] = defaultdict(int)
        for source, offset in known:
            for slot, dtype, casts, copy in self.entries[source]:
                begin, odd = divmod(offset, dtype.itemsize)
                if odd:
                    raise ValueError(f"tensor {source.name!r} lies at {offset}")
                moved = copy._replace(source=begin + copy.source)
                copies[slot.module][slot, dtype, casts].append(moved)
                nbytes[slot.module] += source.nbytes
            for module, count in self.counts.get(source, {}).items():
                numel[module] += count
        return Program(
            tensors=len(bucket),
            nbytes=sum(placed.source.nbytes for placed in bucket),
            parts=[
                ModulePart(
                    module,
                    [Move.of(slot, dtype, casts, some) for (slot, dtype, casts), some in copies[module].items()],
                    nbytes[module],
                    numel[module],
                )
                for module in {**numel, **nbytes}
            ],
            sources=frozenset(placed.source for placed in known),
            plain=[placed for placed in known if placed.source in self.plain],
            unknown=[placed for placed in bucket if placed.source not in self.entries],
        )

    def written(self, bucket: list[Program] | None = None) -> set[Slot]:
        """The slots that it copies or fills; ``bucket``: just with these programs."""
        if bucket is None:
            slots = {entry.slot for some in self.entries.values() for entry in some}
            modules = set(self.fills)
        else:
            slots = {move.slot for program in bucket for move in program.moves}
            modules = {part.module for program in bucket for part in program.parts}
        return slots | {fill.slot for module in modules for fill in self.fills.get(module, ())}

    def loaded_from(self, arrived: frozenset[Source]) -> set[str]:
        """The parameters that the loader names as loaded, if just these tensors arrived."""
        absent = self.entries.keys() - arrived - self.plain.keys()
        lost = {entry.slot for source in absent for entry in self.entries[source]}
        for source in arrived if lost else ():
            lost -= {entry.slot for entry in self.entries[source]}
        return set(self.loaded or ()) - {slot.qualified for slot in lost}

    @property
    def copied(self) -> set[Source]:
        """The tensors that are copied from."""
        return {source for source, entries in self.entries.items() if entries}

    def unused(self, arrived: Iterable[Source]) -> set[str]:
        """Of those that arrived, the tensors that the loader does nothing with."""
        without = {source for source in arrived if not self.entries[source] and source.nbytes}
        return {source.name for source in without - self.plain.keys()}

    @cached_property
    def needed(self) -> list[Needed]:
        """Which bytes of which tensors the model needs; those that it does not are left out."""
        needed = []
        for source, entries in self.entries.items():
            regions = list(dict.fromkeys(entry.region() for entry in entries))
            if source in self.plain:
                regions = [Region(0, source.nbytes, (), ())]
            total = sum(region.length * math.prod(region.counts) for region in regions)
            if regions:
                needed.append(Needed(source.name, min(total, source.nbytes), regions))
        return needed

    @cached_property
    def memory(self) -> int:
        """About how many bytes of host memory it holds, as it was when first asked."""
        sizes: dict[int, int] = {}
        found = [vars(self)]
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
