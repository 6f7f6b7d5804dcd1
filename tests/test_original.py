"""Our two ends against those of the original's releases, on a CUDA device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchrun import free_port_pair

HERE = Path(__file__).parent
OURS = str(HERE.parent)
RELEASES = ["0.4.2", "0.2.0"]

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where each release was installed."""
    folder = tmp_path_factory.mktemp("originals")
    for release in RELEASES:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
        command += ["--target", str(folder / release), f"checkpoint-engine=={release}"]
        subprocess.run(command, check=True, timeout=50)
    return {release: str(folder / release) for release in RELEASES}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("side", ["server", "worker"])
def test_we_work_with_the_original(side: str, release: str, originals: dict[str, str]) -> None:
    """``side`` is the original's end; ours is the other."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    theirs = originals[release]
    server, worker = (theirs, OURS) if side == "server" else (OURS, theirs)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([server, *_dependencies()]),
        # 0.2.0's server wants a whole number; the others cut the tensors into many buckets.
        "PS_MAX_BUCKET_SIZE_GB": "1" if (side, release) == ("server", "0.2.0") else str(2**-10),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port_pair()),
    }
    path = os.pathsep.join([worker, *_dependencies()])
    command = [sys.executable, str(HERE / "original_programs.py"), "serve", path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=190)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


def _dependencies() -> list[str]:
    """What the path already leads to, without this project."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [path for path in given if path and Path(path).resolve() != Path(OURS)]
