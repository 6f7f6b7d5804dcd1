"""Who is still there: every rank holds a connection to rank 0 that dies with its process.

The kernel closes the connections of a process however it ends, and gives up those of a host that
does not answer any more. Rank 0 tells everybody who is gone. A process that is only stopped is not:
there the deadline of the operation ends the waiting.

The same connections carry a bell: a rank that has put something into the store that others wait for
rings, and they look. So nobody asks the store again and again.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable

from checkpoint_engine import settings

_CUT_OFF_AFTER = 8  # seconds without a sign of life from a host
_HELLO_SECONDS = 10.0  # for a stranger to say who it is, and for rank 0 to answer
_LOOK = 0.15  # seconds between two looks at the clock
_UNTOLD = 0.05  # seconds between two looks at the store where no bell can be heard
_FOR_THE_MUTE = 0.25  # seconds between two bells while a rank is missing that may have none
_BELL = b"\a"  # one byte: where a receiver's buffer is full, no half of it can arrive
_BELL_OF_LEADERS = b"l"  # from a rank: not for those that follow another one of their host
_FOLLOWS, _LEADERLESS = b"f", b"n"  # from a rank: which of the two it is from now on
_LOOKS_PAST_THE_END = 4  # in a row: a process that was stopped itself gets as many after it wakes
_LONGEST_HELLO, _LONGEST_ANSWER = 256, 1 << 20  # bytes; a little more may be read

_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def close_in_child(connection: socket.socket) -> None:
    """A child of this process must not hold its connections open after it."""
    _sockets.add(connection)


def _close_all() -> None:
    for held in list(_sockets):
        held.close()


os.register_at_fork(after_in_child=_close_all)


class Liveness:
    """Which ranks of a world are there, as one of them sees it. Here: nobody can be gone.

    Attributes:
        gone: the ranks whose process has ended, or whose host is cut off.
        replaces: whether this process has taken the place of one that was in this world before.
    """

    gone: frozenset[int] = frozenset()
    replaces = False
    _hears = False

    def __init__(self) -> None:
        self._rings = 0
        self._bell = threading.Condition()

    @property
    def rings(self) -> int:
        """Another number once there may be something new in the store: a rank has rung, or one is
        gone. Where no bell can be heard, it changes by itself."""
        return self._rings if self._hears else int(time.monotonic() / _UNTOLD)

    def ring(self) -> None:
        """Have all other ranks look at the store."""

    def ring_leaders(self) -> None:
        """Have those look that follow no other rank of their host."""

    def follow(self, follows: bool) -> None:
        """Say whether this rank follows another one of its host; at first it does not."""

    def await_ring(self, heard: int, seconds: float) -> None:
        """Return once ``rings`` is no longer ``heard``, or after ``seconds``."""
        if not self._hears:
            time.sleep(seconds)
            return
        with self._bell:
            if self._rings == heard:
                self._bell.wait(seconds)

    def _hear(self) -> None:
        with self._bell:
            self._rings += 1
            self._bell.notify_all()

    def expect_end(self, seconds: float | None) -> None:
        """Close connections that still block ``seconds`` from now; ``None``: never."""

    def close(self) -> None:
        """Leave: for the others this rank is gone."""


class LivenessServer(Liveness):
    """Rank 0 keeps a connection of every other rank, and tells all of them who is gone.

    Anybody may connect to its port. A connection is a stranger's until its first line, ``token
    rank``, says that a rank of this world is at its other end. Every line of the answer is
    ``replaces gone...``: 0 or 1, then the ranks that are gone. Between lines may be bells. What a
    rank sends after its first line rings them at all others. A rank that cannot reach this port
    cannot ring: until each has been here, bells ring now and then by themselves.
    """

    _hears = True

    def __init__(self, size: int) -> None:
        """``size``: of the world.

        Raises:
            RuntimeError: ``PS_LIVENESS_PORT`` is taken.
        """
        super().__init__()
        self._listener = _listen(settings.liveness_port())
        self.port: int = self._listener.getsockname()[1]
        self.token = secrets.token_hex(16)
        self._size = size
        self._strangers: dict[socket.socket, tuple[float, _Lines]] = {}  # the oldest first
        self._ranks: dict[socket.socket, int] = {}
        self._follow: set[socket.socket] = set()  # those of ``_ranks`` that a leader tells
        self._seen: set[int] = set()
        self._rings_at = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._wake, self._woken = _socket_pair()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._thread = start_thread(self._run, "checkpoint-engine-liveness")

    def ring(self) -> None:
        """Called by the thread of a call, beside the one that serves the connections."""
        self._ring(list(self._ranks))

    def ring_leaders(self) -> None:
        self._ring([one for one in list(self._ranks) if one not in self._follow])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._wake.send(b"x")
        self._thread.join(1.0)

    def _run(self) -> None:
        try:
            while True:
                for key, _ in self._selector.select(self._pause()):
                    if key.data is None:
                        return
                    try:
                        key.data(key.fileobj)
                    except BlockingIOError:
                        pass  # the rest of the line is still to come
                    except Exception:  # all ranks depend on this thread: only the sender goes
                        self._drop(key.fileobj)  # type: ignore[arg-type]  # a socket
        finally:
            for key in list(self._selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]  # all are sockets
            self._selector.close()
            self._wake.close()

    def _pause(self) -> float | None:
        """What is due goes first; returns when something is again, in seconds."""
        late = self._drop_strangers()
        if len(self._seen) == self._size - 1:
            return late
        now = time.monotonic()
        if now >= self._rings_at:
            self._rings_at = now + _FOR_THE_MUTE
            self._hear()
            self.ring()
        due = self._rings_at - now
        return due if late is None else min(late, due)

    def _drop_strangers(self) -> float | None:
        """Drop those that are late or too many; returns when the next one is late, in seconds."""
        while self._strangers:
            oldest, (late, _) = next(iter(self._strangers.items()))
            seconds = late - time.monotonic()
            # Every rank may be connecting anew, and a scanner of ports besides.
            if seconds > 0 and len(self._strangers) <= 2 * self._size + 64:
                return seconds
            self._drop(oldest)
        return None

    def _accept(self, listener: socket.socket) -> None:
        """One connection a turn, so that no flood keeps a rank's hello from being read."""
        try:
            connection, _ = listener.accept()
            late = time.monotonic() + _HELLO_SECONDS
            self._strangers[connection] = late, _Lines(connection, _LONGEST_HELLO)
            connection.setblocking(False)
            _keep_alive(connection)
            self._selector.register(connection, selectors.EVENT_READ, self._greet)
        except Exception:
            time.sleep(_LOOK)  # no descriptor is left: the listener would be ready again at once

    def _greet(self, connection: socket.socket) -> None:
        token, number = next(self._strangers[connection][1])
        rank = int(number)
        if not secrets.compare_digest(token, self.token.encode()) or not 0 < rank < self._size:
            raise ValueError("a stranger")
        self._send(connection, self.gone - {rank}, replaces=rank in self._seen)
        del self._strangers[connection]
        self._ranks[connection] = rank
        self._seen.add(rank)
        self._selector.modify(connection, selectors.EVENT_READ, self._listen_to)
        if rank in self.gone:
            self._tell(self.gone - {rank})

    def _listen_to(self, connection: socket.socket) -> None:
        """Ranks ring, and say whether they follow; several rings at once are one."""
        said = connection.recv(1024)
        if not said:
            raise ConnectionError("the rank has ended")
        if state := [byte for byte in said if byte in _FOLLOWS + _LEADERLESS][-1:]:
            (self._follow.add if bytes(state) == _FOLLOWS else self._follow.discard)(connection)
        if bells := said.translate(None, _FOLLOWS + _LEADERLESS):
            self._hear()
            for_all = bells.strip(_BELL_OF_LEADERS)
            others = [one for one in self._ranks if for_all or one not in self._follow]
            self._ring([one for one in others if one is not connection])

    def _ring(self, connections: list[socket.socket]) -> None:
        for connection in connections:
            with contextlib.suppress(OSError):  # whoever does not read it has others to read
                connection.send(_BELL)

    def _tell(self, gone: frozenset[int]) -> None:
        self.gone = gone
        self._hear()
        for connection in list(self._ranks):
            with contextlib.suppress(OSError):
                self._send(connection, gone)

    def _send(self, to: socket.socket, gone: frozenset[int], replaces: bool = False) -> None:
        to.send(" ".join(map(str, [int(replaces), *sorted(gone)])).encode() + b"\n")

    def _drop(self, connection: socket.socket) -> None:
        """Also of one that has been dropped in the same turn already."""
        self._strangers.pop(connection, None)
        self._follow.discard(connection)
        rank = self._ranks.pop(connection, None)
        with contextlib.suppress(KeyError, ValueError):  # it may be closed already
            self._selector.unregister(connection)
        connection.close()
        if rank is not None and rank not in self._ranks.values():
            self._tell(self.gone | {rank})


class LivenessClient(Liveness):
    """Any other rank learns from rank 0 who is gone, and notices when rank 0 itself is."""

    _hears = True

    def __init__(
        self, rank: int, addr: str, port: int, token: str, on_silence: Callable[[], None]
    ) -> None:
        """Connect to rank 0.

        Args:
            on_silence: called, in another thread, when rank 0 is gone, or the end that
                ``expect_end`` named has passed.

        Raises:
            OSError: it does not answer.
            ValueError: its answer is malformed.
        """
        super().__init__()
        self._on_silence = on_silence
        self._end: float | None = None
        self._socket = socket.create_connection((addr, port), timeout=_HELLO_SECONDS)
        _sockets.add(self._socket)
        try:
            _keep_alive(self._socket)
            self._socket.sendall(f"{token} {rank}\n".encode())
            self._lines = _Lines(self._socket, _LONGEST_ANSWER)
            self.replaces = self._learn(next(self._lines))
        except BaseException:
            self._socket.close()
            raise
        self._socket.settimeout(_LOOK)
        self._thread = start_thread(self._run, "checkpoint-engine-liveness")

    def expect_end(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def ring(self) -> None:
        self._say(_BELL)

    def ring_leaders(self) -> None:
        self._say(_BELL_OF_LEADERS)

    def follow(self, follows: bool) -> None:
        self._say(_FOLLOWS if follows else _LEADERLESS)

    def _say(self, byte: bytes) -> None:
        with contextlib.suppress(OSError):
            self._socket.send(byte)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def _learn(self, line: list[bytes]) -> bool:
        """Who is gone; returns whether this rank replaces another process."""
        replaces, *gone = map(int, line)
        self.gone = frozenset(gone)
        return bool(replaces)

    def _run(self) -> None:
        past, looked = 0, time.monotonic()
        try:
            while past < _LOOKS_PAST_THE_END:
                with contextlib.suppress(TimeoutError):
                    line = next(self._lines)
                    if line != [_BELL]:
                        self._learn(line)
                    self._hear()
                if (now := time.monotonic()) - looked >= _LOOK:  # however many bells ring
                    looked, end = now, self._end
                    past = past + 1 if end is not None and now > end else 0
        except Exception:  # the connection has ended, or what arrives is not rank 0's
            self.gone = frozenset({0})
            self._hear()
        finally:
            try:
                self._on_silence()  # first: a call that begins now must not begin with this world
            finally:
                self._socket.close()


class _Lines:
    """The lines that arrive at a socket, in words; ``[_BELL]`` where bells came and no line."""

    def __init__(self, connection: socket.socket, longest: int) -> None:
        self._connection = connection
        self._longest = longest
        self._rest = b""

    def __next__(self) -> list[bytes]:
        """Raises ``TimeoutError`` if none comes in time, ``BlockingIOError`` if the socket does not
        wait, ``ConnectionError`` at the end. What has come of a line is kept."""
        while b"\n" not in self._rest:
            received = self._connection.recv(4096)
            self._rest += received.replace(_BELL, b"")
            if not received or len(self._rest) > self._longest:
                raise ConnectionError("the connection was closed, or a line is too long")
            if _BELL in received and b"\n" not in self._rest:
                return [_BELL]
        line, _, self._rest = self._rest.partition(b"\n")
        return line.split()


def _listen(port: int) -> socket.socket:
    """On every interface, as the store does; who has no token is sent away."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        listener = socket.create_server(("", port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        raise RuntimeError(f"rank 0 cannot listen at PS_LIVENESS_PORT={port}: {error}") from error
    listener.setblocking(False)
    _sockets.add(listener)
    return listener


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair()
    _sockets.update(pair)
    return pair


def _keep_alive(connection: socket.socket) -> None:
    """Have the kernel find out, by itself, that the other host is cut off."""
    _sockets.add(connection)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a bell follows another
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _CUT_OFF_AFTER // 2)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _CUT_OFF_AFTER // 4)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _CUT_OFF_AFTER)


def start_thread(run: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
