"""A drafter's quantised copies of the model's LM head, as vLLM makes them from release 0.33 on.

They are no part of a checkpoint. While the drafter loads its weights, the head that they were made
of takes their places; afterwards they are made anew.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULE = "vllm.model_executor.layers.quantization.online.lm_head"


class SourceHeads:
    """The heads of one drafter during one update; does nothing with releases that copy none."""

    def __init__(self, drafter: Any) -> None:
        self._drafter = drafter
        self._are_shared = False

    def share(self) -> None:
        """Before the first byte is loaded."""
        if self._drafter is None:
            return
        if (vllm := _functions()) is not None:
            vllm.share_source_lm_heads(self._drafter)
            self._are_shared = True

    def restore(self, refresh: bool) -> None:
        """``refresh``: everything is loaded, so that the copies can be made anew. Does nothing
        unless they are away."""
        if not self._are_shared:
            return
        self._are_shared = False
        _functions().restore_quantized_lm_heads(self._drafter, refresh=refresh)


def restore_of_open_session(drafter: Any) -> None:
    """Put the copies back that vLLM's worker took away for a session which nobody finished: the
    next session would take the model's head for the drafter's own, and lose them."""
    if (vllm := _functions()) is not None:
        vllm.restore_quantized_lm_heads(drafter, refresh=False)


def _functions() -> Any:
    """vLLM's, or ``None``."""
    try:
        return importlib.import_module(_MODULE)
    except ImportError:
        return None
