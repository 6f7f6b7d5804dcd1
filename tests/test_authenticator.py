"""Who may connect to a rank's address: the first process of an admitted user, and no other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from loguru import logger

from checkpoint_engine.device_utils import DeviceManager
from checkpoint_engine.errors import WireError
from checkpoint_engine.ground.deadline import Deadline
from checkpoint_engine.handover import link
from checkpoint_engine.handover.authenticator import Authenticator
from checkpoint_engine.handover.ipc import SharedBuffer
from checkpoint_engine.handover.link import ServerLink, WorkerLink, open_context
from checkpoint_engine.handover.stale_files import stale_files
from checkpoint_engine.service.serve import listen

SOON = 10.0
NOBODY = 65534
INTRUDER = """
import socket, sys, zmq
kind, address = sys.argv[1:]
if kind == "raw":
    peer = socket.socket(socket.AF_UNIX)
    path = address[len("ipc://"):]
    try:
        peer.connect("\\0" + path[1:] if path[0] == "@" else path)
        peer.sendall(b"garbage" * 100)
    except OSError:
        pass
else:
    peer = zmq.Context().socket(getattr(zmq, kind))
    peer.linger = 0
    peer.connect(address)
    if kind == "DEALER":
        peer.send_multipart([b"", b"not your worker"])
print("there", flush=True)
seconds = float(sys.stdin.read())
got = peer.poll(1000 * seconds) if kind != "raw" else 0
print(got, flush=True)
"""


def bounded() -> Callable[[], None]:
    deadline = Deadline(SOON)
    return lambda: deadline.check("the test")


class Intruder:
    def __init__(self, kind: str, address: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", INTRUDER, kind, address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "there\n"
        time.sleep(0.1)  # for its handshake, which it cannot see

    def leave(self, seconds: float = 0) -> int:
        """What it got; ``seconds``: for that to arrive."""
        got, _ = self._process.communicate(str(seconds), timeout=seconds + SOON)
        return int(got)


@pytest.fixture(params=["file", "abstract"])
def server(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[WorkerLink]:
    monkeypatch.setenv("PS_IPC_DIR", str(tmp_path))
    if request.param == "abstract":
        monkeypatch.setenv("PS_IPC_ABSTRACT", "1")
    with open_context() as context, contextlib.closing(WorkerLink(context)) as made:
        yield made


def worker_loop(address: str, ours: bool, done: list[bytes]) -> None:
    """Answers three messages, as our worker or as the original's does."""
    with zmq.Context() as context:
        if ours:
            with contextlib.closing(ServerLink(context, address, SOON)) as worker:
                for _ in range(3):
                    done.append(worker.receive())
                    worker.reply()
            return
        plain = context.socket(zmq.REP)
        plain.setsockopt(zmq.LINGER, 1000)
        plain.setsockopt(zmq.RCVTIMEO, int(SOON * 1000))
        plain.connect(address)
        for _ in range(3):
            done.append(plain.recv())
            plain.send(b"")
        plain.close()


@contextlib.contextmanager
def working(address: str, ours: bool) -> Iterator[list[bytes]]:
    done: list[bytes] = []
    thread = threading.Thread(target=worker_loop, args=(address, ours, done))
    thread.start()
    try:
        yield done
    finally:
        thread.join(SOON)


def exchange(server: WorkerLink, message: bytes) -> None:
    server.send(message, bounded())
    assert server.receive(bounded()) == b""


KINDS = ["REP", "DEALER", "REQ", "PULL", "raw"]


def look_until(server: WorkerLink, condition: Callable[[], object]) -> None:
    check = bounded()
    while not condition():
        server.check()
        check()


def test_bytes_that_are_no_handshake_are_ignored(server: WorkerLink) -> None:
    intruder = Intruder("raw", server.url)
    with working(server.url, ours=True) as done:
        for message in (b"handle", b"bucket", b"end"):
            exchange(server, message)
    assert done == [b"handle", b"bucket", b"end"]
    intruder.leave()


@pytest.mark.parametrize("ours", [True, False], ids=["our worker", "the original's worker"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_connection_later_than_the_worker(
    server: WorkerLink, kind: str, ours: bool
) -> None:
    with working(server.url, ours) as done:
        exchange(server, b"handle")
        intruder = Intruder(kind, server.url)
        exchange(server, b"bucket")
        assert intruder.leave() == 0
        server.check()  # that it left means nothing
        exchange(server, b"end")
    assert done == [b"handle", b"bucket", b"end"]


def test_one_that_comes_and_goes_before_the_worker(
    server: WorkerLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Intruder("REP", server.url).leave() == 0
    with working(server.url, ours=False) as done:
        for message in (b"handle", b"bucket", b"end"):
            exchange(server, message)
    assert done == [b"handle", b"bucket", b"end"]


@contextlib.contextmanager
def receiving(address: str) -> Iterator[list[str]]:
    """A worker of this process that waits for its first message; what it is told instead."""
    told: list[str] = []

    def receive() -> None:
        with zmq.Context() as context, contextlib.closing(ServerLink(context, address, SOON)) as me:
            try:
                me.receive()
            except WireError as error:
                told.append(str(error))

    thread = threading.Thread(target=receive)
    thread.start()
    try:
        yield told
    finally:
        thread.join(SOON)


def test_a_process_that_comes_second_is_told(server: WorkerLink) -> None:
    first = Intruder("REP", server.url)
    look_until(server, lambda: server._authenticator.worker_is_connected)
    with receiving(server.url) as told:
        look_until(server, lambda: told)
    assert "refused this worker: it serves another" in told[0]
    server.send(b"handle", bounded())
    assert first.leave(SOON) == 1
    with pytest.raises(WireError, match="closed its connection"):
        server.receive(bounded())


def test_a_second_connection_of_the_worker_is_refused_once_it_has_a_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PS_IPC_ABSTRACT", "1")
    with open_context() as context, contextlib.closing(WorkerLink(context)) as server:
        with working(server.url, ours=True) as done:
            exchange(server, b"handle")
            with receiving(server.url) as told:
                look_until(server, lambda: told)
            exchange(server, b"bucket")
            exchange(server, b"end")
        assert "refused this worker: it serves another" in told[0]
        assert done == [b"handle", b"bucket", b"end"]


def test_the_process_that_came_first_may_connect_again(server: WorkerLink) -> None:
    with zmq.Context() as context:
        with contextlib.closing(ServerLink(context, server.url, SOON)):
            look_until(server, lambda: server._authenticator.worker_is_connected)
        # What is sent before the server has seen the end goes nowhere: the update fails then.
        look_until(server, lambda: not server._authenticator.worker_is_connected)
        with working(server.url, ours=True) as done:
            for message in (b"handle", b"bucket", b"end"):
                exchange(server, message)
    assert done == [b"handle", b"bucket", b"end"]


@pytest.mark.parametrize("ours", [True, False], ids=["our worker", "the original's worker"])
def test_a_worker_is_let_in_as_soon_as_it_asks(server: WorkerLink, ours: bool) -> None:
    with working(server.url, ours):
        assert server._authenticator._requests.poll(SOON * 1000)
        server._authenticator.answer()  # once
        assert server._socket.poll(SOON * 1000, zmq.POLLOUT)
        for message in (b"handle", b"bucket", b"end"):
            exchange(server, message)


def test_a_worker_that_is_let_in_waits_for_ranks_that_take_long_to_meet(
    server: WorkerLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "_CONNECT_SECONDS", 0.3)
    with working(server.url, ours=True) as done:
        meeting = Deadline(1.0)
        while meeting.remaining():
            server.let_in()
            time.sleep(0.01)
        for message in (b"handle", b"bucket", b"end"):
            exchange(server, message)
    assert done == [b"handle", b"bucket", b"end"]


def test_processes_of_an_unseen_pid_namespace_one_after_the_other(
    server: WorkerLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel gives all of them the same number: 0."""
    let_in = Authenticator._lets_in
    monkeypatch.setattr(Authenticator, "_lets_in", lambda self, uid, _pid: let_in(self, uid, 0))
    monkeypatch.setattr("checkpoint_engine.handover.authenticator._peer_of", lambda _descriptor: 0)
    with zmq.Context() as context:
        with contextlib.closing(ServerLink(context, server.url, SOON)):
            look_until(server, lambda: server._socket.poll(0, zmq.POLLOUT))
            with receiving(server.url) as told:
                look_until(server, lambda: told)
        assert "refused this worker: it serves another" in told[0]
        look_until(server, lambda: not server._authenticator.worker_is_connected)
        with working(server.url, ours=True) as done:
            for message in (b"handle", b"bucket", b"end"):
                exchange(server, message)
    assert done == [b"handle", b"bucket", b"end"]


def test_a_refused_process_is_warned_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_IPC_ABSTRACT", "1")
    warnings: list[str] = []
    sink = logger.add(lambda message: warnings.append(str(message)), level="WARNING")
    with open_context() as context, contextlib.closing(WorkerLink(context)) as server:
        first = Intruder("REP", server.url)
        look_until(server, lambda: server._authenticator.worker_is_connected)
        for _ in range(2):
            with receiving(server.url) as told:
                look_until(server, lambda told=told: told)
        first.leave()
    logger.remove(sink)
    assert len(warnings) == 1
    assert f"refused process {os.getpid()} of user {os.geteuid()}" in warnings[0]


# ---------------------------------------------------------------------- another user


def as_nobody(action: Callable[[], Any], uid: int = NOBODY) -> Any:
    """What ``action`` returns, as JSON can hold it, in a process of another user."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(30)
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            os.write(write_end, json.dumps(action()).encode())
        except BaseException as error:
            os.write(write_end, json.dumps(f"{type(error).__name__}: {error}").encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as answer:
        told = answer.read()
    os.waitpid(child, 0)
    return json.loads(told)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user: needs root")


def try_to_connect(path: str) -> str:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(path)
    return "connected"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody can enter, made with a careless umask."""
    umask = os.umask(0)
    with tempfile.TemporaryDirectory() as folder:  # its path is short enough for sockets
        os.chmod(folder, 0o1777)  # as /tmp: others may connect, and replace nothing
        yield Path(folder)
    os.umask(umask)


@needs_root
def test_another_user_cannot_connect_to_a_ranks_socket(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PS_IPC_DIR", str(open_folder))
    with open_context() as context, contextlib.closing(WorkerLink(context)) as server:
        told = as_nobody(lambda: try_to_connect(server.url.removeprefix("ipc://")))
        assert told.startswith("PermissionError")


@needs_root
def test_another_user_cannot_enter_the_default_folder(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PS_IPC_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(open_folder))
    with open_context() as context, contextlib.closing(WorkerLink(context)) as server:
        folder = Path(server.url.removeprefix("ipc://")).parent
        assert as_nobody(lambda: os.listdir(folder)).startswith("PermissionError")


def connect_in_abstract(address: str) -> int:
    """How many messages a connection of this user gets within a second."""
    with zmq.Context() as context:
        peer = context.socket(zmq.REP)
        peer.linger = 0
        peer.connect(address)
        got = peer.poll(1000)
        peer.close()
    return got


@needs_root
def test_another_user_gets_nothing_in_the_abstract_namespace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where no file keeps it out."""
    monkeypatch.setenv("PS_IPC_ABSTRACT", "1")
    with open_context() as context, contextlib.closing(WorkerLink(context)) as server:
        told: list[Any] = []
        thread = threading.Thread(
            target=lambda: told.append(as_nobody(lambda: connect_in_abstract(server.url)))
        )
        thread.start()
        deadline = Deadline(1.5)
        with contextlib.suppress(TimeoutError):
            server.send(b"handle", lambda: deadline.check("nobody else"))
        thread.join(SOON)
        assert told == [0]


@needs_root
def test_another_user_is_let_in_where_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_IPC_ABSTRACT", "1")
    monkeypatch.setenv("PS_IPC_UIDS", str(NOBODY))
    with open_context() as context, contextlib.closing(WorkerLink(context)) as server:
        told: list[Any] = []
        thread = threading.Thread(
            target=lambda: told.append(as_nobody(lambda: foreign_exchange(server.url)))
        )
        thread.start()
        exchange(server, b"handle")
        thread.join(SOON)
        assert told == ["handle"]


def foreign_exchange(address: str) -> str:
    with zmq.Context() as context:
        peer = context.socket(zmq.REP)
        peer.setsockopt(zmq.RCVTIMEO, 5000)
        peer.connect(address)
        got = peer.recv()
        peer.send(b"")
        peer.close()
    return got.decode()


@needs_root
def test_another_user_cannot_open_shared_memory(open_folder: Path) -> None:
    with SharedBuffer(DeviceManager("cpu"), 0, 4096) as buffer:
        path = buffer.handle()[1][0]
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert as_nobody(lambda: os.open(path, os.O_RDONLY)).startswith("PermissionError")


@needs_root
def test_files_of_another_user_do_not_get_in_the_way() -> None:
    """Names like those of our stale files, open to all, that only their owner can remove."""
    trap = Path(f"/dev/shm/checkpoint-engine-{NOBODY}-trap{os.getpid()}")
    trap.touch()
    trap.chmod(0o666)

    def make_a_buffer() -> str:
        with SharedBuffer(DeviceManager("cpu"), 0, 4096) as buffer:
            return str(buffer.tensor.numel())

    try:
        assert as_nobody(make_a_buffer) == "4096"
        assert trap.exists()
        assert list(stale_files(trap.parent, trap.name)) == [trap]  # of its owner
    finally:
        trap.unlink()


@needs_root
def test_another_user_cannot_reach_the_http_service(open_folder: Path) -> None:
    path = str(open_folder / "http.sock")
    with listen(path):
        assert as_nobody(lambda: try_to_connect(path)).startswith("PermissionError")


@needs_root
def test_a_lock_that_another_user_holds_does_not_stop_a_service(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    from checkpoint_engine.service import serve

    monkeypatch.setattr(serve, "_LOCK_SECONDS", 0.2)
    folder = os.open(open_folder, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with (
        pytest.raises(OSError, match="whoever holds a lock on the socket's folder"),
        listen(str(open_folder / "http.sock")),
    ):
        pass
    os.close(folder)
