"""The control plane: how the ranks of one world agree, apart from any process group.

Everything goes through one key-value store that rank 0 hosts. In a collective call the ranks
exchange what they have to say, do their work, and end with one outcome, the same for all. A rank
that fails writes the outcome at once; the others watch it and stop.
"""

from __future__ import annotations

import contextlib
import ipaddress
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from checkpoint_engine import settings
from checkpoint_engine.errors import BusyError, CollectiveError, UpdateError, kind_of
from checkpoint_engine.ground.deadline import Deadline
from checkpoint_engine.ground.devices import get_ip
from checkpoint_engine.world.call import Call
from checkpoint_engine.world.membership import RETURN_SECONDS, Membership
from checkpoint_engine.world.outcome import describe
from checkpoint_engine.world.store import NO_ANSWER, ConnectedWorld, World, world_number

_MEETING_SECONDS = 300.0  # for the ranks to meet where the caller sets no time
_CLEANING_UP = 1.5  # seconds that a rank may need after its deadline before it says so


def master_port(port: int | None = None) -> int:
    """``port``, or else the one after ``MASTER_PORT``, which the launcher's own store has.

    Raises:
        RuntimeError: neither is given.
        ValueError: ``MASTER_PORT`` is no port with one behind it.
    """
    if port is None and (launcher := settings.master_port()) is not None:
        port = launcher + 1
    if port is None:
        raise RuntimeError("give master_port=, or set MASTER_PORT: the ranks meet at the next one")
    return port


def master_addr(addr: str | None = None) -> str:
    """``addr``, or else ``MASTER_ADDR``: the host of rank 0."""
    found = settings.master_addr() if addr is None else addr
    if found is None:
        raise RuntimeError("give master_addr=, or set MASTER_ADDR: the host of rank 0")
    return found


class ControlPlane:
    """One rank's place in its world.

    Attributes:
        running: the collective call that this rank is in.
    """

    def __init__(self, rank: int, world_size: int, addr: str | None, port: int | None) -> None:
        """Nothing is connected before the first call. ``addr``, ``port``: see
        ``store.connect_store``.
        """
        self.rank = rank
        self.world_size = world_size
        self._addr = addr
        self._port = port
        self._number = 0
        self._world: World | None = World() if world_size == 1 else None
        self.running: Call | None = None
        self._busy = threading.Lock()
        self._memberships: dict[tuple[int, ...], Membership] = {}

    def store(self) -> Any:
        """The world's store; a single rank needs none but its own memory."""
        return self._meet(Deadline(_MEETING_SECONDS)).store

    def local_ip(self) -> str:
        """This host's address on the interface that leads to rank 0."""
        known = self.world_size > 1 and (self._addr or settings.master_addr())
        return get_ip(known or None)

    def reachable_ip(self) -> str:
        """The same, unless that is the loopback interface: hosts of other worlds must reach it."""
        address = self.local_ip()
        return get_ip() if ipaddress.ip_address(address).is_loopback else address

    @contextlib.contextmanager
    def call(
        self,
        name: str,
        timeout: timedelta | float,
        ranks: Sequence[int] | None = None,
        checkpoint: str = "",
    ) -> Iterator[Call]:
        """A collective call. Every rank concerned enters it.

        Args:
            ranks: the members, sorted; default: the world.

        Raises:
            BusyError: this rank is in a collective call already.
            UpdateError: the call failed on some rank.
        """
        deadline = Deadline(timeout)
        with self.alone(name):
            with self._asking_first(name):
                membership = self._membership(ranks, deadline)
                membership.begin()
                self.running = Call(membership, name, checkpoint, deadline)
            try:
                with self.running as call:
                    yield call
            finally:
                self.running = None

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """While no collective call runs on this rank. Raises ``BusyError`` if one does."""
        if not self._busy.acquire(blocking=False):
            raise BusyError(f"{name} refused: this rank is in a collective call already")
        try:
            yield
        finally:
            self._busy.release()

    def await_others(
        self, name: str, timeout: timedelta | float, ranks: Sequence[int], checkpoint: str
    ) -> float:
        """Return when the call of ``ranks`` that this rank has no part in is over; returns the
        seconds that took. Which one it is: see ``Membership.visit``.

        Raises:
            UpdateError: that call failed, did not end in time, or one of its ranks is gone.
        """
        began = time.monotonic()
        deadline = Deadline(timeout)
        with self._asking_first(name):
            membership = self._membership(ranks, deadline)
            membership.visit(name, checkpoint, deadline)
            membership.expect_end(None)
        return time.monotonic() - began

    @contextlib.contextmanager
    def _asking_first(self, name: str) -> Iterator[None]:
        """Make the loss of the store, before a call has begun, an error of its call."""
        try:
            yield
        except BaseException as error:
            if self._world is not None:
                self._world.liveness.expect_end(None)
            if not isinstance(error, (dist.DistError, CollectiveError, TimeoutError)):
                raise
            lost = NO_ANSWER if self._world is None else self._world.why_lost
            cause = describe(error, lost)
            raise UpdateError(name, self.rank, "start", cause, kind_of(error)) from error

    def _membership(self, ranks: Sequence[int] | None, deadline: Deadline) -> Membership:
        """From now on the store's answers are awaited until the deadline."""
        world = self._meet(deadline)
        world.liveness.expect_end(deadline.remaining() + _CLEANING_UP)
        members = tuple(range(self.world_size)) if ranks is None else tuple(ranks)
        if members not in self._memberships:
            name = "all" if ranks is None else "ranks-" + "-".join(map(str, members))
            membership = Membership(name, members, self.rank, self.world_size, world)
            self._memberships[members] = membership
            if world.liveness.replaces:
                membership.join_late()
        return self._memberships[members]

    def _meet(self, deadline: Deadline) -> World:
        """This rank's world, met anew where the last one is lost."""
        if self._world is not None and not self._world.is_lost:
            return self._world
        addr, port = master_addr(self._addr), master_port(self._port)
        self._number = self._number or world_number(addr, port)
        lost = self._world
        if lost is not None:  # whoever calls may try again; nobody shall wait for one that is dead
            deadline = Deadline(max(min(deadline.remaining(), RETURN_SECONDS), 0.001))
        try:
            world = ConnectedWorld(self.rank, self.world_size, addr, port, self._number, deadline)
        except (RuntimeError, TimeoutError) as error:
            if lost is None:
                raise
            raise dist.DistNetworkError(str(error)) from error
        if lost is None or lost.id != world.id:
            self._memberships.clear()  # rank 0 was started again, and counts from 0
        for membership in self._memberships.values():
            membership.world = world
        if lost is not None:
            lost.close()
        self._world = world
        return world
