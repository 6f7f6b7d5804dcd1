"""Files that must not outlive their process, and those that a killed one left behind.

Each has an owner that holds a lock on it (or on a file beside it). The kernel drops the lock when
the process ends, however it ends; the next process removes what is not locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def create_locked(folder: Path, prefix: str, suffix: str = "") -> tuple[Path, int]:
    """A new file that only this user can open, and its locked descriptor."""
    while True:
        path = folder / f"{prefix}{secrets.token_hex(8)}{suffix}"
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return path, fd
        os.close(fd)  # another process took it for stale just before it was locked


def stale_files(folder: Path, pattern: str) -> Iterator[Path]:
    """This user's files in ``folder`` that nobody holds any more; each is locked while it is
    yielded. Other users may have files of such names there, which they alone can remove."""
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if os.fstat(fd).st_uid == os.geteuid():
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    yield path
            finally:
                os.close(fd)
