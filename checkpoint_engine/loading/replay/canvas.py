"""Where the elements of a tensor came from.

A loader narrows, reshapes and transposes what it is given and copies it somewhere. A ``Canvas`` is
such a place: its elements lie on a grid, and each box of the grid has an origin. Boxes do not
overlap, so what is covered is counted exactly.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from checkpoint_engine.data_types import tensor_nbytes
from checkpoint_engine.loading.replay.geometry import Copy, View, is_dense

Cells = tuple[int, ...]


class Source(NamedTuple):
    """A tensor of the checkpoint."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.dtype, self.shape)


class Origin(NamedTuple):
    """Where elements are from: ``source``, read as ``dtype``; or, without a source, the number
    ``value`` as it is in a tensor of ``dtype``. ``casts``: what they are converted to, in order."""

    source: Source | None
    dtype: torch.dtype
    casts: tuple[torch.dtype, ...] = ()
    value: Any = None

    @property
    def arrives_as(self) -> torch.dtype:
        return self.casts[-1] if self.casts else self.dtype

    def cast(self, dtype: torch.dtype) -> Origin:
        """Converted to another dtype by value."""
        return self if dtype == self.arrives_as else self._replace(casts=(*self.casts, dtype))

    def read_as(self, dtype: torch.dtype) -> Origin:
        """The same bits under another dtype of the same size."""
        if dtype == self.arrives_as:
            return self
        if self.casts or self.source is None:
            raise ValueError(f"converted to {self.arrives_as}, then read as {dtype}")
        return self._replace(dtype=dtype)

    def number(self) -> Any:
        """What every element is, if there is no source."""
        tensor = torch.empty((), dtype=self.dtype).fill_(self.value)
        for dtype in self.casts:
            tensor = tensor.to(dtype)
        return tensor.item()


class Piece(NamedTuple):
    """A box of a grid, the cells ``start`` to ``start + size``, and what belongs to its cells in
    another memory: the elements ``offset + sum(i * stride)``."""

    start: Cells
    size: Cells
    offset: int
    strides: Cells
    origin: Origin

    @property
    def volume(self) -> int:
        return math.prod(self.size)

    @property
    def row(self) -> int:
        """What pieces are found by: the place along the first dimension, -1 if there are many."""
        return self.start[0] if self.size and self.size[0] == 1 else -1

    def part(self, start: Cells, size: Cells) -> Piece:
        steps = zip(self.start, start, self.strides, strict=True)
        offset = self.offset + sum((b - a) * stride for a, b, stride in steps)
        return self._replace(start=start, size=size, offset=offset)

    def within(self, other: Piece) -> Piece | None:
        """The part of it that lies in another one's box."""
        start = tuple(map(max, self.start, other.start))
        both = zip(self.start, self.size, other.start, other.size, strict=True)
        ends = (min(a + m, b + n) for a, m, b, n in both)
        size = tuple(end - begin for begin, end in zip(start, ends, strict=True))
        return self.part(start, size) if all(n > 0 for n in size) else None

    def without(self, hole: Piece) -> Iterator[Piece]:
        """What is left of it; ``hole`` is a part of it."""
        start, size = self.start, self.size
        for d, (begin, length) in enumerate(zip(hole.start, hole.size, strict=True)):
            for first, end in ((start[d], begin), (begin + length, start[d] + size[d])):
                if first < end:
                    yield self.part(_put(start, d, first), _put(size, d, end - first))
            start, size = _put(start, d, begin), _put(size, d, length)

    def split(self, d: int, length: int) -> Iterator[Piece]:
        """The same cells in a grid whose dimension ``d`` became rows of ``length``."""
        for begin, rows, cells in _rows(self.start[d], self.size[d], length):
            first = divmod(self.start[d] + begin, length)
            yield self._replace(
                start=_put(self.start, d, *first),
                size=_put(self.size, d, rows, cells),
                offset=self.offset + begin * self.strides[d],
                strides=_put(self.strides, d, self.strides[d] * length, self.strides[d]),
            )


class Canvas:
    """A tensor's memory, and where what was copied into it came from.

    Writes are noted, and looked at together. Nearly all tensors of a model are filled by runs of
    elements that do not overlap; these are told by sorting them. The grid is for all others, and
    for those that are read.

    Attributes:
        overwritten: the sources of what another source, or a number, replaced; complete as soon as
            anything else was asked.
    """

    def __init__(self, view: View) -> None:
        """Raises ``ValueError`` where elements of the view overlap."""
        self.view = view
        self._sizes, self._strides = _dimensions(view.sizes, view.strides)
        self._rows: dict[int, list[Piece]] = defaultdict(list)
        self._written: list[tuple[Copy, Origin]] = []
        self._contents: list[tuple[Origin, Copy]] | None = None
        self._is_gridded = False
        self.overwritten: set[Source] = set()

    @property
    def numel(self) -> int:
        return math.prod(self._sizes)

    @property
    def is_written(self) -> bool:
        """Whether any element has an origin."""
        return self._is_gridded or bool(self._written)

    @property
    def covered(self) -> int:
        """How many elements have an origin."""
        return sum(copy.numel for _, copy in self.contents())

    @property
    def sources(self) -> set[Source]:
        """Whatever was copied into it, though other things may have been written over it."""
        origins = [origin for _, origin in self._written] + [p.origin for p in self._pieces()]
        return {origin.source for origin in origins if origin.source is not None}

    def contents(self) -> list[tuple[Origin, Copy]]:
        """What its elements were copied from, simplified; the source of a constant's copy means
        nothing. Raises ``ValueError`` if what was written is no copy between regions at constant
        strides."""
        if self._contents is None:
            if self._is_gridded or not self._are_runs():
                self._fill_grid()
            self._contents = [(origin, copy.simplified()) for copy, origin in self._written]
            self._contents += map(self._copied, self._pieces())
        return self._contents

    def _copied(self, piece: Piece) -> tuple[Origin, Copy]:
        cells = zip(piece.start, self._strides, strict=True)
        target = self.view.offset + sum(i * stride for i, stride in cells)
        copy = Copy(piece.offset, target, piece.size, piece.strides, self._strides)
        return piece.origin, copy.simplified()

    def write(self, copy: Copy, origin: Origin, dtype: torch.dtype) -> None:
        """A copy from ``origin`` went to places of this memory, as elements of ``dtype``."""
        self._written.append((copy, origin.cast(dtype)))
        self._contents = None

    def _are_runs(self) -> bool:
        """Whether all that was written are runs of elements that do not overlap."""
        end, last = self.view.offset, self.view.offset + self.numel
        itemsize = self.view.dtype.itemsize
        if not is_dense(self.view.sizes, self.view.strides):
            return False
        for copy, origin in sorted(self._written, key=_target):
            if copy.target < end or origin.arrives_as.itemsize != itemsize:
                return False
            if not is_dense(copy.sizes, copy.target_strides):
                return False
            end = copy.target + copy.numel
        return end <= last

    def _fill_grid(self) -> None:
        written, self._written = self._written, []
        for copy, origin in written:
            self._write_on_grid(copy, origin)

    def _write_on_grid(self, copy: Copy, origin: Origin) -> None:
        self._is_gridded = True
        there = zip(copy.sizes, copy.target_strides, copy.source_strides, strict=True)
        for new in self._place(copy.target, list(there), copy.source, origin):
            for old in self._near(new):
                if (common := old.within(new)) is not None:
                    self._rows[old.row].remove(old)
                    self._add(old.without(common))
                    if old.origin.source is not None and old.origin.source != origin.source:
                        self.overwritten.add(old.origin.source)
            self._add([new])

    def read(self, copy: Copy, dtype: torch.dtype) -> list[tuple[Origin, Copy]]:
        """The origins of a copy whose source is in this memory, as elements of ``dtype``: the same
        as copies from there. Raises ``ValueError`` if part of it has no origin."""
        self._fill_grid()
        dims = zip(copy.sizes, copy.source_strides, copy.target_strides, strict=True)
        copies, found = [], 0
        for asked in self._place(copy.source, list(dims), copy.target, Origin(None, dtype)):
            for piece in self._near(asked):
                if (common := piece.within(asked)) is not None:
                    found += common.volume
                    target = asked.part(common.start, common.size).offset
                    places = common.offset, target, common.size, common.strides, asked.strides
                    copies.append((piece.origin.read_as(dtype), Copy(*places)))
        if found != copy.numel:
            raise ValueError("it was not filled from the checkpoint alone")
        return copies

    def _pieces(self) -> Iterator[Piece]:
        for row in self._rows.values():
            yield from row

    def _near(self, piece: Piece) -> list[Piece]:
        """The pieces that may overlap another one."""
        # Stacked experts are hundreds of pieces of one row each: look at those of the row alone.
        if piece.row < 0:
            return list(self._pieces())
        return [*self._rows[piece.row], *self._rows[-1]]

    def _add(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            self._rows[piece.row].append(piece)

    def _place(
        self, offset: int, dims: list[tuple[int, int, int]], other: int, origin: Origin
    ) -> list[Piece]:
        """Cut a view of this memory into boxes of the grid, which is made finer where that helps.

        Args:
            offset: of the view's first element in this memory; ``other``: in the other one.
            dims: of each of the view's dimensions the elements, the stride, and the other stride.
        """
        if origin.arrives_as.itemsize != self.view.dtype.itemsize:
            raise ValueError(f"{self.view.dtype} memory used as {origin.arrives_as}")
        dims = [dim for dim in dims if dim[0] != 1]
        if any(n == 0 for n, _, _ in dims):
            return []
        for stride in sorted((stride for _, stride, _ in dims), reverse=True):
            self._refine(stride)
        return list(self._boxes(offset, dims, other, origin))

    def _boxes(
        self, offset: int, dims: list[tuple[int, int, int]], other: int, origin: Origin
    ) -> Iterator[Piece]:
        if missing := [stride for _, stride, _ in dims if stride not in self._strides]:
            raise ValueError(f"stride {missing[0]} in memory at {self._strides}")
        start = self._cell(offset)
        size, strides = [1] * len(start), [0] * len(start)
        for number, (n, stride, by) in enumerate(dims):
            d = self._strides.index(stride)
            if size[d] != 1:
                raise ValueError("two dimensions run along one")
            length = self._sizes[d]
            if start[d] + n <= length:
                size[d], strides[d] = n, by
                continue
            rest = dims[:number] + dims[number + 1 :]
            for begin, rows, cells in _rows(start[d], n, length):
                cut = [(rows, stride * length, by * length), (cells, stride, by)]
                yield from self._boxes(
                    offset + begin * stride,
                    rest + [dim for dim in cut if dim[0] != 1],
                    other + begin * by,
                    origin,
                )
            return
        yield Piece(start, tuple(size), other, tuple(strides), origin)

    def _cell(self, offset: int) -> Cells:
        cell, rest = [], offset - self.view.offset
        for size, stride in zip(self._sizes, self._strides, strict=True):
            index, rest = divmod(rest, stride)
            if not 0 <= index < size:
                raise ValueError("it reaches beyond its memory")
            cell.append(index)
        if rest:
            raise ValueError("it begins between elements")
        return tuple(cell)

    def _refine(self, stride: int) -> None:
        """Make sure that a dimension of the grid has this stride, if one can."""
        if stride in self._strides:
            return
        for d, (size, own) in enumerate(zip(self._sizes, self._strides, strict=True)):
            length, odd = divmod(stride, own)
            if 1 < length < size and odd == 0 and size % length == 0:
                pieces = list(self._pieces())
                self._sizes = _put(self._sizes, d, size // length, length)
                self._strides = _put(self._strides, d, own * length, own)
                self._rows.clear()
                for piece in pieces:
                    self._add(piece.split(d, length))
                return


@lru_cache(4096)
def _dimensions(sizes: Cells, strides: Cells) -> tuple[Cells, Cells]:
    """Of a grid, the sizes and strides, the largest stride first; as of ``Canvas``."""
    dims = sorted(((s, n) for n, s in zip(sizes, strides, strict=True) if n != 1), reverse=True)
    within = 1
    for stride, size in reversed(dims):
        if stride < within:
            raise ValueError(f"elements of {sizes} at {strides} overlap")
        within = stride * size
    return tuple(n for _, n in dims), tuple(s for s, _ in dims)


def _target(written: tuple[Copy, Origin]) -> int:
    return written[0].target


def _put(cells: Cells, d: int, *values: int) -> Cells:
    """The same with ``values`` in the place of ``d``."""
    return (*cells[:d], *values, *cells[d + 1 :])


def _rows(start: int, n: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Cut ``n`` cells from ``start`` on at multiples of ``length``: (begin, rows, their cells)."""
    head = min(n, -start % length)
    rows, tail = divmod(n - head, length)
    for one in ((0, 1, head), (head, rows, length), (n - tail, 1, tail)):
        if one[1] and one[2]:
            yield one
