"""Who is still there: strangers at rank 0's port, and answers that are not rank 0's."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from checkpoint_engine.ground.deadline import Deadline, poll
from checkpoint_engine.world import liveness
from checkpoint_engine.world.liveness import LivenessClient, LivenessServer

SOON = 5.0
SIZE = 3


def soon(done: Callable[[], Any], what: str) -> None:
    deadline = Deadline(SOON)
    poll(lambda: bool(done()), lambda: deadline.check(what))


@pytest.fixture
def host() -> Iterator[LivenessServer]:
    host = LivenessServer(SIZE)
    yield host
    host.close()


@pytest.fixture
def join(host: LivenessServer) -> Iterator[Callable[[int], LivenessClient]]:
    with contextlib.ExitStack() as stack:

        def enter(rank: int) -> LivenessClient:
            guest = LivenessClient(rank, "127.0.0.1", host.port, host.token, lambda: None)
            stack.callback(guest.close)
            return guest

        yield enter


@pytest.fixture
def connect(host: LivenessServer) -> Iterator[Callable[[], socket.socket]]:
    """A stranger's connection."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(
            socket.create_connection(("127.0.0.1", host.port), timeout=SOON)
        )


def is_closed(connection: socket.socket) -> bool:
    with contextlib.suppress(ConnectionError):
        return connection.recv(1) == b""
    return True


def test_ranks_learn_who_is_gone_and_who_is_back(
    host: LivenessServer, join: Callable[[int], LivenessClient]
) -> None:
    first, second = join(1), join(2)
    assert (first.replaces, second.replaces) == (False, False)
    second.close()
    soon(lambda: host.gone == first.gone == {2}, "who is gone")
    assert join(2).replaces
    soon(lambda: not host.gone | first.gone, "nobody to be gone")


# ---------------------------------------------------------------------- strangers

STRANGE = {
    "brackets": b"[" * 1024,
    "nested": b"[" * 100_000 + b"\n",
    "HTTP": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "nothing": b"\n",
    "no token": b"secret 1\n",
    "no ASCII": b"\xff\xfe 1\n",
    "no rank": b"%s\n",
    "a rank too much": b"%s 1 2\n",
    "no number": b"%s one\n",
    "a long number": b"%s " + b"9" * 5000 + b"\n",
    "a rank outside the world": b"%s 3\n",
    "a negative rank": b"%s -1\n",
    "rank 0, which is the host": b"%s 0\n",
    "no end": b"a" * 10_000,
}


@pytest.mark.parametrize("sent", STRANGE.values(), ids=STRANGE.keys())
def test_what_is_no_hello_ends_its_own_connection_only(
    host: LivenessServer,
    join: Callable[[int], LivenessClient],
    connect: Callable[[], socket.socket],
    sent: bytes,
) -> None:
    guest = join(1)
    stranger = connect()
    with contextlib.suppress(ConnectionError):  # it may be closed before all is sent
        stranger.sendall(sent.replace(b"%s", host.token.encode()))
    assert is_closed(stranger)
    assert host.gone == frozenset()
    guest.close()
    soon(lambda: host.gone == {1}, "the death of a rank")


def test_a_hello_may_come_in_pieces(
    host: LivenessServer,
    join: Callable[[int], LivenessClient],
    connect: Callable[[], socket.socket],
) -> None:
    connection = connect()
    connection.sendall(host.token.encode())
    join(2)  # an answer to whoever came later: rank 0 has read the first piece
    connection.sendall(b" 1\n")
    assert connection.recv(1024) == b"0\n"


@pytest.mark.parametrize("sent", [b"", b"half a hel"])
def test_silent_strangers_are_dropped(
    host: LivenessServer,
    join: Callable[[int], LivenessClient],
    connect: Callable[[], socket.socket],
    monkeypatch: pytest.MonkeyPatch,
    sent: bytes,
) -> None:
    monkeypatch.setattr(liveness, "_HELLO_SECONDS", 0.2)
    guest = join(1)
    stranger = connect()
    stranger.sendall(sent)
    assert is_closed(stranger)
    assert host.gone | guest.gone == frozenset()


def test_of_too_many_strangers_the_oldest_is_dropped(
    host: LivenessServer,
    join: Callable[[int], LivenessClient],
    connect: Callable[[], socket.socket],
) -> None:
    guest = join(1)
    most = 2 * SIZE + 64
    strangers = [connect() for _ in range(most + 3)]
    assert [is_closed(one) for one in strangers[:3]] == [True] * 3
    strangers[3].sendall(host.token.encode() + b" 2\n")
    assert strangers[3].recv(1024) == b"0\n"
    assert host.gone | guest.gone == frozenset()


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    kept = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, kept)


def test_without_descriptors_the_thread_lives_and_does_not_spin(
    host: LivenessServer, join: Callable[[int], LivenessClient]
) -> None:
    guest = join(1)
    assert host._thread.ident is not None
    clock = time.pthread_getcpuclockid(host._thread.ident)
    with socket.socket() as late:
        late.settimeout(SOON)
        with no_descriptor_left():
            late.connect(("127.0.0.1", host.port))
            guest.close()
            soon(lambda: host.gone == {1}, "the death of a rank")
            began, used = time.monotonic(), time.clock_gettime(clock)
            while time.monotonic() - began < 0.6:
                time.sleep(0.1)
            assert time.clock_gettime(clock) - used < 0.2
        late.sendall(host.token.encode() + b" 2\n")
        assert late.recv(1024) == b"0 1\n"


# ---------------------------------------------------------------------- what is not rank 0


class Rank0:
    """What listens at rank 0's port, and sends what a test says."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.was_silent = threading.Event()

    def guest(self, answer: bytes) -> tuple[LivenessClient, socket.socket]:
        """A rank that was answered, and the connection to it."""
        accepted: list[socket.socket] = []

        def greet() -> None:
            accepted.append(self.listener.accept()[0])
            accepted[0].recv(1024)
            accepted[0].sendall(answer)
            if not answer:
                accepted[0].close()

        thread = threading.Thread(target=greet)
        thread.start()
        try:
            port = self.listener.getsockname()[1]
            return LivenessClient(1, "127.0.0.1", port, "token", self.was_silent.set), accepted[0]
        finally:
            thread.join(SOON)


@pytest.fixture
def rank_0() -> Iterator[Rank0]:
    rank_0 = Rank0()
    with rank_0.listener:
        yield rank_0


MALFORMED = {
    "brackets": b"[" * 1024 + b"\n",
    "nothing": b"\n",
    "no number": b"0 one\n",
    "no ASCII": b"\xff\n",
    "a float": b"0 1e999\n",
    "a long number": b"0 " + b"9" * 5000 + b"\n",
    "the end": b"",
}


@pytest.mark.parametrize(
    "sent", [*MALFORMED.values(), b"0" * (2 << 20)], ids=[*MALFORMED, "no end"]
)
def test_what_is_malformed_is_not_rank_0(rank_0: Rank0, sent: bytes) -> None:
    guest, connection = rank_0.guest(b"0 2\n")
    assert guest.gone == {2}
    with connection:
        with contextlib.suppress(ConnectionError):  # it may be closed before all is sent
            connection.sendall(sent)
            if not sent:
                connection.shutdown(socket.SHUT_WR)
        assert rank_0.was_silent.wait(SOON)
        assert guest.gone == {0}


@pytest.mark.parametrize("sent", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_greeting_is_an_error(rank_0: Rank0, sent: bytes) -> None:
    with pytest.raises((OSError, ValueError)):
        rank_0.guest(sent)


def test_lines_of_rank_0_may_come_in_pieces(rank_0: Rank0) -> None:
    guest, connection = rank_0.guest(b"1 2\n0 2")
    assert (guest.replaces, guest.gone) == (True, {2})
    with connection:
        connection.sendall(b" 4\n0")
        soon(lambda: guest.gone == {2, 4}, "the second line")
        connection.sendall(b"\n")
        soon(lambda: not guest.gone, "the third line")
        guest.close()


@pytest.mark.parametrize("answer", [b"1 2\n\a", b"1 2\n\a\a", b"\a1 2\n", b"1 \a2\n"])
def test_a_bell_beside_a_line_does_not_hide_it(rank_0: Rank0, answer: bytes) -> None:
    """A rank that connects while others ring gets both at once."""
    guest, connection = rank_0.guest(answer)
    assert (guest.replaces, guest.gone) == (True, {2})
    with connection:
        heard = guest.rings
        connection.sendall(b"\a0 4\n\a")
        soon(lambda: guest.gone == {4}, "the line")
        assert guest.rings > heard
        connection.sendall(b"0 \a")
        connection.sendall(b"6\n")
        soon(lambda: guest.gone == {6}, "the line that a bell came in")
        guest.close()


def test_ranks_join_while_another_rings(
    host: LivenessServer, join: Callable[[int], LivenessClient]
) -> None:
    all_have_joined = threading.Event()

    def ring() -> None:
        while not all_have_joined.is_set():
            host.ring()

    thread = threading.Thread(target=ring)
    thread.start()
    try:
        for _ in range(100):
            join(1).close()
    finally:
        all_have_joined.set()
        thread.join()


def test_no_bells_keep_a_rank_from_its_end(rank_0: Rank0) -> None:
    """That of a call for which the store does not answer."""
    guest, connection = rank_0.guest(b"0\n")
    with connection:
        guest.expect_end(0.2)
        deadline = Deadline(SOON)
        while not rank_0.was_silent.wait(0.02):
            deadline.check("the end")
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"\a")


def test_a_port_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("PS_LIVENESS_PORT", str(port))
        with pytest.raises(
            RuntimeError, match=f"cannot listen at PS_LIVENESS_PORT={port}: .*in use"
        ):
            LivenessServer(SIZE)
    host = LivenessServer(SIZE)
    assert host.port == port
    host.close()
    LivenessServer(SIZE).close()  # a restarted rank 0 takes the same
