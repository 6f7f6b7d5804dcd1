"""The vocabulary that crosses processes: what a rank owns, where it lies, and how it is cut into
buckets.

The names, fields and JSON forms are those of the original library's releases 0.2 and 0.4, so that
metas written by one program are read by another.
"""

from __future__ import annotations

import itertools
import math
import re
import reprlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    NonNegativeInt,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

M = TypeVar("M", bound=BaseModel)

ALIGNMENT = 256
"""Every tensor starts at a multiple of this many bytes, in host buffers and in buckets."""


DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
"""By their names in torch, as ``bfloat16``."""
_LEASE_ID = re.compile("[0-9a-f]{64}")
_MAX_DIMENSIONS = 64
_MAX_LENGTH = 2**63 - 1


def align_up(size: int, alignment: int = ALIGNMENT) -> int:
    """The smallest multiple of ``alignment`` that is at least ``size``."""
    return -(-size // alignment) * alignment


def tensor_nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes that a contiguous tensor of this dtype and shape takes."""
    return dtype.itemsize * math.prod(shape)


def parse_dtype(value: Any) -> torch.dtype:
    """A ``torch.dtype`` from itself or from its name, as ``"torch.bfloat16"`` or ``"bfloat16"``.

    Raises:
        ValueError: this torch has no dtype of that name.
    """
    if isinstance(value, torch.dtype):
        return value
    dtype = DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else None
    if dtype is None:
        raise ValueError(f"torch {torch.__version__} has no dtype {reprlib.repr(value)}")
    return dtype


def is_shape(value: Any) -> bool:
    """Whether torch could have a tensor of this shape: a list or tuple from anywhere."""
    return (
        isinstance(value, (list, tuple))
        and len(value) <= _MAX_DIMENSIONS
        and all(type(n) is int and 0 <= n <= _MAX_LENGTH for n in value)
    )


def _parse_shape(value: Any) -> torch.Size:
    if not is_shape(value):
        raise ValueError(f"a shape is a list of non-negative integers, not {reprlib.repr(value)}")
    return torch.Size(value)


TorchDtype = Annotated[
    torch.dtype,
    PlainValidator(parse_dtype),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string"}, mode="serialization"),
]
TorchSize = Annotated[
    torch.Size,
    PlainValidator(_parse_shape),
    PlainSerializer(tuple, return_type=tuple),
    WithJsonSchema({"type": "array", "items": {"type": "integer"}}, mode="serialization"),
]


_ALL_FIELDS = {"name", "dtype", "shape", "aligned_size"}
_SLOTS = ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")
_SETTERS = tuple(vars(BaseModel)[slot].__set__ for slot in _SLOTS)


def _set_valid_state(self: BaseModel, state: dict[Any, Any]) -> None:
    """Programs store some of these as pickles. Their states come from other releases, which lack
    newer fields, or from anybody."""
    BaseModel.__setstate__(self, type(self).model_validate(state["__dict__"]).__getstate__())


class ParameterMeta(BaseModel):
    """One tensor of a checkpoint. ``aligned_size`` is its size in bytes with padding (0.2 metas
    lack it)."""

    name: str
    dtype: TorchDtype
    shape: TorchSize
    aligned_size: int = -1
    __setstate__ = _set_valid_state

    @model_validator(mode="after")
    def _fill_aligned_size(self) -> ParameterMeta:
        if self.aligned_size < 0:
            self.aligned_size = align_up(tensor_nbytes(self.dtype, self.shape))
        return self


def unvalidated(model: type[M], fields: dict[str, Any], names: set[str]) -> M:
    """What ``model_construct`` makes of all fields, in less time: a plan of a large model has
    thousands of buckets. ``names``: of the fields, one set for all objects."""
    made = object.__new__(model)
    for set_slot, value in zip(_SETTERS, (fields, names, None, None), strict=True):
        set_slot(made, value)
    return made


def make_metas(
    names: Iterable[str],
    kinds: Sequence[tuple[torch.dtype, torch.Size, int]],
    kind_of: Iterable[int],
) -> list[ParameterMeta]:
    """Many ``ParameterMeta`` at once, unvalidated: for the hundreds of thousands of a large model.

    Args:
        kinds: dtype, shape and aligned size.
        kind_of: of each name, the index of its kind.
    """
    every = list(zip(names, kind_of, strict=True))
    metas = list(map(object.__new__, itertools.repeat(ParameterMeta, len(every))))
    attributes = (
        {"name": name, "dtype": dtype, "shape": shape, "aligned_size": aligned_size}
        for name, kind in every
        for dtype, shape, aligned_size in (kinds[kind],)
    )
    values = (attributes, *map(itertools.repeat, (_ALL_FIELDS, None, None)))
    for set_slot, of_all in zip(_SETTERS, values, strict=True):
        deque(map(set_slot, metas, of_all), maxlen=0)  # a loop that runs outside Python
    return metas


def placed(metas: Iterable[ParameterMeta], start: int = 0) -> Iterator[tuple[int, ParameterMeta]]:
    """Where each tensor begins, if they lie one behind the other from ``start`` on, padded."""
    for meta in metas:
        yield start, meta
        start += meta.aligned_size


class BucketRange(NamedTuple):
    """``size`` bytes at ``offset`` of the owner's host buffer number ``idx``."""

    idx: int
    offset: int
    size: int


class H2DBucket(BaseModel):
    """Consecutive tensors of one owner that travel together.

    ``items`` lie one behind the other, each padded to its ``aligned_size``; ``ranges`` say where
    the owner's host memory holds those ``size`` bytes, in the same order.
    """

    size: int
    ranges: list[BucketRange]
    items: list[ParameterMeta]


class TensorPart(H2DBucket):
    """A part of one tensor, which is ``items``' only one: the bytes from ``begin`` on, of
    ``total``."""

    begin: int
    total: int

    @property
    def is_last(self) -> bool:
        return self.begin + self.size == self.total


class BucketPiece(H2DBucket):
    """Consecutive tensors of the bucket ``whole``, from its tensor number ``first`` on, which
    travel without the others."""

    whole: H2DBucket
    first: int


class MemoryBufferMetas(BaseModel):
    """What one host buffer of an owner holds: ``size`` bytes at address ``ptr`` of the owner's
    process.

    ``checksums`` is this library's: of each tensor, see ``memory.checksum``, base64.
    """

    metas: Annotated[list[ParameterMeta], FailFast()]
    ptr: NonNegativeInt
    size: NonNegativeInt
    checksums: str | None = None
    __setstate__ = _set_valid_state


class MemoryBuffer(BaseModel):
    """One host buffer and the tensors in it, consecutive and padded, from offset 0.

    ``checksums``: as ``MemoryBufferMetas`` has them.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    buffer: torch.Tensor
    size: int
    metas: list[ParameterMeta]
    manually_pinned: bool = False
    checksums: str | None = None


class Lease(BaseModel, frozen=True):
    """Proof that an owner still holds a checkpoint: ``id``, hexadecimal, stands at address
    ``ptr``."""

    ptr: int
    id: str
    __setstate__ = _set_valid_state

    @property
    def is_whole(self) -> bool:
        """Whether an owner can have granted it: a part of an id would fit others, too."""
        return _LEASE_ID.fullmatch(self.id) is not None


class MemoryBufferMetaList(BaseModel):
    """Everything one rank owns of a checkpoint, and how to read it by P2P.

    ``lease`` is this library's; metas of the original have none.
    """

    p2p_store_addr: str | None
    memory_buffer_metas_list: Annotated[list[MemoryBufferMetas], FailFast()]
    rdma_device: Annotated[str, BeforeValidator(lambda v: "" if v is None else v)]
    lease: Lease | None = None
    __setstate__ = _set_valid_state


class ColumnCopy(BaseModel):
    """Where an owner holds some tensors of its buffer number ``idx`` a second time, cut by columns;
    see ``planning.columns``. Told within a world, and never part of metas.

    ``parts``: ``encode_parts``. ``checksums``: as ``MemoryBufferMetas`` has them, of each part.
    ``lease``: the id of the one that it is read under.
    """

    idx: NonNegativeInt
    ptr: NonNegativeInt
    size: NonNegativeInt
    parts: str
    checksums: str | None = None
    lease: str


class DataToGather(MemoryBufferMetaList):
    """What one rank tells all others in ``gather_metas``. ``column_copies`` are this library's."""

    host_ip: str
    device_uuid: str
    column_copies: list[ColumnCopy] = []
