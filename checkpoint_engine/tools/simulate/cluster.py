"""What a prediction starts from: the machines, and what work costs on them.

All rates are GB/s (10^9 bytes), all costs seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

GB = 1e9
_MAY_BE_ZERO = {"hop", "per_tensor", "per_tensor_once", "per_bucket", "per_update", "per_range"}
_MAY_BE_ZERO |= {"per_mapping"}


def _described(default: float | None, text: str) -> Any:
    """A field with what ``checkpoint-engine plan`` says of its option."""
    return field(default=default, metadata={"text": text})


class _Checked:
    """Raises ``ValueError`` naming the rates and costs that no machine has. ``None`` is none."""

    def __post_init__(self) -> None:
        wrong = {
            name: value
            for name, value in vars(self).items()
            if not (value is None or 0 < value < math.inf or (value == 0 and name in _MAY_BE_ZERO))
        }
        if wrong:
            raise ValueError(f"a rate must be positive, a cost not negative, both finite: {wrong}")


@dataclass(frozen=True)
class Cluster(_Checked):
    """Nodes that are all alike. The defaults are a node with eight H100 and a NIC for each."""

    nodes: int = 1
    gpus_per_node: int = 8
    nics_per_node: int = 8
    host_to_device: float = _described(55.0, "GB/s of pinned memory to one device (PCIe)")
    host_memory: float = _described(300.0, "GB/s of host memory to all devices of a node together")
    nvlink: float = _described(200.0, "GB/s of a broadcast within a node")
    peer_read: float = _described(370.0, "GB/s at which a device reads another's memory (NVLink)")
    nic: float = _described(45.0, "GB/s of one NIC, each way")
    device_memory: float = _described(1500.0, "GB/s of a copy within a device")
    hop: float = _described(20e-6, "seconds that each further node adds to a broadcast")

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def node_of(self, rank: int) -> int:
        return rank // self.gpus_per_node

    def nic_of(self, rank: int) -> str:
        """The name of a rank's NIC; ranks and NICs are paired in contiguous blocks."""
        place = rank % self.gpus_per_node
        return f"nic{place * self.nics_per_node // self.gpus_per_node}@node{self.node_of(rank)}"

    def broadcast(self, nodes: int) -> float:
        """The rate of a broadcast over ranks on so many nodes."""
        return self.nvlink if nodes <= 1 else min(self.nvlink, self.nic * self.nics_per_node)


@dataclass(frozen=True)
class Costs(_Checked):
    """What the software takes.

    Attributes:
        per_bucket: message, synchronisation and answer.
        per_update: plan, buffers, handshake, release, post hook; half of it before the first
            bucket.
        per_tensor_once: before the first bucket, and again after the last.
        per_mapping: for each worker and each buffer of its host; the driver maps one at a time,
            whoever asks.
        load: rate at which a worker takes its part out of a bucket; ``None``: the device memory's.
        check: ``None``: workers check no sums.
    """

    per_tensor: float = _described(
        60e-6, "seconds of the engine's loader for a tensor: 60e-6 for vLLM's, 5e-6 replayed"
    )
    per_bucket: float = _described(300e-6, "seconds between two buckets")
    # Measured on an H200 for a bucket of 256 MiB.
    check: float | None = _described(1400.0, "GB/s at which workers check the sums of a bucket")
    per_update: float = _described(0.01, "seconds of what happens once")
    per_tensor_once: float = _described(
        0.0, "seconds of a learned worker for a tensor, first and last, as 2.3e-6"
    )
    per_mapping: float = _described(1.1e-3, "seconds of each buffer that a worker of a host maps")
    per_range: float = _described(2e-6, "seconds of each range that is read by P2P: over TCP 1e-4")
    load: float | None = None
