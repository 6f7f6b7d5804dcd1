"""The main job with the parameter servers as actors of a real Ray, into the example engine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from checkpoint_engine.ground.deadline import Deadline, poll  # noqa: E402
from demo import TP, Engine  # noqa: E402
from random_checkpoint import expected_digests, model_config, write_checkpoint  # noqa: E402

pytest.importorskip("ray", reason="the Ray example needs ray")

MISLEADING = {"RANK": "7", "WORLD_SIZE": "9", "LOCAL_WORLD_SIZE": "3", "MASTER_PORT": "1"}
"""Actors inherit what is around Ray; the servers must not look at it."""

PRIVATE = {"RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """With a short path: Ray puts sockets below it."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        yield Path(folder)


def processes_of(value: str) -> list[str]:
    """What still runs with ``value`` in its environment or on its command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            texts = [(process / name).read_bytes() for name in ("environ", "cmdline")]
        except OSError:
            continue
        if any(value.encode() in text for text in texts):
            found.append(texts[1].decode(errors="replace").replace("\0", " "))
    return found


@pytest.mark.timeout(120)
def test_actors_update_an_engine(
    tmp_path: Path, ray_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "checkpoint"
    write_checkpoint(checkpoint, model_config("small"), seed=3)
    sockets = tmp_path / "sockets"
    sockets.mkdir(mode=0o700)
    monkeypatch.setenv("PS_IPC_DIR", str(sockets))
    monkeypatch.setenv("PS_DEVICE", "cpu")
    repository = str(EXAMPLES.parent)
    python_path = os.pathsep.join(filter(None, [repository, os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", python_path)
    with Engine(checkpoint, "dummy") as engine:
        engine.wait_until_healthy()
        assert engine.call_workers("weights_digest") != expected_digests(checkpoint, TP)
        run = subprocess.run(
            [
                sys.executable,
                str(EXAMPLES / "ray_update.py"),
                f"--checkpoint-path={checkpoint}",
                f"--endpoint={engine.url}",
                f"--inference-parallel-size={TP}",
                f"--servers-per-node={TP}",
                f"--ray-temp-dir={ray_folder}",
            ],
            env={
                **os.environ,
                **MISLEADING,
                "HOME": str(ray_folder),
                "RAY_USAGE_STATS_ENABLED": "0",
            },
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        assert engine.call_workers("weights_digest") == expected_digests(checkpoint, TP)
    assert "sent 0.0" in run.stdout
    assert list(sockets.iterdir()) == []
    soon = Deadline(10.0)  # Ray ends its processes, and does not wait for their end
    poll(lambda: not processes_of(str(ray_folder)), lambda: soon.check("Ray's processes to end"))
