"""Starts a program of ``programs.py`` under torchrun and collects what its ranks wrote."""

from __future__ import annotations

import contextlib
import json
import os
import random
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
    other. From below those that the kernel gives to connections, and above Mooncake's."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000, 2)
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


MOONCAKE_ADVICE = "P2P tests need Mooncake and Debian's libibverbs1 and libnuma1"


def mooncake_works() -> bool:
    """Whether its shared library loads here."""
    try:
        import mooncake.engine  # noqa: F401
    except ImportError:
        return False
    return True


class Run:
    """A program under torchrun that is running."""

    def __init__(
        self,
        tmp_path: Path,
        ranks: int,
        program: str,
        env: dict[str, str] | None = None,
        script: str = "programs.py",
        **arguments: Any,
    ) -> None:
        self._program = program
        self._ranks = ranks
        self._results = tmp_path / "results"
        self._results.mkdir(parents=True, exist_ok=True)
        sockets = tmp_path / "sockets"
        sockets.mkdir(mode=0o700, exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run"]
        command += [f"--nproc-per-node={ranks}", f"--master-port={free_port_pair()}"]
        command += [str(HERE / script), program, json.dumps(arguments), str(self._results)]
        environment = {
            **os.environ,
            "PS_IPC_DIR": str(sockets),
            "OMP_NUM_THREADS": "1",
            "RES_OPTIONS": "timeout:1 attempts:1",  # torch looks up ::ffff:127.0.0.1
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), *_python_path()]),
            **(env or {}),
        }
        self._output = tmp_path / "output"  # not a pipe, which nobody might read
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, timeout: float = 50) -> list[dict[str, Any]]:
        """Every rank's result, in rank order. Fails with the whole output if a rank fails."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self._program} took too long:\n{self.output()}") from None
        finally:
            self.kill()
        assert code == 0, f"{self._program} failed:\n{self.output()}"
        return [
            json.loads((self._results / f"{rank}.json").read_text()) for rank in range(self._ranks)
        ]

    def is_running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """All its processes, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def output(self) -> str:
        """The end of what all ranks printed."""
        return self._output.read_text(errors="replace")[-8000:]


def torchrun(
    tmp_path: Path,
    ranks: int,
    program: str,
    timeout: float = 50,
    env: dict[str, str] | None = None,
    **arguments: Any,
) -> list[dict[str, Any]]:
    """Run a program to its end; see ``Run.wait``."""
    return Run(tmp_path, ranks, program, env, **arguments).wait(timeout)
