"""Imported by the process that all ranks and workers are forked from: gives them a /dev/shm of
their own, small enough to be filled, which no other program sees."""

from __future__ import annotations

import ctypes
import os
import subprocess

_CLONE_NEWNS = 0x00020000
MEGABYTES = 96


def mount() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        raise PermissionError(
            f"these tests mount a small /dev/shm and need root: {os.strerror(ctypes.get_errno())}"
        )
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    options = f"size={MEGABYTES}m,mode=1777"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", "/dev/shm"], check=True)


if os.environ.get("FAULTS_SMALL_SHM") == "1":
    mount()
