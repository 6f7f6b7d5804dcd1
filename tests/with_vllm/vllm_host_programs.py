"""What ``test_two_hosts.py`` starts on every rank: ``vllm_host_programs.py NAME ARGUMENTS
OUTPUT_FOLDER``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
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

RANK, EACH = int(os.environ["RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
TP = 2
STARTING = timedelta(seconds=150)  # of an engine; the other ranks wait
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
    """This rank's worker of an engine of ours."""

    def __init__(self, model: str) -> None:
        sys.modules["vllm"] = None  # type: ignore[assignment]  # a host without it
        self._workers = Workers(lambda _: MiniWorker(RANK, Path(model)), 1)

    def ask(self, paths: list[tuple[str, str]]) -> None:
        self._workers.call("update_weights_from_ipc", dict(paths))

    def seen(self, model: str) -> dict[str, Any]:
        """Whether its worker is right."""
        (right,) = self._workers.call("is_right", model)
        return {"right": right}

    def close(self) -> None:
        self._workers.stop()


class Vllm:
    """The engine of the ranks from ``leader`` on, which alone talks to it."""

    def __init__(self, url: str, leader: int) -> None:
        self._url = url
        self._leads = leader == RANK
        self._fresh: dict[str, dict[str, Any]] = {}
        self._results: list[Any] = []

    def start(self, model: str, **options: Any) -> None:
        """With ``model``, and note what it holds and generates then."""
        if self._leads:
            _post(self._url, "start", {"model": model, "tensor_parallel_size": TP, **options})
            self._fresh[model] = self._state()
        elif options:
            _post(self._url, "join", {"model": model, "tensor_parallel_size": TP, **options})

    def _state(self) -> dict[str, Any]:
        return {
            "tokens": _post(self._url, "generate", {}),
            "digests": _call(self._url, "digests"),
        }

    def ask(self, paths: list[tuple[str, str]]) -> None:
        if self._leads:
            self._results = _call(self._url, "update_weights_from_ipc", dict(paths))

    def seen(self, model: str) -> dict[str, Any]:
        """Whether all its workers hold, and it generates, what it does when started anew."""
        if not self._leads:
            return {}
        state, fresh = self._state(), self._fresh[model]
        (others,) = (one for path, one in self._fresh.items() if path != model)
        return {
            "right": state == fresh and state["tokens"] != others["tokens"],
            "loaded": [one["model"]["replay"]["loaded"] for one in self._results],
        }

    def close(self) -> None:
        if self._leads:
            _post(self._url, "stop", {})


Share = dict[str, torch.Tensor]


def beside(
    url: str, models: dict[str, str], steps: list[dict[str, str]], unused_bytes: int
) -> dict[str, Any]:
    """The first host's ranks own everything and serve an engine of ours; the second host's serve
    vLLM. A checkpoint is a model and one tensor that no engine needs."""

    def share_of(model: str) -> Share:
        if RANK >= EACH:
            return {}
        tensors = tensors_of(Path(model))
        tensors[UNUSED] = torch.ones(unused_bytes // 2, dtype=torch.bfloat16)
        return {name: tensors[name] for name in list(tensors)[RANK::EACH]}

    if RANK < EACH:
        mini = MiniEngine(next(iter(models.values())))
        return _updates(ParameterServer(auto_pg=False), mini, models, steps, share_of)
    engine, ps = Vllm(url, leader=EACH), ParameterServer(auto_pg=False)
    for model in models.values():
        engine.start(model)
    return _updates(ps, engine, models, steps, share_of)


def across(
    urls: list[str], models: dict[str, str], steps: list[dict[str, str]], ports: list[int]
) -> dict[str, Any]:
    """Each of two hosts has one rank, which owns half and serves one worker of a single vLLM
    engine. ``ports``: of the first host, for the engines' starts."""

    def share_of(model: str) -> Share:
        tensors = tensors_of(Path(model))
        return {name: tensors[name] for name in list(tensors)[RANK::TP]}

    engine, ps = Vllm(urls[RANK], leader=0), ParameterServer(auto_pg=False)
    place = {"nnodes": TP, "node_rank": RANK, "master_addr": os.environ["MASTER_ADDR"]}
    for model, port in zip(models.values(), ports, strict=True):
        engine.start(model, distributed_executor_backend="mp", master_port=port, **place)
        ps.store_based_barrier(timeout=STARTING)
    return _updates(ps, engine, models, steps, share_of)


def _updates(
    ps: ParameterServer,
    engine: MiniEngine | Vllm,
    models: dict[str, str],
    steps: list[dict[str, str]],
    share_of: Callable[[str], Share],
) -> dict[str, Any]:
    """Of all engines, one for each step: a model's name, and the transport."""
    torch.set_num_threads(1)
    seen = []
    for step in steps:
        name, model = step["name"], models[step["name"]]
        os.environ["PS_TRANSPORT"] = step["transport"]
        share = share_of(model)
        if share:
            ps.register_checkpoint(name, named_tensors=share)
        ps.gather_metas(name, timeout=STARTING)
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
        if share:
            ps.unregister_checkpoint(name)
    engine.close()
    sockets = len(list(Path(os.environ["PS_IPC_DIR"]).iterdir()))
    return {"seen": seen, "sockets": sockets, "shared": left_segments()}


if __name__ == "__main__":
    program, arguments, results = sys.argv[1:]
    programs: dict[str, Callable[..., Any]] = {f.__name__: f for f in (beside, across)}
    result = programs[program](**json.loads(arguments))
    (Path(results) / f"{RANK}.json").write_text(json.dumps(result))
