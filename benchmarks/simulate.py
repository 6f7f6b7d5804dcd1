"""The simulator's figures beside measured and published ones.

    python benchmarks/simulate.py            # published tables, one H200, larger clusters
    python benchmarks/simulate.py --here     # updates on this machine's cores, measured now

What is assumed of each cluster and of the software stands below in capitals. ``--here`` measures
its inputs (copy, broadcast, loader, buffers) one by one, then whole updates with ``update.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import mmap
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import limits
import models
import torch
import torch.distributed as dist
from original import predict_original

from checkpoint_engine.data_types import ParameterMeta
from checkpoint_engine.device_utils import DeviceManager
from checkpoint_engine.handover.ipc import SharedBuffer
from checkpoint_engine.memory.checksum import checksum
from checkpoint_engine.settings import SHARED_MEMORY
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
    return predict(plan, cluster, costs, ranks, remote=ranks is not None)


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
                f"{row.model.name}, {theirs.total_bytes / 1e9:.0f} GB in {len(tensors):,}",
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
            cells.append(f"{found.seconds:.2f} ({found.buckets} buckets, {found.bound_by})")
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
    return f"{found.total_bytes / 1e9:.2f} GB in {found.tensors:,} tensors, {found.buckets} buckets"


# ---------------------------------------------------------------------- this machine's cores


MIB = 1 << 20
SIZES = [("small", 1), ("small", 2), ("moe", 1)]
"""Shapes and layers: 0.34, 0.69 and 1.25 GB."""


def here(world: int, transport: str) -> None:
    """So many ranks: the inputs, whole updates, and the inputs again. The fastest of several of
    each, since nothing else is alike from one second to the next on a machine that is shared."""
    os.environ["PS_CPU_TRANSPORT"] = transport
    before = launch(world, [__file__, "--inputs"])
    measured = {
        (shapes, layers, cap): measure_update(world, shapes, layers, cap)
        for shapes, layers in SIZES
        for cap in (4 * MIB, 16 * MIB)
    }
    inputs = fastest_inputs(before, launch(world, [__file__, "--inputs"]))
    cluster, costs = describe(inputs, world)
    cluster = dataclasses.replace(cluster, shared_memory=transport == SHARED_MEMORY)
    print(
        f"{world} ranks, {transport}: "
        + ", ".join(f"{name} {one:.3g}" for name, one in inputs.items())
    )
    rows = []
    for (shapes, layers, cap), seconds in measured.items():
        owners = owners_of(layers, world)
        found = simulate(layers_of(layers, shapes), cluster, costs, owners=owners, cap=cap)
        off = found.seconds / seconds - 1
        rows.append(
            [str(world), work_of(found), f"{seconds:.3f}", f"{found.seconds:.3f} ({off:+.0%})"]
        )
    show(["ranks", "update on this machine", "measured, s", "simulated, s"], rows)


def measure_update(world: int, shapes: str, layers: int, cap: int) -> float:
    script = str(Path(__file__).with_name("update.py"))
    options = ["--shapes", shapes, "--layers", str(layers), "--repeats", "8", "--checksum", "on"]
    phases = launch(world, [script, *options, "--bucket-gb", str(cap / GIB)])["phases"]
    return min(*next(one["all"] for one in phases if one["phase"] == "update"))


def owners_of(layers: int, world: int) -> list[int]:
    """The ranks to which ``update.py`` gives layers."""
    return [r for r in range(world) if layers * (r + 1) // world > layers * r // world]


RATES = ("copy", "memory", "load", "check", "broadcast")


def fastest_inputs(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: (max if name in RATES else min)(one[name], other[name]) for name in one}


def launch(world: int, command: list[str]) -> dict[str, Any]:
    """Run a script on so many ranks; what rank 0 writes to its ``--json``."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output.json")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += [f"--nproc-per-node={world}", f"--log-dir={folder}"]
        run = [*torchrun, *command, "--json", str(output)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PS_DEVICE": "cpu"}
        subprocess.run(run, check=True, env=environment, stdout=subprocess.DEVNULL)
        return json.loads(output.read_text())


def describe(inputs: dict[str, float], world: int) -> tuple[Cluster, Costs]:
    cluster = Cluster(
        gpus_per_node=world,
        nics_per_node=1,
        host_to_device=inputs["copy"],
        host_memory=inputs["memory"],
        nvlink=inputs.get("broadcast", 1.0),
        cores=os.cpu_count(),
        broadcast_cores=inputs.get("broadcast_cores", 0.0),
    )
    costs = Costs(
        per_tensor=inputs["per_tensor"],
        per_bucket=inputs["per_bucket"],
        bucket_cores=inputs["bucket_cores"],
        per_update=inputs["per_update"],
        load=inputs["load"],
        check=inputs["check"],
        per_buffer_gb=inputs["per_buffer_gb"],
    )
    return cluster, costs


def measure_inputs(nbytes: int = 16 << 20) -> dict[str, float]:
    """What all ranks and workers do at once in an update, the ranks do at once here: they share
    the memory, too. A copy is one owner's."""
    dist.init_process_group("gloo")
    # As large as a checkpoint, and at both ends of every copy: until a double buffer's half is used
    # again, all ranks' and workers' other buckets have been through the cache that they share.
    with SharedBuffer(DeviceManager("cpu"), 0, _COLD * nbytes) as shared:
        shared.unlink()
        buffers = list(shared.tensor.fill_(1).split(nbytes))
        memory = list(torch.ones(_COLD * nbytes, dtype=torch.uint8).split(nbytes))
        inputs = measure_loader(memory, buffers) | measure_buffers(2 * nbytes)
        dist.barrier()
        if dist.get_rank() == 0:
            seconds = each(lambda buffer, piece: buffer.copy_(piece), buffers, memory)
            inputs["copy"] = nbytes / 1e9 / seconds
            inputs["memory"] = limits.host_memcpy(_COLD * nbytes)
        dist.barrier()
        if dist.get_world_size() > 1:
            inputs |= measure_broadcast(buffers)
        del buffers
    dist.destroy_process_group()
    return inputs | measure_messages()


def measure_broadcast(buffers: list[torch.Tensor]) -> dict[str, float]:
    """By the group of an update, each rank looking meanwhile whether it is over."""
    from checkpoint_engine.distributed.weights_group import create_weights_group
    from checkpoint_engine.ground.deadline import poll

    ranks = list(range(dist.get_world_size()))
    store = dist.PrefixStore("measured", dist.distributed_c10d._get_default_store())
    device = torch.device("cpu")
    group = create_weights_group(
        "gloo", store, ranks, dist.get_rank(), "127.0.0.1", device, lambda: None
    )

    def broadcast(buffer: torch.Tensor, _: torch.Tensor) -> None:
        poll(group.broadcast(buffer, 0).is_completed, lambda: None)

    began, used = time.perf_counter(), cpu_seconds()
    seconds = each(broadcast, buffers, buffers)
    cores = torch.tensor((cpu_seconds() - used) / (time.perf_counter() - began))
    dist.all_reduce(cores)
    group.close()
    return {
        "broadcast": buffers[0].nbytes / 1e9 / seconds,
        "broadcast_cores": float(cores) / dist.get_world_size(),
    }


_COLD = 60


def each(
    action: Callable[[torch.Tensor, torch.Tensor], Any],
    some: list[torch.Tensor],
    others: list[torch.Tensor],
    together: bool = False,
) -> float:
    """Seconds of one call, over all pairs; the fastest of several rounds.

    Args:
        together: all ranks do it, each round at the same time.
    """
    pairs = list(zip(some, others, strict=True))
    begin = dist.barrier if together and dist.get_world_size() > 1 else lambda: None
    return fastest(lambda: [action(*pair) for pair in pairs], 5, begin) / len(pairs)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure_messages() -> dict[str, float]:
    """Updates of next to no bytes, in few and in many buckets."""
    from checkpoint_engine.ps import ParameterServer

    ps = ParameterServer()
    worker, worker_seconds = start_sink(int(os.environ["RANK"]))
    seconds, busy = {}, {}
    for buckets in (2, 66):
        tensors = {f"{i}": torch.zeros(256) for i in range(buckets)}
        os.environ["PS_MAX_BUCKET_SIZE_GB"] = str(1024 / GIB)
        ps.register_checkpoint(f"{buckets}", named_tensors=tensors if ps._rank == 0 else {})
        ps.gather_metas(f"{buckets}")

        def update(name: str = f"{buckets}") -> None:
            ps.update(name, lambda paths: worker(paths[ps._rank][1]))

        used = cpu_seconds() + worker_seconds()
        seconds[buckets] = fastest(update, repeats=_MANY)
        busy[buckets] = (cpu_seconds() + worker_seconds() - used) / _MANY
    per_bucket = (seconds[66] - seconds[2]) / 64
    return {
        "per_bucket": per_bucket,
        "bucket_cores": (busy[66] - busy[2]) / (seconds[66] - seconds[2]),
        "per_update": seconds[2] - 2 * per_bucket,
    }


_MANY = 30


def start_sink(rank: int) -> tuple[Callable[[str], None], Callable[[], float]]:
    """A worker in a process of its own that drops what it gets, and the CPU seconds that it has
    used."""
    import multiprocessing

    import zmq

    from checkpoint_engine.worker import update_weights_from_ipc

    ours, theirs = multiprocessing.Pipe()

    def serve() -> None:
        with zmq.Context() as context:
            while True:
                update_weights_from_ipc(context, theirs.recv(), rank, run=lambda weights: None)
                theirs.send(None)

    process = multiprocessing.get_context("fork").Process(target=serve, daemon=True)
    process.start()

    def receive(address: str) -> None:
        ours.send(address)
        ours.recv()

    def used() -> float:
        user, system = Path(f"/proc/{process.pid}/stat").read_text().split()[13:15]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    return receive, used


def measure_loader(memory: list[torch.Tensor], buffers: list[torch.Tensor]) -> dict[str, float]:
    """What ``update.py``'s worker does with a bucket of its tensors, and with empty ones."""
    size = 3 << 20
    count = buffers[0].nbytes // size
    empty = [torch.empty(0, dtype=torch.uint8) for _ in range(1000)]
    per_tensor = fastest(lambda: torch._foreach_copy_(empty, empty)) / 1000

    def load(piece: torch.Tensor, bucket: torch.Tensor) -> None:
        parameters, views = (list(one[: count * size].split(size)) for one in (piece, bucket))
        torch._foreach_copy_(parameters, views)

    seconds = each(lambda buffer, _: checksum(buffer, 0), buffers, memory, together=True)
    return {
        "load": count * size / 1e9 / each(load, memory, buffers, together=True),
        "check": buffers[0].nbytes / 1e9 / seconds,
        "per_tensor": per_tensor,
    }


def measure_buffers(nbytes: int) -> dict[str, float]:
    """Shared memory made by a server and mapped by its worker, touched by both, then dropped."""

    def make() -> None:
        buffer = SharedBuffer(DeviceManager("cpu"), 0, nbytes)
        rebuild, where = buffer.handle()
        mapped = rebuild(*where)
        buffer.unlink()
        buffer.tensor[:: mmap.PAGESIZE] = 1
        mapped[:: mmap.PAGESIZE].sum()
        buffer.close()

    return {"per_buffer_gb": fastest(make) / (nbytes / 1e9)}


def fastest(
    action: Callable[[], Any], repeats: int = 9, begin: Callable[[], Any] = lambda: None
) -> float:
    seconds = []
    for _ in range(repeats):
        begin()
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--here", action="store_true", help="measure on this machine's cores")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="for --here")
    parser.add_argument("--transport", choices=(SHARED_MEMORY, "gloo"), default=SHARED_MEMORY)
    parser.add_argument("--inputs", action="store_true", help="for --here: under torchrun")
    parser.add_argument("--json", help="for --inputs: where they go")
    arguments = parser.parse_args()
    if arguments.inputs:
        inputs = measure_inputs()
        if int(os.environ["RANK"]) == 0:
            Path(arguments.json).write_text(json.dumps(inputs))
    elif arguments.here:
        for world in arguments.ranks:
            here(world, arguments.transport)
    else:
        published()
        h200()
        scaled()


if __name__ == "__main__":
    main()
