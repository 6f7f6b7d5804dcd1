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
    ("script", "options", "prints"),
    [
        ("update.py", ["--layers", "1", "--repeats", "1"], r"^update +1\.246 GB"),
        ("overhead.py", ["--layers", "1", "--pairs", "2"], r"^update .* 2 pairs$"),
    ],
)
def test_a_benchmark_runs(script: str, options: list[str], prints: str) -> None:
    environment = {**os.environ, "PS_DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(variable, None)
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(prints, done.stdout, re.MULTILINE), done.stdout
