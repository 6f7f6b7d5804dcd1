"""Starts a program of ``programs.py`` on ranks and collects what they wrote."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def free_port_pair() -> int:
    """A port that is free and whose successor is: torchrun's store takes one, the servers the
    other. From below those that the kernel gives to connections, and above Mooncake's. pytest's
    processes that run side by side have ports of their own."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    share = 12_000 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) // 2 * 2
    lowest = 20_000 + number * share
    while True:
        port = random.SystemRandom().randrange(lowest, lowest + share, 2)
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
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")  # read when it is loaded
    try:
        import mooncake.engine  # noqa: F401
    except ImportError:
        return False
    return True


def forkserver() -> ForkServerContext:
    """For functions in processes of their own, without the threads of this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "zmq", "checkpoint_engine.distributed"])
    return context


class RankStarter:
    """The process that forks others, see ``rank_starter.py``. Tests share it."""

    def __init__(self, *modules: str, **variables: str) -> None:
        """``modules``: what it imports beside torch."""
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "rank_starter.py"), *modules],
            env={**os.environ, **_variables(), **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, order: dict[str, Any]) -> int:
        """Fork a launcher; returns its pid."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


_starter = functools.cache(RankStarter)


def _variables() -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), *_python_path()]),
    }


class Forked:
    """Processes that run one command, a Python script mostly; they end together."""

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        variables: Sequence[dict[str, str]] = ({},),
        namespaces: Sequence[str] = (),
        starter: RankStarter | None = None,
    ) -> None:
        """
        Args:
            folder: for what they print.
            variables: of each process, beside this one's.
            namespaces: files of those to run in.
            starter: what forks them; by default, the one that tests share.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._output = folder / "output"  # not a pipe, which nobody might read
        self._output.touch()
        self._code = folder / "code"
        order = {
            "command": list(command),
            "environments": [{**os.environ, **_variables(), **own} for own in variables],
            "namespaces": list(namespaces),
            "output": str(self._output),
            "code": str(self._code),
        }
        self._pid = (starter or _starter()).start(order)
        self._ended = os.pidfd_open(self._pid)
        weakref.finalize(self, os.close, self._ended)

    def join(self, timeout: float) -> None:
        """Until all have ended. Fails with what they printed if one fails."""
        ended = not self.is_running(timeout)
        self.kill()
        assert ended, f"took too long:\n{self.output()}"
        assert self._code.read_text() == "0", f"failed:\n{self.output()}"

    def is_running(self, seconds: float = 0) -> bool:
        """Whether they still run after so long."""
        return not select.select([self._ended], [], [], seconds)[0]

    def kill(self) -> None:
        """All of them, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        assert not self.is_running(10)

    def output(self) -> str:
        """The end of what they printed."""
        return self._output.read_text(errors="replace")[-8000:]


def ranks_of(size: int, each: int, place: int = 0) -> list[dict[str, str]]:
    """What torchrun tells ``each`` ranks of one host, the first of which is rank
    ``place * each``."""
    sizes = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(each)}
    return [
        {**sizes, "RANK": str(place * each + local), "LOCAL_RANK": str(local)}
        for local in range(each)
    ]


def socket_folder(owner: object) -> str:
    """A folder in one of its own, until ``owner`` goes. A socket's path may have 107 bytes, of
    which pytest's folders would take most."""
    folder = tempfile.mkdtemp(prefix="ranks-")
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    sockets = os.path.join(folder, "s")
    os.mkdir(sockets, mode=0o700)
    return sockets


def results_in(folder: Path, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


class Run(Forked):
    """A program that is running on all ranks of one host."""

    def __init__(
        self,
        tmp_path: Path,
        ranks: int,
        program: str,
        env: dict[str, str] | None = None,
        script: str = "programs.py",
        *,
        with_torchrun: bool = False,
        **arguments: Any,
    ) -> None:
        """``with_torchrun``: as users start ranks; it takes seconds longer."""
        self._ranks = ranks
        self._results = tmp_path / "results"
        self._results.mkdir(parents=True, exist_ok=True)
        command = [str(HERE / script), program, json.dumps(arguments), str(self._results)]
        port = free_port_pair()
        shared = {"PS_IPC_DIR": socket_folder(self), **(env or {})}
        if with_torchrun:
            launch = [sys.executable, "-m", "torch.distributed.run"]
            launch += [f"--nproc-per-node={ranks}", f"--master-port={port}"]
            super().__init__(tmp_path, [*launch, *command], [shared])
            return
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        super().__init__(tmp_path, command, [own | shared for own in ranks_of(ranks, ranks)])

    def wait(self, timeout: float = 50) -> list[dict[str, Any]]:
        """Every rank's result, in rank order. Fails with the whole output if a rank fails."""
        self.join(timeout)
        return results_in(self._results, self._ranks)


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
