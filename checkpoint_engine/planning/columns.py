"""Column copies: matrices of short rows, cut by columns into parts that each lie in one piece.

A host that needs some columns of a matrix with short rows reads all of it, as a range for each row
would take longer. An owner may hold such a matrix a second time, as
``view(rows, parts, width).transpose(0, 1)``: there, neighbouring columns are one range. Only
``shard`` reads these copies. Everything else has the plain bytes, and so has a host that needs
other columns than whole parts.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from checkpoint_engine.data_types import ALIGNMENT, ColumnCopy, ParameterMeta, tensor_nbytes
from checkpoint_engine.ground.checksum import FORMULA, MASK
from checkpoint_engine.ground.needs import Region, runs_of

WORD = 8
"""Bytes; columns are moved by words, so parts consist of whole ones."""
LARGEST_MATRIX = 128 << 20
"""Bytes. Columns are put in their places out of memory beside the buffers, about half as much."""
_MOST_PARTS = 255


class Columns(NamedTuple):
    """What is needed of a matrix: of each row, which takes ``row`` bytes, those from ``begin`` to
    ``end``."""

    row: int
    begin: int
    end: int

    def parts_of(self, meta: ParameterMeta) -> int:
        """Into how many equal parts an owner cuts this tensor, so that the columns are whole parts;
        0: it does not."""
        nbytes, width = tensor_nbytes(meta.dtype, meta.shape), math.gcd(*self)
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
    """The columns that these regions of a tensor are together, if to read just them saves enough.

    Args:
        read: bytes that are read of the tensor otherwise.
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
    if len(begins) > 1 or read - count * int(ends[0] - begins[0]) <= least_saved:
        return None
    return Columns(row, int(begins[0]), int(ends[0]))


class ColumnRead(NamedTuple):
    """Neighbouring parts of a tensor, to be read to where it begins in a bucket, and then to be put
    where they belong there.

    Attributes:
        at: where the tensor begins in the bucket.
        address: in the owner's process.
        shape: of the whole tensor: rows, parts, and the bytes of a row of a part.
        first: the number of the first part.
        expected: the place of the first block, and what the bytes must add up to, if that is known.
    """

    at: int
    address: int
    nbytes: int
    shape: tuple[int, int, int]
    first: int
    expected: tuple[int, int] | None


class ColumnTensor(NamedTuple):
    """A tensor in an owner's column copy.

    Attributes:
        address: in the owner's process, of the first part; the others follow.
        block: the place of its first block among those that were summed.
        sums: of each part; ``None``: they are not known.
    """

    meta: ParameterMeta
    parts: int
    address: int
    block: int
    sums: list[int] | None

    def read(self, at: int, columns: Columns) -> ColumnRead | None:
        """How to read these columns of it; ``None``: they are not whole parts.

        ``at``: where the tensor begins in a bucket.
        """
        nbytes, row = tensor_nbytes(self.meta.dtype, self.meta.shape), row_bytes(self.meta)
        width, each = row // self.parts, nbytes // self.parts
        if columns.row != row or columns.begin % width or columns.end % width:
            return None
        first, past = columns.begin // width, columns.end // width
        expected = None
        if self.sums is not None:
            block = self.block + first * each // ALIGNMENT
            expected = block, sum(self.sums[first:past]) & MASK
        shape, address = (nbytes // row, self.parts, width), self.address + first * each
        return ColumnRead(at, address, (past - first) * each, shape, first, expected)


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
            nbytes = tensor_nbytes(meta.dtype, meta.shape)
            if not nbytes or row_bytes(meta) % (parts * WORD) or nbytes // parts % ALIGNMENT:
                raise ValueError(f"{meta.name!r} does not have {parts} parts")
            some = None if sums is None else sums[number : number + parts]
            address, block = told.ptr + offset, offset // ALIGNMENT
            found[meta.name] = ColumnTensor(meta, parts, address, block, some)
            offset, number = offset + nbytes, number + parts
    except (ValueError, zlib.error) as error:
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
