"""Where the bytes of a checkpoint's tensors come from: files, or tensors in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from checkpoint_engine.data_types import ParameterMeta, tensor_nbytes
from checkpoint_engine.memory.folder import Inode, reopen


@dataclass(frozen=True)
class FileSlice:
    """``nbytes`` bytes at ``offset`` of the file ``path``, which was ``inode`` when looked at."""

    path: str
    offset: int
    nbytes: int
    inode: Inode | None = field(default=None, compare=False, repr=False)

    def cut(self, begin: int, nbytes: int) -> FileSlice:
        """``nbytes`` of its bytes, from ``begin`` on."""
        return FileSlice(self.path, self.offset + begin, nbytes, self.inode)

    def chunks(self, most: int) -> Iterator[FileSlice]:
        """All of it, in slices of ``most`` bytes; the last one may be smaller."""
        for begin in range(0, self.nbytes, most):
            yield self.cut(begin, min(most, self.nbytes - begin))


@dataclass(frozen=True)
class FileParts:
    """A tensor that lies in files: ``rows`` rows, each the parts' rows one behind the other.

    A tensor in one piece is one part and one row. Shards that were cut along dimension ``d`` are
    one part each, and as many rows as the dimensions before ``d`` have elements.
    """

    parts: tuple[FileSlice, ...]
    rows: int = 1

    def rows_from(self, first: int, count: int = 1) -> list[FileSlice]:
        """What each part holds of ``count`` rows, from row ``first`` on."""
        widths = [part.nbytes // self.rows for part in self.parts]
        return [
            part.cut(first * width, count * width)
            for part, width in zip(self.parts, widths, strict=True)
        ]


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

    @property
    def meta(self) -> ParameterMeta:
        return ParameterMeta(name=self.name, dtype=self.dtype, shape=self.shape)

    @property
    def files(self) -> FileParts:
        assert isinstance(self.data, FileParts)
        return self.data


def file_of(source: TensorSource) -> str:
    """The file that a tensor lies in, or its first shard."""
    return source.files.parts[0].path


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sort key that puts layer 2 before layer 10; names that differ only in zeros keep an order."""
    pieces = re.split(r"([0-9]+)", name)
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], name


def tensor_sources(named_tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorSource]:
    """In-memory tensors, of any device and any strides, as sources. Copies nothing.

    Raises:
        ValueError: a name is empty or no string, or a value is no dense tensor with memory of its
            own; names the tensor.
    """
    for name, tensor in named_tensors.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"a tensor's name is a non-empty string, not {name!r}")
        refusal = _refusal(tensor)
        if refusal is not None:
            raise ValueError(f"tensor {name!r} cannot be registered: {refusal}")
    return {
        name: TensorSource(name, tensor.dtype, tensor.shape, tensor.detach())
        for name, tensor in named_tensors.items()
    }


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


class Reader:
    """Reads files into memory, and keeps them open. Used by one thread."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)

    def read(self, source: FileSlice, name: str, out: torch.Tensor) -> None:
        """Fills ``out``, a part of the tensor ``name``.

        Raises:
            ValueError: the file ends too early, or is another than the one that was opened first.
            RuntimeError: it cannot be read.
        """
        left, offset = out.numpy().data, source.offset
        while left:
            try:
                if source.path not in self._open:
                    self._open[source.path] = reopen(source.path, source.inode)
                fd = self._open[source.path]
                count = os.preadv(fd, [left], offset)
            except OSError as error:
                raise RuntimeError(f"{source.path}: tensor {name!r}: {error}") from error
            if count == 0:
                raise ValueError(
                    f"{source.path}: truncated since it was opened: it ends at byte "
                    f"{os.fstat(fd).st_size}, tensor {name!r} needs {offset + len(left)}"
                )
            left, offset = left[count:], offset + count
