"""Updates of all ranks of one host, beside what its devices could do in the same run.

    torchrun --nproc-per-node 2 benchmarks/gpus.py --gb 14.95 --replay
    torchrun --nproc-per-node 2 benchmarks/gpus.py --gb 14.95 --shard --replay

Each rank owns every Nth tensor of a checkpoint with the shapes of Qwen3-30B-A3B, and has a worker
process on its own device, which keeps every tensor, or with ``--shard`` the Nth of it that a
tensor-parallel worker keeps. ``--replay`` has the worker's loader learned. Everything is checked at
the end. Rank 0 prints the seconds of the slowest rank, the way that was taken, and the limits: what
all devices copy at once from as much pinned memory, and from the checkpoint's own, which may lie at
another processor; and a bare loop of that and of reading what the workers keep out of every rank's
buffers, without this library.

It uses what releases of the original have, too: put one first on ``PYTHONPATH`` to measure that.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import pickle
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context
from torch.multiprocessing.reductions import reduce_tensor

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
LOCAL = int(os.environ.get("LOCAL_RANK", "0"))
CUDA = torch.cuda.is_available() and os.environ.get("PS_DEVICE") != "cpu"
DEVICE = f"cuda:{LOCAL}" if CUDA else "cpu"
CHUNK = 256 << 20
Shapes = list[tuple[str, tuple[int, ...]]]


def shapes_of(gigabytes: float, experts: int) -> Shapes:
    """Layers of Qwen3-30B-A3B until there are so many bytes."""
    found: Shapes = []
    total = layer = 0
    while total < gigabytes * 1e9:
        prefix = f"model.layers.{layer}."
        one: Shapes = [
            ("self_attn.q_proj.weight", (4096, 2048)),
            ("self_attn.k_proj.weight", (512, 2048)),
            ("self_attn.v_proj.weight", (512, 2048)),
            ("self_attn.o_proj.weight", (2048, 4096)),
            ("input_layernorm.weight", (2048,)),
            ("post_attention_layernorm.weight", (2048,)),
        ]
        for expert in range(experts):
            parts = [("gate_proj", (768, 2048)), ("up_proj", (768, 2048))]
            parts.append(("down_proj", (2048, 768)))
            one += [(f"mlp.experts.{expert}.{name}.weight", shape) for name, shape in parts]
        found += [(prefix + name, shape) for name, shape in one]
        total += sum(2 * torch.Size(shape).numel() for _, shape in one)
        layer += 1
    return found


def part_of(name: str, tensor: torch.Tensor, shard: bool) -> torch.Tensor:
    """What this rank's worker keeps of a tensor."""
    if tensor.dim() < 2 or not shard:
        return tensor
    dim = 1 if "down_proj" in name or "o_proj" in name else 0
    length = tensor.shape[dim] // WORLD_SIZE
    return tensor.narrow(dim, RANK * length, length)


class Noise:
    """The checkpoint's numbers, the same in every process."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._base = torch.randint(-(2**15), 2**15 - 1, (1 << 25,), generator=generator).short()

    def tensor(self, number: int, shape: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        start = number * 7919 * 64 % (self._base.numel() - count)
        return self._base[start : start + count].view(torch.bfloat16).view(shape)


class Model(torch.nn.Module):
    def __init__(self, shapes: Shapes, shard: bool) -> None:
        super().__init__()
        self._shard = shard
        self.kept = torch.nn.ParameterDict()
        for name, shape in shapes:
            whole = torch.empty(shape, dtype=torch.bfloat16, device="meta")
            part = torch.zeros_like(part_of(name, whole, shard), device=DEVICE)
            part = part.contiguous()
            self.kept[name.replace(".", "/")] = torch.nn.Parameter(part, requires_grad=False)

    def load_weights(self, weights: Any) -> None:
        for name, tensor in weights:
            self.kept[name.replace(".", "/")].copy_(part_of(name, tensor, self._shard))


def serve(shapes: Shapes, options: argparse.Namespace, asked: Any, answers: Any) -> None:
    """The worker's process."""
    import zmq

    from checkpoint_engine.worker import update_weights_from_ipc

    if CUDA:
        torch.cuda.set_device(LOCAL)
    torch.set_num_threads(1)
    model = Model(shapes, options.shard)
    loader: Any = model.load_weights
    context = zmq.Context()
    answers.put("ready")
    while (task := asked.get()) is not None:
        if task == "check":
            sums = {
                name.replace("/", "."): kept.view(torch.int16).sum(dtype=torch.int64).item()
                for name, kept in model.kept.items()
            }
            answers.put(sums)
            continue
        if options.replay:
            from checkpoint_engine.replay import replayed

            loader = replayed(model.load_weights, model)
        try:
            update_weights_from_ipc(context, task, LOCAL if CUDA else None, run=loader)
            answers.put(getattr(loader, "report", {}))
        except Exception as error:
            answers.put(f"worker {RANK}: {error!r:.500}")


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def timed(action: Callable[[], Any], repeats: int = 4) -> float:
    """Seconds of the slowest rank in the fastest of several calls, after one that warms up."""
    action()
    best = float("inf")
    for _ in range(repeats):
        synchronize()
        barrier()
        began = time.perf_counter()
        action()
        synchronize()
        best = min(best, slowest(time.perf_counter() - began))
    return best


def slowest(seconds: float) -> float:
    return max(gathered(seconds))


class Meeting:
    """All ranks, without torch's default group: the original ends that one after each update."""

    def __init__(self) -> None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = dist.TCPStore(host, port + 77, WORLD_SIZE, RANK == 0)
        self._count = 0

    def gather(self, value: Any) -> list[Any]:
        self._count += 1
        self._store.set(f"{self._count}/{RANK}", pickle.dumps(value))
        keys = [f"{self._count}/{rank}" for rank in range(WORLD_SIZE)]
        return [pickle.loads(self._store.get(key)) for key in keys]


@functools.cache
def meeting() -> Meeting:
    return Meeting()


def gathered(value: Any) -> list[Any]:
    return meeting().gather(value)


def barrier() -> None:
    gathered(None)


def measure_limits(total: int, shard: bool) -> dict[str, float]:
    """GB/s of all devices copying at once, and seconds of a bare loop over ``total`` bytes."""
    stage = [torch.zeros(CHUNK, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    steps = max(1, total // CHUNK // WORLD_SIZE)
    source = torch.empty(steps * CHUNK, dtype=torch.uint8, pin_memory=CUDA).fill_(3)
    chunks = source.split(CHUNK)
    limits = {"copies together GB/s": copies_together([source], stage)}
    if not CUDA or WORLD_SIZE == 1:
        return limits
    handles = gathered([reduce_tensor(one) for one in stage])
    peers = [
        stage if rank == RANK else [opened_here(*one) for one in handles[rank]]
        for rank in range(WORLD_SIZE)
    ]
    length = CHUNK // WORLD_SIZE if shard else CHUNK
    begin = RANK * length if shard else 0
    kept = torch.empty(length, dtype=torch.uint8, device=DEVICE)
    copying, reading = torch.cuda.Stream(), torch.cuda.Stream()

    def fill(number: int) -> Any:
        with torch.cuda.stream(copying):
            stage[number % 2].copy_(chunks[number], non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            return event

    def loop() -> None:
        event = fill(0)
        for number in range(steps):
            event.synchronize()
            barrier()  # all are full, and nobody reads what is written next
            if number + 1 < steps:
                event = fill(number + 1)
            with torch.cuda.stream(reading):
                for peer in peers:
                    kept.copy_(peer[number % 2][begin : begin + length], non_blocking=True)
            reading.synchronize()

    limits["bare loop s"] = timed(loop, 3) * total / (steps * CHUNK * WORLD_SIZE)
    barrier()
    peers.clear()
    return limits


def copies_together(sources: list[torch.Tensor], stage: list[torch.Tensor]) -> float:
    """GB/s of all ranks' devices, each out of its own ``sources``, of bytes."""
    chunks = [chunk for source in sources for chunk in source.split(CHUNK)]

    def copy() -> None:
        for number, chunk in enumerate(chunks):
            stage[number % 2][: len(chunk)].copy_(chunk, non_blocking=True)

    nbytes = sum(gathered(sum(map(len, chunks))))
    return nbytes / 1e9 / timed(copy)


def copies_of_its_own() -> float:
    """The same out of the memory that the server has pinned, whichever implementation it is."""
    if not CUDA:
        return 0.0
    tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor and not one.is_cuda]
    pinned = [one.untyped_storage() for one in tensors if one.numel() and one.is_pinned()]
    storages = {storage.data_ptr(): storage for storage in pinned if storage.nbytes() > CHUNK}
    sources = [torch.empty(0, dtype=torch.uint8).set_(one) for one in storages.values()]
    stage = [torch.zeros(CHUNK, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    return copies_together(sources, stage)


def opened_here(rebuild: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """A peer's memory, mapped by this rank's device alone, as a worker maps it. torch would also
    make a context on the peer's device, which a server rank does not have."""
    return rebuild(*args[:6], LOCAL, *args[7:14], False)


class FreeMemory:
    """Of this rank's device, in bytes: before, the lowest while this is entered, and now."""

    def __init__(self) -> None:
        self.before = self.lowest = self.now()

    def __enter__(self) -> FreeMemory:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.lowest = min(self.lowest, self.now())

    def now(self) -> int:
        return torch.cuda.mem_get_info(LOCAL)[0] if CUDA else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=14.95)
    parser.add_argument("--experts", type=int, default=128, help="of a layer")
    parser.add_argument("--repeats", type=int, default=5, help="updates that count")
    parser.add_argument("--shard", action="store_true", help="workers keep an Nth")
    parser.add_argument("--replay", action="store_true", help="workers' loaders are learned")
    parser.add_argument("--auto-pg", type=json.loads, default=True, help="true, false or null")
    parser.add_argument("--table", action="store_true", help="print the last update's phases")
    options = parser.parse_args()
    os.environ.setdefault("PS_MAX_BUCKET_SIZE_GB", "2")
    shapes = shapes_of(options.gb, options.experts)
    context = get_context("spawn")
    asked, answers = context.Queue(), context.Queue()
    worker = context.Process(target=serve, args=(shapes, options, asked, answers), daemon=True)
    worker.start()
    if CUDA:
        torch.cuda.set_device(LOCAL)
    total = sum(2 * torch.Size(shape).numel() for _, shape in shapes)
    answers.get(timeout=300)  # first: a worker that starts would slow the copies down
    limits = measure_limits(total, options.shard)
    if CUDA:
        torch.cuda.empty_cache()
    result = run(options, shapes, total, asked, answers)
    asked.put(None)
    if RANK == 0:
        print(json.dumps({"device": device_name(), **limits, **result}), flush=True)
        if options.table:
            print(result["table"], file=sys.stderr)
    barrier()
    worker.join(20)
    os._exit(1 if result["wrong"] else 0)  # a group of the original's may hang


def device_name() -> str:
    return torch.cuda.get_device_name(LOCAL) if CUDA else "cpu"


def run(
    options: argparse.Namespace, shapes: Shapes, total: int, asked: Any, answers: Any
) -> dict[str, Any]:
    from checkpoint_engine.ps import ParameterServer

    noise = Noise(1)
    mine = {
        name: noise.tensor(number, shape).clone()
        for number, (name, shape) in enumerate(shapes)
        if number % WORLD_SIZE == RANK
    }
    server = ParameterServer(auto_pg=options.auto_pg)

    def ask(paths: list[tuple[str, str]]) -> None:
        asked.put(paths[RANK][1])
        if isinstance(told := answers.get(timeout=120), str):
            raise RuntimeError(told)
        said.append(told)

    def measured(action: Callable[[], Any]) -> float:
        nonlocal report
        barrier()
        began = time.perf_counter()
        report = action()
        return slowest(time.perf_counter() - began)

    report: Any = None
    said: list[Any] = []
    registering = measured(lambda: server.register_checkpoint("benchmark", named_tensors=mine))
    gathering = measured(lambda: server.gather_metas("benchmark"))
    updates = [measured(lambda: server.update("benchmark", ask)) for _ in range(2)]  # it learns
    memory = FreeMemory()
    with memory:  # not timed: to look takes the driver's locks
        server.update("benchmark", ask)
    updates += [measured(lambda: server.update("benchmark", ask)) for _ in range(options.repeats)]
    free = [memory.before, memory.lowest, memory.now()]
    asked.put("check")
    found = answers.get(timeout=120)
    wrong = 0
    for number, (name, shape) in enumerate(shapes):
        part = part_of(name, noise.tensor(number, shape), options.shard).contiguous()
        wrong += found[name] != part.view(torch.int16).sum(dtype=torch.int64).item()
    median = statistics.median(updates[2:])
    return {
        "ranks": WORLD_SIZE,
        "GB": round(total / 1e9, 3),
        "tensors": len(shapes),
        "shard": options.shard,
        "replay": options.replay,
        "register s": round(registering, 3),
        "gather s": round(gathering, 4),
        "updates s": [round(one, 4) for one in updates],
        "median s": round(median, 4),
        "GB/s": round(total / 1e9 / median, 1),
        "way": getattr(report, "way", ""),
        "reason": getattr(report, "way_reason", ""),
        "copies of its own GB/s": round(copies_of_its_own(), 1),
        "loaded": [one.get("loaded") for one in said],
        "needed GB": round(said[-1].get("needed_bytes", 0) / 1e9, 3),
        "free GB": [round(n / 1e9, 2) for n in free],
        "wrong": sum(gathered(wrong)),
        "table": report.table() if hasattr(report, "table") else "",
    }


if __name__ == "__main__":
    main()
