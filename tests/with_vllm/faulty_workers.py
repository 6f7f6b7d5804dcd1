"""Worker extensions whose reload has a fault, for ``certify`` to find.

The faults are planted in vLLM's reload or in ours, in the processes of one command.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

from vllm.model_executor.model_loader.reload import layerwise

from checkpoint_engine.certify.worker import CertifiedWorker
from checkpoint_engine.loading import layerwise as ours
from checkpoint_engine.loading.reload import EngineReload

LEFT_OUT = "model.layers.1.input_layernorm"
"""No linear layer: on some CPUs vLLM computes with a packed copy of those, and drops the weight."""
SWAPPED = {".experts.0.": ".experts.1.", ".experts.1.": ".experts.0."}


class LeavingOut(CertifiedWorker):
    """One layer is loaded, but keeps its old weights."""

    def update_weights_from_ipc(self, zmq_handles: dict[str, str]) -> dict[str, Any]:
        left_out = self.model_runner.model.get_submodule(LEFT_OUT)
        old = left_out.weight.detach().clone()
        restore = layerwise._copy_and_restore_kernel_tensors

        def restore_others(layer: Any, info: Any) -> None:
            restore(layer, info)
            if layer is left_out:
                layer.weight.data.copy_(old)

        layerwise._copy_and_restore_kernel_tensors = restore_others
        try:
            return super().update_weights_from_ipc(zmq_handles)
        finally:
            layerwise._copy_and_restore_kernel_tensors = restore


class KeepingScales(CertifiedWorker):
    """Attention keeps the scales that a start with dummy weights has given it."""

    def update_weights_from_ipc(self, zmq_handles: dict[str, str]) -> dict[str, Any]:
        with mock.patch.object(ours, "_reset_scales"):
            return super().update_weights_from_ipc(zmq_handles)


class SwappingExperts(CertifiedWorker):
    """The first two experts of every layer change their places."""

    def update_weights_from_ipc(self, zmq_handles: dict[str, str]) -> dict[str, Any]:
        load = EngineReload.load

        def load_swapped(reload: EngineReload, weights: Any, *delivery: Any) -> None:
            # In place: nothing else may refer to the tensors.
            weights[:] = [(_swapped(name), tensor) for name, tensor in weights]
            load(reload, weights, *delivery)

        EngineReload.load = load_swapped  # type: ignore[method-assign]
        try:
            return super().update_weights_from_ipc(zmq_handles)
        finally:
            EngineReload.load = load  # type: ignore[method-assign]


def _swapped(name: str) -> str:
    for part, other in SWAPPED.items():
        if part in name:
            return name.replace(part, other)
    return name
