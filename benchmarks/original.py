"""The original's algorithm on the simulator, as far as its documentation and timings tell.

All owners of a round copy their bucket at once, after the last round is through. The round's
buckets are then broadcast one after the other, into alternate halves; loading one overlaps the
broadcast of the next. Buckets are filled up to their cap.
"""

from __future__ import annotations

from collections.abc import Sequence

from checkpoint_engine.planning.plan import (
    Step,
    TransferPlan,
    bucket_size,
    largest_tensor,
    plan_transfer,
)
from checkpoint_engine.tools.simulate.cluster import Cluster, Costs
from checkpoint_engine.tools.simulate.update import Metas, Model, Prediction, on_nics, predict


def predict_original(
    metas: Metas,
    cluster: Cluster,
    costs: Costs,
    *,
    free_device_bytes: int,
    cap: int,
    receivers: Sequence[int] | None = None,
) -> Prediction:
    """``receivers``: P2P to these ranks. ``None``: broadcast to all."""
    size = bucket_size(free_device_bytes, largest_tensor(metas), cap)
    local, owners = on_nics(range(cluster.gpus), cluster), on_nics(metas, cluster)
    plan = plan_transfer(metas, size, local, owners, receivers)
    return predict(plan, cluster, costs, receivers, order=_add_rounds)


def _add_rounds(model: Model) -> None:
    broadcast: int | None = None
    reloads: list[int | None] = [None, None]
    for steps in _rounds(model.plan):
        fetched = [model.fetch(step, [broadcast]) for step in steps]
        for step in steps:
            broadcast = model.broadcast(step, [*fetched, broadcast, reloads[-2]])
            reloads = [reloads[-1], model.reload(step, [broadcast, reloads[-1]])]


def _rounds(plan: TransferPlan) -> list[list[Step]]:
    """The plan's steps, cut where a receiver comes up again."""
    rounds: list[list[Step]] = []
    seen: set[int] = set()
    for step in plan.steps:
        if not rounds or step.receiver in seen:
            rounds.append([])
            seen = set()
        rounds[-1].append(step)
        seen.add(step.receiver)
    return rounds
