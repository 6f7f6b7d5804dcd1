"""Connections to the store: whose socket is whose, and connects that nobody answers."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from checkpoint_engine.ground.deadline import Deadline, poll
from checkpoint_engine.world import store
from checkpoint_engine.world.store import ConnectedWorld, connect_store
from torchrun import free_port_pair

SOON = 10.0
HERE = "127.0.0.1"


def soon(done: Callable[[], Any], what: str) -> None:
    deadline = Deadline(SOON)
    poll(lambda: bool(done()), lambda: deadline.check(what))


@pytest.fixture
def port() -> int:
    return free_port_pair()


@pytest.fixture
def join(port: int) -> Iterator[Callable[..., ConnectedWorld]]:
    """Become a rank of the world; the first one is rank 0."""
    with contextlib.ExitStack() as stack:

        def enter(rank: int, port: int = port, seconds: float = SOON) -> ConnectedWorld:
            world = ConnectedWorld(rank, 3, HERE, port, 1, Deadline(seconds))
            stack.callback(world.close)
            return world

        yield enter


def listens_by(port: int) -> list[str]:
    """The families of the sockets that listen at a port."""
    wanted = f":{port:04X} "
    return [
        family
        for family, table in (("IPv4", "tcp"), ("IPv6", "tcp6"))
        for line in Path(f"/proc/net/{table}").read_text().splitlines()
        if wanted in line.split(maxsplit=2)[1] + " " and line.split()[3] == "0A"
    ]


@pytest.mark.parametrize(("addr", "families"), [(HERE, ["IPv4"]), ("::1", ["IPv6"])])
def test_who_comes_by_ipv4_is_known_by_that(port: int, addr: str, families: list[str]) -> None:
    """As torch asks for its name: 127.0.0.1 at a socket of IPv6 is in no /etc/hosts."""
    store._host(addr, port, 2)
    assert listens_by(port) == families
    store._host(addr, port, 2)  # another object of this process
    made = dist.TCPStore(HERE, port, wait_for_workers=False)
    made.set("key", "value")
    assert made.get("key") == b"value"


class Gate:
    """A port that leads to the store; while it is shut, what connects is accepted and no more."""

    def __init__(self, port: int) -> None:
        self.listener = socket.create_server((HERE, 0), backlog=128)
        self.port: int = self.listener.getsockname()[1]
        self.is_shut = True
        self.silent: list[socket.socket] = []
        self._store = port
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.listener, selectors.EVENT_READ, None)
        self._wake, woken = socket.socketpair()
        self._selector.register(woken, selectors.EVENT_READ, woken)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._wake.close()
        self._thread.join(SOON)
        for one in self.silent:
            one.close()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                other: Any = key.data
                if other is None:
                    self._accept()
                elif other is key.fileobj:
                    for one in list(self._selector.get_map().values()):
                        one.fileobj.close()  # type: ignore[union-attr]
                    return
                else:
                    self._pass_on(key.fileobj, other)

    def _accept(self) -> None:
        ours, _ = self.listener.accept()
        if self.is_shut:
            self.silent.append(ours)
            return
        theirs = socket.create_connection((HERE, self._store))
        self._selector.register(ours, selectors.EVENT_READ, theirs)
        self._selector.register(theirs, selectors.EVENT_READ, ours)

    def _pass_on(self, one: Any, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if received := one.recv(1 << 16):
                other.sendall(received)
                return
        for end in (one, other):
            self._selector.unregister(end)
            end.close()


@pytest.fixture
def gate(port: int) -> Iterator[Gate]:
    gate = Gate(port)
    yield gate
    gate.close()


def at_once(actions: list[Callable[[], Any]]) -> list[Any]:
    """What they return, each in a thread of its own."""
    barrier = threading.Barrier(len(actions))

    def do(action: Callable[[], Any]) -> Any:
        barrier.wait(SOON)
        return action()

    with ThreadPoolExecutor(len(actions)) as pool:
        return list(pool.map(do, actions))


def connections_to(port: int) -> set[int]:
    return {name for name, _ in store._sockets_to((HERE, port))}


# ---------------------------------------------------------------------- nobody answers


def test_a_connect_that_nobody_answers_holds_up_nobody_else(
    join: Callable[..., ConnectedWorld], gate: Gate
) -> None:
    """It ends at its own deadline, and its connection with it."""
    rank_0 = join(0)
    with ThreadPoolExecutor(1) as pool:
        held_up: Future[ConnectedWorld] = pool.submit(join, 1, gate.port, 3.0)
        soon(lambda: len(gate.silent) >= 2, "the probe, and torch's connection")
        gate.is_shut = False
        others = at_once([lambda: join(1, gate.port), lambda: join(2, gate.port), lambda: join(2)])
        assert not held_up.done()
        assert others[0].store.add("count", 1) == 1
        with pytest.raises(TimeoutError, match="which listens but does not answer"):
            held_up.result(SOON)
    assert [one.store.add("count", 1) for one in (rank_0, *others)] == [2, 3, 4, 5]
    soon(lambda: not connecting(), "the thread of the connect to end")
    assert not any(one.is_lost for one in others)


def connecting() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "checkpoint-engine-connect"]


def test_the_next_call_works_once_rank_0_answers(
    join: Callable[..., ConnectedWorld], gate: Gate
) -> None:
    join(0)
    for _ in range(2):
        with pytest.raises(TimeoutError, match="which listens but does not answer"):
            join(1, gate.port, seconds=0.5)
    soon(lambda: not connections_to(gate.port) and not connecting(), "the connects to end")
    gate.is_shut = False
    assert join(1, gate.port).store.add("count", 1) == 1


def test_rank_0_that_stops_before_it_tells_its_port_is_given_up(port: int) -> None:
    """The store answers, and nobody has put there what this rank asks for."""
    connect_store(0, 3, HERE, port)
    before = connections_to(port)
    with pytest.raises(TimeoutError):
        ConnectedWorld(1, 3, HERE, port, 1, Deadline(0.5))
    soon(lambda: not connecting(), "the thread to end")
    assert connections_to(port) == before
    assert not connect_store(0, 3, HERE, port).check(["liveness"])


# ---------------------------------------------------------------------- whose socket is whose


@pytest.mark.parametrize("rank", [0, 1])
def test_threads_that_connect_at_once_share_one_connection(port: int, rank: int) -> None:
    if rank:
        store._host(HERE, port, 3)
    hosting = 1  # the connection that torch makes with the server
    stores = at_once([lambda: connect_store(rank, 3, HERE, port)] * 4)
    assert stores.count(stores[0]) == 4
    assert stores[0].add("count", 1) == 1
    assert len(connections_to(port)) == hosting + 1


def test_each_connection_knows_its_own_socket(port: int) -> None:
    store._host(HERE, port, 3)
    made = at_once([lambda: store._Connection((HERE, port), Deadline(SOON))] * 6)
    while made:
        cut = made.pop()
        cut.cut()
        with pytest.raises(dist.DistNetworkError):
            cut.store.add("count", 1)
        for other in made:
            assert other.store.add("count", 1) > 0
        cut.close()


def test_connections_of_others_stay_open(join: Callable[..., ConnectedWorld], port: int) -> None:
    """To the store, and to its port at another address."""
    with contextlib.ExitStack() as stack:
        join(0)
        theirs = dist.TCPStore(HERE, port, wait_for_workers=False)
        elsewhere = stack.enter_context(socket.create_server(("127.0.0.2", 0)))
        place = elsewhere.getsockname()
        away = stack.enter_context(socket.create_connection(place))
        accepted, _ = elsewhere.accept()
        stack.enter_context(accepted)
        assert [one for _, one in store._sockets_to((HERE, place[1]))] == []
        assert len(connections_to(port)) == 3  # torch's own, one of rank 0, theirs
        world = join(1)
        world.cut()
        world.close()
        away.sendall(b"x")
        assert accepted.recv(1) == b"x"
        assert theirs.add("count", 1) == 1


def test_a_connect_that_fails_leaves_connections_of_others_open(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[socket.socket] = []

    def fail(*_: Any, **__: Any) -> None:
        opened.append(socket.create_connection((HERE, gate.port)))
        raise RuntimeError("not a store")

    monkeypatch.setattr(store.dist, "TCPStore", fail)
    with pytest.raises(RuntimeError, match="not a store"):
        store._Connection((HERE, gate.port), Deadline(SOON))
    with opened[0] as theirs:
        theirs.sendall(b"x")
        soon(lambda: gate.silent, "the connection")
        assert gate.silent[0].recv(1) == b"x"


def test_a_descriptor_that_closes_meanwhile_is_no_error(
    join: Callable[..., ConnectedWorld], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = os.dup(0)
    os.close(closed)
    real = os.listdir
    monkeypatch.setattr(store.os, "listdir", lambda path: [*real(path), str(closed + 1000)])
    assert join(0).store.add("count", 1) == 1


def test_cut_ends_what_another_thread_waits_for(join: Callable[..., ConnectedWorld]) -> None:
    world = join(0)
    blocked = world.store_to_block(Deadline(SOON))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(blocked.get, "nothing")
        soon(waiting.running, "the wait")
        world.free_blocked()
        with pytest.raises(dist.DistNetworkError):
            waiting.result(SOON)
    assert not world.is_lost
    assert world.store.add("count", 1) == 1
