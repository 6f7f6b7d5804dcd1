"""Forks the ranks of ``torchrun.Run``: torch is imported once for all of them.

Each line that it reads is an order. It forks a launcher, which forks the ranks (or torchrun), waits
for them and writes how they ended; the answer is the launcher's pid, which is a process group too.
A rank ends like any Python program, so an error while the interpreter shuts down is seen.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

IMPORTED = ("torch.distributed", "checkpoint_engine.ps", "fleet", "safetensors.torch", "fastapi")


def main() -> None:
    for module in IMPORTED:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # launchers leave no zombies
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            return _launch(json.loads(line))
        print(pid, flush=True)


def _launch(order: dict[str, Any]) -> None:
    """Returns in the ranks only."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for fd, path in ((0, os.devnull), (1, order["output"]), (2, order["output"])):
        opened = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(opened, fd)
        os.close(opened)
    ranks = []
    for rank in range(order["ranks"] or 1):
        pid = os.fork()
        if pid == 0 and order["ranks"] is None:
            os.execve(order["command"][0], order["command"], order["environment"])
        if pid == 0:
            return _be_rank(rank, order)
        ranks.append(pid)
    code = 0
    while ranks and code == 0:
        pid, status = os.wait()
        ranks.remove(pid)
        code = os.waitstatus_to_exitcode(status)
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    Path(order["code"]).write_text(str(code))
    os._exit(0)


def _be_rank(rank: int, order: dict[str, Any]) -> None:
    """What torchrun and ``python SCRIPT ARGUMENTS`` do."""
    os.environ.clear()
    os.environ.update(order["environment"])
    size = str(order["ranks"])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    sys.argv = order["command"]
    program = types.ModuleType("__main__")
    program.__file__ = sys.argv[0]
    sys.modules["__main__"] = program
    exec(compile(Path(sys.argv[0]).read_text(), sys.argv[0], "exec"), vars(program))


if __name__ == "__main__":
    main()
