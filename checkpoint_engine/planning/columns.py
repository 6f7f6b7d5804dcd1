"""Column copies: matrices of short rows, cut by columns into parts that each lie in one piece.

Of a matrix with short rows a host that needs some columns reads all, as a range for each row would
take longer. An owner may hold such a matrix a second time, as
``view(rows, parts, width).transpose(0, 1)``; then a part is one range. Only ``shard`` reads these
copies. Everything else has the plain bytes, and so do readers that need other columns.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from checkpoint_engine.data_types import (
    ALIGNMENT,
    ColumnCopy,
    ParameterMeta,
    placed,
    tensor_nbytes,
)
from checkpoint_engine.ground.checksum import FORMULA, MASK
from checkpoint_engine.ground.needs import Region, runs_of

WORD = 8
"""Bytes; columns are moved by words, so parts consist of whole ones."""
LARGEST_MATRIX = 128 << 20
"""Bytes. Columns are put in their places out of memory beside the buffers, at most half as much."""
_MOST_PARTS = 255

Spans = tuple[tuple[int, int], ...]
"""Where ranges begin and end, in order; they neither overlap nor touch."""


class Columns(NamedTuple):
    """What is needed of a matrix: the bytes in ``spans`` of each row of ``row`` bytes."""

    row: int
    spans: Spans

    @property
    def nbytes_per_row(self) -> int:
        return sum(end - begin for begin, end in self.spans)

    def parts_of(self, meta: ParameterMeta) -> int:
        """Into how many equal parts an owner cuts this tensor, so that the spans are whole parts; 0
        if it does not."""
        nbytes, width = (
            tensor_nbytes(meta.dtype, meta.shape),
            math.gcd(self.row, *chain(*self.spans)),
        )
        if row_bytes(meta) != self.row or not 0 < nbytes <= LARGEST_MATRIX or width % WORD:
            return 0
        parts = self.row // width
        is_aligned = nbytes // parts % ALIGNMENT == 0
        return parts if 1 < parts <= _MOST_PARTS and is_aligned else 0


def row_bytes(meta: ParameterMeta) -> int:
    """Bytes of a row of a matrix, or of several that lie one behind the other; 0: it is neither."""
    return meta.dtype.itemsize * meta.shape[-1] if len(meta.shape) > 1 else 0


def short_rows(
    regions: Iterable[Region], nbytes: int, read: int, least_saved: int
) -> Columns | None:
    """The columns that these regions of a tensor are, if to read just them saves enough.

    Args:
        read: bytes that are read of it otherwise.
        least_saved: what a range costs, in bytes.
    """
    some = [region for region in regions if region.nbytes]
    repeats = {(region.counts, region.strides) for region in some}
    if len(repeats) != 1 or len(some[0].counts) != 1:
        return None
    (count,), (row,) = some[0].counts, some[0].strides
    if count * row != nbytes or any(region.offset + region.length > row for region in some):
        return None
    begins, ends = runs_of([Region(one.offset, one.length, (), ()) for one in some], row, 0)
    columns = Columns(row, tuple(zip(begins.tolist(), ends.tolist(), strict=True)))
    return columns if read - count * columns.nbytes_per_row > least_saved else None


@dataclass(frozen=True)
class ColumnTensor:
    """A tensor in an owner's column copy.

    Attributes:
        address: in the owner's process, of the first part; the others follow.
        block: the place of its first block among those that were summed.
        sums: of each part; ``None``: they are not known.
    """

    address: int
    rows: int
    row: int
    parts: int
    block: int
    sums: tuple[int, ...] | None

    @property
    def width(self) -> int:
        return self.row // self.parts

    @property
    def part_bytes(self) -> int:
        return self.rows * self.width

    def spans_of(self, columns: Columns) -> Spans | None:
        """The numbers of the parts that these columns are; ``None``: they are not whole parts."""
        if columns.row != self.row or any(edge % self.width for edge in chain(*columns.spans)):
            return None
        return tuple((begin // self.width, end // self.width) for begin, end in columns.spans)


def encode_parts(parts: Sequence[int]) -> str:
    """For ``column_tensors``: of each tensor of a buffer the number of parts; 0: it has no copy."""
    return base64.b64encode(zlib.compress(bytes(parts))).decode()


def column_tensors(
    buffers: Sequence[Sequence[ParameterMeta]], told: ColumnCopy
) -> dict[str, ColumnTensor]:
    """The tensors of an owner's column copy.

    Args:
        buffers: the tensors of each of the owner's.

    Raises:
        ValueError: it is a copy of none of these buffers.
    """
    metas = buffers[told.idx] if told.idx < len(buffers) else ()
    found: dict[str, ColumnTensor] = {}
    offset = number = 0
    try:
        stream = zlib.decompressobj()
        column = stream.decompress(base64.b64decode(told.parts, validate=True), len(metas) + 1)
        sums = _sums(told.checksums)
        for meta, parts in zip(metas, column, strict=True):
            if not parts:
                continue
            nbytes, row = tensor_nbytes(meta.dtype, meta.shape), row_bytes(meta)
            if row % (parts * WORD) or not nbytes or nbytes // parts % ALIGNMENT:
                raise ValueError(f"{meta.name!r} does not have {parts} parts")
            some = None if sums is None else tuple(sums[number : number + parts])
            block = offset // ALIGNMENT
            found[meta.name] = ColumnTensor(
                told.ptr + offset, nbytes // row, row, parts, block, some
            )
            offset, number = offset + nbytes, number + parts
    except (ValueError, ZeroDivisionError, zlib.error) as error:
        raise ValueError(f"not the column copy of a buffer: {error}") from error
    if offset != told.size or (sums is not None and len(sums) != number):
        raise ValueError(f"not the column copy of a buffer: {told.size} bytes, not {offset}")
    return found


def _sums(checksums: str | None) -> list[int] | None:
    formula, _, text = (checksums or "").rpartition(":")
    if formula != FORMULA:
        return None
    sums: list[int] = np.frombuffer(base64.b64decode(text, validate=True), dtype="<u8").tolist()
    return sums


class ColumnRead(NamedTuple):
    """Parts of one tensor to be read into its place in a bucket, one behind the other, and then to
    be put where they belong there.

    Attributes:
        at: where the tensor begins in the bucket.
        spans: the numbers of the parts.
    """

    at: int
    tensor: ColumnTensor
    spans: Spans

    def pieces(self) -> Iterable[tuple[int, int, int, tuple[int, int]]]:
        """Of each span: where in the bucket it is read to, its address at the owner, its bytes, and
        itself."""
        at, each = self.at, self.tensor.part_bytes
        for first, past in self.spans:
            yield at, self.tensor.address + first * each, (past - first) * each, (first, past)
            at += (past - first) * each

    def expected_of(self, span: tuple[int, int]) -> tuple[int, int] | None:
        """The place of its first block, and what the bytes of a span must add up to."""
        if self.tensor.sums is None:
            return None
        first, past = span
        block = self.tensor.block + first * self.tensor.part_bytes // ALIGNMENT
        return block, sum(self.tensor.sums[first:past]) & MASK


def column_reads(
    items: Iterable[ParameterMeta],
    columns: Iterable[Columns | None],
    copies: Mapping[str, ColumnTensor],
) -> dict[int, ColumnRead]:
    """What of a bucket is read out of column copies, by the place of each tensor in it.

    Args:
        columns: what is needed of each tensor; ``None``: other than columns of short rows.
        copies: those of the owner that is read from.
    """
    found = {}
    for index, ((at, meta), some) in enumerate(zip(placed(items), columns, strict=True)):
        tensor = copies.get(meta.name)
        if some is None or tensor is None or row_bytes(meta) != tensor.row:
            continue
        is_same = tensor.rows * tensor.row == tensor_nbytes(meta.dtype, meta.shape)
        if is_same and (spans := tensor.spans_of(some)) is not None:
            found[index] = ColumnRead(at, tensor, spans)
    return found
