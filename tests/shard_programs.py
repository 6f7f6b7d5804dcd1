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


def total_bytes() -> int:
    return sum(2 * torch.Size(shape).numel() for shape in SHAPES.values())


def needed_bytes(tp: int) -> int:
    """What the workers of one host read, by the rules of the layers: norms in full, of all other
    tensors the shares of the host's tensor-parallel ranks. Of ``o_proj``, whose rows are short,
    everything is read."""
    here = {rank % tp for rank in range(WORLD_SIZE) if rank // EACH == RANK // EACH}
    whole = ("norm.weight", "o_proj.weight")
    return sum(
        2 * torch.Size(shape).numel() * (tp if name.endswith(whole) else len(here)) // tp
        for name, shape in SHAPES.items()
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

    def restart(self) -> None:
        """The engine is started again: nothing is learned any more."""
        self.model_runner.model = self._fresh()
        self.__dict__.pop("_loader_habits", None)

    def shift(self, rank: int, tp: int) -> None:
        """It becomes another rank's worker."""
        self._place = rank, tp
        self.restart()

    def is_right(self, seed: int) -> bool:
        """Compared with a model that is loaded without any server."""
        plain = self._fresh()
        plain.load_weights(list(weights(seed).items()))
        return digests(plain) == digests(self.model_runner.model)

    def clear(self) -> None:
        for parameter in self.model_runner.model.parameters():
            parameter.data.zero_()

    def set(self, name: str, value: str) -> None:
        os.environ[name] = value


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

    def register(self, seed: int, copies: int = 1) -> str:
        """This rank's share of the checkpoint. ``copies``: how many ranks own each tensor."""
        name = f"step-{seed}"
        every = weights(seed)
        owned = {
            one: tensor
            for place, (one, tensor) in enumerate(every.items())
            if (RANK - place) % WORLD_SIZE < copies
        }
        self.ps.register_checkpoint(name, named_tensors=owned)
        self.ps.gather_metas(name, timeout=SHORT)
        return name

    def ask(self, paths: list[tuple[str, str]]) -> None:
        self.workers.call("update_weights_from_ipc", dict(paths))

    def update(self, seed: int, copies: int = 1, **options: Any) -> dict[str, Any]:
        name = self.register(seed, copies)
        self.workers.call("clear")
        self.ps.store_based_barrier()
        before = received_bytes()
        report = self.ps.update(name, self.ask, timeout=SHORT, **options)
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


def sharded(tp: int, updates: int, steps: dict[str, Any] | None = None) -> dict[str, Any]:
    """``steps``: by update, what happens on this rank before it: ``{"3": {"0": ["restart"]}}``."""
    rank = Rank(tp)
    seen = []
    for seed in range(1, updates + 1):
        change = (steps or {}).get(str(seed), {})
        copies = change.get("copies", 1)
        if (call := change.get(str(RANK))) is not None:
            rank.workers.call(*call)
        if "env" in change:
            os.environ.update(change["env"])
        seen.append(rank.update(seed, copies))
    rank.workers.stop()
    return {
        "seen": seen,
        "needed": needed_bytes(tp),
        "total": total_bytes(),
        "sockets": len(list(Path(os.environ["PS_IPC_DIR"]).iterdir())),
        "shared": left_segments(),
    }


def interrupted(tp: int, folder: str, timeout: float) -> dict[str, Any]:
    """Two updates that teach, one that is cut off in the middle, one after that."""
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
    return {"seen": seen, "failure": failure}


if __name__ == "__main__":
    program, arguments, results = sys.argv[1:]
    programs = {f.__name__: f for f in (sharded, interrupted)}
    result = programs[program](**json.loads(arguments))
    (Path(results) / f"{RANK}.json").write_text(json.dumps(result))
