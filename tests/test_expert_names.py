"""vLLM's loader of experts is shown the entries of its mapping that fit, and does the same."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.loading.vllm.expert_names import ExpertNames

MODULE = "vllm.model_executor.layers.fused_moe.routed_experts"
FUSED = [("w13_weight", "experts.gate_up_proj", e, "w1") for e in range(2)]


class Experts:
    """As ``RoutedExperts`` of vLLM 0.26 and 0.28, which notes what it would load, and where."""

    def __init__(self, layer_name: str, mapping: list[tuple[str, str, int, str]]) -> None:
        self.layer_name, self._mapping = layer_name, mapping
        self.loaded: list[Any] = []
        self.entries_seen = 0

    def get_expert_mapping(self, include_fused: bool = False) -> list[tuple[str, str, int, str]]:
        assert include_fused
        return list(self._mapping)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
        expert_mapping = self.get_expert_mapping(include_fused=True)
        for expert_name, loaded_weight in weights:
            qual_name = f"{self.layer_name}.{expert_name}"
            is_fused = loaded_weight.dim() == 3
            matched = False
            for param_name, weight_name, expert_id, shard_id in expert_mapping:
                self.entries_seen += 1
                if weight_name not in qual_name:
                    if matched and is_fused:
                        break
                    continue
                matched = True
                if "bad" in qual_name:
                    raise KeyError(qual_name)
                self.loaded.append((qual_name, param_name, expert_id, shard_id))
                yield param_name


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType(MODULE)
    module.RoutedExperts = type("RoutedExperts", (Experts,), dict(vars(Experts)))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, module)
    return module


def mapping_of(experts: int, copies: int = 0) -> list[tuple[str, str, int, str]]:
    """``copies``: of the first experts there are second ones."""
    numbers = [*range(experts), *range(copies)]
    return FUSED + [
        (f"experts.{'w2' if part == 'down' else 'w13'}_", f"experts.{e}.{part}_proj.", n, shard)
        for n, e in enumerate(numbers)
        for part, shard in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
    ]


tensors = st.lists(
    st.tuples(
        st.sampled_from(
            [f"{e}.{p}_proj.{k}" for e in range(4) for p in ("gate", "down", "up") for k in "ab"]
            + ["gate_up_proj", "down_proj", "1.unknown", "11.gate_proj.a", "0.up_proj"]
        ),
        st.sampled_from([1, 2, 3]),
    ),
    max_size=12,
)


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans(), tensors), max_size=5))
def test_the_same_is_loaded_whatever_the_names(
    calls: list[tuple[int, bool, list[tuple[str, int]]]],
) -> None:
    module = ModuleType(MODULE)
    module.RoutedExperts = type("RoutedExperts", (Experts,), dict(vars(Experts)))  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, MODULE, module)
        names = ExpertNames()
        for number, copies, given_tensors in calls:
            layer_name = f"model.layers.{number}.mlp.experts"
            one, other = (
                kind(layer_name, mapping_of(3, 2 if copies else 0))
                for kind in (module.RoutedExperts, Experts)
            )
            weights = [(name, torch.empty([1] * dims)) for name, dims in given_tensors]
            with names.around_loader():
                found = list(one.load_weights(iter(weights)))
            assert found == list(other.load_weights(weights))
            assert one.loaded == other.loaded


def test_few_entries_are_looked_at_and_nothing_stays_behind(vllm: Any) -> None:
    load, names = vllm.RoutedExperts.load_weights, ExpertNames()
    weights = [
        (f"{e}.{p}_proj.weight", torch.empty(2, 2)) for e in range(64) for p in ("up", "down")
    ]
    for number in range(3):
        layer = vllm.RoutedExperts(f"model.layers.{number}.mlp.experts", mapping_of(64))
        with names.around_loader():
            assert len(list(layer.load_weights(weights))) == len(weights)
        assert layer.entries_seen == len(weights)
        assert "get_expert_mapping" not in vars(layer)
        assert vllm.RoutedExperts.load_weights is load


def test_a_loader_that_fails_leaves_nothing_behind(vllm: Any) -> None:
    load = vllm.RoutedExperts.load_weights
    layer = vllm.RoutedExperts("model.bad.mlp.experts", mapping_of(2))
    with pytest.raises(KeyError, match="bad"), ExpertNames().around_loader():
        list(layer.load_weights([("0.up_proj.weight", torch.empty(2, 2))]))
    assert "get_expert_mapping" not in vars(layer)
    assert vllm.RoutedExperts.load_weights is load


def test_a_release_that_has_an_index_is_left_alone(vllm: Any) -> None:
    vllm._index_expert_mapping = None
    load = vllm.RoutedExperts.load_weights
    with ExpertNames().around_loader():
        assert vllm.RoutedExperts.load_weights is load
