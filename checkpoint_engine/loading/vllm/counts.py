"""How many elements of a layer have been loaded, by which vLLM knows when it is whole.

vLLM adds up what each loader copies. Some parameters are loaded more than once: ``weight_shape``,
for each part of a layer, or what two layers share. What counts twice there would not be waited for
elsewhere in the layer: it would be processed early, and the rest be lost. Here no more elements of
a parameter count than it has.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from checkpoint_engine.loading.replay.recorder import Recorder
from checkpoint_engine.loading.vllm.direct_writes import DirectWrites

Count = Callable[..., tuple[int, Any]]


class Counts:
    """Of one model, in one update. A parameter is told by its loader, of which vLLM makes one for
    each, whatever memory it has."""

    def __init__(self) -> None:
        self._counted: Counter[Any] = Counter()

    def clear(self) -> None:
        self._counted.clear()

    def in_place_of(self, vllm: Any) -> dict[str, Count]:
        """vLLM's functions that count, by name."""
        count = getattr(vllm, "get_numel_loaded", None)
        return {} if count is None else {"get_numel_loaded": self.once(count)}

    def once(self, count: Count) -> Count:
        """As ``count``, which is vLLM's ``get_numel_loaded``."""

        def count_once(weight_loader: Any, args: inspect.BoundArguments) -> tuple[int, Any]:
            numel, result = count(weight_loader, args)
            parameter = args.arguments.get("param")
            loader = getattr(parameter, "weight_loader", None)
            if isinstance(parameter, torch.Tensor) and loader is not None:
                loader = getattr(loader, "vllms_loader", loader)
                numel = self._new_of(loader, numel, load_numel(parameter))
            return numel, result

        return count_once

    def of_lent(
        self,
        direct: DirectWrites,
        recorder: Recorder | None,
        loader: Any,
        load: Callable[[], Any],
        most: int,
    ) -> tuple[int, Any]:
        """Call a loader once, as of ``LentLoaders``. Returns how many elements it copied that do
        count, and what it returns; ``recorder`` is told."""

        def count() -> tuple[int, Any]:
            numel, result = direct.count(load, most)
            return self._new_of(loader, numel, most), result

        return count() if recorder is None else recorder.count(count)

    def _new_of(self, loader: Any, numel: int, most: int) -> int:
        before = self._counted[loader]
        self._counted[loader] = now = min(before + numel, most)
        return now - before


def load_numel(parameter: torch.Tensor) -> int:
    """How many elements of it vLLM waits for; in some releases without padding."""
    return int(getattr(parameter, "weight_loader_numel", parameter.numel()))
