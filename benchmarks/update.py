"""Register, gather and update at full size, with a worker that copies every tensor.

    python benchmarks/update.py --layers 11 --bucket-gb 2
    torchrun --nproc-per-node 2 benchmarks/update.py --layers 1

The checkpoint has the shape of Qwen3-30B-A3B: 390 tensors and 1.25 GB of bf16 per layer; with
``--shapes dense`` that of Qwen2.5-72B: 9 tensors and 1.76 GB. Every phase is printed with its
bytes, seconds and rate, beside this machine's limit from the same run. With several ranks the
limit of an update is a bare broadcast and one memcpy, measured in turns with the updates. On CPUs
that broadcast is gloo's; an update takes gloo, too, with ``PS_CPU_TRANSPORT=gloo``.

    python benchmarks/update.py --layers 11 --against original==0.4.2 --turns 3

installs that release of the original from PyPI into a folder of its own, runs the same work on it
and on this library in turns, and prints the ratios. Only what both have is used.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import limits
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from worker_process import CopyingEngine, WorkerProcess

from checkpoint_engine.ps import ParameterServer

RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
NAME = "benchmark"


def dense_layer(layer: int) -> dict[str, tuple[int, ...]]:
    """One layer of Qwen2.5-72B."""
    prefix = f"model.layers.{layer}"
    return {
        f"{prefix}.self_attn.q_proj.weight": (8192, 8192),
        f"{prefix}.self_attn.k_proj.weight": (1024, 8192),
        f"{prefix}.self_attn.v_proj.weight": (1024, 8192),
        f"{prefix}.self_attn.o_proj.weight": (8192, 8192),
        f"{prefix}.mlp.gate_proj.weight": (29568, 8192),
        f"{prefix}.mlp.up_proj.weight": (29568, 8192),
        f"{prefix}.mlp.down_proj.weight": (8192, 29568),
        f"{prefix}.input_layernorm.weight": (8192,),
        f"{prefix}.post_attention_layernorm.weight": (8192,),
    }


def moe_layer(layer: int, experts: int = 128) -> dict[str, tuple[int, ...]]:
    """One layer of Qwen3-30B-A3B."""
    prefix = f"model.layers.{layer}"
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.self_attn.q_proj.weight": (4096, 2048),
        f"{prefix}.self_attn.k_proj.weight": (512, 2048),
        f"{prefix}.self_attn.v_proj.weight": (512, 2048),
        f"{prefix}.self_attn.o_proj.weight": (2048, 4096),
        f"{prefix}.input_layernorm.weight": (2048,),
        f"{prefix}.post_attention_layernorm.weight": (2048,),
    }
    for expert in range(experts):
        for part in ("gate", "up"):
            shapes[f"{prefix}.mlp.experts.{expert}.{part}_proj.weight"] = (768, 2048)
        shapes[f"{prefix}.mlp.experts.{expert}.down_proj.weight"] = (2048, 768)
    return shapes


def small_layer(layer: int) -> dict[str, tuple[int, ...]]:
    """The same with a quarter of the experts: 0.34 GB."""
    return moe_layer(layer, experts=32)


SHAPES = {"dense": dense_layer, "moe": moe_layer, "small": small_layer}
layer_shapes = SHAPES["moe"]


def make_tensors(layers: range, seed: int) -> dict[str, torch.Tensor]:
    """The tensors of some layers: random finite numbers, of which every tensor is another piece."""
    generator = torch.Generator().manual_seed(seed)
    count = 250_000_000 if layer_shapes is dense_layer else 9_000_000  # more than any tensor has
    noise = torch.randint(0, 2**14, (count,), dtype=torch.int16, generator=generator)
    tensors = {}
    for layer in layers:
        for place, (name, shape) in enumerate(layer_shapes(layer).items()):
            count = torch.Size(shape).numel()
            start = (layer * 7919 + place * 101) % (noise.numel() - count)
            tensors[name] = noise[start : start + count].view(torch.bfloat16).view(shape).clone()
    return tensors


class Engine(CopyingEngine):
    """What the worker's process serves."""

    def __init__(self, layers: int) -> None:
        super().__init__(
            {name: shape for layer in range(layers) for name, shape in layer_shapes(layer).items()}
        )
        self._layers = range(layers)

    def check(self, seed: int) -> list[str]:
        return self.wrong(make_tensors(self._layers, seed))


class Benchmark:
    """Runs phases on one rank and keeps their seconds."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.worker = WorkerProcess(Engine, arguments.layers)
        self.ps = ParameterServer(rank=RANK, world_size=WORLD_SIZE, **arguments.options)
        self.mine = range(
            arguments.layers * RANK // WORLD_SIZE, arguments.layers * (RANK + 1) // WORLD_SIZE
        )
        self.total = sum(
            2 * torch.Size(shape).numel()
            for layer in range(arguments.layers)
            for shape in layer_shapes(layer).values()
        )
        self.seconds: dict[str, list[float]] = {}
        self.bare: list[float] = []

    def time(self, phase: str, action: Callable[[], Any]) -> Any:
        if WORLD_SIZE > 1:
            dist.barrier()  # nobody waits for what another rank did before
        began = time.perf_counter()
        result = action()
        self.seconds.setdefault(phase, []).append(time.perf_counter() - began)
        return result

    def run(self) -> None:
        tensors = make_tensors(self.mine, seed=1)
        self._register("register, fresh", named_tensors=tensors)
        self.time("gather", lambda: self.ps.gather_metas(NAME))
        self.time("gather, unchanged", lambda: self.ps.gather_metas(NAME))
        self.time("update, first", self._update)
        for _ in range(self.arguments.repeats):
            report = self.time("update", self._update)
            if WORLD_SIZE > 1:
                self.bare.append(limits.together(limits.broadcast(), limits.one_copy()))
        print(f"rank {RANK}: {report}", flush=True)
        self._check(seed=1)
        for _ in range(self.arguments.repeats):
            self.ps.unregister_checkpoint(NAME)
            self._register("register, again", named_tensors=tensors)
        self.ps.unregister_checkpoint(NAME)
        if self.arguments.pool:
            self._run_pool(tensors)
        if self.arguments.files:
            self._run_files()

    def _run_pool(self, tensors: dict[str, torch.Tensor]) -> None:
        for phase in ("register, pool fresh", *["register, pool reused"] * self.arguments.repeats):
            self._register(phase, named_tensors=tensors, use_shared_memory_pool=True)
            self.ps.unregister_checkpoint(NAME)
        self._register("register, pool reused", named_tensors=tensors, use_shared_memory_pool=True)
        self.ps.unregister_checkpoint(NAME, force=True)

    def _run_files(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
        try:
            files = self._write(folder)
            self._register("register from files", files=files)
            self.ps.gather_metas(NAME)
            self._update()
            self._check(seed=2)
            self.ps.unregister_checkpoint(NAME)
            if self.arguments.pool:
                self._run_files_pool(files)
        finally:
            shutil.rmtree(folder)

    def _run_files_pool(self, files: list[str]) -> None:
        for phase in ("files, pool fresh", *["files, pool reused"] * self.arguments.repeats):
            self._register(phase, files=files, use_shared_memory_pool=True)
            self.ps.unregister_checkpoint(NAME)

    def _write(self, folder: Path) -> list[str]:
        files = []
        for layer in self.mine:
            files.append(str(folder / f"layer-{layer}.safetensors"))
            save_file(make_tensors(range(layer, layer + 1), seed=2), files[-1])
        return files

    def _register(self, phase: str, **options: Any) -> None:
        self.time(phase, lambda: self.ps.register_checkpoint(NAME, **options))

    def _update(self) -> Any:
        return self.ps.update(NAME, lambda paths: self.worker.call("update", paths[RANK][1]))

    def _check(self, seed: int) -> None:
        wrong = self.worker.call("check", seed)
        if wrong:
            raise SystemExit(f"rank {RANK}: {len(wrong)} tensors differ: {wrong[:3]}")

    def table(self, best: dict[str, float]) -> list[dict[str, Any]]:
        rows = []
        for phase, seconds in self.seconds.items():
            median = statistics.median(seconds)
            own = self.total * len(self.mine) / max(1, self.arguments.layers)
            nbytes = self.total if phase.startswith("update") else own
            limit = self._limit(phase, best)
            rate = nbytes / 1e9 / median
            rows.append(
                {
                    "phase": phase,
                    "bytes": nbytes,
                    "seconds": median,
                    "all": seconds,
                    "GB/s": rate,
                    "of limit": rate / limit,
                }
            )
        return rows

    def _limit(self, phase: str, best: dict[str, float]) -> float:
        """GB/s that the machine allows for a phase."""
        if phase.startswith("update"):
            return statistics.median(self.bare) if self.bare else best["host_to_device"]
        copy = best["page_cache" if "files" in phase else "host_memcpy"]
        reused = "again" in phase or "reused" in phase
        return copy if reused else limits.together(copy, best["new_host_memory"])


def compare(arguments: argparse.Namespace) -> None:
    """This library and a release of the original, in turns, each run in processes of its own."""
    version = arguments.against.partition("==")[2]
    ours = str(Path(__file__).resolve().parent.parent)
    with tempfile.TemporaryDirectory() as folder:
        theirs = str(Path(folder) / "original")
        requirement = f"checkpoint-engine=={version}"
        install = ["install", "--quiet", "--no-deps", "--target", theirs, requirement]
        subprocess.run([sys.executable, "-m", "pip", *install], check=True)
        seconds: dict[str, dict[str, list[float]]] = {ours: {}, theirs: {}}
        for _ in range(arguments.turns):
            for path, phases in seconds.items():
                table = _run_apart(arguments, path, Path(folder) / "table.json", path == theirs)
                for row in table["phases"]:
                    phases.setdefault(row["phase"], []).extend(row["all"])
    limit = table["limits"]["host_to_device"]
    print(f"pinned host to device {limit:.1f} GB/s; medians of {arguments.turns} runs each")
    for phase in seconds[theirs]:
        mine, other = (statistics.median(seconds[path][phase]) for path in (ours, theirs))
        print(
            f"{phase:24} ours {mine:8.4f} s   original {version} {other:8.4f} s   "
            f"original / ours {other / mine:6.1f}"
        )


def _run_apart(
    arguments: argparse.Namespace, path: str, output: Path, original: bool
) -> dict[str, Any]:
    command = [sys.executable, __file__, "--json", str(output), "--layers", str(arguments.layers)]
    command += ["--bucket-gb", str(arguments.bucket_gb), "--repeats", str(arguments.repeats)]
    command += ["--shapes", arguments.shapes]
    command += ["--files"] if arguments.files else []
    command += ["--options", json.dumps({"auto_pg": True})] if original else []
    world = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611"}
    inherited = os.environ.get("PYTHONPATH", "")
    environment = {**os.environ, **world, "PYTHONPATH": os.pathsep.join([path, inherited])}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return json.loads(output.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--shapes", choices=sorted(SHAPES), default="moe")
    parser.add_argument("--bucket-gb", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--options", type=json.loads, default={}, help="of the server, as JSON")
    parser.add_argument("--files", action="store_true", help="also register from files")
    parser.add_argument("--pool", action="store_true", help="also with the shared memory pool")
    parser.add_argument("--json", help="write the table there too")
    parser.add_argument("--against", help="original==VERSION: compare with that release")
    parser.add_argument("--checksum", choices=("on", "off"), default="on", help="PS_CHECKSUM")
    parser.add_argument("--turns", type=int, default=3, help="runs of each, with --against")
    arguments = parser.parse_args()
    os.environ["PS_CHECKSUM"] = arguments.checksum
    os.environ["PS_MAX_BUCKET_SIZE_GB"] = f"{arguments.bucket_gb:g}"
    if arguments.against:
        return compare(arguments)
    global layer_shapes
    layer_shapes = SHAPES[arguments.shapes]
    if WORLD_SIZE > 1:
        arguments.options.setdefault("auto_pg", True)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    benchmark = Benchmark(arguments)
    benchmark.run()
    if RANK > 0:
        return
    best = limits.measure()
    rows = benchmark.table(best)
    print({name: f"{rate:.1f} GB/s" for name, rate in best.items()})
    for row in rows:
        print(
            f"{row['phase']:24} {row['bytes'] / 1e9:7.3f} GB {row['seconds']:8.4f} s "
            f"{row['GB/s']:7.2f} GB/s {row['of limit']:5.2f} of limit  n={len(row['all'])}"
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"limits": best, "phases": rows}, indent=1))


if __name__ == "__main__":
    main()
