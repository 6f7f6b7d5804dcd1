"""``checkpoint-engine plan``: what an update would take, without a GPU and without the bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from checkpoint_engine.cli.output import Positive, Shown, shown
from checkpoint_engine.settings import GIB
from checkpoint_engine.tools.simulate.cluster import Cluster, Costs

if TYPE_CHECKING:
    from checkpoint_engine.tools.simulate.update import Prediction

_UNITS = {
    "host_to_device": "GB/s of pinned memory to one device (PCIe)",
    "host_memory": "GB/s that a node's devices together can read of host memory",
    "nvlink": "GB/s of a broadcast within a node",
    "nic": "GB/s of one NIC",
    "device_memory": "GB/s of a copy within a device",
    "hop": "seconds that each further node adds to a broadcast",
    "per_tensor": "seconds of the engine's loader for a tensor: 60e-6 for vLLM's, 5e-6 replayed",
    "per_bucket": "seconds between two buckets",
    "check": "GB/s at which workers check the sums of a bucket",
    "per_update": "seconds of what happens once",
}
_GIGABYTES = Positive(1 << 30)
_FOUND = ("seconds", "gigabytes_per_second", "buckets", "bucket_bytes", "device_bytes", "bound_by")


def _describing_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """An option for each rate and cost, with the default of ``Cluster`` or ``Costs``."""
    for field in (*fields(Costs), *fields(Cluster)):
        if field.name in _UNITS:
            name = f"--{field.name.replace('_', '-')}"
            kind: dict[str, Any] = {"type": float, "default": field.default, "show_default": True}
            function = click.option(name, **kind, help=_UNITS[field.name])(function)
    return function


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option("--world-size", type=click.IntRange(1), required=True, help="Ranks, one per GPU.")
@click.option("--gpus-per-node", type=click.IntRange(1), default=8, show_default=True)
@click.option("--nics-per-node", type=click.IntRange(1), default=8, show_default=True)
@click.option("--receivers", type=click.IntRange(1), help="Ranks of a P2P update. Default: all.")
@click.option("--free-gb", type=_GIGABYTES, default=40.0, show_default=True,
              help="GiB that buffers may take on the fullest device.")  # fmt: skip
@click.option(
    "--bucket-gb", type=_GIGABYTES, default=8.0, show_default=True, help="PS_MAX_BUCKET_SIZE_GB."
)
@_describing_options
@shown
def plan(
    checkpoint: Path,
    world_size: int,
    gpus_per_node: int,
    nics_per_node: int,
    receivers: int | None,
    free_gb: float,
    bucket_gb: float,
    **rates: float,
) -> Shown:
    """Predict an update of CHECKPOINT, a safetensors file or the folder of a checkpoint.

    Reads only their headers; needs no GPU. The cluster is described by the options, the workers
    are this library's and not new: tensors larger than a bucket are broadcast in parts.
    """
    # These import torch, which takes longer than completion may.
    from checkpoint_engine.tools.simulate.update import make_plan, predict, read_headers, share_out

    per_node = min(gpus_per_node, world_size)
    cluster = Cluster(-(-world_size // per_node), per_node, nics_per_node, **_of(Cluster, rates))
    costs = Costs(**_of(Costs, rates))
    room: dict[str, Any] = {"free_device_bytes": int(free_gb * GIB), "cap": int(bucket_gb * GIB)}
    members = range(min(receivers or world_size, world_size))
    metas = share_out(read_headers(checkpoint), range(world_size))
    owned = [sum(b.size for b in owner.memory_buffer_metas_list) for owner in metas.values()]
    broadcast = make_plan(metas, cluster, **room)
    p2p = make_plan(metas, cluster, **room, receivers=members)
    result = {
        "checkpoint": str(checkpoint),
        "tensors": broadcast.tensor_count,
        "bytes": broadcast.total_bytes,
        "world_size": world_size,
        "host_bytes_of_a_rank": max(owned, default=0),
        "cluster": asdict(cluster),
        "broadcast": _as_dict(predict(broadcast, cluster, costs)),
        "p2p": _as_dict(predict(p2p, cluster, costs, members, remote=True)),
    }
    return Shown(result, _as_text(result))


def _of(kind: type, rates: dict[str, float]) -> dict[str, Any]:
    return {field.name: rates[field.name] for field in fields(kind) if field.name in rates}


def _as_dict(found: Prediction) -> dict[str, Any]:
    return {name: getattr(found, name) for name in _FOUND} | {"waiting_for": found.critical}


def _gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def _as_text(result: dict[str, Any]) -> str:
    lines = [
        f"{result['checkpoint']}: {_gigabytes(result['bytes'])} in {result['tensors']:,} tensors, "
        f"{result['world_size']} ranks with up to "
        f"{_gigabytes(result['host_bytes_of_a_rank'])} of host memory each"
    ]
    for method in ("broadcast", "p2p"):
        found = result[method]
        waits = ", ".join(f"{name} {seconds:.3f}" for name, seconds in found["waiting_for"].items())
        lines += [
            f"{method:9} {found['seconds']:8.3f} s {found['gigabytes_per_second']:7.1f} GB/s, "
            f"{found['buckets']} buckets of up to {_gigabytes(found['bucket_bytes'])}, "
            f"{_gigabytes(found['device_bytes'])} of each receiver's device",
            f"          waits, s: {waits}",
        ]
    return "\n".join(lines)
