"""The key-value store that rank 0 hosts, and what ties a rank to its world.

torch's client of a store waits for an answer without end. So a rank's connections can be cut from
another thread: whoever waits on one gets an error at once.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from loguru import logger

from checkpoint_engine.deadline import Deadline, poll
from checkpoint_engine.liveness import Guest, Host, Peers

T = TypeVar("T")

NO_ANSWER = "rank 0, which hosts the store of this world, does not answer"
_CONNECT_TIMEOUT = timedelta(minutes=5)
_stores: dict[tuple[str, int], _Connection] = {}
_worlds: dict[tuple[str, int], int] = {}
_stores_lock = threading.Lock()


class Alone:
    """The ties of a single rank: its own memory."""

    peers = Peers()
    id = ""
    is_lost = False
    why_lost = ""

    def __init__(self) -> None:
        self.store: Any = dist.HashStore()
        self.watched = self.store

    def store_to_block(self, deadline: Deadline) -> Any:
        return self.store

    def close(self) -> None:
        """Nothing to close."""

    def free_blocked(self) -> None:
        """Nobody can be blocked."""


class World:
    """One rank's ties to its world: connections to the store, and who is there.

    Attributes:
        store: for requests.
        watched: to wait for outcomes.
        peers: who is gone.
        id: another one where rank 0 was restarted.
    """

    def __init__(
        self, rank: int, size: int, addr: str, port: int, number: int, deadline: Deadline
    ) -> None:
        """Connect. ``number`` tells the servers of one process apart.

        Raises:
            RuntimeError: the port is taken, or rank 0 does not answer.
            TimeoutError: it did not do so before the deadline.
        """
        self._place = size, addr, port
        self._prefix = f"checkpoint-engine/{number}"
        self._connections = [
            _connection(rank, size, addr, port, deadline),
            self._another(deadline),
        ]
        self._to_block: _Connection | None = None
        self.store, self.watched = map(self._part_of, self._connections)
        self.peers, self.id = _within(
            deadline, addr, port, lambda: self._meet(rank, addr, self.store)
        )

    def store_to_block(self, deadline: Deadline) -> Any:
        """By a connection of its own, for calls in C++ that wait by themselves."""
        if self._to_block is None:
            self._to_block = self._another(deadline)
        return self._part_of(self._to_block)

    def free_blocked(self) -> None:
        """End the calls that wait for ``store_to_block``."""
        if self._to_block is not None:
            self._to_block.cut()
            self._to_block = None

    def _another(self, deadline: Deadline) -> _Connection:
        size, addr, port = self._place
        return _within(deadline, addr, port, lambda: _Connection(addr, port, size, hosted=False))

    def _part_of(self, connection: _Connection) -> Any:
        return dist.PrefixStore(self._prefix, connection.store)

    @property
    def is_lost(self) -> bool:
        """Whether it has been cut; another one may be made then."""
        return not self._connections or any(one.is_cut for one in self._connections)

    @property
    def why_lost(self) -> str:
        """What cut it."""
        if 0 in self.peers.gone:
            return "rank 0, which hosts the store of this world, is gone"
        return NO_ANSWER

    def cut(self) -> None:
        """End every call that waits for the store; for when rank 0 does not answer."""
        self.free_blocked()
        for connection in self._connections:
            connection.cut()

    def close(self) -> None:
        """Drop what is lost, at once: world and peers know each other."""
        self.cut()
        self.peers.close()
        self.peers = Peers()
        for connection in self._connections:
            connection.close()
        self._connections = []
        self.store = self.watched = None

    def _meet(self, rank: int, addr: str, store: Any) -> tuple[Peers, str]:
        if rank == 0:
            host, world_id = Host(), secrets.token_hex(8)
            store.set("liveness", f"{host.port} {host.token} {world_id}")
            return host, world_id
        port, token, world_id = store.get("liveness").decode().split()
        try:
            return Guest(rank, addr, int(port), token, self.cut), world_id
        except (OSError, ValueError, KeyError) as error:
            logger.bind(rank=rank).warning(
                "rank 0's port {} at {} cannot be reached ({}): the death of a rank will be "
                "noticed by timeouts only",
                port,
                addr,
                error,
            )
            return Peers(), world_id


class _Connection:
    """A store, and the sockets that lead to it."""

    def __init__(self, addr: str, port: int, world_size: int, hosted: bool) -> None:
        """``hosted``: this process shall host it."""
        with _opening:
            known = _sockets_to(port)
            self.store: Any = dist.TCPStore(
                addr,
                port,
                world_size,
                is_master=hosted,
                timeout=_CONNECT_TIMEOUT,
                wait_for_workers=False,
            )
            opened = _sockets_to(port)
            self._sockets = [opened.pop(name) for name in opened.keys() - known.keys()]
            for found in (*known.values(), *opened.values()):
                found.close()
        self.is_cut = False

    def cut(self) -> None:
        """End every call on this connection, now and from now on."""
        self.is_cut = True
        for found in self._sockets:
            with contextlib.suppress(OSError):
                found.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for found in self._sockets:
            found.close()
        self.store = None


_opening = threading.Lock()


def _sockets_to(port: int) -> dict[Any, socket.socket]:
    """This process's connections to a port by their own address, each as one descriptor of ours:
    torch does not show its."""
    found: dict[Any, socket.socket] = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                candidate = socket.socket(fileno=os.dup(int(fd)))
                wanted = candidate.family != socket.AF_UNIX and candidate.getpeername()[1] == port
                if not wanted or found.setdefault(candidate.getsockname(), candidate) != candidate:
                    candidate.close()
    return found


def world_number(addr: str, port: int) -> int:
    """How many worlds this process has been in at this meeting point, with a new one."""
    with _stores_lock:
        number = _worlds[addr, port] = _worlds.get((addr, port), 0) + 1
    return number


def connect_store(
    rank: int, world_size: int, addr: str, port: int, deadline: Deadline | None = None
) -> Any:
    """The store of the world that meets at ``addr:port``; rank 0 hosts it.

    One per process and meeting point, kept to the end of the process: a world's second server
    object shares it.

    Raises:
        RuntimeError: the port is taken, or rank 0 does not answer.
        TimeoutError: it did not do so before the deadline.
    """
    return _connection(rank, world_size, addr, port, deadline or Deadline(_CONNECT_TIMEOUT)).store


def _connection(
    rank: int, world_size: int, addr: str, port: int, deadline: Deadline
) -> _Connection:
    with _stores_lock:
        known = _stores.get((addr, port))
        if known is not None and not known.is_cut:
            return known
        if rank > 0:
            _await_port(addr, port, deadline)
        hosted = rank == 0
        try:
            connection = _within(
                deadline, addr, port, lambda: _Connection(addr, port, world_size, hosted)
            )
        except (RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"rank {rank} cannot {'host' if hosted else 'reach'} the store at {addr}:{port}: "
                f"{error}; is the port free, and master_addr rank 0's host?"
            ) from error
        _stores[addr, port] = connection
        return connection


def _await_port(addr: str, port: int, deadline: Deadline) -> None:
    """Until rank 0 listens. Torch's own waiting would not let go on Ctrl-C."""
    longest = Deadline(_CONNECT_TIMEOUT)
    while True:
        try:
            socket.create_connection((addr, port), timeout=5).close()
        except OSError as error:
            if min(deadline.remaining(), longest.remaining()) == 0.0:
                raise RuntimeError(
                    f"rank 0 does not listen at {addr}:{port}: {error}; is it running, and are "
                    "master_addr and master_port the same on all ranks?"
                ) from error
            time.sleep(0.05)
        else:
            return


def _within(deadline: Deadline, addr: str, port: int, action: Callable[[], T]) -> T:
    """What ``action`` returns; a thread that it blocks for ever is left to itself."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="checkpoint-engine-connect", daemon=True)
    thread.start()
    poll(
        lambda: not thread.is_alive(),
        lambda: deadline.check(f"rank 0 at {addr}:{port}, which listens but does not answer"),
    )
    if errors:
        raise errors.pop()  # a frame that keeps what it raises keeps all that it refers to
    return results[0]
