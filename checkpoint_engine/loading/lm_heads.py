"""A drafter's quantised copies of the model's LM head, as vLLM makes them from release 0.33 on.

They are no part of a checkpoint. While the drafter loads its weights, the head that they were made
of takes their places; afterwards they are made anew.
"""

from __future__ import annotations

from typing import Any


class SourceHeads:
    """The heads of one drafter during one update; does nothing with releases that copy none."""

    def __init__(self, drafter: Any) -> None:
        self._drafter = drafter
        self._are_shared = False

    def share(self) -> None:
        """Before the first byte is loaded."""
        if self._drafter is None:
            return
        try:
            from vllm.model_executor.layers.quantization.online.lm_head import share_source_lm_heads
        except ImportError:
            return
        share_source_lm_heads(self._drafter)
        self._are_shared = True

    def restore(self, refresh: bool) -> None:
        """``refresh``: everything is loaded, so that the copies can be made anew. Does nothing
        unless they are away."""
        if not self._are_shared:
            return
        from vllm.model_executor.layers.quantization.online.lm_head import (
            restore_quantized_lm_heads,
        )

        self._are_shared = False
        restore_quantized_lm_heads(self._drafter, refresh=refresh)
