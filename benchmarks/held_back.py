"""What a vLLM worker has to load before a layer is complete, by the order in which tensors arrive.

    .venv-vllm/bin/python benchmarks/held_back.py [--layers 20] [--bucket-mb 16]

vLLM processes a layer when all of it is there. What came in earlier buckets is held meanwhile, in a
second copy of the layer's shard. Each row is one update of the same running engine, in process and
without a server: the worker extension's loader gets the buckets as they would arrive. The tokens
that it then generates have to be those of an engine that was started from the files.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from checkpoint_engine.data_types import align_up
from checkpoint_engine.loading.reload import EngineReload
from checkpoint_engine.memory.sources import natural_key
from checkpoint_engine.worker import VllmColocateWorkerExtension

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from random_checkpoint import SIZES, model_config, write_checkpoint

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, one engine
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "PS_REPLAY": "off",  # the engine's own loader, every time
}
PROMPT = [3, 5, 7, 9]
OWNERS = 4

Tensors = dict[str, torch.Tensor]
Order = Callable[[Tensors, int], Iterator[list[str]]]


def cut(names: Sequence[str], tensors: Tensors, bucket_bytes: int) -> Iterator[list[str]]:
    """Buckets of consecutive tensors."""
    bucket: list[str] = []
    filled = 0
    for name in names:
        size = align_up(tensors[name].nbytes)
        if bucket and filled + size > bucket_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append(name)
        filled += size
    yield bucket


def by_layer(tensors: Tensors, bucket_bytes: int) -> Iterator[list[str]]:
    return cut(sorted(tensors, key=natural_key), tensors, bucket_bytes)


def across_layers(tensors: Tensors, bucket_bytes: int) -> Iterator[list[str]]:
    """One tensor of every layer, then the next one of every layer: no layer is complete early."""
    names = sorted(tensors, key=lambda name: (re.sub(r"\d+", "", name), natural_key(name)))
    return cut(names, tensors, bucket_bytes)


def in_turns(parts: list[list[str]], tensors: Tensors, size: int) -> Iterator[list[str]]:
    """A bucket of each owner in turn, as an update sends them."""
    rounds = itertools.zip_longest(*(cut(part, tensors, size) for part in parts))
    return (bucket for turn in rounds for bucket in turn if bucket)


def runs_of_layers(tensors: Tensors, bucket_bytes: int) -> Iterator[list[str]]:
    """Each owner has whole layers."""
    names = sorted(tensors, key=natural_key)
    bounds = [len(names) * i // OWNERS for i in range(OWNERS + 1)]
    parts = [names[a:b] for a, b in itertools.pairwise(bounds)]
    return in_turns(parts, tensors, bucket_bytes)


def stripes(tensors: Tensors, bucket_bytes: int) -> Iterator[list[str]]:
    """Each owner has a part of every layer."""
    names = sorted(tensors, key=natural_key)
    return in_turns([names[i::OWNERS] for i in range(OWNERS)], tensors, bucket_bytes)


ORDERS: dict[str, Order] = {
    "layer by layer (best)": by_layer,
    "across layers (worst)": across_layers,
    f"{OWNERS} owners, runs of layers": runs_of_layers,
    f"{OWNERS} owners, stripes of layers": stripes,
}


class Receiver(VllmColocateWorkerExtension):
    """Loads files in a given order, through a double buffer of its own."""

    def load_in_order(self, folder: str, order: str, bucket_bytes: int) -> dict[str, Any]:
        """The report of the extension's loader; its seconds are ``seconds``."""
        tensors: Tensors = {}
        for path in Path(folder).glob("*.safetensors"):
            tensors |= load_file(path)
        largest = max(align_up(tensor.nbytes) for tensor in tensors.values())
        half = max(bucket_bytes, largest)
        buffer = torch.empty(2 * half, dtype=torch.uint8, device=self.device)
        began = time.perf_counter()
        with contextlib.closing(EngineReload(self, {})) as reload:
            for turn, names in enumerate(ORDERS[order](tensors, half)):
                reload.load(list(self._place(buffer, turn % 2 * half, names, tensors)))
            reload.finish()
            return {**reload.summary()["model"], "seconds": time.perf_counter() - began}

    def _place(
        self, buffer: torch.Tensor, start: int, names: list[str], tensors: Tensors
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            tensor = tensors[name]
            view = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            view.copy_(tensor)
            yield name, view
            start += align_up(tensor.nbytes)


class Engine:
    """A vLLM engine in this process."""

    def __init__(self, model: Path, load_format: str) -> None:
        from vllm import LLM

        self._engine = LLM(
            model=str(model),
            load_format=load_format,
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=256,
            worker_extension_cls=f"{Receiver.__module__}.{Receiver.__qualname__}",
            disable_log_stats=True,
        )

    def tokens(self) -> list[int]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        (output,) = self._engine.generate(
            [TokensPrompt(prompt_token_ids=PROMPT)],
            SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False),
            use_tqdm=False,
        )
        return list(output.outputs[0].token_ids)

    def load(self, folder: Path, order: str, bucket_bytes: int) -> dict[str, Any]:
        (report,) = self._engine.collective_rpc(
            "load_in_order", args=(str(folder), order, bucket_bytes)
        )
        return dict(report)

    def stop(self) -> None:
        self._engine.llm_engine.engine_core.shutdown()


def measure(folder: Path, layers: int, bucket_bytes: int) -> dict[str, dict[str, Any]]:
    """The report of every order. Raises SystemExit if an order gives other tokens."""
    config = model_config("full") | {"num_hidden_layers": layers}
    paths = [folder / f"{seed}" for seed in (1, 2)]
    for seed, path in enumerate(paths, 1):
        write_checkpoint(path, config, seed)
    expected = []
    for path in paths:
        engine = Engine(path, "auto")
        expected.append(engine.tokens())
        engine.stop()
    engine = Engine(paths[0], "dummy")
    reports = {}
    for turn, order in enumerate(ORDERS):
        reports[order] = engine.load(paths[turn % 2], order, bucket_bytes)
        if engine.tokens() != expected[turn % 2]:
            raise SystemExit(f"{order}: other tokens than an engine that loaded the files")
    engine.stop()
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    layers = SIZES["full"]["num_hidden_layers"]
    parser.add_argument("--layers", type=int, default=layers, help="45 MB each")
    parser.add_argument("--bucket-mb", type=int, default=64)
    parser.add_argument("--json", help="write the reports there too")
    arguments = parser.parse_args()
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    with tempfile.TemporaryDirectory() as folder:
        reports = measure(Path(folder), arguments.layers, arguments.bucket_mb << 20)
    for order, report in reports.items():
        share = report["held_bytes"] / report["bytes"]
        print(
            f"{order:32} {report['held_bytes'] / 1e6:9.1f} of {report['bytes'] / 1e6:9.1f} MB held"
            f" ({share:6.1%})  {report['seconds']:6.2f} s"
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(reports, indent=1))


if __name__ == "__main__":
    # vLLM imports the extension by its module's name, which __main__ would not be.
    from held_back import main as run

    run()
