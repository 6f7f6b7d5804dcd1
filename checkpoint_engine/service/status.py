"""What one rank's service holds and does, for ``GET /v1/status``, the status page and the command
line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from checkpoint_engine import __version__
from checkpoint_engine.ground.progress import Progress
from checkpoint_engine.ground.report import LoadedCheckpoint
from checkpoint_engine.service.journal import Job
from checkpoint_engine.service.problems import Described

if TYPE_CHECKING:
    from checkpoint_engine.update.snapshot import Snapshot
    from checkpoint_engine.world.gathered import Gathered


class Checkpoint(Described):
    """A checkpoint in this rank's host memory."""

    name: str
    tensors: int
    bytes: int
    """Of pinned host memory on this rank."""


class Rank(Described):
    """A rank of the world, as the last gather found it."""

    rank: int
    nic: str
    """Its RDMA device and host; a stand-in for ranks without one."""
    tensors: int
    """That it owns of the checkpoint gathered last."""
    bytes: int
    p2p: str | None
    """Where its memory can be read."""


class Status(Described):
    """One rank's service."""

    version: str
    """Of the library."""
    rank: int
    world_size: int
    device: str = Field(examples=["cuda"])
    device_uuid: str
    nic: str | None
    """RDMA device; null: P2P over TCP, or none."""
    p2p: bool
    pinned_bytes: int
    """All host memory that checkpoints take on this rank."""
    retained_bytes: int = 0
    """Host memory that is kept for later checkpoints."""
    served: LoadedCheckpoint | None = None
    """What this rank's engine holds; null: not known, or in part."""
    checkpoints: list[Checkpoint]
    ranks: list[Rank]
    metas_loaded: bool = False
    """Whether `ranks` own what another world told, for P2P."""
    progress: Progress | None
    """Of the call that is running, if one is."""
    jobs: list[Job]
    """Calls of this rank, the latest first."""


def status_of(now: Snapshot, jobs: list[Job]) -> Status:
    """What a server's snapshot and its service's journal say."""
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
        jobs=jobs,
    )


def _ranks(gathered: Gathered) -> list[Rank]:
    nics = {rank: nic for nic, ranks in gathered.nics.items() for rank in ranks}
    found = []
    for rank in sorted(nics.keys() | gathered.metas.keys()):
        owned = gathered.metas.get(rank)
        buffers = [] if owned is None else owned.memory_buffer_metas_list
        tensors = sum(len(buffer.metas) for buffer in buffers)
        nbytes = sum(buffer.size for buffer in buffers)
        p2p = None if owned is None else owned.p2p_store_addr
        found.append(
            Rank(rank=rank, nic=nics.get(rank, ""), tensors=tensors, bytes=nbytes, p2p=p2p)
        )
    return found
