"""What ``test_two_hosts.py`` starts on every rank of two hosts: the ranks of the first host own the
checkpoints and serve workers of the mini engine, those of the second serve one vLLM engine.

``vllm_host_programs.py ARGUMENTS OUTPUT_FOLDER``
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent / "examples")]

from vllm_programs import TIMEOUT, _call, _post, tensors_of  # noqa: E402

from checkpoint_engine.ps import ParameterServer  # noqa: E402
from checkpoint_engine.worker import VllmColocateWorkerExtension  # noqa: E402
from engines import Workers  # noqa: E402
from fleet import left_segments  # noqa: E402
from parallel_layers import TensorParallel  # noqa: E402
from random_checkpoint import expected_digests  # noqa: E402
from shard_programs import digests, received_bytes  # noqa: E402
from tiny_transformer import CausalLM, ModelConfig, new_model  # noqa: E402

RANK = int(os.environ["RANK"])
OWNERS = TP = int(os.environ["LOCAL_WORLD_SIZE"])
LEADER = OWNERS
"""The rank that talks to vLLM."""
UNUSED = "model.layers.0.self_attn.rotary_emb.cos_cached"
"""A tensor that some checkpoints have and vLLM skips."""


class MiniWorker(VllmColocateWorkerExtension):
    """Rank ``rank`` of ``TP`` that share the model; it need not be run."""

    def __init__(self, rank: int, model: Path) -> None:
        self.device = torch.device("cpu")
        self.local_rank = self._rank = rank
        config = ModelConfig.from_folder(model)
        made: CausalLM = new_model(config, TensorParallel(rank, TP), self.device)
        load = made.load_weights
        made.load_weights = lambda weights: load(  # type: ignore[method-assign]
            (name, tensor) for name, tensor in weights if name != UNUSED
        )
        self.model_runner = SimpleNamespace(model=made)

    def is_right(self, model: str) -> bool:
        """Compared with what is sliced from the files."""
        return digests(self.model_runner.model) == expected_digests(Path(model), TP)[self._rank]


class MiniEngine:
    """This rank's worker of the first host's engine."""

    def __init__(self, model: Path) -> None:
        sys.modules["vllm"] = None  # type: ignore[assignment]  # a host without it
        self._workers = Workers(lambda _: MiniWorker(RANK, model), 1)

    def ask(self, paths: list[tuple[str, str]]) -> None:
        self._workers.call("update_weights_from_ipc", dict(paths))

    def seen(self, model: str) -> dict[str, Any]:
        """Whether its worker is right."""
        (right,) = self._workers.call("is_right", model)
        return {"right": right}

    def close(self) -> None:
        self._workers.stop()


class Vllm:
    """The second host's engine, as its ranks see it."""

    def __init__(self, url: str, models: dict[str, str], ready: Path) -> None:
        """Starts the engine with each of ``models``, then touches ``ready``; it holds the last one
        then."""
        self._url = url
        self._fresh: dict[str, dict[str, Any]] = {}
        self._results: list[Any] = []
        if RANK == LEADER:
            for model in models.values():
                _post(url, "start", {"model": model, "tensor_parallel_size": TP})
                self._fresh[model] = self._state()
            ready.touch()

    def _state(self) -> dict[str, Any]:
        return {
            "tokens": _post(self._url, "generate", {}),
            "digests": _call(self._url, "digests"),
        }

    def ask(self, paths: list[tuple[str, str]]) -> None:
        if RANK == LEADER:
            self._results = _call(self._url, "update_weights_from_ipc", dict(paths))

    def seen(self, model: str) -> dict[str, Any]:
        """Whether all its workers hold, and it generates, what it does when started anew."""
        if RANK != LEADER:
            return {}
        state, fresh = self._state(), self._fresh[model]
        (others,) = (one for path, one in self._fresh.items() if path != model)
        return {
            "right": state == fresh and state["tokens"] != others["tokens"],
            "loaded": [one["model"]["replay"]["loaded"] for one in self._results],
        }

    def close(self) -> None:
        if RANK == LEADER:
            _post(self._url, "stop", {})


def share_of(model: str, unused_bytes: int) -> dict[str, torch.Tensor]:
    """What this rank owns: every so many tensors."""
    tensors = tensors_of(Path(model))
    tensors[UNUSED] = torch.ones(unused_bytes // 2, dtype=torch.bfloat16)
    return {name: tensors[name] for name in list(tensors)[RANK::OWNERS]}


def updates(
    url: str,
    models: dict[str, str],
    steps: list[dict[str, str]],
    unused_bytes: int,
    folder: str,
) -> dict[str, Any]:
    """Updates of both engines, one for each step. A checkpoint is a model and one tensor that no
    engine needs."""
    torch.set_num_threads(1)
    ready = Path(folder) / "ready"
    engine: MiniEngine | Vllm
    if RANK < OWNERS:
        engine = MiniEngine(Path(next(iter(models.values()))))
    else:
        engine = Vllm(url, models, ready)
    while not ready.exists():
        time.sleep(0.1)
    ps = ParameterServer(auto_pg=False)
    seen = []
    for step in steps:
        name, model = step["name"], models[step["name"]]
        os.environ["PS_TRANSPORT"] = step["transport"]
        if RANK < OWNERS:
            ps.register_checkpoint(name, named_tensors=share_of(model, unused_bytes))
        ps.gather_metas(name, timeout=TIMEOUT)
        ps.store_based_barrier(timeout=TIMEOUT)
        before = received_bytes()
        report = ps.update(name, engine.ask, timeout=TIMEOUT)
        ps.store_based_barrier(timeout=TIMEOUT)
        received = received_bytes() - before
        read = report.stages.get("P2P read")
        told = {"way": report.way, "received": received, "seconds": report.seconds}
        told["read"] = 0 if read is None else read.bytes
        seen.append(told | engine.seen(model))
        ps.store_based_barrier(timeout=TIMEOUT)
        if RANK < OWNERS:
            ps.unregister_checkpoint(name)
    engine.close()
    sockets = len(list(Path(os.environ["PS_IPC_DIR"]).iterdir()))
    return {"seen": seen, "sockets": sockets, "shared": left_segments()}


if __name__ == "__main__":
    arguments, results = sys.argv[1:]
    result = updates(**json.loads(arguments))
    (Path(results) / f"{RANK}.json").write_text(json.dumps(result))
