"""Makes the column copies of a checkpoint; see ``planning.columns``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from checkpoint_engine.data_types import MemoryBuffer, ParameterMeta, placed, tensor_nbytes
from checkpoint_engine.memory.host_memory import HostMemory
from checkpoint_engine.memory.sources import tensor_sources
from checkpoint_engine.planning.columns import WORD, Columns


@dataclass(frozen=True)
class CopiedColumns:
    """The column copy of a buffer.

    Attributes:
        index: of that buffer.
        parts: of each of its tensors, into how many it is cut; 0: it has no copy.
        memory: the copy; each part counts as a tensor of its own.
    """

    index: int
    parts: list[int]
    memory: MemoryBuffer


def copy_columns(
    memory: HostMemory,
    buffers: Sequence[MemoryBuffer],
    wanted: Mapping[str, Columns],
    on_progress: Callable[[float], None],
) -> Iterator[CopiedColumns]:
    """Copy the tensors of ``buffers`` of which others want columns. The caller releases what it
    gets, whatever happens.

    Args:
        wanted: by name, what hosts need of a tensor.

    Raises:
        MemoryError, RuntimeError: there is no memory for the next copy.
    """
    for index, buffer in enumerate(buffers):
        parts = [
            wanted[meta.name].parts_of(meta) if meta.name in wanted else 0 for meta in buffer.metas
        ]
        if any(parts):
            sources = tensor_sources(_views(buffer, parts))
            (copy,) = memory.fill(sources, on_progress=on_progress)  # it is no larger than buffer
            copy.metas = [part for meta in copy.metas for part in _parts(meta)]
            yield CopiedColumns(index, parts, copy)


def _views(buffer: MemoryBuffer, parts: Sequence[int]) -> dict[str, torch.Tensor]:
    """The tensors that are cut, part by part, in words. Named by their order, which ``fill``
    keeps."""
    views = {}
    for index, ((start, meta), count) in enumerate(zip(placed(buffer.metas), parts, strict=True)):
        if count:
            nbytes = tensor_nbytes(meta.dtype, meta.shape)
            words = buffer.buffer[start : start + nbytes].view(torch.int64)
            width = meta.dtype.itemsize * meta.shape[-1] // count // WORD
            views[f"{index}"] = words.view(-1, count, width).transpose(0, 1)
    return views


def _parts(meta: ParameterMeta) -> list[ParameterMeta]:
    return [
        ParameterMeta(name=f"{meta.name}/{part}", dtype=meta.dtype, shape=meta.shape[1:])
        for part in range(meta.shape[0])
    ]
