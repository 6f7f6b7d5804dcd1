"""What vLLM calls at its start: entry points of the group ``vllm.general_plugins``.

vLLM calls ``register`` in every one of its processes, some of which load no model, so what it
registers is imported when vLLM asks for it.
"""

from __future__ import annotations

import contextlib

from checkpoint_engine.client import BACKEND


def register() -> None:
    """Make the backend and the load format known to vLLM. May be called again; leaves out what the
    installed vLLM has no room for, as releases before 0.15."""
    _register_transfer()
    _register_trainer()
    _register_loader()


def _register_transfer() -> None:
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError:
        return
    with contextlib.suppress(ValueError):  # it is registered
        WeightTransferEngineFactory.register_engine(
            BACKEND, "checkpoint_engine.integrations.vllm.worker", "CheckpointEngineTransfer"
        )


def _register_trainer() -> None:
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    except ImportError:  # before 0.28 vLLM has no such half
        return
    with contextlib.suppress(ValueError):  # it is registered
        WeightTransferTrainerFactory.register_engine(
            BACKEND, "checkpoint_engine.integrations.vllm.trainer", "CheckpointEngineTrainer"
        )


def _register_loader() -> None:
    try:
        from vllm.model_executor.model_loader import register_model_loader
    except ImportError:
        return
    from checkpoint_engine.integrations.vllm.loader import CheckpointEngineLoader

    register_model_loader(BACKEND)(CheckpointEngineLoader)
