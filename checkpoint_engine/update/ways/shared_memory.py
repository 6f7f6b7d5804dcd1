"""Shared memory: ranks of one host on the cpu device copy out of each other's double buffers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from checkpoint_engine.errors import CollectiveError, broadcast_failed
from checkpoint_engine.ground.local_rank import LocalRank
from checkpoint_engine.planning import plan
from checkpoint_engine.planning.plan import Pace, Step
from checkpoint_engine.settings import SHARED_MEMORY, cpu_transport
from checkpoint_engine.transfer.shared_memory import HostPeers
from checkpoint_engine.transfer.streams import Event, HostStreams
from checkpoint_engine.transfer.tracer import BROADCAST, TracedSpan
from checkpoint_engine.update.ways.base import Move, Mover, Way
from checkpoint_engine.world.hello import Hello

_GRACE = 1.0  # seconds after the deadline, at which whoever runs the update gives up


class SharedMemory(Way):
    """Taken where all ranks can reach each other on one host, network namespace and user."""

    pace: Pace = plan.HOST_PACE

    def __init__(self, here: LocalRank) -> None:
        super().__init__(here)
        self._neighbours: HostPeers | None = None

    def introduce(self, mine: Hello, held: ExitStack) -> Hello:
        wanted = cpu_transport() == SHARED_MEMORY
        if self.here.device_manager.is_accelerator or self.here.world_size == 1 or not wanted:
            return mine
        self._neighbours = HostPeers(self.here.rank, range(self.here.world_size))
        held.callback(self._leave)
        return replace(mine, neighbour=self._neighbours.address)

    def serves(self, hellos: Sequence[Hello]) -> bool:
        return hellos[0].ranks is None and all(hello.neighbour for hello in hellos)

    def connect(self, move: Move, hellos: Sequence[Hello], held: ExitStack) -> Mover | None:
        neighbours = self._neighbours
        assert neighbours is not None
        move.call.begin("process group")
        reached = neighbours.reach({one.rank: one.neighbour for one in hellos}, move.buffer)
        if not all(move.call.all_gather("neighbours", b"1" if reached else b"")):
            return None
        neighbours.accept()
        held.callback(self._leave)
        streams = HostStreams(are_queues=True)
        held.callback(streams.close)
        held.push(lambda exc_type, *_: neighbours.hang_up() if exc_type else None)
        return SharedMemoryMover(move, neighbours, streams)

    def _leave(self) -> None:
        neighbours, self._neighbours = self._neighbours, None
        if neighbours is not None:
            neighbours.close()


class SharedMemoryMover(Mover):
    """One thread copies: own buckets out of host memory, others out of their sender's buffer."""

    def __init__(self, move: Move, neighbours: HostPeers, streams: HostStreams) -> None:
        self._move = move
        self._neighbours = neighbours
        self._streams = streams
        self._end = time.monotonic() + move.call.deadline.remaining() + _GRACE
        self._sent = 0
        self._begun: dict[int, tuple[Event, int]] = {}
        self._traced: dict[int, TracedSpan] = {}

    def start(self, step: Step) -> None:
        number = 0
        action = self._take
        if step.receiver == self._move.call.rank:
            number = self._sent = self._sent + 1
            action = self._send
        on_thread = self._streams.copy(lambda: action(step), after=self._streams.event())
        self._begun[id(step)] = on_thread, number

    def has_arrived(self, step: Step) -> bool:
        on_thread, number = self._begun[id(step)]
        try:
            arrived = bool(on_thread.query()) and self._neighbours.have_taken(number)
        except CollectiveError:
            raise
        except RuntimeError as error:  # most often because another rank failed, and says why
            raise broadcast_failed(str(error)) from error
        if arrived and number:
            self._move.tracer.end(self._traced.pop(id(step)), time.monotonic())
        return arrived

    def _send(self, step: Step) -> None:
        with self._move.tracer.copying(step):
            self._move.source.copy(step.bucket, self._move.slot(step))
        self._traced[id(step)] = self._move.tracer.begin(BROADCAST, step)
        self._neighbours.offer(step.slot * self._move.plan.bucket_bytes, step.bucket.size)

    def _take(self, step: Step) -> None:
        with self._move.tracer.on_host(BROADCAST, step):
            left = self._end - time.monotonic()
            self._neighbours.take(self._move.slot(step), step.receiver, left)
