"""The tensors of ``.npy`` files with their ``.meta``. One tensor may be spread over several files.

A ``.meta`` is a pickle: the name, dtype and shape of each array of its file, and the dimension
along which the shards of tensor-parallel ranks are concatenated.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from loguru import logger

from checkpoint_engine.data_types import is_shape, tensor_nbytes
from checkpoint_engine.handover.plain_pickle import PLAIN_WORDS, PlainPickleError, read_pickle
from checkpoint_engine.memory.folder import Folders, inode_of, open_file, read_whole, short
from checkpoint_engine.memory.sources import FileParts, FileSlice, TensorSource

_MAX_HEADER = 10_000
"""Bytes; numpy's own limit."""
_MAX_META = 1 << 30
"""Bytes of a ``.meta`` file: room for millions of arrays."""
_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_META_KEYS = {"key", "dtype", "shape", "type", "tp_concat_dim"}
_META_WORDS = {
    **PLAIN_WORDS,  # tensor and array types are names without powers
    **{word: ".".join(word) for word in (("torch", "Tensor"), ("numpy", "ndarray"))},
}
_REPLICATED = -1
"""The ``tp_concat_dim`` of a tensor that every tensor-parallel rank holds whole."""


class _Shard(NamedTuple):
    """What one ``.npy`` file holds of one tensor."""

    part: FileSlice
    dtype: torch.dtype
    shape: torch.Size
    concat_dim: int


def npy_sources(paths: list[str], allowed: Folders) -> Iterator[TensorSource]:
    """The tensors of those files, each put together from its shards."""
    paths = [path for path in paths if path.endswith(".npy")]
    if not paths:
        return
    logger.warning(
        "{} .npy checkpoint files: the format is deprecated, save as safetensors", len(paths)
    )
    shards: dict[str, dict[int, _Shard]] = defaultdict(dict)
    tp_sizes: dict[str, int] = defaultdict(int)
    for path in paths:
        rank, family = _tp_rank(path)
        tp_sizes[family] = max(tp_sizes[family], rank + 1)
        for name, shard in _open(path, allowed):
            if rank in shards[name]:
                raise ValueError(
                    f"{path}: tensor {name!r} of tensor-parallel rank {rank} is in "
                    f"{shards[name][rank].part.path} already"
                )
            shards[name][rank] = shard
    for name, by_rank in shards.items():
        tp_size = max(tp_sizes[_tp_rank(shard.part.path)[1]] for shard in by_rank.values())
        yield _merge(name, dict(sorted(by_rank.items())), tp_size)


def _tp_rank(path: str) -> tuple[int, str]:
    """The tensor-parallel rank in a file's name, and the path without it: what ranks share."""
    folder, base = os.path.split(path)
    pieces = base.split(".")
    if len(pieces) <= 3:
        return 0, path
    if not re.fullmatch(r"[0-9]{1,6}", pieces[2]):
        raise ValueError(
            f"{path}: the third dot-separated part of the file's name must be the "
            f"tensor-parallel rank, not {pieces[2]!r}"
        )
    return int(pieces[2]), os.path.join(folder, ".".join(pieces[:2] + pieces[3:]))


def _open(path: str, allowed: Folders) -> Iterator[tuple[str, _Shard]]:
    metas = _read_meta(f"{path}.meta", allowed)
    with open_file(path, allowed) as file:
        file_size = os.fstat(file.fileno()).st_size
        for name, dtype, shape, dim in metas:
            part = _next_array(file, path, name, tensor_nbytes(dtype, shape), file_size)
            yield name, _Shard(part, dtype, shape, dim)
        if file.tell() != file_size:
            raise ValueError(
                f"{path}: {file_size - file.tell()} bytes behind the {len(metas)} arrays that "
                f"its .meta lists"
            )


def _next_array(file: IO[bytes], path: str, name: str, nbytes: int, file_size: int) -> FileSlice:
    """Reads one array's header and skips its data. Its own dtype may be a stand-in: bytes count."""
    where = f"{path}: tensor {name!r}"
    start = file.tell()
    try:
        header = io.BytesIO(file.read(_MAX_HEADER))  # numpy allocates what the length in it says
        version = np.lib.format.read_magic(header)
        shape, fortran, dtype = _HEADER_READERS[version](header)
    except Exception as error:  # numpy parses a header as Python: it can raise anything
        raise ValueError(f"{where} has no readable array: {error!r}") from error
    if fortran or dtype.hasobject or not dtype.isnative:
        raise ValueError(
            f"{where} is stored as {dtype} in {'Fortran' if fortran else 'C'} order, but only "
            f"native numbers in C order can be read: save np.ascontiguousarray()"
        )
    stored = math.prod(shape) * dtype.itemsize
    if stored != nbytes:
        raise ValueError(f"{where} takes {nbytes} bytes, its array has {stored}")
    offset = start + header.tell()
    end = file.seek(offset + nbytes)
    if end > file_size:
        raise ValueError(f"{where} is truncated: it ends at byte {end}, the file at {file_size}")
    return FileSlice(path, offset, nbytes, inode_of(file.fileno()))


def _read_meta(path: str, allowed: Folders) -> list[tuple[str, torch.dtype, torch.Size, int]]:
    try:
        metas = read_pickle(read_whole(path, allowed, _MAX_META), _META_WORDS)
    except PlainPickleError as error:
        raise ValueError(f"{path}: cannot be unpickled: {error}") from error
    if not isinstance(metas, list):
        raise ValueError(f"{path}: should hold a list, one entry per array, not {short(metas)}")
    return [_parse_meta(path, meta) for meta in metas]


def _parse_meta(path: str, meta: Any) -> tuple[str, torch.dtype, torch.Size, int]:
    if not isinstance(meta, dict) or set(meta) != _META_KEYS:
        raise ValueError(f"{path}: an entry should have {sorted(_META_KEYS)}: {short(meta)}")
    name, dtype, shape, dim = (meta[key] for key in ("key", "dtype", "shape", "tp_concat_dim"))
    if not isinstance(name, str) or not name:
        raise ValueError(f"{path}: a tensor's key is a non-empty string, not {short(name)}")
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{path}: tensor {name!r} has dtype {short(dtype)}, not a torch.dtype")
    if not is_shape(shape):
        raise ValueError(f"{path}: tensor {name!r} has the impossible shape {short(shape)}")
    if type(dim) is not int:
        raise ValueError(f"{path}: tensor {name!r} has tp_concat_dim {short(dim)}, not an integer")
    return name, dtype, torch.Size(shape), dim


def _merge(name: str, by_rank: dict[int, _Shard], tp_size: int) -> TensorSource:
    """One source from a tensor's shards, which are in rank order."""
    shards = list(by_rank.values())
    first, dim, shape, rows = shards[0], shards[0].concat_dim, list(shards[0].shape), 1
    _check_same(name, shards, "dtype")
    _check_same(name, shards, "concat_dim")
    if dim == _REPLICATED:
        _check_same(name, shards, "shape")
        shards = [first]
    elif missing := sorted(set(range(tp_size)) - by_rank.keys()):
        raise ValueError(
            f"tensor {name!r}: the shards of tensor-parallel ranks {missing} of {tp_size} are "
            f"missing; there is {', '.join(shard.part.path for shard in shards)}"
        )
    if len(shards) > 1:
        dim = dim if dim >= 0 else dim + len(shape)
        if not 0 <= dim < len(shape):
            raise ValueError(
                f"{first.part.path}: tensor {name!r} of shape {tuple(shape)} has no dimension "
                f"{first.concat_dim} to concatenate along"
            )
        _check_same(name, shards, "shape", but=dim)
        shape[dim] = sum(shard.shape[dim] for shard in shards)
        rows = math.prod(shape[:dim])
        if not is_shape(shape):
            raise ValueError(f"tensor {name!r} would have the impossible shape {short(shape)}")
    parts = FileParts(tuple(shard.part for shard in shards), rows)
    return TensorSource(name, first.dtype, torch.Size(shape), parts)


def _check_same(name: str, shards: list[_Shard], field: str, but: int | None = None) -> None:
    """Raise ``ValueError`` unless all shards agree, maybe apart from dimension ``but``."""
    first, mine = shards[0], getattr(shards[0], field)
    for other in shards[1:]:
        its = getattr(other, field)
        if its != mine and (but is None or _without(its, but) != _without(mine, but)):
            raise ValueError(
                f"tensor {name!r} has {field} {mine} in {first.part.path}, but {its} in "
                f"{other.part.path}"
            )


def _without(shape: torch.Size, dim: int) -> list[int]:
    return [length for place, length in enumerate(shape) if place != dim]
