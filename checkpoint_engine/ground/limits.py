"""What this process may still take: host memory, of the machine and its cgroups; descriptors."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_RESERVE = 32  # descriptors; a zmq context and its sockets take 10
CGROUP_ROOT = "/sys/fs/cgroup"


def check_descriptors() -> None:
    """Raise ``RuntimeError`` unless some descriptors are left for libzmq, which aborts the whole
    process where it gets none."""
    held: list[int] = []
    try:
        while len(held) < _RESERVE:
            held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise RuntimeError(
            f"this process has only {len(held)} file descriptors left and needs {_RESERVE}: close "
            f"some, or raise its limit of {soft} (ulimit -n; at most {hard})"
        ) from error
    finally:
        for descriptor in held:
            os.close(descriptor)


def available_host_memory() -> tuple[int, str]:
    """Bytes that can still be allocated here, and the limit that says so."""
    limits = [(_mem_available(), "MemAvailable of /proc/meminfo")]
    with suppress(OSError):  # no cgroups here
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                limits += _cgroup_limits(Path(CGROUP_ROOT, line[4:]))
    return min(limits)


def check_available(nbytes: int) -> None:
    """Raises ``MemoryError`` if the host cannot give so much."""
    available, limit = available_host_memory()
    if nbytes > available:
        raise MemoryError(
            f"the checkpoint needs {nbytes} more bytes of host memory, but only {available} are "
            f"available ({limit}); unregister another checkpoint, or give this rank fewer tensors"
        )


def describe_limits() -> str:
    """For errors: what the host has left, and how much of it may be locked."""
    available, limit = available_host_memory()
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    locked = "unlimited" if memlock == resource.RLIM_INFINITY else f"{memlock} bytes"
    return f"available are {available} bytes ({limit}), RLIMIT_MEMLOCK is {locked}"


def _mem_available() -> int:
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    if found is None:
        raise RuntimeError("/proc/meminfo has no MemAvailable")
    return int(found.group(1)) * 1024


def _cgroup_limits(own: Path) -> Iterator[tuple[int, str]]:
    """What the limits of a cgroup and of those above it leave; file cache counts as free."""
    for group in (own, *own.parents):
        with suppress(FileNotFoundError):  # a group without this controller, or no group
            limit = (group / "memory.max").read_text().strip()
            if limit == "max":
                continue
            used = int((group / "memory.current").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cache = int(stat["active_file"]) + int(stat["inactive_file"])
            yield max(0, int(limit) - used + cache), f"{group}/memory.max"
