"""Predicts an update: the plan that the ranks would execute, turned into tasks on a cluster's
links.

The plan is the real one, of the headers of a checkpoint's files. Ranks that only receive behave
alike and are simulated as one: a bucket is loaded by all workers in the same time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from checkpoint_engine.data_types import (
    H2DBucket,
    MemoryBufferMetaList,
    MemoryBufferMetas,
    ParameterMeta,
    TensorPart,
)
from checkpoint_engine.memory.files import open_files
from checkpoint_engine.memory.layout import packed_size
from checkpoint_engine.memory.sources import natural_key
from checkpoint_engine.planning import plan as planning
from checkpoint_engine.planning.plan import Step, TransferPlan
from checkpoint_engine.tools.simulate.cluster import GB, Cluster, Costs
from checkpoint_engine.tools.simulate.engine import Simulation, Task, critical_path
from checkpoint_engine.world.gathered import topology

Metas = dict[int, MemoryBufferMetaList]
_STAGES = ("fetch", "deliver", "broadcast", "reload", "once")


# ---------------------------------------------------------------------- the plan


def read_headers(checkpoint: Path) -> list[ParameterMeta]:
    """The tensors of a safetensors file, or of the checkpoint in a folder; only headers are read.

    Raises:
        ValueError: as ``open_files``.
    """
    return [source.meta for source in open_files([checkpoint]).values()]


def share_out(tensors: Iterable[ParameterMeta], owners: Sequence[int]) -> Metas:
    """Deal the tensors to the owners, in natural order and by bytes, as ``examples/update.py``
    does. Each owner has one buffer."""
    in_order = sorted(tensors, key=lambda meta: natural_key(meta.name))
    total = max(packed_size(in_order), 1)
    shares: defaultdict[int, list[ParameterMeta]] = defaultdict(list)
    begin = 0
    for meta in in_order:
        shares[owners[min(begin * len(owners) // total, len(owners) - 1)]].append(meta)
        begin += meta.aligned_size
    return {owner: _owned(share) for owner, share in shares.items()}


def deal_out(tensors: Sequence[ParameterMeta], owners: Sequence[int]) -> Metas:
    """Each owner has every Nth tensor, in the order in which they come."""
    shares = {owner: list(tensors[place :: len(owners)]) for place, owner in enumerate(owners)}
    return {owner: _owned(share) for owner, share in shares.items() if share}


def _owned(share: list[ParameterMeta]) -> MemoryBufferMetaList:
    buffers = [MemoryBufferMetas.model_construct(metas=share, ptr=0, size=packed_size(share))]
    return MemoryBufferMetaList.model_construct(
        p2p_store_addr=None, memory_buffer_metas_list=buffers, rdma_device="", lease=None
    )


def make_plan(
    metas: Metas,
    cluster: Cluster,
    *,
    free_device_bytes: int,
    cap: int,
    receivers: Sequence[int] | None = None,
) -> TransferPlan:
    """The plan that the ranks would cut. The workers are this library's and have been updated
    before, so that a broadcast may cut tensors.

    Args:
        free_device_bytes: that the buffers may take on the fullest device.
        cap: ``PS_MAX_BUCKET_SIZE_GB`` in bytes.
        receivers: P2P to these ranks. ``None``: broadcast to all.

    Raises:
        ValueError: the largest tensor does not fit.
    """
    p2p = receivers is not None
    may_cut = not p2p  # as Way.plan decides it
    extent = planning.extent(metas)
    size = planning.bucket_size(free_device_bytes, extent[1], cap, may_cut)
    local, remote = on_nics(range(cluster.gpus), cluster), on_nics(metas, cluster)
    pace = planning.READ_PACE if p2p else planning.DEVICE_PACE
    size = planning.paced(size, pace, extent, may_cut)
    return planning.plan_transfer(metas, size, local, remote, receivers, may_cut=may_cut)


def on_nics(ranks: Iterable[int], cluster: Cluster) -> dict[str, set[int]]:
    """Which of ``ranks`` share each NIC, by its name."""
    return topology((rank, cluster.nic_of(rank), f"node{cluster.node_of(rank)}") for rank in ranks)


# ---------------------------------------------------------------------- the prediction


@dataclass(frozen=True)
class Prediction:
    """What an update would take.

    Attributes:
        seconds: of the whole call.
        plan: what it moves.
        critical: the seconds, by what the update waited for: a bucket's ``fetch`` into a device,
            its way from staging (``deliver``), its ``broadcast``, its ``reload``, and what happens
            ``once``.
        device_bytes: double buffer, staging and the tensor that is put together on a receiver's
            device.
        tasks: when each stage of each bucket ran.
        bytes_in: that enter one host by P2P, where buckets are staged there.
    """

    plan: TransferPlan = field(repr=False)
    seconds: float
    device_bytes: int
    critical: dict[str, float]
    tasks: Sequence[Task] = field(repr=False)
    bytes_in: int = 0

    @property
    def gigabytes_per_second(self) -> float:
        return self.plan.total_bytes / GB / self.seconds

    @property
    def bound_by(self) -> str:
        """What the update waited for longest."""
        return max(self.critical, key=lambda stage: self.critical[stage])


def predict(
    plan: TransferPlan,
    cluster: Cluster,
    costs: Costs,
    members: Sequence[int] | None = None,
    order: Callable[[Model], None] | None = None,
) -> Prediction:
    """Predict one update.

    Args:
        members: P2P: the ranks that receive, by place in the cluster; they read buckets out of the
            memory of owners, which are among them or beyond the cluster's last node. ``None``: a
            broadcast to all.
        order: adds the tasks of all steps, each after those that it waits for. ``None``: as this
            library orders them.
    """
    model = Model(plan, cluster, costs, members)
    (order or Model.add_steps)(model)
    once = costs.per_update + model.looking
    model.simulation.task("once", fixed=once, after=model.simulation.ends())
    double_buffer = plan.bucket_bytes * min(2, max(1, len(plan.steps)))
    parts = [step.bucket.total for step in plan.steps if isinstance(step.bucket, TensorPart)]
    device_bytes = double_buffer + plan.bucket_bytes * model.is_staged + max(parts, default=0)
    return predicted(plan, model.simulation.run(), device_bytes)


def predicted(plan: TransferPlan, tasks: Sequence[Task], device_bytes: int) -> Prediction:
    """What the tasks of an update, once they were run, say of it."""
    critical = dict.fromkeys(_STAGES, 0.0)
    for task in critical_path(tasks):
        critical[task.kind] += task.end - task.begin
    return Prediction(plan, sum(critical.values()), device_bytes, critical, tasks)


class Model:
    """The tasks of one update. ``fetch``, ``broadcast`` and ``reload`` each add the task of one
    stage of one step, after the tasks that are named, and return it."""

    def __init__(
        self, plan: TransferPlan, cluster: Cluster, costs: Costs, members: Sequence[int] | None
    ) -> None:
        self.plan = plan
        self._costs = costs
        ranks = range(cluster.gpus) if members is None else members
        self._is_alone = len(ranks) == 1
        self._p2p = members is not None
        self._nodes = len({cluster.node_of(rank) for rank in ranks})
        reads = self._p2p and any(step.owner != step.receiver for step in plan.steps)
        # A receiver's NIC that reads by P2P broadcasts meanwhile, where there are several nodes.
        share = 0.5 if reads and self._nodes > 1 else 1.0
        self._cluster = replace(cluster, nic=cluster.nic * share)
        self._owners_nic = cluster.nic
        self.is_staged = plan.staging and not self._is_alone
        self.looking = plan.tensor_count * costs.per_tensor_once
        self.simulation = Simulation()

    def add_steps(self) -> None:
        """All steps, each stage after those that it waits for in this library."""
        arrived: defaultdict[int, int | None] = defaultdict(lambda: None)
        broadcast: int | None = None
        reloads: list[int | None] = [None, None]
        looked = self.simulation.task("once", fixed=self.looking)  # as the first buckets set out
        for step in self.plan.steps:
            slot_free = reloads[-2]  # two buckets are in the double buffer
            if self.is_staged:
                fetched = self.fetch(step, [arrived[step.receiver]])
                seconds = step.bucket.size / GB / self._cluster.device_memory
                busy = {f"device {step.receiver}": seconds}
                before = [fetched, slot_free, broadcast]
                ready = self.simulation.task("deliver", busy=busy, after=before)
            else:
                ready = self.fetch(step, [slot_free, broadcast])
            arrived[step.receiver] = ready
            broadcast = self.broadcast(step, [ready])
            reloads = [reloads[-1], self.reload(step, [broadcast, reloads[-1], looked])]

    def fetch(self, step: Step, after: list[int | None]) -> int:
        """Into staging, or into the double buffer where there is none."""
        cluster = self._cluster
        if self._p2p and step.owner != step.receiver:
            out, into = cluster.nic_of(step.owner), cluster.nic_of(step.receiver)
            rates = {f"out {out}": self._owners_nic, f"in {into}": cluster.nic}
        else:
            memory = f"memory {cluster.node_of(step.receiver)}"
            rates = {memory: cluster.host_memory, f"pcie {step.receiver}": cluster.host_to_device}
        busy = {link: step.bucket.size / GB / rate for link, rate in rates.items()}
        return self.simulation.task("fetch", busy=busy, after=after)

    def broadcast(self, step: Step, after: list[int | None]) -> int:
        if self._is_alone or not step.bucket.size:
            return self.simulation.task("broadcast", after=after)
        busy = {"fabric": step.bucket.size / GB / self._cluster.broadcast(self._nodes)}
        fixed = self._cluster.hop * (self._nodes - 1)
        return self.simulation.task("broadcast", fixed=fixed, busy=busy, after=after)

    def reload(self, step: Step, after: list[int | None]) -> int:
        """All workers load a bucket."""
        everything = Read(len(step.bucket.items))
        loading = loading_seconds(step.bucket, self._cluster, self._costs, everything)
        seconds = self._costs.per_bucket + loading
        return self.simulation.task("reload", fixed=seconds, after=after)


class Read(NamedTuple):
    """What a worker reads of a bucket: how many tensors, which part of the bytes, and whether it
    sums them."""

    tensors: int
    part: float = 1.0
    is_summed: bool = True


def loading_seconds(bucket: H2DBucket, cluster: Cluster, costs: Costs, read: Read) -> float:
    """A worker's seconds with a bucket: its checksum, Python for each tensor, then the bytes that
    it needs. A part of a tensor is copied to where that is put together, which is loaded with the
    last one.
    """
    joining, nbytes = 0.0, bucket.size
    if isinstance(bucket, TensorPart):
        joining = bucket.size / GB / cluster.device_memory
        if not bucket.is_last:
            return joining
        nbytes = bucket.total
    python = read.tensors * costs.per_tensor
    checking = 0.0 if costs.check is None or not read.is_summed else nbytes / GB / costs.check
    copying = read.part * nbytes / GB / (costs.load or cluster.device_memory)
    return joining + checking + python + copying
