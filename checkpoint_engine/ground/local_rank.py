"""What an update needs to know of the rank that it runs on."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from loguru import logger

from checkpoint_engine import settings
from checkpoint_engine.ground import rdma
from checkpoint_engine.ground.devices import DeviceManager
from checkpoint_engine.ground.limits import available_host_memory


@dataclass(frozen=True)
class LocalRank:
    """One rank and its device.

    Attributes:
        rank: its number in the world.
        local_rank: its number on its host, and of its device.
        gpu_count: ranks per host.
        device_uuid: identity of its device, which its worker looks for.
        mem_fraction: share of free device memory that the buffers of an update may take.
        host_ip: where hosts of other worlds reach it.
        group_ip: where the ranks of this world reach it.
    """

    rank: int
    world_size: int
    local_rank: int
    gpu_count: int
    device_manager: DeviceManager
    device_uuid: str
    mem_fraction: float
    host_ip: str = ""
    group_ip: str = ""

    @property
    def device(self) -> torch.device:
        return self.device_manager.device(self.local_rank)

    @property
    def draws_bars(self) -> bool:
        """Whether this rank shows a bar where the caller watches nothing."""
        return self.local_rank == 0 and sys.stderr.isatty()

    def make_device_current(self) -> None:
        """Each thread has a current device of its own."""
        if self.device_manager.is_accelerator:
            self.device_manager.device_module.set_device(self.local_rank)

    def choose_nic(self, devices: list[str]) -> str:
        """Of the machine's RDMA NICs, this rank's; empty where none can be used."""
        usable, findings = rdma.usable_devices(devices)
        for finding in findings:
            logger.warning(finding)
        if not usable:
            return ""
        choice = rdma.with_stand_ins(devices, usable, self.gpu_count)
        return rdma.device_for_rank(self.local_rank, self.gpu_count, choice)

    def spare_memory(self) -> int:
        """Bytes that buffers may take; the ranks of a host share the memory of the cpu device."""
        sharers = 1 if self.device_manager.is_accelerator else self.gpu_count
        return int(self.device_manager.free_memory() // sharers * self.mem_fraction)

    def spare_beside(self, spare: int) -> int:
        """Bytes that buffers of up to ``spare`` bytes and other tensors of the worker may take. On
        the cpu device only buffers have to be in shared memory."""
        if self.device_manager.is_accelerator:
            return spare
        return int(available_host_memory()[0] // self.gpu_count * self.mem_fraction)


def find_local_rank(
    rank: int | None, world_size: int | None, gpu_count: int | None, mem_fraction: float | None
) -> LocalRank:
    """From arguments, else from the launcher's environment; nothing is connected.

    Raises:
        ValueError: a value is missing or out of range.
    """
    settings.check_server()
    rank = settings.from_launcher(rank, "RANK")
    world_size = settings.from_launcher(world_size, "WORLD_SIZE")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a world of {world_size}")
    device_manager = DeviceManager()
    gpu_count = device_manager.device_count() if gpu_count is None else gpu_count
    if gpu_count < 1:
        raise ValueError(f"gpu_count must be at least 1, got {gpu_count}")
    return LocalRank(
        rank,
        world_size,
        local_rank=rank % gpu_count,
        gpu_count=gpu_count,
        device_manager=device_manager,
        device_uuid=device_manager.identity(rank % gpu_count),
        mem_fraction=settings.memory_share(mem_fraction),
    )
