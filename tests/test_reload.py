"""Loading buckets into a model: engines of many habits, none of them vLLM."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from checkpoint_engine.loading.receive import _without_frames, extract_weights
from checkpoint_engine.loading.reload import EngineReload, LoaderHabits, _unwrapped

Weights = list[tuple[str, torch.Tensor]]


class Model(torch.nn.Module):
    """Copies what it has a parameter for."""

    def __init__(self, answer: Callable[[set[str]], Any] = set) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
        self.b = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
        self.answer = answer
        self.kept: list[torch.Tensor] = []

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        loaded = set()
        for name, tensor in weights:
            if name in ("a", "b"):
                getattr(self, name).copy_(tensor)
                loaded.add(name)
        return self.answer(loaded)


class Hoarder(Model):
    """Loads only when it has everything, as layerwise reload does."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        for _, tensor in weights:
            self.kept.append(tensor)
            if len(self.kept) == 2:
                self.a.copy_(self.kept[0])
                self.b.copy_(self.kept[1])
                self.kept.clear()
        return None


def worker_of(model: Any, dtype: Any = torch.float32) -> Any:
    config = SimpleNamespace(dtype=dtype, quantization=None)
    runner = SimpleNamespace(model=model, model_config=config)
    return SimpleNamespace(device=torch.device("cpu"), model_runner=runner)


def update(worker: Any, habits: dict[str, LoaderHabits], *buckets: dict[str, float]) -> Any:
    """Every bucket overwrites the memory of the one before."""
    memory = torch.empty(256, dtype=torch.uint8)
    reload = EngineReload(worker, habits)
    try:
        for bucket in buckets:
            weights: Weights = []
            for place, (name, value) in enumerate(bucket.items()):
                tensor = memory[64 * place : 64 * place + 16].view(torch.float32)
                tensor.fill_(value)
                weights.append((name, tensor))
            del tensor
            reload.load(weights)
            memory.fill_(255)
        reload.finish()
    finally:
        reload.close()
    return reload.summary()["model"]


@pytest.mark.parametrize(
    "answer", [set, lambda _: None, lambda _: True, lambda names: (list(names), [[]])]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "auto", None])
def test_engines_answer_as_they_like(answer: Callable[[set[str]], Any], dtype: Any) -> None:
    model = Model(answer)
    taken = update(worker_of(model, dtype), {}, {"a": 1.0}, {"b": 2.0})
    assert model.a.tolist() == [1.0] * 4
    assert model.b.tolist() == [2.0] * 4
    assert (taken["tensors"], taken["bytes"], taken["held_bytes"]) == (2, 32, 0)
    assert taken["missing"] == taken["partial"] == taken["unused"] == []
    assert torch.get_default_dtype() == torch.float32


def test_what_is_lacking_and_what_is_left_over_is_told() -> None:
    habits: dict[str, LoaderHabits] = {}
    worker = worker_of(Model())
    for _ in range(2):  # the second time it is known already
        taken = update(worker, habits, {"a": 1.0, "c": 3.0})
        assert (taken["missing"], taken["unused"]) == (["b"], ["c"])
        assert (taken["missing_count"], taken["unused_count"]) == (1, 1)


def test_what_the_engine_would_not_start_without_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Loader:
        def track_weights_loading(self: Any, model: torch.nn.Module, loaded: set[str]) -> None:
            """As vLLM's: notes what a checkpoint may lack, complains about the rest."""
            loaded.add("b")
            raise ValueError

    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.model_loader"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType("vllm.model_executor.model_loader.default_loader")
    monkeypatch.setattr(module, "DefaultModelLoader", Loader, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert update(worker_of(Model()), {}, {"a": 1.0})["missing"] == ["b"]
    with pytest.raises(ValueError, match=r"lacks 1 parameters .*not start: \['a'\]"):
        update(worker_of(Model()), {}, {"b": 1.0})


def test_a_loader_that_keeps_tensors_gets_copies_from_then_on() -> None:
    habits: dict[str, LoaderHabits] = {}
    model = Hoarder()
    worker = worker_of(model)
    with pytest.raises(RuntimeError, match="update again"):
        update(worker, habits, {"a": 1.0}, {"b": 2.0})
    model.kept.clear()
    update(worker, habits, {"a": 1.0}, {"b": 2.0})
    assert model.a.tolist() == [1.0] * 4
    assert model.b.tolist() == [2.0] * 4


class KeepsOne(torch.nn.Module):
    """Of each bucket the first tensor; the others are of other dtypes, or of the same."""

    def __init__(self, dtypes: list[torch.dtype]) -> None:
        super().__init__()
        self.kept: torch.Tensor | None = None
        for number, dtype in enumerate(dtypes):
            zeros = torch.zeros(4, dtype=dtype)
            self.register_parameter(f"p{number}", torch.nn.Parameter(zeros, requires_grad=False))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            self.kept = tensor if name == "p0" else self.kept
            parameters[name].copy_(tensor)
        return set(parameters)


DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float16]


@pytest.mark.parametrize("mode", ["off", "on"])
@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES[:2], DTYPES, [torch.float32] * 4])
def test_one_tensor_of_several_that_is_kept_is_noticed(
    monkeypatch: pytest.MonkeyPatch, mode: str, dtypes: list[torch.dtype]
) -> None:
    """Views hold what they are views of, which holds the memory as well."""
    monkeypatch.setenv("PS_REPLAY", mode)
    model, habits = KeepsOne(dtypes), dict[str, LoaderHabits]()
    for step in range(3):
        memory = torch.zeros(256 * len(dtypes), dtype=torch.uint8)
        memory[:16].view(torch.float32).fill_(step)
        bucket: Any = [
            {"name": f"p{n}", "dtype": dtype, "shape": torch.Size([4]), "offset": 256 * n}
            for n, dtype in enumerate(dtypes)
        ]
        reload = EngineReload(worker_of(model), habits)
        try:
            with pytest.raises(RuntimeError, match="update again") if step == 0 else nullcontext():
                reload.load_bucket(extract_weights(bucket, memory), b"x", memory)
            memory.fill_(255)
            if step > 0:
                reload.finish()
                assert model.kept is not None
                assert model.kept.tolist() == [float(step)] * 4
        finally:
            reload.close()


def test_a_layer_within_an_adapter_is_expected_by_its_own_name() -> None:
    """vLLM wraps layers for LoRA; their parameters are of ``base_layer`` then."""

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Module()
            self.a.base_layer = torch.nn.Linear(2, 2, bias=False).requires_grad_(False)

        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            for _, tensor in weights:
                self.a.base_layer.weight.copy_(tensor.view(2, 2))

    model, habits = Wrapped(), dict[str, LoaderHabits]()
    for _ in range(3):
        assert update(worker_of(model), habits, {"a.weight": 3.0})["missing"] == []


def test_a_parameter_that_the_loader_fills_by_itself_is_not_missing() -> None:
    model, habits = Model(lambda _: {"a", "b"}), dict[str, LoaderHabits]()
    for _ in range(3):
        assert update(worker_of(model), habits, {"a": 3.0, "b.scale": 1.0})["missing"] == []


class Joining(torch.nn.Module):
    """Writes a parameter once both of its tensors are there, within one call."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.wk = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
        self.other = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
        self._names = names

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        there = dict(weights)
        if "other" in there:
            self.other.copy_(there["other"])
        if all(name in there for name in self._names):
            self.wk.copy_(torch.stack([there[name] for name in self._names]).sum(0))


def test_what_a_loader_joins_is_given_to_it_in_one_call() -> None:
    model, habits = Joining(("wk.weight", "wk.scale")), dict[str, LoaderHabits]()
    first, second = {"wk.weight": 2.0, "other": 1.0}, {"wk.scale": 3.0}
    says = r"1 parameters got nothing, as \['wk'\].*left over, as \['wk.scale', 'wk.weight'\]"
    with pytest.raises(RuntimeError, match=says):
        update(worker_of(model), habits, first, second)
    for _ in range(2):
        model.wk.zero_()
        taken = update(worker_of(model), habits, first, second)
        assert model.wk.tolist() == [5.0] * 4
        assert model.other.tolist() == [1.0] * 4
        assert taken["tensors"] == 3


def test_what_a_loader_leaves_alone_in_one_call_too_is_left_over() -> None:
    """As it would be at a start from the same files."""
    model, habits = Joining(("something else",)), dict[str, LoaderHabits]()
    buckets: list[dict[str, float]] = [{"wk.weight": 2.0, "other": 1.0}, {"wk.scale": 3.0}]
    with pytest.raises(RuntimeError, match="Update again"):
        update(worker_of(model), habits, *buckets)
    for _ in range(3):
        update(worker_of(model), habits, *buckets)


class Viewing(Model):
    """Keeps views of a parameter, whose memory its loader replaces."""

    def __init__(self, new: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.register_buffer("square", self.a.data.view(2, 2), persistent=False)
        self.tail = self.a.data[1:]
        self.bits = self.tail.view(torch.int32)
        self.made_anew = self.a.data[:2]
        self.new = new

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        for name, tensor in weights:
            getattr(self, name).data = self.new(tensor)
        self.made_anew = self.a.data[:2] * 2
        return {"a", "b"}


def test_a_view_of_a_parameter_stays_one() -> None:
    model = Viewing(torch.clone)
    for value in (1.0, 2.0, 3.0, 4.0):
        update(worker_of(model), {}, {"a": value, "b": value})
        assert torch.equal(model.square, torch.full((2, 2), value))
        assert torch.equal(model.tail, torch.full((3,), value))
        assert torch.equal(model.bits, model.tail.view(torch.int32))
        assert torch.equal(model.made_anew, torch.full((2,), 2 * value))
        assert model.square is model.get_buffer("square")
        assert model.a.untyped_storage()._cdata == model.square.untyped_storage()._cdata


def test_a_view_of_a_parameter_that_has_another_form_now_is_an_error() -> None:
    model = Viewing(lambda tensor: tensor.double())
    with pytest.raises(RuntimeError, match=r"square was a view of a, .* start it with the new"):
        update(worker_of(model), {}, {"a": 1.0, "b": 1.0})


class Wrapper:
    """As vLLM's for CUDA graphs: no module, but it passes everything on."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def unwrap(self) -> torch.nn.Module:
        return self._model


def test_the_model_is_found_within_its_wrappers() -> None:
    model = Model()
    assert _unwrapped(Wrapper(Wrapper(model))) is model  # type: ignore[arg-type]
    assert _unwrapped(model) is model
    assert _unwrapped(None) is None
    update(worker_of(Wrapper(model)), {}, {"a": 5.0, "b": 6.0})
    assert model.a.tolist() == [5.0] * 4


def test_a_drafter_of_the_same_checkpoint_is_loaded_and_another_is_not() -> None:
    for draft_checkpoint, expected in (("target", 7.0), ("eagle", 0.0)):
        drafter = Model()
        worker = worker_of(Model())
        worker.model_runner.drafter = SimpleNamespace(model=drafter)
        drafted = SimpleNamespace(model=draft_checkpoint, quantization=None)
        habits: dict[str, LoaderHabits] = {}
        reload = EngineReload(worker, habits)
        assert set(reload.summary()) == {"model", "drafter"}
        worker.vllm_config = SimpleNamespace(
            speculative_config=SimpleNamespace(draft_model_config=drafted),
            model_config=SimpleNamespace(model="target"),
        )
        roles = set(EngineReload(worker, habits).summary())
        assert ("drafter" in roles) == bool(expected)


def test_errors_that_cause_each_other_end() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__context__ = second, first
    assert _without_frames(first) is first
    assert "second" in first.__notes__[-1]


def test_what_neither_loader_nor_engine_tells_is_not_said_to_be_complete(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PS_REPLAY", "off")
    for answer, counts in ((set, {"missing": 1}), (lambda _: None, {})):
        reload = EngineReload(worker_of(Model(answer)), {})
        reload.load([("a", torch.ones(4))])
        reload.finish()
        assert reload.statement() == {
            "model": {"tensors": 1, "left_over": 0, "partial": 0} | counts
        }


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What vLLM 0.33's functions were called with, in order; a stand-in for that module."""
    calls: list[Any] = []
    module: Any = ModuleType("lm_head")
    module.share_source_lm_heads = lambda model: calls.append(("share", model))
    module.restore_quantized_lm_heads = lambda model, refresh: calls.append((refresh, model))
    package = "vllm.model_executor.layers.quantization.online"
    parts = package.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, f"{package}.lm_head", module)
    return calls


@pytest.mark.parametrize("fails", [False, True])
def test_a_drafters_copies_of_heads_are_away_while_it_is_loaded(
    heads: list[Any], fails: bool
) -> None:
    drafter = Model()
    worker = worker_of(Model())
    worker.model_runner.drafter = SimpleNamespace(model=drafter)
    reload = EngineReload(worker, {})
    assert heads == [("share", drafter)]
    if not fails:
        memory = torch.ones(8)
        reload.load([("a", memory[:4]), ("b", memory[4:])])
        reload.finish()
    reload.close()
    reload.close()
    assert heads[1:] == [(not fails, drafter)]


def test_an_engine_without_a_drafter_shares_no_heads(heads: list[Any]) -> None:
    update(worker_of(Model()), {}, {"a": 1.0, "b": 2.0})
    assert heads == []
