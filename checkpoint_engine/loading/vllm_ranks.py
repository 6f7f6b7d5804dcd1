"""The ranks of a vLLM engine: what one of them fails with is raised where vLLM can take it.

vLLM's executor reads its workers' answers in the order of their ranks and stops at the first
failure. The answers behind it stay in their queues, and are taken for those of the next call. So
only the last rank may raise.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from typing import Any

import torch.distributed as dist

Reception = Generator[dict[str, Any], None, None]
"""An update on one rank, in two steps: it yields when it can begin, and its report at the end."""


def in_step(reception: Reception, config: Any) -> dict[str, Any]:
    """Take both steps of an update, the second only if the first succeeded on every rank of the
    engine: a rank that connects waits for the others. Called on all ranks.

    Args:
        config: vLLM's own, of this worker; ``None`` outside vLLM.

    Returns:
        The report; an empty one if any rank could not begin, or this one failed.

    Raises:
        Exception: as of ``raise_on_last_rank``.
    """
    report: dict[str, Any] = {}
    with contextlib.closing(reception):
        for _ in ("begin", "receive"):
            failure = None
            try:
                report = next(reception)
            except Exception as error:
                failure = error
            try:
                if raise_on_last_rank(failure, config):
                    break
            finally:
                del failure  # its traceback leads here, and must not lead back to it
    return report


def raise_on_last_rank(failure: Exception | None, config: Any = None) -> bool:
    """Raise on the engine's last rank what any of its ranks has failed with; called on all ranks.
    Returns on the others, also on those that failed, when all have called it: whether any has. A
    worker of another engine raises its own; with vLLM's ``external_launcher``, whose processes each
    answer for themselves, every rank raises. ``config``: as of ``in_step``."""
    groups = [group for group in _groups() if group.world_size > 1]
    failures = [] if failure is None else [f"{type(failure).__name__}: {failure}"]
    for group in groups:
        told: list[Any] = [None] * group.world_size
        dist.all_gather_object(told, failures, group=group.cpu_group)
        failures = [one for of_rank in told for one in of_rank]
    raises = _answers_alone(config) or all(group.is_last_rank for group in groups)
    if not (failures and raises):
        return bool(failures)
    if failure is None:
        raise RuntimeError(f"another worker of this engine failed: {failures[0]}")
    try:
        raise failure
    finally:
        del failure


def is_one_of_many() -> bool:
    """Whether other workers of this vLLM engine fail and begin together with this one."""
    return any(group.world_size > 1 for group in _groups())


def _answers_alone(config: Any) -> bool:
    parallel = getattr(config, "parallel_config", None)
    return getattr(parallel, "distributed_executor_backend", None) == "external_launcher"


def _groups() -> list[Any]:
    """Those that together hold one executor's workers; none outside vLLM. Its world group may hold
    those of other executors, which compute in parallel on other data."""
    state = sys.modules.get("vllm.distributed.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return []
    names = ("get_tp_group", "get_pcp_group", "get_pp_group")  # older releases have no second one
    return [getattr(state, name)() for name in names if hasattr(state, name)]
