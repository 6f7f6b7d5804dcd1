"""Predicts updates whose buckets are staged: by ``Peers`` on one host, by ``Shard`` over several.

One host is simulated, with all its ranks and workers. The others do the same at the same time; of
them counts what they ask the owners for altogether.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from checkpoint_engine.data_types import TensorPart
from checkpoint_engine.ground.needs import Needs
from checkpoint_engine.planning import plan as planning
from checkpoint_engine.planning.layouts import layouts_of
from checkpoint_engine.planning.plan import Step, TransferPlan
from checkpoint_engine.planning.shards import HostNeeds, Tensors, share
from checkpoint_engine.tools.simulate.cluster import GB, Cluster, Costs
from checkpoint_engine.tools.simulate.engine import Simulation, Task
from checkpoint_engine.tools.simulate.update import (
    Metas,
    Prediction,
    Read,
    loading_seconds,
    on_nics,
    predicted,
)

_SLOTS = 2  # of staging on each rank


@dataclass(frozen=True)
class HostPlan:
    """What one host does in an update.

    Attributes:
        orders: the plan of each of its ranks: all have the same buckets, on one host in an order of
            their own.
        needs: as of ``plan_host``.
        asked: what each host of an instance reads.
    """

    metas: Metas
    cluster: Cluster
    orders: Mapping[int, TransferPlan]
    needs: Sequence[Needs] | None
    asked: Sequence[HostNeeds | None] = (None,)

    @property
    def plan(self) -> TransferPlan:
        return next(iter(self.orders.values()))

    @cached_property
    def bytes_in(self) -> dict[int, int]:
        """What each rank reads out of other hosts' memory."""
        read: dict[int, int] = dict.fromkeys(self.orders, 0)
        for step in self.plan.steps:
            if not is_own(step):
                read[step.receiver] += sum(self.ranges(step))
        return read

    def ranges(self, step: Step) -> list[int]:
        """The bytes of each range that a step reads out of another host's memory."""
        needs: HostNeeds | None = self.plan.needs
        runs = None if needs is None else needs.runs_in(step.bucket)
        if runs is None:
            return [step.bucket.size]
        return [int(end - begin) for begin, end in zip(*runs, strict=True)]


def is_own(step: Step) -> bool:
    """Whether the rank that stages the bucket owns it: it has been dealt to no other, or names
    itself as its source."""
    return step.sources in ((), (step.receiver,))


def plan_host(
    metas: Metas,
    cluster: Cluster,
    *,
    free_device_bytes: int,
    cap: int,
    here: int = 0,
    needs: Sequence[Needs] | None = None,
) -> HostPlan:
    """The plan that the ranks of host number ``here`` would make, of workers that read every rank's
    staging: ``Peers``' on a cluster of one host, else ``Shard``'s.

    Args:
        needs: of the worker of each rank of an instance, which repeats over all ranks; ``None``:
            everything.

    Raises:
        ValueError: the largest tensor does not fit, or the needs are of other tensors.
    """
    extent = planning.extent(metas)
    size = planning.bucket_size(free_device_bytes, extent[1], cap, True, _SLOTS + 1)
    size = planning.paced(size, planning.peer_pace(_SLOTS), extent, True)
    topology = on_nics(range(cluster.gpus), cluster), on_nics(metas, cluster)
    hosts = [
        range(node * cluster.gpus_per_node, (node + 1) * cluster.gpus_per_node)
        for node in range(cluster.nodes)
    ]
    if cluster.nodes == 1:
        orders = {
            rank: planning.plan_transfer(metas, size, *topology, may_cut=True, first=rank)
            for rank in hosts[here]
        }
        return HostPlan(metas, cluster, orders, needs)
    every = planning.plan_transfer(metas, size, *topology, may_cut=True)
    asked = (
        [None]
        if needs is None
        else list(_unions(Tensors(every.steps, layouts_of(metas)), needs, hosts))
    )
    shared = share(every, hosts, here, metas, needs=asked[here % len(asked)])
    return HostPlan(metas, cluster, dict.fromkeys(hosts[here], shared), needs, asked)


def _unions(
    tensors: Tensors, needs: Sequence[Needs], hosts: Sequence[range]
) -> Iterator[HostNeeds | None]:
    """What each host reads, up to where an instance begins with a host again."""
    every = math.lcm(len(needs), len(hosts[0])) // len(hosts[0])
    for host in hosts[:every]:
        distinct = {one.digest: one for one in (needs[rank % len(needs)] for rank in host)}
        yield HostNeeds(tensors, list(distinct.values()))


def predict_host(host: HostPlan, costs: Costs) -> Prediction:
    """Predict one update of workers that read every rank's staging."""
    model = _Host(host, costs)
    tasks = model.run()
    plan = host.plan
    parts = [step.bucket.total for step in plan.steps if isinstance(step.bucket, TensorPart)]
    device_bytes = _SLOTS * plan.bucket_bytes + max(parts, default=0)
    found = predicted(plan, tasks, device_bytes)
    return replace(found, bytes_in=sum(host.bytes_in.values()))


class _Host:
    """The tasks of all ranks of one host."""

    def __init__(self, host: HostPlan, costs: Costs) -> None:
        self._host = host
        self._cluster = host.cluster
        self._costs = costs
        self._simulation = Simulation()
        self._reads = dict(self._each_read())

    def run(self) -> list[Task]:
        simulation, plan = self._simulation, self._host.plan
        once = self._costs.per_update / 2 + plan.tensor_count * self._costs.per_tensor_once
        mapping = self._costs.per_mapping * len(self._host.orders) ** 2
        begun = simulation.task("once", fixed=once + mapping)  # the first buckets set out meanwhile
        fetched = {step.number: self._fetch(step) for step in plan.steps}
        loaded: defaultdict[int, list[int]] = defaultdict(list)
        for rank, order in self._host.orders.items():
            last = begun
            for step in order.steps:
                last = self._load(rank, step, [last, fetched[step.number]])
                loaded[step.number].append(last)
        for rank in self._host.orders:
            staged = [step.number for step in plan.loads_of(rank)]
            for before, bucket in zip(staged, staged[_SLOTS:], strict=False):
                simulation.follow(fetched[bucket], loaded[before])
        self._add_asked_by_others()
        simulation.task("once", fixed=once, after=simulation.ends())
        return simulation.run()

    def _fetch(self, step: Step) -> int:
        """Into staging: a copy of what the rank owns, or what another host's memory holds."""
        cluster, pcie = self._cluster, f"pcie {step.receiver}"
        size = step.bucket.size / GB
        if is_own(step):
            rates = {"memory": cluster.host_memory, pcie: cluster.host_to_device}
            fixed = 0.0 if self._costs.check is None else size / self._costs.check
        else:
            ranges = self._host.ranges(step)
            size, fixed = sum(ranges) / GB, len(ranges) * self._costs.per_range
            out, into = cluster.nic_of(step.sources[0]), cluster.nic_of(step.receiver)
            rates = {f"out {out}": cluster.nic, f"in {into}": cluster.nic}
            rates[pcie] = cluster.host_to_device
        busy = {link: size / rate for link, rate in rates.items()}
        return self._simulation.task("fetch", fixed=fixed, busy=busy)

    def _load(self, rank: int, step: Step, after: list[int | None]) -> int:
        """The worker of a rank reads its part of a bucket, wherever that is staged."""
        read = self._reads[rank, step.number]
        seconds = self._costs.per_bucket
        seconds += loading_seconds(step.bucket, self._cluster, self._costs, read)
        busy = {}
        if rank != step.receiver:
            nbytes = step.bucket.size * read.part
            seconds_of_link = nbytes / GB / self._cluster.peer_read
            busy = {f"nvlink into {rank}": seconds_of_link}
            busy[f"nvlink out of {step.receiver}"] = seconds_of_link
        return self._simulation.task("reload", fixed=seconds, busy=busy, after=after)

    def _add_asked_by_others(self) -> None:
        """The NICs and hosts of owners, as all other hosts ask them."""
        cluster, asked = self._cluster, self._host.asked
        links: defaultdict[str, float] = defaultdict(float)
        for step in self._host.plan.steps if cluster.nodes > 1 else ():
            parts = (1.0 if one is None else one.share_of(step.bucket) for one in asked)
            times = sum(parts) * (cluster.nodes - 1) / len(asked)
            size = step.bucket.size / GB
            links[f"asked {cluster.nic_of(step.owner)}"] += times * size / cluster.nic
            memory = f"asked memory {cluster.node_of(step.owner)}"  # its own ranks copy, too
            links[memory] += (times + 1) * size / cluster.host_memory
        for link, seconds in links.items():
            self._simulation.task("fetch", busy={link: seconds})

    def _each_read(self) -> Iterator[tuple[tuple[int, int], Read]]:
        """What each worker reads of each bucket, by its number. Owners sum their buckets
        themselves; of what is read in part there is no sum."""
        host, steps = self._host, self._host.plan.steps
        reads: dict[str, list[Read]] = {}
        if host.needs is not None:
            places = _Places(Tensors(steps, layouts_of(host.metas)), steps)
            here = {host.needs[rank % len(host.needs)].digest for rank in host.orders}
            distinct = {one.digest: one for one in host.needs if one.digest in here}
            reads = {digest: places.reads_of(one) for digest, one in distinct.items()}
        everything = [Read(len(s.bucket.items), is_summed=not is_own(s)) for s in steps]
        for rank in host.orders:
            some = everything
            if host.needs is not None:
                some = reads[host.needs[rank % len(host.needs)].digest]
            yield from zip(((rank, step.number) for step in steps), some, strict=True)


class _Places:
    """Where the tensors of each bucket are in the order of all names."""

    def __init__(self, tensors: Tensors, steps: Sequence[Step]) -> None:
        buckets = [step.bucket for step in steps]
        self._places = np.concatenate([tensors.places_of(bucket) for bucket in buckets])
        counts = [len(bucket.items) for bucket in buckets]
        self._begins = np.cumsum([0, *counts[:-1]])
        sizes = [meta.aligned_size for bucket in buckets for meta in bucket.items]
        self._sizes = np.add.reduceat(np.array(sizes, dtype=np.int64), self._begins)

    def reads_of(self, needs: Needs) -> list[Read]:
        """What a learned worker reads: it spends no time on tensors that it does not need."""
        of_kind = np.array([sum(region.nbytes for region in kind) for kind in needs.kinds])
        nbytes = of_kind[needs.numbers][self._places]
        tensors = np.add.reduceat(nbytes > 0, self._begins, dtype=np.int64)
        parts = np.minimum(1.0, np.add.reduceat(nbytes, self._begins) / np.maximum(1, self._sizes))
        both = zip(tensors.tolist(), parts.tolist(), strict=True)
        return [Read(count, part, is_summed=False) for count, part in both]
