"""Peers: on one host each worker reads all owners' staging buffers, without a collective group."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch

from checkpoint_engine.data_types import H2DBucket, TensorPart
from checkpoint_engine.errors import broadcast_failed
from checkpoint_engine.ground.checksum import FACTORS, MASK, check_sum, start_sum
from checkpoint_engine.ground.local_rank import LocalRank
from checkpoint_engine.handover import wire
from checkpoint_engine.handover.ipc import open_buffer
from checkpoint_engine.planning import plan
from checkpoint_engine.planning.plan import Pace, Step, TransferPlan
from checkpoint_engine.settings import GROUP, SHARED_MEMORY, cpu_transport, shares_memory, transport
from checkpoint_engine.transfer.host_peers import LEFT, MAPPED, TAKEN, HostPeers
from checkpoint_engine.transfer.streams import Event, Streams, make_streams
from checkpoint_engine.transfer.tracer import BROADCAST
from checkpoint_engine.update.ways.base import Move, Mover, Way, bucket_size
from checkpoint_engine.world.gathered import Gathered
from checkpoint_engine.world.hello import Hello

_SLOTS = 2  # of staging: one is read while the next bucket is copied into the other
_FEW_RANKS = 2
_AMPLE = 4 << 30  # bytes


class Peers(Way):
    """Taken where all ranks can reach each other on one host, network namespace and user.

    A rank's buffer holds the double buffer, and behind it staging for what the rank owns. Where its
    worker turns out to read all ranks' staging, the double buffer becomes staging, too; where it
    did so in the last update, there is none.
    """

    name = "peers"

    def __init__(self, here: LocalRank) -> None:
        super().__init__(here)
        self._peers: HostPeers | None = None

    def introduce(self, mine: Hello, held: ExitStack) -> Hello:
        device = self.here.device_manager.device_type
        wanted = (
            shares_memory()
            and transport() != GROUP
            and (device == "cuda" or cpu_transport() == SHARED_MEMORY)
        )
        is_alone = self.here.world_size == 1 and mine.ranks is None
        if is_alone or device not in ("cpu", "cuda") or not wanted:
            return mine
        try:
            self._peers = HostPeers(self.here.rank, range(self.here.world_size))
        except OSError:  # it may not have such sockets
            return mine
        held.callback(self._leave)
        return replace(mine, neighbour=self._peers.address)

    def refusal(self, gathered: Gathered, hellos: Sequence[Hello]) -> str | None:
        if hellos[0].ranks is not None or len(hellos) == 1:
            return ""
        if apart := [hello.rank for hello in hellos if not hello.neighbour]:
            return f"ranks {apart} share no memory, by their device or settings"
        hosts = {hello.neighbour.partition("/")[0] for hello in hellos}
        if len(hosts) > 1:
            return f"the ranks are on {len(hosts)} hosts, or in as many network namespaces"
        return self.cannot_stage(gathered, hellos)

    def cannot_stage(self, gathered: Gathered, hellos: Sequence[Hello]) -> str | None:
        """Why there is no room for staging buffers; ``None`` if there is."""
        may_cut = self._may_cut(gathered, hellos)
        with contextlib.suppress(ValueError):  # the way that is taken instead says so
            if bucket_size(hellos, gathered, may_cut, self.shares(hellos)).staging:
                return None
        return "the rank with the least memory has no room for two staging buffers"

    def pace(self, hellos: Sequence[Hello]) -> Pace:
        if not self.here.device_manager.is_accelerator:
            return plan.HOST_PACE
        # An engine's loader takes milliseconds to begin with a bucket, more than few ranks take to
        # map larger buffers.
        has_room = min(hello.free_bytes for hello in hellos) >= _AMPLE
        are_few = len(hellos) <= _FEW_RANKS
        return plan.peer_pace(_SLOTS if has_room and are_few else self.shares(hellos) - 1)

    @property
    def first_receiver(self) -> int:
        """A rank begins with its own bucket: so no two workers read the same rank's at once."""
        return self.here.rank

    def shares(self, hellos: Sequence[Hello]) -> int:
        """A worker that is not learned has a bucket to itself."""
        return (_SLOTS if all(hello.maps_peers for hello in hellos) else 2 * _SLOTS) + 1

    def buffer_slots(self, transfer: TransferPlan, hellos: Sequence[Hello]) -> int:
        staging = transfer.slots_for(len(transfer.loads_of(self.here.rank)))
        return staging + self._double_slots(transfer, hellos)

    def _double_slots(self, transfer: TransferPlan, hellos: Sequence[Hello]) -> int:
        mine = next(hello for hello in hellos if hello.rank == self.here.rank)
        return 0 if mine.maps_peers else transfer.slots_for(len(transfer.steps))

    def connect(self, move: Move, hellos: Sequence[Hello], held: ExitStack) -> Mover | str:
        return self.join(move, hellos, held, hellos, PeersMover)

    def join(
        self,
        move: Move,
        hellos: Sequence[Hello],
        held: ExitStack,
        here: Sequence[Hello],
        make_mover: MakeMover,
        unreached: str = "",
    ) -> Mover | str:
        """As ``connect``.

        Args:
            here: the hellos of the ranks of this host.
            unreached: why this rank cannot go this way; empty if it can.
        """
        peers, call = self._peers, move.call
        assert peers is not None
        call.begin("process group")
        held.push(lambda exc_type, *_: peers.hang_up() if exc_type else None)

        def make_handle() -> bytes:
            return wire.encode_handle(*move.buffer.handle(), {})

        memory: dict[int, torch.Tensor] = {}
        held.callback(memory.clear)
        streams = make_streams(self.here.device_manager, orders_double_buffer=True)
        held.callback(streams.close)  # first: it may copy out of others' memory
        double = self._double_slots(move.plan, hellos)
        mover = make_mover(move, peers, streams, double)
        addresses = {one.rank: one.neighbour for one in here}
        why = unreached or peers.reach(addresses, make_handle)
        if why := _first(call.all_gather("peers", why.encode())):
            return why
        peers.accept()
        if not all(hello.maps_peers for hello in hellos):
            why = self._map(peers, memory) if double else ""
            if why := _first(call.all_gather("mapped", why.encode())):
                return why
        mover.connected(memory)
        return mover

    def _map(self, peers: HostPeers, memory: dict[int, torch.Tensor]) -> str:
        """Map the others' memory; returns why that cannot be done."""
        rank = -1
        try:
            for rank, (handle, _) in peers.handles.items():
                made = wire.decode_handle(handle)
                assert isinstance(made, wire.Handle)
                memory[rank] = open_buffer(made.rebuild, made.args, self.here.local_rank, True)
        except Exception as error:
            memory.clear()
            return f"rank {self.here.rank} cannot map rank {rank}'s memory: {error}"
        return ""

    def _leave(self) -> None:
        peers, self._peers = self._peers, None
        if peers is not None:
            peers.close()


def _first(reasons: Sequence[bytes]) -> str:
    return next((reason.decode() for reason in reasons if reason), "")


_Filling = tuple[Step, int, Event]
"""An own bucket on its way into staging: where it goes, and when it is there. No view of it, which
an error's traceback would keep."""
_Summing = tuple[Step, int, Event, torch.Tensor | None]
"""The same, when its sum is there as well, and that sum."""


class PeersMover(Mover):
    """Fills this rank's staging with what it receives, as soon as every worker has read what was
    there; the first buckets set out before the ranks have reached each other. Where all ranks are
    on one host, a rank receives what it owns.

    Where this rank's own worker cannot read the others' staging, this rank copies each bucket into
    the double buffer.
    """

    def __init__(self, move: Move, peers: HostPeers, streams: Streams, double_slots: int) -> None:
        super().__init__(move)
        self._peers = peers
        self._streams = streams
        self._memory: dict[int, torch.Tensor] = {}
        self._rank = move.call.rank
        self._others: list[int] = []
        self.must_map = double_slots == 0
        self._reads_straight: bool | None = None
        self._slots = [double_slots + slot for slot in range(_SLOTS)]
        self._waiting: deque[Step] = deque()
        self._filling: deque[_Filling] = deque()
        self._summing: deque[_Summing] = deque()
        self._filled = self._done = 0
        self._arrived: dict[int, int] = {}
        self._started: deque[Step] = deque()
        self._copies: dict[int, Event] = {}
        self._wanted_at: dict[int, float] = {}
        self._factors: torch.Tensor | None = None
        if streams.are_queues and move.buffer.tensor.is_cuda:
            self._factors = torch.from_numpy(FACTORS).to(move.buffer.tensor.device)
        if not move.plan.may_shrink:
            self.begin(move.plan)

    def begin(self, plan: TransferPlan) -> None:
        self.move = self.move._replace(plan=plan)
        self._waiting.extend(plan.loads_of(self._rank))
        self._fill_slots(read_by_all=0)  # summed up later: the ranks reach each other meanwhile

    def connected(self, memory: dict[int, torch.Tensor]) -> None:
        """All ranks have reached each other. ``memory``: the others', where there is a double
        buffer to copy into."""
        self._memory = memory
        self._others = sorted(self._peers.handles)
        self.sources = [self._peers.handles[rank][1] for rank in self._others]

    # ------------------------------------------------------------------ as of Mover

    def handed_over(self, unmapped: str, reads_needs: bool = False) -> None:
        self.served = unmapped
        self._reads_straight = not unmapped or self.must_map
        if self._reads_straight:  # nobody needs the double buffer; no slot was used twice yet
            self._slots += range(self._slots[0])
        self._peers.tell_all(MAPPED)
        self.advance()

    def start(self, step: Step) -> None:
        self._started.append(step)
        self._wanted_at[id(step)] = time.monotonic()

    def has_arrived(self, step: Step) -> bool:
        self.advance()
        if self._reads_straight:
            if self._find(step) is None:
                return False
            self._trace_wait(step)
            return True
        copy = self._copies.get(id(step))
        if copy is None or not copy.query():
            return False
        self._finish(step)
        return True

    def advance(self) -> None:
        is_open = self.move.buffer.is_named and self._reads_straight is not None
        if is_open and self._peers.all_said(MAPPED):
            self.move.buffer.unlink()
        self._fill_slots(self._count_read())
        while self._filling:
            self._summing.append(self._sum_up(*self._filling.popleft()))
        while self._summing and self._summing[0][2].query():
            self._offer(*self._summing.popleft())
        while self._started and self._reads_straight is False:
            start = self._find(self._started[0])
            if start is None:
                break
            self._copy(self._started.popleft(), start)

    def lies_at(self, step: Step) -> tuple[int, int]:
        if not self._reads_straight:
            return super().lies_at(step)
        source = 0 if step.receiver == self._rank else 1 + self._others.index(step.receiver)
        return source, self._arrived[id(step)]

    def has_checked(self, step: Step) -> bool:
        return self._factors is not None and bool(self._reads_straight)

    def done_with(self, step: Step) -> None:
        if self._reads_straight:
            self._finish(step)
        self.advance()

    def let_go(self) -> None:
        self._memory.clear()
        self._peers.tell_all(LEFT)
        self.move.call.wait(partial(self._peers.all_said, LEFT))

    def source_of(self, step: Step) -> str:
        count, reader = self._peers.slowest(TAKEN)
        if step.receiver == self._rank and reader is not None and count < self._filled:
            return f"rank {step.receiver}, as rank {reader} has not read the one before,"
        return super().source_of(step)

    # ------------------------------------------------------------------ parts of the above

    def _count_read(self) -> int:
        """How many own buckets every rank has done with."""
        count, reader = self._peers.slowest(TAKEN)
        return self._done if reader is None else min(count, self._done)

    def _fill_slots(self, read_by_all: int) -> None:
        while self._waiting and self._filled - read_by_all < len(self._slots):
            self._fill(self._waiting.popleft())

    def _fill(self, step: Step) -> None:
        """Begin to fill a slot of staging, which nobody reads any more, with a bucket."""
        slot = self._slots[self._filled % len(self._slots)]
        start = slot * self.move.plan.bucket_bytes
        target = self.move.buffer.tensor[start : start + step.bucket.size]
        self._filling.append((step, start, self._bring(step, target)))
        self._filled += 1

    def _bring(self, step: Step, target: torch.Tensor) -> Event:
        """Begin to copy an own bucket: when it is there."""
        return self._copy_own(step, step.bucket, target)

    def _copy_own(self, step: Step, bucket: H2DBucket, target: torch.Tensor) -> Event:
        """``bucket``: as it lies in this rank's host memory."""

        def copy() -> None:
            with self.move.tracer.copying(step):
                self.move.source.copy(bucket, target)

        with self._streams.copying():
            return self._streams.copy(copy, after=self._streams.event())

    def _sum_up(self, step: Step, start: int, event: Event) -> _Summing:
        """Begin to add up a bucket, once it is there."""
        expected = self._expected_of(step)
        if expected is None or self._factors is None:
            return step, start, event, None
        with self._streams.broadcasting():  # beside the next copy
            self._streams.wait(event)
            filled = self.move.buffer.tensor[start : start + step.bucket.size]
            found = start_sum(filled, expected[0], self._factors)
            return step, start, self._streams.event(), found

    def _expected_of(self, step: Step) -> tuple[int, int] | None:
        """What an own bucket's bytes add up to, as far as one bucket has a sum of its own."""
        if isinstance(step.bucket, TensorPart):
            return None
        return self.move.gathered.sum_of(step.owner, step.bucket)

    def _offer(self, step: Step, start: int, _: Event, found: torch.Tensor | None) -> None:
        expected = self._expected_of(step)
        if found is not None and expected is not None:
            check_sum(int(found) & MASK, expected[1], f"a bucket from rank {self._rank}")
        self._arrived[id(step)] = start
        self._peers.offer(start, step.bucket.size)

    def _find(self, step: Step) -> int | None:
        """Where the bucket lies in its owner's memory, once it does."""
        if step.receiver == self._rank or id(step) in self._arrived:
            return self._arrived.get(id(step))
        offered = self._peers.next_offer(step.receiver)
        if offered is None:
            return None
        start, nbytes = offered
        if nbytes != step.bucket.size:
            text = f"rank {step.receiver} sent {nbytes} bytes, not {step.bucket.size}"
            raise broadcast_failed(text)
        self._arrived[id(step)] = start
        return start

    def _trace_wait(self, step: Step) -> None:
        """Nothing travels before the worker reads it: a broadcast is the wait for the owner."""
        if began := self._wanted_at.pop(id(step), None):
            span = self.move.tracer.begin(BROADCAST, step)
            span.began = began
            self.move.tracer.end(span, time.monotonic())

    def _copy(self, step: Step, start: int) -> None:
        """Begin to copy a bucket that is in its owner's staging into the double buffer."""
        memory = self.move.buffer.tensor
        if step.receiver != self._rank:
            memory = self._memory[step.receiver]
        source, target = memory[start : start + step.bucket.size], self.move.slot(step)

        def copy() -> None:
            with self.move.tracer.copying(step, BROADCAST):
                target.copy_(source, non_blocking=True)

        with self._streams.broadcasting():
            self._copies[id(step)] = self._streams.copy(copy, after=self._streams.event())

    def _finish(self, step: Step) -> None:
        """This rank and its worker do not read the bucket's staging any more."""
        if step.receiver == self._rank:
            self._done += 1
        else:
            self._peers.tell(step.receiver, TAKEN)


MakeMover = Callable[[Move, HostPeers, Streams, int], PeersMover]
