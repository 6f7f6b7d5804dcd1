"""How the ranks of one host pass weights on: each maps the others' double buffers, and copies out
of the one that a bucket is in.

Unix sockets say when. A bucket's sender says where it lies, and each receiver that it has it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from checkpoint_engine.errors import GroupError
from checkpoint_engine.ipc import SharedBuffer, map_descriptor

_AT_ONCE = 1.0  # seconds for what the kernel does by itself
_GRACE = 1.0  # seconds after the deadline, at which whoever runs the update gives up
_HELLO = struct.Struct("QQ")  # of a connection: its rank, the bytes of that rank's double buffer
_PLACE = struct.Struct("QQ")  # of a bucket in there: start, bytes
_TAKEN = b"x"


class CopyThread(Protocol):
    """What this needs of ``pipeline.Streams``, those of the cpu device."""

    def event(self) -> Any: ...
    def copy(self, action: Callable[[], None], after: Any) -> Any: ...


class Neighbours:
    """The other ranks of one update, if all of them are on this host. Every rank makes one, and
    closes it.

    Ranks reach each other where they share a network namespace: a container with a network of its
    own is another host. Other users' ranks are no neighbours.

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
            GroupError: a rank is not there any more.
            RuntimeError: this rank cannot take them, as it has too many open files.
        """
        while len(self.memory) < len(self._others):
            missing = sorted(set(self._others) - set(self.memory))
            try:
                connection, _ = self._listener.accept()
                self._take_in(connection)
            except (TimeoutError, ConnectionError, ValueError) as error:
                raise GroupError(f"ranks {missing}, on this host, are not there: {error}") from None
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


class SharedMemoryGroup:
    """A ``WeightsGroup`` of one update between ranks of one host.

    What it broadcasts is ordered after what the streams hold, and a sender's tensors have to lie
    in its double buffer.
    """

    def __init__(self, neighbours: Neighbours, buffer: SharedBuffer, streams: CopyThread) -> None:
        """``neighbours``: to be closed by the caller, once the streams are."""
        self._neighbours = neighbours
        self._start = buffer.tensor.data_ptr()
        self._streams = streams
        self._end = time.monotonic() + _AT_ONCE
        self._sent = 0
        self._taken = dict.fromkeys(neighbours.outgoing, 0)

    def expect_end(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds + _GRACE

    def broadcast(self, tensor: torch.Tensor, src: int) -> _Work:
        over: torch.futures.Future[None] = torch.futures.Future()
        if src in self._neighbours.incoming:
            return _Work(self._on_stream(partial(self._take, tensor, src, over)), over)
        self._sent += 1
        offered = self._on_stream(partial(self._offer, tensor))
        return _Work(offered, over, partial(self._is_taken, self._sent))

    def abort(self) -> None:
        self._neighbours.hang_up()
        self.close()

    def close(self) -> None:
        self._neighbours.memory.clear()

    def _on_stream(self, action: Callable[[], None]) -> Any:
        return self._streams.copy(action, after=self._streams.event())

    def _offer(self, tensor: torch.Tensor) -> None:
        place = _PLACE.pack(tensor.data_ptr() - self._start, tensor.nbytes)
        for rank, connection in self._neighbours.outgoing.items():
            _send(connection, place, rank)

    def _take(self, target: torch.Tensor, src: int, over: torch.futures.Future[None]) -> None:
        connection = self._neighbours.incoming[src]
        connection.settimeout(max(0.001, self._end - time.monotonic()))
        start, nbytes = _PLACE.unpack(_receive(connection, _PLACE.size, src))
        if nbytes != target.nbytes:
            raise GroupError(f"rank {src} sent {nbytes} bytes, not {target.nbytes}")
        target.copy_(self._neighbours.memory[src][start : start + nbytes])
        _send(connection, _TAKEN, src)
        over.set_result(None)

    def _is_taken(self, number: int) -> bool:
        """Whether every other rank has the ``number``-th bucket that was sent."""
        for rank, connection in self._neighbours.outgoing.items():
            with contextlib.suppress(BlockingIOError):
                while self._taken[rank] < number:
                    _receive(connection, len(_TAKEN), rank)
                    self._taken[rank] += 1
        return min(self._taken.values()) >= number


class _Work:
    """A broadcast that has begun, as torch's ``Work``."""

    def __init__(
        self,
        on_stream: Any,
        over: torch.futures.Future[None],
        is_taken: Callable[[], bool] = lambda: True,
    ) -> None:
        """``on_stream``: this rank's part of it. ``is_taken``: whether the others have it."""
        self._on_stream = on_stream
        self._over = over
        self._is_taken = is_taken
        self._failure = ""

    def is_completed(self) -> bool:
        """Whether it is over, successfully or not."""
        try:
            completed = bool(self._on_stream.query()) and self._is_taken()
        except RuntimeError as error:
            self._failure = str(error)
            return True
        if completed and not self._over.done():
            self._over.set_result(None)
        return completed

    def wait(self) -> None:
        """Raise what went wrong. Called when it is completed."""
        if self._failure:
            raise GroupError(self._failure)

    def get_future(self) -> torch.futures.Future[None]:
        """Done when a receiver has it, and once a sender sees that all have."""
        return self._over


def _send(connection: socket.socket, message: bytes, rank: int) -> None:
    try:
        connection.send(message)
    except OSError as error:
        raise GroupError(f"rank {rank} does not listen any more: {error}") from None


def _receive(connection: socket.socket, size: int, rank: int) -> bytes:
    """The next message of ``rank``. Raises ``BlockingIOError`` if there is none and ``connection``
    does not wait."""
    try:
        message = connection.recv(size)
    except BlockingIOError:
        raise
    except OSError as error:
        raise GroupError(f"rank {rank} does not answer: {error}") from None
    if len(message) != size:
        raise GroupError(f"rank {rank} has left")
    return message
