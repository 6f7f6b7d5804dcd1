"""Starts a program of ``programs.py`` under torchrun and collects what its ranks wrote."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def free_port_pair() -> int:
    """A port that is free and whose successor is: torchrun's store takes one, the servers the
    other."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def torchrun(
    tmp_path: Path,
    ranks: int,
    program: str,
    timeout: float = 50,
    env: dict[str, str] | None = None,
    **arguments: Any,
) -> list[dict[str, Any]]:
    """Every rank's result, in rank order. Fails with the whole output if a rank fails."""
    sockets, results = tmp_path / "sockets", tmp_path / "results"
    sockets.mkdir(mode=0o700, exist_ok=True)
    results.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += [f"--nproc-per-node={ranks}", f"--master-port={free_port_pair()}"]
    command += [str(HERE / "programs.py"), program, json.dumps(arguments), str(results)]
    environment = {
        **os.environ,
        "PS_IPC_DIR": str(sockets),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), *_python_path()]),
        **(env or {}),
    }
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{program} took more than {timeout} s:\n{output[-8000:]}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"{program} failed:\n{output[-8000:]}"
    return [json.loads((results / f"{rank}.json").read_text()) for rank in range(ranks)]
