"""Layers that vLLM's layerwise reload leaves as they are loaded, written where the engine computes
with them: they are not made anew, and no parameter changes its address."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from checkpoint_engine.loading.replay.processing import Processing, has_form_of
from checkpoint_engine.loading.replay.recorder import Recorder

Tensors = dict[str, torch.Tensor]


@dataclass
class _Filled:
    """How many elements of a layer were written in place, of how many that vLLM counts."""

    total: int
    numel: int = 0


class LayersInPlace:
    """Of one model: which layers were seen to be left as they are loaded, in an update that learns,
    and those that an update writes in place."""

    def __init__(
        self,
        vllm: Any,
        layers: Mapping[str, torch.nn.Module],
        infos: Mapping[torch.nn.Module, Any],
        make: Callable[[str], None],
    ) -> None:
        """
        Args:
            vllm: the module that layerwise reload is in.
            infos: what it knows of each layer.
            make: makes a layer's tensors, as those of one that is loaded in parts.
        """
        self._vllm = vllm
        self._layers = layers
        self._infos = infos
        self._make = make
        self._left: dict[str, Processing] = {}
        self._filled: dict[str, _Filled] = {}

    def begin(self) -> None:
        """A new update."""
        self._left.clear()
        self._filled.clear()

    # ------------------------------------------------------------------ seen in updates that learn

    def process(self, name: str, process: Callable[..., None], recorder: Recorder) -> None:
        """Have vLLM process a layer, and note whether it leaves it as it was loaded."""
        layer = self._layers[name]
        info = self._infos[layer]
        restore = getattr(self._vllm, "_copy_and_restore_kernel_tensors", None)
        with recorder.paused():
            if restore is None or info.kernel_tensors is None:
                return process(layer, info)
            has_step = getattr(layer, "quant_method", None) is not None
            watch = Processing(self._vllm.get_layer_tensors(layer), has_step)
        leaves = False

        def look_and_restore(layer: torch.nn.Module, info: Any) -> None:
            nonlocal leaves
            leaves = watch.leaves(self._vllm.get_layer_tensors(layer), _kernel_of(info))
            restore(layer, info)

        replaced = replacing(self._vllm, _copy_and_restore_kernel_tensors=look_and_restore)
        with replaced, recorder.paused(watch.notice), watch:
            process(layer, info)
        if leaves:
            self._left[name] = watch

    def left_as_loaded(self) -> frozenset[str]:
        """As of ``ModelAdapter``."""
        left = {name: watch.changed for name, watch in self._left.items() if watch.is_forgotten}
        device = next((one.device for one in left.values()), None)
        changed = [one.to(device) for one in left.values()]
        together = torch.stack(changed).tolist() if changed else ()
        return frozenset(name for name, one in zip(left, together, strict=True) if not one)

    # ------------------------------------------------------------------ written in place

    def __contains__(self, name: str) -> bool:
        return name in self._filled

    def hold(self, names: Set[str]) -> frozenset[str]:
        """Have just these layers keep what the engine computes with, as far as that has their form
        and nothing was loaded yet. Returns which do."""
        for name in self._filled.keys() - names:
            self._give_back(name, self._filled.pop(name))
        for name in names - self._filled.keys():
            layer = self._layers[name]
            info = self._infos[layer]
            tensors: Tensors = self._vllm.get_layer_tensors(layer)
            restored = {name for named in info.restore_metadata for name in named}
            is_untouched = all(tensors[own].is_meta for own in restored & tensors.keys())
            if info.load_numel_total is None or info.load_numel or not is_untouched:
                continue
            if info.kernel_tensors and has_form_of(_kernel_of(info), tensors):
                self._filled[name] = _Filled(info.load_numel_total)
                self._vllm._place_kernel_tensors(layer, info)
                info.reset()
        return frozenset(self._filled)

    def note(self, name: str, numel: int) -> None:
        """So many elements, as vLLM counts, were written."""
        self._filled[name].numel += numel

    def empty(self) -> set[str]:
        """The layers that nothing was written into."""
        return {name for name, one in self._filled.items() if one.numel == 0 < one.total}

    def partial(self) -> set[str]:
        """Those of which a part was."""
        return {name for name, one in self._filled.items() if 0 < one.numel < one.total}

    def _give_back(self, name: str, filled: _Filled) -> None:
        """Have a layer wait for its weights, or the rest of them, as vLLM has it."""
        if filled.numel >= filled.total:  # it is complete
            return
        layer = self._layers[name]
        self._vllm.initialize_layerwise_reload(SimpleNamespace(modules=lambda: [layer]))
        if not filled.numel:
            return
        info = self._infos[layer]
        kept = _kernel_of(info)
        self._make(name)
        for own, tensor in self._vllm.get_layer_tensors(layer).items():
            tensor.data.copy_(kept[own])
        info.load_numel = filled.numel


@contextlib.contextmanager
def replacing(vllm: Any, **functions: Callable[..., Any]) -> Iterator[None]:
    """Around calls of vLLM's own functions of those names, in the module that they are in."""
    kept = {name: getattr(vllm, name) for name in functions}
    vars(vllm).update(functions)
    try:
        yield
    finally:
        vars(vllm).update(kept)


def _kernel_of(info: Any) -> Tensors:
    """What the engine computes with, of a layer that waits for weights."""
    parameters, buffers = info.kernel_tensors
    return {**parameters, **buffers}
