"""Ranks of one host that map each other's double buffers.

Unix sockets say when. A bucket's sender says where it lies, and each receiver that it has it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence

import torch

from checkpoint_engine.errors import broadcast_failed
from checkpoint_engine.handover.ipc import SharedBuffer, map_descriptor

_AT_ONCE = 1.0  # seconds for what the kernel does by itself
_GRACE = 1.0  # seconds after the deadline, at which whoever runs the update gives up
_HELLO = struct.Struct("QQ")  # of a connection: its rank, the bytes of that rank's double buffer
_PLACE = struct.Struct("QQ")  # of a bucket in there: start, bytes
_TAKEN = b"x"


class HostPeers:
    """The other ranks of one update, if all of them are on this host. Every rank makes one, and
    closes it.

    Ranks reach each other where they share a network namespace: a container with a network of its
    own is another host. Ranks of other users are refused.

    Attributes:
        outgoing: for each rank, where it is told of the buckets that this rank sends.
        incoming: for each rank, where it tells of those that it sends.
        memory: each rank's double buffer.
    """

    def __init__(self, rank: int, ranks: Sequence[int]) -> None:
        self._rank = rank
        self._others = [other for other in ranks if other != rank]
        self.address = f"checkpoint-engine-{secrets.token_hex(8)}"
        self.outgoing: dict[int, socket.socket] = {}
        self.incoming: dict[int, socket.socket] = {}
        self.memory: dict[int, torch.Tensor] = {}
        self._taken = dict.fromkeys(self._others, 0)
        self._listener = _socket()
        self._listener.bind(f"\0{self.address}")
        self._listener.listen(len(ranks) + 8)

    def reach(self, addresses: Mapping[int, str], buffer: SharedBuffer) -> bool:
        """Connect to the other ranks, and share this rank's double buffer with them; returns
        whether all are there."""
        hello = _HELLO.pack(self._rank, buffer.tensor.nbytes)
        try:
            for rank in self._others:
                self.outgoing[rank] = connection = _socket()
                connection.connect(f"\0{addresses[rank]}")
                if not _is_of_this_user(connection):
                    return False
                socket.send_fds(connection, [hello], [buffer.descriptor])
                connection.setblocking(False)
        except OSError:
            return False
        return True

    def accept(self) -> None:
        """Take the others' connections and map their buffers. Called when each has said that it
        reached all.

        Raises:
            CollectiveError: a rank is not there any more.
            RuntimeError: this rank cannot take them, as it has too many open files.
        """
        while missing := sorted(set(self._others) - set(self.memory)):
            try:
                connection, _ = self._listener.accept()
                self._take_in(connection)
            except (TimeoutError, ConnectionError, ValueError) as error:
                raise broadcast_failed(
                    f"ranks {missing}, on this host, are not there: {error}"
                ) from None
            except OSError as error:
                raise RuntimeError(f"cannot share memory with ranks {missing}: {error}") from error

    def _take_in(self, connection: socket.socket) -> None:
        """Anybody on this host can connect; who is no rank of this update is turned away."""
        with contextlib.ExitStack() as refusal:
            refusal.callback(connection.close)
            if not _is_of_this_user(connection):
                return
            connection.settimeout(_AT_ONCE)
            with _received(connection) as (hello, descriptors):
                if len(hello) != _HELLO.size or not descriptors:
                    return
                rank, nbytes = _HELLO.unpack(hello)
                self.memory[rank] = map_descriptor(descriptors[0], nbytes)
                self.incoming[rank] = connection
            refusal.pop_all()

    def offer(self, start: int, nbytes: int) -> None:
        """Tell all others that a bucket is at ``start`` of this rank's double buffer."""
        for rank, connection in self.outgoing.items():
            _send(connection, _PLACE.pack(start, nbytes), rank)

    def take(self, target: torch.Tensor, sender: int, seconds: float) -> None:
        """Copy the next bucket of ``sender`` into ``target``, and tell it so.

        Raises:
            CollectiveError: it does not come in ``seconds``, or is another one.
        """
        connection = self.incoming[sender]
        connection.settimeout(max(0.001, seconds))
        start, nbytes = _PLACE.unpack(_receive(connection, _PLACE.size, sender))
        if nbytes != target.nbytes:
            raise broadcast_failed(f"rank {sender} sent {nbytes} bytes, not {target.nbytes}")
        target.copy_(self.memory[sender][start : start + nbytes])
        _send(connection, _TAKEN, sender)

    def have_taken(self, number: int) -> bool:
        """Whether every other rank has this rank's ``number``-th bucket."""
        for rank, connection in self.outgoing.items():
            with contextlib.suppress(BlockingIOError):
                while self._taken[rank] < number:
                    _receive(connection, len(_TAKEN), rank)
                    self._taken[rank] += 1
        return all(taken >= number for taken in self._taken.values())

    def hang_up(self) -> None:
        """End every wait for these connections, here and at their other ends."""
        for connection in (*self.outgoing.values(), *self.incoming.values()):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.memory.clear()
        for connection in (self._listener, *self.outgoing.values(), *self.incoming.values()):
            connection.close()


@contextlib.contextmanager
def _received(connection: socket.socket) -> Iterator[tuple[bytes, list[int]]]:
    """A message and the descriptors that came with it, which are closed afterwards."""
    message, descriptors, flags, _ = socket.recv_fds(connection, _HELLO.size, 1)
    try:
        if flags & socket.MSG_CTRUNC and not descriptors:  # there was no room for it here
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        yield message, descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.settimeout(_AT_ONCE)
    return made


def _is_of_this_user(connection: socket.socket) -> bool:
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", packed)
    return bool(uid == os.geteuid())


def _send(connection: socket.socket, message: bytes, rank: int) -> None:
    try:
        connection.send(message)
    except OSError as error:
        raise broadcast_failed(f"rank {rank} does not listen any more: {error}") from None


def _receive(connection: socket.socket, size: int, rank: int) -> bytes:
    """The next message of ``rank``. Raises ``BlockingIOError`` if there is none and ``connection``
    does not wait."""
    try:
        message = connection.recv(size)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            raise
        raise broadcast_failed(f"rank {rank} does not answer: {error}") from None
    if len(message) != size:
        raise broadcast_failed(f"rank {rank} has left")
    return message
