"""What the tests of sharded updates start on every rank: a server rank, and a worker of the mini
engine's model in a process of its own.

``shard_programs.py NAME ARGUMENTS OUTPUT_FOLDER``
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

from checkpoint_engine.errors import UpdateError  # noqa: E402
from checkpoint_engine.ps import ParameterServer  # noqa: E402
from checkpoint_engine.worker import VllmColocateWorkerExtension  # noqa: E402
from engines import Workers  # noqa: E402
from fleet import left_segments  # noqa: E402
from parallel_layers import TensorParallel  # noqa: E402
from random_checkpoint import tensor_shapes  # noqa: E402
from tiny_transformer import CausalLM, ModelConfig, new_model  # noqa: E402

RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
EACH = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
SHORT = timedelta(seconds=40)

CONFIG: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 17408,  # at TP 4 a row of its slice takes 8,704 bytes
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
SHAPES = tensor_shapes(CONFIG)


def weights(seed: int) -> dict[str, torch.Tensor]:
    """The whole checkpoint, the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(0, 1 << 14, shape, dtype=torch.int16, generator=generator).view(
            torch.bfloat16
        )
        for name, shape in SHAPES.items()
    }


def foreign_bytes() -> int:
    """All that the ranks of other hosts own."""
    return sum(
        2 * torch.Size(shape).numel()
        for place, shape in enumerate(SHAPES.values())
        if place % WORLD_SIZE // EACH != RANK // EACH
    )


def needed_bytes(tp: int) -> int:
    """What the workers of this host read of what its ranks do not own, by the rules of the layers:
    norms in full, of all other tensors the shares of the host's tensor-parallel ranks."""
    here = [rank for rank in range(WORLD_SIZE) if rank // EACH == RANK // EACH]
    shares = len({rank % tp for rank in here})
    return sum(
        2 * torch.Size(shape).numel() * (tp if name.endswith("norm.weight") else shares) // tp
        for place, (name, shape) in enumerate(SHAPES.items())
        if place % WORLD_SIZE not in here
    )


class MiniWorker(VllmColocateWorkerExtension):
    """Rank ``rank`` of ``tp`` that share the model; it need not be run."""

    def __init__(self, rank: int, tp: int, local_rank: int) -> None:
        self.device = torch.device("cpu")
        self.local_rank = local_rank
        self._place = rank, tp
        self.model_runner = SimpleNamespace(model=self._fresh())

    def _fresh(self) -> CausalLM:
        config = ModelConfig(**CONFIG, qkv_bias=True, dtype=torch.bfloat16)
        return new_model(config, TensorParallel(*self._place), self.device)

    def is_right(self, seed: int) -> bool:
        """Compared with a model that is loaded without any server."""
        plain = self._fresh()
        plain.load_weights(list(weights(seed).items()))
        return digests(plain) == digests(self.model_runner.model)

    def clear(self) -> None:
        for parameter in self.model_runner.model.parameters():
            parameter.data.zero_()


def digests(model: CausalLM) -> dict[str, str]:
    return {
        name: hashlib.sha256(one.data.contiguous().view(torch.uint8).numpy()).hexdigest()
        for name, one in model.named_parameters()
    }


def received_bytes() -> int:
    """By this host's network interface."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        if line.strip().startswith("eth0:"):
            return int(line.split(":")[1].split()[0])
    return 0


class Rank:
    def __init__(self, tp: int) -> None:
        torch.set_num_threads(1)
        local = RANK % EACH

        def make(_: int) -> MiniWorker:
            return MiniWorker(RANK % tp, tp, local)

        self.workers = Workers(make, 1)
        self.ps = ParameterServer()

    def register(self, seed: int) -> str:
        """This rank's share of the checkpoint."""
        name = f"step-{seed}"
        every = weights(seed)
        owned = {
            one: tensor
            for place, (one, tensor) in enumerate(every.items())
            if place % WORLD_SIZE == RANK
        }
        self.ps.register_checkpoint(name, named_tensors=owned)
        self.ps.gather_metas(name, timeout=SHORT)
        return name

    def ask(self, paths: list[tuple[str, str]]) -> None:
        self.workers.call("update_weights_from_ipc", dict(paths))

    def update(self, seed: int) -> dict[str, Any]:
        name = self.register(seed)
        self.workers.call("clear")
        self.ps.store_based_barrier()
        before = received_bytes()
        report = self.ps.update(name, self.ask, timeout=SHORT)
        self.ps.store_based_barrier()
        received = received_bytes() - before
        (right,) = self.workers.call("is_right", seed)
        self.ps.unregister_checkpoint(name)
        read = report.stages.get("P2P read")
        return {
            "way": report.way,
            "reason": report.way_reason,
            "right": right,
            "received": received,
            "read": 0 if read is None else read.bytes,
            "seconds": report.seconds,
        }


def sharded(tp: int, updates: int, layers: int = 2) -> dict[str, Any]:
    """One update after the other, of a model of so many layers."""
    CONFIG["num_hidden_layers"] = layers
    SHAPES.update(tensor_shapes(CONFIG))
    rank = Rank(tp)
    seen = [rank.update(seed) for seed in range(1, updates + 1)]
    rank.workers.stop()
    return {
        "seen": seen,
        "needed": needed_bytes(tp),
        "elsewhere": foreign_bytes(),
        "sockets": len(list(Path(os.environ["PS_IPC_DIR"]).iterdir())),
        "shared": left_segments(),
    }


def interrupted(tp: int, folder: str, timeout: float) -> dict[str, Any]:
    """Two updates that teach, and one in whose middle a host is cut off. Rank 0 goes on with the
    host's successor."""
    rank, here = Rank(tp), Path(folder)
    seen = [rank.update(seed) for seed in (1, 2)]
    name = rank.register(3)
    (here / f"ready-{RANK}").touch()
    while not (here / "slow").exists():
        time.sleep(0.01)
    (here / f"reads-{RANK}").touch()
    began = time.monotonic()
    failure: dict[str, Any] = {}
    try:
        rank.ps.update(name, rank.ask, timeout=timedelta(seconds=timeout))
    except UpdateError as error:
        failure = {"error": str(error), "kind": error.kind, "rank": error.rank}
    failure["seconds"] = time.monotonic() - began
    (here / f"failed-{RANK}").touch()
    if RANK == 0:
        rank.ps.unregister_checkpoint(name)
        while not (here / "again").exists():
            time.sleep(0.01)
        seen += [rank.update(seed) for seed in (4, 5, 6)]
    rank.workers.stop()
    return {"seen": seen, "failure": failure}


def succeeded(tp: int, folder: str) -> dict[str, Any]:
    """A host that is there again, with nothing of what it had before."""
    rank = Rank(tp)
    (Path(folder) / "again").touch()
    seen = [rank.update(seed) for seed in (4, 5, 6)]
    rank.workers.stop()
    return {"seen": seen}


if __name__ == "__main__":
    program, arguments, results = sys.argv[1:]
    programs = {f.__name__: f for f in (sharded, interrupted, succeeded)}
    result = programs[program](**json.loads(arguments))
    (Path(results) / f"{RANK}.json").write_text(json.dumps(result))
