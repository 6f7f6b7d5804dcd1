"""Engines whose loaders must make an update fail, though every byte arrives."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from checkpoint_engine.loading.reload import EngineReload
from checkpoint_engine.replay import replayed

Weights = list[tuple[str, torch.Tensor]]


class Layer(torch.nn.Module):
    """The tensors of all ranks that belong to a layer, in one parameter."""

    def __init__(self, ranks: int, numel: int) -> None:
        super().__init__()
        data = torch.zeros(ranks, numel, dtype=torch.int16)
        self.weight = torch.nn.Parameter(data, requires_grad=False)


class OddEngine(torch.nn.Module):
    """``kind``: ``knows no name``, ``changes`` what it does at the third update, or is ``asleep``
    until it is woken up."""

    def __init__(self, kind: str, note: Path, ranks: int, layers: int, numel: int) -> None:
        """``note``: where it writes when it was last given tensors."""
        super().__init__()
        self._note = note
        self.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(layers))
        for layer in self.layers:
            layer.ranks = Layer(ranks, numel)
        self._kind = kind
        self._updates = 0
        self._saved_buffers = {"some": "buffer"} if kind == "asleep" else {}
        os.environ["PS_REPLAY_CHECK"] = "1" if kind == "changes" else "50"

    def loader(self) -> Any:
        """For one update. Nothing of it leads from this model back to this model, which would keep
        it for good where the collector is off."""
        self._updates += 1
        if self._kind == "asleep":
            config = SimpleNamespace(dtype=torch.float32, quantization=None)
            worker = SimpleNamespace(
                device=torch.device("cpu"),
                model_runner=SimpleNamespace(model=self, model_config=config),
                _sleep_saved_buffers=self._saved_buffers,
            )
            return EngineReload(worker, {})
        return replayed(self.load_weights)

    def wake(self) -> None:
        self._saved_buffers.clear()

    def load_weights(self, weights: Weights) -> None:
        self._note.write_text(str(time.monotonic()))
        if self._kind == "knows no name":
            return
        given: dict[int, dict[int, torch.Tensor]] = {}
        for name, tensor in weights:
            _, layer, _, rank = name.split(".")
            given.setdefault(int(layer), {})[int(rank)] = tensor
        for layer, of_layer in given.items():
            weight = self.layers[layer].ranks.weight
            for rank, tensor in of_layer.items():
                is_odd = self._kind == "changes" and self._updates == 3
                weight[rank].copy_(weight[rank - 1] if is_odd else tensor)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What it holds, by the names of the checkpoint."""
        return {
            f"layers.{layer}.rank.{rank}": row
            for layer, of_layer in enumerate(self.layers)
            for rank, row in enumerate(of_layer.ranks.weight)
        }
