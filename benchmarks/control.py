"""What it costs that all ranks agree on an update, without a GPU and without weights.

    python benchmarks/control.py --ranks 8 16 48 64       # each rank a process of its own
    python benchmarks/control.py --ranks 256 1024 --light # ranks are threads of a few processes

Every rank makes the exchanges of an update between ranks of one host: the claim, the hellos, what
``Peers`` asks, and the end; with ``--rounds 1`` it makes those of an update between hosts that have
kept their group. Printed per update: seconds; CPU seconds of rank 0's process, which serves the
others, and of all; bytes and requests, in and out, at the ports of rank 0. Rank 0 is always a
process of its own. Light ranks run the same code and have connections of their own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import struct
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from checkpoint_engine.ground.sockets import connections
from checkpoint_engine.world.control import ControlPlane
from checkpoint_engine.world.hello import Hello

PATIENCE = 600.0  # seconds
RANKS_PER_HOST = 8
_PORTS = 1 << 14  # what rank 0 listens at lies above


@dataclass(frozen=True)
class Load:
    """What the ranks do, and how they are spread over processes."""

    ranks: int
    rounds: int
    repeats: int
    port: int
    is_light: bool

    def processes(self) -> list[range]:
        """The ranks of each process; rank 0 is alone."""
        each = 64 if self.is_light else 1
        starts = range(1, self.ranks, each)
        return [range(1), *(range(at, min(at + each, self.ranks)) for at in starts)]


def hello_of(rank: int) -> Hello:
    """As long, and as random, as that of a rank with a GPU and an NIC."""
    host = rank // RANKS_PER_HOST
    return Hello(
        rank,
        "update",
        "step-1000",
        on_instance_failure="abort",
        compare_ranks=False,
        metas="5e" * 32,
        device=f"GPU-{uuid.uuid4()}",
        address=f"ipc:///tmp/checkpoint-engine-{uuid.uuid4().hex}/socket",
        free_bytes=70 << 30,
        free_beside=70 << 30,
        bucket_cap=8 << 30,
        nic=f"mlx5_{rank % RANKS_PER_HOST}",
        host=f"10.0.{host // 256}.{host % 256}",
        joins_parts=True,
        maps_peers=True,
        neighbour=f"host-{host}/{uuid.uuid4().hex}",
        instance=f"http://10.0.{host // 256}.{host % 256}:30000",
        nonce=uuid.uuid4().hex,
    )


def update(plane: ControlPlane, load: Load) -> None:
    """The exchanges of one update."""
    with plane.call("update", PATIENCE, None, "step-1000") as call:
        mine = hello_of(plane.rank)
        call.claim(mine)
        call.exchange(mine)
        call.watch()
        for number in range(1, load.rounds):
            call.all_gather(f"round-{number}", b"")


# ---------------------------------------------------------------------- what passes rank 0


def traffic(ports: set[int]) -> tuple[int, int]:
    """Bytes that rank 0's ends of all connections have received and sent; those to itself too."""
    received = sent = 0
    for one in connections():
        if one.getsockname()[1] in ports:
            info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            acked, got = struct.unpack_from("QQ", info, 120)
            received, sent = received + got, sent + acked
    return received, sent


def requests() -> Callable[[], int]:
    """Counts from now on what this process's clients ask of the store."""
    import torch.distributed as dist

    count = 0

    def counted(name: str) -> None:
        method = getattr(dist.PrefixStore, name)

        def count_and_call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return method(*args, **kwargs)

        setattr(dist.PrefixStore, name, count_and_call)

    for name in ("set", "get", "add", "check", "compare_set", "delete_key", "multi_get", "wait"):
        setattr(dist.PrefixStore, name, getattr(dist.PrefixStore, name))
        counted(name)
    return lambda: count


# ---------------------------------------------------------------------- ranks


def run_rank(rank: int, load: Load, addr: str, note: Callable[[dict[str, float]], None]) -> None:
    plane = ControlPlane(rank, load.ranks, addr, load.port)
    update(plane, load)
    update(plane, load)
    ports: set[int] = set()
    if rank == 0:
        liveness: Any = plane._world.liveness  # type: ignore[union-attr]  # connected by now
        ports = {load.port, liveness.port}
    before = traffic(ports)
    cpu, began = time.process_time(), time.monotonic()
    for _ in range(load.repeats):
        update(plane, load)
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    after = traffic(ports)
    note(
        {
            "seconds": seconds / load.repeats,
            "cpu": cpu / load.repeats,
            "in": (after[0] - before[0]) / load.repeats,
            "out": (after[1] - before[1]) / load.repeats,
        }
    )


def run_process(ranks: range, load: Load, pipe: Connection) -> None:
    """Light ranks reach rank 0 by addresses of their own, for this process keeps one connection
    to each."""
    sys.setswitchinterval(0.001)
    count = requests()
    found: dict[int, dict[str, float]] = {}
    threads = [
        threading.Thread(
            target=run_rank,
            args=(rank, load, f"127.1.{rank // 250}.{rank % 250 + 1}", _noting(found, rank)),
        )
        for rank in ranks
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    asked = count() * load.repeats / (load.repeats + 2)  # those to warm up, too
    pipe.send((found.get(ranks[0]), asked / load.repeats))
    pipe.recv()  # rank 0 stays until all are done


def _noting(found: dict[int, dict[str, float]], rank: int) -> Callable[[dict[str, float]], None]:
    return lambda figures: found.update({rank: figures})


def measure(load: Load) -> str:
    """One line of the table."""
    context = multiprocessing.get_context("fork")
    pipes = []
    processes = []
    for ranks in load.processes():
        ours, theirs = context.Pipe()
        processes.append(
            context.Process(target=run_process, args=(ranks, load, theirs), daemon=True)
        )
        processes[-1].start()
        pipes.append(ours)
    try:
        told = [pipe.recv() if pipe.poll(PATIENCE) else (None, 0.0) for pipe in pipes]
        if any(figures is None for figures, _ in told):
            raise SystemExit("a rank failed, see above")
    finally:
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.close()
            process.terminate()
            process.join()
    first = told[0][0]
    cpu = sum(figures["cpu"] for figures, _ in told)
    asked = sum(count for _, count in told)
    return (
        f"| {load.ranks} | {1e3 * first['seconds']:.1f} | {1e3 * first['cpu']:.1f} | "
        f"{1e3 * cpu:.1f} | {first['in'] / 1e3:.1f} | {first['out'] / 1e3:.1f} | {asked:.0f} |"
    )


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 48, 64])
    parser.add_argument("--rounds", type=int, default=2, help="exchanges of all ranks' values")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--light", action="store_true", help="ranks as threads")
    arguments = parser.parse_args()
    print("| ranks | ms | rank 0's CPU ms | all CPU ms | KB in | KB out | requests |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for ranks in arguments.ranks:
        load = Load(ranks, arguments.rounds, arguments.repeats, free_port(), arguments.light)
        print(measure(load), flush=True)


if __name__ == "__main__":
    main()
