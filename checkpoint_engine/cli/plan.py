"""``checkpoint-engine plan``: what an update would take, without a GPU and without the bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from checkpoint_engine.cli.output import Positive, Shown, shown
from checkpoint_engine.settings import GIB
from checkpoint_engine.tools.simulate.cluster import Cluster, Costs

if TYPE_CHECKING:
    from checkpoint_engine.tools.simulate.update import Prediction

_DESCRIBED = [one for of in (Cluster, Costs) for one in fields(of) if "text" in one.metadata]
_gib = partial(click.option, type=Positive(1 << 30), show_default=True)
_ranks = partial(click.option, type=click.IntRange(1), default=1, show_default=True)


def _describing_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """An option for each rate and cost that ``Cluster`` and ``Costs`` describe."""
    for one in reversed(_DESCRIBED):
        option = {"type": float, "default": one.default, "help": one.metadata["text"]}
        name = f"--{one.name.replace('_', '-')}"
        function = click.option(name, show_default=True, **option)(function)
    return function


@click.command(short_help="Predict what an update of a checkpoint would take.")
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option("--world-size", type=click.IntRange(1), required=True, help="Ranks, one per GPU.")
@click.option("--gpus-per-node", type=click.IntRange(1), default=8, show_default=True)
@click.option("--nics-per-node", type=click.IntRange(1), default=8, show_default=True)
@click.option("--receivers", type=click.IntRange(1), help="Ranks of a P2P update. Default: all.")
@_ranks("--tensor-parallel", help="Ranks that share each layer, by slices.")
@_ranks("--expert-parallel", help="Ranks that share the experts, as whole ones.")
@_gib("--free-gb", default=40.0, help="GiB that buffers may take on the fullest device.")
@_gib("--bucket-gb", default=8.0, help="PS_MAX_BUCKET_SIZE_GB.")
@_describing_options
@shown
def plan(
    checkpoint: Path,
    world_size: int,
    gpus_per_node: int,
    nics_per_node: int,
    receivers: int | None,
    tensor_parallel: int,
    expert_parallel: int,
    free_gb: float,
    bucket_gb: float,
    **rates: float,
) -> Shown:
    """Predict an update of CHECKPOINT, a safetensors file or the folder of a checkpoint.

    Reads only their headers; needs no GPU. The cluster is described by the options, the workers
    are this library's and not new: tensors larger than a bucket travel in parts, and of what other
    hosts own a host reads what its workers need (shard), by the usual rules of parallel layers.
    """
    # These import torch, which takes longer than completion may.
    from checkpoint_engine.tools.simulate.hosts import plan_host, predict_host
    from checkpoint_engine.tools.simulate.parallel import Parallel
    from checkpoint_engine.tools.simulate.update import make_plan, predict, read_headers, share_out

    per_node = min(gpus_per_node, world_size)
    described: dict[str, Any] = {
        name: rates.pop(name) for name in [*rates] if name in vars(Cluster)
    }
    cluster = Cluster(-(-world_size // per_node), per_node, nics_per_node, **described)
    costs = Costs(**rates)
    tensors = read_headers(checkpoint)
    metas = share_out(tensors, range(world_size))
    owned = [sum(b.size for b in owner.memory_buffer_metas_list) for owner in metas.values()]
    free, cap = int(free_gb * GIB), int(bucket_gb * GIB)
    p2p = range(min(receivers or world_size, world_size))
    result: dict[str, Any] = {"checkpoint": str(checkpoint), "world_size": world_size}
    result |= {"host_bytes_of_a_rank": max(owned, default=0), "cluster": asdict(cluster)}
    lines = []
    for method, members in (("broadcast", None), ("p2p", p2p)):
        cut = make_plan(metas, cluster, free_device_bytes=free, cap=cap, receivers=members)
        found = predict(cut, cluster, costs, members)
        result |= {"tensors": cut.tensor_count, "bytes": cut.total_bytes, method: _as_dict(found)}
        lines += _as_text(method, found)
    if world_size > 1:
        method = "peers" if cluster.nodes == 1 else "shard"
        parallel = Parallel(tensor_parallel, expert_parallel)
        needs = parallel.needs(tensors, range(parallel.ranks))
        host = plan_host(metas, cluster, free_device_bytes=free, cap=cap, needs=needs)
        found = predict_host(host, costs)
        result[method] = _as_dict(found) | {"bytes_into_a_host": found.bytes_in}
        lines += _as_text(method, found)
    title = (
        f"{checkpoint}: {result['bytes'] / 1e9:.2f} GB in {result['tensors']:,} tensors, "
        f"{world_size} ranks with up to {max(owned, default=0) / 1e9:.2f} GB of host memory each"
    )
    return Shown(result, "\n".join([title, *lines]))


def _as_dict(found: Prediction) -> dict[str, Any]:
    return {
        "seconds": found.seconds,
        "gigabytes_per_second": found.gigabytes_per_second,
        "buckets": len(found.plan.steps),
        "bucket_bytes": found.plan.bucket_bytes,
        "device_bytes": found.device_bytes,
        "bound_by": found.bound_by,
        "waiting_for": found.critical,
    }


def _as_text(method: str, found: Prediction) -> list[str]:
    waits = ", ".join(f"{name} {seconds:.3f}" for name, seconds in found.critical.items())
    return [
        f"{method:9} {found.seconds:8.3f} s {found.gigabytes_per_second:7.1f} GB/s, "
        f"{len(found.plan.steps)} buckets of up to {found.plan.bucket_bytes / 1e9:.2f} GB, "
        f"{found.device_bytes / 1e9:.2f} GB of each receiver's device",
        f"          waits, s: {waits}",
    ]
