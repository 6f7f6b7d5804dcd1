"""The tensors of safetensors files: what their headers say, checked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from checkpoint_engine.data_types import is_shape, tensor_nbytes
from checkpoint_engine.memory.folder import (
    Assigned,
    Folders,
    inode_of,
    open_file,
    short,
    unique_keys,
)
from checkpoint_engine.memory.sources import FileParts, FileSlice, TensorSource

_NUMBERS = {"U": "uint", "I": "int", "F": "float", "BF": "bfloat", "C": "complex"}
_DTYPES = {
    **{f"{code}{n}": f"{word}{n}" for code, word in _NUMBERS.items() for n in (8, 16, 32, 64)},
    **{f"F8_{kind}": f"float8_{kind.lower()}" for kind in ("E4M3FNUZ", "E5M2FNUZ", "E5M2")},
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
    "BOOL": "bool",
}
"""Their names in torch. Some do not exist there, or in the format: those are refused."""
_MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library itself."""


def safetensors_sources(
    paths: list[str], assigned: Mapping[str, Assigned], allowed: Folders
) -> Iterator[TensorSource]:
    """All tensors of those files, or, if an index is about a file, those that it assigns to it."""
    for path in paths:
        if path.endswith(".safetensors"):
            sources = _open(path, allowed)
            mine = assigned.get(path, Assigned("", frozenset(sources)))
            if missing := mine.names - sources.keys():
                raise ValueError(
                    f"tensor {min(missing)!r} is not in {path}, to which {mine.index} assigns it"
                )
            yield from (source for name, source in sources.items() if name in mine.names)


def _open(path: str, allowed: Folders) -> dict[str, TensorSource]:
    with open_file(path, allowed) as file:
        try:
            header, data = _read_header(file, path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        entries = {name: _parse_entry(path, name, entry) for name, entry in header.items()}
        _check_offsets(path, entries, data.nbytes)
        _check_with_library(path, file, set(header))
    return {
        name: TensorSource(name, dtype, shape, FileParts((data.cut(begin, end - begin),)))
        for name, (dtype, shape, begin, end) in entries.items()
    }


def _read_header(file: IO[bytes], path: str) -> tuple[dict[str, Any], FileSlice]:
    """The parsed JSON header, without the file's metadata, and the part with tensors' bytes."""
    file_size = os.fstat(file.fileno()).st_size
    size = int.from_bytes(file.read(8), "little")
    if file_size < 8 or size > min(_MAX_HEADER, file_size - 8):
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
    header.pop("__metadata__", None)
    return header, FileSlice(path, 8 + size, file_size - 8 - size, inode_of(file.fileno()))


_Entry = tuple[torch.dtype, torch.Size, int, int]


def _parse_entry(path: str, name: str, entry: Any) -> _Entry:
    """Its dtype, its shape, and where its bytes begin and end."""
    where = f"{path}: tensor {name!r}"
    match entry:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise ValueError(f"{where}: malformed header entry {short(entry)}")
    if not name:
        raise ValueError(f"{path}: holds a tensor with an empty name")
    dtype = getattr(torch, _DTYPES.get(code, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{where} has dtype {code!r}, unknown to torch {torch.__version__}")
    if not is_shape(shape):
        raise ValueError(f"{where} has the impossible shape {short(shape)}")
    if code == "F4":  # torch counts pairs of 4-bit numbers
        if not shape or shape[-1] % 2:
            raise ValueError(f"{where}: F4 needs an even last dimension: {shape}")
        shape = [*shape[:-1], shape[-1] // 2]
    nbytes = tensor_nbytes(dtype, torch.Size(shape))
    if end - begin != nbytes:
        raise ValueError(
            f"{where} ({code}, shape {shape}) takes {nbytes} bytes, "
            f"but its header says bytes {begin} to {end}"
        )
    return dtype, torch.Size(shape), begin, end


def _check_offsets(path: str, entries: Mapping[str, _Entry], nbytes: int) -> None:
    """Tensors must fill the file exactly: no hole, no overlap, nothing behind the last."""
    position = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != position:
            raise ValueError(
                f"{path}: tensor {name!r} begins at byte {begin} of the data, "
                f"but the one before it ends at {position}"
            )
        position = end
        if end > nbytes:
            raise ValueError(
                f"{path}: truncated: tensor {name!r} ends at byte {end} of the data, "
                f"the file at {nbytes}"
            )
    if position != nbytes:
        raise ValueError(f"{path}: {nbytes - position} bytes behind the last tensor belong to none")


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
