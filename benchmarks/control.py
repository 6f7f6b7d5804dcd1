"""What it costs ranks to agree: the exchanges of a barrier, a gather and an update, alone.

    python benchmarks/control.py --ranks 64
    python benchmarks/control.py --ranks 1024 --light 64 --per-host 8

Every rank is a process that makes the calls that ``ParameterServer`` makes, in that order and with
words of that size, without weights and engines. With ``--light`` so many ranks are threads of one
process, each with its own connections; rank 0 has a process to itself. They decode the words of one
rank only, for elsewhere each has a core to decode all of them, and they wait long for one another.
All ranks are on this machine; with ``--per-host`` blocks of so many find one another as the ranks
of a host do. Printed for each call: its seconds on rank 0 from its begin to its end, medians; the
time that rank 0's process computed; and what went through rank 0's ports, as the kernel counts it:
packets with data that came, and bytes in and out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import secrets
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist  # noqa: F401  # before the ranks are forked

from checkpoint_engine.ground.deadline import Deadline
from checkpoint_engine.ground.sockets import connections, free_port_pair
from checkpoint_engine.world import call as call_module
from checkpoint_engine.world import exchange, liveness, store
from checkpoint_engine.world.call import Call
from checkpoint_engine.world.control import ControlPlane
from checkpoint_engine.world.hello import Hello
from checkpoint_engine.world.host import Host

HERE = "127.0.0.1"
TIMEOUT = 300.0
# A thousand light ranks share few cores: they look seldom, and wait for one another for as long as
# ranks with cores of their own never do.
_SELDOM, _PATIENCE = 0.5, 60.0
_TCP_INFO = 11  # of linux/tcp.h, which Python names from 3.12 on
_INFO_BYTES = 160
_BYTES_AT, _PACKETS_AT = 120, 152  # of tcpi_bytes_acked, after it _received; of tcpi_data_segs_in


@dataclass
class Traffic:
    """What went through rank 0's ports, and the time that its process computed."""

    packets_in: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0

    @staticmethod
    def so_far(ports: set[int]) -> Traffic:
        """Of this process, over the connections that are open."""
        traffic = Traffic(seconds=time.process_time())
        for one in connections():
            if one.getsockname()[1] in ports:
                info = one.getsockopt(6, _TCP_INFO, _INFO_BYTES)
                acknowledged, received = struct.unpack_from("=QQ", info, _BYTES_AT)
                traffic.bytes_out += acknowledged
                traffic.bytes_in += received
                traffic.packets_in += struct.unpack_from("=I", info, _PACKETS_AT)[0]
        return traffic

    def since(self, before: Traffic) -> list[float]:
        return [
            self.seconds - before.seconds,
            self.packets_in - before.packets_in,
            (self.bytes_in - before.bytes_in) / 1e6,
            (self.bytes_out - before.bytes_out) / 1e6,
        ]


class PartOfThisHost(Host):
    """Ranks meet in blocks of ``size``, as if each block had a host to itself."""

    size = 0

    def join(self, rank: int, size: int, secret: str, on_leader: Callable[[bool], None]) -> None:
        super().join(rank, size, f"{secret}-{rank // self.size}", on_leader)


class Rank:
    """One rank: a process, or a thread of one."""

    def __init__(self, rank: int, size: int, port: int) -> None:
        self.rank = rank
        self.plane = ControlPlane(rank, size, HERE, port)
        self.plane._number = 1  # threads of one process are no other worlds
        self._calls: list[tuple[str, Callable[[], None]]] = [
            ("barrier", self.barrier),
            ("gather", self.gather),
            ("update", self.update),
        ]

    def hello(self, call: str, **words: Any) -> Hello:
        return Hello(self.rank, call, **words)

    def barrier(self) -> None:
        with self.plane.call("store_based_barrier", TIMEOUT) as call:
            call.exchange(self.hello("store_based_barrier"))

    def gather(self) -> None:
        """As ``gather_metas`` where no layout has changed."""
        with self.plane.call("gather_metas", TIMEOUT, checkpoint="step") as call:
            place = (
                f'{{"p2p_store_addr": "{HERE}:15000", "ptrs": [{2**46}], "lease": "{"0" * 200}"}}'
            )
            words = {"place": place, "layout": "1" * 64, "known": "2" * 64}
            call.exchange(self.hello("gather_metas", checkpoint="step", **words))

    def update(self) -> None:
        """As an update between ranks of one host, whose workers map all ranks' memory."""
        with self.plane.call("update", TIMEOUT, checkpoint="step") as call:
            mine = self._update_hello()
            call.claim(mine)
            call.exchange(mine)
            call.watch()
            call.all_gather("peers", b"")
            self._stream(call)

    def _stream(self, call: Call) -> None:
        """Workers are asked and load: no exchanges, but looks at how the others are."""
        call.check()

    def _update_hello(self) -> Hello:
        run = "/run/user/0/checkpoint-engine/checkpoint-engine-"
        return self.hello(
            "update",
            checkpoint="step",
            metas="3" * 64,
            device=f"GPU-{self.rank:032x}",
            address=f"ipc://{run}{secrets.token_hex(8)}.sock",
            free_bytes=70_000_000_000 + secrets.randbelow(1 << 30),
            free_beside=69_000_000_000 + secrets.randbelow(1 << 30),
            nic="mlx5_0",
            host="10.0.0.1",
            joins_parts=True,
            maps_peers=True,
            neighbour=f"4026531836 {run}{secrets.token_hex(8)}.sock",
            needs="4" * 64,
            instance=f"rank {self.rank}",
            nonce=secrets.token_hex(16),
        )

    def run(self, repeats: int) -> Iterator[tuple[str, float]]:
        """The name and seconds of each call."""
        for _ in range(repeats):
            for name, make in self._calls:
                began = time.perf_counter()
                make()
                yield name, time.perf_counter() - began


def rank_0(size: int, port: int, repeats: int, pipe: Connection) -> None:
    """The first repeat is not counted: ranks connect in it."""
    rank = Rank(0, size, port)
    for _ in rank.run(1):
        pass
    world: Any = rank.plane._world
    ports = {port, world.liveness.port}
    measured: dict[str, list[list[float]]] = {}
    before = Traffic.so_far(ports)
    for name, seconds in rank.run(repeats):
        now = Traffic.so_far(ports)
        measured.setdefault(name, []).append([seconds, *now.since(before)])
        before = Traffic.so_far(ports)  # counting computes, too
    pipe.send(measured)
    pipe.recv()


def light_ranks(ranks: range, size: int, port: int, repeats: int, pipe: Connection) -> None:
    """Threads of this process."""
    if len(ranks) > 1:
        store._connection = _own_connection
        exchange.PAUSE = call_module.PAUSE = liveness._LOOK = _SELDOM
        Hello.decode_all = staticmethod(_decode_one)  # type: ignore[method-assign]
    made = [Rank(rank, size, port) for rank in ranks]
    for rank in made:  # one after the other: nobody could tell whose socket is whose
        rank.plane.store()
    threads = [threading.Thread(target=list, args=[rank.run(1 + repeats)]) for rank in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pipe.recv()


def _decode_one(blobs: Sequence[bytes]) -> list[Hello]:
    """Elsewhere each rank has a core to decode all of them."""
    return [Hello.decode(blobs[0])]


def _own_connection(rank: int, size: int, addr: str, port: int, deadline: Deadline) -> Any:
    """Ranks of one process would share one."""
    return store._Connection(store._await_port(addr, port, deadline), deadline)


def measure(size: int, light: int, repeats: int) -> dict[str, list[list[float]]]:
    context = multiprocessing.get_context("fork")
    port = free_port_pair()
    ours, theirs = context.Pipe()
    pipes, processes = (
        [ours],
        [context.Process(target=rank_0, args=(size, port, repeats, theirs), daemon=True)],
    )
    for first in range(1, size, light):
        ranks = range(first, min(first + light, size))
        ours, theirs = context.Pipe()
        pipes.append(ours)
        processes.append(
            context.Process(
                target=light_ranks, args=(ranks, size, port, repeats, theirs), daemon=True
            )
        )
    for process in processes:
        process.start()
    try:
        while not pipes[0].poll(1.0):
            if not processes[0].is_alive():
                raise RuntimeError("rank 0 has failed")
        measured: dict[str, list[list[float]]] = pipes[0].recv()
        for pipe in pipes:
            pipe.send("all are done")
        return measured
    finally:
        for process in processes:
            process.join(5.0)
            process.kill()
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--light", type=int, default=1, help="ranks of each other process")
    parser.add_argument("--per-host", type=int, default=0, help="default: all are on one host")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    if arguments.light > 1:
        exchange.UNRUNG = call_module.UNRUNG = _PATIENCE
        # torch asks for names, and answers are lost on a machine that is this busy.
        os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
    if arguments.per_host:
        PartOfThisHost.size = arguments.per_host
        store.Host = PartOfThisHost  # type: ignore[misc]
    measured = measure(arguments.ranks, arguments.light, arguments.repeats)
    print(f"{arguments.ranks} ranks    ms  of it computing  packets in  MB in  MB out")
    for name, rows in measured.items():
        seconds, computing, packets, inwards, outwards = map(
            statistics.median, zip(*rows, strict=True)
        )
        print(
            f"{name:10} {seconds * 1e3:8.1f} {computing * 1e3:12.1f} {packets:13.0f} "
            f"{inwards:9.3f} {outwards:7.3f}"
        )


if __name__ == "__main__":
    main()
