"""Broadcast: every owner's bucket goes to all ranks by a collective group (NCCL, gloo, HCCL)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
import torch.distributed as dist

from checkpoint_engine.distributed.weights_group import TorchGroup, create_weights_group
from checkpoint_engine.errors import broadcast_failed
from checkpoint_engine.ground.local_rank import LocalRank
from checkpoint_engine.planning import plan
from checkpoint_engine.planning.plan import Pace, Step, TransferPlan
from checkpoint_engine.settings import keeps_groups
from checkpoint_engine.transfer.streams import Event, Streams, make_streams
from checkpoint_engine.transfer.tracer import TracedSpan
from checkpoint_engine.update.ways.base import Move, Mover, Way
from checkpoint_engine.world.call import Call
from checkpoint_engine.world.gathered import Gathered
from checkpoint_engine.world.hello import Hello


class Broadcast(Way):
    """Works everywhere. Owns the group, which is kept for the next update."""

    name = "broadcast"
    keeps_group = True

    def __init__(self, here: LocalRank) -> None:
        super().__init__(here)
        self._group: TorchGroup | None = None
        self._group_id = ""

    def introduce(self, mine: Hello, held: ExitStack) -> Hello:
        return replace(mine, group=self._group_id)

    def refusal(self, gathered: Gathered, hellos: Sequence[Hello]) -> str | None:
        return None if hellos[0].ranks is None else ""

    def pace(self, hellos: Sequence[Hello]) -> Pace:
        on_device = self.here.device_manager.is_accelerator
        return plan.DEVICE_PACE if on_device else plan.HOST_PACE

    def connect(self, move: Move, hellos: Sequence[Hello], held: ExitStack) -> Mover:
        streams = make_streams(self.here.device_manager)
        held.callback(streams.close)
        # Only copies to an accelerator go on beside a broadcast.
        staging = make_staging(move, self.here) if streams.are_queues else None
        return GroupMover(move, streams, staging, self.join_group(move.call, hellos, held))

    def release(self) -> None:
        self._leave(TorchGroup.close)

    def join_group(self, call: Call, hellos: Sequence[Hello], held: ExitStack) -> TorchGroup | None:
        """The group kept from the last update, if every rank has kept it: a rank that was started
        again has not. ``None`` for a rank alone. Called by all members."""
        if len(hellos) == 1:
            return None
        call.begin("process group")
        if len({hello.group for hello in hellos}) > 1:
            self._leave(TorchGroup.abort)
        if self._group is None:
            backend, here = self.here.device_manager.backend, self.here
            place = list(call.members), call.rank, here.group_ip, here.device
            with call.store_to_block() as store:
                store = dist.PrefixStore("weights", store)
                self._group = create_weights_group(backend, store, *place, call.check)
            self._group_id = hellos[0].nonce
        self._group.expect_end(call.deadline.remaining())
        held.push(self._leave_update)
        return self._group

    def _leave_update(self, exc_type: object, exc: object, traceback: object) -> None:
        if exc_type is not None:  # nothing in flight survives
            self._leave(TorchGroup.abort)
        elif not (self.keeps_group and keeps_groups()):
            self.release()

    def _leave(self, how: Callable[[TorchGroup], None]) -> None:
        group, self._group, self._group_id = self._group, None, ""
        if group is not None:
            how(group)


def make_staging(move: Move, here: LocalRank) -> torch.Tensor | None:
    """Memory for the largest bucket that this rank fetches; ``None`` where there is no room, or
    nothing to fetch beside a broadcast."""
    loads = move.plan.loads_of(here.rank)
    if not (move.plan.staging and loads and len(move.call.members) > 1):
        return None
    nbytes = max(step.bucket.size for step in loads)
    return torch.empty(nbytes, dtype=torch.uint8, device=here.device)


class GroupMover(Mover):
    """Each bucket's receiver fetches it, and broadcasts it into everybody's double buffer.

    With staging, a receiver fetches its next bucket there while those of others are broadcast.
    """

    def __init__(
        self, move: Move, streams: Streams, staging: torch.Tensor | None, group: TorchGroup | None
    ) -> None:
        """``group``: ``None`` where this rank is the only one."""
        super().__init__(move)
        self.streams = streams
        self._rank = move.call.rank
        self._group = group
        self._staging = staging
        self._loads: deque[Step] = deque()
        self._arrivals: dict[int, list[Event]] = {}
        if not move.plan.may_shrink:
            self.begin(move.plan)

    def begin(self, plan: TransferPlan) -> None:
        self.move = self.move._replace(plan=plan)
        self._loads.extend(plan.loads_of(self._rank))
        if self._staging is not None:
            self._filled = self._fetch_next(self._staging, after=self.streams.event())

    def fetch(self, step: Step, target: torch.Tensor, after: Event) -> Event:
        """Begin to write the bucket into ``target``, once ``after`` has happened."""
        return self.copy_from_host(step, target, after)

    def copy_from_host(self, step: Step, target: torch.Tensor, after: Event) -> Event:
        """Copy it out of this rank's own host memory."""

        def copy() -> None:
            with self.move.tracer.copying(step):
                self.move.source.copy(step.bucket, target)

        return self.streams.copy(copy, after)

    @property
    def fetches_in_order(self) -> bool:
        """Whether work queued later on the current stream waits for a fetch by itself."""
        return self.streams.are_queues

    def in_one_piece(self, step: Step) -> torch.Tensor | None:
        """The bucket where it lies in host memory, if it can be broadcast from there."""
        return self.move.source.in_one_piece(step.bucket)

    def start(self, step: Step) -> None:
        target = self.move.slot(step)
        arrivals: list[Event] = []
        with self.streams.broadcasting():
            payload = target
            if step.receiver == self._rank:
                payload = self._receive(step, target, arrivals)
            if self._group is not None and step.bucket.size:
                traced = self.move.tracer.broadcasting(step)
                work = self._group.broadcast(payload, step.receiver)
                self.move.tracer.broadcast(traced, work)
                arrivals.append(_BroadcastEvent(work, self.move, traced))
            arrivals.append(self.streams.event())
        self._arrivals[id(step)] = arrivals

    def has_arrived(self, step: Step) -> bool:
        arrivals = self._arrivals[id(step)]
        while arrivals and arrivals[0].query():
            del arrivals[0]
        return not arrivals

    def _receive(self, step: Step, target: torch.Tensor, arrivals: list[Event]) -> torch.Tensor:
        """Begin to fill ``target``; returns memory that holds the same bytes for a broadcast."""
        if self._staging is not None:
            self._deliver(step, target, self._staging)
            return target
        arrival = self.fetch(step, target, after=self.streams.event())
        arrivals.append(arrival)
        if self._group is None or self.fetches_in_order:
            return target
        piece = self.in_one_piece(step)
        if piece is None:
            self.move.call.wait(arrival.query)  # only then may it be broadcast
            return target
        return piece

    def _deliver(self, step: Step, target: torch.Tensor, staging: torch.Tensor) -> None:
        """Copy the bucket out of staging, on the broadcast stream; fetch the next one."""
        if self.fetches_in_order:
            self.streams.wait(self._filled)
        else:
            self.move.call.wait(self._filled.query)
        target.copy_(staging[: step.bucket.size])
        self._filled = self._fetch_next(staging, after=self.streams.event())

    def _fetch_next(self, staging: torch.Tensor, after: Event) -> Event:
        if not self._loads:
            return after
        step = self._loads.popleft()
        with self.streams.copying():
            return self.fetch(step, staging[: step.bucket.size], after)


class _BroadcastEvent:
    """The event of a broadcast that has begun."""

    def __init__(self, work: dist.Work, move: Move, traced: TracedSpan) -> None:
        self._work = work
        self._move = move
        self._traced = traced

    def query(self) -> bool:
        if not self._work.is_completed():
            return False
        try:
            self._work.wait()
        except RuntimeError as error:
            raise broadcast_failed(f"a broadcast failed: {error}") from error
        self._move.tracer.broadcast_seen(self._traced)
        return True
