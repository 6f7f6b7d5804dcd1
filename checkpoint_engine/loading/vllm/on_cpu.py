"""What vLLM's layerwise reload leaves wrong on CPUs, mended for the time of one update.

Seen with vLLM 0.32.0, whose own ``reload_weights`` gives other tokens than a fresh start for
mixtures of experts, for int8 models, and, on processors for which oneDNN packs weights, for tied
embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class CpuRepairs:
    """Made while the layers hold their weights. Call ``begin`` when they wait for new ones, ``end``
    when none does any more, and before that ``pack_tied`` if all have been loaded."""

    def __init__(self, layers: Iterable[torch.nn.Module]) -> None:
        layers = list(layers)
        methods = (getattr(layer, "quant_method", None) for layer in layers)
        self._methods = [method for method in methods if method is not None]
        self._tied = _with_parameters_of_others(layers)
        self._kernels: list[tuple[Any, Any]] = []

    def begin(self) -> None:
        for method in self._methods:
            if getattr(method, "moe_kernel", None) is not None:
                # Experts are packed where a new kernel is made, and only there.
                self._kernels.append((method, method.moe_kernel))
                method.moe_kernel = None
            if hasattr(method, "process_weights_after_loading"):
                method.process_weights_after_loading = _keeping_inputs(
                    method.process_weights_after_loading
                )

    def pack_tied(self) -> None:
        """A head that has its weights from the embedding was not loaded, and computes with what
        was packed from the old ones."""
        for layer in self._tied:
            if hasattr(layer, "cpu_linear"):
                method: Any = layer.quant_method
                method.process_weights_after_loading(layer)

    def end(self) -> None:
        for method in self._methods:
            vars(method).pop("process_weights_after_loading", None)
        for method, kernel in self._kernels:
            if method.moe_kernel is None:  # its layer was not loaded
                method.moe_kernel = kernel
        self._kernels.clear()


def _with_parameters_of_others(layers: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """The layers that share a parameter with one before them."""
    seen: set[torch.nn.Parameter | None] = set()
    tied = []
    for layer in layers:
        own = set(layer._parameters.values()) - {None}
        if own & seen:
            tied.append(layer)
        seen |= own
    return tied


def _keeping_inputs(process: Any) -> Any:
    """oneDNN's handlers read the scales that they were made of; a reload would free those."""

    def process_and_keep(layer: torch.nn.Module) -> None:
        process(layer)
        kernel = getattr(getattr(layer, "scheme", None), "kernel", None)
        if kernel is not None and hasattr(kernel, "dnnl_handler"):
            kernel.handler_inputs = tuple(layer._parameters.values())

    return process_and_keep
