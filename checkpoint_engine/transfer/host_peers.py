"""Ranks of one host whose workers read each other's staging buffers.

Unix sockets say when. An owner says where a bucket lies, and each reader that it has read it.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from checkpoint_engine.errors import broadcast_failed
from checkpoint_engine.ground.sockets import is_of_this_user

WHOLE, MAPPED, TAKEN, LEFT = b"w", b"m", b"t", b"l"
"""What a reader tells an owner: its worker reads whole buckets, said before ``MAPPED``; its worker
has mapped the staging buffers; it has read another bucket; nobody on its side maps them any
more."""

_AT_ONCE = 1.0  # seconds for what the kernel does by itself
_HELLO = struct.Struct("QQ")  # of a connection: its rank, the bytes of the first of two handles
_LONGEST_HELLO = 64 << 10
_PLACE = struct.Struct("QQ")  # of a bucket in its owner's memory: start, bytes


class HostPeers:
    """The other ranks of one update that are on this host. Every rank makes one, and closes it.

    Ranks reach each other where they share a network namespace: a container with a network of its
    own is another host. Ranks of other users are refused.

    Attributes:
        address: where the others reach this rank; up to the slash it names the host.
        outgoing: for each rank, where it is told of the buckets that this rank owns.
        incoming: for each rank, where it tells of those that it owns.
        handles: of each rank's memory, one for this rank's server and one for its worker.
    """

    def __init__(self, rank: int, ranks: Sequence[int]) -> None:
        self._rank = rank
        self._others = [other for other in ranks if other != rank]
        self.address = f"{_this_host()}/checkpoint-engine-{secrets.token_hex(8)}"
        self.outgoing: dict[int, socket.socket] = {}
        self.incoming: dict[int, socket.socket] = {}
        self.handles: dict[int, tuple[bytes, bytes]] = {}
        self._said: dict[int, Counter[bytes]] = {other: Counter() for other in self._others}
        self._listener = _socket()
        self._listener.bind(_socket_name(self.address))
        self._listener.listen(len(ranks) + 8)

    def reach(self, addresses: Mapping[int, str], make_handle: Callable[[], bytes]) -> str:
        """Connect to the other ranks, and give each of them two handles of this rank's memory.

        Args:
            addresses: of the ranks of this host.

        Returns why one cannot be reached; empty if all were.
        """
        self._others = [rank for rank in self._others if rank in addresses]
        self._said = {rank: self._said[rank] for rank in self._others}
        for rank in self._others:
            try:
                self.outgoing[rank] = connection = _socket()
                connection.connect(_socket_name(addresses[rank]))
                if not is_of_this_user(connection):
                    return f"rank {rank} runs as another user than rank {self._rank}"
                first, second = make_handle(), make_handle()
                connection.send(_HELLO.pack(self._rank, len(first)) + first + second)
                connection.setblocking(False)
            except (OSError, RuntimeError) as error:  # the latter: of a device without IPC
                return f"rank {self._rank} cannot share memory with rank {rank}: {error}"
        return ""

    def accept(self) -> None:
        """Take the others' connections. Called when each has said that it reached all.

        Raises:
            CollectiveError: a rank is not there any more.
            RuntimeError: this rank cannot take them, as it has too many open files.
        """
        while missing := sorted(set(self._others) - set(self.incoming)):
            try:
                connection, _ = self._listener.accept()
                self._take_in(connection)
            except (TimeoutError, ConnectionError) as error:
                raise broadcast_failed(
                    f"ranks {missing}, on this host, are not there: {error}"
                ) from None
            except OSError as error:
                raise RuntimeError(f"cannot share memory with ranks {missing}: {error}") from error

    def _take_in(self, connection: socket.socket) -> None:
        """Anybody on this host can connect; who is no rank of this update is turned away."""
        with contextlib.ExitStack() as refusal:
            refusal.callback(connection.close)
            hello = _first_message(connection)
            if len(hello) < _HELLO.size:
                return
            rank, first = _HELLO.unpack_from(hello)
            if rank not in self._said or rank in self.incoming:
                return
            handles = hello[_HELLO.size :]
            self.handles[rank] = handles[:first], handles[first:]
            connection.setblocking(False)
            self.incoming[rank] = connection
            refusal.pop_all()

    def offer(self, start: int, nbytes: int) -> None:
        """Tell all others that the next bucket of this rank is at ``start`` of its memory."""
        for rank, connection in self.outgoing.items():
            _send(connection, _PLACE.pack(start, nbytes), rank)

    def next_offer(self, owner: int) -> tuple[int, int] | None:
        """Where the next bucket of ``owner`` lies, and its bytes; ``None``: it is not there yet."""
        for message in _received(self.incoming[owner], _PLACE.size, owner):
            start, nbytes = _PLACE.unpack(message)
            return start, nbytes
        return None

    def tell(self, owner: int, word: bytes) -> None:
        """Say ``MAPPED``, ``TAKEN`` or ``LEFT``."""
        _send(self.incoming[owner], word, owner)

    def tell_all(self, word: bytes) -> None:
        for owner in self.incoming:
            self.tell(owner, word)

    def slowest(self, word: bytes) -> tuple[int, int | None]:
        """How often all others have said a word, and who has said it least often."""
        for rank, connection in self.outgoing.items():
            said = self._said[rank]
            while not said[LEFT] and (message := next(_received(connection, 1, rank), None)):
                said[message] += 1
        return min(((said[word], rank) for rank, said in self._said.items()), default=(0, None))

    def all_said(self, word: bytes) -> bool:
        return self.slowest(word)[0] > 0 or not self._others

    def anybody_said(self, word: bytes) -> bool:
        """Of the others, as far as their words were read."""
        return any(said[word] for said in self._said.values())

    def hang_up(self) -> None:
        """End every wait for these connections, at their other ends."""
        for connection in (*self.outgoing.values(), *self.incoming.values()):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for connection in (self._listener, *self.outgoing.values(), *self.incoming.values()):
            connection.close()


def _this_host() -> str:
    """The same in all processes that reach each other by abstract sockets, different elsewhere."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    network = Path("/proc/self/ns/net")
    host = boot.read_text().strip() if boot.exists() else ""
    return f"{host}-{network.stat().st_ino if network.exists() else 0}"


def _socket_name(address: str) -> str:
    return f"\0{address.rpartition('/')[2]}"


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.settimeout(_AT_ONCE)
    return made


def _first_message(connection: socket.socket) -> bytes:
    """Empty of another user's process, and of one that says nothing in time."""
    connection.settimeout(_AT_ONCE)
    with contextlib.suppress(OSError):
        return connection.recv(_LONGEST_HELLO) if is_of_this_user(connection) else b""
    return b""


def _send(connection: socket.socket, message: bytes, rank: int) -> None:
    try:
        connection.send(message)
    except OSError as error:
        raise broadcast_failed(f"rank {rank} does not listen any more: {error}") from None


def _received(connection: socket.socket, size: int, rank: int) -> Iterator[bytes]:
    """The messages of ``rank`` that are there."""
    while True:
        try:
            message = connection.recv(size)
        except BlockingIOError:
            return
        except OSError as error:
            raise broadcast_failed(f"rank {rank} does not answer: {error}") from None
        if len(message) != size:
            raise broadcast_failed(f"rank {rank} has left")
        yield message
