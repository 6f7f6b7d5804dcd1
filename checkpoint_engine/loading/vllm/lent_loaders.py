"""The loaders of layers that are loaded where the engine computes with them.

vLLM's layerwise reload calls each loader twice: with a parameter that has no memory, to count what
it loads, and again once the layer is complete. A layer that is lent its memory has it from its
first tensor on, and its loaders are then called once, and counted meanwhile.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from functools import partial, wraps
from typing import Any, NamedTuple

import torch

from checkpoint_engine.loading.vllm.counts import load_numel

Loader = Callable[..., Any]
Count = Callable[[Loader, torch.Tensor, Callable[[], Any], int], tuple[int, Any]]


class _Known(NamedTuple):
    """A layer's tensors, as a loader met them last, and how many elements its parameter has."""

    ids: list[int]
    tensors: list[Any]  # so that none gets the id of one that is gone
    most: int


_NOTHING = _Known([], [], 0)


class LentLoaders:
    """Of one model, in one update."""

    def __init__(
        self, vllm: Any, infos: Mapping[torch.nn.Module, Any], lent: Set[torch.nn.Module]
    ) -> None:
        """
        Args:
            vllm: the module that layerwise reload is in.
            infos: what it knows of each layer.
            lent: those of them that will be loaded where the engine computes with them.
        """
        self._vllm = vllm
        self._infos = {layer: infos[layer] for layer in lent}
        # A parameter of several layers counts for the one whose wrapper it has.
        owned = (one for layer in infos for one in layer._parameters.values())
        counts = Counter(id(one) for one in owned if one is not None)
        self._shared = {one for one, count in counts.items() if count > 1}
        self._loaders: dict[Loader, Loader] = {}
        self._known: dict[Loader, _Known] = {}
        self._count: Any = None
        self._load_first: Any = None
        self._thread = 0

    @contextlib.contextmanager
    def in_place_of_vllms(
        self, count: Count, load_first: Callable[[torch.nn.Module, Any], None]
    ) -> Iterator[None]:
        """Around one call of the model's loader.

        Args:
            count: as ``Counts.of_lent``; gets vLLM's loader, its parameter, that of this class, and
                how many elements the parameter has.
            load_first: gets a layer, and what vLLM knows of it: makes its memory, and loads what
                has arrived, unless the layer has to wait.
        """
        self._count, self._load_first = count, load_first
        self._thread = threading.get_ident()
        for layer, info in self._infos.items():
            own: Any = layer._parameters
            for name, parameter in own.items() if info.can_load() else ():
                theirs: Any = getattr(parameter, "weight_loader", None)
                is_vllms = getattr(theirs, "__name__", "") == "online_process_loader"
                if is_vllms and id(parameter) not in self._shared:
                    if theirs not in self._loaders:
                        self._loaders[theirs] = self._instead_of(theirs, layer, info, name)
                    parameter.weight_loader = self._loaders[theirs]
        try:
            yield
        finally:
            self._count = self._load_first = None
            self._put_back()

    def clear(self) -> None:
        """The update is over: let go of the layers and their memory."""
        self._loaders.clear()
        self._known.clear()

    def _put_back(self) -> None:
        """vLLM keeps parameters without memory, and so their loaders, for later updates."""
        for layer, info in self._infos.items():
            own: Any = layer._parameters
            for parameters in (own, info.restore_metadata[0]):
                for parameter in parameters.values():
                    loader = getattr(parameter, "weight_loader", None)
                    if theirs := getattr(loader, "vllms_loader", None):
                        parameter.weight_loader = theirs

    def _instead_of(self, theirs: Any, layer: torch.nn.Module, info: Any, name: str) -> Loader:
        original, parameters, buffers = theirs.__wrapped__, layer._parameters, layer._buffers
        without_memory = parameters[name]

        @wraps(original, assigned=("__doc__", "__annotations__"))
        def online_process_loader(*args: Any, **kwargs: Any) -> Any:
            # A model may have kept this loader, or call it in a thread, where nobody counts.
            if self._count is None or threading.get_ident() != self._thread:
                return theirs(*args, **kwargs)
            there = parameters.get(name)
            if there is without_memory and theirs not in self._known and info.can_load():
                self._load_first(layer, info)
                there = parameters.get(name)
            given = args[0] if args else kwargs.get("param")
            is_ours = given is there or given is without_memory
            if there is None or there.is_meta or not is_ours or not info.can_load():
                return theirs(*args, **kwargs)
            known = self._known.get(theirs, _NOTHING)
            ids = [*map(id, parameters.values()), *map(id, buffers.values())]
            if ids != known.ids:
                known = self._known[theirs] = self._meet(layer, info, there, ids)
            if args:
                load = partial(original, there, *args[1:], **kwargs)
            else:
                load = partial(original, **(kwargs | {"param": there}))
            numel, result = self._count(theirs, there, load, known.most)
            info.load_numel += numel
            if info.load_numel >= info.load_numel_total:
                self._vllm._layerwise_process(layer, info)
            return result

        online_process_loader.vllms_loader = theirs  # type: ignore[attr-defined]
        return online_process_loader

    def _meet(self, layer: torch.nn.Module, info: Any, parameter: Any, ids: list[int]) -> _Known:
        """Some layers get more parameters while they are loaded."""
        info.load_numel_total = self._vllm.get_layer_size(layer)
        self._vllm._wrap_parameters_weight_loader(layer)
        tensors = [*layer._parameters.values(), *layer._buffers.values()]
        return _Known(ids, tensors, load_numel(parameter))
