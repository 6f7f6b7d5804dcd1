"""What vLLM's workers hold already is not sent again, and keeps what the engine computes with."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from test_in_place import (
    LEARNING,
    Bucket,
    Engine,
    Layer,
    Process,
    addresses,
    another_form,
    another_memory,
    computes,
    halves,
    moves,
    nothing,
    packs,
    whole,
)
from vllm.model_executor.model_loader.reload import layerwise

from checkpoint_engine.ground.needs import tensors_digest
from checkpoint_engine.loading.reload import EngineReload
from conftest import EngineHost
from torchrun import torchrun


def update(engine: Engine, tensors: Bucket, fails_after: int = 99) -> list[str]:
    """One tensor to a bucket, of those that the model does not hold, which are returned."""
    names = sorted(tensors)
    about = [(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in names]
    hashes = [hashlib.blake2b(tensors[n].numpy().tobytes(), digest_size=16) for n in names]
    reload = EngineReload(engine._worker, engine._habits)
    memory, sent = torch.empty(64), []
    try:
        reload.check()
        reload.begin()
        held = reload.held
        assert held is not None
        bits = held.offer(tensors_digest(about), b"".join(one.digest() for one in hashes))
        held.leave_out(bits)
        for place, name in enumerate(names):
            if bits[place // 8] >> (7 - place % 8) & 1:
                continue
            if len(sent) == fails_after:
                raise ConnectionError("the server is gone")
            tensor = tensors[name]
            weights = [(name, memory[: tensor.numel()].view(tensor.shape).copy_(tensor))]
            reload.load(weights)
            memory.fill_(float("nan"))
            sent.append(name)
        reload.finish()
    finally:
        reload.close()
    engine.report = reload.summary()["model"]  # type: ignore[attr-defined]
    return sent


def is_right(engine: Engine, process: Process, tensors: Bucket) -> bool:
    """As after a start from these weights."""
    fresh = Layer(process)
    with torch.no_grad():
        fresh.weight = torch.nn.Parameter(whole(tensors, "a"), requires_grad=False)
    process(fresh)
    a, b = engine.model.a, engine.model.b
    is_same = torch.equal(a.weight, fresh.weight) and torch.equal(b.weight, whole(tensors, "b"))
    return is_same and str(getattr(a, "seen", "")) == str(getattr(fresh, "seen", ""))


def mixed(a: int, b: int) -> Bucket:
    return {n: halves(a if n.startswith("a") else b)[n] for n in halves(0)}


@pytest.mark.parametrize("process", [nothing, moves, computes, packs, another_memory, another_form])
def test_a_layer_that_gets_nothing_keeps_what_it_was_processed_into(
    process: Process, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise.logger, "propagate", True)
    caplog.set_level(logging.WARNING)
    engine = Engine(process)
    steps = [(1, 1), (1, 1), (1, 1), (2, 1), (2, 2), (2, 2), (3, 3), (3, 4)]
    seen = []
    for a, b in steps:
        before = addresses(engine.model)
        seen.append("".join(dict.fromkeys(n[0] for n in update(engine, mixed(a, b)))))
        assert is_right(engine, process, mixed(a, b))
        assert addresses(engine.model) == before
        assert engine.report["missing"] == engine.report["partial"] == []  # type: ignore[attr-defined]
    assert seen == ["ab", "ab", "", "a", "b", "", "ab", "b"]
    assert not [one for one in caplog.records if "Failed to load weights" in one.getMessage()]


@pytest.mark.parametrize("process", [moves, packs, another_form])
@pytest.mark.parametrize(("after", "rest"), [(1, "ab"), (2, "b"), (3, "b")])
def test_after_a_failure_what_was_processed_is_held(
    process: Process, after: int, rest: str
) -> None:
    engine = Engine(process)
    for _ in range(LEARNING + 1):
        update(engine, halves(1))
    with pytest.raises(ConnectionError):
        update(engine, halves(2), fails_after=after)
    assert "".join(dict.fromkeys(n[0] for n in update(engine, halves(2)))) == rest
    assert is_right(engine, process, halves(2))


def test_a_reload_of_vllms_own_is_noticed() -> None:
    engine = Engine(moves)
    for _ in range(LEARNING + 1):
        update(engine, halves(1))
    model, config = engine.model, engine.runner.model_config
    layerwise.initialize_layerwise_reload(model)
    model.load_weights(list(mixed(5, 1).items()))
    layerwise.finalize_layerwise_reload(model, config)
    assert is_right(engine, moves, mixed(5, 1))
    assert update(engine, halves(1)) == ["a.0", "a.1"]
    assert is_right(engine, moves, halves(1))


def test_a_weight_that_was_packed_anew_behind_our_back_is_sent() -> None:
    """What a kernel has packed is seen nowhere; that it is another kernel is."""
    engine = Engine(packs)
    engine.model.a.quant_method._process = lambda layer: setattr(layer, "packed", _Kernel(layer))
    for _ in range(LEARNING + 1):
        update(engine, halves(1))
    assert update(engine, halves(1)) == []
    engine.model.a.packed = _Kernel(engine.model.a)
    assert update(engine, halves(1)) == ["a.0", "a.1"]


class _Kernel:
    def __init__(self, layer: Any) -> None:
        self.handle = layer.weight.data_ptr()


@pytest.mark.timeout(300)
def test_a_real_engine(engine_host: EngineHost, models: dict[str, Path], tmp_path: Path) -> None:
    """Tokens and bits are those of an update that sends everything."""
    first, second, tp = str(models["dense-1"]), str(models["dense-2"]), 2
    engine_host.start(models["dense-2"], tp)
    steps = [
        {"name": "step", "model": first, "other": other, "bucket_gb": "1e-4", "replay": replay}
        for other, replay in (
            (second, "off"),
            ("", "off"),
            *[("", "on")] * 4,
            (second, "on"),
            (second, "on"),
        )
    ]
    ranks = torchrun(
        tmp_path,
        tp,
        "updates",
        200,
        {"PS_DEVICE": "cpu", "PS_SKIP_EQUAL": "1"},
        script="with_vllm/vllm_programs.py",
        url=engine_host.url,
        steps=steps,
    )
    seen = ranks[0]
    every = seen[0]["sent"][0]
    sent = [one["sent"][0] for one in seen]
    skipped = [one["sent"][1] for one in seen]
    print(f"tensors sent: {sent}, not sent: {skipped}")
    assert [a + b for a, b in zip(sent, skipped, strict=True)] == [every] * len(steps)
    assert skipped[:4] == [0] * 4
    assert skipped[4:6] == skipped[7:] * 2 == [every] * 2
    assert 0 < skipped[6] < every
    for step, one in zip(steps, seen, strict=True):
        plain = seen[0 if step["other"] else 1]
        assert one["tokens"] == plain["tokens"]
        assert one["digests"] == plain["digests"]
        for worker in one["results"]:
            assert worker["model"]["missing"] == []
    warned = [x for x in engine_host.output().splitlines() if "Failed to load weights" in x]
    assert [line for line in warned if "RotaryEmbedding" not in line] == []  # in no checkpoint
