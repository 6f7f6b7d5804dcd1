"""The simulator's figures beside measured and published ones.

What is assumed of each cluster and of the software stands below in capitals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import models
import torch
from original import predict_original

from checkpoint_engine.data_types import ParameterMeta
from checkpoint_engine.tools.simulate.cluster import Cluster, Costs
from checkpoint_engine.tools.simulate.update import Prediction, make_plan, predict, share_out

GIB = 1 << 30
SPARE = 40 * GIB
"""Device memory that the buffers may take in the clusters below."""

# The wires of the published clusters: what a fully overlapped broadcast gets there.
H800 = Cluster(nodes=1, host_to_device=50.0, nvlink=165.0, nic=45.0)
H20 = Cluster(nodes=2, host_to_device=50.0, nvlink=400.0, nic=45.0)
H20_256 = Cluster(nodes=32, host_to_device=50.0, nvlink=400.0, nic=45.0)
ORIGINAL_020 = Costs(per_tensor=80e-6, per_bucket=10e-3, per_update=1.0, check=None)
"""One set for all rows: loader, vote and synchronisation of a bucket, process group of an update;
with them no stage overlaps but loading and the next broadcast."""
PLAIN = Costs(per_tensor=60e-6)
"""This library, and an engine's ``load_weights`` as measured on one H200 (54-74 us)."""
REPLAYED = Costs(per_tensor=5e-6)
"""This library, and a loader that only copies."""


@dataclass(frozen=True)
class Published:
    model: models.MixtureOfExperts
    cluster: Cluster
    machines: str
    members: int
    broadcast: float
    p2p: float


PUBLISHED = [
    Published(models.GLM_45_AIR, H800, "8xH800", 8, 3.47, 4.12),
    Published(models.QWEN3_235B, H800, "8xH800", 8, 6.22, 7.10),
    Published(models.DEEPSEEK_V31, H20, "16xH20", 16, 10.19, 11.80),
    Published(models.KIMI_K2, H20, "16xH20", 16, 14.36, 17.49),
    Published(models.DEEPSEEK_V31, H20_256, "256xH20", 16, 11.33, 11.81),
    Published(models.KIMI_K2, H20_256, "256xH20", 16, 16.04, 16.75),
]


def simulate(
    tensors: list[ParameterMeta],
    cluster: Cluster,
    costs: Costs,
    *,
    owners: int | Sequence[int] | None = None,
    members: int | None = None,
    cap: float = 8 * GIB,
    original: bool = False,
) -> Prediction:
    """``owners``: the ranks, or the first so many; default: all. ``members``: P2P to the first so
    many ranks, which read from all owners' memory. ``original``: by the original's algorithm."""
    owners = cluster.gpus if owners is None else owners
    metas = share_out(tensors, range(owners) if isinstance(owners, int) else owners)
    ranks = None if members is None else range(members)
    given: dict[str, Any] = {"free_device_bytes": SPARE, "cap": int(cap), "receivers": ranks}
    if original:
        return predict_original(metas, cluster, costs, **given)
    plan = make_plan(metas, cluster, **given)
    return predict(plan, cluster, costs, ranks)


def show(columns: list[str], rows: list[list[str]]) -> None:
    """A table in Markdown."""
    print("\n| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def published() -> None:
    rows = []
    for row in PUBLISHED:
        tensors = row.model.tensors()
        theirs = simulate(tensors, row.cluster, ORIGINAL_020, original=True)
        pulled = simulate(tensors, row.cluster, ORIGINAL_020, members=row.members, original=True)
        plain, replayed = (simulate(tensors, row.cluster, costs) for costs in (PLAIN, REPLAYED))
        joined = simulate(tensors, row.cluster, REPLAYED, members=row.members)
        rows.append(
            [
                f"{row.model.name}, {theirs.plan.total_bytes / 1e9:.0f} GB in {len(tensors):,}",
                row.machines,
                f"{row.broadcast:.2f}",
                f"{theirs.seconds:.2f} ({theirs.seconds / row.broadcast - 1:+.0%})",
                f"{row.p2p:.2f}",
                f"{pulled.seconds:.2f} ({pulled.seconds / row.p2p - 1:+.0%})",
                f"{plain.seconds:.2f} ({plain.bound_by})",
                f"{replayed.seconds:.2f} ({replayed.bound_by})",
                f"{joined.seconds:.2f} ({joined.bound_by})",
            ]
        )
    show(
        [
            "model", "machines", "broadcast, published", "simulated", "P2P, published",
            "simulated", "ours, plain loader", "ours, replayed", "ours, P2P, replayed",
        ],
        rows,
    )  # fmt: skip


def scaled() -> None:
    """Kimi-K2 on H20 nodes; owners: on every rank, or on the ranks of so many nodes."""
    rows = []
    tensors = models.KIMI_K2.tensors()
    for nodes in (1, 8, 32, 128, 512):
        cluster = Cluster(nodes=nodes, nvlink=400.0, host_to_device=50.0, nic=45.0)
        cells = [f"{cluster.gpus:,}"]
        for owners in (cluster.gpus, min(cluster.gpus, 64)):
            found = simulate(tensors, cluster, REPLAYED, owners=owners)
            cells.append(f"{found.seconds:.2f} ({len(found.plan.steps)} buckets, {found.bound_by})")
        theirs = simulate(tensors, cluster, ORIGINAL_020, original=True)
        rows.append([*cells, f"{theirs.seconds:.1f}"])
    show(["GPUs", "ours, every rank owns", "ours, 64 ranks own", "the original's"], rows)


# ---------------------------------------------------------------------- one H200, as measured

H200 = Cluster(nodes=1, gpus_per_node=1, nics_per_node=1, host_to_device=55.3, device_memory=2000.0)
H200_COSTS = Costs(per_tensor=3e-6, per_bucket=300e-6, per_update=8e-3)
"""``update.py``'s worker copies with one call for all tensors of a bucket."""


def h200() -> None:
    rows = []
    for layers, measured in ((11, 0.259), (1, 0.028)):
        found = simulate(layers_of(layers), H200, H200_COSTS, cap=2 * GIB)
        off = found.seconds / measured - 1
        rows.append([work_of(found), f"{measured:.3f}", f"{found.seconds:.3f} ({off:+.0%})"])
    show(["one H200, README's figures", "measured, s", "simulated, s"], rows)


def layers_of(count: int, shapes: str = "moe") -> list[ParameterMeta]:
    from update import SHAPES

    return [
        ParameterMeta(name=name, dtype=torch.bfloat16, shape=torch.Size(shape))
        for layer in range(count)
        for name, shape in SHAPES[shapes](layer).items()
    ]


def work_of(found: Prediction) -> str:
    plan = found.plan
    content = f"{plan.total_bytes / 1e9:.2f} GB in {plan.tensor_count:,} tensors"
    return f"{content}, {len(plan.steps)} buckets"


def main() -> None:
    published()
    h200()
    scaled()


if __name__ == "__main__":
    main()
