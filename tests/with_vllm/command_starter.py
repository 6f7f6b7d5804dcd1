"""Runs ``checkpoint-engine`` in processes that are forked from one which has imported vLLM.

Importing it takes longer than all that a tiny model takes. Workers and server ranks are forked from
a second such process, multiprocessing's fork server.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # small helpers of vLLM, which each worker would compile anew
    "HF_HUB_OFFLINE": "1",
    "PS_DEVICE": os.environ.get("PS_DEVICE", "cpu"),
    "PYTHONPATH": os.pathsep.join(
        [str(HERE.parent.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    ),
}


class CommandStarter:
    """The process that has imported vLLM. Use as a context manager."""

    def __init__(self, environment: Mapping[str, str] = ENVIRONMENT) -> None:
        # Sockets, and files in which vLLM's workers meet, which it leaves.
        self._folder = tempfile.TemporaryDirectory(prefix="vllm-")
        self._output = Path(self._folder.name) / "output"
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                env={**os.environ, **environment, "TMPDIR": self._folder.name},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )

    def __enter__(self) -> CommandStarter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate(timeout=30)
        self._folder.cleanup()

    def output(self) -> str:
        """The end of what workers and server ranks printed."""
        return self._output.read_text(errors="replace")[-8000:]

    def run(self, arguments: list[str], output: Path, seconds: float) -> int:
        """The exit code of ``checkpoint-engine ARGUMENTS``; negative: the signal that ended it,
        SIGKILL after so many seconds. What it prints goes to ``output``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"arguments": arguments, "output": str(output), "seconds": seconds}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def main() -> None:
    """For each line of stdin a command; writes its exit code to stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # of workers and ranks
    import frozen_imports  # noqa: F401
    from vllm.model_executor.models import registry
    from vllm.v1.executor import multiproc_executor

    registry._run_in_subprocess = lambda inspect: inspect()  # which would import vLLM anew
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["frozen_imports"])
    multiproc_executor.get_mp_context = lambda: context
    server = multiprocessing.forkserver._forkserver
    server.ensure_running()
    # Commands use it, too, though they did not start it and cannot ask whether it still runs.
    server.ensure_running = lambda: None
    for line in sys.stdin:
        order = json.loads(line)
        if (pid := os.fork()) == 0:
            _be_command(order["arguments"], order["output"])
        print(_exit_code(pid, order["seconds"]), file=answers, flush=True)


def _be_command(arguments: list[str], output: str) -> None:
    code = 70
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
        with open(os.devnull) as nothing, open(output, "w") as file:
            os.dup2(nothing.fileno(), 0)
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        from checkpoint_engine.cli import main

        main(arguments)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _exit_code(pid: int, seconds: float) -> int:
    ends, starter = time.monotonic() + seconds, os.getppid()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > ends or os.getppid() != starter:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.02)


if __name__ == "__main__":
    main()
