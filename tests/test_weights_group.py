"""Buckets between real processes: one contract, over gloo and out of each other's staging."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from checkpoint_engine.data_types import H2DBucket
from checkpoint_engine.device_utils import DeviceManager
from checkpoint_engine.distributed.weights_group import create_weights_group
from checkpoint_engine.ground.deadline import Deadline, poll
from checkpoint_engine.handover import wire
from checkpoint_engine.handover.ipc import SharedBuffer, open_buffer
from checkpoint_engine.planning.plan import Step, TransferPlan
from checkpoint_engine.transfer.host_peers import HostPeers
from checkpoint_engine.transfer.streams import make_streams
from checkpoint_engine.transfer.tracer import RankTracer
from checkpoint_engine.update.ways.base import Move
from checkpoint_engine.update.ways.peers import PeersMover
from torchrun import forkserver

pytestmark = pytest.mark.timeout(60)

SLOT = 1 << 20
ROUNDS = 12
PATIENCE = 20.0
SOON = 2.0  # seconds, until a peer's end is known
STOPPED = 3.0  # seconds to wait for one that is only stopped
AT_ONCE = 0.5
TRANSPORTS = ["gloo", "peers"]

Member = Callable[["Rank"], Any]
Sizes = list[tuple[int, int]]
"""Of each bucket, its owner and its bytes."""


class Rank:
    """One member of a group, with the double buffer that it broadcasts out of and into."""

    def __init__(
        self, transport: str, rank: int, size: int, store: dist.Store, buckets: Sizes
    ) -> None:
        self.rank, self.size, self.store = rank, size, store
        self.before = resources()
        self.stack = contextlib.ExitStack()
        device = DeviceManager("cpu")
        slots = 2 if transport == "gloo" else 4  # staging lies behind the double buffer
        self.buffer = self.stack.enter_context(SharedBuffer(device, 0, slots * SLOT))
        self.streams = make_streams(device, orders_double_buffer=transport != "gloo")
        neighbours = self._meet() if transport != "gloo" else None
        self.stack.callback(self.streams.close)
        ranks = list(range(size))
        self.group: Any = (
            create_weights_group(
                "gloo", store, ranks, rank, "127.0.0.1", device.device(0), patience("the others")
            )
            if neighbours is None
            else Buckets(self, neighbours, buckets)
        )
        self.group.expect_end(PATIENCE)

    def _meet(self) -> HostPeers:
        neighbours = HostPeers(self.rank, range(self.size))
        self.stack.callback(neighbours.close)
        addresses = [address.decode() for address in self.gather("address", neighbours.address)]
        assert not neighbours.reach(dict(enumerate(addresses)), handle_of(self.buffer))
        self.gather("reached", "yes")
        neighbours.accept()
        return neighbours

    def gather(self, what: str, value: str) -> list[bytes]:
        self.store.set(f"{what}/{self.rank}", value)
        return [self.store.get(f"{what}/{rank}") for rank in range(self.size)]

    def slot(self, number: int, nbytes: int = SLOT) -> torch.Tensor:
        start = number % 2 * SLOT
        return self.buffer.tensor[start : start + nbytes]

    def leave(self, how: str) -> dict[str, Any]:
        """Returns what is left of it that was not there before."""
        getattr(self.group, how)()
        self.stack.close()
        del self.group, self.streams, self.buffer
        ends = time.monotonic() + 5.0
        while (after := resources()) != self.before and time.monotonic() < ends:
            time.sleep(0.02)
        return {k: (self.before[k], after[k]) for k in after if after[k] != self.before[k]}


class Buckets:
    """The mover of peers, with a group's interface, where workers are served by their ranks."""

    def __init__(self, me: Rank, peers: HostPeers, buckets: Sizes) -> None:
        self._steps = [
            Step(owner, owner, H2DBucket(size=nbytes, ranges=[], items=[]), number % 2)
            for number, (owner, nbytes) in enumerate(buckets)
        ]
        self._numbers = {id(step.bucket): number for number, step in enumerate(self._steps)}
        self._begun = threading.Event()
        plan = TransferPlan(tuple(self._steps), SLOT, staging=False)
        wait = partial(poll, check=patience("the others to let go"))
        call = SimpleNamespace(rank=me.rank, wait=wait)
        source = SimpleNamespace(copy=self._fill)
        gathered = SimpleNamespace(sum_of=lambda owner, bucket: None)
        tracer = RankTracer(me.rank, DeviceManager("cpu"), exact=False)
        move = Move(call, plan, source, gathered, me.buffer, tracer)
        self._peers = peers
        memory = {rank: mapped(handle) for rank, (handle, _) in peers.handles.items()}
        self._memory = memory
        self._mover = PeersMover(move, peers, me.streams, 2)
        self._mover.connected(memory)
        self._mover.handed_over("these tests have no workers")

    def _fill(self, bucket: H2DBucket, target: torch.Tensor) -> None:
        self._begun.wait(PATIENCE)  # a rank that begins nothing sends nothing
        target.copy_(content(self._numbers[id(bucket)], bucket.size))

    def expect_end(self, seconds: float) -> None:
        """The deadline of a call ends the waiting."""

    def broadcast(self, target: torch.Tensor, src: int) -> Bucket:
        self._begun.set()
        step = self._steps.pop(0)
        assert (step.receiver, step.bucket.size) == (src, target.nbytes)
        return Bucket(self._mover, step)

    def abort(self) -> None:
        self._peers.hang_up()
        self._let_go()

    def close(self) -> None:
        if self._memory:
            self._mover.let_go()
        self._let_go()

    def _let_go(self) -> None:
        self._begun.set()
        self._memory.clear()


def handle_of(buffer: SharedBuffer) -> Callable[[], bytes]:
    return lambda: wire.encode_handle(*buffer.handle(), {})


def mapped(handle: bytes) -> torch.Tensor:
    made = wire.decode_handle(handle)
    assert isinstance(made, wire.Handle)
    return open_buffer(made.rebuild, made.args, None, of_peer=True)


class Bucket:
    def __init__(self, mover: PeersMover, step: Step) -> None:
        self._mover, self._step = mover, step
        self._error: RuntimeError | None = None
        mover.start(step)

    def is_completed(self) -> bool:
        try:
            return self._mover.has_arrived(self._step)
        except RuntimeError as error:
            self._error = error
            return True

    def wait(self) -> None:
        if self._error is not None:
            raise self._error


def resources() -> dict[str, Any]:
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "mapped": maps.count("checkpoint-engine-"),
    }


def patience(what: str, seconds: float = PATIENCE) -> Callable[[], None]:
    deadline = Deadline(seconds)
    return lambda: deadline.check(what)


def finish(work: Any, seconds: float = PATIENCE) -> None:
    poll(work.is_completed, patience("a broadcast", seconds))
    work.wait()


def content(number: int, nbytes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def size_of(number: int) -> int:
    return SLOT if number % 3 else 1 + number


# ---------------------------------------------------------------------- what a member does


def broadcasts(me: Rank) -> dict[str, Any]:
    """Two at a time, from every rank in turn, of several sizes."""
    wrong, in_flight = [], []

    def begin(number: int) -> None:
        src, target = number % me.size, me.slot(number, size_of(number))
        target.copy_(content(number, target.nbytes)) if src == me.rank else target.zero_()
        in_flight.append((number, me.group.broadcast(target, src)))

    def end() -> None:
        number, work = in_flight.pop(0)
        finish(work)
        if not torch.equal(me.slot(number, size_of(number)), content(number, size_of(number))):
            wrong.append(number)

    begin(0)
    for number in range(1, ROUNDS):
        begin(number)
        end()
    end()
    return {"wrong": wrong, "left": me.leave("close")}


def lose_rank_0(me: Rank) -> dict[str, Any]:
    """It says nothing, and something happens to it."""
    if me.rank == 0:
        time.sleep(2 * PATIENCE)
    work = me.group.broadcast(me.slot(0), 0)
    me.store.set(f"waits/{me.rank}", "yes")
    failed = _error(work, STOPPED)
    del work
    me.store.set(f"failed/{me.rank}", "yes")  # whoever aborts would end the others' waiting
    me.store.wait([f"failed/{rank}" for rank in range(1, me.size)])
    began = time.monotonic()
    me.group.abort()
    seconds = time.monotonic() - began
    return {"failed": failed, "abort": seconds, "left": me.leave("close")}


def abort_on_rank_0(me: Rank) -> dict[str, Any]:
    """With something in flight, while the others wait for it."""
    work = me.group.broadcast(me.slot(0), 1 if me.rank == 0 else 0)
    if me.rank > 0:
        me.store.set(f"waits/{me.rank}", "yes")
        failed = _error(work)
        del work
        return {"failed": failed, "abort": 0.0, "left": me.leave("abort")}
    me.store.wait([f"waits/{rank}" for rank in range(1, me.size)])
    del work
    began = time.monotonic()
    me.group.abort()
    seconds = time.monotonic() - began
    return {"failed": ("RuntimeError", seconds), "abort": seconds, "left": me.leave("close")}


def _error(work: Any, seconds: float = PATIENCE) -> tuple[str, float]:
    """How it fails, and after how long."""
    began = time.monotonic()
    try:
        finish(work, seconds)
    except TimeoutError:
        return "TimeoutError", time.monotonic() - began
    except RuntimeError:
        return "RuntimeError", time.monotonic() - began
    return "", 0.0


# ---------------------------------------------------------------------- the processes


class Processes:
    def __init__(self, transport: str, size: int, folder: Path, member: Member) -> None:
        context = forkserver()
        self._pipes, self.processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            arguments = (theirs, transport, rank, size, str(folder / "store"), member)
            process = context.Process(target=_run, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self.processes.append(process)
        self._others = [f"waits/{rank}" for rank in range(1, size)]
        self._store = dist.PrefixStore("second", dist.FileStore(str(folder / "store"), -1))

    def signal_rank_0(self, number: int) -> None:
        """Once the others wait for it."""
        self._store.wait(self._others)
        os.kill(self.processes[0].pid, number)

    def results(self, *ranks: int) -> list[dict[str, Any]]:
        return [self._result(rank) for rank in ranks or range(len(self._pipes))]

    def _result(self, rank: int) -> dict[str, Any]:
        assert self._pipes[rank].poll(2 * PATIENCE), f"rank {rank} does not answer"
        return self._pipes[rank].recv()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(10)


def _run(
    pipe: Connection, transport: str, rank: int, size: int, store: str, member: Member
) -> None:
    torch.set_num_threads(1)
    common = dist.FileStore(store, size)
    every = [(number % size, size_of(number)) for number in range(ROUNDS)]
    broadcasts(Rank(transport, rank, size, dist.PrefixStore("first", common), every))
    buckets = every
    if member is not broadcasts:
        buckets = [(1 if member is abort_on_rank_0 and rank == 0 else 0, SLOT)]
    pipe.send(member(Rank(transport, rank, size, dist.PrefixStore("second", common), buckets)))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str, int, Member], Processes]]:
    with contextlib.ExitStack() as stack:

        def begin(transport: str, size: int, member: Member) -> Processes:
            processes = Processes(transport, size, tmp_path, member)
            stack.callback(processes.close)
            return processes

        yield begin


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_rank_gets_every_byte_in_order(start: Any, transport: str, size: int) -> None:
    for result in start(transport, size, broadcasts).results():
        assert result == {"wrong": [], "left": {}}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_who_waits_for_a_rank_that_dies_is_told(start: Any, transport: str) -> None:
    processes = start(transport, 3, lose_rank_0)
    processes.signal_rank_0(signal.SIGKILL)
    for result in processes.results(1, 2):
        assert result["failed"][0] == "RuntimeError"
        assert result["failed"][1] < SOON
        assert result["left"] == {}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_stopped_rank_does_not_hold_whoever_aborts(start: Any, transport: str) -> None:
    processes = start(transport, 3, lose_rank_0)
    processes.signal_rank_0(signal.SIGSTOP)
    for result in processes.results(1, 2):
        assert result["failed"][0] == "TimeoutError"
        assert result["abort"] < AT_ONCE
        assert result["left"] == {}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_abort_ends_what_is_in_flight_everywhere(start: Any, transport: str) -> None:
    for result in start(transport, 3, abort_on_rank_0).results():
        assert result["failed"][0] == "RuntimeError"
        assert result["failed"][1] < SOON
        assert result["abort"] < AT_ONCE
        assert result["left"] == {}


# ---------------------------------------------------------------------- who is a neighbour


@pytest.fixture
def buffer() -> Iterator[SharedBuffer]:
    with SharedBuffer(DeviceManager("cpu"), 0, SLOT) as buffer:
        yield buffer


def socket_of(peers: HostPeers) -> str:
    return f"\0{peers.address.partition('/')[2]}"


def test_a_rank_elsewhere_is_no_neighbour(buffer: SharedBuffer) -> None:
    with contextlib.closing(HostPeers(0, [0, 1])) as mine:
        addresses = {0: mine.address, 1: "host/checkpoint-engine-elsewhere"}
        assert "cannot share memory with rank 1" in mine.reach(addresses, handle_of(buffer))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_another_users_rank_is_no_neighbour(buffer: SharedBuffer) -> None:
    with contextlib.closing(HostPeers(0, [0, 1])) as mine:
        os.seteuid(65534)
        try:
            theirs = HostPeers(1, [0, 1])
        finally:
            os.seteuid(0)
        with contextlib.closing(theirs):
            why = mine.reach({0: mine.address, 1: theirs.address}, handle_of(buffer))
            assert why == "rank 1 runs as another user than rank 0"


def test_strangers_are_turned_away(buffer: SharedBuffer) -> None:
    with (
        contextlib.closing(HostPeers(0, [0, 1])) as mine,
        contextlib.closing(HostPeers(1, [0, 1])) as theirs,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger,
    ):
        stranger.connect(socket_of(mine))
        stranger.send(b"hello")
        assert not theirs.reach({0: mine.address, 1: theirs.address}, handle_of(buffer))
        mine.accept()
        assert set(mine.incoming) == {1}
        assert stranger.recv(1) == b""
        buffer.tensor[:3] = torch.tensor([1, 2, 3])
        assert [mapped(one)[:4].tolist() for one in mine.handles[1]] == [[1, 2, 3, 0]] * 2


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_another_user_who_says_to_be_a_rank_is_turned_away(buffer: SharedBuffer) -> None:
    with (
        contextlib.closing(HostPeers(0, [0, 1])) as mine,
        contextlib.closing(HostPeers(1, [0, 1])) as theirs,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger,
    ):
        os.seteuid(65534)
        try:
            stranger.connect(socket_of(mine))
        finally:
            os.seteuid(0)
        stranger.send(struct.pack("QQ", 1, 1) + b"hh")  # that it is rank 1
        assert not theirs.reach({0: mine.address, 1: theirs.address}, handle_of(buffer))
        mine.accept()
        with pytest.raises(ConnectionResetError):
            stranger.recv(1)
        assert mapped(mine.handles[1][0]).nbytes == buffer.tensor.nbytes
