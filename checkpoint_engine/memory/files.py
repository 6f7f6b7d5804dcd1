"""Checkpoint files to named tensor sources: where the bytes of each tensor lie, and nothing more.

Only headers are read here. ``filling`` reads the tensors' bytes straight into their place.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from contextlib import closing

import torch
from loguru import logger
from safetensors import safe_open

from checkpoint_engine.memory.folder import Folders, Path, assigned_tensors, expand_folders, short
from checkpoint_engine.memory.npy_files import npy_sources
from checkpoint_engine.memory.safetensors_files import safetensors_sources
from checkpoint_engine.memory.sources import Reader, TensorSource, file_of

_CHUNK = 4 << 20
"""Bytes that are read at a time to compare two tensors."""


def open_files(files: Iterable[Path], allowed_folders: Folders = None) -> dict[str, TensorSource]:
    """The tensors of safetensors files and of ``.npy`` files with their ``.meta``, by name.

    Reads headers only; the files must stay as they are until their bytes have been read. Of equal
    tensors with the same name the last counts, and a warning says so.

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
        RuntimeError: two files have a tensor of one name, and one of them cannot be read.
    """
    paths = expand_folders(files, allowed_folders)
    assigned = assigned_tensors(paths, allowed_folders)
    found: dict[str, TensorSource] = {}
    twice: list[str] = []
    for source in itertools.chain(
        safetensors_sources(paths, assigned, allowed_folders), npy_sources(paths, allowed_folders)
    ):
        if source.name in found:
            _check_equal(found[source.name], source)
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


def _check_equal(first: TensorSource, other: TensorSource) -> None:
    both = f"tensor {first.name!r} is in both {file_of(first)} and {file_of(other)}, with different"
    for what in ("dtype", "shape"):
        one, two = getattr(first, what), getattr(other, what)
        if one != two:
            raise ValueError(f"{both} {what}s: {one} and {two}")
    if _digest(first) != _digest(other):
        raise ValueError(f"{both} bytes: leave one of the files out")


def _digest(source: TensorSource) -> bytes:
    """SHA-256 of a tensor's bytes, however they are cut into parts."""
    digest = hashlib.sha256()
    rows = map(source.files.rows_from, range(source.files.rows))
    with closing(Reader()) as reader:
        for part in itertools.chain.from_iterable(rows):
            for chunk in part.chunks(_CHUNK):
                content = torch.empty(chunk.nbytes, dtype=torch.uint8)
                reader.read(chunk, source.name, content)
                digest.update(content.numpy().data)
    return digest.digest()
