"""A bucket's part of a recording, compiled for where the bucket's tensors lie."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from checkpoint_engine.loading.replay import fused_copies
from checkpoint_engine.loading.replay.canvas import Source
from checkpoint_engine.loading.replay.geometry import UNITS, Copy, coalesced, whole_storage
from checkpoint_engine.loading.replay.memory import Slot

NamedTensors = list[tuple[str, torch.Tensor]]


class ReceivedBucket(NamedTuple):
    """A bucket as it came: the server's message, and the buffer that its tensors are in."""

    message: bytes
    buffer: torch.Tensor

    @property
    def digest(self) -> bytes:
        return digest_of(self.message)


def digest_of(message: bytes) -> bytes:
    """Stands for a bucket's message: the names, dtypes, shapes and places of its tensors."""
    return hashlib.blake2b(message, digest_size=16).digest()


class Placed(NamedTuple):
    """A tensor of a bucket: ``offset`` in bytes from the start of the buffer."""

    source: Source
    offset: int

    def in_buffer(self, buffer: torch.Tensor) -> torch.Tensor:
        end = self.offset + self.source.nbytes
        return buffer[self.offset : end].view(self.source.dtype).view(self.source.shape)


class Group(NamedTuple):
    """Tensors that lie in one buffer; ``key`` is the same for groups that lie alike."""

    key: Hashable
    buffer: torch.Tensor
    placed: list[Placed]


def groups_of(weights: NamedTensors, received: ReceivedBucket | None) -> list[Group]:
    """Where tensors lie: in the buffer that they were received in, or in storages of their own."""
    groups: dict[int, Group] = {}
    start = 0 if received is None else int(received.buffer.storage_offset())
    for name, tensor in weights:
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage()
        if storage._cdata not in groups:
            buffer = whole_storage(tensor, torch.uint8) if received is None else received.buffer
            groups[storage._cdata] = Group(None, buffer, [])
        source = Source(name, tensor.dtype, tuple(tensor.shape))
        offset = int(tensor.storage_offset()) * tensor.itemsize - start
        groups[storage._cdata].placed.append(Placed(source, offset))
    digest = None if received is None else received.digest
    return [group._replace(key=digest or tuple(group.placed)) for group in groups.values()]


@dataclass(eq=False)
class Move:
    """Copies between a bucket and one slot, in elements of ``dtype``, from the buffer's start.

    ``casts``: the dtypes that values are converted to in order, the slot's last; empty where bits
    are moved.
    """

    slot: Slot
    dtype: torch.dtype
    casts: tuple[torch.dtype, ...]
    copies: list[Copy]
    _targets: list[torch.Tensor] = field(default_factory=list)
    _table: fused_copies.Table | None = None

    @staticmethod
    def of(
        slot: Slot, dtype: torch.dtype, casts: tuple[torch.dtype, ...], copies: list[Copy]
    ) -> Move:
        """In as few copies as possible, and the largest units that fit where bits are moved."""
        copies = coalesced(copies)
        for size in () if casts else sorted(UNITS, reverse=True):
            times = size // dtype.itemsize
            units = [unit for copy in copies if times and (unit := copy.in_units(times))]
            if len(units) == len(copies):
                return Move(slot, UNITS[size], casts, units)
        return Move(slot, dtype, casts, copies)

    def sources(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """What it copies, of the dtype before the last."""
        flat = _flat(buffer, self.dtype)
        begin = flat.storage_offset()
        sources = [
            flat.as_strided(copy.sizes, copy.source_strides, begin + copy.source)
            for copy in self.copies
        ]
        for dtype in self.casts[:-1]:
            sources = [source.to(dtype) for source in sources]
        return sources

    def sources_as_written(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        return [source.to((self.dtype, *self.casts)[-1]) for source in self.sources(buffer)]

    def targets(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """Where it copies to, in the slot's memory."""
        storage = whole_storage(memory, (self.dtype, *self.casts)[-1])
        return [
            storage.as_strided(copy.sizes, copy.target_strides, copy.target) for copy in self.copies
        ]

    def execute(self, buffer: torch.Tensor, memory: torch.Tensor, stays: bool) -> None:
        """Copy; ``stays``: the slot's memory is the same in later updates."""
        if (
            not self.casts
            and self.dtype.itemsize in UNITS
            and fused_copies.fits(self.copies, buffer.device)
        ):
            if self._table is None:
                self._table = fused_copies.build_table(self.copies, buffer.device)
            flat = whole_storage(memory, self.dtype)
            return fused_copies.gather_scatter(flat, _flat(buffer, self.dtype), self._table)
        targets = self._targets or self.targets(memory)
        if stays:
            self._targets = targets
        if len(targets) == 1:
            targets[0].copy_(self.sources(buffer)[0])
        else:
            torch._foreach_copy_(targets, self.sources(buffer))


@dataclass(eq=False)
class ModulePart:
    """What a bucket has for one module; ``numel`` as the engine counts."""

    module: str
    moves: list[Move]
    nbytes: int
    numel: int


@dataclass(eq=False)
class Program:
    """What is done with a bucket.

    Attributes:
        tensors, nbytes: of the bucket.
        sources: its tensors that the recording knows.
        plain, unknown: its tensors that go through the engine's loader.
    """

    tensors: int
    nbytes: int
    parts: list[ModulePart]
    sources: frozenset[Source]
    plain: list[Placed]
    unknown: list[Placed]

    @property
    def moves(self) -> Iterator[Move]:
        return (move for part in self.parts for move in part.moves)


def _flat(buffer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As many elements of ``dtype`` as are in the buffer."""
    if buffer.storage_offset() % dtype.itemsize:  # no buffer of ours
        buffer = buffer.clone()
    return buffer[: buffer.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
