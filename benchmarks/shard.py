"""Sharded updates against those of the group, between two hosts on a link of 1 Gbit/s.

    python benchmarks/shard.py --layers 16
    python benchmarks/shard.py --rows --layers 64
    python benchmarks/shard.py --plan

The hosts are network namespaces of this machine, made as the tests make theirs (root, iproute2).
Each has one rank, whose worker holds one half of the mini engine's model (TP 2). Every update is
compared with a plain load. The first two updates are left out: the workers learn meanwhile.

``--rows`` updates a model of whose bytes a third are matrices that hosts need by columns, 768 bytes
of each row. Would another order of a checkpoint's bytes be faster?

- whole rows: short gaps are read along, as always.
- pieces: what a host needs of each row is a read of its own.
- contiguous: each host needs as many bytes, whole rows: the best that another order could do.
- copies: whole rows, with ``PS_COLUMN_COPIES=1``.

``--plan`` moves nothing. It plans updates of many hosts on one rank, with Kimi-K2's experts and
eight ranks to a host: from the others' hellos to the plan for its host. Each row is of a process of
its own, so that "first" is the first plan that the process makes.

- new: the first update. No worker has stated what it needs.
- needs: the first update after the workers have.
- both: a checkpoint of another layout, for workers that have; "first" is of this one.
- exchange: what all ranks tell of their needs, as if each rank's worker needed something else, and
  what their hosts read of that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from plan import EXPERTS, make_metas  # noqa: E402

from checkpoint_engine.ground.needs import Needs, Region  # noqa: E402
from checkpoint_engine.planning.layouts import (  # noqa: E402
    Layout,
    decode_layouts,
    encode_layout,
    layout_digest,
)
from checkpoint_engine.planning.shards import SHORTEST_GAP  # noqa: E402
from checkpoint_engine.update.ways.peers import Peers  # noqa: E402
from checkpoint_engine.update.ways.shard import Shard  # noqa: E402
from checkpoint_engine.world.gathered import Gathered  # noqa: E402
from checkpoint_engine.world.hello import Hello  # noqa: E402
from hosts import Network, World  # noqa: E402

LEARNING = 2
ROWS = ["whole rows", "pieces", "contiguous", "copies"]
WORLDS = [(256, 256), (256, 1024), (1024, 1024)]  # owners, receivers
RANKS_OF_HOST = 8
KIMI_TENSORS = 60 * EXPERTS * 6  # the experts' alone
KIMI_KINDS = [
    (f"mlp.experts.{{}}.{part}_proj.{what}", dtype, shape)
    for part, rows, columns in (("gate", 16, 56), ("up", 16, 56), ("down", 56, 16))
    for what, dtype, shape in (
        ("weight", torch.float8_e4m3fn, (128 * rows, 128 * columns)),
        ("weight_scale_inv", torch.float32, (rows, columns)),
    )
]


def measure(
    program: str, megabits: int, transport: str = "auto", **arguments: Any
) -> list[dict[str, Any]]:
    """The results of both ranks of one of ``shard_programs.py``."""
    command = [str(TESTS / "shard_programs.py"), program, json.dumps(arguments)]
    with Network(2) as hosts, tempfile.TemporaryDirectory() as folder:
        for host in hosts if megabits else ():
            host.slow_down(megabits)
        env = {"PS_DEVICE": "cpu", "PS_TRANSPORT": transport}
        return World(hosts, Path(folder), command, 1, env).wait(600)


def print_results(name: str, results: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(results):
        seen = result["seen"][LEARNING:]
        assert all(one["right"] for one in result["seen"])
        seconds, way = [one["seconds"] for one in seen], seen[-1]["way"]
        received = statistics.median(one["received"] for one in seen)
        reading = statistics.median(one["reading"] for one in seen)
        ranges = result.get("ranges", [])
        reads = ""
        if ranges:
            each = len(ranges) / len(seen)
            reads = f", {each:.0f} reads of {statistics.mean(ranges):.0f} ranges, {reading:.3f} s"
        print(
            f"{name:10} rank {rank}: {way:9} {statistics.median(seconds):.3f} s "
            f"({min(seconds):.3f} to {max(seconds):.3f}), {received / 1e6:.1f} MB received, "
            f"{result['needed'] / 1e6:.1f} needed, {result['elsewhere'] / 1e6:.1f} MB owned "
            f"elsewhere{reads}",
            flush=True,
        )


def gathered_world(owners: int) -> Gathered:
    """What every rank knows after a gather: the layouts were decoded, as from the wire."""
    made = make_metas(KIMI_TENSORS, owners, KIMI_KINDS)
    blobs = {rank: encode_layout(Layout.of([one.memory_buffer_metas_list[0].metas]))
             for rank, one in made.items()}  # fmt: skip
    digests = tuple(map(layout_digest, blobs.values()))
    layouts = decode_layouts(digests, {}, blobs)
    for rank, one in made.items():
        one.memory_buffer_metas_list[0].metas = layouts[digests[rank]].buffers[0]
        one.rdma_device = f"mlx5_{rank % RANKS_OF_HOST}"
        one.p2p_store_addr = f"host-{rank // RANKS_OF_HOST}:{rank}"
    owned = {rank: layouts[digests[rank]] for rank in made}
    return Gathered(name="k2", metas=made, owned=owned, owner_layouts=digests, layouts=layouts)


def needs_of(gathered: Gathered, rank: int, receivers: int) -> Needs:
    """Of expert parallelism over all receivers: a worker reads its experts, whole."""
    read: dict[Any, list[Region]] = {}
    for owned in gathered.metas.values():
        for meta in owned.memory_buffer_metas_list[0].metas:
            expert = int(meta.name.split(".")[5])
            everything = Region(0, meta.dtype.itemsize * meta.shape.numel(), (), ())
            is_mine = expert % receivers == rank % EXPERTS
            read[meta.name, meta.dtype, meta.shape] = [everything] if is_mine else []
    needs = Needs.of(read)
    assert needs is not None
    return needs


class Told:
    """Stands in for a call of all ranks: what the others of this host tell."""

    def __init__(self, needs: list[Needs]) -> None:
        self._needs = needs

    def tell(self, key: str, value: bytes) -> None:
        pass

    def read(self, keys: list[str]) -> list[bytes]:
        return [self._needs[int(key.rpartition("/")[2])].text.encode() for key in keys]


def hellos_of(receivers: int, needs: list[Needs]) -> list[bytes]:
    """``needs``: of the ranks of the first host; empty: nobody has stated any."""
    found = []
    for rank in range(receivers):
        host, nic = rank // RANKS_OF_HOST, f"mlx5_{rank % RANKS_OF_HOST}"
        stated = needs[rank].digest if rank < len(needs) else f"{rank:064d}" if needs else ""
        hello = Hello(
            rank, "update", "k2", metas="", address="ipc:///tmp/socket-of-a-worker", nic=nic,
            free_bytes=60 << 30, free_beside=60 << 30, bucket_cap=8 << 30, joins_parts=True,
            maps_peers=True, host=f"host-{host}", neighbour=f"{host}/{rank}", transport="auto",
            reads="rdma", needs=stated, instance=f"rank {rank}", nonce="0" * 32,
        )  # fmt: skip
        found.append(hello.encode())
    return found


def shard_way(receivers: int) -> Shard:
    """Rank 0's, before its first update."""
    manager = SimpleNamespace(is_accelerator=True, device_type="cuda")
    here: Any = SimpleNamespace(rank=0, device_manager=manager, world_size=receivers)
    nobody: Any = SimpleNamespace(store=None)
    return Shard(here, nobody, Peers(here))


def seconds_of_plan(way: Shard, gathered: Gathered, told: list[bytes], needs: list[Needs]) -> float:
    """One rank's, from the hellos that it gets to what its host does: of this process's own time,
    as nothing here waits."""
    began = time.process_time()
    hellos = Hello.decode_all(told)
    refused = way.refusal(gathered, hellos)
    call: Any = Told(needs)
    way.prepare(call, hellos, needs[0].text if needs else "")
    plan = way.plan(gathered, hellos)
    taken = time.process_time() - began
    assert refused is None
    assert (plan.needs is None) == (not needs)
    return taken


def measure_plan(owners: int, receivers: int, repeats: int) -> str:
    gathered = gathered_world(owners)
    needs = [needs_of(gathered, rank, receivers) for rank in range(RANKS_OF_HOST)]
    nothing, everything = hellos_of(receivers, []), hellos_of(receivers, needs)
    told = receivers * statistics.mean(len(one.text) for one in needs) / 1e6
    seconds: dict[str, list[float]] = {"new": [], "needs": [], "both": []}
    for _ in range(repeats):
        world = replace(gathered)  # without what is cached
        seconds["both"].append(seconds_of_plan(shard_way(receivers), world, everything, needs))
        way, world = shard_way(receivers), replace(gathered)
        seconds["new"].append(seconds_of_plan(way, world, nothing, []))
        seconds["needs"].append(seconds_of_plan(way, world, everything, needs))
    columns = [f"{name} {statistics.median(some):.3f} s" for name, some in seconds.items()]
    return (
        f"{KIMI_TENSORS:,} tensors {owners:5} owners {receivers:5} receivers   "
        f"{'   '.join(columns)} (first {seconds['both'][0]:.3f})   "
        f"exchange {told:.2f} MB told, {told * (RANKS_OF_HOST - 1):.2f} MB read"
    )


def print_plans(repeats: int) -> None:
    for owners, receivers in WORLDS:
        command = [sys.executable, __file__, "--repeats", str(repeats)]
        subprocess.run([*command, "--world", str(owners), str(receivers)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=16, help="of 13.6 MB each; --rows: of 7 MB")
    parser.add_argument("--updates", type=int, default=7)
    parser.add_argument("--megabits", type=int, default=1000, help="of each link; 0: not shaped")
    parser.add_argument("--rows", action="store_true", help="column slices whose rows are short")
    parser.add_argument("--only", nargs="+", choices=ROWS, help="with --rows, these in turn")
    parser.add_argument("--plan", action="store_true", help="only plan, for many hosts")
    parser.add_argument("--world", type=int, nargs=2, help="only plan, for these owners, receivers")
    parser.add_argument("--repeats", type=int, default=7, help="of a plan")
    args = parser.parse_args()
    if args.world:
        print(measure_plan(*args.world, args.repeats), flush=True)
        return
    if args.plan:
        return print_plans(args.repeats)
    model = {"layers": args.layers, "updates": args.updates}
    if args.rows:
        for name in args.only or ROWS:
            gap = 0 if name in ("pieces", "contiguous") else SHORTEST_GAP
            copying = [0, 1] if name == "copies" else []
            order = {"gap": gap, "contiguous": name == "contiguous", "copying": copying}
            print_results(name, measure("short_rows", args.megabits, **model, **order))
        return
    for transport in ("group", "auto"):
        print_results(transport, measure("sharded", args.megabits, transport, tp=2, **model))


if __name__ == "__main__":
    main()
