"""What the memory is that a loader works on, and where its contents came from.

A storage belongs to the model, to a tensor of the checkpoint, to a copy that the loader made, or to
numbers that it made. Anything else is unknown, and may not be written.
"""

from __future__ import annotations

import gc
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from checkpoint_engine.loading.replay.canvas import Canvas, Origin, Source
from checkpoint_engine.loading.replay.geometry import Copy, View, extent


class Slot(NamedTuple):
    """A tensor that a loader may write into: ``name`` of the module ``module``."""

    module: str
    name: str

    @property
    def qualified(self) -> str:
        return f"{self.module}.{self.name}" if self.module else self.name


SlotTensors = Iterable[tuple[Slot, torch.Tensor]]


class Place(NamedTuple):
    """Where a tensor is: another one if it moved, or became another."""

    address: int  # 0 on the meta device
    storage: int | None  # of CPUs alone: replay keeps views of those
    view: View

    @staticmethod
    def of(tensor: torch.Tensor) -> Place:
        storage = key_of(tensor) if tensor.is_cpu else None
        return Place(tensor.data_ptr(), storage, View.of(tensor))


def is_in_place(tensor: torch.Tensor, memory: torch.Tensor | None) -> bool:
    """Whether both are the same elements of the same memory."""
    return memory is not None and Place.of(tensor) == Place.of(memory)


Places = dict[Slot, Place]


def places_of(tensors: SlotTensors) -> Places:
    return {slot: Place.of(tensor) for slot, tensor in tensors}


Columns = tuple[list[Any], ...]
"""Of many places, each number in a list of its own."""


def columns_of(tensors: Sequence[torch.Tensor]) -> Columns:
    """Where tensors are, without an object for each: every bucket of an update waits for it."""
    return (
        addresses_of(tensors),
        [key_of(one) if one.is_cpu else None for one in tensors],
        [one.dtype for one in tensors],
        list(map(torch.Tensor.storage_offset, tensors)),
        list(map(torch.Tensor.size, tensors)),
        list(map(torch.Tensor.stride, tensors)),
    )


def as_columns(places: Iterable[Place | None]) -> Columns:
    """The same of places that are known; of one that is not: what no tensor has."""
    rows = [(-1,) * 6 if one is None else (*one[:2], *one.view) for one in places]
    return tuple(map(list, zip(*rows, strict=True))) if rows else ([],) * 6


def addresses_of(tensors: Iterable[torch.Tensor]) -> list[int]:
    return list(map(torch.Tensor.data_ptr, tensors))


@dataclass(eq=False)
class Traced:
    """A tensor of the model, or one that the loader made, and what was copied into it.

    Attributes:
        slots: whose it is, several where weights are tied; empty if the loader made it.
        is_meta: it has no memory: it was made for this update, and is filled as it was.
        is_fed: something of the checkpoint was copied into it.
        broken: why what was done to it cannot be done again.
    """

    canvas: Canvas
    slots: list[Slot] = field(default_factory=list)
    is_meta: bool = False
    is_fed: bool = False
    broken: str = ""

    @property
    def modules(self) -> set[str]:
        return {slot.module for slot in self.slots}


@dataclass(eq=False)
class Known:
    """What is known of one storage.

    Attributes:
        given: the tensors of the checkpoint that it holds: the first byte, the byte after the last
            one, the tensor, and the origin of its elements; they do not overlap.
        traced: the tensors in it that a loader may copy into.
        model: the model's tensors in it, which a loader may look at until something is written.
        is_numbers: it holds what Python had, and nothing of the checkpoint or the model.
    """

    storage: Any = None
    given: list[tuple[int, int, Source, Origin]] = field(default_factory=list)
    traced: list[Traced] = field(default_factory=list)
    model: list[tuple[Slot, torch.Tensor]] = field(default_factory=list)
    is_numbers: bool = False

    def given_at(self, view: View) -> tuple[Source, int]:
        """The tensor of the checkpoint that a view is of, and where it begins, in elements of the
        view's dtype."""
        first, last = view.span
        begin, end, source, _ = self.nearest(first)
        start, odd = divmod(begin, view.dtype.itemsize)
        if odd or not begin <= first <= last <= end:
            raise ValueError("it reaches beyond a tensor of the checkpoint")
        return source, start

    def trace(self, view: View) -> Traced | None:
        """What is traced of the memory of a view. A canvas refuses what reaches beyond it."""
        if len(self.traced) == 1:
            return self.traced[0]
        return next((one for one in self.traced if one.canvas.view.overlaps(view)), None)

    def called(self, view: View) -> str:
        """For messages: what a view of it is a part of."""
        if self.given:
            return self.nearest(view.span[0])[2].name
        for traced in self.traced:
            if traced.slots:
                return traced.slots[0].qualified
            for source in traced.canvas.sources:
                return f"a copy of {source.name}"
        return self.model[0][0].qualified if self.model else "a tensor"

    def nearest(self, first: int) -> tuple[int, int, Source, Origin]:
        return self.given[max(0, bisect_right(self.given, (first, math.inf)) - 1)]


_UNKNOWN = Known()


class KnownMemory:
    """All storages that are known, and the copies between them."""

    def __init__(self, tensors: SlotTensors, model: SlotTensors) -> None:
        """As of ``Recorder``."""
        self._known: dict[int, Known] = {}
        self._passing: set[int] = set()  # of those, what is neither the model's nor the engine's
        self._traced: list[Traced] = []
        self._bucket: set[str] = set()
        self._copied: set[str] = set()
        self._last_copied = ""
        self._last_write: list[tuple[Source, str]] = []
        self._together = False
        for slot, tensor in model:
            if key_of(tensor) is not None:
                self._remember(tensor).model.append((slot, tensor))
        slots = [(slot, tensor) for slot, tensor in tensors if key_of(tensor) is not None]
        for slot, tensor in sorted(slots, key=lambda one: one[1].nbytes, reverse=True):
            self._add_slot(slot, tensor)

    # ------------------------------------------------------------------ what operations do

    def copy(self, target: torch.Tensor, source: Any) -> None:
        """``target`` was filled from a tensor, broadcast and converted, or with a number."""
        into = self._find(target)
        known = self._find(source) if isinstance(source, torch.Tensor) else None
        is_number = known is None or known.is_numbers
        if not target.numel() or (is_number and into.is_numbers):
            return
        view = View.of(target)
        traced = into.trace(view)
        if traced is None:
            raise ValueError("into memory that is no parameter or buffer")
        for origin, copy in self._origins_of(source, known, view):
            self._write(traced, copy, origin, view.dtype)

    def copy_of_given(self, target: torch.Tensor, source: torch.Tensor) -> bool:
        """As ``copy``, where a tensor of the checkpoint, or a part of it, is copied into a tensor
        that is alone in its storage, as nearly always. Returns whether it is so."""
        try:
            known = self._known.get(source.untyped_storage()._cdata, _UNKNOWN)
            into = self._known.get(target.untyped_storage()._cdata, _UNKNOWN)
        except (NotImplementedError, RuntimeError, ValueError):  # as of ``key_of``
            return False
        sizes = tuple(target.shape)
        if not known.given or len(into.traced) != 1 or source.shape != sizes:
            return False
        offset, strides, itemsize = int(source.storage_offset()), source.stride(), source.itemsize
        begin, end, given, origin = known.nearest(offset * itemsize)
        start, odd = divmod(begin, itemsize)
        reach = extent(sizes, strides)
        if odd or not reach or not start <= offset <= offset + reach <= end // itemsize:
            return False
        begins = offset - start, int(target.storage_offset())
        copy = Copy(*begins, sizes, strides, target.stride())
        origin = origin if source.dtype == given.dtype else Origin(given, source.dtype)
        self._write(into.traced[0], copy, origin, target.dtype)
        return True

    def make(self, result: torch.Tensor) -> None:
        """``result`` is new memory."""
        self._remember(result).traced = [Traced(Canvas(View.of(result)))]

    def make_of_numbers(self, result: torch.Tensor) -> None:
        """``result`` holds what Python had, unless NumPy has its memory too."""
        if self._find(result) is _UNKNOWN and result.untyped_storage().resizable():
            self._remember(result).is_numbers = True

    def make_copy(self, result: torch.Tensor, source: torch.Tensor) -> None:
        """``result`` is new memory, filled from ``source``."""
        if self._is_numbers(source):
            self._remember(result).is_numbers = True
        else:
            self.make(result)
            self.copy(result, source)

    def _origins_of(
        self, source: Any, known: Known | None, into: View
    ) -> list[tuple[Origin, Copy]]:
        """Where what went ``into`` a view is from; ``known``: of a source that is a tensor."""
        number = Origin(None, into.dtype, (), source)
        if known is not None:
            out_of = View.of(source if source.shape == into.sizes else source.expand(into.sizes))
            if known.given:
                given, start = known.given_at(out_of)
                places = out_of.offset - start, into.offset, into.sizes
                return [(Origin(given, source.dtype), Copy(*places, out_of.strides, into.strides))]
            copy = Copy(out_of.offset, into.offset, into.sizes, out_of.strides, into.strides)
            if (traced := known.trace(out_of)) is not None:
                found = traced.canvas.read(copy, source.dtype)
                self._together |= len({origin.source for origin, _ in found} - {None}) > 1
                return found
            if source.dim() or not known.is_numbers:
                raise ValueError("its values are neither constant nor from the checkpoint")
            number = Origin(None, source.dtype, (), source.item())
        return [(number, Copy(0, into.offset, into.sizes, (0,) * len(into.sizes), into.strides))]

    def _write(self, traced: Traced, copy: Copy, origin: Origin, dtype: torch.dtype) -> None:
        traced.canvas.write(copy, origin, dtype)
        if origin.source is not None:
            name = origin.source.name
            # Back after another tensor's turn, or kept from another bucket: it waited for others.
            is_back = name in self._copied and name != self._last_copied
            self._together |= is_back or name not in self._bucket
            self._copied.add(name)
            self._last_copied = name
            traced.is_fed = True
            if traced.slots:
                self._last_write = [(origin.source, traced.slots[0].module)]

    # ------------------------------------------------------------------ whose memory it is

    def _add_slot(self, slot: Slot, tensor: torch.Tensor) -> None:
        known, view = self._remember(tensor), View.of(tensor)
        self._passing.discard(tensor.untyped_storage()._cdata)
        try:
            traced = Traced(Canvas(view), [slot], tensor.is_meta)
        except ValueError:
            return  # writes into it are then writes into unknown memory
        for other in known.traced:
            if other.canvas.view.overlaps(view):
                other.slots.append(slot)
                (a, b), (c, d) = other.canvas.view.span, view.span
                if c < a or b < d:
                    other.broken = f"its memory overlaps that of {slot.qualified}"
                return
        if not tensor.is_meta and _is_held_elsewhere(tensor, known):
            traced.broken = "an array of NumPy's, or another process, has its memory"
        known.traced.append(traced)
        self._traced.append(traced)

    def _remember(self, tensor: torch.Tensor) -> Known:
        """What is known of a tensor's storage, from now on if nothing was."""
        storage = tensor.untyped_storage()
        # As long as the weak reference exists, no other storage gets this one's address.
        known = self._known.get(storage._cdata)
        if known is None or known.storage.expired():
            known = self._known[storage._cdata] = Known(StorageWeakRef(storage))
            self._passing.add(storage._cdata)
        return known

    def _alive(self) -> list[Known]:
        """What is known of storages that are neither the model's nor gone, which is forgotten."""
        alive = []
        for key in list(self._passing):
            if (known := self._known[key]).storage.expired():
                del self._known[key]
                self._passing.remove(key)
            elif known.model:
                self._passing.remove(key)
            else:
                alive.append(known)
        return alive

    def _find(self, tensor: torch.Tensor) -> Known:
        key = key_of(tensor)
        return _UNKNOWN if key is None else self._known.get(key, _UNKNOWN)

    def _is_numbers(self, tensor: torch.Tensor) -> bool:
        return self._find(tensor).is_numbers

    def _called(self, tensor: torch.Tensor) -> str:
        return self._find(tensor).called(View.of(tensor))


def key_of(tensor: torch.Tensor) -> int | None:
    """Tells storages apart."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError, ValueError):  # sparse, not yet made, ...
        return None


def _is_held_elsewhere(tensor: torch.Tensor, known: Known) -> bool:
    """Whether memory that torch has shared, and so never resizes, has holders that are no tensors
    of the model."""
    storage = tensor.untyped_storage()
    if storage.resizable():
        return False
    holders = len({id(one) for _, one in known.model}) + 1  # Python's object for the storage

    def is_held() -> bool:
        return int(torch._C._storage_Use_Count(storage._cdata)) > holders

    if not is_held():
        return False
    gc.collect()  # an array that nobody refers to any more
    return is_held()
