"""Pure geometry of strided memory: where the elements of a tensor came from.

A loader narrows, reshapes and transposes what it is given and copies it somewhere. A ``Canvas`` is
such a place: its elements lie on a grid, and each box of the grid has an origin, the elements of a
checkpoint tensor at constant strides. Boxes are disjoint, so what is covered is counted exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class InexpressibleError(Exception):
    """What was done to a tensor is no copy between regions at constant strides."""


class View(NamedTuple):
    """Elements at ``offset + sum(i * stride)``, all in elements of ``dtype``."""

    dtype: torch.dtype
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def of(tensor: torch.Tensor) -> View:
        """The elements of a tensor within its storage."""
        return View(
            tensor.dtype, int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride())
        )

    def expand(self, sizes: Sequence[int]) -> View:
        """As many elements as ``sizes`` has, by the rules of broadcasting."""
        missing = len(sizes) - len(self.sizes)
        if missing < 0:  # copies ignore leading dimensions of one element
            if any(n != 1 for n in self.sizes[:-missing]):
                raise InexpressibleError(f"{self.sizes} into {tuple(sizes)}")
            cut = View(self.dtype, self.offset, self.sizes[-missing:], self.strides[-missing:])
            return cut.expand(sizes)
        mine = (1,) * missing + self.sizes
        if any(m not in (1, n) for m, n in zip(mine, sizes, strict=True)):
            raise InexpressibleError(f"{self.sizes} into {tuple(sizes)}")
        steps = (0,) * missing + self.strides
        strides = tuple(0 if m == 1 else s for m, s in zip(mine, steps, strict=True))
        return View(self.dtype, self.offset, tuple(sizes), strides)


class Constant(NamedTuple):
    """Every element is ``value``; ``dtype`` is what it was last converted to."""

    value: bool | int | float
    dtype: torch.dtype

    def moved(self, steps: Sequence[tuple[int, int]], dims: Sequence[tuple[int, int]]) -> Constant:
        return self

    def cast(self, dtype: torch.dtype) -> Constant:
        if dtype == self.dtype:
            return self
        return Constant.of(Constant.of(self.value, self.dtype).value, dtype)

    @staticmethod
    def of(value: Any, dtype: torch.dtype) -> Constant:
        """``value`` as it is in a tensor of ``dtype`` that was filled with it."""
        try:
            return Constant(torch.empty((), dtype=dtype).fill_(value).item(), dtype)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InexpressibleError(f"{value!r} as {dtype}: {error}") from None


class Origin(NamedTuple):
    """Elements of source number ``source``: ``offset`` and ``strides`` count elements of ``dtype``.

    ``casts`` are the dtypes that the values were converted to on the way, in order.
    """

    source: int
    dtype: torch.dtype
    offset: int
    strides: tuple[int, ...]
    casts: tuple[torch.dtype, ...] = ()

    @property
    def arrives_as(self) -> torch.dtype:
        return self.casts[-1] if self.casts else self.dtype

    def moved(self, steps: Sequence[tuple[int, int]], dims: Sequence[tuple[int, int]]) -> Origin:
        """After ``steps`` of (dimension, count); new dimensions are (old one, factor)."""
        offset = self.offset + sum(self.strides[d] * n for d, n in steps)
        strides = tuple(self.strides[d] * factor if d >= 0 else 0 for d, factor in dims)
        return self._replace(offset=offset, strides=strides)

    def cast(self, dtype: torch.dtype) -> Origin:
        """Converted to another dtype by value."""
        if dtype == self.arrives_as:
            return self
        return self._replace(casts=(*self.casts, dtype))

    def read_as(self, dtype: torch.dtype) -> Origin:
        """The same bits under another dtype of the same size."""
        if dtype == self.arrives_as:
            return self
        if self.casts or dtype.itemsize != self.dtype.itemsize:
            raise InexpressibleError(f"converted to {self.arrives_as}, then read as {dtype}")
        return self._replace(dtype=dtype)


class Box(NamedTuple):
    """Cells ``start`` to ``start + size`` of a grid, per dimension."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def volume(self) -> int:
        return math.prod(self.size)

    def overlap(self, other: Box) -> Box | None:
        start = tuple(map(max, self.start, other.start))
        ends = (
            min(a + m, b + n)
            for a, m, b, n in zip(self.start, self.size, other.start, other.size, strict=True)
        )
        size = tuple(end - begin for begin, end in zip(start, ends, strict=True))
        return Box(start, size) if all(n > 0 for n in size) else None

    def without(self, hole: Box) -> Iterator[Box]:
        """What is left of it; ``hole`` lies within it."""
        start, size = list(self.start), list(self.size)
        for dim, (begin, length) in enumerate(zip(hole.start, hole.size, strict=True)):
            for first, end in ((start[dim], begin), (begin + length, start[dim] + size[dim])):
                if first < end:
                    yield Box(
                        (*start[:dim], first, *start[dim + 1 :]),
                        (*size[:dim], end - first, *size[dim + 1 :]),
                    )
            start[dim], size[dim] = begin, length


class Placement(NamedTuple):
    """A part of a view that is a box of a grid.

    ``steps``: where in the view it begins, as (dimension, count). ``dims``: of each dimension of
    the grid, the dimension of the view that runs along it and by how many of its elements; -1 for
    none.
    """

    box: Box
    steps: tuple[tuple[int, int], ...]
    dims: tuple[tuple[int, int], ...]


class Fragment(NamedTuple):
    """A part of a view whose elements have one origin.

    ``dims``: of each of its dimensions the number of elements, the dimension of the view that it
    runs along, and by how many of the view's elements. The origin's strides are along the same.
    """

    steps: tuple[tuple[int, int], ...]
    dims: tuple[tuple[int, int, int], ...]
    origin: Origin | Constant

    def repeated(self, dims: Sequence[tuple[int, int]]) -> Fragment:
        """The same along further (dimension of the view, elements)."""
        extra = tuple((n, v, 1) for v, n in dims if n > 1)
        own = [(d, 1) for d in range(len(self.dims))]
        origin = self.origin.moved([], [*own, *[(-1, 0)] * len(extra)])
        return Fragment(self.steps, self.dims + extra, origin)

    def within(self, target: View) -> View:
        """The part of ``target``, which has the view's sizes, that this fragment goes to."""
        offset = target.offset + sum(target.strides[v] * n for v, n in self.steps)
        sizes = tuple(n for n, _, _ in self.dims)
        strides = tuple(target.strides[v] * factor for _, v, factor in self.dims)
        return View(target.dtype, offset, sizes, strides)


@dataclass
class Canvas:
    """A tensor's memory, and where what was copied into it came from."""

    dtype: torch.dtype
    offset: int
    sizes: list[int] = field(default_factory=list)
    strides: list[int] = field(default_factory=list)
    _rows: dict[int, list[tuple[Box, Origin | Constant]]] = field(default_factory=dict)
    """By the start along the first dimension; boxes that are longer there are under -1."""

    @staticmethod
    def like(view: View) -> Canvas:
        """An empty one. Raises ``InexpressibleError`` where elements of the view overlap."""
        dims = sorted(
            ((s, n) for n, s in zip(view.sizes, view.strides, strict=True) if n != 1), reverse=True
        )
        within = 1
        for stride, size in reversed(dims):
            if stride < within:
                raise InexpressibleError(f"elements of {view.sizes} at {view.strides} overlap")
            within = stride * size
        return Canvas(view.dtype, view.offset, [n for _, n in dims], [s for s, _ in dims])

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def covered(self) -> int:
        """How many elements have an origin."""
        return sum(box.volume for box, _ in self.pieces())

    def holds(self, offset: int) -> bool:
        """Whether an element's offset, in elements of its dtype, is within its extent."""
        extent = sum((n - 1) * s for n, s in zip(self.sizes, self.strides, strict=True)) + 1
        return 0 <= offset - self.offset < extent

    def pieces(self) -> Iterator[tuple[Box, Origin | Constant]]:
        for row in self._rows.values():
            yield from row

    def region(self, box: Box) -> View:
        """A box as a view of the memory."""
        offset = self.offset + sum(i * s for i, s in zip(box.start, self.strides, strict=True))
        return View(self.dtype, offset, box.size, tuple(self.strides))

    def write(self, view: View, origin: Origin | Constant) -> list[Origin | Constant]:
        """Give ``view`` an origin; its strides are along the view's dimensions.

        Returns the origins that it replaced anywhere. Raises ``InexpressibleError``.
        """
        self._require_itemsize(view.dtype)
        replaced = []
        for placed in self._place(view):
            replaced += self._clear(placed.box)
            self._add(placed.box, origin.moved(placed.steps, placed.dims).cast(view.dtype))
        return replaced

    def read(self, view: View) -> list[Fragment]:
        """The origins of a view. Raises ``InexpressibleError`` if part of it has none."""
        self._require_itemsize(view.dtype)
        still = {v for v, stride in enumerate(view.strides) if stride == 0}
        moving = tuple(1 if v in still else n for v, n in enumerate(view.sizes))
        fragments, found = [], 0
        for placed in self._place(view._replace(sizes=moving)):
            for box, origin in list(self._near(placed.box)):
                common = box.overlap(placed.box)
                if common is not None:
                    found += common.volume
                    fragments.append(self._fragment(placed, common, box, origin, view.dtype))
        if found != math.prod(moving):
            raise InexpressibleError("it was not filled from the checkpoint alone")
        return [one.repeated([(v, view.sizes[v]) for v in still]) for one in fragments]

    def _fragment(
        self,
        placed: Placement,
        common: Box,
        box: Box,
        origin: Origin | Constant,
        dtype: torch.dtype,
    ) -> Fragment:
        inside = [(d, a - b) for d, (a, b) in enumerate(zip(common.start, box.start, strict=True))]
        steps = list(placed.steps)
        kept = [d for d, (v, _) in enumerate(placed.dims) if v >= 0 and common.size[d] > 1]
        for d, (v, factor) in enumerate(placed.dims):
            if v >= 0:
                steps.append((v, (common.start[d] - placed.box.start[d]) * factor))
        origin = origin.moved(inside, [(d, 1) for d in kept])
        if isinstance(origin, Origin):
            origin = origin.read_as(dtype)
        elif origin.dtype != dtype:
            raise InexpressibleError(f"a {origin.dtype} constant read as {dtype}")
        dims = tuple((common.size[d], *placed.dims[d]) for d in kept)
        return Fragment(tuple(steps), dims, origin)

    def _require_itemsize(self, dtype: torch.dtype) -> None:
        if dtype.itemsize != self.dtype.itemsize:
            raise InexpressibleError(f"{self.dtype} memory used as {dtype}")

    def _near(self, box: Box) -> Iterator[tuple[Box, Origin | Constant]]:
        """The pieces that may overlap ``box``."""
        if not box.size or box.size[0] > 1:
            yield from self.pieces()
        else:
            yield from self._rows.get(box.start[0], ())
            yield from self._rows.get(-1, ())

    def _add(self, box: Box, origin: Origin | Constant) -> None:
        row = box.start[0] if box.size and box.size[0] == 1 else -1
        self._rows.setdefault(row, []).append((box, origin))

    def _clear(self, hole: Box) -> list[Origin | Constant]:
        """Take ``hole`` out of all pieces; returns the origins of those it was taken out of."""
        hit = [
            (box, origin, common)
            for box, origin in self._near(hole)
            if (common := box.overlap(hole)) is not None
        ]
        for box, origin, common in hit:
            row = box.start[0] if box.size and box.size[0] == 1 else -1
            self._rows[row].remove((box, origin))
            for rest in box.without(common):
                steps = [
                    (d, r - b) for d, (r, b) in enumerate(zip(rest.start, box.start, strict=True))
                ]
                self._add(rest, origin.moved(steps, [(d, 1) for d in range(len(box.size))]))
        return [origin for _, origin, _ in hit]

    def _place(self, view: View) -> list[Placement]:
        """Cut a view into boxes of the grid, which is made finer where that helps."""
        dims = [
            (n, s, v, 1)
            for v, (n, s) in enumerate(zip(view.sizes, view.strides, strict=True))
            if n != 1
        ]
        if any(n == 0 for n, *_ in dims):
            return []
        for _, stride, *_ in sorted(dims, key=lambda dim: -dim[1]):
            self._refine(stride)
        return list(self._boxes(view.offset - self.offset, dims, {}))

    def _boxes(
        self,
        offset: int,
        dims: list[tuple[int, int, int, int]],
        steps: dict[int, int],
    ) -> Iterator[Placement]:
        """``dims``: elements, stride, dimension of the view, by how many of its elements."""
        start = self._cell(offset)
        size, along = [1] * len(start), [(-1, 0)] * len(start)
        for number, (n, stride, v, factor) in enumerate(dims):
            d = self._dimension(stride)
            if size[d] != 1:
                raise InexpressibleError("two dimensions run along one")
            length = self.sizes[d]
            if start[d] + n <= length:
                size[d], along[d] = n, (v, factor)
                continue
            others = dims[:number] + dims[number + 1 :]
            for begin, parts in _rows_of(n, start[d], length):
                yield from self._boxes(
                    offset + begin * stride,
                    [*others, *((m, stride * by, v, factor * by) for m, by in parts if m > 1)],
                    steps | {v: steps.get(v, 0) + begin * factor},
                )
            return
        yield Placement(Box(start, tuple(size)), tuple(steps.items()), tuple(along))

    def _cell(self, offset: int) -> tuple[int, ...]:
        cell = []
        for size, stride in zip(self.sizes, self.strides, strict=True):
            index, offset = divmod(offset, stride)
            if not 0 <= index < size:
                raise InexpressibleError("it reaches beyond its memory")
            cell.append(index)
        if offset:
            raise InexpressibleError("it begins between elements")
        return tuple(cell)

    def _dimension(self, stride: int) -> int:
        if stride not in self.strides:
            raise InexpressibleError(f"stride {stride} in memory of {self.sizes} at {self.strides}")
        return self.strides.index(stride)

    def _refine(self, stride: int) -> None:
        """Make sure that a dimension of the grid has this stride."""
        if stride in self.strides:
            return
        for d, (size, own) in enumerate(zip(self.sizes, self.strides, strict=True)):
            if own < stride < own * size and stride % own == 0 and size % (stride // own) == 0:
                return self._split(d, stride // own)
        raise InexpressibleError(f"stride {stride} in memory of {self.sizes} at {self.strides}")

    def _split(self, d: int, length: int) -> None:
        """Make rows of ``length`` of dimension ``d``."""
        pieces = list(self.pieces())
        self.sizes[d : d + 1] = [self.sizes[d] // length, length]
        self.strides[d : d + 1] = [self.strides[d] * length, self.strides[d]]
        self._rows = {}
        for box, origin in pieces:
            for begin, parts in _rows_of(box.size[d], box.start[d] % length, length):
                counts = [m for m, by in parts if by == length], [m for m, by in parts if by == 1]
                rows, cells = (one[0] if one else 1 for one in counts)
                first = divmod(box.start[d] + begin, length)
                start = (*box.start[:d], *first, *box.start[d + 1 :])
                cut = Box(start, (*box.size[:d], rows, cells, *box.size[d + 1 :]))
                same = [(e, 1) for e in range(len(box.size))]
                self._add(cut, origin.moved([(d, begin)], [*same[:d], (d, length), *same[d:]]))


def _rows_of(n: int, start: int, length: int) -> Iterator[tuple[int, tuple[tuple[int, int], ...]]]:
    """Cut ``n`` cells that begin ``start`` cells into a row of ``length``: (begin, dimensions), a
    dimension being (count, cells per count)."""
    head = min(n, -start % length)
    rows, tail = divmod(n - head, length)
    if head:
        yield 0, ((head, 1),)
    if rows:
        yield head, ((rows, length), (length, 1))
    if tail:
        yield n - tail, ((tail, 1),)


class Copy(NamedTuple):
    """``sizes`` elements, from ``source`` at ``source_strides`` to ``target`` at
    ``target_strides``."""

    source: int
    target: int
    sizes: tuple[int, ...]
    source_strides: tuple[int, ...]
    target_strides: tuple[int, ...]


def simplified(copy: Copy) -> Copy:
    """The same elements with as few dimensions as can be, the last one running fastest in the
    target."""
    dims = sorted(
        (
            dim
            for dim in zip(copy.target_strides, copy.source_strides, copy.sizes, strict=True)
            if dim[2] != 1
        ),
        reverse=True,
    )
    merged: list[tuple[int, int, int]] = []
    for target, source, size in dims:
        if merged:
            outer_target, outer_source, outer_size = merged[-1]
            if outer_target == target * size and outer_source == source * size:
                merged[-1] = (target, source, outer_size * size)
                continue
        merged.append((target, source, size))
    targets, sources, sizes = zip(*merged, strict=True) if merged else ((), (), ())
    return Copy(copy.source, copy.target, sizes, sources, targets)


def coalesced(copies: Iterable[Copy]) -> list[Copy]:
    """Fewer copies that move the same: what repeats at constant distances becomes one.

    The experts of a layer, for instance, whose tensors lie at equal distances in a bucket and are
    stacked in a parameter.
    """
    current = [simplified(copy) for copy in copies]
    while True:
        merged = list(_merge_once(current))
        if len(merged) == len(current):
            return merged
        current = merged


def _merge_once(copies: list[Copy]) -> Iterator[Copy]:
    alike: dict[tuple[tuple[int, ...], ...], list[Copy]] = {}
    for copy in copies:
        alike.setdefault(copy[2:], []).append(copy)
    for series in alike.values():
        series.sort()
        begin = 0
        while begin < len(series):
            first = series[begin]
            end = begin + 1
            if end < len(series):
                apart = _distance(first, series[end])
                while end < len(series) and _distance(series[end - 1], series[end]) == apart:
                    end += 1
                if min(apart) <= 0:
                    end = begin + 1
            yield _repeated(first, end - begin, apart) if end - begin > 1 else first
            begin = end


def _distance(one: Copy, other: Copy) -> tuple[int, int]:
    return other.source - one.source, other.target - one.target


def _repeated(copy: Copy, times: int, apart: tuple[int, int]) -> Copy:
    return simplified(
        Copy(
            copy.source,
            copy.target,
            (times, *copy.sizes),
            (apart[0], *copy.source_strides),
            (apart[1], *copy.target_strides),
        )
    )
