"""The ranks of one host: one of them leads, and speaks to the store for those that follow it.

Whoever binds the host's name first leads. The name is an abstract Unix socket's, which leads to the
same process everywhere in one network namespace and nowhere else: so ranks that meet there are on
one host. It is made of a secret of the world, and the kernel tells whose process is at the other
end.

The leader has no thread: it looks at what the others have said when it takes part in an exchange.
Nobody depends on it. A rank that hears nothing from it goes to the store by itself, as all ranks
do in the first exchange of a world.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Callable

from checkpoint_engine.ground.sockets import is_of_this_user
from checkpoint_engine.world.liveness import close_in_child

_AT_ONCE = 0.25  # seconds for what the kernel does by itself
_TRIES, _APART = 5, 0.001  # to join, and seconds between two: a name is bound before it listens
_PASSES = 4  # of one look at the sockets, so that no flood of connections holds up the leader
_LENGTH = struct.Struct("!H")  # of the name of an exchange, which begins every message
_LONGEST = 128 << 10  # bytes of a message: below the least buffer of a socket
_GREETING = "greeting"  # in place of a name

VALUE, STORE, APART = b"v", b"s", b"a"
"""How the content of a message begins. A value follows; the value is in the store, as it is too
long for a message; whoever reads this must go to the store by itself, or its sender does."""

Words = tuple[bytes, bytes, bytes]  # APART or VALUE, a digest, and the value


def name_of(secret: str) -> str:
    """Of the socket at which the ranks of a host meet. Others can list names, but not join."""
    return f"\0checkpoint-engine-{hashlib.sha256(secret.encode()).hexdigest()[:32]}"


class Host:
    """The ranks of this host as one of them sees them: it leads, or follows, or neither.

    Attributes:
        leader: the number of the rank that this one follows; ``None``: it follows none yet.
        followers: the connections of the ranks that follow this one.
    """

    def __init__(self) -> None:
        self.leader: int | None = None
        self.followers: dict[int, socket.socket] = {}
        self._said: dict[int, tuple[str, Words]] = {}
        self._to_leader: socket.socket | None = None
        self._strangers: dict[socket.socket, None] = {}  # the oldest first
        self._listener: socket.socket | None = None
        self._selector: selectors.BaseSelector | None = None
        self._on_leader: Callable[[bool], None] = lambda has_one: None

    @property
    def follows(self) -> bool:
        """Whether another rank leads this host, and can be reached."""
        return self._to_leader is not None

    def join(self, rank: int, size: int, secret: str, on_leader: Callable[[bool], None]) -> None:
        """Lead the ranks of this host, or follow the one that does.

        Args:
            size: of the world.
            secret: what the ranks of this world know, and nobody else.
            on_leader: told whether there is a leader to follow, when that changes.
        """
        self._rank, self._size, self._secret = rank, size, secret
        self._on_leader = on_leader
        for _ in range(_TRIES):
            if self._lead() or self._follow():
                return
            time.sleep(_APART)

    def _lead(self) -> bool:
        listener = _socket()
        try:
            listener.bind(name_of(self._secret))
            listener.listen(self._size + 64)
        except OSError:  # another rank leads, or there are no such names here
            listener.close()
            return False
        listener.setblocking(False)
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        return True

    def _follow(self) -> bool:
        connection = _socket()
        try:
            connection.connect(name_of(self._secret))
            if not is_of_this_user(connection):
                raise ConnectionError("the name is taken by another user")
            connection.send(f"{self._secret} {self._rank}".encode())
        except OSError:
            connection.close()
            return False
        self._to_leader = connection
        return True

    def close(self) -> None:
        for one in (self._to_leader, self._listener, *self._strangers, *self.followers.values()):
            if one is not None:
                one.close()
        if self._selector is not None:
            self._selector.close()
        self._to_leader = self._listener = None
        self._strangers.clear()
        self.followers.clear()

    # ------------------------------------------------------------------ as one that follows

    def say(self, name: str, digest: bytes, value: bytes) -> bool:
        """Tell the leader this rank's value of an exchange. Returns whether it was told; if not,
        this rank must go to the store by itself, and the leader knows or is lost.

        Args:
            digest: 32 bytes, of what the leader has handed on before.
        """
        if self._to_leader is None:
            return False
        if self.leader is None:
            self.hear("", 0.0)  # the greeting may have come
        if is_told := self.leader is not None and len(value) < _LONGEST // 2:
            self._send(_message(name, VALUE + digest + value))
        else:
            self._send(_message(name, APART + digest))
        return is_told and self.leader is not None

    def _send(self, message: bytes) -> None:
        assert self._to_leader is not None
        try:
            self._to_leader.send(message, socket.MSG_DONTWAIT)
        except OSError:  # also where it does not read any more
            self._lose_leader()

    def hear(self, name: str, seconds: float) -> bytes:
        """What the leader hands on of an exchange: ``VALUE`` and the value, ``STORE`` or ``APART``;
        empty if there is nothing in ``seconds``."""
        if self._to_leader is None:
            return APART
        try:
            self._to_leader.settimeout(seconds)
            said, content = _parse(self._to_leader.recv(_LONGEST))
        except (TimeoutError, BlockingIOError):
            return b""
        except (OSError, ValueError):
            self._lose_leader()
            return APART
        if said == _GREETING:
            self.leader = int.from_bytes(content, "big")
            self._on_leader(True)
        return content if said == name else b""

    def _lose_leader(self) -> None:
        """For good: from now on this rank goes to the store by itself."""
        assert self._to_leader is not None
        self._to_leader.close()
        self._to_leader = None
        if self.leader is not None:  # which it stays: what it has counted remains counted
            self._on_leader(False)

    # ------------------------------------------------------------------ as the leader

    def listen(self, name: str, seconds: float) -> dict[int, Words | None]:
        """What each rank that follows has said in an exchange; ``None``: nothing yet. Waits for the
        next one to speak, up to ``seconds``."""
        for wait in (seconds, *[0.0] * (_PASSES - 1)):
            ready = self._selector.select(wait) if self._selector is not None else []
            if not ready:
                break
            for key, _ in ready:
                one: socket.socket = key.fileobj  # type: ignore[assignment]  # all are sockets
                try:
                    self._accept(one) if one is self._listener else self._read(one)
                except BlockingIOError:
                    pass
                except (OSError, ValueError):
                    self._drop(one)
        said = {rank: self._said.get(rank, ("", None)) for rank in self.followers}
        return {rank: words if about == name else None for rank, (about, words) in said.items()}

    def hand_on(self, name: str, content: bytes) -> None:
        """Tell all that follow. Whoever does not read it goes to the store by itself."""
        if len(content) > _LONGEST - 1024:
            content = STORE
        message = _message(name, content)
        for follower in list(self.followers.values()):
            with contextlib.suppress(OSError):  # one that is gone is dropped when it is read
                follower.send(message, socket.MSG_DONTWAIT)

    def _accept(self, listener: socket.socket) -> None:
        """Anybody on this host may connect; whoever is another user's is turned away."""
        connection, _ = listener.accept()
        close_in_child(connection)
        if not is_of_this_user(connection):
            connection.close()
            return
        connection.setblocking(False)
        self._strangers[connection] = None
        assert self._selector is not None
        self._selector.register(connection, selectors.EVENT_READ)
        if len(self._strangers) > self._size + 64:
            self._drop(next(iter(self._strangers)))

    def _read(self, connection: socket.socket) -> None:
        message = connection.recv(_LONGEST)
        if connection in self._strangers:
            self._greet(connection, message)
            return
        name, content = _parse(message)
        rank = next(rank for rank, one in self.followers.items() if one is connection)
        self._said[rank] = name, (content[:1], content[1:33], content[33:])

    def _greet(self, connection: socket.socket, hello: bytes) -> None:
        secret, number = hello.split()
        rank = int(number)
        if not secrets.compare_digest(secret, self._secret.encode()) or not 0 < rank < self._size:
            raise ValueError("a stranger")
        connection.send(_message(_GREETING, self._rank.to_bytes(4, "big")))
        if (before := self.followers.get(rank)) is not None:
            self._drop(before)  # of the process that this one replaces
        del self._strangers[connection]
        self.followers[rank] = connection

    def _drop(self, connection: socket.socket) -> None:
        self._strangers.pop(connection, None)
        for rank in [rank for rank, one in self.followers.items() if one is connection]:
            del self.followers[rank]
            self._said.pop(rank, None)
        assert self._selector is not None
        with contextlib.suppress(KeyError, ValueError):  # it may be closed already
            self._selector.unregister(connection)
        connection.close()


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    close_in_child(made)
    made.settimeout(_AT_ONCE)
    return made


def _message(name: str, content: bytes) -> bytes:
    return _LENGTH.pack(len(name)) + name.encode() + content


def _parse(message: bytes) -> tuple[str, bytes]:
    """Raises ``ValueError`` for what no rank sends, such as nothing, which comes at the end."""
    try:
        (length,) = _LENGTH.unpack_from(message)
    except struct.error as error:
        raise ValueError("no message") from error
    start = _LENGTH.size
    return message[start : start + length].decode(), message[start + length :]
