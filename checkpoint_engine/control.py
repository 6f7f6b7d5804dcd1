"""The control plane: how the ranks of one world agree, apart from any process group.

Everything goes through one key-value store that rank 0 hosts. A collective call is an
``Operation``: its ranks exchange what they have to say, do their work, and end with one outcome,
the same for all. A rank that fails writes the outcome at once; the others, watching it, stop.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist
from loguru import logger

from checkpoint_engine.deadline import Deadline, poll
from checkpoint_engine.device_utils import get_ip
from checkpoint_engine.errors import UpdateError

_SUCCESS = b"ok"
_CONNECT_TIMEOUT = timedelta(minutes=5)
_LONGEST_PAUSE = 0.01  # seconds between two looks at what other ranks wrote
_FAREWELL = 2.0  # seconds that rank 0 waits for the others to read a failure
_stores: dict[tuple[str, int], Any] = {}
_worlds: dict[tuple[str, int], int] = {}
_stores_lock = threading.Lock()


def master_port(port: int | None = None) -> int:
    """``port``, or else the one after ``MASTER_PORT``, which the launcher's own store has.

    Raises:
        RuntimeError: neither is given.
    """
    if port is not None:
        return port
    if "MASTER_PORT" not in os.environ:
        raise RuntimeError(
            "give master_port=, or set MASTER_PORT: the ranks meet at MASTER_PORT + 1"
        )
    return int(os.environ["MASTER_PORT"]) + 1


def master_addr(addr: str | None = None) -> str:
    """``addr``, or else ``MASTER_ADDR``: the host of rank 0."""
    if addr is not None:
        return addr
    if "MASTER_ADDR" not in os.environ:
        raise RuntimeError("give master_addr=, or set MASTER_ADDR: the host of rank 0")
    return os.environ["MASTER_ADDR"]


def connect_store(rank: int, world_size: int, addr: str, port: int) -> Any:
    """The store of the world that meets at ``addr:port``; rank 0 hosts it.

    One per process and meeting point, kept to the end of the process: a world's second server
    object shares it.

    Raises:
        RuntimeError: the port is taken, or rank 0 does not answer.
    """
    with _stores_lock:
        if (addr, port) not in _stores:
            try:
                _stores[addr, port] = dist.TCPStore(
                    addr,
                    port,
                    world_size,
                    is_master=rank == 0,
                    timeout=_CONNECT_TIMEOUT,
                    wait_for_workers=False,
                )
            except Exception as error:
                role = "host" if rank == 0 else "reach"
                raise RuntimeError(
                    f"rank {rank} cannot {role} the store at {addr}:{port}: {error}; is the "
                    "port free, and master_addr rank 0's host?"
                ) from error
        return _stores[addr, port]


class ControlPlane:
    """One rank's place in its world. Called by all ranks, in the same order."""

    def __init__(self, rank: int, world_size: int, addr: str | None, port: int | None) -> None:
        """Nothing is connected before the first operation. ``addr``, ``port``: see
        ``connect_store``."""
        self.rank = rank
        self.world_size = world_size
        self._addr = addr
        self._port = port
        self._connected: tuple[Any, Any] | None = None
        self._epoch = -1
        self._count = 0
        self._old_keys: list[str] = []

    def store(self) -> Any:
        """The world's store; a single rank needs none but its own memory."""
        return self._stores()[0]

    def local_ip(self) -> str:
        """This host's address on the interface that leads to rank 0."""
        return get_ip(None if self.world_size == 1 else master_addr(self._addr))

    def operation(self, name: str, timeout: timedelta | float) -> Operation:
        """Begin a collective call; use it as a context manager on every rank of the world."""
        store, watched = self._stores()
        self._follow_epoch(store)
        self._count += 1
        prefix = f"{self._epoch}/{self._count}"
        return Operation(self, store, watched, name, prefix, self._epoch, Deadline(timeout))

    def _stores(self) -> tuple[Any, Any]:
        """Two connections to the store: one for requests, one to wait for outcomes."""
        if self._connected is None:
            self._connected = self._connect()
        return self._connected

    def _connect(self) -> tuple[Any, Any]:
        if self.world_size == 1:
            store = dist.HashStore()
            return store, store
        addr, port = master_addr(self._addr), master_port(self._port)
        store = connect_store(self.rank, self.world_size, addr, port)
        watched = dist.TCPStore(
            addr, port, self.world_size, is_master=False, timeout=_CONNECT_TIMEOUT
        )
        with _stores_lock:
            number = _worlds[addr, port] = _worlds.get((addr, port), 0) + 1
        prefix = f"checkpoint-engine/{number}"
        return dist.PrefixStore(prefix, store), dist.PrefixStore(prefix, watched)

    def _follow_epoch(self, store: Any) -> None:
        """Ranks count operations alike; a failed one starts a new count, wherever each rank
        stood."""
        epoch = store.add("epoch", 0)
        if epoch != self._epoch:
            self._epoch, self._count = epoch, 0

    def _end_epoch(self, store: Any, epoch: int) -> None:
        store.compare_set("epoch", str(epoch), str(epoch + 1))

    def _forget(self, store: Any) -> None:
        """Drop what this rank wrote in operations that every rank has left."""
        for key in self._old_keys:
            store.delete_key(key)
        self._old_keys.clear()


class Operation:
    """One collective call on one rank: a deadline, what the ranks tell each other, one outcome."""

    def __init__(
        self,
        plane: ControlPlane,
        store: Any,
        watched: Any,
        name: str,
        prefix: str,
        epoch: int,
        deadline: Deadline,
    ) -> None:
        self.name = name
        self.deadline = deadline
        self.phase = "start"
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()
        self.store = dist.PrefixStore(prefix, store)
        self._root = store
        self._prefix = prefix
        self._plane = plane
        self._epoch = epoch
        self._watched = dist.PrefixStore(prefix, watched)
        self._outcome: bytes | None = None
        self._keys: list[str] = []
        self._watcher: threading.Thread | None = None
        if plane.rank == 0:
            self._keys += ["outcome", "done", "left"]

    def begin(self, phase: str) -> None:
        """What this rank does from now on, for errors and for ``seconds``."""
        now = time.monotonic()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self._began
        self.phase, self._began = phase, now

    def check(self) -> None:
        """Raise if another rank failed or the time is up; every wait of the operation calls it."""
        if self._outcome not in (None, _SUCCESS):
            raise self._error(self._outcome)
        self.deadline.check(f"{self.phase} of {self.name}")

    def watch(self) -> None:
        """From now on ``check`` sees the failure of other ranks as soon as it happens."""
        if self._plane.world_size > 1 and self._watcher is None:
            self._watcher = threading.Thread(
                target=self._await_outcome, name="checkpoint-engine-watch", daemon=True
            )
            self._watcher.start()

    def all_gather(self, what: str, value: bytes) -> list[bytes]:
        """Every rank's ``value``, in rank order. Called by all ranks.

        Raises:
            TimeoutError: naming the ranks that did not come.
        """
        keys = [f"{what}/{rank}" for rank in range(self._plane.world_size)]
        self._put(keys[self._plane.rank], value)
        self._wait(keys)
        self._plane._forget(self._root)
        return self.store.multi_get(keys) if len(keys) > 1 else [value]

    def __enter__(self) -> Operation:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc is None:
                self._succeed()
            else:
                self._fail(exc)
        finally:
            self._plane._old_keys += [f"{self._prefix}/{key}" for key in self._keys]
            if self._watcher is not None:
                self._watcher.join(_FAREWELL)

    def _put(self, key: str, value: bytes) -> None:
        self.store.set(key, value)  # type: ignore[arg-type]  # the stubs know only text
        self._keys.append(key)

    def _wait(self, keys: list[str]) -> None:
        """Until all ``keys`` are there. Polls: a wait that the store times out would be logged."""
        pause = 0.0001
        while not self.store.check(keys):
            if self._outcome is None and self.store.check(["outcome"]):
                self._outcome = self.store.get("outcome")
            if self.deadline.remaining() == 0.0:
                missing = [key for key in keys if not self.store.check([key])]
                raise TimeoutError(
                    f"gave up after {self.deadline.seconds:g} s: ranks "
                    f"{[int(key.rpartition('/')[2]) for key in missing]} did not join {self.name}"
                )
            self.check()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _succeed(self) -> None:
        """Return only once every rank has done its part."""
        self.begin("completion")
        if self._plane.world_size > 1:
            self._await_others()
        self.begin("done")

    def _await_others(self) -> None:
        """The last rank to arrive writes the outcome."""
        try:
            if self.store.add("done", 1) == self._plane.world_size:
                self.store.compare_set("outcome", "", _SUCCESS.decode())
            poll(lambda: self.store.check(["outcome"]), self.check)
            self._outcome = self.store.get("outcome")
            self.check()
        except BaseException as error:
            self._fail(error)
        self._leave(self.deadline)

    def publish(self, error: BaseException) -> bytes:
        """Make ``error`` the outcome on every rank, unless another was first; returns the
        outcome."""
        mine = json.dumps([self._plane.rank, self.phase, _describe(error)])
        with contextlib.suppress(RuntimeError):  # the store may be what failed
            return self.store.compare_set("outcome", "", mine)
        return mine.encode()

    def _fail(self, error: BaseException) -> None:
        """End the operation everywhere, and raise the one error that every rank raises."""
        outcome = self.publish(error)
        with contextlib.suppress(RuntimeError):
            self._plane._end_epoch(self._root, self._epoch)
            self._leave(Deadline(_FAREWELL))
        if isinstance(error, UpdateError):
            raise error
        if isinstance(error, Exception):
            raise self._error(outcome) from error

    def _leave(self, deadline: Deadline) -> None:
        """Rank 0 leaves last, for the store goes with it."""
        if self._plane.rank > 0:
            self.store.add("left", 1)
        elif self._plane.world_size > 1:
            with contextlib.suppress(TimeoutError):
                poll(
                    lambda: self.store.add("left", 0) >= self._plane.world_size - 1,
                    lambda: deadline.check("the other ranks to leave"),
                )

    def _error(self, outcome: bytes) -> UpdateError:
        rank, phase, cause = json.loads(outcome)
        return UpdateError(self.name, rank, phase, cause)

    def _await_outcome(self) -> None:
        try:
            self._watched.wait(
                ["outcome"], timedelta(seconds=self.deadline.remaining() + _FAREWELL)
            )
            self._outcome = self._watched.get("outcome")
        except RuntimeError as error:
            logger.debug("{}: no longer watching the other ranks: {}", self.name, error)


def _describe(error: BaseException) -> str:
    plain = isinstance(error, (ValueError, RuntimeError, TimeoutError))
    return str(error) if plain else f"{type(error).__name__}: {error}"
