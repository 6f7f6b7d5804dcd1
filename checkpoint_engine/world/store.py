"""The key-value store that rank 0 hosts, and a rank's connections to it.

torch's client of a store waits for an answer without end. So a rank's connections can be cut from
another thread: whoever waits on one gets an error at once.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from loguru import logger

from checkpoint_engine.ground.deadline import Deadline, check_cancelled, in_thread
from checkpoint_engine.ground.sockets import connections
from checkpoint_engine.world.host import Host
from checkpoint_engine.world.liveness import Liveness, LivenessClient, LivenessServer

T = TypeVar("T")

NO_ANSWER = "rank 0, which hosts the store of this world, does not answer"
_CONNECT_TIMEOUT = timedelta(minutes=5)
_APART = 0.05  # seconds at most, by chance, so that threads do not connect at once again
_hosted: dict[int, Any] = {}
_stores: dict[tuple[str, int], _Connection] = {}
_worlds: dict[tuple[str, int], int] = {}
_connecting: list[_Connection] = []
_BACKLOG = 2048  # of the store, as torch asks for
_lock = threading.Lock()  # of these; never held while something is awaited


class World:
    """A rank's access to its world. Here: a world of one rank, whose store is its own memory.

    Attributes:
        store: for requests.
        liveness: who is gone.
        host: the ranks of this one's host.
        id: another one where rank 0 was restarted.
    """

    store: Any
    liveness = Liveness()
    host = Host()
    id = ""

    def __init__(self) -> None:
        self.store = dist.HashStore()

    @property
    def is_lost(self) -> bool:
        """Whether it has been cut; another one may be made then."""
        return False

    @property
    def why_lost(self) -> str:
        """What cut it."""
        return ""

    def store_to_block(self, deadline: Deadline) -> Any:
        """For calls in C++ that wait by themselves."""
        return self.store

    def free_blocked(self) -> None:
        """End the calls that wait for ``store_to_block``."""

    def close(self) -> None:
        """Drop what is lost, at once."""


class ConnectedWorld(World):
    """Several ranks: a connection to the store that rank 0 hosts, and one for liveness."""

    def __init__(
        self, rank: int, size: int, addr: str, port: int, number: int, deadline: Deadline
    ) -> None:
        """Connect. ``number`` tells the servers of one process apart.

        Raises:
            RuntimeError: the port is taken, or rank 0 does not answer.
            TimeoutError: it did not do so before the deadline.
        """
        self._prefix = f"checkpoint-engine/{number}"
        self._connection: _Connection | None = _connection(rank, size, addr, port, deadline)
        self._to_block: _Connection | None = None
        self.host = Host()
        self.store = self._part_of(self._connection)
        meeting = self._another(deadline)  # other worlds of this process may wait for the first
        try:
            store = self._part_of(meeting)
            self.liveness, self.id = _within(
                deadline, addr, port, lambda: self._meet(rank, size, addr, store)
            )
        except BaseException:
            self._connection = None  # it is lost, see ``_meet``
            self.host.close()
            raise
        finally:
            meeting.close()

    def store_to_block(self, deadline: Deadline) -> Any:
        """By a connection of its own."""
        if self._to_block is None:
            self._to_block = self._another(deadline)
        return self._part_of(self._to_block)

    def free_blocked(self) -> None:
        if self._to_block is not None:
            self._to_block.cut()
            self._to_block = None

    def _another(self, deadline: Deadline) -> _Connection:
        assert self._connection is not None
        return _Connection(self._connection.place, deadline)

    def _part_of(self, connection: _Connection) -> Any:
        return dist.PrefixStore(self._prefix, connection.store)

    @property
    def is_lost(self) -> bool:
        return self._connection is None or self._connection.is_cut

    @property
    def why_lost(self) -> str:
        if 0 in self.liveness.gone:
            return "rank 0, which hosts the store of this world, is gone"
        return NO_ANSWER

    def cut(self) -> None:
        """End every call that waits for the store; for when rank 0 does not answer."""
        self.free_blocked()
        if self._connection is not None:
            self._connection.cut()

    def close(self) -> None:
        self.cut()
        self.host.close()
        self.liveness.close()
        self.liveness = Liveness()  # world and liveness know each other
        if self._connection is not None:
            self._connection.close()
        self._connection = self.store = None

    def _meet(self, rank: int, size: int, addr: str, store: Any) -> tuple[Liveness, str]:
        if rank == 0:
            server, world_id = LivenessServer(size), secrets.token_hex(8)
            self.host.join(0, size, server.token, server.follow)  # before any other rank can
            store.set("liveness", f"{server.port} {server.token} {world_id}")
            return server, world_id
        port, token, world_id = store.get("liveness").decode().split()
        try:
            guest = LivenessClient(rank, addr, int(port), token, self.cut)
            if self.is_lost:  # ``__init__`` has given up meanwhile
                guest.close()
            else:
                self.host.join(rank, size, token, guest.follow)
            return guest, world_id
        except (OSError, ValueError, KeyError) as error:
            logger.bind(rank=rank).warning(
                "rank 0's port {} at {} cannot be reached ({}): the death of a rank will be "
                "noticed by timeouts only",
                port,
                addr,
                error,
            )
            return Liveness(), world_id


class _Connection:
    """A client of the store, and the socket that leads there, which torch does not show.

    The socket is the one that was not there before torch connected. If there are more, because
    another thread connects to the store at the same time, nobody can tell whose is which: then
    this connects again.
    """

    def __init__(self, place: tuple[str, int], deadline: Deadline) -> None:
        """``place``: an address that ``_await_port`` returned."""
        self.place = place
        self.is_cut = False
        self.store: Any = None
        self._sockets: list[socket.socket] = []
        while not self._sockets:
            self._has_ended = False
            with _lock:
                self._others = {name for name, _ in _sockets_to(place)}
                _connecting.append(self)
            try:
                self.store = _within(deadline, *place, lambda: self._connect(deadline))
            finally:
                self._settle()
            if not self._sockets:
                time.sleep(random.uniform(0, _APART))

    def _connect(self, deadline: Deadline) -> Any:
        # Shorter than ours: torch shall not connect again when ``_settle`` ends its waiting.
        timeout = timedelta(seconds=max(0.9 * deadline.remaining(), 0.001))
        try:
            store = dist.TCPStore(*self.place, timeout=timeout, wait_for_workers=False)
            store.set_timeout(_CONNECT_TIMEOUT)  # from now on it is for waiting for keys
            return store
        finally:
            self._has_ended = True

    def _settle(self) -> None:
        """Take the socket. If torch is still waiting, end that."""
        with _lock:
            _connecting.remove(self)
            new = {n: one.dup() for n, one in _sockets_to(self.place) if n not in self._others}
            if self.store is not None and len(new) == 1:
                self._sockets = list(new.values())
                for other in _connecting:
                    other._others |= new.keys()
                return
            self.store = None
            for name, found in new.items():
                with found, contextlib.suppress(OSError):
                    is_mine = all(name in other._others for other in _connecting)
                    if is_mine and not self._has_ended:
                        found.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """End every call on this connection, now and from now on."""
        self.is_cut = True
        for found in self._sockets:
            with contextlib.suppress(OSError):
                found.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        for found in self._sockets:
            found.close()
        self.store = None


def _sockets_to(place: tuple[str, int]) -> Iterator[tuple[int, socket.socket]]:
    """This process's connections to an address: the inode of each, and a descriptor of it that
    is closed when the next one is taken."""
    wanted = place, (f"::ffff:{place[0]}", place[1])  # torch reaches IPv4 by IPv6 sockets, too
    for one in connections():
        if one.getpeername()[:2] in wanted:
            yield os.fstat(one.fileno()).st_ino, one


def world_number(addr: str, port: int) -> int:
    """How many worlds this process has been in at this meeting point, with a new one."""
    with _lock:
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
    known = _stores.get((addr, port))
    if known is not None and not known.is_cut:
        return known
    try:
        if rank == 0:
            _host(addr, port, world_size)
        mine = _Connection(_await_port(addr, port, deadline), deadline)
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"rank {rank} cannot {'reach' if rank else 'host'} the store at {addr}:{port}: "
            f"{error}; is the port free, and master_addr rank 0's host?"
        ) from error
    with _lock:
        first = _stores.get((addr, port))
        if first is None or first.is_cut:
            first = _stores[addr, port] = mine
    if first is not mine:  # another thread was faster
        mine.close()
    return first


def _host(addr: str, port: int, size: int) -> None:
    """Host the store to the end of the process, by whichever thread calls this first.

    torch asks for the name of everybody who connects, and serves nobody meanwhile. It listens at a
    socket of IPv6, where 127.0.0.1 comes as an address that /etc/hosts does not have: a name server
    is asked, and one that does not answer takes 5 s each time. So it gets a socket of IPv4 where
    all ranks come by that.
    """
    by_ipv4 = _is_of_ipv4(addr)
    with _lock:
        if port in _hosted:
            return
        listener: int | None = None
        with contextlib.suppress(OSError):  # torch may share the port, or says what is wrong
            if by_ipv4:
                listener = socket.create_server(("", port), backlog=_BACKLOG).detach()
        _hosted[port] = None
    try:
        _hosted[port] = dist.TCPStore(
            "127.0.0.1", port, size, is_master=True, wait_for_workers=False, multi_tenant=True,
            master_listen_fd=listener,
        )  # fmt: skip
    except BaseException:
        del _hosted[port]
        raise


def _is_of_ipv4(addr: str) -> bool:
    try:
        found = socket.getaddrinfo(addr, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(family == socket.AF_INET for family, *_ in found)


def _await_port(addr: str, port: int, deadline: Deadline) -> tuple[str, int]:
    """Wait until rank 0 listens; returns the address that leads there. Torch's own waiting would
    not let go on Ctrl-C."""
    pause = 0.001
    while True:
        check_cancelled()
        try:
            seconds = min(5.0, deadline.remaining() + 0.001)
            with socket.create_connection((addr, port), seconds) as reached:
                host, port, *_ = reached.getpeername()
                return host, port
        except OSError as error:
            if deadline.remaining() == 0.0:
                raise RuntimeError(
                    f"rank 0 does not listen at {addr}:{port}: {error}; is it running, and are "
                    "master_addr and master_port the same on all ranks?"
                ) from error
            time.sleep(pause)  # ranks that start together are milliseconds apart
            pause = min(2 * pause, 0.05)


def _within(deadline: Deadline, addr: str, port: int, action: Callable[[], T]) -> T:
    """What ``action`` returns. Another thread does it, which may be blocked for longer."""
    waiting_for = f"rank 0 at {addr}:{port}, which listens but does not answer"

    def check() -> None:
        check_cancelled()
        deadline.check(waiting_for)

    return in_thread(action, check, "checkpoint-engine-connect")
