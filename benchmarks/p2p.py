"""An update by P2P beside a raw Mooncake read of the same bytes between the same two processes.

    python benchmarks/p2p.py --gb 2 --repeats 5

One process owns the checkpoint. This one joins in a world of its own, with a worker that copies
every tensor into resident memory. Reads and updates take turns; what counts is the ratio of their
medians. Two raw reads are shown: Mooncake's synchronous call, which spins on a core while it waits,
and its asynchronous one, a look every 0.2 ms. The ratio is to the faster of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from worker_process import CopyingEngine, WorkerProcess

from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.world.metas_file import decode_metas, encode_metas

NAME = "benchmark"
SHAPE = (768, 2048)  # one expert's projection in Qwen3-30B-A3B
TENSOR_BYTES = 2 * SHAPE[0] * SHAPE[1]


def make_tensors(count: int) -> dict[str, torch.Tensor]:
    """Random finite numbers, of which every tensor is another piece."""
    noise = torch.randint(
        0, 2**14, (3 * TENSOR_BYTES,), dtype=torch.int16, generator=torch.Generator().manual_seed(1)
    )
    size = TENSOR_BYTES // 2
    return {
        f"experts.{number}.weight": noise[start : start + size].view(torch.bfloat16).view(SHAPE)
        for number in range(count)
        for start in [number * 7919 % (noise.numel() - size)]
    }


class Engine(CopyingEngine):
    """What the worker's process serves."""

    def __init__(self, count: int) -> None:
        torch.set_num_threads(1)  # the other core is for the transport
        self._expected = make_tensors(count)
        super().__init__({name: SHAPE for name in self._expected})

    def check(self) -> list[str]:
        return self.wrong(self._expected)


def own(count: int) -> None:
    """The other process: hold the checkpoint until standard input ends."""
    ps = ParameterServer(rank=0, world_size=1)
    ps.register_checkpoint(NAME, named_tensors=make_tensors(count))
    ps.gather_metas(NAME)
    sys.stdout.buffer.write(encode_metas(ps.get_metas()) + b"\n")
    sys.stdout.flush()
    sys.stdin.read()


@contextmanager
def owner(count: int) -> Iterator[bytes]:
    """The other process's metas, while it lives."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--own", str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdout.readline()
    finally:
        process.stdin.close()
        process.wait(30)


class RawReader:
    """Mooncake and nothing else, reading into memory that has been touched before."""

    def __init__(self, ps: ParameterServer) -> None:
        from mooncake.engine import TransferEngine

        (owned,) = ps.get_metas().values()
        self._source = str(owned.p2p_store_addr)
        self._buffers = owned.memory_buffer_metas_list
        self._target = torch.zeros(sum(b.size for b in self._buffers), dtype=torch.uint8)
        store = ps._p2p_store
        if store is None:
            raise SystemExit(f"no P2P: {ps._p2p_missing}")
        self._engine = TransferEngine()
        host = store.addr.rpartition(":")[0].strip("[]")
        _check(self._engine.initialize(host, "P2PHANDSHAKE", store.protocol, store.device))
        if store.needs_registered_targets:
            _check(self._engine.register_memory(self._target.data_ptr(), self._target.nbytes))

    @property
    def nbytes(self) -> int:
        return self._target.nbytes

    def read(self) -> None:
        """One call for everything."""
        _check(self._engine.batch_transfer_sync_read(self._source, *self._request()))

    def read_and_poll(self) -> None:
        """A call per host buffer: a batch's status is that of its first request."""
        batches = [
            self._engine.batch_transfer_async_read(self._source, [to], [start], [size])
            for to, start, size in zip(*self._request(), strict=True)
        ]
        for batch in batches:
            while (status := self._engine.transfer_check_status(batch)) == 0:
                time.sleep(0.0002)
            _check(status - 1)

    def _request(self) -> tuple[list[int], list[int], list[int]]:
        local, remote, sizes = [], [], []
        start = self._target.data_ptr()
        for buffer in self._buffers:
            local.append(start)
            remote.append(buffer.ptr)
            sizes.append(buffer.size)
            start += buffer.size
        return local, remote, sizes


def _check(code: int) -> None:
    if code != 0:
        raise SystemExit(f"Mooncake's code {code}")


class Benchmark:
    """Takes turns and keeps the seconds."""

    def __init__(self, metas: bytes, worker: WorkerProcess) -> None:
        self._worker = worker
        self._ps = ParameterServer(rank=0, world_size=1)
        self._ps.gather_metas(NAME)
        self._ps.load_metas(decode_metas(metas))
        self.raw = RawReader(self._ps)
        self.seconds: dict[str, list[float]] = {}
        self.phases: dict[str, list[float]] = {}

    def run(self, repeats: int) -> None:
        for turn in range(repeats + 1):
            for what in (self.raw.read, self.raw.read_and_poll, self._update):
                began = time.perf_counter()
                what()
                seconds = time.perf_counter() - began
                if turn > 0:  # the first one connects and touches memory
                    self.seconds.setdefault(what.__name__.strip("_"), []).append(seconds)
            wrong = self._worker.call("check")
            if wrong:
                raise SystemExit(f"{len(wrong)} tensors differ: {wrong[:3]}")

    def _update(self) -> None:
        report = self._ps.update(
            NAME, lambda paths: self._worker.call("update", paths[0][1]), ranks=[0]
        )
        for phase, seconds in report.phases.items():
            self.phases.setdefault(phase, []).append(seconds)

    def table(self) -> dict[str, Any]:
        medians = {name: statistics.median(seconds) for name, seconds in self.seconds.items()}
        return {
            "bytes": self.raw.nbytes,
            "seconds": self.seconds,
            "medians": medians,
            "ratio": medians["update"] / min(medians["read"], medians["read_and_poll"]),
            "ratio to read": medians["update"] / medians["read"],
            "phases": {name: statistics.median(all_) for name, all_ in self.phases.items()},
        }


def show(table: dict[str, Any]) -> None:
    print(f"{table['bytes'] / 1e9:.3f} GB")
    for name, seconds in table["seconds"].items():
        median = table["medians"][name]
        rate = table["bytes"] / 1e9 / median
        spread = f"{min(seconds):.3f}..{max(seconds):.3f} s"
        print(f"{name:16} {median:7.3f} s {rate:6.2f} GB/s   n={len(seconds)} {spread}")
    phases = {name: round(seconds, 3) for name, seconds in table["phases"].items()}
    print(f"phases of the update: {json.dumps(phases)}")
    for name in ("ratio", "ratio to read"):
        print(f"{name:16} {table[name]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=2.0, help="size of the checkpoint, 10^9 bytes")
    parser.add_argument("--bucket-gb", type=float, default=2**-5, help="largest bucket, GiB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the table there too")
    parser.add_argument("--own", type=int, metavar="TENSORS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.own is not None:
        return own(arguments.own)
    os.environ["PS_MAX_BUCKET_SIZE_GB"] = f"{arguments.bucket_gb:g}"
    count = max(1, round(arguments.gb * 1e9 / TENSOR_BYTES))
    worker = WorkerProcess(Engine, count)
    with owner(count) as metas:
        benchmark = Benchmark(metas, worker)
        benchmark.run(arguments.repeats)
    table = benchmark.table()
    show(table)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
