"""What one rank holds and does at one moment, for services and status pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from checkpoint_engine.data_types import MemoryBuffer
from checkpoint_engine.ground.local_rank import LocalRank
from checkpoint_engine.ground.progress import Progress
from checkpoint_engine.ground.report import LoadedCheckpoint
from checkpoint_engine.memory.checkpoints import Checkpoint
from checkpoint_engine.memory.host_memory import MemoryUsage
from checkpoint_engine.world.gathered import Gathered


@dataclass(frozen=True)
class Snapshot:
    """Returned by ``ParameterServer.snapshot``.

    Attributes:
        here: the rank and its device.
        has_p2p: whether it reads, and lets others read, by P2P.
        nic: its RDMA device; ``None``: P2P over TCP, or none.
        memory: bytes of host memory, for checkpoints and kept for later ones.
        buffers: the host buffers of each checkpoint, and of the pool.
        gathered: who owns what, as gathered or loaded last.
        served: what its engine holds; ``None``: not known, or partly written.
        progress: of the call that is running, if one is.
    """

    here: LocalRank
    has_p2p: bool
    nic: str | None
    memory: MemoryUsage
    checkpoints: Sequence[Checkpoint]
    buffers: Mapping[str, Sequence[MemoryBuffer]]
    gathered: Gathered
    served: LoadedCheckpoint | None
    progress: Progress | None
