"""What vLLM calls at its start: entry points of the group ``vllm.general_plugins``.

vLLM calls ``register`` in every one of its processes, some of which load no model, so what it
registers is imported when vLLM asks for it.
"""

from __future__ import annotations

from checkpoint_engine.client import BACKEND


def register() -> None:
    """Make the backend known to vLLM. May be called again; does nothing where vLLM, as before its
    release 0.15, has no such backends or others than the plug-in knows."""
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError:
        return
    try:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "checkpoint_engine.integrations.vllm.worker", "CheckpointEngineTransfer"
        )
    except ValueError:  # it is registered
        return
