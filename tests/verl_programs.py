"""verl's own trainer and rollout workers with our backend: ``verl_programs.py OUTPUT``, a driver.

Two trainer ranks send three steps to two rollouts; then a rollout fails in the middle of a step,
and the next step works. The trainer's model is a few tensors, what serves is the tensors' digests.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import torch
from verl.checkpoint_engine import CheckpointEngineManager, CheckpointEngineWorker
from verl.single_controller.base import Worker
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.workers.config import CheckpointEngineConfig
from verl.workers.engine_workers import ActorRolloutRefWorker

from fleet import digests, mixed_tensors

CONFIG = CheckpointEngineConfig(
    backend="checkpoint_engine",
    update_weights_bucket_megabytes=1,
    engine_kwargs={"checkpoint_engine": {"timeout": 40.0}},
    custom_backend_module="checkpoint_engine.integrations.verl",
)
STEPS = (1, 2, 3)


def weights(step: int) -> dict[str, torch.Tensor]:
    """What every trainer rank iterates, whole."""
    return mixed_tensors(step, 0) | mixed_tensors(step, 1)


class Trainer(Worker):
    """verl's trainer worker, of which the model engine is a stand-in."""

    update_weights = ActorRolloutRefWorker.update_weights
    execute_checkpoint_engine = ActorRolloutRefWorker.execute_checkpoint_engine

    def __init__(self) -> None:
        from verl.checkpoint_engine import CheckpointEngineRegistry
        from verl.utils.import_utils import import_external_libs

        super().__init__()
        self.config = SimpleNamespace(rollout=SimpleNamespace(checkpoint_engine=CONFIG))
        self.step = 0
        engine = SimpleNamespace(get_per_tensor_param=self.next_weights)
        self.actor = SimpleNamespace(engine=engine)
        import_external_libs(CONFIG.custom_backend_module)
        self.checkpoint_engine = CheckpointEngineRegistry.new(
            CONFIG.backend,
            is_master=self.rank == 0,
            bucket_size=1 << 20,
            **CONFIG.engine_kwargs[CONFIG.backend],
        )

    def next_weights(self) -> tuple[Any, None]:
        self.step += 1
        return iter(weights(self.step).items()), None


class Adapter:
    """What hands weights to an engine."""

    replica_rank, is_leader_rank = 0, True

    def __init__(self) -> None:
        self.served: list[dict[str, str]] = []

    async def update_weights(self, tensors: Any, global_steps: int, wire_format: str) -> None:
        assert wire_format == "named_tensors"
        held: dict[str, torch.Tensor] = {}
        async for name, tensor in tensors:
            held[name] = tensor
            if global_steps == 4 and int(os.environ["RANK"]) == 1 and len(held) == 3:
                raise ValueError("a planted fault")
        self.served.append(digests(held))


class Rollout(CheckpointEngineWorker):
    def served(self) -> list[dict[str, str]]:
        return self.server_adapter.served


class Replica:
    def __init__(self, workers: list[Any]) -> None:
        self.workers = workers

    async def _nothing(self, **_: Any) -> None: ...

    abort_all_requests = resume_generation = release_kv_cache = resume_kv_cache = _nothing


def group_of(cls: Any, **arguments: Any) -> RayWorkerGroup:
    pool = RayResourcePool(process_on_nodes=[2], use_gpu=False, max_colocate_count=1)
    made = RayClassWithInitArgs(cls=ray.remote(cls), **arguments)
    return RayWorkerGroup(resource_pool=pool, ray_cls_with_init=made, use_gpu=False)


def main(output: str) -> None:
    ray.init(num_cpus=6, include_dashboard=False, object_store_memory=200 << 20)
    try:
        trainers = group_of(Trainer)
        rollouts = group_of(
            Rollout,
            rollout_config=SimpleNamespace(checkpoint_engine=CONFIG, name="vllm"),
            model_config=None,
            server_adapter=Adapter(),
        )
        manager = CheckpointEngineManager(CONFIG, trainers, [Replica(rollouts.workers)])
        result: dict[str, Any] = {"metrics": []}
        for step in STEPS:
            result["metrics"].append(sorted(manager.update_weights(global_steps=step)))
        try:
            manager.update_weights(global_steps=4)
        except Exception as error:
            result["failure"] = str(error)
        manager.update_weights(global_steps=5)
        served = ray.get([worker.served.remote() for worker in rollouts.workers])
        wanted = [digests(weights(step)) for step in (*STEPS, 5)]
        result["served"] = [of == wanted for of in served]
        Path(output).write_text(json.dumps(result))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
