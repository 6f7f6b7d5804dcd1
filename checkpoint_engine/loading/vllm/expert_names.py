"""Which parameter a tensor of an expert belongs to, found at once.

Through release 0.31 vLLM's loader of experts compares the name of each tensor with those of all
experts, hundreds, which takes as long as the rest of loading it. Here it is shown those that fit.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch

_MODULE = "vllm.model_executor.layers.fused_moe.routed_experts"

Entry = tuple[str, str, int, str]
"""Of vLLM's mapping: the second one is what the name of a tensor has in it."""


class ExpertNames:
    """Remembers from layer to layer, whose names differ by their numbers, which entries fit."""

    def __init__(self) -> None:
        self._mapping: list[Entry] = []
        self._found: dict[tuple[str, str], list[Entry]] = {}

    def _fitting(self, mapping: list[Entry], layer: str) -> Any:
        """What finds those of a tensor, by its name within the layer."""
        if mapping != self._mapping:
            self._mapping, self._found = mapping, {}
        kind = re.sub(r"\d+", "#", layer)

        def fit(name: str) -> list[Entry]:
            whole = f"{layer}.{name}"
            found = self._found.get((kind, name))
            if found is None or not all(entry[1] in whole for entry in found):
                found = [entry for entry in mapping if entry[1] in whole]
                self._found[kind, name] = found
            return found

        return fit

    @contextlib.contextmanager
    def around_loader(self) -> Iterator[None]:
        """Around a model's loader, under any vLLM: what it loads stays the same."""
        module = sys.modules.get(_MODULE)
        experts: Any = getattr(module, "RoutedExperts", None)
        own = {"load_weights", "get_expert_mapping"} <= vars(experts).keys() if experts else False
        if not own or hasattr(module, "_index_expert_mapping"):  # it has an index of its own
            yield
            return
        load = experts.load_weights

        def load_weights(layer: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
            mapping = layer.get_expert_mapping(include_fused=True)
            fit = self._fitting(mapping, layer.layer_name)
            for name, tensor in weights:
                # Experts in one tensor belong to the first entries in a row that fit.
                shown = mapping if tensor.dim() == 3 else fit(name)
                vars(layer)["get_expert_mapping"] = lambda shown=shown, **_: shown
                try:
                    yield from load(layer, [(name, tensor)])
                finally:
                    del vars(layer)["get_expert_mapping"]

        experts.load_weights = load_weights
        try:
            yield
        finally:
            experts.load_weights = load
