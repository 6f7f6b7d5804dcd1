"""Forks the processes of ``torchrun.Forked``: torch is imported once for all of them, and so are
the modules that the command line names.

Each line that it reads is an order. It forks a launcher, which forks the processes, waits for them
and writes how they ended; the answer is the launcher's pid, which is a process group too. They end
like any Python program, so an error while the interpreter shuts down is seen.
"""

from __future__ import annotations

import contextlib
import ctypes
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
    with contextlib.redirect_stdout(sys.stderr):  # where some releases of vLLM log
        for module in (*IMPORTED, *sys.argv[1:]):
            importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # launchers leave no zombies
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            return _launch(json.loads(line))
        print(pid, flush=True)


def _launch(order: dict[str, Any]) -> None:
    """Returns in the processes that were ordered only."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for fd, path in ((0, os.devnull), (1, order["output"]), (2, order["output"])):
        opened = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(opened, fd)
        os.close(opened)
    code_file = os.open(order["code"], os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    _enter(order["namespaces"])
    running = []
    for environment in order["environments"]:
        pid = os.fork()
        if pid == 0:
            return _become(order["command"], environment)
        running.append(pid)
    code = 0
    while running and code == 0:
        pid, status = os.wait()
        running.remove(pid)
        code = os.waitstatus_to_exitcode(status)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    os.write(code_file, str(code).encode())
    os._exit(0)


def _enter(paths: list[str]) -> None:
    """Move into namespaces, as ``nsenter`` does; a new PID namespace is that of the children."""
    libc = ctypes.CDLL(None, use_errno=True)
    for namespace in [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths]:
        if libc.setns(namespace, 0) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {paths}")


def _become(command: list[str], environment: dict[str, str]) -> None:
    """What ``execve`` does; a Python script is run by this interpreter."""
    if not command[0].endswith(".py"):
        os.execve(command[0], command, environment)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    program = types.ModuleType("__main__")
    program.__file__ = command[0]
    sys.modules["__main__"] = program
    exec(compile(Path(command[0]).read_text(), command[0], "exec"), vars(program))


if __name__ == "__main__":
    main()
