"""What an update needs to know of the rank that it runs on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from checkpoint_engine.device_utils import DeviceManager


@dataclass(frozen=True)
class LocalRank:
    """One rank and its device.

    Attributes:
        rank: its number in the world.
        local_rank: its number on its host, and of its device.
        gpu_count: ranks per host.
        device_uuid: identity of its device, which its worker looks for.
        host_ip: where hosts of other worlds reach it.
        group_ip: where the ranks of this world reach it.
        mem_fraction: share of free device memory that the buffers of an update may take.
    """

    rank: int
    world_size: int
    local_rank: int
    gpu_count: int
    device_manager: DeviceManager
    device_uuid: str
    host_ip: str
    group_ip: str
    mem_fraction: float

    @property
    def device(self) -> torch.device:
        return self.device_manager.device(self.local_rank)

    def make_device_current(self) -> None:
        """Each thread has a current device of its own."""
        if self.device_manager.is_accelerator:
            self.device_manager.device_module.set_device(self.local_rank)

    def spare_memory(self) -> int:
        """Bytes that buffers may take; the ranks of a host share the memory of the cpu device."""
        sharers = 1 if self.device_manager.is_accelerator else self.gpu_count
        return int(self.device_manager.free_memory() // sharers * self.mem_fraction)
