"""Programs from PyPI in folders of the tests' own, so that their real files can be run."""

from __future__ import annotations

import functools
import io
import re
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]


def unpacked(requirement: str, folder: Path) -> Path:
    """What a wheel holds, without what it depends on; wheels for other machines will do, too."""
    wheel = ["--no-deps", "--only-binary", ":all:", "--implementation", "cp"]
    machine = ["--python-version", "3.11", "--platform", "manylinux_2_34_x86_64"]
    command = [*PIP, "download", *wheel, *machine, "-d", str(folder / "wheels"), requirement]
    subprocess.run(command, check=True, timeout=100)
    for path in (folder / "wheels").iterdir():
        with zipfile.ZipFile(path) as wheel_file:
            wheel_file.extractall(folder / "unpacked")
    return folder / "unpacked"


def installed(requirements: list[str], folder: Path) -> Path:
    """These packages, without what they depend on."""
    command = [*PIP, "install", "--no-deps", "--no-compile", "--target", str(folder), *requirements]
    subprocess.run(command, check=True, timeout=100)
    return folder


def our_entry_points(folder: Path) -> Path:
    """Metadata as that of the installed package, so that programs find our plug-ins."""
    about = folder / "checkpoint_engine-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: checkpoint-engine\nVersion: 0\n")
    lines: list[str] = []
    for line in (ROOT / "pyproject.toml").read_text().splitlines():
        if line.startswith('[project.entry-points."'):
            lines.append(line.replace("project.entry-points.", "").replace('"', ""))
        elif lines and lines[-1].startswith("[") and "=" in line:
            lines.append(line.replace('"', ""))
    (about / "entry_points.txt").write_text("\n".join(lines))
    return folder


class RemoteFile(io.RawIOBase):
    """A file on a web server, read by ranges."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.position = 0
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=20) as head:
            self.size = int(head.headers["Content-Length"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = start + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        end = min(self.position + len(buffer), self.size)
        if end <= self.position:
            return 0
        span = {"Range": f"bytes={self.position}-{end - 1}"}
        with urllib.request.urlopen(
            urllib.request.Request(self.url, headers=span), timeout=20
        ) as r:
            if r.status != 206:
                raise RuntimeError(f"the package index serves no ranges: status {r.status}")
            data = r.read()
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


@functools.cache
def _found_by_pip(project: str) -> str:
    """Where pip would download its releases from; pip says so only in its log."""
    command = [*PIP[:3], "index", "versions", project, "-vv", "--ignore-requires-python"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    return done.stdout + done.stderr


def some_files(project: str, release: str, names: Iterable[str], folder: Path) -> Path:
    """These files of a released wheel, or those that it has of them: a few ranges of it."""
    links = _found_by_pip(project)
    found = re.search(rf"Found link (\S+/{project}-{re.escape(release)}-\S+x86_64\.whl) ", links)
    if found is None:
        pytest.fail(
            f"pip found no wheel of {project} {release}. These tests need a package index: {links}"
        )
    try:
        with zipfile.ZipFile(io.BufferedReader(RemoteFile(found[1]), 1 << 18)) as wheel:
            for name in set(names) & set(wheel.namelist()):
                wheel.extract(name, folder)
    except OSError as error:
        pytest.fail(f"{found[1]} could not be read. These tests need the network: {error}")
    return folder
