"""What vLLM's layerwise reload leaves wrong on CPUs, mended for the time of one update.

Seen with vLLM 0.32.0, whose own ``reload_weights`` gives other tokens than a fresh start for
mixtures of experts and for int8 models.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class CpuRepairs:
    """Call ``begin`` when the layers wait for their weights, ``end`` when none does any more."""

    def __init__(self, layers: Iterable[torch.nn.Module]) -> None:
        self._methods = [
            method
            for layer in layers
            if (method := getattr(layer, "quant_method", None)) is not None
        ]
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

    def end(self) -> None:
        for method in self._methods:
            vars(method).pop("process_weights_after_loading", None)
        for method, kernel in self._kernels:
            if method.moe_kernel is None:  # its layer was not loaded
                method.moe_kernel = kernel
        self._kernels.clear()


def _keeping_inputs(process: Any) -> Any:
    """oneDNN's handlers read the scales that they were made of; a reload would free those."""

    def process_and_keep(layer: torch.nn.Module) -> None:
        process(layer)
        kernel = getattr(getattr(layer, "scheme", None), "kernel", None)
        if kernel is not None and hasattr(kernel, "dnnl_handler"):
            kernel.handler_inputs = tuple(layer._parameters.values())

    return process_and_keep
