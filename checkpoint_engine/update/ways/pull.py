"""Pull: some ranks read whole buckets out of other ranks' host memory by P2P, where they cannot go
by ``Shard``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch

from checkpoint_engine.distributed.weights_group import TorchGroup
from checkpoint_engine.ground.local_rank import LocalRank
from checkpoint_engine.planning import plan
from checkpoint_engine.planning.plan import Pace, Step
from checkpoint_engine.planning.shards import AsHeld, holders
from checkpoint_engine.transfer.p2p import P2P
from checkpoint_engine.transfer.remote_loader import RemoteLoader
from checkpoint_engine.transfer.streams import Event, Streams, make_streams
from checkpoint_engine.update.ways.base import Move, Mover, gone_owners
from checkpoint_engine.update.ways.broadcast import Broadcast, GroupMover, make_staging
from checkpoint_engine.world.gathered import Gathered
from checkpoint_engine.world.hello import Hello


class Pull(Broadcast):
    """The receivers share the reading, and broadcast among themselves what each has read."""

    name = "P2P"
    deals_out_reads = True
    joins_parts = False  # the parts of several owners' tensors would arrive at once
    keeps_group = False  # the next one may have other members

    def __init__(self, here: LocalRank, p2p: P2P) -> None:
        super().__init__(here)
        self._p2p = p2p

    def introduce(self, mine: Hello, held: ExitStack) -> Hello:
        store = self._p2p.store
        if mine.ranks is not None:
            store = self._p2p.require(f"update(ranks={list(mine.ranks)})")
        return replace(mine, nic="" if store is None else store.device, host=self.here.host_ip)

    def refusal(self, gathered: Gathered, hellos: Sequence[Hello]) -> str | None:
        return "" if hellos[0].ranks is None else None

    def pace(self, hellos: Sequence[Hello]) -> Pace:
        return plan.READ_PACE

    def connect(self, move: Move, hellos: Sequence[Hello], held: ExitStack) -> Mover:
        store = self._p2p.require("update(ranks=...)")
        streams = make_streams(self.here.device_manager)
        held.callback(streams.close)
        staging = make_staging(move, self.here)
        if store.needs_registered_targets:
            named = {"__buffer__": move.buffer.tensor, "__staging__": staging}
            targets = {name: tensor for name, tensor in named.items() if tensor is not None}
            store.register_named_tensors(targets)
            held.callback(store.unregister_named_tensors, list(targets))
        metas, here = move.gathered.metas, self.here
        devices, gone = (here.device_manager, here.device), partial(gone_owners, move)
        remote = RemoteLoader(store, metas, *devices, move.tracer, gone)
        held.callback(remote.close)
        return PullMover(move, streams, staging, self.join_group(move.call, hellos, held), remote)


class PullMover(GroupMover):
    """Receivers read buckets by P2P, or copy them where they own them themselves. Where several own
    a bucket's bytes, the owner that the plan names is asked first."""

    fetches_in_order = False

    def __init__(
        self,
        move: Move,
        streams: Streams,
        staging: torch.Tensor | None,
        group: TorchGroup | None,
        remote: RemoteLoader,
    ) -> None:
        self._remote = remote
        self._as_held = AsHeld(move.gathered.metas)
        self._holders = holders(move.gathered.metas, move.gathered.duplicates)
        self.never_waits = group is None
        super().__init__(move, streams, staging, group)

    def fetch(self, step: Step, target: torch.Tensor, after: Event) -> Event:
        if self._is_mine(step):
            return self.copy_from_host(step, target, after)
        held = {owner: self._as_held.by(owner, step) for owner in self._owners_of(step)}
        return self._remote.start(step, held, target, after)

    def in_one_piece(self, step: Step) -> torch.Tensor | None:
        return super().in_one_piece(step) if self._is_mine(step) else None

    def source_of(self, step: Step) -> str:
        return self._remote.source_of(self._owners_of(step))

    def _owners_of(self, step: Step) -> list[int]:
        return sorted(self._holders(step), key=lambda owner: (owner != step.owner, owner))

    def _is_mine(self, step: Step) -> bool:
        """Owners of loaded metas are ranks of another world."""
        return step.owner == self.move.call.rank and not self.move.gathered.is_loaded
