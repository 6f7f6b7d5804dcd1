"""What one rank's service holds and does, for ``GET /v1/status``, the status page and the command
line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from checkpoint_engine import __version__
from checkpoint_engine.progress import Progress
from checkpoint_engine.report import Served
from checkpoint_engine.service.journal import Job, Journal

if TYPE_CHECKING:
    from checkpoint_engine.ps import ParameterServer
    from checkpoint_engine.world.gathered import Gathered


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
    now = ps.snapshot()
    memory = {b.buffer.data_ptr(): b.size for buffers in now.buffers.values() for b in buffers}
    return Status(
        version=__version__,
        rank=now.here.rank,
        world_size=now.here.world_size,
        device=now.here.device_manager.device_type,
        device_uuid=now.here.device_uuid,
        nic=now.nic,
        p2p=now.has_p2p,
        pinned_bytes=sum(memory.values()),
        retained_bytes=now.memory.retained,
        served=now.served,
        checkpoints=[
            Checkpoint(name=one.name, tensors=one.tensor_count, bytes=one.nbytes)
            for one in now.checkpoints
        ],
        ranks=_ranks(now.gathered),
        metas_loaded=now.gathered.is_loaded,
        progress=now.progress,
        jobs=journal.jobs(),
    )


def _ranks(gathered: Gathered) -> list[Rank]:
    owners = gathered.metas
    nics = {rank: nic for nic, ranks in gathered.nics.items() for rank in ranks}
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
