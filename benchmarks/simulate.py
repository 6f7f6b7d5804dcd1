"""The simulator's figures beside measured and published ones.

What is assumed of each cluster and of the software stands below in capitals.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import torch
from original import predict_original

from checkpoint_engine.data_types import ParameterMeta
from checkpoint_engine.ground.needs import Needs
from checkpoint_engine.tools.simulate.cluster import Cluster, Costs
from checkpoint_engine.tools.simulate.hosts import plan_host, predict_host
from checkpoint_engine.tools.simulate.parallel import Parallel
from checkpoint_engine.tools.simulate.update import (
    Metas,
    Prediction,
    deal_out,
    make_plan,
    predict,
    share_out,
)

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


def show(columns: list[str], rows: Iterable[list[str]]) -> None:
    """A table in Markdown, each row as soon as it is there."""
    print("\n| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


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


# ---------------------------------------------------------------------- large clusters

SHARDED = Costs(per_tensor=5e-6, per_tensor_once=2.3e-6)
"""A learned worker; it spends 5 us on each tensor that it reads, as vLLM's 6 us on a CPU."""
WIDE = 128
"""Ranks that share the experts in the last columns, on 16 hosts."""
TENSOR_PARALLEL = {"Kimi": 16, "Deep": 16, "Qwen": 8}


def scaled() -> None:
    """Every rank owns as much as the others; of broadcasts, the first 64 ranks."""
    kinds = ("TP", "TP, EP 16", "the same, every Nth", f"TP, EP {WIDE}")
    columns = [f"shard, {kind}" for kind in kinds]
    for model in (models.KIMI_K2, models.DEEPSEEK_V31, models.QWEN3_235B):
        show([model.name, "broadcast", *columns], scaled_rows(model))


def scaled_rows(
    model: models.MixtureOfExperts, sizes: Sequence[int] = (1, 8, 32, 128, 512)
) -> Iterator[list[str]]:
    """Ranks own consecutive tensors, in one column every Nth."""
    tensors = model.tensors()
    known: dict[Parallel, list[Needs]] = {}
    for nodes in sizes:
        cluster = Cluster(nodes=nodes, nvlink=400.0, host_to_device=50.0, nic=45.0)
        tensor = min(TENSOR_PARALLEL[model.name[:4]], cluster.gpus)
        sent = simulate(tensors, cluster, SHARDED, owners=min(cluster.gpus, 64))
        cells = [f"{cluster.gpus:,} GPUs", f"{sent.seconds:.2f} ({sent.bound_by})"]
        consecutive = share_out(tensors, range(cluster.gpus))
        dealt = deal_out(tensors, range(cluster.gpus))
        layouts = [(1, consecutive), (16, consecutive), (16, dealt), (WIDE, consecutive)]
        for expert, metas in layouts[: 4 if nodes > 1 else 1]:
            parallel = Parallel(tensor, expert)
            if parallel not in known:
                known[parallel] = parallel.needs(tensors, range(parallel.ranks))
            found = staged(metas, cluster, SHARDED, needs=known[parallel])
            entered = f"{found.bytes_in / 1e9:.0f} GB"
            cells.append(f"{found.seconds:.2f} ({entered}, {found.bound_by})")
        yield cells


def staged(
    metas: Metas,
    cluster: Cluster,
    costs: Costs,
    *,
    needs: list[Needs] | None = None,
    cap: float = 8 * GIB,
    here: int = 0,
) -> Prediction:
    """By ``Peers`` on one host, else ``Shard``."""
    given: dict[str, Any] = {"free_device_bytes": SPARE, "cap": int(cap), "here": here}
    return predict_host(plan_host(metas, cluster, needs=needs, **given), costs)


# ---------------------------------------------------------------------- GPUs of one host, measured

LEARNED = Costs(per_tensor=0.15e-6, per_tensor_once=0.3e-6, per_bucket=300e-6, per_update=0.01)
"""0.15 us: `replay.py growth`. Per tensor once, and 10 ms: what two and four H200 took before the
first bucket (14 and 29 ms, of which they mapped 4 and 16 buffers) and after the last (5 and 8)."""
PYTHON = Costs(per_tensor=39e-6, per_bucket=300e-6, per_update=0.01)
"""39 us: release 0.5.0's worker on four H200."""


@dataclass(frozen=True)
class Measured:
    """``copies``: seconds of all GPUs' copies of these bytes, in the same run."""

    gpus: int
    machine: str
    gigabytes: float
    copies: float
    shares: bool
    seconds: float
    costs: Costs = LEARNED


MEASURED = [
    Measured(2, "H200", 16.2, 0.149, True, 0.164),
    Measured(2, "H200", 16.2, 0.149, False, 0.168),
    Measured(2, "H200", 16.2, 0.162, False, 0.200, PYTHON),
    Measured(2, "H200", 1.26, 0.0116, True, 0.025),
    Measured(4, "H200", 28.7, 0.166, True, 0.187),
    Measured(4, "H200", 28.7, 0.152, False, 0.202),
    Measured(4, "H200", 29.9, 0.179, True, 0.217),
    Measured(4, "H200", 29.9, 0.179, False, 0.239),
    Measured(4, "H200", 31.1, 0.188, False, 0.467, PYTHON),
]


def one_host() -> None:
    import gpus

    rows = []
    for row in MEASURED:
        shapes = gpus.shapes_of(row.gigabytes - 0.3, 128)
        tensors = [
            ParameterMeta(name=name, dtype=torch.bfloat16, shape=torch.Size(shape))
            for name, shape in shapes
        ]
        rate = sum(meta.aligned_size for meta in tensors) / 1e9 / row.copies
        cluster = Cluster(
            gpus_per_node=row.gpus, host_to_device=55.3, host_memory=rate, device_memory=2000.0
        )
        found = simulate(tensors, cluster, row.costs, cap=2 * GIB)
        if row.gpus > 1:
            parallel = Parallel(row.gpus if row.shares else 1)
            needs = None if row.costs is PYTHON else parallel.needs(tensors, range(row.gpus))
            metas = deal_out(tensors, range(row.gpus))
            found = staged(metas, cluster, row.costs, needs=needs, cap=2 * GIB)
        keeps = "plain, everything" if row.costs is PYTHON else "everything"
        rows.append(
            [
                f"{row.gpus} {row.machine}",
                f"1/{row.gpus}" if row.shares else keeps,
                f"{found.plan.total_bytes / 1e9:.1f} in {len(tensors):,}",
                f"{row.copies:.3f}",
                *compared(found, row.seconds),
            ]
        )
    show(["GPUs", "keeps", "GB", "copies, s", "measured, s", "simulated, s"], rows)


def compared(found: Prediction, measured: float) -> list[str]:
    off = found.seconds / measured - 1
    return [f"{measured:.3f}", f"{found.seconds:.3f} ({off:+.0%}, {found.bound_by})"]


# ---------------------------------------------------------------------- two hosts, measured

NAMESPACES = Cluster(
    nodes=2, gpus_per_node=1, nics_per_node=1, nic=0.1195, host_to_device=5.0, host_memory=10.0,
    nvlink=2.4, device_memory=5.0, peer_read=5.0,
)  # fmt: skip
"""1 Gbit/s less the headers of TCP; a memcpy on two cores, and gloo over loopback: `limits.md`'s
12 GB/s of an idle core and 2.4 GB/s."""
ON_CPUS = Costs(
    per_tensor=0.15e-6, per_bucket=1e-3, per_update=0.05, check=5.0, per_range=1e-4,
    per_mapping=0.0,
)  # fmt: skip


def two_hosts() -> None:
    """`shard.py`'s model; each rank owns every second tensor."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from random_checkpoint import tensor_shapes

    config = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 17408}
    config |= {"num_hidden_layers": 16, "num_attention_heads": 8, "num_key_value_heads": 4}
    tensors = [
        ParameterMeta(name=name, dtype=torch.bfloat16, shape=torch.Size(shape))
        for name, shape in tensor_shapes(config).items()
    ]
    metas = deal_out(tensors, range(2))
    cap = 16 << 20
    plan = make_plan(metas, NAMESPACES, free_device_bytes=SPARE, cap=cap)
    rows = [["`PS_TRANSPORT=group`", *compared(predict(plan, NAMESPACES, ON_CPUS), 2.11), ""]]
    for here, measured, entered in ((0, 1.49, 37.7), (1, 1.49, 74.7)):
        needs = Parallel(2).needs(tensors, range(2))
        found = staged(metas, NAMESPACES, ON_CPUS, needs=needs, cap=cap, here=here)
        moved = f"{entered} / {found.bytes_in / 1e6:.1f}"
        rows.append([f"`shard`, host {here}", *compared(found, measured), moved])
    show(["two hosts at 1 Gbit/s", "measured, s", "simulated, s", "MB in, both"], rows)


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
    tables = {one.__name__: one for one in (h200, one_host, two_hosts, published, scaled)}
    for name in sys.argv[1:] or tables:
        tables[name]()


if __name__ == "__main__":
    main()
