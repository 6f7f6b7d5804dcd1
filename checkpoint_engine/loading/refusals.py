"""States of an engine in which new weights would be lost or land in the wrong place."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

_ALLOCATORS = {
    "vllm.device_allocator.cumem": "CuMemAllocator",
    "vllm.device_allocator.xpumem": "XpuMemAllocator",
    "vllm_ascend.device_allocator.camem": "CaMemAllocator",
}
"""Whose memory a sleeping engine gives back. Each has at most one instance in a process."""


def refuse_unfit(worker: Any) -> None:
    """Raise ``RuntimeError`` if a vLLM worker cannot take weights now; says what to do."""
    if _is_asleep(worker):
        raise RuntimeError(
            "this engine is asleep: its weights have no memory; wake it up first, by /wake_up, or "
            "by /wake_up?tags=weights if there is no room for its KV cache yet"
        )
    parallel = getattr(getattr(worker, "vllm_config", None), "parallel_config", None)
    if getattr(parallel, "enable_eplb", False):
        raise RuntimeError(
            "this engine moves experts between its workers while it serves (--enable-eplb), so no "
            "loader knows their places any more: start it without that to update it"
        )
    if merged := next(_merged(worker.model_runner.model), None):
        raise RuntimeError(
            f"a LoRA adapter is merged into {merged!r}: new weights would overwrite it, and "
            "unmerging it would spoil them; unmerge it before the update"
        )


def _is_asleep(worker: Any) -> bool:
    if getattr(worker, "_sleep_saved_buffers", None):
        return True  # at level 2, in releases whose allocator does not tell
    for module, name in _ALLOCATORS.items():
        allocator = getattr(getattr(sys.modules.get(module), name, None), "instance", None)
        for block in getattr(allocator, "pointer_to_data", {}).values():
            asleep = getattr(block, "is_asleep", block.cpu_backup_tensor is not None)
            if asleep and block.tag == "weights":
                return True
    return False


def _merged(model: Any) -> Iterator[str]:
    """The layers that an adapter is merged into, as PEFT marks them."""
    if isinstance(model, torch.nn.Module):
        for name, layer in model.named_modules():
            if vars(layer).get("merged_adapters"):
                yield name
