"""What a worker reads of a checkpoint: byte ranges of its tensors, compact enough to be told.

A model repeats a few kinds of tensors thousands of times, so a statement holds the regions of each
kind once. The tensors themselves are named by a digest: needs hold for exactly one set of names,
dtypes and shapes, and say nothing about another.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

_LARGEST = 64 << 20  # bytes of a statement once it is expanded
_MOST_DIMENSIONS = 64
_AT_ONCE = 4096  # names that are summed up at once: few enough to stay in the processor's cache


class Region(NamedTuple):
    """Bytes of a tensor: ``length`` at ``offset``, repeated ``counts[i]`` times at ``strides[i]``
    bytes."""

    offset: int
    length: int
    counts: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def end(self) -> int:
        """The byte after the last one."""
        steps = zip(self.counts, self.strides, strict=True)
        return self.offset + self.length + sum((n - 1) * stride for n, stride in steps)

    @property
    def nbytes(self) -> int:
        return self.length * math.prod(self.counts)


Tensor = tuple[str, Any, tuple[int, ...]]
"""Name, dtype and shape."""

HASH_BYTES = 16
"""Of the hash of a tensor's content; see ``memory.content``."""
UNKNOWN_HASH = bytes(HASH_BYTES)


def tensors_digest(tensors: Sequence[Tensor]) -> str:
    """Names a set of tensors, which are given in the order of their names."""
    kinds: dict[tuple[Any, tuple[int, ...]], int] = {}
    kind_of = [kinds.setdefault((dtype, shape), len(kinds)) for _, dtype, shape in tensors]
    return digest_of_kinds([name for name, _, _ in tensors], list(kinds), np.array(kind_of))


def digest_of_kinds(
    names: Sequence[str], kinds: Sequence[tuple[Any, tuple[int, ...]]], kind_of: np.ndarray
) -> str:
    """``tensors_digest`` of tensors whose kinds are known.

    Args:
        kinds: the dtypes and shapes that there are, in the order in which they are met.
        kind_of: of each tensor, which of them it has.
    """
    listed = [(str(dtype), list(shape)) for dtype, shape in kinds]
    digest = hashlib.sha256(json.dumps([len(names), listed]).encode())
    digest.update(np.fromiter(map(len, names), "<i4", len(names)).tobytes())  # where each name ends
    digest.update(kind_of.astype("<i4").tobytes())
    for begin in range(0, len(names), _AT_ONCE):
        digest.update("".join(names[begin : begin + _AT_ONCE]).encode(errors="surrogatepass"))
    return digest.hexdigest()


def digest_of(text: str) -> str:
    """Names what ``Needs.text`` states; empty text, for everything, has an empty digest."""
    return hashlib.sha256(text.encode()).hexdigest() if text else ""


@dataclass(frozen=True)
class Needs:
    """What one worker reads.

    Attributes:
        tensors: ``tensors_digest`` of everything that the worker was given.
        kinds: the regions of each kind of tensor.
        kind_of: of each tensor, in the order of names, its kind: integers of 4 bytes.
    """

    tensors: str
    kinds: tuple[tuple[Region, ...], ...]
    kind_of: bytes

    @staticmethod
    def of(read: Mapping[Tensor, Iterable[Region]]) -> Needs | None:
        """``read``: the regions of every tensor that the worker was given. ``None`` if two have the
        same name, or it is too much to be told."""
        ordered = sorted(read, key=lambda tensor: tensor[0])
        if len({name for name, _, _ in ordered}) < len(ordered):
            return None
        kinds: dict[tuple[Region, ...], int] = {}
        kind_of = [kinds.setdefault(tuple(sorted(read[one])), len(kinds)) for one in ordered]
        numbers = np.array(kind_of, dtype="<i4").tobytes()
        needs = Needs(tensors_digest(ordered), tuple(kinds), numbers)
        return needs if len(needs._content) <= _LARGEST else None

    @property
    def _content(self) -> bytes:
        return json.dumps([self.tensors, self.kinds]).encode() + b"\n" + self.kind_of

    @cached_property
    def text(self) -> str:
        """For ``decode``."""
        return base64.b64encode(zlib.compress(self._content, 6)).decode()

    @cached_property
    def digest(self) -> str:
        return digest_of(self.text)

    @cached_property
    def numbers(self) -> np.ndarray:
        """The kind of each tensor, in the order of names."""
        return np.frombuffer(self.kind_of, dtype="<i4")

    @staticmethod
    def decode(text: str) -> Needs:
        """The inverse of ``text``.

        Raises:
            ValueError: it is something else.
        """
        stream = zlib.decompressobj()
        try:
            blob = base64.b64decode(text, validate=True)
            head, _, numbers = stream.decompress(blob, _LARGEST).partition(b"\n")
            tensors, kinds = json.loads(head)
            found = Needs(tensors, tuple(tuple(map(_region, kind)) for kind in kinds), numbers)
        except (zlib.error, TypeError, RecursionError, ValueError) as error:
            raise ValueError(f"not what a worker needs: {error!r:.200}") from error
        if not stream.eof or type(tensors) is not str or len(numbers) % 4:
            raise ValueError(f"not what a worker needs: {len(text)} characters")
        if len(found.numbers) and not 0 <= found.numbers.min() <= found.numbers.max() < len(kinds):
            raise ValueError("not what a worker needs: a kind of tensor is missing")
        return found


def _region(told: Any) -> Region:
    offset, length, counts, strides = told
    numbers = [offset, length, *counts, *strides]
    if {type(number) for number in numbers} != {int} or not min(numbers) >= 0:
        raise ValueError(f"{told!r:.100} is no region")
    if len(counts) != len(strides) or len(counts) > _MOST_DIMENSIONS or max(numbers) >= 1 << 62:
        raise ValueError(f"{told!r:.100} is no region")
    return Region(offset, length, tuple(counts), tuple(strides))


Runs = tuple[np.ndarray, np.ndarray]
"""Where byte ranges begin and end, in order; they neither overlap nor touch."""


def runs_of(regions: Iterable[Region], nbytes: int, gap: int) -> Runs:
    """The bytes in any of ``regions`` of a tensor of so many bytes.

    Args:
        gap: runs that are no more bytes apart are joined.

    Raises:
        ValueError: a region reaches beyond the tensor, or counts bytes more than once.
    """
    begins, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for region in regions:
        if not region.length or 0 in region.counts:
            continue
        length, apart = _without_gaps(region, gap)
        few = math.prod(count for _, count in apart) <= nbytes // max(1, gap) + 1
        if region.end > nbytes or math.prod(region.counts) > nbytes or not few:
            raise ValueError(f"{region} reaches beyond a tensor of {nbytes} bytes")
        starts = np.array([region.offset], dtype=np.int64)
        for stride, count in reversed(apart):
            starts = (starts[:, None] + np.arange(count, dtype=np.int64) * stride).ravel()
        begins.append(starts)
        ends.append(starts + length)
    return _joined(np.concatenate(begins), np.concatenate(ends), gap)


def _without_gaps(region: Region, gap: int) -> tuple[int, list[tuple[int, int]]]:
    """The bytes of each run once those that are no more than ``gap`` apart are one, and the strides
    and counts of the runs: every second element of a large tensor is one run, not millions."""
    length, apart = region.length, sorted(zip(region.strides, region.counts, strict=True))
    while apart and apart[0][0] <= length + gap:
        stride, count = apart.pop(0)
        length += (count - 1) * stride
    return length, apart


def _joined(begins: np.ndarray, ends: np.ndarray, gap: int) -> Runs:
    if not len(begins):
        return begins, ends
    order = np.argsort(begins, kind="stable")
    begins, reached = begins[order], np.maximum.accumulate(ends[order])
    first = np.ones(len(begins), dtype=bool)
    first[1:] = begins[1:] > reached[:-1] + gap
    last = np.append(np.flatnonzero(first)[1:] - 1, len(begins) - 1)
    return begins[first], reached[last]
