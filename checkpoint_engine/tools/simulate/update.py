"""Predicts an update: the plan that the ranks would execute, turned into tasks on a cluster's
links.

The plan is the real one. Ranks that only receive behave alike and are simulated as one: a bucket is
loaded by all workers in the same time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from checkpoint_engine.data_types import H2DBucket, TensorPart
from checkpoint_engine.planning.plan import Step, TransferPlan
from checkpoint_engine.tools.simulate.cluster import GB, Cluster, Costs
from checkpoint_engine.tools.simulate.engine import Simulation, Span, critical_path


@dataclass(frozen=True)
class Prediction:
    """What an update would take.

    Attributes:
        seconds: of the whole call.
        critical: the seconds, by what the update waited for: a bucket's ``fetch`` into a device,
            its way from staging (``deliver``), its ``broadcast``, its ``reload``, and what happens
            ``once``.
        device_bytes: double buffer, staging and the tensor that is put together on a receiver's
            device.
        spans: when each stage of each bucket ran.
    """

    seconds: float
    total_bytes: int
    tensors: int
    buckets: int
    bucket_bytes: int
    device_bytes: int
    critical: dict[str, float]
    spans: tuple[Span, ...] = field(repr=False)

    @property
    def gigabytes_per_second(self) -> float:
        return self.total_bytes / GB / self.seconds

    @property
    def bound_by(self) -> str:
        """What the update waited for longest."""
        return max(self.critical, key=lambda stage: self.critical[stage])


def predict(
    plan: TransferPlan,
    cluster: Cluster,
    costs: Costs,
    members: Sequence[int] | None = None,
    *,
    remote: bool = False,
    order: Callable[[Model], None] | None = None,
) -> Prediction:
    """Predict one update.

    Args:
        members: the ranks that receive, by place in the cluster. ``None``: all.
        remote: buckets are read out of the owners' memory by P2P. The owners then are ranks of the
            cluster beyond its last node, or among the members.
        order: adds the tasks of all steps, each after those that it waits for. ``None``: as this
            library orders them.
    """
    ranks = list(range(cluster.gpus)) if members is None else sorted(members)
    model = Model(plan, cluster, costs, ranks, remote)
    staged = plan.staging and len(ranks) > 1 and (remote or cluster.cores is None)
    (order or (Model.add_staged if staged else Model.add_direct))(model)
    spans = model.simulation.run()
    double_buffer = plan.bucket_bytes * min(2, max(1, len(plan.steps)))
    once = costs.per_update + costs.per_buffer_gb * double_buffer / GB
    critical = {"fetch": 0.0, "deliver": 0.0, "broadcast": 0.0, "reload": 0.0, "once": once}
    for span in critical_path(spans):
        critical[span.kind] += span.end - span.begin
    return Prediction(
        seconds=sum(critical.values()),
        total_bytes=plan.total_bytes,
        tensors=plan.tensor_count,
        buckets=len(plan.steps),
        bucket_bytes=plan.bucket_bytes,
        device_bytes=double_buffer + plan.bucket_bytes * staged + _put_together(plan),
        critical=critical,
        spans=tuple(spans),
    )


class Model:
    """The tasks of one update. ``fetch``, ``broadcast`` and ``reload`` each add the task of one
    stage of one step, after the tasks that are named, and return it."""

    def __init__(
        self, plan: TransferPlan, cluster: Cluster, costs: Costs, ranks: list[int], remote: bool
    ) -> None:
        self.plan = plan
        self._cluster = cluster
        self._costs = costs
        self._ranks = ranks
        self._remote = remote
        self._nodes = len({cluster.node_of(rank) for rank in ranks})
        self._on_one_node = -(-len(ranks) // self._nodes)
        self.simulation = Simulation(self._links())

    # ------------------------------------------------------------------ the orders of work

    def add_staged(self) -> None:
        """Several ranks: the next bucket of each receiver is fetched into staging, while those of
        others are broadcast. Two buckets are in the double buffer."""
        delivered: defaultdict[int, int | None] = defaultdict(lambda: None)
        broadcast: int | None = None
        reloads: list[int | None] = [None, None]
        for step in self.plan.steps:
            slot_free = reloads[-2]
            fetched = self.fetch(step, [delivered[step.receiver]])
            arrived = delivered[step.receiver] = self._deliver(
                step, [fetched, slot_free, broadcast]
            )
            broadcast = self.broadcast(step, [arrived])
            reloads = [reloads[-1], self.reload(step, [broadcast, reloads[-1]])]

    def add_direct(self) -> None:
        """Without staging a bucket is fetched into the double buffer. Host memory is broadcast from
        where it lies, beside the copy, but shared memory from there."""
        on_cores = self._cluster.cores is not None and not self._remote
        in_place = on_cores and not self._cluster.shared_memory
        last: int | None = None
        fetches: defaultdict[int, int | None] = defaultdict(lambda: None)
        broadcast: int | None = None
        reloads: list[int | None] = [None, None]
        for step in self.plan.steps:
            slot_free = reloads[-2]
            # Each rank's one thread fetches its own buckets and takes those of others in turn.
            apart = in_place or (on_cores and step.receiver == last)
            before = fetches[step.receiver] if apart else broadcast
            last = step.receiver
            fetched = fetches[step.receiver] = self.fetch(step, [slot_free, before])
            broadcast = self.broadcast(step, [slot_free, broadcast, None if in_place else fetched])
            reloads = [reloads[-1], self.reload(step, [fetched, broadcast, reloads[-1]])]

    # ------------------------------------------------------------------ the stages

    def fetch(self, step: Step, after: list[int | None]) -> int:
        nbytes = step.bucket.size / GB
        if self._remote and step.owner != step.receiver:
            amounts = {
                f"out {self._cluster.nic_of(step.owner)}": nbytes,
                f"in {self._cluster.nic_of(step.receiver)}": nbytes,
            }
        else:
            node = self._cluster.node_of(step.receiver)
            amounts = {f"pcie {step.receiver}": nbytes, f"memory {node}": nbytes}
        if self._cluster.cores is not None:
            amounts["cores"] = nbytes / self._cluster.host_to_device
        return self.simulation.task("fetch", amounts=amounts, after=after)

    def _deliver(self, step: Step, after: list[int | None]) -> int:
        """From staging into the double buffer."""
        nbytes = step.bucket.size / GB
        if self._cluster.cores is None:
            amounts = {f"device {step.receiver}": nbytes}
        else:
            amounts = {
                f"pcie {step.receiver}": nbytes,
                "cores": nbytes / self._cluster.host_to_device,
            }
        return self.simulation.task("deliver", amounts=amounts, after=after)

    def broadcast(self, step: Step, after: list[int | None]) -> int:
        nbytes = step.bucket.size / GB
        if len(self._ranks) == 1 or not step.bucket.size:
            return self.simulation.task("broadcast", after=after)
        rate = self._cluster.broadcast(self._nodes)
        amounts = {"fabric": nbytes}
        if self._nodes > 1 and self._remote:
            receivers = {each.receiver for each in self.plan.steps}
            share = nbytes / self._cluster.nics_per_node
            amounts |= {f"in {self._cluster.nic_of(rank)}": share for rank in receivers}
        if self._cluster.shared_memory and self._nodes == 1:
            copied = (len(self._ranks) - 1) * nbytes
            amounts[f"memory {self._cluster.node_of(step.receiver)}"] = copied
            amounts["cores"] = copied / rate
        elif self._cluster.cores is not None:
            busy = self._cluster.broadcast_cores * self._on_one_node
            amounts["cores"] = busy * nbytes / rate
        fixed = self._cluster.hop * (self._nodes - 1)
        return self.simulation.task("broadcast", fixed=fixed, amounts=amounts, after=after)

    def reload(self, step: Step, after: list[int | None]) -> int:
        """All workers load a bucket: messages, its checksum, Python for each tensor, then the
        bytes that they need."""
        messages, loading = self._costs.per_bucket, self._loading(step.bucket)
        amounts = {"workers": messages + loading}
        if self._cluster.cores is not None:
            busy = messages * self._costs.bucket_cores + loading
            amounts["cores"] = busy * self._on_one_node
            amounts[f"memory {self._cluster.node_of(step.receiver)}"] = (
                self._on_one_node * step.bucket.size / GB
            )
        return self.simulation.task("reload", amounts=amounts, after=after)

    def _loading(self, bucket: H2DBucket) -> float:
        """A worker's seconds with a bucket. A part is copied to where its tensor is put together,
        which is loaded with the last one."""
        joining, nbytes = 0.0, bucket.size
        if isinstance(bucket, TensorPart):
            joining = bucket.size / GB / self._cluster.copy_rate
            if not bucket.is_last:
                return joining
            nbytes = bucket.total
        python = len(bucket.items) * self._costs.per_tensor
        checking = 0.0 if self._costs.check is None else nbytes / GB / self._costs.check
        copying = nbytes / GB / (self._costs.load or self._cluster.device_memory)
        return joining + checking + python + copying

    def _links(self) -> dict[str, float]:
        """GB/s of every link that a step may use; seconds per second of workers and cores."""
        cluster = self._cluster
        links = {"fabric": cluster.broadcast(self._nodes), "workers": 1.0}
        if cluster.cores is not None:
            links["cores"] = float(cluster.cores)
        for step in self.plan.steps:
            links[f"pcie {step.receiver}"] = cluster.host_to_device
            links[f"device {step.receiver}"] = cluster.device_memory
            links[f"memory {cluster.node_of(step.receiver)}"] = cluster.host_memory
            links[f"out {cluster.nic_of(step.owner)}"] = cluster.nic
            links[f"in {cluster.nic_of(step.receiver)}"] = cluster.nic
        return links


def _put_together(plan: TransferPlan) -> int:
    """Bytes of the largest tensor that travels in parts."""
    parts = (step.bucket for step in plan.steps if isinstance(step.bucket, TensorPart))
    return max((part.total for part in parts), default=0)
