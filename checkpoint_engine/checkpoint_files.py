"""Checkpoint files to named tensor sources: where the bytes of each tensor lie, and nothing more.

Only headers are read here. ``pin_memory`` reads the tensors' bytes straight into their place.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from loguru import logger
from safetensors import SafetensorError, safe_open

from checkpoint_engine.checkpoint_folder import (
    Assigned,
    Folders,
    Inode,
    Path,
    assigned_tensors,
    check_same_file,
    expand_folders,
    inode_of,
    open_file,
    short,
    unique_keys,
)
from checkpoint_engine.data_types import is_shape, tensor_nbytes
from checkpoint_engine.plain_pickle import PlainPickleError, Vocabulary, read_pickle

_SAFETENSORS_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
}
_MAX_SAFETENSORS_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library itself."""
_MAX_NPY_HEADER = 10_000
"""Bytes; numpy's own limit."""
_MAX_NPY_META = 1 << 30
"""Bytes of a ``.meta`` file: room for millions of arrays."""
_CHUNK = 4 << 20
"""Bytes that are read at a time to compare two tensors."""
_NPY_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_NPY_META_KEYS = {"key", "dtype", "shape", "type", "tp_concat_dim"}
_REPLICATED = -1
"""The ``tp_concat_dim`` of a tensor that every tensor-parallel rank holds whole."""


@dataclass(frozen=True)
class FileSlice:
    """``nbytes`` bytes at ``offset`` of the file ``path``, which was ``inode`` when looked at."""

    path: str
    offset: int
    nbytes: int
    inode: Inode | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class FileParts:
    """A tensor that lies in files: ``rows`` rows, each the parts' rows one behind the other.

    A tensor in one piece is one part and one row. Shards that were cut along dimension ``d`` are
    one part each, and as many rows as the dimensions before ``d`` have elements.
    """

    parts: tuple[FileSlice, ...]
    rows: int = 1


@dataclass(frozen=True)
class TensorSource:
    """A tensor of a checkpoint and where its bytes come from: files, or a tensor in memory."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    data: FileParts | torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the contiguous tensor, without padding."""
        return tensor_nbytes(self.dtype, self.shape)


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sort key that puts layer 2 before layer 10; names that differ only in zeros keep an order."""
    pieces = re.split(r"([0-9]+)", name)
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], name


def open_files(files: Iterable[Path], allowed_folders: Folders = None) -> dict[str, TensorSource]:
    """The tensors of safetensors files and of ``.npy`` files with their ``.meta``, by name.

    Reads headers only; the files must stay as they are until their bytes have been read.

    Args:
        files: a folder stands for all files of ``checkpoint_of``. An index among the files selects
            which tensors of them count.
        allowed_folders: real paths; files that lie elsewhere, symbolic links resolved, are refused.

    Raises:
        AccessError: a file lies outside ``allowed_folders``.
        ValueError: a file is missing (also a ``FileNotFoundError``), truncated, of another format,
            or lies about its tensors; a dtype is unknown here; a tensor is not in the file to which
            an index assigns it; two files hold different tensors of one name; a tensor-parallel
            shard is missing, duplicated or does not match the others. Names the file and the
            tensor.
    """
    paths = expand_folders(files, allowed_folders)
    assigned = assigned_tensors(paths, allowed_folders)
    safetensors = _safetensors_sources(paths, assigned, allowed_folders)
    arrays = _npy_sources(paths, allowed_folders)
    return merge_sources(itertools.chain(safetensors, arrays), allowed_folders)


def merge_sources(
    sources: Iterable[TensorSource], allowed: Folders = None
) -> dict[str, TensorSource]:
    """Tensors in files by name. Of equal ones with the same name the last counts; warns once.

    Raises:
        ValueError: two of the same name differ. Names both files.
    """
    found: dict[str, TensorSource] = {}
    twice: list[str] = []
    for source in sources:
        if source.name in found:
            _check_equal(found[source.name], source, allowed)
            twice.append(source.name)
        found[source.name] = source
    if twice:
        logger.warning(
            "{} tensors are in two files with equal bytes, the last one counts: {}",
            len(twice),
            short(twice),
        )
    return found


def view_tensors(sources: Iterable[TensorSource]) -> dict[str, torch.Tensor]:
    """Tensors of safetensors files, as views of the mapped files: a use of them reads them."""
    tensors: dict[str, torch.Tensor] = {}
    for path, group in itertools.groupby(sources, key=file_of):
        with safe_open(path, framework="pt") as file:
            tensors |= {source.name: file.get_tensor(source.name) for source in group}
    return tensors


def file_of(source: TensorSource) -> str:
    """The file that a tensor lies in, or its first shard."""
    return _parts(source).parts[0].path


def _parts(source: TensorSource) -> FileParts:
    assert isinstance(source.data, FileParts)
    return source.data


def tensor_sources(named_tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorSource]:
    """In-memory tensors, of any device and any strides, as sources. Copies nothing.

    Raises:
        ValueError: a name is empty or no string, or a value is no dense tensor with memory of its
            own; names the tensor.
    """
    return {name: _tensor_source(name, tensor) for name, tensor in named_tensors.items()}


def _tensor_source(name: str, tensor: torch.Tensor) -> TensorSource:
    if not isinstance(name, str) or not name:
        raise ValueError(f"a tensor's name is a non-empty string, not {name!r}")
    refusal = _refusal(tensor)
    if refusal is not None:
        raise ValueError(f"tensor {name!r} cannot be registered: {refusal}")
    return TensorSource(name, tensor.dtype, tensor.shape, tensor.detach())


def _refusal(tensor: object) -> str | None:
    """Why this is no tensor whose bytes can be copied; None if it is one."""
    if not isinstance(tensor, torch.Tensor):
        return f"it is a {type(tensor).__name__}, not a torch.Tensor"
    if tensor.is_meta:
        return "it is on the meta device and has no data"
    if tensor.is_quantized:
        return f"it is quantized ({tensor.dtype}); pass its int_repr() and its scales"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return f"it is not dense ({tensor.layout}); pass its to_dense() or its parts"
    if tensor.numel() > 0 and not _has_memory(tensor):
        return f"a {type(tensor).__name__} has no memory of its own; pass a plain local tensor"
    return None


def _has_memory(tensor: torch.Tensor) -> bool:
    """False for wrappers of other tensors (DTensor) and for stand-ins without data (FakeTensor)."""
    try:
        return tensor.untyped_storage().data_ptr() != 0
    except RuntimeError:
        return False


# safetensors


def _safetensors_sources(
    paths: list[str], assigned: Mapping[str, Assigned], allowed: Folders
) -> Iterator[TensorSource]:
    for path in paths:
        if path.endswith(".safetensors"):
            yield from _select(_open_safetensors(path, allowed), path, assigned.get(path))


def _select(
    sources: list[TensorSource], path: str, assigned: Assigned | None
) -> list[TensorSource]:
    """The tensors that an index assigns to the file; all, if no index is about it."""
    if assigned is None:
        return sources
    missing = assigned.names - {source.name for source in sources}
    if missing:
        raise ValueError(
            f"tensor {min(missing)!r} is not in {path}, to which {assigned.index} assigns it"
        )
    return [source for source in sources if source.name in assigned.names]


def _open_safetensors(path: str, allowed: Folders) -> list[TensorSource]:
    with open_file(path, allowed) as file:
        file_size = os.fstat(file.fileno()).st_size
        try:
            header, data_start = _read_safetensors_header(file, path, file_size)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        header.pop("__metadata__", None)
        whole = FileSlice(path, data_start, file_size - data_start, inode_of(file.fileno()))
        layout = [_parse_header_entry(whole, *item) for item in header.items()]
        _check_no_gaps([(name, part) for name, _, _, part in layout], path, data_start, file_size)
        _check_with_library(path, file, set(header))
    return [
        TensorSource(name, dtype, shape, FileParts((part,))) for name, dtype, shape, part in layout
    ]


def _read_safetensors_header(
    file: IO[bytes], path: str, file_size: int
) -> tuple[dict[str, Any], int]:
    """The parsed JSON header and the file offset of the first tensor byte."""
    size = int.from_bytes(file.read(8), "little")
    if file_size < 8 or size > min(_MAX_SAFETENSORS_HEADER, file_size - 8):
        raise ValueError(
            f"{path}: truncated, or no safetensors file: its header should have {size} bytes, "
            f"the file has {file_size}"
        )
    try:
        header = json.loads(file.read(size), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its safetensors header cannot be parsed: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its safetensors header is no JSON object")
    return header, 8 + size


def _parse_header_entry(
    whole: FileSlice, name: str, entry: Any
) -> tuple[str, torch.dtype, torch.Size, FileSlice]:
    """``whole``: the part of the file that ``entry``'s offsets count from."""
    path = whole.path
    match entry:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            dtype, size = _parse_dtype_and_shape(path, name, code, shape)
        case _:
            raise ValueError(f"{path}: tensor {name!r}: malformed header entry {short(entry)}")
    nbytes = tensor_nbytes(dtype, size)
    if not 0 <= begin <= end or end - begin != nbytes:
        raise ValueError(
            f"{path}: tensor {name!r} ({code}, shape {shape}) takes {nbytes} bytes, "
            f"but its header says bytes {begin} to {end}"
        )
    return name, dtype, size, FileSlice(path, whole.offset + begin, nbytes, whole.inode)


def _parse_dtype_and_shape(
    path: str, name: str, code: str, shape: list[Any]
) -> tuple[torch.dtype, torch.Size]:
    if not name:
        raise ValueError(f"{path}: holds a tensor with an empty name")
    dtype = getattr(torch, _SAFETENSORS_DTYPES.get(code, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"{path}: tensor {name!r} has dtype {code!r}, unknown to torch {torch.__version__}"
        )
    if not is_shape(shape):
        raise ValueError(f"{path}: tensor {name!r} has the impossible shape {short(shape)}")
    if code == "F4":  # torch counts pairs of 4-bit numbers
        if not shape or shape[-1] % 2:
            raise ValueError(f"{path}: tensor {name!r}: F4 needs an even last dimension: {shape}")
        shape = [*shape[:-1], shape[-1] // 2]
    return dtype, torch.Size(shape)


def _check_no_gaps(
    layout: list[tuple[str, FileSlice]], path: str, data_start: int, file_size: int
) -> None:
    """Tensors must fill the file exactly: no hole, no overlap, nothing behind the last."""
    end = data_start
    for name, part in sorted(layout, key=lambda item: (item[1].offset, item[1].nbytes)):
        if part.offset != end:
            raise ValueError(
                f"{path}: tensor {name!r} begins at byte {part.offset} of the file, "
                f"but the one before it ends at {end}"
            )
        end += part.nbytes
        if end > file_size:
            raise ValueError(
                f"{path}: truncated: tensor {name!r} ends at byte {end}, the file at {file_size}"
            )
    if end != file_size:
        raise ValueError(f"{path}: {file_size - end} bytes behind the last tensor belong to none")


def _check_with_library(path: str, file: IO[bytes], names: set[str]) -> None:
    """What we accept, the safetensors library must accept too: of the same file, whatever is at
    ``path`` by now."""
    try:
        with safe_open(f"/proc/self/fd/{file.fileno()}", framework="pt") as opened:
            differing = names.symmetric_difference(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: refused by the safetensors library: {error}") from error
    if differing:
        raise ValueError(f"{path}: the safetensors library differs about {min(differing)!r}")


# .npy with .meta


class _Shard(NamedTuple):
    """What one ``.npy`` file holds of one tensor."""

    part: FileSlice
    dtype: torch.dtype
    shape: torch.Size
    concat_dim: int
    rank: int
    family: str


def _npy_sources(paths: list[str], allowed: Folders) -> Iterator[TensorSource]:
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
        for name, shard in _open_npy(path, allowed, rank, family):
            if rank in shards[name]:
                raise ValueError(
                    f"{path}: tensor {name!r} of tensor-parallel rank {rank} is in "
                    f"{shards[name][rank].part.path} already"
                )
            shards[name][rank] = shard
    for name, by_rank in shards.items():
        yield _merge(name, [by_rank[rank] for rank in sorted(by_rank)], tp_sizes)


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


def _open_npy(path: str, allowed: Folders, rank: int, family: str) -> Iterator[tuple[str, _Shard]]:
    metas = _read_npy_meta(f"{path}.meta", allowed)
    with open_file(path, allowed) as file:
        file_size = os.fstat(file.fileno()).st_size
        for name, dtype, shape, dim in metas:
            part = _next_array(file, path, name, tensor_nbytes(dtype, shape), file_size)
            yield name, _Shard(part, dtype, shape, dim, rank, family)
        if file.tell() != file_size:
            raise ValueError(
                f"{path}: {file_size - file.tell()} bytes behind the {len(metas)} arrays that "
                f"its .meta lists"
            )


def _next_array(file: IO[bytes], path: str, name: str, nbytes: int, file_size: int) -> FileSlice:
    """Reads one array's header and skips its data. Its own dtype may be a stand-in: bytes count."""
    try:
        version = np.lib.format.read_magic(file)
        _check_npy_header_length(file, version)
        shape, fortran, dtype = _NPY_HEADER_READERS[version](file)
    except Exception as error:  # numpy parses a header as Python: it can raise anything
        raise ValueError(f"{path}: no readable array for tensor {name!r}: {error}") from error
    if fortran or dtype.hasobject or not dtype.isnative:
        raise ValueError(
            f"{path}: tensor {name!r} is stored as {dtype} in {'Fortran' if fortran else 'C'} "
            f"order, but only native numbers in C order can be read: save np.ascontiguousarray()"
        )
    stored = math.prod(shape) * dtype.itemsize
    if stored != nbytes:
        raise ValueError(f"{path}: tensor {name!r} takes {nbytes} bytes, its array has {stored}")
    offset = file.tell()
    if offset + nbytes > file_size:
        raise ValueError(
            f"{path}: truncated: tensor {name!r} ends at byte {offset + nbytes}, "
            f"the file at {file_size}"
        )
    file.seek(nbytes, os.SEEK_CUR)
    return FileSlice(path, offset, nbytes, inode_of(file.fileno()))


def _check_npy_header_length(file: IO[bytes], version: tuple[int, int]) -> None:
    """numpy would first allocate what the length says, and then look at it."""
    width = 2 if version == (1, 0) else 4
    at = file.tell()
    length = int.from_bytes(file.read(width), "little")
    file.seek(at)
    if length > _MAX_NPY_HEADER:
        raise ValueError(f"its header has {length} bytes")


class _MetaWords(Vocabulary):
    """Tensor and array types are names without powers."""

    strange = "is not allowed in a checkpoint's .meta"

    def find(self, module: str, name: str) -> Any:
        if (module, name) in (("torch", "Tensor"), ("numpy", "ndarray")):
            return f"{module}.{name}"
        return super().find(module, name)


def _read_npy_meta(path: str, allowed: Folders) -> list[tuple[str, torch.dtype, torch.Size, int]]:
    with open_file(path, allowed) as file:
        data = file.read(_MAX_NPY_META + 1)
    if len(data) > _MAX_NPY_META:
        raise ValueError(f"{path}: has more than {_MAX_NPY_META} bytes")
    try:
        metas = read_pickle(data, _MetaWords())
    except PlainPickleError as error:
        raise ValueError(f"{path}: cannot be unpickled: {error}") from error
    if not isinstance(metas, list):
        raise ValueError(f"{path}: should hold a list, one entry per array, not {short(metas)}")
    return [_parse_npy_meta(path, meta) for meta in metas]


def _parse_npy_meta(path: str, meta: Any) -> tuple[str, torch.dtype, torch.Size, int]:
    if not isinstance(meta, dict) or set(meta) != _NPY_META_KEYS:
        raise ValueError(f"{path}: an entry should have {sorted(_NPY_META_KEYS)}: {short(meta)}")
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


def _merge(name: str, shards: list[_Shard], tp_sizes: Mapping[str, int]) -> TensorSource:
    """One source from a tensor's shards, in rank order."""
    first = shards[0]
    for shard in shards[1:]:
        _check_same(name, "dtype", first, shard)
        _check_same(name, "concat_dim", first, shard)
    if first.concat_dim == _REPLICATED:
        for shard in shards[1:]:
            _check_same(name, "shape", first, shard)
        return _whole(name, first)
    _check_complete(name, shards, max(tp_sizes[shard.family] for shard in shards))
    return _concatenate(name, shards) if len(shards) > 1 else _whole(name, first)


def _whole(name: str, shard: _Shard) -> TensorSource:
    return TensorSource(name, shard.dtype, shard.shape, FileParts((shard.part,)))


def _check_same(name: str, field: str, first: _Shard, other: _Shard) -> None:
    if getattr(first, field) != getattr(other, field):
        raise ValueError(
            f"tensor {name!r} has {field} {getattr(first, field)} in {first.part.path}, "
            f"but {getattr(other, field)} in {other.part.path}"
        )


def _check_complete(name: str, shards: list[_Shard], tp_size: int) -> None:
    missing = sorted(set(range(tp_size)) - {shard.rank for shard in shards})
    if missing:
        raise ValueError(
            f"tensor {name!r}: the shards of tensor-parallel ranks {missing} of {tp_size} are "
            f"missing; there is {', '.join(shard.part.path for shard in shards)}"
        )


def _concatenate(name: str, shards: list[_Shard]) -> TensorSource:
    first = shards[0]
    ndim = len(first.shape)
    dim = first.concat_dim if first.concat_dim >= 0 else first.concat_dim + ndim
    if not 0 <= dim < ndim:
        raise ValueError(
            f"{first.part.path}: tensor {name!r} of shape {tuple(first.shape)} has no dimension "
            f"{first.concat_dim} to concatenate along"
        )
    for shard in shards[1:]:
        if _without(shard.shape, dim) != _without(first.shape, dim):
            _check_same(name, "shape", first, shard)
    shape = list(first.shape)
    shape[dim] = sum(shard.shape[dim] for shard in shards)
    if not is_shape(shape):
        raise ValueError(f"tensor {name!r} would have the impossible shape {short(shape)}")
    parts = FileParts(tuple(shard.part for shard in shards), rows=math.prod(shape[:dim]))
    return TensorSource(name, first.dtype, torch.Size(shape), parts)


def _without(shape: torch.Size, dim: int) -> list[int]:
    return [n for i, n in enumerate(shape) if i != dim]


# The same tensor in two files


def _check_equal(first: TensorSource, other: TensorSource, allowed: Folders) -> None:
    for field_name in ("dtype", "shape"):
        one, two = getattr(first, field_name), getattr(other, field_name)
        if one != two:
            raise ValueError(
                f"tensor {first.name!r} is in both {file_of(first)} and {file_of(other)}, with "
                f"different {field_name}s: {one} and {two}"
            )
    if _digest(first, allowed) != _digest(other, allowed):
        raise ValueError(
            f"tensor {first.name!r} is in both {file_of(first)} and {file_of(other)}, with "
            f"different bytes: leave one of the files out"
        )


def _digest(source: TensorSource, allowed: Folders) -> bytes:
    """SHA-256 of a tensor's bytes, however they are cut into parts."""
    digest = hashlib.sha256()
    data = _parts(source)
    with ExitStack() as opened:
        files = [opened.enter_context(open_file(part.path, allowed)) for part in data.parts]
        for part, file in zip(data.parts, files, strict=True):
            check_same_file(part.path, file.fileno(), part.inode)
        for row, (part, file) in itertools.product(
            range(data.rows), zip(data.parts, files, strict=True)
        ):
            width = part.nbytes // data.rows
            file.seek(part.offset + row * width)
            for chunk in _read_chunks(file, part.path, width):
                digest.update(chunk)
    return digest.digest()


def _read_chunks(file: IO[bytes], path: str, nbytes: int) -> Iterator[bytes]:
    while nbytes:
        try:
            chunk = file.read(min(nbytes, _CHUNK))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        if not chunk:
            raise ValueError(f"{path}: truncated since it was opened")
        yield chunk
        nbytes -= len(chunk)
