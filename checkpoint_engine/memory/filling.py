"""Fills arenas with the bytes of a checkpoint's tensors, by several threads."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import torch

from checkpoint_engine.data_types import ParameterMeta, placed
from checkpoint_engine.memory import threads
from checkpoint_engine.memory.arena import Arena, populate
from checkpoint_engine.memory.sources import FileParts, FileSlice, Reader, TensorSource

CHUNK_BYTES = 16 << 20
"""Bytes that one thread fills at a time, and about the most it reads at once."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By item size: a dtype that every dtype of this size can be copied as, bit for bit."""


class _Write(NamedTuple):
    """``nbytes`` bytes at ``at`` of an arena that one thread sees to.

    Attributes:
        address: where the same bytes lie in host memory; 0: ``write`` has to write them.
        write: writes them; ``None``: the thread only brings their memory into being.
    """

    at: int
    nbytes: int
    write: Callable[[Reader, torch.Tensor], None] | None = None
    address: int = 0


def fill_arenas(
    arenas: list[Arena],
    layout: list[list[ParameterMeta]],
    sources: Mapping[str, TensorSource],
    cpus: Set[int] | None,
    on_progress: Callable[[float], None] | None,
) -> None:
    """Puts the tensors of each list into the arena of the same index, and pins the arenas.

    An arena is pinned, and the copies from devices into it begin, while the next one is filled.
    These copies have streams of their own, so that they do not delay other work of the device.
    """
    contents = dict(zip(arenas, layout, strict=True))
    streams: dict[torch.device, Any] = {}

    def finish(arena: Arena) -> None:
        arena.pin()
        for at, meta in placed(contents[arena]):
            data = sources[meta.name].data
            if isinstance(data, torch.Tensor) and data.device.type != "cpu" and data.nbytes:
                _begin_copy(data, arena.memory[at : at + data.nbytes], streams)

    pieces = {arena: _pieces(metas, sources) for arena, metas in contents.items()}
    try:
        _work(pieces, finish, cpus, on_progress)
    finally:
        for stream in streams.values():
            stream.synchronize()


def pin_arenas(arenas: Iterable[Arena], cpus: Set[int] | None) -> None:
    """Brings all their pages into being, and pins them."""
    _work({arena: _chunks(0, arena.nbytes) for arena in arenas}, Arena.pin, cpus)


def _begin_copy(
    source: torch.Tensor, target: torch.Tensor, streams: dict[torch.device, Any]
) -> None:
    """Copies from a device, behind the work that its current stream already has."""
    module = getattr(torch, source.device.type)
    if source.device not in streams:
        streams[source.device] = module.Stream(source.device)
        streams[source.device].wait_stream(module.current_stream(source.device))
    with module.stream(streams[source.device]):
        source = source.resolve_conj().resolve_neg().contiguous()
        target.copy_(source.view(-1).view(torch.uint8), non_blocking=True)


def _work(
    pieces: Mapping[Arena, Iterable[_Write]],
    finish: Callable[[Arena], None],
    cpus: Set[int] | None,
    on_progress: Callable[[float], None] | None = None,
) -> None:
    """Writes all pieces, by several threads, and in this one calls ``finish`` for each done arena.

    However it ends, no thread touches the memory any more.
    """
    batches = [(arena, batch) for arena in pieces for batch in _batches(pieces[arena])]
    left = Counter(arena for arena, _ in batches)

    def wrote_batch(arena: Arena) -> None:
        left[arena] -= 1
        if left[arena] == 0:
            arena.fresh = False
            finish(arena)
        if on_progress is not None:
            on_progress(1 - left.total() / len(batches))

    tasks = [(arena, partial(_write_batch, arena, batch)) for arena, batch in batches]
    threads.run_tasks(tasks, wrote_batch, cpus)


# What is to be written


def _pieces(metas: list[ParameterMeta], sources: Mapping[str, TensorSource]) -> Iterator[_Write]:
    for at, meta in placed(metas):
        source = sources[meta.name]
        if not source.nbytes:
            continue
        if isinstance(source.data, FileParts):
            yield from _file_pieces(source.name, source.data, at)
        elif source.data.device.type != "cpu":
            yield from _chunks(at, source.nbytes)
        elif source.data.is_contiguous() and not (source.data.is_conj() or source.data.is_neg()):
            # No torch in the threads: after each call of it they would wait for each other.
            yield from _chunks(at, source.nbytes, source.data.data_ptr())
        else:
            for part in _split(source.data):
                yield _Write(at, part.nbytes, partial(_copy, part))
                at += part.nbytes


def _chunks(at: int, nbytes: int, address: int = 0) -> Iterator[_Write]:
    for offset in range(0, nbytes, CHUNK_BYTES):
        size = min(CHUNK_BYTES, nbytes - offset)
        yield _Write(at + offset, size, None, address and address + offset)


def _file_pieces(name: str, data: FileParts, at: int) -> Iterator[_Write]:
    """In the order of the tensor's bytes: as many rows as a chunk has room for, or parts of one."""
    stride = sum(part.nbytes for part in data.parts) // data.rows
    block = max(1, CHUNK_BYTES // stride)
    for first in range(0, data.rows, block):
        rows, column = min(block, data.rows - first), 0
        for part in data.rows_from(first, rows):
            if rows == 1:
                for run in part.chunks(CHUNK_BYTES):
                    start = at + column + run.offset - part.offset
                    yield _Write(start, run.nbytes, partial(_read, run, name))
            elif part.nbytes > 0:
                write = partial(_read_columns, part, name, rows, column)
                yield _Write(at, rows * stride, write)
            column += part.nbytes // rows
        at += rows * stride


def _split(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Parts of about ``CHUNK_BYTES``, but whole transposes: for those torch has a faster copy."""
    if tensor.is_contiguous():
        tensor = tensor.view(-1)
    if tensor.nbytes <= CHUNK_BYTES or (tensor.dim() == 2 and tensor.stride(1) != 1):
        yield tensor
    elif tensor.dim() > 2:
        for part in tensor:
            yield from _split(part)
    else:
        yield from torch.split(tensor, max(1, CHUNK_BYTES * tensor.size(0) // tensor.nbytes))


def _batches(pieces: Iterable[_Write]) -> Iterator[list[_Write]]:
    """Adjacent pieces together until they have ``CHUNK_BYTES``. At least one batch, maybe empty."""
    batch: list[_Write] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += piece.nbytes
        if size >= CHUNK_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


# Writing, in threads


def _write_batch(arena: Arena, batch: list[_Write]) -> None:
    base = arena.memory.data_ptr()
    if arena.fresh and batch:
        end = batch[-1].at + batch[-1].nbytes
        populate(base + batch[0].at, end - batch[0].at)
    with closing(Reader()) as files:
        for piece in batch:
            if piece.address:
                ctypes.memmove(base + piece.at, piece.address, piece.nbytes)
            elif piece.write is not None:
                piece.write(files, arena.memory[piece.at : piece.at + piece.nbytes])


def _copy(source: torch.Tensor, _: Reader, target: torch.Tensor) -> None:
    """The elements of a tensor, one behind the other, bit for bit."""
    source = source.resolve_conj().resolve_neg()
    bits = source.view(_BITS.get(source.dtype.itemsize, source.dtype))
    target.view(bits.dtype).view(bits.shape).copy_(bits)


def _read(source: FileSlice, name: str, files: Reader, target: torch.Tensor) -> None:
    files.read(source, name, target)


def _read_columns(
    source: FileSlice, name: str, rows: int, column: int, files: Reader, target: torch.Tensor
) -> None:
    """A shard, which holds the bytes from ``column`` on of each row."""
    shard = torch.empty(rows, source.nbytes // rows, dtype=torch.uint8)
    files.read(source, name, shard.view(-1))
    target.view(rows, -1)[:, column : column + shard.size(1)] = shard
