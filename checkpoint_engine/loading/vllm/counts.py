"""How many elements of a layer have been loaded, by which vLLM knows when it is whole.

vLLM adds up what each loader copies. Some elements are loaded more than once: ``weight_shape``, for
each part of a layer; the scale of an expert's input, for two of its matrices; what two layers
share. What counts twice there would not be waited for elsewhere in the layer: it would be processed
early, and the rest be lost. Here an element counts once.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from checkpoint_engine.loading.replay.memory import key_of
from checkpoint_engine.loading.replay.recorder import Recorder
from checkpoint_engine.loading.vllm.direct_writes import Copied, DirectWrites

Count = Callable[..., tuple[int, Any]]


class Counts:
    """Of one model, in one update. A parameter is told by its loader, of which vLLM makes one for
    each, whatever memory it has."""

    def __init__(self) -> None:
        self._counted: Counter[Any] = Counter()
        self._seen: defaultdict[Any, set[Copied]] = defaultdict(set)

    def clear(self) -> None:
        self._counted.clear()
        self._seen.clear()

    def of_waiting(self, direct: DirectWrites, recorder: Recorder | None, count: Count) -> Count:
        """In place of ``count``, vLLM's ``get_numel_loaded``, which calls a loader that it will
        call again; ``recorder`` is told.

        What loaders copy elsewhere counts there, as in vLLM.
        """
        mode = getattr(sys.modules[count.__module__], "CopyCounter", None)

        def count_once(weight_loader: Any, args: inspect.BoundArguments) -> tuple[int, Any]:
            def load() -> tuple[int, Any]:
                copied, (numel, result) = direct.count(lambda: count(weight_loader, args))
                parameter = args.arguments.get("param")
                loader = getattr(parameter, "weight_loader", None)
                if loader is not None and isinstance(parameter, torch.Tensor):
                    loader, most = getattr(loader, "vllms_loader", loader), load_numel(parameter)
                    with direct.unrecorded():
                        key = key_of(parameter)  # another one once it has memory
                    own: set[Copied] = {(None, view) for where, view in copied if where == key}
                    numel = self._new_of(loader, own, numel, most)
                return numel, result

            return load() if recorder is None else recorder.count(load, mode)

        return count_once

    def of_lent(
        self,
        direct: DirectWrites,
        recorder: Recorder | None,
        loader: Any,
        parameter: torch.Tensor,
        load: Callable[[], Any],
        most: int,
    ) -> tuple[int, Any]:
        """Call a loader once, as of ``LentLoaders``. Returns how many elements count, and what it
        returns; ``recorder`` is told."""

        def count() -> tuple[int, Any]:
            copied, result = direct.count(load)
            if len(copied) > 1:  # perhaps by way of other memory
                with direct.unrecorded():
                    key = key_of(parameter)
                copied = [one for one in copied if one[0] == key]
            return self._new_of(loader, set(copied), most if copied else 0, most), result

        return count() if recorder is None else recorder.count(count)

    def _new_of(self, loader: Any, copied: set[Copied], numel: int, most: int) -> int:
        """How many elements were not counted before. Some loaders copy a part twice, or change in
        place what they have just copied.

        Args:
            copied: into the parameter; none that a loader copies in a thread of its own.
            numel: no more than these, as vLLM counts them.
            most: the parameter has.
        """
        seen = self._seen[loader]
        if copied:
            numel = min(numel, _numel_of(copied - seen))
        seen |= copied
        before = self._counted[loader]
        self._counted[loader] = now = min(before + numel, most)
        return now - before


def _numel_of(copied: Iterable[Copied]) -> int:
    return sum([math.prod(view.sizes) for _, view in copied])


def load_numel(parameter: torch.Tensor) -> int:
    """How many elements of it vLLM waits for; in some releases without padding."""
    return int(getattr(parameter, "weight_loader_numel", parameter.numel()))
