"""Who is still there: every rank holds a connection to rank 0 that dies with its process.

The kernel closes the connections of a process however it ends, and gives up those of a host that
does not answer any more. Rank 0 tells everybody who is gone. A process that is only stopped is not:
there the deadline of the operation ends the waiting.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

_CUT_OFF_AFTER = 8  # seconds without a sign of life from a host
_HELLO_SECONDS = 10.0  # for a connection to say who it is
_LOOK = 0.15  # seconds between two looks at the clock
_LOOKS_PAST_THE_END = 4  # in a row: a process that was stopped itself gets as many after it wakes
_MAX_LINE = 1 << 20

_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    """A child of this process must not hold its connections open after it."""
    for held in list(_sockets):
        held.close()


os.register_at_fork(after_in_child=_close_in_child)


class Peers:
    """The ranks of a world, as one of them sees it."""

    @property
    def gone(self) -> frozenset[int]:
        """The ranks whose process has ended, or whose host is cut off."""
        return frozenset()

    @property
    def replaces(self) -> bool:
        """Whether this process has taken the place of one that was in this world before."""
        return False

    def expect_end(self, seconds: float | None) -> None:
        """If what goes on now is not over so long after, give up connections that block it."""

    def close(self) -> None:
        """Leave: for the others this rank is gone."""


class Host(Peers):
    """Rank 0's view: it keeps everybody's connection."""

    def __init__(self) -> None:
        self._listener = _listen()
        self.port: int = self._listener.getsockname()[1]
        self.token = secrets.token_hex(16)
        self._ranks: dict[socket.socket, int] = {}
        self._seen: set[int] = set()
        self._gone: frozenset[int] = frozenset()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._wake, self._woken = _socket_pair()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._thread = _start(self._run, "checkpoint-engine-liveness")

    @property
    def gone(self) -> frozenset[int]:
        return self._gone

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._wake.send(b"x")
        self._thread.join(1.0)

    def _run(self) -> None:
        try:
            while True:
                for key, _ in self._selector.select():
                    if key.data is None:
                        return
                    key.data(key.fileobj)
        finally:
            for key in list(self._selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]  # all are sockets
            self._selector.close()
            self._wake.close()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            _keep_alive(connection)
            self._selector.register(connection, selectors.EVENT_READ, self._greet)

    def _greet(self, connection: socket.socket) -> None:
        """The first line of a connection says which rank it is, and that it may be here."""
        try:
            hello = json.loads(connection.recv(1024))
            if not secrets.compare_digest(str(hello["token"]), self.token):
                raise ValueError("a stranger")
            rank = int(hello["rank"])
            replaces = rank in self._seen
            self._send(connection, {"gone": sorted(self._gone - {rank}), "replaces": replaces})
        except (OSError, ValueError, KeyError, TypeError):
            self._drop(connection)
            return
        self._ranks[connection] = rank
        self._seen.add(rank)
        self._selector.modify(connection, selectors.EVENT_READ, self._listen_to)
        if rank in self._gone:
            self._tell(self._gone - {rank})

    def _listen_to(self, connection: socket.socket) -> None:
        """Ranks say nothing more: what arrives here is the end."""
        with contextlib.suppress(OSError):
            if connection.recv(1024):
                return
        rank = self._ranks.pop(connection)
        self._drop(connection)
        if rank not in self._ranks.values():
            self._tell(self._gone | {rank})

    def _tell(self, gone: frozenset[int]) -> None:
        self._gone = gone
        for connection in list(self._ranks):
            with contextlib.suppress(OSError):
                self._send(connection, {"gone": sorted(gone)})

    def _send(self, connection: socket.socket, message: dict[str, Any]) -> None:
        connection.send(json.dumps(message).encode() + b"\n", socket.MSG_DONTWAIT)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()


class Guest(Peers):
    """Any other rank's view: what rank 0 tells it, and whether rank 0 itself is there."""

    def __init__(
        self, rank: int, addr: str, port: int, token: str, on_silence: Callable[[], None]
    ) -> None:
        """Connect to rank 0.

        Args:
            on_silence: called, in another thread, when rank 0 is gone, or the end that
                ``expect_end`` named has passed.

        Raises:
            OSError: it does not answer.
        """
        self._on_silence = on_silence
        self._gone: frozenset[int] = frozenset()
        self._end: float | None = None
        self._socket = socket.create_connection((addr, port), timeout=_HELLO_SECONDS)
        _sockets.add(self._socket)
        try:
            _keep_alive(self._socket)
            self._socket.sendall(json.dumps({"token": token, "rank": rank}).encode() + b"\n")
            self._lines = _Lines(self._socket)
            answer = next(self._lines)
        except BaseException:
            self._socket.close()
            raise
        self._replaces = bool(answer["replaces"])
        self._gone = frozenset(answer["gone"])
        self._socket.settimeout(_LOOK)
        self._thread = _start(self._run, "checkpoint-engine-liveness")

    @property
    def gone(self) -> frozenset[int]:
        return self._gone

    @property
    def replaces(self) -> bool:
        return self._replaces

    def expect_end(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def _run(self) -> None:
        past = 0
        try:
            while past < _LOOKS_PAST_THE_END:
                try:
                    self._gone = frozenset(next(self._lines)["gone"])
                except TimeoutError:
                    end = self._end
                    past = past + 1 if end is not None and time.monotonic() > end else 0
        except (OSError, ValueError, KeyError, TypeError, StopIteration):
            self._gone = frozenset({0})
        finally:
            self._socket.close()
            self._on_silence()


class _Lines:
    """JSON objects from a socket, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._rest = b""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        """Raises ``TimeoutError`` if none comes in time, ``ConnectionError`` at the end."""
        while b"\n" not in self._rest:
            received = self._connection.recv(4096)
            if not received or len(self._rest) > _MAX_LINE:
                raise ConnectionError("rank 0 closed the connection")
            self._rest += received
        line, _, self._rest = self._rest.partition(b"\n")
        return dict(json.loads(line))


def _listen() -> socket.socket:
    """On every interface, as the store does; who has no token is sent away."""
    if socket.has_dualstack_ipv6():
        listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        listener = socket.create_server(("", 0))
    _sockets.add(listener)
    return listener


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair()
    _sockets.update(pair)
    return pair


def _keep_alive(connection: socket.socket) -> None:
    """Have the kernel find out, by itself, that the other host is cut off."""
    _sockets.add(connection)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _CUT_OFF_AFTER // 2)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _CUT_OFF_AFTER // 4)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _CUT_OFF_AFTER)


def _start(run: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
