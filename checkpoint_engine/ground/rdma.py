"""Which RDMA NICs this machine has, which of them may be used, and which one a rank uses.

Nothing here logs: every function returns its findings, one text each, for its caller to report.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loguru import logger

from checkpoint_engine import settings

MAX_DEVICES = 32
"""NCCL looks at no more than this many devices, and neither do we."""

SYSFS = "/sys/class/infiniband"
EFA_VENDOR = "0x1d0f"
"""Amazon's PCI vendor id."""

DEVICES_VARIABLE = settings.rdma_devices.name
HCA_VARIABLE = settings.nccl_ib_hca.name

_ADVICE = (
    f"set {DEVICES_VARIABLE} (a comma-separated list) or {HCA_VARIABLE} so that the number of RDMA "
    "devices divides the number of GPUs per node or is a multiple of it"
)


def list_devices() -> tuple[list[str], list[str]]:
    """The names of the RDMA devices that libibverbs sees, and findings.

    A machine without the library has no usable device; the finding says what to install.
    """
    try:
        verbs = _load_verbs()
    except OSError as error:
        return [], [f"no RDMA devices: {error}; on Debian and Ubuntu install libibverbs1"]
    count = ctypes.c_int(0)
    # NULL where the kernel has no RDMA support: the same as no device.
    devices = verbs.ibv_get_device_list(ctypes.byref(count))
    if not devices:
        return [], []
    try:
        return [verbs.ibv_get_device_name(devices[i]).decode() for i in range(count.value)], []
    finally:
        verbs.ibv_free_device_list(devices)


def _load_verbs() -> ctypes.CDLL:
    verbs = ctypes.CDLL("libibverbs.so.1", use_errno=True)
    verbs.ibv_get_device_list.argtypes = [ctypes.POINTER(ctypes.c_int)]
    verbs.ibv_get_device_list.restype = ctypes.POINTER(ctypes.c_void_p)
    verbs.ibv_get_device_name.argtypes = [ctypes.c_void_p]
    verbs.ibv_get_device_name.restype = ctypes.c_char_p
    verbs.ibv_free_device_list.argtypes = [ctypes.POINTER(ctypes.c_void_p)]
    verbs.ibv_free_device_list.restype = None
    return verbs


def select_devices(available: Sequence[str]) -> tuple[list[str], list[str]]:
    """The devices that the environment asks for, and findings.

    ``PS_P2P_STORE_RDMA_DEVICES`` is taken literally, in its order. Else ``NCCL_IB_HCA`` filters
    ``available``; where it matches nothing, or nothing is asked for, all of them are used.
    """
    if named := _split(settings.rdma_devices()):
        return named, []
    devices, findings = parse_hca(settings.nccl_ib_hca(), available)
    return devices or list(available), findings


def selected_devices() -> list[str]:
    """This machine's devices that the environment asks for. Findings are logged."""
    available, missing = list_devices()
    devices, findings = select_devices(available)
    for finding in missing:
        logger.debug(finding)
    for finding in findings:
        logger.warning(finding)
    return devices


def usable_devices(devices: Sequence[str], sysfs: str = SYSFS) -> tuple[list[str], list[str]]:
    """Those of ``devices`` that have an active port with an address, and findings on the others.

    A device that the kernel does not describe below ``sysfs`` is taken as usable.
    """
    usable, findings = [], []
    for device in devices:
        ports = sorted(Path(sysfs, device, "ports").glob("*"))
        problems = [problem for port in ports if (problem := _port_problem(port))]
        if ports and len(problems) == len(ports):
            findings.append(f"RDMA device {device} is not used: {', '.join(problems)}")
        else:
            usable.append(device)
    return usable, findings


def _port_problem(port: Path) -> str:
    """Why a port cannot be used; empty if it can."""
    state = (port / "state").read_text().strip()
    if "ACTIVE" not in state:
        return f"port {port.name} is {state}"
    gids = [gid for path in port.glob("gids/*") if (gid := _read_gid(path))]
    if gids and not any(gid.strip("0:") for gid in gids):
        return f"port {port.name} has no GID"
    return ""


def _read_gid(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # how some drivers say that an entry is empty
        return "0"


def with_stand_ins(devices: Sequence[str], usable: Sequence[str], gpu_count: int) -> list[str]:
    """What ``device_for_rank`` may choose from: ``usable``, if it can be paired with the node's
    GPUs evenly; else ``devices``, with a usable one in the place of each that is not."""
    if _is_even(len(usable), gpu_count) or not _is_even(len(devices), gpu_count):
        return list(usable)
    return [
        device if device in usable else usable[place % len(usable)]
        for place, device in enumerate(devices)
    ]


def _is_even(count: int, gpu_count: int) -> bool:
    return count > 0 and (gpu_count % count == 0 or count % gpu_count == 0)


def is_efa(devices: Sequence[str], sysfs: str = SYSFS) -> bool:
    """Whether these are AWS's Elastic Fabric Adapters, by their PCI vendor."""
    vendors = [Path(sysfs, device, "device", "vendor") for device in devices]
    return any(path.exists() and path.read_text().strip() == EFA_VENDOR for path in vendors)


def parse_hca(value: str, available: Sequence[str]) -> tuple[list[str], list[str]]:
    """The devices of ``available`` that a value of ``NCCL_IB_HCA`` selects, and findings.

    The syntax is NCCL's: a comma-separated list of name prefixes; a leading ``=`` asks for exact
    names, ``^`` for all but those named, ``^=`` for both; a port after ``:`` is ignored. Selected
    devices come in natural order (mlx5_2 before mlx5_10), the rest of an exclusion in the order of
    ``available``; at most ``MAX_DEVICES``. Each name that matches nothing is a finding.

    https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html#nccl-ib-hca
    """
    value = value.strip()
    if not value:
        return list(available[:MAX_DEVICES]), []
    exclude, value = value.startswith("^"), value.removeprefix("^")
    exact, value = value.startswith("="), value.removeprefix("=")
    matched, findings = _match(_split(value), available, exact)
    if exclude:
        devices = [device for device in available if device not in matched]
    else:
        devices = sorted(matched, key=_natural_key)
    return devices[:MAX_DEVICES], findings


def device_for_rank(local_rank: int, gpu_count: int, devices: Sequence[str]) -> str:
    """The device of one rank: ranks and devices are paired in contiguous blocks.

    With more devices than ranks per node a rank gets several, comma-joined.

    Raises:
        RuntimeError: there is no device.
        ValueError: ``local_rank`` is not one of the node's ``gpu_count`` ranks.
        AssertionError: the blocks do not come out even (callers of the original catch this type).
    """
    count = len(devices)
    if count == 0:
        raise RuntimeError("no rdma devices found")
    if not 0 <= local_rank < gpu_count:
        raise ValueError(f"local rank {local_rank} is not one of the node's {gpu_count} ranks")
    if not _is_even(count, gpu_count):
        raise AssertionError(
            f"of rdma devices count {count} and gpu count {gpu_count}, the larger should be "
            f"divisible by the smaller: {_ADVICE}"
        )
    first = local_rank * count // gpu_count
    mine = devices[first : first + max(1, count // gpu_count)]
    return ",".join(dict.fromkeys(mine))  # a stand-in may be there twice


def _split(value: str) -> list[str]:
    return [name for part in value.split(",") if (name := part.strip())]


def _match(
    names: Sequence[str], available: Sequence[str], exact: bool
) -> tuple[set[str], list[str]]:
    matched: set[str] = set()
    findings = []
    for name in (name.split(":")[0].strip() for name in names):
        hits = {d for d in available if (d == name if exact else d.startswith(name))}
        matched |= hits
        if not hits:
            findings.append(
                f"No RDMA device match device_name={name!r} where is_exact_match={exact}."
            )
    return matched, findings


def _natural_key(name: str) -> list[str | int]:
    pieces = re.split(r"(\d+)", name)
    return [int(piece) if place % 2 else piece for place, piece in enumerate(pieces)]


def names_for(module: Mapping[str, Any]) -> tuple[Callable, Callable, Callable, Callable]:
    """``_ibv_get_device_list``, ``_get_rdma_devices``, ``_parse_NCCL_IB_HCA`` and
    ``_get_my_rdma_device`` for one of the original's modules.

    Args:
        module: its ``globals()``. Its callers patch ``logger`` and ``_ibv_get_device_list``
            there, so both are looked up in it at every call.
    """

    def report(devices: list[str], findings: list[str], level: str = "warning") -> list[str]:
        for finding in findings:
            getattr(module["logger"], level)(finding)
        return devices

    return (
        lambda: report(*list_devices(), level="debug"),
        lambda: report(*select_devices(module["_ibv_get_device_list"]())),
        lambda value, available_devices: report(*parse_hca(value, available_devices)),
        device_for_rank,
    )
