"""Folders in which nobody else may put, move or replace what this process puts there."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Collection
from pathlib import Path


def check_private(folder: Path, users: Collection[int] = ()) -> None:
    """Raise ``PermissionError`` unless only this user, root and ``users`` decide what lies in an
    existing folder. The link that leads to it counts, too. Others may add to a folder like
    ``/tmp``, whose sticky bit keeps them from what is not theirs."""
    trusted = {os.geteuid(), 0, *users}
    found = folder.stat()
    for owner in (found.st_uid, folder.lstat().st_uid):
        if owner not in trusted:
            raise PermissionError(f"{folder} belongs to user {owner}: choose a folder of this user")
    shared = 0 if _is_of_one_user(found.st_gid) else stat.S_IWGRP
    if found.st_mode & (shared | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
        mode = stat.S_IMODE(found.st_mode)
        raise PermissionError(
            f"other users may write in {folder} (mode {mode:04o}): chmod go-w it, or choose a "
            "folder in it, which is made with mode 0700"
        )


def _is_of_one_user(group: int) -> bool:
    """Many systems give each user a group of the same name, and let it write by default."""
    if group == os.geteuid():
        return True
    try:
        return grp.getgrgid(group).gr_name == pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False
