"""Strided copies between two memories, and the merging of many small copies into a few large ones.

Everything here is arithmetic on numbers; nothing touches a tensor's memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""What bits are moved and summed up as, by size."""


class View(NamedTuple):
    """The elements ``offset + sum(i * stride)`` of a storage, counted in elements of ``dtype``."""

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

    @property
    def span(self) -> tuple[int, int]:
        """The first byte of the storage that it uses, and the byte after the last one."""
        itemsize = self.dtype.itemsize
        begin = self.offset * itemsize
        return begin, begin + extent(self.sizes, self.strides) * itemsize

    def overlaps(self, other: View) -> bool:
        """Whether the spans of two views of one storage have a byte in common."""
        (a, b), (c, d) = self.span, other.span
        return a < d and c < b

    def in_storage(self, storage: torch.Tensor) -> torch.Tensor:
        """The elements as a tensor; ``storage``: see ``whole_storage``."""
        return storage.as_strided(self.sizes, self.strides, self.offset)


def whole_storage(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """All of a tensor's storage as a flat tensor of ``dtype``."""
    return torch.empty(0, dtype=dtype, device=tensor.device).set_(tensor.untyped_storage())


class Copy(NamedTuple):
    """``sizes`` elements from ``source`` at ``source_strides`` to ``target`` at
    ``target_strides``."""

    source: int
    target: int
    sizes: tuple[int, ...]
    source_strides: tuple[int, ...]
    target_strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def simplified(self) -> Copy:
        """The same elements with as few dimensions as possible; the last one has the smallest
        stride in the target."""
        return Copy(self.source, self.target, *_simplest(*self[2:]))

    def repeated(self, times: int, apart: tuple[int, int]) -> Copy:
        """``times`` copies whose sources and targets are ``apart``, as one."""
        if times == 1:
            return self
        return self._replace(
            sizes=(times, *self.sizes),
            source_strides=(apart[0], *self.source_strides),
            target_strides=(apart[1], *self.target_strides),
        ).simplified()

    def in_units(self, times: int) -> Copy | None:
        """The same bytes in elements ``times`` as large; ``None`` if they do not fit."""
        if times == 1:
            return self
        if not self.sizes or self.source_strides[-1] != 1 or self.target_strides[-1] != 1:
            return None
        outer = (*self.source_strides[:-1], *self.target_strides[:-1])
        if any(n % times for n in (self.source, self.target, self.sizes[-1], *outer)):
            return None
        return Copy(
            self.source // times,
            self.target // times,
            (*self.sizes[:-1], self.sizes[-1] // times),
            (*(s // times for s in self.source_strides[:-1]), 1),
            (*(s // times for s in self.target_strides[:-1]), 1),
        )


Dims = tuple[int, ...]


@lru_cache(4096)
def _simplest(sizes: Dims, source_strides: Dims, target_strides: Dims) -> tuple[Dims, Dims, Dims]:
    """As of ``Copy.simplified``. Models repeat a few shapes thousands of times."""
    dims = zip(target_strides, source_strides, sizes, strict=True)
    merged: list[tuple[int, int, int]] = []
    for target, source, size in sorted((dim for dim in dims if dim[2] != 1), reverse=True):
        if merged and merged[-1][:2] == (target * size, source * size):
            size *= merged.pop()[2]
        merged.append((target, source, size))
    targets, sources, sizes = zip(*merged, strict=True) if merged else ((), (), ())
    return sizes, sources, targets


@lru_cache(4096)
def extent(sizes: Dims, strides: Dims) -> int:
    """The elements from the first one to the last one."""
    if 0 in sizes:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))


@lru_cache(4096)
def is_dense(sizes: Dims, strides: Dims) -> bool:
    """Whether elements lie one behind the other, in whatever order of dimensions."""
    within = 1
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size != 1:
            if stride != within:
                return False
            within *= size
    return True


def coalesced(copies: Iterable[Copy]) -> list[Copy]:
    """Fewer copies that move the same: copies at equal distances become one.

    The experts of a layer, for instance, whose tensors lie at equal distances in a bucket and are
    stacked in a parameter. The copies' targets are disjoint.
    """
    current = [copy.simplified() for copy in copies]
    if len(current) == 1:
        return current
    while len(merged := list(_merge_once(current))) < len(current):
        current = merged
    return merged


def _merge_once(copies: list[Copy]) -> Iterator[Copy]:
    alike: dict[tuple[tuple[int, ...], ...], list[Copy]] = {}
    for copy in copies:
        alike.setdefault(copy[2:], []).append(copy)
    for series in alike.values():
        series.sort()
        begin = 0
        while begin < len(series):
            end, apart = _run_from(series, begin)
            yield series[begin].repeated(end - begin, apart)
            begin = end


def _run_from(series: list[Copy], begin: int) -> tuple[int, tuple[int, int]]:
    """Where a run of copies at equal distances ends, and the distance."""
    end = begin + 1
    if end == len(series):
        return end, (0, 0)
    apart = _distance(series[begin], series[end])
    if min(apart) <= 0:  # torch has no negative strides
        return end, (0, 0)
    while end < len(series) and _distance(series[end - 1], series[end]) == apart:
        end += 1
    return end, apart


def _distance(one: Copy, other: Copy) -> tuple[int, int]:
    return other.source - one.source, other.target - one.target
