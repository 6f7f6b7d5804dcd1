"""The loaders of layers that are loaded where the engine computes with them.

vLLM's layerwise reload calls each loader twice: with a parameter that has no memory, to count what
it loads, and again once the layer is complete. A layer that is lent its memory has it from its
first tensor on, and its loaders are then called once, and counted meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial, wraps
from typing import Any

import torch

Loader = Callable[..., Any]
Count = Callable[[Callable[[], Any], int], tuple[int, Any]]


class LentLoaders:
    """Of one model, in one update."""

    def __init__(self, vllm: Any, infos: Mapping[torch.nn.Module, Any]) -> None:
        """
        Args:
            vllm: the module that layerwise reload is in.
            infos: what it knows of each of those layers.
        """
        self._vllm = vllm
        self._infos = infos
        self._loaders: dict[Loader, Loader] = {}
        self._count: Any = None
        self._load_first: Any = None

    @contextlib.contextmanager
    def in_place_of_vllms(
        self, count: Count, load_first: Callable[[torch.nn.Module, Any], None]
    ) -> Iterator[None]:
        """Around one call of the model's loader.

        Args:
            count: as of ``DirectWrites``.
            load_first: gets a layer, and what vLLM knows of it: makes its memory, and loads what
                has arrived.
        """
        self._count, self._load_first = count, load_first
        for layer, info in self._infos.items():
            own: Any = layer._parameters
            for name, parameter in own.items() if info.can_load() else ():
                theirs: Any = getattr(parameter, "weight_loader", None)
                if getattr(theirs, "__name__", "") == "online_process_loader":
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
        vllm, original = self._vllm, theirs.__wrapped__
        parameters, buffers = layer._parameters, layer._buffers
        known: list[Any] = []
        known_ids: list[int] = []
        most = 0

        @wraps(original, assigned=("__doc__", "__annotations__"))
        def online_process_loader(*args: Any, **kwargs: Any) -> Any:
            nonlocal known, known_ids, most
            there = parameters.get(name)
            ids = [*map(id, parameters.values()), *map(id, buffers.values())]
            if ids != known_ids:
                if there is None or there.is_meta or not info.can_load():
                    before = info.load_numel
                    result = theirs(*args, **kwargs)
                    if info.can_load() and info.load_numel > before:
                        self._load_first(layer, info)
                    return result
                # Some layers get more parameters while they are loaded.
                info.load_numel_total = vllm.get_layer_size(layer)
                vllm._wrap_parameters_weight_loader(layer)
                most = getattr(there, "weight_loader_numel", there.numel())
                known, known_ids = [*parameters.values(), *buffers.values()], ids
            if args:
                load = partial(original, there, *args[1:], **kwargs)
            elif "param" in kwargs:
                load = partial(original, **(kwargs | {"param": there}))
            else:
                return theirs(**kwargs)
            numel, result = self._count(load, most)
            info.load_numel += numel
            if info.load_numel >= info.load_numel_total:
                vllm._layerwise_process(layer, info)
            return result

        online_process_loader.vllms_loader = theirs  # type: ignore[attr-defined]
        return online_process_loader
