"""Programs from PyPI in folders of the tests' own, so that their real files can be run."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

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
