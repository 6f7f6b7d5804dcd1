"""P2P on one rank: its transfer engine, or the reason why it has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from loguru import logger

from checkpoint_engine.data_types import (
    ColumnCopy,
    DataToGather,
    Lease,
    MemoryBuffer,
    MemoryBufferMetas,
)
from checkpoint_engine.ground.local_rank import LocalRank
from checkpoint_engine.memory.checkpoints import Checkpoint
from checkpoint_engine.planning.columns import Columns, encode_parts

if TYPE_CHECKING:
    from checkpoint_engine.transfer.p2p_store import P2PStore


class P2P:
    """Owns this rank's ``P2PStore``.

    Attributes:
        store: ``None``: this rank neither reads by P2P nor lets others read. Programs written for
            the original set it to ``None``.
        missing: why there is no store.
        device: this rank's RDMA device; empty: P2P over TCP, or none.
        wanted_columns: what this host needed last of this rank's tensors with short rows, by name.
            Other hosts need as much in tensor parallelism: checkpoints are registered by it.
    """

    def __init__(self, here: LocalRank) -> None:
        self._here = here
        self.store: P2PStore | None = None
        self.missing = "it was switched off"
        self.device = ""
        self.wanted_columns: Mapping[str, Columns] = {}
        self._offered: dict[str, list[int]] = {}  # addresses that are registered for each place
        self._log = logger.bind(rank=here.rank)

    def require(self, wanted_by: str) -> P2PStore:
        """The store. Raises ``RuntimeError`` if there is none."""
        if self.store is None:
            raise RuntimeError(f"{wanted_by} needs P2P, and this rank has no P2P: {self.missing}")
        return self.store

    def offer(self, place: str, buffers: Sequence[MemoryBuffer]) -> Lease | None:
        """Let other ranks read a checkpoint; one that cannot be offered is still broadcast.

        Args:
            place: under which name the buffers are registered with the transfer engine, until
                ``withdraw``.
        """
        if self.store is None:
            return None
        try:
            pieces = _pieces(buffers)
            addresses = [piece.data_ptr() for piece in pieces]
            if self._offered.get(place) != addresses:
                self.withdraw(place)  # what an interrupted call left
                named = {f"{place}/{index}": piece for index, piece in enumerate(pieces)}
                self.store.register_named_tensors(named)
                self._offered[place] = addresses
            return self.store.grant()
        except RuntimeError as error:
            self._log.warning("{} cannot be read by P2P: {}", place, error)
            return None

    def revoke(self, lease: Lease) -> None:
        """From now on reads under ``lease`` fail. Called before the memory changes."""
        if self.store is not None:
            self.store.revoke(lease)

    def release_finished(self) -> None:
        """Let go of the memory of reads that were given up and are over by now."""
        if self.store is not None:
            self.store.release_finished()

    def withdraw(self, place: str) -> None:
        """Take the buffers of ``place`` back from the transfer engine. May be called again."""
        self._offered.pop(place, None)
        if self.store is not None:
            names = [one for one in self.store.names() if one.rpartition("/")[0] == place]
            self.store.unregister_named_tensors(names)

    def place(self, checkpoint: Checkpoint) -> DataToGather:
        """What this rank owns of a checkpoint, and how others read it."""
        owned = [
            MemoryBufferMetas(
                metas=b.metas, ptr=b.buffer.data_ptr(), size=b.size, checksums=b.checksums
            )
            for b in checkpoint.filled
        ]
        readable = self.store is not None and (checkpoint.lease is not None or not owned)
        return DataToGather(
            memory_buffer_metas_list=owned,
            p2p_store_addr=self.store.addr if self.store is not None and readable else None,
            rdma_device=self.device,
            host_ip=self._here.host_ip,
            device_uuid=self._here.device_uuid,
            lease=checkpoint.lease,
            column_copies=_column_copies(checkpoint) if readable else [],
        )


def _column_copies(checkpoint: Checkpoint) -> list[ColumnCopy]:
    lease = checkpoint.lease
    if lease is None:
        return []
    return [
        ColumnCopy(
            idx=one.index,
            ptr=one.memory.buffer.data_ptr(),
            size=one.memory.size,
            parts=encode_parts(one.parts),
            checksums=one.memory.checksums,
            lease=lease.id,
        )
        for one in checkpoint.columns
    ]


def _pieces(buffers: Sequence[MemoryBuffer]) -> list[torch.Tensor]:
    """The memory of ``buffers`` in as few pieces as it has: the transfer engine takes a millisecond
    for each, and the tensors of a file that was pinned in place are buffers of one mapping."""
    found: dict[int, tuple[torch.Tensor, int, int]] = {}
    for tensor in (one.buffer for one in buffers if one.buffer.nbytes):
        storage, start = tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())
        _, low, high = found.get(storage, (tensor, start, start))
        found[storage] = tensor, min(low, start), max(high, start + tensor.nbytes)
    return [one.as_strided((high - low,), (1,), low) for one, low, high in found.values()]
