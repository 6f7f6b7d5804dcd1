"""Benchmarks run, at a small size. What they measure is nobody's business here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("program", "options", "prints"),
    [
        (
            "import limits, update; limits.measure.__defaults__ = (64 << 20,); update.main()",
            ["--shapes", "small", "--repeats", "1"],
            r"^update +0\.340 GB",
        ),
        (
            "import update; update.layer_shapes = update.small_layer; "
            "import overhead; overhead.main()",
            ["--pairs", "2"],
            r"^update .* 2 pairs$",
        ),
    ],
    ids=["update", "overhead"],
)
def test_a_benchmark_runs(program: str, options: list[str], prints: str) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    environment = {**os.environ, "PS_DEVICE": "cpu", "PYTHONPATH": path}
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(variable, None)
    command = [sys.executable, "-c", program, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(prints, done.stdout, re.MULTILINE), done.stdout
