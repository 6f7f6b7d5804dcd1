"""A network and a /dev/shm that no other program sees. Both need root.

Imported by the process that all ranks and workers are forked from: gives them a /dev/shm small
enough to be filled.
"""

from __future__ import annotations

import ctypes
import os
import subprocess

_CLONE_NEWNS = 0x00020000
_CLONE_NEWNET = 0x40000000
MEGABYTES = 96


def enter_network() -> None:
    """For this thread and what it starts from now on. Mooncake takes its ports at random: a dead
    rank had one that a rank of another program took anew."""
    _unshare(_CLONE_NEWNET, "have a network of their own")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def mount() -> None:
    _unshare(_CLONE_NEWNS, "mount a small /dev/shm")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    options = f"size={MEGABYTES}m,mode=1777"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", "/dev/shm"], check=True)


def _unshare(kind: int, what: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(kind) != 0:
        why = os.strerror(ctypes.get_errno())
        raise PermissionError(f"these tests {what} and need root: {why}")


if os.environ.get("FAULTS_SMALL_SHM") == "1":
    mount()
