"""Where faults strike, and what they do there. Runs within server ranks and workers."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from checkpoint_engine import ps as server
from checkpoint_engine.ground.devices import DeviceManager
from checkpoint_engine.handover import wire
from checkpoint_engine.loading import receive
from checkpoint_engine.memory import host_memory
from checkpoint_engine.transfer import remote_loader
from checkpoint_engine.update import session, update
from checkpoint_engine.update.ways import peers

STEPS: dict[str, tuple[Any, str]] = {
    "register": (host_memory, "fill_arenas"),
    "gather": (server, "gather"),
    "start": (update, "_agree"),
    "buffers": (update, "_share_buffer"),
    "handshake": (session.WorkerSession, "hand_over"),
    "bucket": (session.WorkerSession, "begin_reload"),
    "offer": (peers.PeersMover, "_offer"),
    "taken": (peers.PeersMover, "_finish"),
    "let go": (peers.PeersMover, "let_go"),
    "release": (session.WorkerSession, "release"),
    "post hook": (session.WorkerSession, "finish"),
    "P2P read": (remote_loader.RemoteLoader, "read"),
}
"""Of a server rank: the function at whose call the step begins."""

WORKER_STEPS: dict[str, tuple[Any, str]] = {
    "handshake": (receive, "open_buffer"),
    "mapping": (wire, "decode_sources"),
    "read": (receive, "_place_of"),
    "bucket": (receive, "_check_bytes"),
    "load": (receive._Reception, "_load"),
    "release": (DeviceManager, "release_cached_memory"),
    "post hook": (receive._Reception, "_finish"),
}


@dataclass(frozen=True)
class Fault:
    """``action`` at the ``nth`` call of ``step``, on ``rank``'s server or its worker.

    ``skip`` and ``twice``: the call itself is left out, or made twice.
    """

    action: str
    step: str
    rank: int = 1
    nth: int = 1
    of_worker: bool = False


class InjectedError(Exception):
    """What a step raises."""


def act(action: str, note: Path) -> None:
    """Do it to this very process."""
    note.write_text(str(time.monotonic()))
    if action == "raise":
        raise InjectedError("injected here")
    if action == "pause":
        await_file(note.with_name("go"))
    if action == "truncate":
        os.truncate(note.with_name("victim.safetensors"), 3000)
    if action == "fill /dev/shm":
        fill_shared_memory(leave=1 << 16)
    if action in ACTIONS:
        os.kill(os.getpid(), ACTIONS[action])
        ends = time.monotonic() + 5.0
        while action in ("interrupt", "terminate") and time.monotonic() < ends:
            time.sleep(0.01)  # the signal is handled here; the kernel may give it to any thread
    if action == "stop":  # the kernel may be late to stop this thread
        await_file(note.with_name("awake"))


def await_file(path: Path) -> None:
    ends = time.monotonic() + 20.0
    while not path.exists():
        if time.monotonic() > ends:
            raise TimeoutError(f"{path} does not come")
        time.sleep(0.005)


def fill_shared_memory(leave: int) -> None:
    with open("/dev/shm/filler", "wb") as filler:
        while True:
            found = os.statvfs("/dev/shm")
            with contextlib.suppress(OSError):  # other ranks take some of it meanwhile
                size = os.fstat(filler.fileno()).st_blocks * 512
                free = found.f_bavail * found.f_bsize - leave
                os.posix_fallocate(filler.fileno(), 0, size + max(free, 1))
                return


ACTIONS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "interrupt": signal.SIGINT,
    "terminate": signal.SIGTERM,
}


@contextlib.contextmanager
def armed(
    fault: Fault | None, note: Path, extra: Callable[..., None] | None = None
) -> Iterator[None]:
    """Within this, ``fault`` happens in this process; the time goes into ``note``.

    ``extra``: called with the step's arguments instead, for faults of another kind.
    """
    if fault is None:
        yield
        return
    owner, name = (WORKER_STEPS if fault.of_worker else STEPS)[fault.step]
    original = getattr(owner, name)
    calls = 0

    def step(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fault.nth:
            if extra is None:
                act(fault.action, note)
            else:
                note.write_text(str(time.monotonic()))
                extra(*args)
            if fault.action == "skip":
                return None
            if fault.action == "twice":
                original(*args, **options)
        return original(*args, **options)

    with mock.patch.object(owner, name, step):
        yield
