"""A real vLLM with ``--weight-transfer-config``, and no worker extension of ours."""

from __future__ import annotations

import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import CPU, PROGRAMS
from test_server import running
from vllm.config import VllmConfig
from vllm.config.load import LoadConfig
from vllm.distributed.weight_transfer import (
    WeightTransferEngine,
    WeightTransferEngineFactory,
    base,
)
from vllm.distributed.weight_transfer.base import ModuleSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader import utils as loading

from checkpoint_engine.client import BACKEND
from checkpoint_engine.errors import UpdateError
from checkpoint_engine.integrations import vllm as plugin
from checkpoint_engine.integrations.vllm import worker
from checkpoint_engine.integrations.vllm.loader import CheckpointEngineLoader
from checkpoint_engine.integrations.vllm.trainer import CheckpointEngineTrainerInit
from checkpoint_engine.integrations.vllm.worker import CheckpointEngineTransfer
from conftest import EngineHost
from demo_vllm import TP, VllmServer
from torchrun import free_port_pair, torchrun

FLAG = ["--weight-transfer-config", '{"backend": "checkpoint_engine"}']
OBSERVED = [*FLAG, "--worker-extension-cls=engine_worker.ObservedWorker"]
WRONG = "model.layers.2.mlp.down_proj.weight"


def test_registering_twice_is_registering_once() -> None:
    plugin.register()
    plugin.register()
    assert WeightTransferEngineFactory._registry[BACKEND]() is CheckpointEngineTransfer
    loader = get_model_loader(LoadConfig(load_format=BACKEND))
    assert isinstance(loader, CheckpointEngineLoader)
    assert loader.load_config.load_format == "auto"  # of the files, where they are loaded


def test_another_interface_is_refused_with_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(self: Any, config: Any, parallel_config: Any) -> None: ...

    monkeypatch.setattr(WeightTransferEngine, "__init__", init)
    found = r"engines of \['config', 'parallel_config'\].* --worker-extension-cls checkpoint_engine"
    with pytest.raises(RuntimeError, match=found):
        CheckpointEngineTransfer(None, None, torch.device("cpu"), None)


@pytest.mark.parametrize(("drafted", "needs"), [("same", True), ("other", False), (None, False)])
def test_a_drafter_of_the_same_checkpoint_has_to_be_shown_once(
    monkeypatch: pytest.MonkeyPatch, drafted: str | None, needs: bool
) -> None:
    monkeypatch.setattr(worker, "get_world_group", lambda: SimpleNamespace(local_rank=0))
    drafter_config = SimpleNamespace(model=drafted)
    config = SimpleNamespace(
        parallel_config=None,
        model_config=SimpleNamespace(model="same"),
        speculative_config=drafted and SimpleNamespace(draft_model_config=drafter_config),
    )
    model, drafter = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    engine = CheckpointEngineTransfer(None, config, torch.device("cpu"), model)
    refused = pytest.raises(RuntimeError, match="/start_draft_weight_update")
    with refused if needs else nullcontext():
        engine.start_weight_update()
    engine.set_weight_update_target(drafter, drafter_config)
    engine.start_weight_update()  # for it alone
    engine.finish_weight_update()
    engine.reset_weight_update_target()
    engine.start_weight_update()
    assert engine._model.model_runner.drafter.model is drafter


@pytest.mark.parametrize("info", [{}, {"zmq_handles": {}, "address": "ipc://x"}, {"names": []}])
def test_an_update_without_one_address_is_refused(
    monkeypatch: pytest.MonkeyPatch, info: dict[str, Any]
) -> None:
    monkeypatch.setattr(worker, "get_world_group", lambda: SimpleNamespace(local_rank=0))
    config = SimpleNamespace(parallel_config=None, model_config=None, speculative_config=None)
    engine = CheckpointEngineTransfer(None, config, torch.device("cpu"), None)
    with pytest.raises(ValueError, match=r"either zmq_handles or address|Invalid update_info"):
        engine.update_weights(info)


class Client:
    """What leads from the trainer half to the worker half, in one process."""

    def __init__(self, engine: CheckpointEngineTransfer) -> None:
        self.update_weights = engine.update_weights
        self.calls: list[str] = []

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append("finish")


def test_the_trainer_half_sends_to_the_worker_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own factories and bases; a second update after one that fails."""
    monkeypatch.setattr(worker, "get_world_group", lambda: SimpleNamespace(local_rank=0))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port_pair()))
    monkeypatch.setenv("PS_DEVICE", "cpu")
    processed: list[Any] = []  # needs the configuration of a model of vLLM's own
    monkeypatch.setattr(loading, "process_weights_after_loading", lambda *a: processed.append(a))
    plugin.register()
    sent, served = torch.nn.Linear(40, 30), torch.nn.Linear(40, 30)
    wanted = sent.weight.detach().clone()

    def load(weights: Any) -> None:
        for name, tensor in weights:
            dict(served.named_parameters())[name].data.copy_(tensor)

    served.load_weights = load  # type: ignore[assignment]
    config = VllmConfig()
    object.__setattr__(config, "model_config", SimpleNamespace(quantization=None))
    client = Client(CheckpointEngineTransfer(None, config, torch.device("cpu"), served))
    info = CheckpointEngineTrainerInit(rank=0, world_size=1)
    source = ModuleSource(sent)
    trainer = WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)
    monkeypatch.setattr(client, "start_weight_update", lambda: 1 / 0)
    with pytest.raises(UpdateError, match="ZeroDivisionError"):
        trainer.send_weights()
    monkeypatch.delattr(client, "start_weight_update")
    trainer.send_weights()
    trainer.shutdown()
    assert torch.equal(served.weight, wanted)
    assert torch.equal(served.bias, sent.bias)
    assert client.calls == ["start", "finish"]
    assert len(processed) == 1


@pytest.fixture
def broken(models: dict[str, Path], tmp_path: Path) -> Path:
    """A checkpoint with a tensor in the middle that no engine of this model can load."""
    folder = tmp_path / "broken"
    shutil.copytree(models["dense-2"], folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if WRONG in tensors:
            tensors[WRONG] = tensors[WRONG][:7, :5].clone()
            save_file(tensors, path)
    return folder


def update(folder: Path, server: VllmServer, *steps: dict[str, Any]) -> list[str]:
    """The errors of these updates, which all ranks have seen."""
    options: dict[str, Any] = {"url": server.url, "steps": steps}
    ranks: list[Any] = torchrun(folder, TP, "transferred", 150, CPU, script=PROGRAMS, **options)
    assert all(errors == ranks[0] for errors in ranks)
    return ranks[0]


def get(server: VllmServer, route: str) -> Any:
    return httpx.get(f"{server.url}{route}", timeout=60, trust_env=False).raise_for_status().json()


def rpc(server: VllmServer, method: str) -> Any:
    """What the workers answer, in their order."""
    url, body = f"{server.url}/collective_rpc", {"method": method}
    answer = httpx.post(url, json=body, timeout=60, trust_env=False)
    return answer.raise_for_status().json()["results"]


@pytest.mark.timeout(300)
def test_the_routes_are_served_with_a_token_without_the_mode_of_development(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [{"name": name, "model": str(models[name])} for name in ("dense-2", "dense-1")]
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "0")
    monkeypatch.setenv("VLLM_PLUGINS", "checkpoint_engine")
    monkeypatch.setenv("PS_ENGINE_TOKEN", "open-sesame")
    with running(models["dense-1"], monkeypatch, "auto", options=FLAG) as server:
        before = server.generate()
        assert update(tmp_path / "there", server, *steps[:1]) == [""]
        assert server.generate() != before
        assert update(tmp_path / "back", server, *steps[1:]) == [""]
        assert server.generate() == before
        for wrong in ({}, {"authorization": "Bearer open-barley"}):
            url = f"{server.url}/start_weight_update"
            answer = httpx.post(url, headers=wrong, timeout=60, trust_env=False)
            assert answer.status_code == 401
        url = f"{server.url}/collective_rpc"
        assert httpx.post(url, json={}, timeout=60, trust_env=False).status_code == 404


@pytest.mark.timeout(300)
def test_a_failed_update_leaves_the_extension_as_ready_as_before(
    models: dict[str, Path], broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = ({"name": name, "model": str(models[name])} for name in ("dense-1", "dense-2"))
    wrong = {"name": "broken", "model": str(broken)}
    with running(models["dense-1"], monkeypatch) as server:
        before = server.generate()
        errors = update(tmp_path / "ranks", server, two, wrong, two, one)
        assert [bool(error) for error in errors] == [False, True, False, False], errors
        assert server.generate() == before


@pytest.mark.timeout(240)
def test_an_engine_starts_from_a_running_world_without_weight_files(
    engine_host: EngineHost,
    models: dict[str, Path],
    sources: dict[tuple[str, int], Path],
    tmp_path: Path,
) -> None:
    expected = engine_host.tokens_of_a_fresh_start(models["dense-2"], 2)
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(models["dense-2"] / "config.json", empty)
    extra = {"metas_file": str(sources["dense-2", 3])}
    engine_host.start(empty, 2, load_format="checkpoint_engine", model_loader_extra_config=extra)
    assert engine_host.generate() == expected


@pytest.mark.timeout(240)
def test_without_a_source_an_engine_starts_from_its_files_and_says_so(
    engine_host: EngineHost, models: dict[str, Path], tmp_path: Path
) -> None:
    expected = engine_host.tokens_of_a_fresh_start(models["dense-1"], 1)
    extra = {"metas_file": str(tmp_path / "nothing")}
    options = {"load_format": "checkpoint_engine", "model_loader_extra_config": extra}
    engine_host.start(models["dense-1"], 1, **options)
    assert engine_host.generate() == expected
    assert f"no metas from {tmp_path / 'nothing'}: " in engine_host.output()


LONG_PROMPT = [11 + number % 89 for number in range(200)]


@pytest.mark.timeout(420)
def test_updates_by_the_flag_alone(
    models: dict[str, Path], broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dummy weights, an update, one that fails half-way, and more: the last are learned."""
    one, two = ({"name": name, "model": str(models[name])} for name in ("dense-1", "dense-2"))
    wrong = {"name": "broken", "model": str(broken)}

    with running(models["dense-1"], monkeypatch, "auto", options=OBSERVED) as server:
        fresh = server.generate(), rpc(server, "digests")
        long = server.generate(LONG_PROMPT)
    with running(models["dense-2"], monkeypatch, "dummy", options=OBSERVED) as server:
        assert server.generate() != fresh[0]
        server.generate(LONG_PROMPT)  # vLLM keeps what it computes of a prompt's blocks
        assert update(tmp_path / "first", server, one) == [""]
        assert (server.generate(), rpc(server, "digests")) == fresh
        assert server.generate(LONG_PROMPT) == long
        assert get(server, "/weight_info") == {"weight_version": "dense-1"}
        (error,) = update(tmp_path / "fails", server, wrong)
        assert re.match(r"update failed on rank [01] during reload: .* in bucket \d+ of \d+", error)
        assert rpc(server, "digests") != fresh[1]  # partly written, and nothing on meta
        assert get(server, "/weight_info") == {"weight_version": "dense-1"}
        takes_lists = hasattr(base, "WeightTransferUpdatePayload")  # from 0.29 on
        each = two | {"address_for_each": takes_lists}
        assert update(tmp_path / "repairs", server, two, one, each, one) == [""] * 4
        assert (server.generate(), rpc(server, "digests")) == fresh


@pytest.mark.timeout(300)
def test_trainers_of_vllms_own_weight_transfer_send_to_an_engine(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, back = str(models["dense-2"]), str(models["dense-1"])
    with running(models["dense-1"], monkeypatch, "auto", options=OBSERVED) as server:
        before = server.generate(), rpc(server, "digests")
        for number, steps in enumerate(([there], [there, back])):
            folder, options = tmp_path / str(number), {"url": server.url, "models": steps}
            torchrun(folder, TP, "trained", 150, CPU, script=PROGRAMS, **options)
            assert ((server.generate(), rpc(server, "digests")) == before) == bool(number)


@pytest.mark.timeout(300)
def test_a_session_left_open_puts_no_worker_behind(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a client that died; the workers answer each call together, also afterwards."""
    one, two = ({"name": name, "model": str(models[name])} for name in ("dense-1", "dense-2"))
    extension = "--worker-extension-cls=checkpoint_engine.worker.VllmColocateWorkerExtension"

    def post(route: str, body: Any = None) -> Any:
        answer = httpx.post(f"{server.url}{route}", json=body, timeout=60, trust_env=False)
        return answer.raise_for_status().json()

    with running(models["dense-1"], monkeypatch, "auto", options=[*FLAG, extension]) as server:
        before = server.generate()
        post("/start_weight_update")
        assert update(tmp_path / "ranks", server, two, one) == ["", ""]
        for _ in range(2):
            versions = rpc(server, "weight_version")
            assert [held["state"] for held in versions] == ["complete"] * TP
            assert versions[0] == versions[1]
            assert versions[0]["version"]
            others = rpc(server, "supports_draft_weight_updates")
            assert others == ["False"] * TP
        assert server.generate() == before
