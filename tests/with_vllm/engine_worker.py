"""The worker extensions of the tests' engines: ours, and a look at what a worker holds."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch

from checkpoint_engine.loading.vllm.captured import Captured
from checkpoint_engine.worker import VllmColocateWorkerExtension


class ObservedWorker:
    """Called by name over ``/collective_rpc``."""

    model_runner: Any

    def digests(self) -> dict[str, str]:
        """Of every parameter's and buffer's bytes, as the engine computes with them."""
        model = self.model_runner.model
        return {
            name: hashlib.sha256(
                tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            ).hexdigest()
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if tensor.numel()
        }

    def held(self) -> dict[str, int]:
        """Where what helpers of layers hold is."""
        layers = dict(self.model_runner.model.named_modules())
        found = {name: Captured(layers)._held_by(layer) for name, layer in layers.items()}
        return {
            ".".join((name, *path)): tensor.data_ptr()
            for name, held in found.items()
            for path, tensor in held.items()
        }


class TestedWorker(VllmColocateWorkerExtension, ObservedWorker):
    """The same."""

    def set_replay(self, mode: str) -> None:
        """``PS_REPLAY`` of this worker."""
        os.environ["PS_REPLAY"] = mode
