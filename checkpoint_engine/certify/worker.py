"""The worker extension of engines that are certified. Runs inside the engine's workers."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import Any

import torch

from checkpoint_engine import settings
from checkpoint_engine.loading.reload import models_of
from checkpoint_engine.worker import VllmColocateWorkerExtension


class CertifiedWorker(VllmColocateWorkerExtension):
    """The extension that users have, and what ``certify`` asks of a worker besides.

    Its methods are called by name over the engine's ``/collective_rpc``.
    """

    def certify_replay(self, mode: str) -> None:
        """Set ``PS_REPLAY`` of this worker."""
        settings.set_here({"PS_REPLAY": mode})

    def certify_digests(self) -> dict[str, str]:
        """The digest of every parameter and buffer that the engine computes with, by name."""
        found = {}
        for role, model, _ in models_of(self.model_runner, getattr(self, "vllm_config", None)):
            prefix = "" if role == "model" else f"{role}."
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                found[f"{prefix}{name}"] = digest(tensor)
        return found

    def certify_device(self) -> dict[str, str]:
        """What this worker computes on."""
        kind = self.device.type
        module: Any = getattr(torch, kind, None)
        named = getattr(module, "get_device_name", None)
        return {"device": _processor() if named is None or kind == "cpu" else named(self.device)}


def digest(tensor: torch.Tensor) -> str:
    """Of a tensor's dtype, shape and bytes."""
    form = f"{tensor.dtype} {tuple(tensor.shape)}"
    if tensor.is_meta:
        return f"{form} has no memory"
    flat = tensor.detach().contiguous().reshape(-1).cpu()
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    hashed = hashlib.blake2b(form.encode(), digest_size=16)
    hashed.update(flat.view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
