"""SGLang's own files update models of ours: ``sglang_programs.py all_cases ARGUMENTS
OUTPUT_FOLDER``. ``ARGUMENTS`` has the ``folders`` that SGLang's wheel and what it needs are in.

Each rank is a server and the scheduler beside it: SGLang's manager of updates, its updaters of a
target and of a draft model, and its loader's steps that unpack and pack. The models are small.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from checkpoint_engine.ps import ParameterServer
from stand_ins import stand_in_for

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
PACKAGES = "triton sgl_kernel IPython torchvision truststore tvm_ffi compressed_tensors gguf openai"
SIZE = 64


def real_sglang() -> SimpleNamespace:
    """Its plug-ins loaded, as at the start of its processes, and then its modules."""
    stand_in_for(*PACKAGES.split(), "einops", "partial_json_parser")
    compile_, torch.compile = torch.compile, lambda f=None, **_: f or (lambda g: g)
    import sglang
    from sglang.srt.plugins import load_plugins

    load_plugins()
    import sglang.srt.lora.layers  # its loader does, when it unpacks
    from sglang.srt.layers.quantization.base_config import QuantizeMethodBase
    from sglang.srt.managers.io_struct import UpdateWeightsFromIPCReqInput
    from sglang.srt.managers.scheduler_components import weight_updater as manager
    from sglang.srt.model_executor.model_runner_components import weight_updater as updater

    torch.compile = compile_
    return SimpleNamespace(
        version=sglang.__version__,
        packs=QuantizeMethodBase,
        request=UpdateWeightsFromIPCReqInput,
        manager=manager,
        updater=updater,
    )


def checkpoint(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    names = ["embed", "layer.left", "layer.right", "mtp.left", "mtp.right"]
    return {name: torch.randn(2 * SIZE, SIZE, generator=random) for name in names}


class Layer(nn.Module):
    """``left`` and ``right`` fused, this rank's rows of each; it computes with the transpose."""

    def __init__(self, method: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4 * SIZE // WORLD_SIZE, SIZE), requires_grad=False)
        self.quant_method = method


class Model(nn.Module):
    def __init__(self, layer: str, method: Any, embed: nn.Parameter | None = None) -> None:
        super().__init__()
        own = nn.Parameter(torch.zeros(2 * SIZE, SIZE), requires_grad=False)
        self.embed = own if embed is None else embed
        self.own_embed = embed is None
        self.add_module(layer, Layer(method))
        self.fused = layer

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        weight = getattr(self, self.fused).weight
        assert weight.shape[1] == SIZE, "weights were not unpacked before they were loaded"
        share = 2 * SIZE // WORLD_SIZE
        for name, tensor in weights:
            if name == "embed" and self.own_embed:
                self.embed.data.copy_(tensor)
            layer, _, part = name.partition(".")
            if layer == self.fused:
                start = share * (part == "right")
                mine = tensor[RANK * share : (RANK + 1) * share]
                weight.data[start : start + share].copy_(mine)


def packing(sglang: SimpleNamespace, failing: list[str]) -> Any:
    """As SGLang's quantised layers: what it computes with has another shape."""

    class Packing(sglang.packs):  # type: ignore[misc,name-defined]
        def create_weights(self, *args: Any, **kwargs: Any) -> None: ...

        def apply(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            raise NotImplementedError

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            if failing:
                raise ValueError(failing.pop())
            layer.weight.data = layer.weight.data.t().contiguous()

        def restore_weights_before_loading(self, layer: nn.Module) -> None:
            if layer.weight.shape[1] != SIZE:
                layer.weight.data = layer.weight.data.t().contiguous()

    return Packing()


class Scheduler:
    """SGLang's manager, and what it is made of."""

    def __init__(self, draft_path: str) -> None:
        self.sglang = sglang = real_sglang()
        self.failing: list[str] = []
        self.flushed = 0
        self.versions: list[str] = []
        parallel = SimpleNamespace(tp_group=SimpleNamespace(cpu_group=dist.group.WORLD), tp_rank=0)
        sglang.manager.get_parallel = lambda: parallel
        sglang.updater.get_model = lambda: SimpleNamespace(weight_cache_mode="off")
        self.target = Model("layer", packing(sglang, []))
        self.draft = Model("mtp", packing(sglang, self.failing), self.target.embed)
        for model in (self.target, self.draft):
            layer = getattr(model, model.fused)
            layer.quant_method.process_weights_after_loading(layer)
        runner = self.runner
        kind = sglang.manager.SchedulerWeightUpdaterManager
        group = {"tp_cpu_group": dist.group.WORLD}  # 0.5.21 is given it, later ones find it
        given = {field.name for field in dataclasses.fields(kind) if field.init}
        self.manager = kind(
            **{name: value for name, value in group.items() if name in given},
            tp_worker=self.worker("target", runner(self.target, "/models/it")),
            draft_worker=self.worker("draft", runner(self.draft, draft_path)),
            memory_saver_adapter=None,
            flush_cache=self.flush,
            is_fully_idle=lambda: True,
            scheduler=SimpleNamespace(
                record_weight_version_change=lambda new_version: self.versions.append(new_version)
            ),
        )

    def worker(self, role: str, runner: Any) -> Any:
        return SimpleNamespace(weight_update_runners=lambda: [(role, runner)], model_runner=runner)

    def runner(self, model: Model, path: str) -> Any:
        config = SimpleNamespace(model_path=path, dtype=torch.float32)
        runner = SimpleNamespace(model=model, model_config=config, device="cpu", gpu_id=RANK)
        runner.weight_updater = self.sglang.updater.WeightUpdater(
            tp_rank=RANK,
            device="cpu",
            gpu_id=RANK,
            model_config=config,
            custom_weight_loaders={},
            get_model=lambda: runner.model,
            update_model_fields=lambda *_, **__: None,
            recapture_cuda_graph=lambda: None,
            get_model_runner=lambda: runner,
        )
        return runner

    def flush(self, **_: Any) -> bool:
        self.flushed += 1
        return True

    def update(self, paths: list[tuple[str, str]], version: str, at: str | None = None) -> None:
        """What the route ``/update_weights_from_ipc`` makes of a request.

        Args:
            at: another device's identity than this rank's, which the request lacks.
        """
        handles = {identity: address for identity, address in paths if identity != at}
        request = self.sglang.request(zmq_handles=handles, flush_cache=True, weight_version=version)
        answer = self.manager.update_weights_from_ipc(request)
        if not answer.success:
            raise RuntimeError(answer.message)

    def holds(self, seed: int) -> dict[str, bool]:
        """Whether each weight is the slice of the checkpoint that it should be, packed."""
        tensors, share = checkpoint(seed), 2 * SIZE // WORLD_SIZE
        rows = slice(RANK * share, (RANK + 1) * share)
        held = {"embed": torch.equal(self.target.embed, tensors["embed"])}
        for model in (self.target, self.draft):
            parts = [tensors[f"{model.fused}.{side}"][rows] for side in ("left", "right")]
            weight = getattr(model, model.fused).weight
            held[model.fused] = torch.equal(weight, torch.cat(parts).t())
        return held


class Rank:
    def __init__(self) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        self.scheduler = Scheduler("/models/it")
        self.ps = ParameterServer(auto_pg=False)

    def update(self, seed: int, **options: Any) -> str:
        """The error, if any."""
        name = f"step-{seed}"
        mine = dict(list(checkpoint(seed).items())[RANK::WORLD_SIZE])
        self.ps.register_checkpoint(name, named_tensors=mine)
        try:
            self.ps.gather_metas(name)
            self.ps.update(name, lambda paths: self.scheduler.update(paths, name, **options))
        except Exception as error:
            return str(error)
        finally:
            self.ps.unregister_checkpoint(name)
        return ""


def together(rank: Rank) -> dict[str, Any]:
    """Target and draft by one update; a post hook that fails; a rank without an address."""
    scheduler = rank.scheduler
    result: dict[str, Any] = {}
    result["version"] = scheduler.sglang.version
    result["first"] = rank.update(1), scheduler.holds(1), list(scheduler.versions)
    if RANK == 0:
        scheduler.failing.append("a planted fault")
    result["hook"] = rank.update(2), list(scheduler.versions)
    lost = rank.ps.device_manager.identity(1) if WORLD_SIZE > 1 and RANK == 1 else None
    result["lost"] = rank.update(3, at=lost)
    result["repaired"] = rank.update(4), scheduler.holds(4), list(scheduler.versions)
    result["flushed"] = scheduler.flushed
    result["later"] = [rank.update(seed) for seed in (5, 6, 7)], scheduler.holds(7)
    return result


def apart(rank: Rank) -> dict[str, Any]:
    """A draft model with a checkpoint of its own keeps its weights."""
    rank.scheduler = Scheduler("/models/another")
    return {"error": rank.update(1), "holds": rank.scheduler.holds(1)}


def refused(rank: Rank) -> str:
    """By the plug-in, of a SGLang that asks its models in another way."""
    from checkpoint_engine.integrations.sglang import check_interface

    check_interface()  # this one is not
    del rank.scheduler.sglang.manager.SchedulerWeightUpdaterManager._select_runners
    try:
        check_interface()
    except RuntimeError as error:
        return str(error)
    return ""


def all_cases() -> dict[str, Any]:
    """In one process: to import SGLang takes most of the time."""
    rank = Rank()
    return {"together": together(rank), "apart": apart(rank), "refused": refused(rank)}


if __name__ == "__main__":
    _, _, arguments, output = sys.argv
    sys.path[:0] = json.loads(arguments)["folders"]
    Path(output, f"{RANK}.json").write_text(json.dumps(all_cases()))
    # A thread of gloo's that frees a tensor while Python ends takes the process along.
    dist.destroy_process_group()
