"""What one rank's service holds and does, for ``GET /v1/status``, the status page and the command
line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from checkpoint_engine import __version__
from checkpoint_engine.journal import Job, Journal
from checkpoint_engine.progress import Progress
from checkpoint_engine.report import Served

if TYPE_CHECKING:
    from checkpoint_engine.ps import ParameterServer


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Checkpoint(_Frozen):
    """A checkpoint in this rank's host memory."""

    name: str
    tensors: int
    bytes: int = Field(description="Of pinned host memory on this rank.")


class Rank(_Frozen):
    """A rank of the world, as the last gather found it."""

    rank: int
    nic: str = Field(description="Its RDMA device and host; a stand-in for ranks without one.")
    tensors: int = Field(description="That it owns of the checkpoint gathered last.")
    bytes: int
    p2p: str | None = Field(description="Where its memory can be read.")


class Status(_Frozen):
    """One rank's service."""

    version: str = Field(description="Of the library.")
    rank: int
    world_size: int
    device: str = Field(examples=["cuda"])
    device_uuid: str
    nic: str | None = Field(description="RDMA device; null: P2P over TCP, or none.")
    p2p: bool
    pinned_bytes: int = Field(description="All host memory that checkpoints take on this rank.")
    retained_bytes: int = Field(
        default=0, description="Host memory that is kept for later checkpoints."
    )
    served: Served | None = Field(
        default=None, description="What this rank's engine holds; null: not known, or in part."
    )
    checkpoints: list[Checkpoint]
    ranks: list[Rank]
    metas_loaded: bool = Field(
        default=False, description="Whether `ranks` own what another world told, for P2P."
    )
    progress: Progress | None = Field(description="Of the call that is running, if one is.")
    jobs: list[Job] = Field(description="Calls of this rank, the latest first.")


def status_of(ps: ParameterServer, journal: Journal) -> Status:
    """The state of ``ps`` now; never waits for a call that is running."""
    pool = ps.shared_memory_pool_name
    held = dict(ps._memory_pool)
    checkpoints = [
        Checkpoint(
            name=name,
            tensors=sum(len(buffer.metas) for buffer in buffers),
            bytes=sum(buffer.size for buffer in buffers),
        )
        for name, buffers in held.items()
        if name != pool
    ]
    memory = {buffer.buffer.data_ptr(): buffer.size for bs in held.values() for buffer in bs}
    return Status(
        version=__version__,
        rank=ps._rank,
        world_size=ps._world_size,
        device=ps.device_manager.device_type,
        device_uuid=ps._device_uuid,
        nic=ps._rdma_device,
        p2p=ps._p2p_store is not None,
        pinned_bytes=sum(memory.values()),
        retained_bytes=ps._host_memory.usage.retained,
        served=ps.served,
        checkpoints=checkpoints,
        ranks=_ranks(ps),
        metas_loaded=ps._metas_were_loaded,
        progress=ps.progress,
        jobs=journal.jobs(),
    )


def _ranks(ps: ParameterServer) -> list[Rank]:
    owners = ps.get_metas()
    nics = {rank: nic for nic, ranks in ps._local_rdma_devices.items() for rank in ranks}
    found = []
    for rank in sorted(nics.keys() | owners.keys()):
        owned = owners.get(rank)
        buffers = [] if owned is None else owned.memory_buffer_metas_list
        found.append(
            Rank(
                rank=rank,
                nic=nics.get(rank, ""),
                tensors=sum(len(buffer.metas) for buffer in buffers),
                bytes=sum(buffer.size for buffer in buffers),
                p2p=None if owned is None else owned.p2p_store_addr,
            )
        )
    return found
