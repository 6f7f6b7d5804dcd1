"""What the ranks tell each other about a checkpoint, compact on the wire.

A rank's part is a place (addresses, lease) and a layout (names, dtypes, shapes). Places are small
and always sent; layouts only where some rank does not have them from the gather before. Models
repeat a few kinds of tensors thousands of times, so a layout holds each kind once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
import reprlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from checkpoint_engine.data_types import (
    DataToGather,
    MemoryBufferMetaList,
    ParameterMeta,
    is_shape,
    make_metas,
    parse_dtype,
)
from checkpoint_engine.ground.collector import collector_at_rest

_MAX_EXPANSION = 200
"""No tensor without a name of its own: real layouts are 10 to 30 times as large as compressed."""
_MIN_EXPANDED = 1 << 20

Buffers = Sequence[list[ParameterMeta]]
"""The tensors of each host buffer."""
Kind = tuple[torch.dtype, torch.Size, int]
"""Dtype, shape and aligned size."""


@dataclass(frozen=True)
class Layout:
    """The tensors of one rank: by buffer, and all of them as columns. To plan with columns takes a
    fraction of the time that hundreds of thousands of objects take.

    Attributes:
        kinds: those that there are, without any that no tensor has.
        kind_of: of each name, the index of its kind.
    """

    buffers: Buffers
    names: list[str]
    kinds: list[Kind]
    kind_of: np.ndarray

    @staticmethod
    def of(buffers: Buffers) -> Layout:
        metas = list(itertools.chain.from_iterable(buffers))
        kinds: dict[Kind, int] = {}
        kind_of = [
            kinds.setdefault(kind, len(kinds))
            for kind in map(attrgetter("dtype", "shape", "aligned_size"), metas)
        ]
        names = [meta.name for meta in metas]
        return Layout(buffers, names, list(kinds), np.array(kind_of, np.int64))

    @property
    def extent(self) -> tuple[int, int]:
        """Padded bytes of all tensors, and of the largest one; 0 if there is none."""
        sizes = [size for *_, size in self.kinds]
        counts = np.bincount(self.kind_of, minlength=len(sizes)).tolist()
        return sum(map(operator.mul, sizes, counts)), max(sizes, default=0)


def layouts_of(owners: Mapping[int, MemoryBufferMetaList]) -> dict[int, Layout]:
    """The layout of each owner."""
    return {
        rank: Layout.of([buffer.metas for buffer in owned.memory_buffer_metas_list])
        for rank, owned in owners.items()
    }


def encode_layout(layout: Layout) -> bytes:
    """For ``decode_layout``."""
    content = {
        "counts": [len(metas) for metas in layout.buffers],
        "kinds": [(str(dtype), list(shape), size) for dtype, shape, size in layout.kinds],
        "names": layout.names,
        "kind_of": layout.kind_of.tolist(),
    }
    return zlib.compress(json.dumps(content, separators=(",", ":")).encode(), level=1)


def decode_layout(blob: bytes) -> Layout:
    """The inverse of ``encode_layout``.

    Raises:
        ValueError: it is something else, or far larger than its compressed form can be.
    """
    try:
        content = json.loads(_decompress(blob))
        kinds = [_kind(*kind) for kind in content["kinds"]]
        names, kind_of, counts = content["names"], content["kind_of"], content["counts"]
        _check_layout(names, kind_of, counts, len(kinds))
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"not a layout: {error!r:.100}") from error
    metas = make_metas(names, kinds, kind_of)
    ends = itertools.accumulate(counts)
    buffers = [metas[end - count : end] for count, end in zip(counts, ends, strict=True)]
    return Layout(buffers, names, kinds, np.array(kind_of, np.int64))


def _decompress(blob: bytes) -> bytes:
    limit = _MAX_EXPANSION * len(blob) + _MIN_EXPANDED
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(blob, limit)
    except zlib.error as error:
        raise ValueError(f"not a layout: {error}") from error
    if not stream.eof or stream.unused_data:
        raise ValueError(f"not a layout: {len(blob)} bytes that are cut off, or hold too much")
    return content


def _kind(dtype: Any, shape: Any, size: Any) -> Kind:
    # The size may be that of a tensor that no memory can hold, as tests have them.
    if not is_shape(shape) or type(size) is not int or not 0 <= size < 1 << 96:
        raise ValueError(f"not a kind of tensor: {reprlib.repr((dtype, shape, size))}")
    return parse_dtype(dtype), torch.Size(shape), size


def _check_layout(names: Any, kind_of: Any, counts: Any, kinds: int) -> None:
    """All types at once, and not one by one: a large model has hundreds of thousands."""
    if not set(map(type, names)) <= {str} or not set(map(type, [*kind_of, *counts])) <= {int}:
        raise ValueError("not a layout: names are strings, kinds and counts integers")
    if len(names) != len(kind_of) or sum(counts) != len(names) or min(counts, default=0) < 0:
        raise ValueError(f"not a layout: {len(names)} names, {len(kind_of)} of a kind")
    if set(kind_of) != set(range(kinds)):
        raise ValueError(f"not a layout: of the {kinds} kinds one is missing, or no tensor has it")


def encode_place(data: DataToGather) -> str:
    """A rank's part without its layout, for ``decode_place``."""
    return _with_tensors(data, [[] for _ in data.memory_buffer_metas_list]).model_dump_json()


def decode_place(place: str, buffers: Buffers) -> DataToGather:
    """A rank's whole part.

    Raises:
        ValueError: ``encode_place`` did not make it, or it does not belong to this layout.
    """
    try:
        data = DataToGather.model_validate_json(place, strict=True)
    except ValidationError as error:
        raise ValueError(f"not a rank's part of a checkpoint: {error}") from error
    return _with_tensors(data, buffers)


def _with_tensors(data: DataToGather, buffers: Buffers) -> DataToGather:
    both = zip(data.memory_buffer_metas_list, buffers, strict=True)
    listed = [buffer.model_copy(update={"metas": metas}) for buffer, metas in both]
    return data.model_copy(update={"memory_buffer_metas_list": listed})


def layout_digest(blob: bytes) -> str:
    """Names an encoded layout."""
    return hashlib.sha256(blob).hexdigest()


def known_digest(layouts: Mapping[str, Layout]) -> str:
    """Equal on ranks that know the same layouts."""
    return hashlib.sha256("".join(sorted(layouts)).encode()).hexdigest()


def missing_layouts(
    digests: Sequence[str], known_to: Sequence[str], known: Mapping[str, Layout]
) -> list[int]:
    """The ranks whose layout has to be sent; the same on every rank.

    Args:
        digests: of each rank's layout.
        known_to: each rank's ``known_digest``.
        known: the layouts that this rank has from its last gather, by digest.
    """
    if set(known_to) != {known_digest(known)}:
        return list(range(len(digests)))
    return [rank for rank, digest in enumerate(digests) if digest not in known]


def decode_layouts(
    digests: Sequence[str], known: Mapping[str, Layout], received: Mapping[int, bytes]
) -> dict[str, Layout]:
    """The layouts of all ranks by digest: ``known`` ones, and those that were ``received``."""
    with collector_at_rest():
        fresh = {digests[rank]: decode_layout(blob) for rank, blob in received.items()}
    both = {**known, **fresh}
    return {digest: both[digest] for digest in digests}
