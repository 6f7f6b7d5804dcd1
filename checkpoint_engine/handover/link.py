"""The two ends of the connection between a server rank and its worker.

The server binds, the worker connects. Each end watches its connection, so that a peer that dies is
noticed at once and not by a timeout. One process may connect, see ``authenticator``.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import zmq
from zmq.utils.monitor import recv_monitor_message

from checkpoint_engine import settings
from checkpoint_engine.errors import WireError
from checkpoint_engine.ground.deadline import Deadline
from checkpoint_engine.ground.folders import check_private
from checkpoint_engine.ground.limits import check_descriptors
from checkpoint_engine.handover.authenticator import Authenticator
from checkpoint_engine.handover.stale_files import create_locked, stale_files
from checkpoint_engine.handover.wire import ACK, encode_abort

_LOOK_MS = 50  # how long a wait may go without asking whether to go on
_CONNECT_SECONDS = 5.0  # servers listen before they ask anybody to connect
_LINGER_MS = 1000  # for an abort message to leave before its socket closes
_LET_IN_MS = 200  # for the handshake of a worker that was just let in
_MAX_PATH = 107  # bytes of a Unix socket path
_MAX_REPLY = 64 << 20  # bytes; libzmq drops the connection of a peer that announces more
_MAX_MESSAGE = 1 << 30
_PREFIX = "ps-"
_CONNECTED, _DISCONNECTED = zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_DISCONNECTED
_CLOSED = "the inference worker closed its connection before the update was over"
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH


def new_address() -> tuple[str, Path | None, int]:
    """An address for one update, which nobody can guess and no earlier update used.

    A socket file in a folder that only this user can enter: ``PS_IPC_DIR``, else one of ours below
    ``XDG_RUNTIME_DIR`` or the temporary folder. ``PS_IPC_ABSTRACT=1``: the abstract namespace.

    Returns the address, its file, and the descriptor of a lock, to be held as long as it is used.
    Raises ``RuntimeError`` if others may change what is in the folder, or its path is too long.
    """
    name = f"{_PREFIX}{secrets.token_hex(8)}.sock"
    if settings.ipc_abstract():
        return f"ipc://@checkpoint-engine-{name}", None, -1
    folder = _socket_folder()
    for stale in stale_files(folder, f"{_PREFIX}*.lock"):
        _remove_files(stale)
    check_length(folder / name)
    lock, descriptor = create_locked(folder, _PREFIX, ".lock")
    path = lock.with_suffix(".sock")
    return f"ipc://{path}", path, descriptor


def _remove_files(path: Path) -> None:
    for suffix in (".sock", ".own", ".lock"):  # release 0.5.0 listened at a second file, ".own"
        path.with_suffix(suffix).unlink(missing_ok=True)


def check_length(path: Path) -> None:
    """Raise ``RuntimeError`` for a socket that has no room in an address of the kernel."""
    if len(os.fsencode(path)) > _MAX_PATH:
        raise RuntimeError(
            f"the socket path {path} is longer than {_MAX_PATH} bytes: set PS_IPC_DIR "
            "to a shorter folder, or PS_IPC_ABSTRACT=1"
        )


def where_sockets_are() -> Path:
    """The folder of the sockets, which need not be there."""
    if chosen := settings.ipc_folder():
        return Path(chosen).absolute()
    runtime = settings.runtime_folder()
    base = runtime if os.path.isdir(runtime) else tempfile.gettempdir()
    return Path(base) / f"checkpoint-engine-{os.getuid()}"


def _socket_folder() -> Path:
    folder = where_sockets_are()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Raise ``RuntimeError`` if others may change what is in the folder of the sockets."""
    if settings.ipc_folder():
        try:
            check_private(folder, settings.admitted_users())
        except PermissionError as error:
            raise RuntimeError(f"PS_IPC_DIR cannot be used: {error}") from error
        return
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise RuntimeError(
            f"{folder} must be a folder that only user {os.getuid()} can enter: remove it, or set "
            "PS_IPC_DIR"
        )


def _new_socket(context: zmq.Context, kind: int, max_message: int) -> zmq.Socket:
    check_descriptors()
    made: zmq.Socket = context.socket(kind)
    made.setsockopt(zmq.LINGER, _LINGER_MS)
    made.setsockopt(zmq.MAXMSGSIZE, max_message)
    return made


class WorkerLink:
    """The server's end: one worker, one update. Lives in the thread that runs the update.

    A worker that leaves before it was sent a message may come again, or another one may come.
    """

    def __init__(self, context: zmq.Context) -> None:
        """Listen at a new address. ``context``: of this update alone."""
        self.url, self._path, self._lock = new_address()
        self._unanswered = 0
        self._has_told = False
        self._poller = zmq.Poller()
        try:
            # DEALER, not REQ: an abort may follow a message that the worker has not answered yet.
            self._socket = _new_socket(context, zmq.DEALER, _MAX_REPLY)
            self._authenticator = Authenticator(context, self._socket, self._poller)
        except BaseException:
            self._give_up_address()
            raise
        try:
            self._socket.bind(self.url)
            if self._path is not None:
                os.chmod(self._path, 0o666 if settings.admitted_users() else 0o600)
        except (zmq.ZMQError, OSError) as error:
            self.close()
            raise RuntimeError(f"cannot listen at {self.url}: {error}") from error

    def let_in(self) -> None:
        """Let in a worker that has come, before it is sent anything."""
        self._authenticator.answer()

    def send(self, message: bytes, check: Callable[[], None]) -> None:
        """Send, once the worker is connected; ``check`` ends the wait by raising.

        Raises:
            WireError: the worker is gone, or has replied to a message before it was sent.
        """
        while not (self._wait(zmq.POLLOUT) and self._worker_kept_turn() and self._sent(message)):
            check()
            if self._gone:
                raise WireError(_CLOSED)
        self._unanswered += 1

    def receive(self, check: Callable[[], None]) -> bytes:
        """The worker's reply to the oldest unanswered message.

        Args:
            check: called now and then while there is none.

        Raises:
            WireError: the worker is gone, or has sent more replies than it got messages.
        """
        while not self._wait(zmq.POLLIN, _LOOK_MS):
            check()
            self.check()
        reply = self._socket.recv_multipart()[-1]
        self._unanswered -= 1
        self._worker_kept_turn()
        return reply

    def has_reply(self) -> bool:
        """Whether ``receive`` would not wait."""
        return self._wait(zmq.POLLIN, 0)

    def check(self) -> None:
        """Raise ``WireError`` if the worker is gone and has left no reply, or replied out of turn.
        For waits for something else."""
        is_gone = self._gone  # first, for the last reply may come between the two looks
        if not self._wait(zmq.POLLIN, 0) and is_gone:
            raise WireError(_CLOSED)
        self._worker_kept_turn()

    @property
    def has_worker(self) -> bool:
        """Whether a worker has come: it is connected, or was sent a message."""
        return self._authenticator.closed or self._authenticator.worker_is_connected

    def abort(self, reason: str) -> None:
        """Tell a worker that is still there to give up, once; it does not reply."""
        self._authenticator.answer()
        if self._has_told or not self._authenticator.worker_is_connected:
            return
        if self._socket.poll(_LET_IN_MS, zmq.POLLOUT):
            self._has_told = self._sent(encode_abort(reason))

    def close(self) -> None:
        """Stop listening."""
        self._authenticator.close()
        self._socket.close()
        self._give_up_address()

    def _give_up_address(self) -> None:
        if self._path is not None:  # zmq leaves the file
            _remove_files(self._path)
            os.close(self._lock)
            self._path = None

    def _wait(self, event: int, timeout_ms: int = _LOOK_MS) -> bool:
        """Whether the socket is ready for ``event`` (POLLIN, POLLOUT) by then; answers who asks to
        connect."""
        self._poller.register(self._socket, event)
        ready = dict(self._poller.poll(timeout_ms))
        self._authenticator.answer()
        return self._socket in ready

    def _sent(self, message: bytes) -> bool:
        """A blocking send would never return where the worker left after the last look."""
        try:
            self._socket.send_multipart([b"", message], zmq.NOBLOCK)
        except zmq.Again:
            return False
        self._authenticator.closed = True
        if self._path is not None:  # zmq cannot stop listening without ending connections
            self._path.unlink(missing_ok=True)
        return True

    def _worker_kept_turn(self) -> bool:
        """Always true: raises otherwise. A reply that answers nothing must not be taken for the
        answer to the next message."""
        if self._unanswered == 0 and self._socket.poll(0, zmq.POLLIN):
            raise WireError("the inference worker replied to a message before it was sent")
        return True

    @property
    def _gone(self) -> bool:
        """A socket that listens can send only while it has a connection."""
        return self._authenticator.closed and not self._socket.poll(0, zmq.POLLOUT)


class ServerLink:
    """The worker's end."""

    def __init__(self, context: zmq.Context, address: str, timeout: float) -> None:
        """``timeout``: seconds to wait for the server's next message, if it does not set a
        deadline."""
        self.address = address
        self._timeout = timeout
        self._deadline: Deadline | None = None
        self._connected = self._gone = self._refused = False
        self._socket = _new_socket(context, zmq.REP, _MAX_MESSAGE)
        self._monitor = self._socket.get_monitor_socket(_CONNECTED | _REFUSED | _DISCONNECTED)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise WireError(f"cannot connect to {address!r}: {error}") from error

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
        while not self._wait():
            if self._gone and not self._wait(0):
                raise WireError(f"the parameter server closed {self.address}")
            if self._refused:
                raise WireError(
                    f"the parameter server at {self.address} refused this worker: it serves "
                    "another, or none of this user (PS_IPC_UIDS)"
                )
            if connecting.remaining() == 0.0 and not self._connected:
                raise WireError(f"no parameter server answers at {self.address}")
            deadline.check(f"the parameter server at {self.address}")
        return self._socket.recv()

    def reply(self, message: bytes = ACK) -> None:
        self._socket.send(message)

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close()

    def _wait(self, timeout_ms: int = _LOOK_MS) -> bool:
        """Whether a message has come by then."""
        ready = dict(self._poller.poll(timeout_ms))
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            self._connected |= event == _CONNECTED
            self._refused |= event == _REFUSED
            self._gone |= event == _DISCONNECTED and self._connected
        return self._socket in ready


@contextlib.contextmanager
def open_context() -> Iterator[zmq.Context]:
    """A zmq context of one update; on leaving, what is still being sent gets ``_LINGER_MS``.

    Raises:
        RuntimeError: there are too few descriptors left.
    """
    check_descriptors()
    context = zmq.Context()
    try:
        yield context
    finally:
        context.destroy(_LINGER_MS)
