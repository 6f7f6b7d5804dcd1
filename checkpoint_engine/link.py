"""The two ends of the connection between a server rank and its worker.

The server binds, the worker connects. Each end watches its connection, so that a peer that dies is
noticed at once and not by a timeout. One peer is let in, see ``door``.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import zmq
from zmq.utils.monitor import recv_monitor_message

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.door import Door, KnownWorker, peer_of, present_proof
from checkpoint_engine.errors import WireError
from checkpoint_engine.leftovers import abandoned, create_locked, remove
from checkpoint_engine.settings import admitted_users
from checkpoint_engine.wire import ACK, encode_abort

_LOOK_MS = 50  # how long a wait may go without asking whether to go on
_CONNECT_SECONDS = 5.0  # servers listen before they ask anybody to connect
_LINGER_MS = 1000  # for an abort message to leave before its socket closes
_LET_IN_MS = 200  # for a worker that is being let in, before it is told to give up
_MAX_PATH = 107  # bytes of a Unix socket path
_MAX_REPLY = 64 << 20  # bytes; libzmq drops the connection of a peer that announces more
_MAX_MESSAGE = 1 << 30
_PREFIX = "ps-"
_ANYONE, _PROVING = ".sock", ".own"


class Address:
    """An address for one update, which nobody can guess and no earlier update used.

    A socket file in a folder that only this user can enter: ``PS_IPC_DIR``, else one of ours below
    ``XDG_RUNTIME_DIR`` or the temporary folder. ``PS_IPC_ABSTRACT=1``: the abstract namespace.
    """

    def __init__(self) -> None:
        """Raises ``RuntimeError`` if the folder is somebody else's, or its path is too long."""
        self._lock: tuple[str, int] | None = None
        if os.environ.get("PS_IPC_ABSTRACT") == "1":
            self.url = f"ipc://@checkpoint-engine-{_new_name()}{_ANYONE}"
            return
        folder = _socket_folder()
        for left in abandoned(folder, f"{_PREFIX}*.lock"):
            _remove_files(left)
        longest = folder / f"{_new_name()}{_ANYONE}"
        if len(os.fsencode(longest)) > _MAX_PATH:
            raise RuntimeError(
                f"the socket path {longest} is longer than {_MAX_PATH} bytes: set PS_IPC_DIR to a "
                "shorter folder, or PS_IPC_ABSTRACT=1"
            )
        self._lock = create_locked(lambda: str(folder / f"{_new_name()}.lock"))
        self.url = f"ipc://{Path(self._lock[0]).with_suffix(_ANYONE)}"

    def close(self) -> None:
        """Remove the sockets' files, which zmq leaves."""
        if self._lock is not None:
            path, fd = self._lock
            self._lock = None
            _remove_files(Path(path))
            os.close(fd)


def _remove_files(lock: Path) -> None:
    for suffix in (_ANYONE, _PROVING, lock.suffix):
        remove(lock.with_suffix(suffix))


def _new_name() -> str:
    return f"{_PREFIX}{secrets.token_hex(8)}"


def _proving_url(url: str) -> str:
    """Where our own workers connect, beside the address that any worker is given."""
    return url.removesuffix(_ANYONE) + _PROVING


def _proof(url: str) -> bytes:
    """What whoever was given ``url`` knows; folders may have other names in other containers."""
    return url.rpartition("/")[2].encode()


def _socket_folder() -> Path:
    chosen = os.environ.get("PS_IPC_DIR")
    if chosen:
        folder = Path(chosen).absolute()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    base = runtime if runtime and os.path.isdir(runtime) else tempfile.gettempdir()
    folder = Path(base) / f"checkpoint-engine-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise RuntimeError(
            f"{folder} must be a folder that only user {os.getuid()} can enter: remove it, or set "
            "PS_IPC_DIR"
        )
    return folder


class _Watched:
    """A socket and the monitor of its connections."""

    events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED

    def __init__(self, context: zmq.Context, kind: int, max_message: int) -> None:
        self.socket: zmq.Socket = context.socket(kind)
        self.socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self.socket.setsockopt(zmq.MAXMSGSIZE, max_message)
        self.monitor = self.socket.get_monitor_socket(self.events)
        self._poller = zmq.Poller()
        self._poller.register(self.monitor, zmq.POLLIN)
        self.connected = False
        self.gone = False

    def wait(self, event: int, timeout_ms: int = _LOOK_MS) -> bool:
        """Whether the socket is ready for ``event`` (POLLIN, POLLOUT) by then, or its peer left."""
        self._poller.register(self.socket, event)
        ready = dict(self._poller.poll(timeout_ms))
        self.look()
        return self.socket in ready

    def look(self) -> None:
        """Learn what happened to the connections."""
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor)
            self._note(event["event"], event["value"])

    def _note(self, kind: int, value: int) -> None:
        self.connected |= kind == zmq.EVENT_HANDSHAKE_SUCCEEDED
        self.gone |= kind == zmq.EVENT_DISCONNECTED and self.connected

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close()


class _Caller(_Watched):
    """The worker's socket. A server may refuse it."""

    events = _Watched.events | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    refused = False

    def _note(self, kind: int, value: int) -> None:
        super()._note(kind, value)
        self.refused |= kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH


class _Listener(_Watched):
    """A server's socket. Others than the worker may come, and go: they are told apart by their
    connections' descriptors."""

    events = _Watched.events | zmq.EVENT_ACCEPTED

    def __init__(self, context: zmq.Context, url: str) -> None:
        # DEALER, not REQ: an abort may follow a message that the worker has not answered yet.
        super().__init__(context, zmq.DEALER, _MAX_REPLY)
        self._url = url
        self._path = url.removeprefix("ipc://") if url.startswith("ipc:///") else None
        self._open: dict[int, int | None] = {}
        self._let_in: int | None = None

    def listen(self, door: Door, proof: bytes | None) -> None:
        door.guard(self.socket, proof)
        self.socket.bind(self._url)
        if self._path is not None:
            os.chmod(self._path, 0o666 if admitted_users() else 0o600)

    @property
    def peers(self) -> Collection[int | None]:
        """The processes that have a connection."""
        return self._open.values()

    def let_in(self, pid: int) -> None:
        """Process ``pid`` is the worker. Nobody else finds the socket's file any more; zmq cannot
        stop listening without ending the worker's connection too."""
        self._let_in = pid
        if self._path is not None:
            remove(self._path)

    def _note(self, kind: int, value: int) -> None:
        if kind == zmq.EVENT_ACCEPTED:
            self._open[value] = peer_of(value)
        elif kind == zmq.EVENT_DISCONNECTED:
            self._open.pop(value, None)
        else:
            self.connected = True
        self.gone = self._let_in is not None and self._let_in not in self._open.values()


class WorkerLink:
    """The server's end: one worker, one update. Lives in the thread that runs the update."""

    def __init__(
        self, context: zmq.Context, address: Address, known: KnownWorker | None = None
    ) -> None:
        """Takes ``address`` over, and gives it up when closed.

        Args:
            context: of this update alone.
            known: what is remembered of this rank's worker from one update to the next.
        """
        self._address = address
        self.url = address.url
        self._door = Door(context, KnownWorker() if known is None else known)
        self._listeners = [_Listener(context, url) for url in (_proving_url(self.url), self.url)]
        self._worker: _Listener | None = None
        try:
            for listener, proof in zip(self._listeners, (_proof(self.url), None), strict=True):
                listener.listen(self._door, proof)
        except (zmq.ZMQError, OSError) as error:
            self.close()
            raise RuntimeError(f"cannot listen at {address.url}: {error}") from error

    def send(self, message: bytes, check: Callable[[], None]) -> None:
        """Send, once the worker is connected; ``check`` ends the wait by raising."""
        while not (self._wait(zmq.POLLOUT) and self._sent(message)):
            check()
            self._raise_if_gone()

    def receive(self, check: Callable[[], None]) -> bytes:
        """The worker's reply to the oldest unanswered message.

        Raises:
            WireError: the worker is gone.
        """
        while not self._wait(zmq.POLLIN):
            check()
            if self._gone and not self._wait(zmq.POLLIN, 0):
                self._raise_if_gone()
        assert self._worker is not None
        self._door.remember()
        return self._worker.socket.recv_multipart()[-1]

    def check(self) -> None:
        """Raise ``WireError`` if the worker is gone and has left no reply. For waits for something
        else."""
        if not self._wait(zmq.POLLIN, 0):
            self._raise_if_gone()

    def abort(self, reason: str) -> None:
        """Tell a worker that is still there to give up; it does not reply."""
        self._answer_door(patient=False)
        there = self._worker is not None and not self._gone
        if there and self._wait(zmq.POLLOUT, _LET_IN_MS) and not self._gone:
            self._sent(encode_abort(reason))

    def close(self) -> None:
        """Stop listening."""
        for listener in self._listeners:
            listener.close()
        self._door.close()
        self._address.close()

    def _wait(self, event: int, timeout_ms: int = _LOOK_MS) -> bool:
        """Whether the worker's socket is ready for ``event`` by then; lets the worker in."""
        if self._worker is None:
            self._door.wait(timeout_ms)
        self._answer_door()
        return self._worker is not None and self._worker.wait(event, timeout_ms)

    def _answer_door(self, patient: bool = True) -> None:
        proving, anyone = self._listeners
        for listener in self._listeners:
            listener.look()
        self._door.look(anyone.peers, patient)
        if self._worker is None and self._door.entered is not None:
            self._worker = proving if self._door.entered.proves else anyone
            for listener in self._listeners:
                listener.let_in(self._door.entered.pid)

    def _sent(self, message: bytes) -> bool:
        """A blocking send would never return where the worker left after the last look."""
        assert self._worker is not None
        try:
            self._worker.socket.send_multipart([b"", message], zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    @property
    def _gone(self) -> bool:
        return self._worker is not None and self._worker.gone

    def _raise_if_gone(self) -> None:
        if self._gone:
            raise WireError("the inference worker closed its connection before the update was over")


class ServerLink:
    """The worker's end."""

    def __init__(self, context: zmq.Context, address: str, timeout: float) -> None:
        """``timeout``: seconds to wait for the server's next message, if it does not set a
        deadline."""
        self.address = address
        self._timeout = timeout
        self._deadline: Deadline | None = None
        self._watched = _Caller(context, zmq.REP, _MAX_MESSAGE)
        try:
            self._watched.socket.connect(self._choose_url())
        except zmq.ZMQError as error:
            self._watched.close()
            raise WireError(f"cannot connect to {address!r}: {error}") from error

    def _choose_url(self) -> str:
        """Servers of ours listen at a second address, where workers of ours prove who they are."""
        own = _proving_url(self.address)
        if own.endswith(_PROVING) and own.startswith("ipc://") and _listens(own):
            present_proof(self._watched.socket, _proof(self.address))
            return own
        return self.address

    def set_deadline(self, seconds: float) -> None:
        """From now on all waits together may take this long."""
        self._deadline = Deadline(seconds)

    def receive(self, patience: float | None = None) -> bytes:
        """The server's next message. ``patience``: seconds for it, from servers that set no
        deadline.

        Raises:
            WireError: the server is gone, or was never there.
            TimeoutError: it is there but sends nothing.
        """
        deadline = self._deadline or Deadline(self._timeout if patience is None else patience)
        connecting = Deadline(_CONNECT_SECONDS)
        while not self._watched.wait(zmq.POLLIN):
            if self._watched.gone and not self._watched.wait(zmq.POLLIN, 0):
                raise WireError(f"the parameter server closed {self.address}")
            if self._watched.refused:
                raise WireError(
                    f"the parameter server at {self.address} refused this worker: it serves "
                    "another, or none of this user (PS_IPC_UIDS)"
                )
            if connecting.remaining() == 0.0 and not self._watched.connected:
                raise WireError(f"no parameter server answers at {self.address}")
            deadline.check(f"the parameter server at {self.address}")
        return self._watched.socket.recv()

    def reply(self, message: bytes = ACK) -> None:
        self._watched.socket.send(message)

    def close(self) -> None:
        self._watched.close()


def _listens(url: str) -> bool:
    path = url.removeprefix("ipc://")
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError, ValueError):
        probe.connect(f"\0{path[1:]}" if path.startswith("@") else path)
        return True
    return False


@contextlib.contextmanager
def open_context() -> Iterator[zmq.Context]:
    """A zmq context of one update; on leaving, what is still being sent gets ``_LINGER_MS``."""
    context = zmq.Context()
    try:
        yield context
    finally:
        context.destroy(_LINGER_MS)
