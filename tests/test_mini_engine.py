"""The example engine and the demo: tensor parallelism, weight loaders, HTTP, and how they end."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from demo import TP, Engine  # noqa: E402
from parallel_layers import TensorParallel  # noqa: E402
from random_checkpoint import (  # noqa: E402
    expected_digests,
    model_config,
    tensor_shapes,
    write_checkpoint,
)
from tiny_transformer import CausalLM, KVCache, ModelConfig, new_model  # noqa: E402

PROMPT = [3, 1, 4, 1, 5]
SOON = 20.0  # seconds; what is waited for takes well under one


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("checkpoints") / "small"
    write_checkpoint(folder, model_config("small"), seed=7)
    return folder


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine(checkpoint, "safetensors") as engine:
        engine.wait_until_healthy()
        yield engine


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


class ThreadGroup:
    """Ranks as threads: an all-reduce that meets at a barrier."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=SOON)
        self._parts: dict[int, torch.Tensor] = {}

    def place(self, rank: int) -> TensorParallel:
        def all_reduce(tensor: torch.Tensor) -> None:
            self._parts[rank] = tensor.clone()
            self._barrier.wait()
            tensor.copy_(torch.stack([self._parts[r] for r in range(self.size)]).sum(0))
            self._barrier.wait()

        return TensorParallel(rank, self.size, all_reduce)

    def run(self, action: Callable[[TensorParallel], Any]) -> list[Any]:
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda rank: action(self.place(rank)), range(self.size)))


def float32_model(folder: Path, tp: TensorParallel) -> CausalLM:
    config = ModelConfig.from_folder(folder)
    return new_model(
        ModelConfig(**{**vars(config), "dtype": torch.float32}), tp, torch.device("cpu")
    )


def test_two_ranks_compute_what_one_does(checkpoint: Path) -> None:
    tensors = tensors_of(checkpoint)

    def answer(tp: TensorParallel) -> tuple[torch.Tensor, list[int]]:
        model = float32_model(checkpoint, tp)
        model.load_weights(tensors.items())
        layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
        storage = torch.empty(2, layers, len(PROMPT), heads // tp.size, model.config.head_dim)
        with torch.inference_mode():
            logits = model(torch.tensor(PROMPT), KVCache(storage))
        return logits, model.generate(PROMPT, 12)

    ((alone, tokens),) = ThreadGroup(1).run(answer)
    for logits, same_tokens in ThreadGroup(2).run(answer):
        torch.testing.assert_close(logits, alone, rtol=1e-3, atol=1e-3)
        assert same_tokens == tokens
    assert len(set(tokens)) > 6


def test_decoding_with_the_cache_is_decoding_from_scratch(checkpoint: Path) -> None:
    model = float32_model(checkpoint, TensorParallel())
    model.load_weights(tensors_of(checkpoint).items())
    tokens = model.generate(PROMPT, 6)
    for count in range(1, 6):
        assert model.generate(PROMPT + tokens[:count], 1) == [tokens[count]]


@pytest.mark.parametrize("size", [1, 2])
def test_any_order_of_small_pieces_fills_every_shard(checkpoint: Path, size: int) -> None:
    def load(tp: TensorParallel) -> CausalLM:
        model = new_model(ModelConfig.from_folder(checkpoint), tp, torch.device("cpu"))
        for name, tensor in reversed(tensors_of(checkpoint).items()):
            model.load_weights([(name, tensor)])
        return model

    tensors = tensors_of(checkpoint)
    for rank, model in enumerate(ThreadGroup(size).run(load)):
        parameters = dict(model.named_parameters())
        attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
        qkv = [tensors[f"{attention}.{part}_proj.weight"].chunk(size)[rank] for part in "qkv"]
        assert torch.equal(parameters[f"{attention}.qkv_proj.weight"], torch.cat(qkv))
        gate_up = [tensors[f"{mlp}.{n}_proj.weight"].chunk(size)[rank] for n in ("gate", "up")]
        assert torch.equal(parameters[f"{mlp}.gate_up_proj.weight"], torch.cat(gate_up))
        down = tensors[f"{mlp}.down_proj.weight"].chunk(size, dim=1)[rank]
        assert torch.equal(parameters[f"{mlp}.down_proj.weight"], down)
        assert torch.equal(parameters["model.norm.weight"], tensors["model.norm.weight"])
        head = tensors["lm_head.weight"].chunk(size)[rank]
        assert torch.equal(parameters["lm_head.weight"], head)


def test_the_model_knows_the_checkpoint_it_needs(checkpoint: Path) -> None:
    model = float32_model(checkpoint, TensorParallel())
    assert model.checkpoint_names() == set(tensor_shapes(model_config("small")))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.0.self_attn.k_proj.weight", (1, 256), "cannot load .*k_proj.*2 x 64"),
        (
            "model.layers.0.self_attn.k_proj.weight",
            (128, 1),
            "cannot load .*k_proj.*64, 256",
        ),
        ("model.layers.0.mlp.down_proj.weight", (256, 256), "cannot load .*down_proj.*2 x 256"),
        ("model.norm.weight", (1,), "cannot load 'model.norm.weight'.*256"),
        ("model.layers.9.mlp.up_proj.weight", (512, 256), "no place for .*layers.9.mlp.up_proj"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    checkpoint: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    model = float32_model(checkpoint, TensorParallel(rank=1, size=2))
    with pytest.raises(ValueError, match=message):
        model.load_weights([(name, torch.zeros(shape))])


def test_heads_that_cannot_be_split_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be split evenly over 3 ranks"):
        float32_model(checkpoint, TensorParallel(rank=0, size=3))


def test_workers_hold_their_slices_of_the_files(engine: Engine, checkpoint: Path) -> None:
    assert engine.call_workers("weights_digest") == expected_digests(checkpoint, TP)


def test_generate_is_greedy_and_checks_its_input(engine: Engine) -> None:
    assert engine.generate() == engine.generate()
    for body, status in (({"prompt_token_ids": []}, 422), ({"prompt_token_ids": [-1]}, 500)):
        assert post(engine, "generate", body).status_code == status
    assert engine.generate()


def test_a_failed_call_carries_the_workers_traceback(engine: Engine) -> None:
    handles = {"CPU-elsewhere-0": "ipc:///nowhere"}
    response = post(
        engine, "collective_rpc", {"method": "update_weights_from_ipc", "args": [handles]}
    )
    assert response.status_code == 500
    detail = response.json()["detail"]
    assert all(text in detail for text in ("worker 0", "worker 1", "Traceback", "CPU-elsewhere-0"))
    assert post(engine, "collective_rpc", {"method": "__init__"}).status_code == 500
    assert len(engine.call_workers("describe")) == TP


def test_a_call_that_takes_too_long_is_given_up(engine: Engine) -> None:
    slow = {"method": "generate", "args": [PROMPT, 50], "timeout": 0.05}
    response = post(engine, "collective_rpc", slow)
    assert response.status_code == 500
    assert "generate: no answer from workers [0, 1]" in response.json()["detail"]
    assert [worker["rank"] for worker in engine.call_workers("describe")] == [0, 1]


def test_a_killed_worker_is_noticed_at_once(checkpoint: Path) -> None:
    with Engine(checkpoint, "dummy") as engine:
        engine.wait_until_healthy()
        workers = [worker["pid"] for worker in engine.call_workers("describe")]
        with ThreadPoolExecutor(1) as pool:
            body = {"prompt_token_ids": PROMPT, "max_tokens": 100_000}
            running = pool.submit(post, engine, "generate", body)
            os.kill(workers[1], signal.SIGKILL)
            started = time.monotonic()
            response = running.result()
        assert time.monotonic() - started < SOON
        assert response.status_code == 500
        assert f"worker 1 (pid {workers[1]}) died: signal 9" in response.json()["detail"]
        assert httpx.get(f"{engine.url}/health", trust_env=False).status_code == 503
        again = post(engine, "collective_rpc", {"method": "describe"})
        assert again.status_code == 500
        assert "worker 1" in again.json()["detail"]
        engine.process.send_signal(signal.SIGTERM)
        assert engine.process.wait(SOON) == 0
        wait_for_exit(workers)


def test_workers_do_not_outlive_a_killed_engine(checkpoint: Path) -> None:
    with Engine(checkpoint, "dummy") as engine:
        engine.wait_until_healthy()
        workers = [worker["pid"] for worker in engine.call_workers("describe")]
        handles = [os.pidfd_open(pid) for pid in workers]
        engine.process.kill()
        for handle in handles:
            assert select.select([handle], [], [], SOON)[0]
            os.close(handle)


def test_an_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "mini_engine.py"), "--port=0", f"--model={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SOON, check=False)
    assert done.returncode == 1
    assert "worker 0" in done.stderr
    assert str(tmp_path / "config.json") in done.stderr


@pytest.mark.timeout(240)
def test_demo() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py"), "--size=small"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASS") == 6
    assert "left behind: nothing" in done.stdout


@pytest.mark.timeout(240)
@pytest.mark.parametrize("label", ["engines", "checkpoint"])
def test_an_interrupted_demo_leaves_nothing(label: str) -> None:
    """``label`` is of the line after which the interrupt comes."""
    demo = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "demo.py"), "--size=small"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert demo.stdout is not None
    for line in demo.stdout:
        if line.split()[:1] == [label]:
            demo.send_signal(signal.SIGINT)
            break
    rest, _ = demo.communicate()
    assert demo.returncode == 1
    assert "left behind: nothing" in rest
    assert "interrupted" in rest


def post(engine: Engine, route: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{engine.url}/{route}", json=body, timeout=SOON, trust_env=False)


def wait_for_exit(pids: list[int]) -> None:
    deadline = time.monotonic() + SOON
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, f"still running: {pids}"
        time.sleep(0.05)
