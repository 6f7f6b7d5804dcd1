"""The mini engine as ``checkpoint-engine certify`` sees it: an adapter for an engine of your own.

checkpoint-engine certify DIR --tp 2 --engine examples/certify_mini.py:MiniEngine
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from checkpoint_engine import __version__
from checkpoint_engine.certify.engine import Output, Start
from checkpoint_engine.certify.server_engine import ServerEngine

OPTIONS = "--model {model} --load-format {load_format} --tp {tp} --port {port}"


class MiniEngine(ServerEngine):
    """``mini_engine.py``, started anew for every ``Start``; ``--engine-args`` are more options.

    Its workers inherit from ``CertifiedWorker``, and it has ``/health`` and ``/collective_rpc``, so
    ``ServerEngine`` does the rest.
    """

    def __init__(self, start: Start) -> None:
        program = f"{sys.executable} {Path(__file__).with_name('mini_engine.py')}"
        arguments = f"{program} {OPTIONS} {start.arguments}"
        super().__init__(replace(start, arguments=arguments))

    def describe(self) -> dict[str, str]:
        return {"engine": "mini engine", "version": __version__}

    def generate(self, prompts: list[list[int]], count: int) -> list[Output]:
        """It tells no probabilities, and keeps nothing from one request to the next."""
        bodies = [{"prompt_token_ids": prompt, "max_tokens": count} for prompt in prompts]
        return [Output(self.post("generate", body)["token_ids"], []) for body in bodies]
