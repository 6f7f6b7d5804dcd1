"""How ranks agree: real processes and a real store, ending with one outcome on every rank."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from checkpoint_engine.errors import UpdateError
from checkpoint_engine.ground.deadline import Deadline, poll
from checkpoint_engine.world import call as call_module
from checkpoint_engine.world import control, store
from checkpoint_engine.world.control import ControlPlane
from checkpoint_engine.world.default_group import DefaultGroup
from torchrun import free_port_pair

SOON = 4.0  # seconds; far below every timeout that is not meant to expire
LONG = 30.0
PROMPT = 12.0  # seconds; below LONG, and above what a lost DNS answer costs while connecting

Program = Callable[["Rank"], Any]


class Rank:
    """One process of a world, and signals by which a test orders what its ranks do."""

    def __init__(self, rank: int, size: int, port: int, signals: list[Any]) -> None:
        self.rank = rank
        self.size = size
        self.port = port
        self.signals = signals
        self.plane = self.new_plane()

    def new_plane(self) -> ControlPlane:
        return ControlPlane(self.rank, self.size, "127.0.0.1", self.port)

    def exchange(self, value: str = "", timeout: float = LONG, what: str = "v") -> list[str]:
        with self.plane.call("exchange", timeout) as call:
            blobs = call.all_gather(what, f"{self.rank}{value}".encode())
        return [blob.decode() for blob in blobs]

    def everyone(self, value: str = "") -> list[str]:
        return [f"{rank}{value}" for rank in range(self.size)]

    def failing(
        self, action: Callable[[Any], None], timeout: float = LONG
    ) -> tuple[str, float, int, str]:
        """The text of the error that ``action`` ends a call with, and its time."""
        began = time.monotonic()
        try:
            with self.plane.call("work", timeout) as call:
                action(call)
        except UpdateError as error:
            return str(error), time.monotonic() - began, error.rank, error.phase
        raise AssertionError("the call succeeded")


def run_world(size: int, program: Program, first: int = 0) -> list[Any]:
    """What ``program`` returned on every rank from ``first`` on.

    Processes live until all of them are done.
    """
    context = multiprocessing.get_context("fork")
    port = free_port_pair()
    signals = [context.Event() for _ in range(4)]
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_main, args=(theirs, rank, size, port, signals, program), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return [_result(pipe) for pipe in pipes[first:]]
    finally:
        for pipe, process in zip(pipes, processes, strict=True):
            with contextlib.suppress(OSError):
                pipe.send("all are done")
            process.join(SOON)
            process.kill()
            process.join()
            pipe.close()


def _main(
    pipe: Connection, rank: int, size: int, port: int, signals: list[Any], program: Program
) -> None:
    try:
        pipe.send((True, program(Rank(rank, size, port, signals))))
    except BaseException as error:
        pipe.send((False, f"rank {rank}: {type(error).__name__}: {error}"))
    pipe.recv()  # rank 0 hosts the store until everybody is done


def _result(pipe: Connection) -> Any:
    assert pipe.poll(40), "a rank does not end"
    succeeded, result = pipe.recv()
    assert succeeded, result
    return result


# ---------------------------------------------------------------------- success


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_rank_learns_what_all_say(size: int) -> None:
    def program(me: Rank) -> list[list[str]]:
        return [me.exchange(f"-{i}") for i in range(3)]

    expected = [[f"{rank}-{i}" for rank in range(size)] for i in range(3)]
    assert run_world(size, program) == [expected] * size


def test_several_exchanges_in_one_operation_and_any_bytes() -> None:
    blob = bytes(range(256)) * 4000

    def program(me: Rank) -> list[Any]:
        with me.plane.call("work", LONG) as call:
            first = call.all_gather("first", b"")
            call.begin("next")
            second = call.all_gather("second", blob if me.rank else b"\0")
        return [first, second == [b"\0", blob], set(call.clock.seconds)]

    seen = [[b"", b""], True, {"start", "next", "completion"}]
    assert run_world(2, program) == [seen, seen]


def test_nobody_leaves_before_everybody_has_done_its_part() -> None:
    def program(me: Rank) -> bool:
        with me.plane.call("work", LONG):
            if me.rank == 1:
                me.signals[0].set()
        return bool(me.signals[0].is_set())

    assert run_world(3, program) == [True] * 3


def test_a_barrier_is_reusable_and_keys_do_not_pile_up() -> None:
    def program(me: Rank) -> list[int]:
        counts = []
        for i in range(50):
            assert me.exchange(f"-{i}") == me.everyone(f"-{i}")
            if me.rank == 0:
                counts.append(store._stores["127.0.0.1", me.port].store.num_keys())
        return counts

    counts = run_world(3, program)[0]
    ahead = 2 * 3  # keys of the next call, where the others may be already
    assert max(counts[10:]) <= max(counts[:10]) + ahead


def test_keys_do_not_pile_up_over_failures() -> None:
    def program(me: Rank) -> list[int]:
        counts = []
        for _ in range(12):
            me.failing(lambda call: fail_after_exchange(me, call))
            me.exchange()
            if me.rank == 0:
                counts.append(store._stores["127.0.0.1", me.port].store.num_keys())
        return counts

    counts = run_world(2, program)[0]
    ahead = 2 * 2  # keys of the next call, where the other may be already
    assert max(counts[6:]) <= max(counts[:6]) + ahead


def fail_after_exchange(me: Rank, call: Any) -> None:
    call.all_gather("v", b"")
    call.begin("loading")
    if me.rank == 1:
        raise ValueError("cannot load")
    wait(call)


def wait(call: Any) -> None:
    """A wait of a call that only its end can end."""
    call.watch()
    poll(lambda: False, call.check)


def test_two_servers_in_one_process_do_not_meet_each_other() -> None:
    def program(me: Rank) -> list[list[str]]:
        first, second = me.plane, me.new_plane()
        seen = []
        for plane, value in ((first, "a"), (second, "b"), (first, "c"), (second, "d")):
            me.plane = plane
            seen.append(me.exchange(value))
        return seen

    expected = [[f"{rank}{value}" for rank in range(2)] for value in "abcd"]
    assert run_world(2, program) == [expected] * 2


def test_the_store_serves_process_groups_too() -> None:
    def program(me: Rank) -> bytes:
        store = dist.PrefixStore("mine", me.plane.store())
        if me.rank == 0:
            store.set("key", b"value")
        return bytes(store.get("key"))

    assert run_world(2, program) == [b"value"] * 2


# ---------------------------------------------------------------------- failure


@pytest.mark.parametrize(("size", "culprit"), [(1, 0), (2, 0), (2, 1), (4, 2)])
def test_a_failure_is_the_same_on_every_rank_and_the_next_call_works(
    size: int, culprit: int
) -> None:
    def act(me: Rank, call: Any) -> None:
        call.all_gather("v", b"")
        call.begin("loading")
        if me.rank == culprit:
            raise ValueError("cannot load")
        wait(call)

    def program(me: Rank) -> Any:
        seen = me.failing(lambda call: act(me, call))
        assert me.exchange() == me.everyone()
        return seen

    for text, seconds, rank, phase in run_world(size, program):
        assert text == f"work failed on rank {culprit} during loading: cannot load"
        assert (rank, phase) == (culprit, "loading")
        assert seconds < PROMPT


@pytest.mark.parametrize("mute", [{1}, {1, 2}])
def test_a_failure_of_a_rank_that_cannot_ring_is_seen_at_once(mute: set[int]) -> None:
    """One that reaches the store, but not the port of liveness."""

    def no_way(*_: Any) -> Any:
        raise OSError("filtered")

    def act(me: Rank, call: Any) -> None:
        call.all_gather("v", b"")
        call.watch()
        if me.rank == 1:
            time.sleep(0.5)  # the others have looked
            raise ValueError("cannot load")
        wait(call)

    def program(me: Rank) -> Any:
        if me.rank in mute:
            store.LivenessClient = no_way  # type: ignore[assignment, misc]  # in this process
        return me.failing(lambda call: act(me, call))

    for text, seconds, *_ in run_world(3, program):
        assert text == "work failed on rank 1 during start: cannot load"
        assert seconds < PROMPT


def test_a_failure_reaches_ranks_that_still_exchange() -> None:
    def act(me: Rank, call: Any) -> None:
        if me.rank == 1:
            me.signals[0].wait(SOON)
            raise OSError("no such device")
        if me.rank == 0:
            call.store.set("joined", b"")
            me.signals[0].set()
        call.all_gather("v", b"")

    def program(me: Rank) -> Any:
        seen = me.failing(lambda call: act(me, call))
        assert me.exchange() == me.everyone()
        return seen

    for text, seconds, *_ in run_world(2, program):
        assert text == "work failed on rank 1 during start: OSError: no such device"
        assert seconds < PROMPT


def test_a_failure_reaches_ranks_that_wait_for_the_end() -> None:
    def act(me: Rank, call: Any) -> None:
        call.all_gather("v", b"")
        if me.rank == 0:
            raise ValueError("the last moment")

    def program(me: Rank) -> Any:
        seen = me.failing(lambda call: act(me, call))
        assert me.exchange() == me.everyone()
        return seen

    texts = {text for text, *_ in run_world(3, program)}
    assert texts == {"work failed on rank 0 during start: the last moment"}


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_failure_reaches_a_rank_that_comes_after_it(culprit: int) -> None:
    """Ranks are never in step: one may have failed before another has begun."""

    def program(me: Rank) -> Any:
        me.exchange()
        if me.rank == culprit:
            seen = me.failing(fail)
            me.signals[0].set()
        else:
            assert me.signals[0].wait(LONG)
            seen = me.failing(lambda call: call.all_gather("v", b""), timeout=SOON + 2)
        me.signals[1 + me.rank].set()
        assert me.signals[2 - me.rank].wait(LONG)
        assert me.exchange() == me.everyone()
        return seen

    for text, seconds, *_ in run_world(2, program):
        assert text == f"work failed on rank {culprit} during start: the weights are not here"
        assert seconds < PROMPT


def fail(call: Any) -> None:
    raise ValueError("the weights are not here")


def test_two_failures_have_one_outcome() -> None:
    def act(me: Rank, call: Any) -> None:
        call.all_gather("v", b"")
        raise ValueError(f"said rank {me.rank}")

    def program(me: Rank) -> Any:
        seen = me.failing(lambda call: act(me, call))
        assert me.exchange() == me.everyone()
        return seen

    seen = run_world(4, program)
    assert len({text for text, *_ in seen}) == 1
    assert seen[0][0].endswith(f"said rank {seen[0][2]}")


def test_an_interrupt_ends_the_call_on_the_other_ranks_too() -> None:
    def act(me: Rank, call: Any) -> None:
        call.all_gather("v", b"")
        if me.rank == 0:
            raise KeyboardInterrupt
        wait(call)

    def program(me: Rank) -> Any:
        try:
            return me.failing(lambda call: act(me, call))
        except KeyboardInterrupt:
            return "interrupted"

    interrupted, seen = run_world(2, program)
    assert interrupted == "interrupted"
    assert "failed on rank 0" in seen[0]
    assert "KeyboardInterrupt" in seen[0]


# ---------------------------------------------------------------------- time


@pytest.fixture
def short_farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 stays that long for ranks that never come."""
    monkeypatch.setattr(call_module, "_FAREWELL", 0.5)


@pytest.mark.usefixtures("short_farewell")
@pytest.mark.parametrize("absent", [0, 2])
def test_a_rank_that_never_comes_is_named_and_may_come_again(absent: int) -> None:
    def program(me: Rank) -> Any:
        me.exchange()
        seen = None
        if me.rank != absent:
            seen = me.failing(lambda call: call.all_gather("v", b""), timeout=0.5)
        me.signals[me.rank].set()
        assert all(signal.wait(LONG) for signal in me.signals[: me.size])
        assert me.exchange() == me.everyone()
        return seen

    results = run_world(3, program)
    assert results.pop(absent) is None
    assert len({text for text, *_ in results}) == 1
    for text, seconds, *_ in results:
        assert f"gave up after 0.5 s: ranks [{absent}] did not join work" in text
        assert seconds < PROMPT


class _TimeUpAtLook(Deadline):
    """The time is up when it is looked at for the ``nth`` time."""

    def __init__(self, nth: int) -> None:
        super().__init__(LONG)
        self._left = nth

    def remaining(self) -> float:
        self._left -= 1
        return LONG if self._left > 0 else 0.0


def test_a_rank_that_never_comes_is_named_wherever_the_time_runs_out() -> None:
    """Between any two looks at the clock: who is named may come again, and others may not."""

    def give_up(call: Any, look: int) -> None:
        call.deadline = _TimeUpAtLook(look)
        call.all_gather("v", b"")

    def program(me: Rank) -> list[str]:
        seen = []
        for look in range(1, 9):
            assert me.exchange() == me.everyone()
            if me.rank == 1:
                seen.append(me.failing(partial(give_up, look=look))[0])
                me.signals[1].set()
            else:
                assert me.signals[1].wait(LONG)
                me.signals[1].clear()
        return seen

    absent, texts = run_world(2, program)
    assert absent == []
    assert len(texts) == 8
    for text in texts:
        assert "gave up after 30 s: ranks [0] did not join work" in text


@pytest.mark.usefixtures("short_farewell")
def test_all_ranks_that_do_not_come_are_named() -> None:
    def program(me: Rank) -> Any:
        me.exchange()
        seen = None
        if me.rank == 0:
            seen = me.failing(lambda call: call.all_gather("v", b""), timeout=0.3)
        return seen

    assert "ranks [1, 2, 3] did not join work" in run_world(4, program)[0][0]


def test_time_runs_out_in_a_phase() -> None:
    def act(me: Rank, call: Any) -> None:
        call.all_gather("v", b"")
        call.begin("reload")
        call.deadline = Deadline(0.5)  # not before: a busy machine is slow to bring both here
        wait(call)

    def program(me: Rank) -> Any:
        seen = me.failing(lambda call: act(me, call))
        assert me.exchange() == me.everyone()
        return seen

    texts = {text for text, *_ in run_world(2, program)}
    assert len(texts) == 1
    assert texts.pop().endswith("during reload: gave up after 0.5 s waiting for reload of work")


def test_a_single_rank_has_deadlines_too() -> None:
    plane = ControlPlane(0, 1, None, None)

    def idle() -> None:
        with plane.call("work", 0.01) as call:
            call.begin("idle")
            wait(call)

    with pytest.raises(UpdateError, match=r"rank 0 during idle.*gave up after 0\.01 s"):
        idle()
    with plane.call("work", timedelta(seconds=5)) as call:
        assert call.all_gather("v", b"x") == [b"x"]


@pytest.mark.parametrize("timeout", [0, -1, timedelta(0)])
def test_a_timeout_is_positive(timeout: Any) -> None:
    with pytest.raises(ValueError, match="timeout must be positive"):
        Deadline(timeout)


@pytest.mark.parametrize("when", ["in a call", "before a call"])
def test_the_store_going_away_is_an_error_soon(when: str) -> None:
    """Rank 0's process dies, and the store with it."""

    def exchange(me: Rank, call: Any) -> None:
        me.signals[0].set()
        call.all_gather("v", b"")

    def program(me: Rank) -> Any:
        me.exchange()
        if me.rank == 0:
            assert me.signals[0].wait(LONG)
            os._exit(0)
        if when == "before a call":
            me.signals[0].set()
            _await_refusal(me.port)
        return me.failing(lambda call: exchange(me, call))

    text, seconds, *_ = run_world(2, program, first=1)[0]
    assert "rank 0" in text or "store" in text
    assert seconds < PROMPT


def _await_refusal(port: int) -> None:
    """Until nobody listens there any more."""
    deadline = Deadline(LONG)
    with contextlib.suppress(ConnectionRefusedError, ConnectionResetError):
        while True:
            socket.create_connection(("127.0.0.1", port), timeout=SOON).close()
            deadline.check("the store to go")


# ---------------------------------------------------------------------- where ranks meet


def test_the_meeting_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(RuntimeError, match="MASTER_PORT"):
        control.master_port()
    with pytest.raises(RuntimeError, match="MASTER_ADDR"):
        control.master_addr()
    monkeypatch.setenv("MASTER_ADDR", "somewhere")
    monkeypatch.setenv("MASTER_PORT", "2000")
    assert (control.master_addr(), control.master_port()) == ("somewhere", 2001)
    assert (control.master_addr("here"), control.master_port(0)) == ("here", 0)


def test_a_single_rank_needs_no_meeting_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    plane = ControlPlane(0, 1, None, None)
    for value in (b"a", b"b"):
        with plane.call("work", SOON) as call:
            assert call.all_gather("v", value) == [value]
    assert isinstance(plane.local_ip(), str)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"rank 0 cannot host the store at 127.0.0.1:{port}"):
            store.connect_store(0, 2, "127.0.0.1", port)


def test_rank_0_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_CONNECT_TIMEOUT", timedelta(seconds=0.5))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RuntimeError, match=rf"rank 0 .*127\.0\.0\.1:{port}"):
        store.connect_store(1, 2, "127.0.0.1", port)


# ---------------------------------------------------------------------- death


def first_life(me: Rank, action: Callable[[], None]) -> None:
    """Do ``action`` as a process that is killed then; this one takes its place after it."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            action()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)


def never(call: Any) -> None:
    call.all_gather("v", b"")
    call.begin("loading")
    wait(call)


@pytest.mark.parametrize("culprit", [1, 2])
def test_a_killed_rank_is_noticed_at_once_and_may_be_started_again(culprit: int) -> None:
    def die(me: Rank) -> None:
        with me.plane.call("work", LONG) as call:
            call.all_gather("v", b"")

            me.signals[1].set()
            os.kill(os.getpid(), signal.SIGKILL)

    def program(me: Rank) -> Any:
        if me.rank == culprit:
            first_life(me, lambda: die(me))
            me.signals[0].wait(LONG)  # the others have seen it, and called once more
            return me.exchange()
        seen = [me.failing(never)]
        again = me.failing(never)
        assert again[1] < SOON
        if me.rank == 0:
            me.signals[0].set()
        while culprit in me.plane._world.liveness.gone:
            time.sleep(0.01)
        assert me.exchange() == me.everyone()
        return seen

    for seen in (s for rank, s in enumerate(run_world(3, program)) if rank != culprit):
        text, seconds, rank, _ = seen[0]
        assert text.startswith(f"work failed on rank {culprit} during loading: rank {culprit} is")
        assert rank == culprit
        assert seconds < SOON


def test_rank_0_may_be_started_again_too() -> None:
    def die(me: Rank) -> None:
        me.exchange()
        me.signals[1].wait(SOON)

    def program(me: Rank) -> Any:
        if me.rank == 0:
            first_life(me, lambda: die(me))
            return me.exchange()
        me.exchange()
        me.signals[1].set()
        text, seconds, *_ = me.failing(never)
        assert "rank 0" in text
        assert seconds < SOON
        ends = Deadline(LONG)
        while True:
            try:
                return me.exchange()
            except UpdateError:
                ends.check("rank 0 to be there again")

    assert run_world(2, program) == [["0", "1"]] * 2


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_ends_the_operation_at_its_deadline(stopped: int) -> None:
    def program(me: Rank) -> Any:
        assert me.exchange() == me.everyone()
        if me.rank == stopped:
            with contextlib.suppress(UpdateError), me.plane.call("work", 1.5) as call:
                call.all_gather("v", b"")
                _stop_until(me.signals[0])
            seen = ("", 0.0)
        else:
            seen = me.failing(never, timeout=1.5)[:2]
            me.signals[0].set()
        ends = Deadline(LONG)
        while True:
            try:
                assert me.exchange() == me.everyone()
                return seen
            except UpdateError:
                ends.check("the stopped rank")

    text, seconds = run_world(2, program)[1 - stopped]
    assert "gave up after 1.5 s" in text or "rank 0" in text
    assert seconds < SOON


@pytest.mark.parametrize("what", ["a call", "that of others"])
def test_rank_0_is_stopped_before_the_others_call(what: str) -> None:
    """The first question to the store is answered by nobody."""

    def program(me: Rank) -> Any:
        pid = int(me.exchange(f" {os.getpid()}")[0].split()[1])
        if me.rank == 0:
            _stop_until(me.signals[0])
            return "", 0.0
        _await_stop(pid)
        began = time.monotonic()
        try:
            if what == "a call":
                with me.plane.call("work", 1.5):
                    pass
            else:
                me.plane.await_others("work", 1.5, [0], "a")
        except UpdateError as error:
            return str(error), time.monotonic() - began
        finally:
            me.signals[0].set()
        raise AssertionError("nobody answered, and that was no error")

    text, seconds = run_world(2, program)[1]
    assert "rank 0, which hosts the store of this world, does not answer" in text
    assert seconds < SOON


def _stop_until(signal_to_go_on: Any) -> None:
    pid = os.getpid()
    if os.fork() == 0:
        signal_to_go_on.wait(LONG)
        os.kill(pid, signal.SIGCONT)
        os._exit(0)
    os.kill(pid, signal.SIGSTOP)
    os.wait()


def _await_stop(pid: int) -> None:
    ends = Deadline(LONG)
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        ends.check(f"process {pid} to be stopped")
        time.sleep(0.01)


def test_an_interrupt_after_everybody_succeeded_ends_the_call_in_success(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The interrupt is the caller's; the other ranks have succeeded, and the next call works."""

    succeed = call_module.Call._raise_failure

    def interrupt_at_the_end(call: call_module.Call) -> None:
        succeed(call)
        if call._outcome is not None:
            raise KeyboardInterrupt

    def program(me: Rank) -> list[Any]:
        done: list[str] = []
        began = time.monotonic()
        try:
            with me.plane.call("work", LONG) as call:
                call.all_gather("v", b"")
                call.on_success = lambda: done.append("done")
                if me.rank == 0:
                    monkeypatch.setattr(call_module.Call, "_raise_failure", interrupt_at_the_end)
        except KeyboardInterrupt:
            done.append("interrupted")
        monkeypatch.undo()
        assert time.monotonic() - began < SOON
        return [*done, *me.exchange()]

    assert run_world(2, program) == [["done", "interrupted", "0", "1"], ["done", "0", "1"]]


@pytest.mark.parametrize("timeout", [timedelta.max, float("inf"), 0, -1.0, float("nan")])
def test_a_timeout_that_no_wait_can_hold_is_refused_at_the_start(timeout: Any) -> None:
    plane = ControlPlane(0, 1, None, None)
    with pytest.raises(ValueError, match="positive and at most 30 days"), plane.call("w", timeout):
        pass


def test_groups_of_other_ranks_have_keys_of_their_own() -> None:
    """Each rank counts the groups that it has made itself."""

    def program(me: Rank) -> list[str]:
        group = DefaultGroup(me.plane, "gloo")
        found = []
        for ranks in ([0, 1], [2], [0, 1, 2]):
            if me.rank in ranks:
                group.create(ranks, None, None, timedelta(seconds=LONG))
                total = torch.tensor([me.rank])
                dist.all_reduce(total)
                found.append(f"{len(ranks)}: {total.item()}")
                group.leave()
        return found

    both, alone = ["2: 1", "3: 3"], ["1: 2", "3: 3"]
    assert run_world(3, program) == [both, both, alone]
