"""Server ranks of the vLLM tests: ``vllm_programs.py NAME ARGUMENTS OUTPUT_FOLDER``, under
torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import torch
from safetensors.torch import load_file

from checkpoint_engine.client import vllm_request
from checkpoint_engine.data_types import align_up
from checkpoint_engine.device_utils import DeviceManager
from checkpoint_engine.ground.deadline import begin
from checkpoint_engine.handover.ipc import SharedBuffer
from checkpoint_engine.handover.link import WorkerLink, open_context
from checkpoint_engine.handover.wire import encode_bucket
from checkpoint_engine.memory.sources import natural_key
from checkpoint_engine.ps import ParameterServer, UpdateError
from checkpoint_engine.update.order import check_request
from checkpoint_engine.update.session import WorkerSession
from checkpoint_engine.world.metas_file import decode_metas, encode_metas

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
TIMEOUT = timedelta(seconds=60)


def tensors_of(model: Path) -> dict[str, torch.Tensor]:
    """A checkpoint in the order of its files."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def my_part(model: Path, other: str = "") -> dict[str, torch.Tensor]:
    """This rank's share of a checkpoint: every so many tensors. ``other``: whose odd layers it
    has."""
    tensors = tensors_of(model)
    for name, tensor in tensors_of(Path(other)).items() if other else ():
        if re.search(r"layers\.\d*[13579]\.", name):
            tensors[name] = tensor
    return {name: tensors[name] for name in list(tensors)[RANK::WORLD_SIZE]}


def source(folder: str, models: dict[str, str]) -> None:
    """Own checkpoints for others to read, until there is a file ``finished``."""
    ps = ParameterServer(auto_pg=False)
    for name, model in models.items():
        ps.register_checkpoint(name, named_tensors=my_part(Path(model)))
        ps.gather_metas(name)
        if RANK == 0:
            target = Path(folder) / f"{name}-{WORLD_SIZE}.json"
            target.with_suffix(".new").write_bytes(encode_metas(ps.get_metas()))
            os.replace(target.with_suffix(".new"), target)
    while not (Path(folder) / "finished").exists():
        time.sleep(0.1)


def updates(url: str, steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Updates of one engine, each followed by the tokens that it then generates and by what its
    workers hold."""
    ps = ParameterServer(auto_pg=False)
    seen = []
    for step in steps:
        os.environ["PS_MAX_BUCKET_SIZE_GB"] = step["bucket_gb"]
        name = step["name"]
        if "metas" not in step:
            ps.register_checkpoint(
                name, named_tensors=my_part(Path(step["model"]), step.get("other", ""))
            )
        results: list[Any] = []
        ps.gather_metas(name)
        ranks = None
        if RANK == 0:
            _call(url, "set_replay", step["replay"])
        if "metas" in step:
            ps.load_metas(decode_metas(Path(step["metas"]).read_bytes()))
            ranks = list(range(WORLD_SIZE))
        report = ps.update(name, _request(url, results), ranks=ranks, timeout=TIMEOUT)
        ps.unregister_checkpoint(name)
        tokens = _post(url, "generate", {}) if RANK == 0 else []
        digests = _call(url, "digests") if RANK == 0 else []
        held = _call(url, "held") if RANK == 0 else []
        ps.store_based_barrier()
        seen.append(
            {
                "tokens": tokens,
                "digests": digests,
                "held": held,
                "results": results,
                "buckets": report.buckets,
                "sent": [report.tensors, report.skipped_tensors],
            }
        )
    return seen


def orders(url: str, model: str, bucket_bytes: int) -> dict[str, Any]:
    """A sender of its own, which keeps to the order it is given."""
    tensors = tensors_of(Path(model))
    in_layers = sorted(tensors, key=natural_key)
    shuffled = random.Random(1).sample(in_layers, len(in_layers))
    seen = {}
    for order, names in {"layers": in_layers, "shuffled": shuffled}.items():
        results: list[Any] = []
        _send_in_order(url, [(name, tensors[name]) for name in names], bucket_bytes, results)
        seen[order] = {"tokens": _post(url, "generate", {}), "results": results}
    return seen


def _send_in_order(
    url: str, tensors: list[tuple[str, torch.Tensor]], bucket_bytes: int, results: list[Any]
) -> None:
    identity = DeviceManager("cpu").identity(0)
    with (
        open_context() as context,
        contextlib.closing(WorkerLink(context)) as link,
        contextlib.closing(SharedBuffer(DeviceManager("cpu"), 0, 2 * bucket_bytes)) as buffer,
    ):
        ask = partial(_request(url, results), [(identity, link.url)])
        request = begin(ask, "request")
        call = SimpleNamespace(check=lambda: check_request(request))
        session = WorkerSession(link, call, version="")  # type: ignore[arg-type]  # all it needs
        session.hand_over(buffer, TIMEOUT.total_seconds())
        for number, bucket in enumerate(_buckets(tensors, bucket_bytes)):
            position, message = number % 2 * bucket_bytes, []
            for name, tensor in bucket:
                flat = tensor.contiguous().view(-1).view(torch.uint8)
                buffer.tensor[position : position + flat.numel()] = flat
                entry = {"name": name, "dtype": tensor.dtype, "shape": tensor.shape}
                message.append(entry | {"offset": position})
                position += align_up(flat.numel())
            session.begin_reload(encode_bucket(message))
            session.await_reload("a bucket", meanwhile=lambda: None)
        session.release()
        session.finish(request)


def _buckets(
    tensors: list[tuple[str, torch.Tensor]], size: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    bucket: list[tuple[str, torch.Tensor]] = []
    filled = 0
    for name, tensor in tensors:
        if filled + align_up(tensor.nbytes) > size:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, tensor))
        filled += align_up(tensor.nbytes)
    yield bucket


def served(
    url: str, steps: list[dict[str, Any]], pause: str | None, folder: str
) -> list[dict[str, Any]]:
    """Updates of a vLLM server that is at work. Says ``ready``, and waits to be told ``go``."""
    ps = ParameterServer(auto_pg=False)
    os.environ["PS_MAX_BUCKET_SIZE_GB"] = "1e-4"
    ask = vllm_request(
        url, inference_parallel_size=WORLD_SIZE, pause=pause, reset_prefix_cache=pause is not None
    )
    (Path(folder) / f"ready-{RANK}").touch()
    while not (Path(folder) / "go").exists():
        time.sleep(0.05)
    seen = []
    for step in steps:
        ps.register_checkpoint(step["name"], named_tensors=my_part(Path(step["model"])))
        ps.gather_metas(step["name"])
        error = ""
        try:
            ps.update(step["name"], ask, timeout=TIMEOUT)
        except UpdateError as failure:
            error = str(failure)
        seen.append({"error": error, "ended": time.time()})
        ps.unregister_checkpoint(step["name"])
    return seen


def transferred(url: str, steps: list[dict[str, Any]]) -> list[str]:
    """Updates of a vLLM server by its own weight transfer; returns the errors."""
    ps = ParameterServer(auto_pg=False)
    os.environ["PS_MAX_BUCKET_SIZE_GB"] = "1e-4"
    errors = []
    for step in steps:
        name = step["name"]
        ask = vllm_request(url, inference_parallel_size=WORLD_SIZE, weight_version=name)
        if step.get("address_for_each"):
            ask = partial(_transfer_to_each, url)
        ps.register_checkpoint(name, named_tensors=my_part(Path(step["model"])))
        ps.gather_metas(name)
        errors.append("")
        try:
            ps.update(name, ask, timeout=TIMEOUT)
        except UpdateError as failure:
            errors[-1] = str(failure)
        ps.unregister_checkpoint(name)
    return errors


def _transfer_to_each(url: str, socket_paths: list[tuple[str, str]]) -> None:
    """vLLM's payload by worker, as clients of its own would send it."""
    if RANK == 0:
        _post(url, "start_weight_update", {})
        _post(url, "update_weights", {"update_info": [{"address": one} for _, one in socket_paths]})
        _post(url, "finish_weight_update", {})


def trained(url: str, models: list[str]) -> None:
    """Updates by the trainer half, with vLLM's own source and client."""
    from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, ModuleSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from checkpoint_engine.integrations.vllm import register
    from checkpoint_engine.integrations.vllm.trainer import CheckpointEngineTrainerInit

    register()
    sources = []
    for model in models:
        module: Any = SimpleNamespace(named_parameters=tensors_of(Path(model)).items)
        sources.append(ModuleSource(module))
    info, client = CheckpointEngineTrainerInit(rank=RANK), HTTPVLLMWeightSyncClient(url)
    trainer = WeightTransferTrainerFactory.trainer_init(info, client=client, source=sources[0])
    for source in sources:
        trainer.source = source
        trainer.send_weights()
    trainer.shutdown()


def _request(url: str, results: list[Any]) -> Any:
    def request(socket_paths: list[tuple[str, str]]) -> None:
        if RANK == 0:
            body = {
                "method": "update_weights_from_ipc",
                "args": [dict(socket_paths)],
                "timeout": TIMEOUT.total_seconds(),
            }
            results.extend(_post(url, "collective_rpc", body)["results"])

    return request


def _call(url: str, method: str, *args: Any) -> list[Any]:
    body = {"method": method, "args": list(args), "timeout": TIMEOUT.total_seconds()}
    return _post(url, "collective_rpc", body)["results"]


def _post(url: str, route: str, body: dict[str, Any]) -> Any:
    answer = httpx.post(f"{url}/{route}", json=body, timeout=90, trust_env=False)
    if not answer.is_success:
        raise RuntimeError(f"the engine answered {answer.status_code}: {answer.text}")
    return answer.json()


PROGRAMS = {f.__name__: f for f in (source, updates, orders, served, transferred, trained)}

if __name__ == "__main__":
    program, arguments, output = sys.argv[1:]
    result = PROGRAMS[program](**json.loads(arguments))
    (Path(output) / f"{RANK}.json").write_text(json.dumps(result))
