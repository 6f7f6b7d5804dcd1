"""Every environment variable that this package reads: its default, and what it may be."""

from __future__ import annotations

import contextlib
import ipaddress
import math
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

GIB = 1 << 30
LONGEST_UPDATE = 30 * 86_400.0
"""Seconds; more than anybody waits for one."""
SHARED_MEMORY, GLOO = "shared-memory", "gloo"
AUTO, SHARD, GROUP = "auto", "shard", "group"

T = TypeVar("T")


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One environment variable. Call it to read it.

    Attributes:
        parse: makes a value of the text; ``ValueError`` or ``KeyError``: the text is not allowed.
        allowed: what the text may be, for the error.
    """

    name: str
    default: T
    parse: Callable[[str], T]
    allowed: str

    def __call__(self) -> T:
        """The value, or the default if the variable is not set.

        Raises:
            ValueError: its text is not allowed; names the variable, the text and what is allowed.
        """
        text = os.environ.get(self.name)
        if text is None:
            return self.default
        try:
            return self.parse(text)
        except (ValueError, KeyError):
            raise ValueError(f"{self.name} must be {self.allowed}, got {text!r}") from None


def _checked(parse: Callable[[str], T], is_allowed: Callable[[T], bool]) -> Callable[[str], T]:
    def checked(text: str) -> T:
        value = parse(text)
        if not is_allowed(value):
            raise ValueError
        return value

    return checked


def _one_of(name: str, default: T, *choices: str) -> Variable[T | str]:
    texts = {choice: choice for choice in choices}
    return Variable(name, default, texts.__getitem__, f"one of {', '.join(choices)}")


def _switch(name: str, default: bool) -> Variable[bool]:
    return Variable(name, default, {"": False, "0": False, "1": True}.__getitem__, "0 or 1")


def _count(name: str, default: int, least: int) -> Variable[int]:
    parse = _checked(int, lambda number: number >= least)
    return Variable(name, default, parse, f"an integer of at least {least}")


def _text(name: str) -> Variable[str]:
    return Variable(name, "", str, "text")


def _host(text: str) -> str:
    """A host's name or address; IPv6 addresses also in brackets, as in URLs."""
    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if host != text or ":" in host:
        ipaddress.IPv6Address(host)
    elif not re.fullmatch(r"[\w.-]+", host):
        raise ValueError
    return host


def _own_address(text: str) -> str:
    address = ipaddress.ip_address(text)
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family) as probe:
        try:
            probe.bind((text, 0))
        except OSError as error:
            raise ValueError(f"{text} is no address of this host") from error
    if address.is_unspecified:
        raise ValueError("it stands for all addresses")
    return str(address)


def _users(text: str) -> frozenset[int]:
    return frozenset(_user(uid) for uid in text.split(",") if uid.strip())


_positive = _checked(float, lambda number: 0 < number < math.inf)
_user = _checked(int, lambda uid: uid >= 0)
_port = _checked(int, lambda port: 0 < port < 65_535)

device = _one_of("PS_DEVICE", None, "cpu", "cuda", "npu")
cpu_device_base = _count("PS_CPU_DEVICE_BASE", 0, least=0)
local_world_size = _count("LOCAL_WORLD_SIZE", 1, least=1)
max_bucket_bytes = Variable(
    "PS_MAX_BUCKET_SIZE_GB", 8 * GIB, lambda text: int(_positive(text) * GIB), "a positive number"
)
mem_fraction = Variable("PS_MEM_FRACTION", 0.9, float, "a number in (0, 1]")
retain_host_memory = _switch("PS_RETAIN_HOST_MEMORY", True)
keeps_groups = _switch("PS_KEEP_GROUPS", True)  # making and destroying one takes 0.5 s on GPUs
shares_memory = _switch("PS_PEERS", True)
cpu_transport = _one_of("PS_CPU_TRANSPORT", SHARED_MEMORY, SHARED_MEMORY, GLOO)
transport = _one_of("PS_TRANSPORT", AUTO, AUTO, SHARD, GROUP)
copies_columns = _switch("PS_COLUMN_COPIES", False)  # they take pinned memory
checksum = _one_of("PS_CHECKSUM", "on", "on", "off")
skip_equal = _switch("PS_SKIP_EQUAL", False)
trace_folder = _text("PS_TRACE")
replay_mode = _one_of("PS_REPLAY", "on", "on", "off", "verify")
replay_check = _count("PS_REPLAY_CHECK", 50, least=1)
ipc_abstract = _switch("PS_IPC_ABSTRACT", False)
ipc_folder, runtime_folder = _text("PS_IPC_DIR"), _text("XDG_RUNTIME_DIR")
admitted_users: Variable[frozenset[int]] = Variable(
    "PS_IPC_UIDS", frozenset(), _users, "user ids, as numbers with commas"
)
http_token = _text("PS_HTTP_TOKEN")
engine_token = _text("PS_ENGINE_TOKEN")
metas_url = _text("PS_METAS_URL")
p2p = _one_of("PS_P2P", "on", "on", "off")
p2p_host = Variable("PS_P2P_HOST", None, _own_address, "an IP address of this host")
p2p_protocol = _one_of("PS_P2P_PROTOCOL", None, "rdma", "efa", "ascend_direct", "tcp")
rdma_devices, nccl_ib_hca = _text("PS_P2P_STORE_RDMA_DEVICES"), _text("NCCL_IB_HCA")
gloo_interface = _text("GLOO_SOCKET_IFNAME")
liveness_port = Variable("PS_LIVENESS_PORT", 0, _port, "a port from 1 to 65534")
master_addr = Variable("MASTER_ADDR", None, _host, "a host name or an IP address, without a port")
master_port = Variable(
    "MASTER_PORT", None, _port, "a port from 1 to 65534: the ranks meet at the next one"
)


_OF_SERVERS: tuple[Variable[Any], ...] = (
    max_bucket_bytes,
    retain_host_memory,
    keeps_groups,
    shares_memory,
    cpu_transport,
    transport,
    copies_columns,
    checksum,
    skip_equal,
    ipc_abstract,
    admitted_users,
    p2p,
    p2p_host,
    p2p_protocol,
    liveness_port,
)


def check_server() -> None:
    """Read all variables of a server once, so that a mistake shows before the first update.

    Raises:
        ValueError: one is not allowed.
    """
    for variable in _OF_SERVERS:
        variable()


def memory_share(given: float | None) -> float:
    """``given`` by the caller, or else ``PS_MEM_FRACTION``.

    Raises:
        ValueError: it is not in (0, 1].
    """
    share = mem_fraction() if given is None else given
    if not 0 < share <= 1:
        raise ValueError(f"mem_fraction ({mem_fraction.name}) must be in (0, 1], got {share}")
    return share


def integer(name: str, default: int) -> int:
    """One of the launcher's variables."""
    return Variable(name, default, int, "an integer")()


def from_launcher(value: int | None, name: str) -> int:
    """``value``, or else the launcher's environment variable.

    Raises:
        ValueError: neither is given, or the variable is no integer.
    """
    if value is None and name not in os.environ:
        raise ValueError(f"give {name.lower()}=, or set {name} as torchrun does")
    return integer(name, 0) if value is None else value


def set_unless_set(name: str, value: str) -> None:
    """For libraries that are loaded afterwards."""
    os.environ.setdefault(name, value)


def set_here(values: Mapping[str, str]) -> None:
    """For this process, if it serves nothing else, and for those that it starts."""
    os.environ.update(values)


@contextlib.contextmanager
def set_meanwhile(values: Mapping[str, str]) -> Iterator[None]:
    """For libraries that have no other options. Variables that the launcher has set to these values
    are left alone, so that nothing changes while other threads run."""
    before = {name: os.environ.get(name) for name in values}
    changed = [name for name, value in before.items() if value != values[name]]
    os.environ.update({name: values[name] for name in changed})
    try:
        yield
    finally:
        for name in changed:
            if (value := before[name]) is None:
                del os.environ[name]
            else:
                os.environ[name] = value
