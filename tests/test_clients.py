"""The programs in the field that use this library, each as it calls it, over real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from checkpoint_engine.worker import update_weights_from_ipc
from fleet import digests, mixed_tensors
from foreign import child, result_of, send
from test_update import ON_EVERY_DEVICE, environment
from torchrun import MOONCAKE_ADVICE, free_port_pair, mooncake_works, torchrun

CPU = {"PS_DEVICE": "cpu", "PS_MAX_BUCKET_SIZE_GB": str(2**-10)}
needs_mooncake = pytest.mark.skipif(not mooncake_works(), reason=MOONCAKE_ADVICE)


def run(
    tmp_path: Path, ranks: int, program: str, env: dict[str, str] | None = None, **arguments: Any
) -> list[dict[str, Any]]:
    return torchrun(
        tmp_path, ranks, program, 55, CPU | (env or {}), script="client_programs.py", **arguments
    )


@pytest.mark.parametrize("p2p", [False, pytest.param(True, marks=needs_mooncake, id="p2p")])
def test_sglang(tmp_path: Path, p2p: bool) -> None:
    results = run(tmp_path, 2, "sglang", folder=str(tmp_path), p2p=p2p)
    bodies = results[0]["bodies"]
    assert results[1]["bodies"] == []
    assert len(bodies) == (4 if p2p else 3)
    for body in bodies:
        assert body.keys() == {"zmq_handles", "flush_cache", "weight_version"}
        assert len(body["zmq_handles"]) == 2
    for result in results:
        assert result["metas"] == [0, 1]
        assert "no parameter large.1" in result["failure"]
        assert result["group"] is False  # auto_pg: the server destroyed what it made


@needs_mooncake
def test_verl(tmp_path: Path) -> None:
    results = run(tmp_path, 4, "verl", trainers=2)
    assert [result["updates"] for result in results] == [0, 0, 2, 2]
    for result in results:
        assert result["gathered"] == [0, 1, 2, 3]
        assert result["sum"] == 4
        assert result["group"] is False
        assert result["trainers"] is True


@needs_mooncake
def test_xtuner(tmp_path: Path) -> None:
    for result in run(tmp_path, 2, "xtuner"):
        assert result == {"sum": 2, "pool": [True, []]}


@needs_mooncake
def test_lmdeploy(tmp_path: Path) -> None:
    devices = {"PS_P2P_STORE_RDMA_DEVICES": "mlx5_0, mlx5_1"}
    results = run(tmp_path, 2, "lmdeploy", devices)
    bodies = results[0]["bodies"]
    assert len(bodies) == 2
    for body in bodies:
        assert body.keys() == {"zmq_handles"}
        assert len(set(body["zmq_handles"].values())) == 2


def test_vllm_with_an_older_recipe(tmp_path: Path) -> None:
    results = run(tmp_path, 2, "older_recipe", port=free_port_pair())
    bodies = results[0]["bodies"]
    assert len(bodies) == 3
    for body in bodies:
        assert body["method"] == "update_weights_from_ipc"
        (handles,) = body["args"]
        assert len(handles) == 2
    for result in results:
        assert "no parameter large.0" in result["failure"]
        assert result["group"] is True  # made by the program's call, so it stays


@pytest.mark.parametrize(("kind", "workers"), [("vllm", 2), ("sglang", 1)])
def test_ready_requests_of_two_engines(tmp_path: Path, kind: str, workers: int) -> None:
    results = run(tmp_path, 2 * workers, "ready", kind=kind)
    once = ["pause", "update", "reset_prefix_cache", "resume"] if kind == "vllm" else ["update"]
    failed = ["pause", "update"] if kind == "vllm" else ["update"]  # vLLM stays paused
    engine = [once + failed + once, *[[]] * (workers - 1)]
    assert [result["asked"] for result in results] == engine * 2
    for result in results:
        assert f"no parameter large.{2 * workers - 1}" in result["failure"]


@pytest.mark.parametrize("device", ON_EVERY_DEVICE)
def test_unirl(tmp_path: Path, device: str) -> None:
    """Its own sender, which hands over what ``reduce_tensor`` returns, to our worker."""
    environment(device, 1)
    weights = mixed_tensors(seed=1, owner=0, largest=100_000)
    address = f"ipc://{tmp_path}/s"
    loaded: dict[str, torch.Tensor] = {}
    hooks: list[bool] = []

    def load(weights: list[tuple[str, torch.Tensor]]) -> None:
        loaded.update({name: tensor.clone() for name, tensor in weights})

    with child(send, address, weights, 288 << 10, "0.4", "", device) as sender:
        with zmq.Context() as context:
            update_weights_from_ipc(
                context, address, 0, run=load, post_hook=lambda: hooks.append(True)
            )
        assert set(result_of(sender)) == {""}
    assert digests(loaded) == digests(weights)
    assert hooks == [True]


@pytest.mark.parametrize("device", ON_EVERY_DEVICE)
def test_unirl_aborts(tmp_path: Path, device: str) -> None:
    environment(device, 1)
    weights = mixed_tensors(seed=1, owner=0, largest=100_000)
    address = f"ipc://{tmp_path}/s"
    with child(send, address, weights, 288 << 10, "0.4", "bucket", device) as sender:
        with zmq.Context() as context, pytest.raises(RuntimeError, match="rank 3 failed"):
            update_weights_from_ipc(context, address, 0, run=lambda weights: None)
        assert result_of(sender) == ["", "", "silent: True"]
