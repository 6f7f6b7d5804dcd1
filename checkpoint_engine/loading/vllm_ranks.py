"""A failure on any worker of a vLLM engine, raised where vLLM can take it.

vLLM's executor reads its workers' answers in the order of their ranks and stops at the first
failure. The answers behind it stay in their queues, and are taken for those of the next call. So
only the last rank may raise.
"""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist


def raise_on_last_rank(failure: Exception | None) -> None:
    """Raise on the engine's last rank what any of its ranks has failed with; called on all ranks.
    Returns on the others, also on those that failed, when all have called it. A worker of another
    engine raises its own."""
    groups = [group for group in _groups() if group.world_size > 1]
    failures = [] if failure is None else [f"{type(failure).__name__}: {failure}"]
    for group in groups:
        told: list[Any] = [None] * group.world_size
        dist.all_gather_object(told, failures, group=group.cpu_group)
        failures = [one for of_rank in told for one in of_rank]
    if not (failures and all(group.is_last_rank for group in groups)):
        return
    if failure is None:
        raise RuntimeError(f"another worker of this engine failed: {failures[0]}")
    try:
        raise failure
    finally:
        del failure


def _groups() -> list[Any]:
    """Those that together hold one executor's workers; none outside vLLM."""
    state = sys.modules.get("vllm.distributed.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return []
    return [state.get_tp_group(), state.get_pp_group()]
