"""What one rank holds and does at one moment, for services and status pages."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from checkpoint_engine.ground.local_rank import LocalRank
from checkpoint_engine.ground.progress import Progress
from checkpoint_engine.ground.report import LoadedCheckpoint
from checkpoint_engine.memory.checkpoints import Checkpoints
from checkpoint_engine.transfer.p2p import P2P
from checkpoint_engine.world.gathered import Gathered


class Described(BaseModel):
    """What a service tells: openapi.json has the text that stands below a field."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class HeldCheckpoint(Described):
    """A checkpoint in this rank's host memory."""

    name: str
    tensors: int
    bytes: int
    """Of pinned host memory on this rank."""


class KnownRank(Described):
    """A rank of the world, as the last gather found it."""

    rank: int
    nic: str
    """Its RDMA device and host; a stand-in for ranks without one."""
    tensors: int
    """That it owns of the checkpoint gathered last."""
    bytes: int
    p2p: str | None
    """Where its memory can be read."""


class Snapshot(Described):
    """One rank's server. Returned by ``ParameterServer.snapshot``."""

    rank: int
    world_size: int
    device: str = Field(examples=["cuda"])
    device_uuid: str
    nic: str | None
    """RDMA device; null: P2P over TCP, or none."""
    p2p: bool
    """Whether it reads, and lets others read, by P2P."""
    pinned_bytes: int
    """All host memory that checkpoints take on this rank."""
    retained_bytes: int
    """Host memory that is kept for later checkpoints."""
    served: LoadedCheckpoint | None
    """What this rank's engine holds; null: not known, or in part."""
    checkpoints: list[HeldCheckpoint]
    ranks: list[KnownRank]
    metas_loaded: bool
    """Whether `ranks` own what another world told, for P2P."""
    progress: Progress | None
    """Of the call that is running, if one is."""

    @staticmethod
    def of(
        here: LocalRank,
        p2p: P2P,
        checkpoints: Checkpoints,
        gathered: Gathered,
        served: LoadedCheckpoint | None,
        progress: Progress | None,
    ) -> Snapshot:
        # By address: checkpoints in the shared memory pool have the pool's buffers.
        buffers = {b.buffer.data_ptr(): b for held in checkpoints.by_name().values() for b in held}
        return Snapshot(
            rank=here.rank,
            world_size=here.world_size,
            device=here.device_manager.device_type,
            device_uuid=here.device_uuid,
            nic=p2p.device or None,
            p2p=p2p.store is not None,
            pinned_bytes=sum(buffer.size for buffer in buffers.values()),
            retained_bytes=checkpoints.memory.usage.retained,
            served=served,
            checkpoints=[
                HeldCheckpoint(name=one.name, tensors=one.tensor_count, bytes=one.nbytes)
                for one in checkpoints.all()
            ],
            ranks=_known_ranks(gathered),
            metas_loaded=gathered.is_loaded,
            progress=progress,
        )


def _known_ranks(gathered: Gathered) -> list[KnownRank]:
    nics = {rank: nic for nic, ranks in gathered.nics.items() for rank in ranks}
    found = []
    for rank in sorted(nics.keys() | gathered.metas.keys()):
        owned = gathered.metas.get(rank)
        buffers = [] if owned is None else owned.memory_buffer_metas_list
        tensors = sum(len(buffer.metas) for buffer in buffers)
        nbytes = sum(buffer.size for buffer in buffers)
        p2p = None if owned is None else owned.p2p_store_addr
        nic = nics.get(rank, "")
        found.append(KnownRank(rank=rank, nic=nic, tensors=tensors, bytes=nbytes, p2p=p2p))
    return found
