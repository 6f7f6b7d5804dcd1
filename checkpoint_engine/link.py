"""The two ends of the connection between a server rank and its worker.

The server binds, the worker connects. Each end watches its connection, so that a peer that dies is
noticed at once and not by a timeout.
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

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import WireError
from checkpoint_engine.leftovers import abandoned, create_locked, remove
from checkpoint_engine.wire import ACK, encode_abort

_LOOK_MS = 50  # how long a wait may go without asking whether to go on
_CONNECT_SECONDS = 5.0  # servers listen before they ask anybody to connect
_LINGER_MS = 1000  # for an abort message to leave before its socket closes
_MAX_PATH = 107  # bytes of a Unix socket path
_CONNECTED = zmq.EVENT_HANDSHAKE_SUCCEEDED
_GONE = zmq.EVENT_DISCONNECTED
_PREFIX = "ps-"


class Address:
    """An address for one update, which nobody can guess and no earlier update used.

    A socket file in a folder that only this user can enter: ``PS_IPC_DIR``, else one of ours below
    ``XDG_RUNTIME_DIR`` or the temporary folder. ``PS_IPC_ABSTRACT=1``: the abstract namespace.
    """

    def __init__(self) -> None:
        """Raises ``RuntimeError`` if the folder is somebody else's, or its path is too long."""
        self._lock: tuple[str, int] | None = None
        if os.environ.get("PS_IPC_ABSTRACT") == "1":
            self.url = f"ipc://@checkpoint-engine-{_new_name()}.sock"
            return
        folder = _socket_folder()
        for left in abandoned(folder, f"{_PREFIX}*.lock"):
            remove(left.with_suffix(".sock"))
            remove(left)
        longest = folder / f"{_new_name()}.sock"
        if len(os.fsencode(longest)) > _MAX_PATH:
            raise RuntimeError(
                f"the socket path {longest} is longer than {_MAX_PATH} bytes: set PS_IPC_DIR to a "
                "shorter folder, or PS_IPC_ABSTRACT=1"
            )
        self._lock = create_locked(lambda: str(folder / f"{_new_name()}.lock"))
        self.url = f"ipc://{Path(self._lock[0]).with_suffix('.sock')}"

    def close(self) -> None:
        """Remove the socket's file, which zmq leaves."""
        if self._lock is not None:
            path, fd = self._lock
            self._lock = None
            remove(Path(path).with_suffix(".sock"))
            remove(path)
            os.close(fd)


def _new_name() -> str:
    return f"{_PREFIX}{secrets.token_hex(8)}"


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
    """A socket and the monitor of its connection."""

    def __init__(self, context: zmq.Context, kind: int) -> None:
        self.socket: zmq.Socket = context.socket(kind)
        self.socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._monitor = self.socket.get_monitor_socket(_CONNECTED | _GONE)
        self._poller = zmq.Poller()
        self._poller.register(self._monitor, zmq.POLLIN)
        self.connected = False
        self.gone = False

    def wait(self, event: int, timeout_ms: int = _LOOK_MS) -> bool:
        """Whether the socket is ready for ``event`` (POLLIN, POLLOUT) by then, or its peer left."""
        self._poller.register(self.socket, event)
        ready = dict(self._poller.poll(timeout_ms))
        self.look()
        return self.socket in ready

    def look(self) -> None:
        """Learn what happened to the connection."""
        while self._monitor.poll(0):
            kind = recv_monitor_message(self._monitor)["event"]
            self.connected |= kind == _CONNECTED
            self.gone |= kind == _GONE and self.connected

    def close(self) -> None:
        self.socket.disable_monitor()
        self._monitor.close(0)
        self.socket.close()


class WorkerLink:
    """The server's end: one worker, one update. Lives in the thread that runs the update."""

    def __init__(self, context: zmq.Context, address: Address) -> None:
        """Takes ``address`` over, and gives it up when closed."""
        self._address = address
        self.url = address.url
        # DEALER, not REQ: an abort may follow a message that the worker has not answered yet.
        self._watched = _Watched(context, zmq.DEALER)
        try:
            self._watched.socket.bind(address.url)
        except zmq.ZMQError as error:
            self.close()
            raise RuntimeError(f"cannot listen at {address.url}: {error}") from error
        self._unanswered = 0

    def send(self, message: bytes, check: Callable[[], None]) -> None:
        """Send, once the worker is connected; ``check`` ends the wait by raising."""
        while not (self._watched.wait(zmq.POLLOUT) and self._sent(message)):
            check()
            self._raise_if_gone()
        self._unanswered += 1

    def receive(self, check: Callable[[], None]) -> bytes:
        """The worker's reply to the oldest unanswered message.

        Raises:
            WireError: the worker is gone.
        """
        while not self._watched.wait(zmq.POLLIN):
            check()
            if self._watched.gone and not self._watched.wait(zmq.POLLIN, 0):
                self._raise_if_gone()
        self._unanswered -= 1
        return self._watched.socket.recv_multipart()[-1]

    def check(self) -> None:
        """Raise ``WireError`` if the worker is gone. For waits for something else."""
        self._watched.look()
        self._raise_if_gone()

    def abort(self, reason: str) -> None:
        """Tell a worker that is still there to give up; it does not reply."""
        if self._watched.wait(zmq.POLLOUT, 0) and not self._watched.gone:
            self._sent(encode_abort(reason))

    def close(self) -> None:
        """Stop listening."""
        self._watched.close()
        self._address.close()

    def _sent(self, message: bytes) -> bool:
        """A blocking send would never return where the worker left after the last look."""
        try:
            self._watched.socket.send_multipart([b"", message], zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _raise_if_gone(self) -> None:
        if self._watched.gone:
            raise WireError("the inference worker closed its connection before the update was over")


class ServerLink:
    """The worker's end."""

    def __init__(self, context: zmq.Context, address: str, timeout: float) -> None:
        """``timeout``: seconds to wait for the server's next message, if it does not set a
        deadline."""
        self.address = address
        self._timeout = timeout
        self._deadline: Deadline | None = None
        self._watched = _Watched(context, zmq.REP)
        try:
            self._watched.socket.connect(address)
        except zmq.ZMQError as error:
            self._watched.close()
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
        while not self._watched.wait(zmq.POLLIN):
            if self._watched.gone and not self._watched.wait(zmq.POLLIN, 0):
                raise WireError(f"the parameter server closed {self.address}")
            if connecting.remaining() == 0.0 and not self._watched.connected:
                raise WireError(f"no parameter server answers at {self.address}")
            deadline.check(f"the parameter server at {self.address}")
        return self._watched.socket.recv()

    def reply(self, message: bytes = ACK) -> None:
        self._watched.socket.send(message)

    def close(self) -> None:
        self._watched.close()


@contextlib.contextmanager
def open_context() -> Iterator[zmq.Context]:
    """A zmq context of one update; on leaving, what is still being sent gets ``_LINGER_MS``."""
    context = zmq.Context()
    try:
        yield context
    finally:
        context.destroy(_LINGER_MS)
