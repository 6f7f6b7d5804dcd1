"""What a prediction starts from: the machines, and what work costs on them.

All rates are GB/s (10^9 bytes), all costs seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Cluster:
    """Nodes that are all alike. The defaults are a node with eight H100 and a NIC for each.

    Attributes:
        host_to_device: pinned memory to one device (PCIe).
        host_memory: what all devices of a node together can read of it.
        nvlink: a broadcast among the devices of one node.
        nic: one NIC, each way.
        device_memory: a copy within a device, counted once.
        hop: what each further node of a broadcast's ring adds before its last byte arrives.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    nics_per_node: int = 8
    host_to_device: float = 55.0
    host_memory: float = 300.0
    nvlink: float = 200.0
    nic: float = 45.0
    device_memory: float = 1500.0
    hop: float = 20e-6

    def __post_init__(self) -> None:
        _check_numbers(self, may_be_zero={"hop"})

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
class Costs:
    """What the software takes.

    Attributes:
        per_tensor: the engine's loader, for each tensor of a bucket.
        per_bucket: message, synchronisation and answer between two buckets.
        per_update: everything that happens once: plan, buffers, handshake, release, post hook.
        load: rate at which a worker takes its part out of a bucket; ``None``: the device memory's.
        check: rate at which a worker sums the bytes of a bucket; ``None``: it does not. The default
            was measured on an H200 for a bucket of 256 MiB.
    """

    per_tensor: float = 60e-6
    per_bucket: float = 300e-6
    per_update: float = 0.01
    load: float | None = None
    check: float | None = 1400.0

    def __post_init__(self) -> None:
        _check_numbers(self, may_be_zero={"per_tensor", "per_bucket", "per_update"})


def _check_numbers(described: Cluster | Costs, may_be_zero: set[str]) -> None:
    """Raises ``ValueError`` naming the rates and costs that no machine has. ``None`` is none."""
    wrong = {
        name: value
        for name, value in vars(described).items()
        if value is not None and not (0 < value < math.inf or (value == 0 and name in may_be_zero))
    }
    if wrong:
        raise ValueError(f"a rate must be positive, a cost not negative, both finite: {wrong}")
