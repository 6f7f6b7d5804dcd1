"""How an engine's model takes new weights: over the old ones. By vLLM's layerwise reload: see
``layerwise``."""

from __future__ import annotations

import contextlib
import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from checkpoint_engine.loading.replay.adapter import InPlace


class LoadOver(InPlace):
    """Loads over the weights that are there, and repacks them: releases without layerwise
    reload."""

    def __init__(self, model: Any, model_config: Any, device: torch.device) -> None:
        self.module = model if isinstance(model, torch.nn.Module) else torch.nn.Module()
        super().__init__(self.module, model.load_weights)
        self._model = model
        self._model_config = model_config
        self._device = device
        self.keeps_others = model_config is None  # otherwise all of the model is repacked

    def cannot(self) -> str:
        return "" if self._model is self.module else "it is no torch.nn.Module"

    def check(self) -> None:
        """Raises ``RuntimeError`` if the model cannot be updated; nothing has been written yet."""

    def surroundings(self) -> AbstractContextManager[Any]:
        """What loading happens in."""
        return nullcontext()

    def begin(self) -> None:
        """Before the first tensor."""

    def after_bucket(self) -> int:
        """The bucket's memory is about to be overwritten. Returns the bytes that were held back."""
        return 0

    def partial_layers(self) -> set[str]:
        """The names of layers of which a part has not been loaded, as far as the engine tells."""
        return set()

    def missing(self, expected: set[str], loaded: set[str] | None) -> set[str] | None:
        """The parameters that nothing has been loaded into, of those that are expected; ``None`` if
        nobody tells. ``loaded``: those that something was seen to be written into, or that the
        loader names; ``None`` if it names none."""
        return None if loaded is None else expected - loaded

    def finish(self) -> None:
        """After the last tensor."""
        if self._model_config is None:  # another engine's model, which vLLM's step fails on
            return
        try:
            from vllm.model_executor.model_loader.utils import process_weights_after_loading
        except ImportError:  # engines that have no such step
            return
        process_weights_after_loading(self._model, self._model_config, self._device)

    def abandon(self) -> None:
        """The update failed: leave a model that can be updated again."""


def tied_parameters(model: torch.nn.Module) -> set[str]:
    """The names of parameters that are another one under a second name."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in model.named_parameters()}


def may_be_missing(model: torch.nn.Module, quantised: bool) -> set[str] | None:
    """The parameters that vLLM's own loader does without, at start-up; ``None``: another engine,
    which has not said."""
    try:
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    except ImportError:
        return None
    exempt: set[str] = set()
    track = getattr(DefaultModelLoader, "track_weights_loading", None)
    if track is not None:
        options = {"quantized": True} if "quantized" in inspect.signature(track).parameters else {}
        with contextlib.suppress(ValueError):  # of what is missing; it notes what may be
            track(None, model, exempt, **(options if quantised else {}))
    return exempt
