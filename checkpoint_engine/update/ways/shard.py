"""Shard: each host reads what its workers need out of other hosts' memory, once, by P2P; inside
the host workers read it by ``Peers``. The hosts of all ranks, or of some of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
from loguru import logger

from checkpoint_engine import settings
from checkpoint_engine.errors import CollectiveError, broadcast_failed
from checkpoint_engine.ground.collector import collector_at_rest
from checkpoint_engine.ground.deadline import Deadline
from checkpoint_engine.ground.local_rank import LocalRank
from checkpoint_engine.ground.needs import Needs, digest_of
from checkpoint_engine.planning.plan import Pace, Step, TransferPlan
from checkpoint_engine.planning.shards import AsHeld, HostNeeds, Tensors, share
from checkpoint_engine.settings import GROUP, SHARD, transport
from checkpoint_engine.transfer.host_peers import MAPPED, WHOLE, HostPeers
from checkpoint_engine.transfer.p2p import P2P
from checkpoint_engine.transfer.p2p_store import P2PError
from checkpoint_engine.transfer.remote_loader import ByColumns, RemoteLoader
from checkpoint_engine.transfer.streams import Event, Streams
from checkpoint_engine.transfer.tracer import READ
from checkpoint_engine.update.ways.base import Move, Mover, Way, gone_owners
from checkpoint_engine.update.ways.peers import Peers, PeersMover
from checkpoint_engine.world.call import Call
from checkpoint_engine.world.gathered import Gathered
from checkpoint_engine.world.hello import Hello

_FEWEST_HOSTS = 3
"""Over TCP, with fewer, reading everything brings no host fewer bytes than a group does."""


_TOLD_WITHIN = 0.5
"""Seconds for rank 0 to tell who is gone."""


class Shard(Way):
    """Taken where the ranks are on several hosts, all can read the owners' memory by P2P, and those
    of each host can read each other's staging; over TCP, where that saves bytes or a forwarding
    host.

    An update of some ranks goes this way on one host, too. Owners need not take part in it, nor be
    of this world: then they are only read.

    A bucket is staged on each host by one of its ranks: its owner, or one that reads it, of which
    no more than the host's workers have stated to need.
    """

    name = "shard"

    def __init__(self, here: LocalRank, p2p: P2P, inside: Peers) -> None:
        super().__init__(here)
        self._p2p = p2p
        self._inside = inside
        self._known: dict[str, Needs] = {}
        self._every: TransferPlan | None = None  # that was shared out, of these tensors
        self._tensors: Tensors | None = None
        self._shared: tuple[object, TransferPlan] | None = None
        self._reached: set[str] = set()
        self._learned_of: HostNeeds | None = None

    def introduce(self, mine: Hello, held: ExitStack) -> Hello:
        chosen, store = transport(), self._p2p.store
        reads = "" if store is None or chosen == GROUP else store.protocol
        return replace(mine, transport=chosen, reads=reads, knows=tuple(sorted(self._known)))

    def refusal(self, gathered: Gathered, hellos: Sequence[Hello]) -> str | None:
        is_of_all = hellos[0].ranks is None
        if is_of_all and len(hellos) == 1:
            return ""
        chosen = {hello.transport for hello in hellos}
        if GROUP in chosen:
            return "PS_TRANSPORT=group"
        apart = [hello.rank for hello in hellos if not hello.neighbour]
        if is_of_all and (apart or len(_hosts(hellos)) == 1):
            return ""
        if apart:
            return f"ranks {apart} share no memory, by their device or settings"
        if without := [hello.rank for hello in hellos if not hello.reads]:
            return f"ranks {without} have no P2P"
        if hidden := [rank for rank, owned in gathered.metas.items() if not owned.p2p_store_addr]:
            return f"ranks {hidden} own what cannot be read by P2P"
        if SHARD not in chosen and (why := _saves_nothing(gathered, hellos)):
            return why
        return self._inside.cannot_stage(gathered, hellos)

    def prepare(self, call: Call, hellos: Sequence[Hello], needs: str) -> None:
        """Learn what the other workers of this host need; each digest is told once."""
        if needs and digest_of(needs) not in self._known:
            self._known[digest_of(needs)] = Needs.decode(needs)
        hosts = _hosts(hellos)
        mine = next(hello for hello in hellos if hello.rank == self.here.rank)
        tellers = {hello.needs: hello.rank for hello in reversed(hellos) if hello.needs}
        asked = {
            digest
            for host in hosts
            for digest in {hello.needs for hello in host} - {""}
            for hello in host
            if hello.needs != digest and digest not in hello.knows
        }
        for digest in asked:
            if tellers[digest] == self.here.rank:
                call.tell(f"needs/{self.here.rank}", needs.encode())
        wanted = {hello.needs for hello in _host_of(mine, hosts)} - {"", *self._known}
        for digest in sorted(wanted):
            (blob,) = call.read([f"needs/{tellers[digest]}"])
            told = blob.decode()
            if digest_of(told) != digest:
                raise ValueError(f"rank {tellers[digest]} told other needs than it had announced")
            self._known[digest] = Needs.decode(told)
        kept = {hello.needs for hello in _host_of(mine, hosts)}
        self._known = {digest: one for digest, one in self._known.items() if digest in kept}

    def pace(self, hellos: Sequence[Hello]) -> Pace:
        return self._inside.pace(hellos)

    def shares(self, hellos: Sequence[Hello]) -> int:
        return self._inside.shares(hellos)

    def buffer_slots(self, transfer: TransferPlan, hellos: Sequence[Hello]) -> int:
        return self._inside.buffer_slots(transfer, hellos)

    def plan(self, gathered: Gathered, hellos: Sequence[Hello]) -> TransferPlan:
        """All buckets, received by ranks of this host; other hosts have other receivers."""
        with collector_at_rest():
            return self._shared_out(super().plan(gathered, hellos), gathered, hellos)

    def _shared_out(
        self, every: TransferPlan, gathered: Gathered, hellos: Sequence[Hello]
    ) -> TransferPlan:
        hosts = _hosts(hellos)
        mine = next(hello for hello in hellos if hello.rank == self.here.rank)
        here = _host_of(mine, hosts)
        ranks = tuple(tuple(hello.rank for hello in host) for host in hosts)
        gone = {rank for hello in hellos for rank in hello.gone if not gathered.is_loaded}
        outside = _outside(gathered, hellos)
        basis = ranks, tuple(hello.needs for hello in here), outside, gone
        if self._every is not every:
            self._every, self._tensors, self._shared = every, None, None
        if self._shared is None or self._shared[0] != basis:
            shared = share(
                every,
                ranks,
                hosts.index(here),
                gathered.metas,
                gathered.duplicates,
                self._needs_of(here, every, gathered),
                outside,
                gone,
            )
            self._shared = basis, shared
        return self._shared[1]

    def _needs_of(
        self, here: Sequence[Hello], every: TransferPlan, gathered: Gathered
    ) -> HostNeeds | None:
        """Of the workers of this host; ``None`` if one needs everything."""
        digests = sorted({hello.needs for hello in here})
        if "" in digests:
            return None
        if self._tensors is None:
            self._tensors = Tensors(every.steps, gathered.owned)
        try:
            return HostNeeds(self._tensors, [self._known[digest] for digest in digests])
        except ValueError as error:  # another checkpoint than the one that they have learned
            logger.info("rank {} reads whole buckets: {}", self.here.rank, error)
            return None

    def connect(self, move: Move, hellos: Sequence[Hello], held: ExitStack) -> Mover | str:
        store, here = self._p2p.require("reading other hosts' memory"), self.here
        if store.needs_registered_targets:
            store.register_named_tensors({"__staging__": move.buffer.tensor})
            held.callback(store.unregister_named_tensors, ["__staging__"])
        metas = move.gathered.metas
        if settings.copies_columns():
            self._learn_columns(move)
        gone = partial(gone_owners, move)
        remote = RemoteLoader(store, metas, here.device_manager, here.device, gone=gone)
        held.callback(remote.close)
        mine = next(hello for hello in hellos if hello.rank == here.rank)
        make = partial(_ShardMover, remote, mine.needs)
        unreached = self._try_hosts(move, remote)
        inside = _host_of(mine, _hosts(hellos))
        return self._inside.join(move, hellos, held, inside, make, unreached)

    def _learn_columns(self, move: Move) -> None:
        """Which columns of this rank's tensors its host needs, for what is registered next."""
        needs = move.plan.needs
        if needs is None or self._learned_of is needs or move.gathered.is_loaded:
            return
        self._learned_of = needs
        self._p2p.wanted_columns = {
            meta.name: columns
            for step in move.plan.steps
            if step.owner == self.here.rank
            for meta, columns in zip(step.bucket.items, needs.columns_in(step.bucket), strict=True)
            if columns is not None
        }

    def _try_hosts(self, move: Move, remote: RemoteLoader) -> str:
        """Why no owner of some bucket can be read, as behind a firewall; empty if one can.

        Of each host that this rank has not read from, one of the owners to be asked first is asked
        for a sign of life; if one gives none, all owners of such hosts are.
        """
        needs, loads = move.plan.needs, move.plan.loads_of(self.here.rank)
        wanted = {
            step.sources
            for step in loads
            if not _is_own(move.gathered, step)
            and (needs is None or needs.share_of(step.bucket) > 0.0)
        }
        host_of = {one: _address_of(move.gathered, one) for owners in wanted for one in owners}
        lost: Mapping[int, P2PError] = {}
        while True:
            for owners in wanted:
                if lost.keys() >= set(owners):
                    first = owners[0]
                    why = f"rank {self.here.rank} cannot read the memory of host {host_of[first]}"
                    return f"{why}: {lost[first]}"
            firsts = {next(one for one in owners if one not in lost) for owners in wanted}
            new = {host_of[one]: one for one in firsts if host_of[one] not in self._reached}
            if not new:
                return ""
            asked = list(new.values())
            if lost:
                asked = [
                    one for one in host_of if one not in lost and host_of[one] not in self._reached
                ]
            lost = remote.find_lost(asked, move.call.check)
            self._reached |= {host_of[one] for one in asked if one not in lost}


def can_shard(hellos: Sequence[Hello]) -> bool:
    """Whether ranks may read memory of other hosts: workers are asked what they need then."""
    readable = all(hello.reads and hello.neighbour for hello in hellos)
    return readable and (hellos[0].ranks is not None or len(_hosts(hellos)) > 1)


def _saves_nothing(gathered: Gathered, hellos: Sequence[Hello]) -> str:
    """Why the group is as good; empty if it is not."""
    hosts = len(_hosts(hellos))
    if any(hello.needs for hello in hellos):
        return ""
    if hellos[0].ranks is not None:
        owners = len({_address_of(gathered, rank) for rank in gathered.metas})
        unstated = f"all {hosts} hosts would read everything from {owners}, as no worker has stated"
        return f"{unstated} its needs" if hosts > owners else ""
    if hosts < _FEWEST_HOSTS and "tcp" in {hello.reads for hello in hellos}:
        return "over TCP between two hosts it saves nothing until a worker has stated its needs"
    return ""


def _address_of(gathered: Gathered, owner: int) -> str:
    """Of the host of an owner."""
    return str(gathered.metas[owner].p2p_store_addr).rpartition(":")[0]


def _outside(gathered: Gathered, hellos: Sequence[Hello]) -> tuple[tuple[int, ...], ...]:
    """The owners that take no part, those of each host."""
    members = () if gathered.is_loaded else {hello.rank for hello in hellos}
    found: dict[str, list[int]] = {}
    for owner in gathered.metas:
        if owner not in members:
            found.setdefault(_address_of(gathered, owner), []).append(owner)
    return tuple(map(tuple, found.values()))


def _hosts(hellos: Sequence[Hello]) -> list[list[Hello]]:
    """The ranks of each host, in the order of their first ranks."""
    found: dict[str, list[Hello]] = {}
    for hello in hellos:
        found.setdefault(hello.neighbour.partition("/")[0], []).append(hello)
    return list(found.values())


def _host_of(mine: Hello, hosts: Sequence[list[Hello]]) -> list[Hello]:
    return next(host for host in hosts if mine in host)


def _is_own(gathered: Gathered, step: Step) -> bool:
    """Whether the rank that stages the bucket owns it. Owners of loaded metas are ranks of another
    world."""
    return step.sources == (step.receiver,) and not gathered.is_loaded


def _owner_gone(step: Step, gone: Set[int]) -> CollectiveError:
    """The bucket can be read nowhere, as these of its owners have ended."""
    rank = next(owner for owner in step.sources if owner in gone)
    text = (
        f"rank {rank} is gone, its process has ended or its host is cut off, and no other rank "
        f"that can be read owns {step.bucket.items[0].name!r} and what travels with it"
    )
    return CollectiveError(text, "rank_gone", rank=rank)


class _ShardMover(PeersMover):
    """Reads what no rank of the host owns, straight into staging.

    Less than whole buckets are read only once every worker of this host has said in its handshake
    that it reads by just the needs that the plan was made of.
    """

    def __init__(
        self,
        remote: RemoteLoader,
        needs: str,
        move: Move,
        peers: HostPeers,
        streams: Streams,
        double_slots: int,
    ) -> None:
        """``needs``: the digest of what this rank's worker reads."""
        self._remote = remote
        self._needs = needs
        self._as_held = AsHeld(move.gathered.metas)
        self._unread: dict[int, Step] = {}  # what is being read
        self._reads_needs: bool | None = None
        self._is_whole: bool | None = True if move.plan.needs is None else None
        super().__init__(move, peers, streams, double_slots)

    def handed_over(self, unmapped: str, reads_needs: bool = False) -> None:
        self._reads_needs = reads_needs
        if not reads_needs:
            self._peers.tell_all(WHOLE)
        super().handed_over(unmapped)

    def advance(self) -> None:
        undecided = self._is_whole is None and self._reads_needs is not None
        if undecided and self._peers.all_said(MAPPED):
            self._is_whole = not self._reads_needs or self._peers.anybody_said(WHOLE)
        if self._unread and (gone := gone_owners(self.move)):  # a read may take seconds to fail
            for step in list(self._unread.values()):
                if gone.issuperset(step.sources):
                    raise _owner_gone(step, gone)
        super().advance()

    def has_arrived(self, step: Step) -> bool:
        """What another rank has read may be there before this one has heard what is in it."""
        self.advance()
        return (self._is_own(step) or self._is_whole is not None) and super().has_arrived(step)

    def needs_for(self, step: Step) -> str:
        if self._is_own(step):
            return ""
        if self._is_whole is None:
            raise broadcast_failed("a bucket is there before the workers of this host agreed")
        needs = None if self._is_whole else self.move.plan.needs
        return "" if needs is None or needs.runs_in(step.bucket) is None else self._needs

    def has_checked(self, step: Step) -> bool:
        return super().has_checked(step) and self._is_own(step)

    def source_of(self, step: Step) -> str:
        if self._is_own(step):
            return super().source_of(step)
        return f"{self._remote.source_of(step.sources)}, read by rank {step.receiver},"

    def _is_own(self, step: Step) -> bool:
        return _is_own(self.move.gathered, step)

    def _bring(self, step: Step, target: torch.Tensor) -> Event:
        held = {rank: self._as_held.by(rank, step) for rank in step.sources}
        if self._is_own(step):
            return self._copy_own(step, held[self._rank], target)

        def read() -> None:
            needs = None if self._is_whole else self.move.plan.needs
            runs = None if needs is None else needs.runs_in(step.bucket)
            if runs is not None and not len(runs[0]):
                return  # whoever owns it may be gone
            by_columns = {} if runs is None else self._by_columns(step)
            self._unread[id(step)] = step
            with self.move.tracer.on_host(READ, step) as span:
                try:
                    span.nbytes = self._remote.read_any(held, target, runs, by_columns)
                except P2PError as error:
                    if gone := self._told_gone(step):
                        raise _owner_gone(step, gone) from error
                    raise  # as it is: its own cause, it would keep the memory
            del self._unread[id(step)]

        agreed = SimpleNamespace(query=lambda: self._is_whole is not None)
        return self._remote.begin(read, after=agreed)

    def _by_columns(self, step: Step) -> dict[int, ByColumns]:
        """What is read out of the column copies of those owners that have some."""
        copies, needs = self.move.gathered.columns, self.move.plan.needs
        parts = {
            owner: needs.read_by_columns(step.bucket, copies.get(owner, {}))
            for owner in step.sources
        }
        return {owner: part for owner, part in parts.items() if part is not None}

    def _told_gone(self, step: Step) -> frozenset[int]:
        """The bucket's owners of this world that are gone; Mooncake may notice before rank 0."""
        soon = Deadline(_TOLD_WITHIN)
        is_of_this_world = not self.move.gathered.is_loaded
        while is_of_this_world and not self._remote.is_closed and soon.remaining() > 0.0:
            if gone := gone_owners(self.move).intersection(step.sources):
                return gone
            time.sleep(0.01)
        return frozenset()

    def _expected_of(self, step: Step) -> tuple[int, int] | None:
        return super()._expected_of(step) if self._is_own(step) else None
