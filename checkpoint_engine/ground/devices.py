"""One table of devices: which torch module serves one, how it is named, how much memory it has
left."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from checkpoint_engine import settings
from checkpoint_engine.ground.limits import available_host_memory

_NO_TRAFFIC_TARGETS = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
SHARED_MEMORY_FOLDER = "/dev/shm"


def get_ip(towards: str | None = None) -> str:
    """This host's address on the interface that leads to ``towards`` (default: the default route).

    Only the routing table is asked; nothing is sent. Falls back to the loopback address.
    """
    targets: Sequence[tuple[int, str]] = _NO_TRAFFIC_TARGETS
    if towards is not None:
        with contextlib.suppress(OSError):
            infos = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)
            targets = tuple((info[0], str(info[4][0])) for info in infos)
    for family, host in targets:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    return "127.0.0.1"


def npu_generate_uuid() -> str:
    """``<host ip>-<chip number>`` of the NPU chip that this process runs on, as ``npu-smi``
    reports it.

    Raises:
        RuntimeError: no NPU of this host lists this process.
    """
    for npu in range(8):
        report = _processes_on(npu)
        found = re.search(rf"\b{os.getpid()}\b", report)
        if found is None:
            continue
        chips = re.search(r"Chip Count\D*(\d+)", report)
        chip = re.search(r"Chip ID\D*(\d+)", report[found.end() :])
        if chips is not None and chip is not None:
            return f"{get_ip()}-{npu * int(chips.group(1)) + int(chip.group(1))}"
    raise RuntimeError(f"npu-smi lists process {os.getpid()} on none of this host's NPUs")


def _processes_on(npu: int) -> str:
    command = ["npu-smi", "info", "-t", "proc-mem", "-i", str(npu)]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=30
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"npu-smi cannot be asked for this process's NPU: {error}") from error


def _host_id() -> str:
    """Names this host: the same in all its processes, another on any other host or hostname."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    machine = boot.read_text().strip() if boot.exists() else ""
    return hashlib.sha256(f"{machine}/{socket.gethostname()}".encode()).hexdigest()[:12]


def _cpus_of_pci_device(address: str, devices: str = "/sys/bus/pci/devices") -> set[int] | None:
    try:
        listed = Path(devices, address, "local_cpulist").read_text().strip()
    except OSError:
        return None
    cpus: set[int] = set()
    for part in filter(None, listed.split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus or None


class _Device(NamedTuple):
    """What differs between device types, and torch does not tell."""

    backend: str
    identity: Callable[[int], str]
    is_available: Callable[[], bool]


def _npu_is_available() -> bool:
    try:
        import torch_npu  # noqa: F401  (makes torch.npu)
    except ImportError:
        return False
    return bool(torch.npu.is_available())  # type: ignore[attr-defined]


def _cuda_identity(index: int) -> str:
    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"


_DEVICES = {
    "npu": _Device("hccl", lambda index: f"NPU-{npu_generate_uuid()}", _npu_is_available),
    "cuda": _Device("nccl", _cuda_identity, torch.cuda.is_available),
    "cpu": _Device("gloo", lambda index: f"CPU-{_host_id()}-{index}", lambda: True),
}
"""In the order in which one is chosen."""


def detect_device_type() -> str:
    """``PS_DEVICE`` if set, else the first of npu, cuda, cpu that this machine has.

    Raises:
        ValueError: ``PS_DEVICE`` names no known device.
    """
    available = (name for name, device in _DEVICES.items() if device.is_available())
    return settings.device() or next(available)


def _cpu_memory(device: object = None) -> tuple[int, int]:
    """Bytes of host memory: free, and of the machine."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(available_host_memory()[0], total), total


def _memory_for_files() -> list[tuple[int, str]]:
    """Of the cpu device: buffers are files in shared memory, and count as host memory."""
    available, limit = available_host_memory()
    room = shutil.disk_usage(SHARED_MEMORY_FOLDER).free
    return [(room, f"room in {SHARED_MEMORY_FOLDER}"), (available, f"host memory ({limit})")]


def _cpu_module() -> ModuleType:
    """``torch.cpu``, with what programs that free and measure memory call of other devices'
    modules. Not torch.cpu itself: in it, the whole process would see the two."""
    module = ModuleType(torch.cpu.__name__, torch.cpu.__doc__)
    more = {"empty_cache": lambda: None, "mem_get_info": _cpu_memory}
    vars(module).update(more, __getattr__=partial(getattr, torch.cpu))
    vars(module)["__dir__"] = lambda: sorted({*dir(torch.cpu), *more})
    return module


_CPU = _cpu_module()


class DeviceManager:
    """The device of this process. Servers and workers make one each.

    Attributes:
        device_type: ``"cuda"``, ``"cpu"`` or ``"npu"``.
        device_module: the torch module of that device, as ``torch.cuda``. On the cpu device a
            module that has all of ``torch.cpu``, and ``empty_cache`` and ``mem_get_info``, which
            torch.cpu itself is not given: other libraries ask it whether it has them.
    """

    def __init__(self, device_type: str | None = None) -> None:
        """``device_type``: default what ``detect_device_type`` finds."""
        self.device_type = detect_device_type() if device_type is None else device_type
        if self.device_type not in _DEVICES:
            raise ValueError(f"device type {self.device_type!r} is none of {sorted(_DEVICES)}")
        self._device = _DEVICES[self.device_type]
        if not self._device.is_available():
            raise RuntimeError(
                f"device type {self.device_type!r} is not available here: set PS_DEVICE to another "
                f"of {sorted(_DEVICES)}, or unset it to choose by what the machine has"
            )
        self.device_module: Any = getattr(torch, self.device_type) if self.is_accelerator else _CPU

    @property
    def backend(self) -> str:
        """The torch.distributed backend that moves this device's tensors."""
        return self._device.backend

    @property
    def is_accelerator(self) -> bool:
        """Whether device memory is apart from host memory, with streams and pinned copies."""
        return self.device_type != "cpu"

    def device(self, index: int) -> torch.device:
        """The torch device number ``index``; the cpu device has no numbers."""
        return torch.device(self.device_type, index) if self.is_accelerator else torch.device("cpu")

    def device_count(self) -> int:
        """Visible devices; on the cpu device ``LOCAL_WORLD_SIZE``, else 1."""
        if self.is_accelerator:
            return int(self.device_module.device_count())
        return settings.local_world_size()

    def identity(self, index: int) -> str:
        """The name under which server and worker of one device find each other."""
        return self._device.identity(index)

    def nearby_cpus(self, index: int) -> set[int] | None:
        """The processors on the NUMA node of device ``index``; ``None`` where nothing tells."""
        if self.device_type != "cuda":
            return None
        properties = self.device_module.get_device_properties(index)
        try:
            place = (properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id)
        except AttributeError:  # torch before 2.8
            return None
        return _cpus_of_pci_device("{:04x}:{:02x}:{:02x}.0".format(*place))

    def free_memory(self) -> int:
        """Bytes that new buffers on the current device could take."""
        if not self.is_accelerator:
            return min(_memory_for_files())[0]
        self.device_module.empty_cache()  # memory that torch caches and does not use
        return int(self.device_module.mem_get_info()[0])

    @property
    def scarcest_memory(self) -> str:
        """What bounds ``free_memory``, for errors."""
        return "device memory" if self.is_accelerator else min(_memory_for_files())[1]

    def at(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Around what works on ``device``: ``synchronize`` goes by a thread's current device."""
        return (
            self.device_module.device(device) if self.is_accelerator else contextlib.nullcontext()
        )

    def synchronize(self) -> None:
        """Wait for everything queued on the current device."""
        if self.is_accelerator:
            self.device_module.synchronize()

    def release_cached_memory(self) -> None:
        """Give freed device memory back to the driver, so that the engine can have it."""
        if self.is_accelerator:
            if hasattr(self.device_module, "ipc_collect"):
                self.device_module.ipc_collect()
            self.device_module.empty_cache()


def worker_index(device_type: str, local_rank: int) -> int:
    """The device index of an inference worker. On the cpu device ``PS_CPU_DEVICE_BASE`` shifts it,
    so that the workers of several engine instances on a host have different ones."""
    return local_rank + (settings.cpu_device_base() if device_type == "cpu" else 0)
