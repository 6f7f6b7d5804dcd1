"""Folders in which nobody else may put, move or replace what this process puts there."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def check_private(folder: Path, users: Collection[int] = ()) -> None:
    """Raise unless only this user, root and ``users`` decide what lies in an existing folder.

    Others may add to a folder like ``/tmp``, whose sticky bit keeps them from what is not theirs.

    Raises:
        PermissionError: the folder, or the link that leads to it, belongs to another user, or
            others may write there; says what to do.
    """
    trusted = {os.geteuid(), 0, *users}
    found = folder.stat()
    for owner in (found.st_uid, folder.lstat().st_uid):
        if owner not in trusted:
            raise PermissionError(f"{folder} belongs to user {owner}: choose a folder of this user")
    if found.st_mode & _OTHERS_WRITE and not found.st_mode & stat.S_ISVTX:
        mode = stat.S_IMODE(found.st_mode)
        raise PermissionError(
            f"other users may write in {folder} (mode {mode:04o}): chmod go-w it, or choose a "
            "folder in it, which is made with mode 0700"
        )
