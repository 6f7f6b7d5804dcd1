"""What ``certify`` needs of an inference engine: the adapter, and where to find one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

EXTENSION = "checkpoint_engine.certify.worker.CertifiedWorker"
"""The class that an engine's workers must inherit from."""

_KNOWN = {
    "vllm": "checkpoint_engine.certify.vllm_engine:VllmEngine",
    "server": "checkpoint_engine.certify.server_engine:VllmServer",
}


class OrderError(ValueError):
    """``certify`` cannot do what it was asked for; the engine has no part in that."""


@dataclass(frozen=True)
class Start:
    """How to start an engine.

    Attributes:
        model: the folder of the model.
        dummy: random weights instead of those in ``model``.
        workers: the tensor-parallel size.
        arguments: the text of ``--engine-args``.
        timeout: seconds for each call, and for the start where the adapter waits for one.
    """

    model: Path
    dummy: bool
    workers: int
    arguments: str
    timeout: float

    @property
    def load_format(self) -> str:
        """As vLLM calls it."""
        return "dummy" if self.dummy else "safetensors"


@dataclass(frozen=True)
class Output:
    """What an engine makes of one prompt.

    Attributes:
        tokens: greedy, of a fixed number.
        log_probabilities: of the prompt's tokens but the first, then of ``tokens``; empty if the
            engine tells none.
    """

    tokens: list[int]
    log_probabilities: list[float]


class Engine(Protocol):
    """A running engine. An adapter is a function or class that makes one of a ``Start``.

    One is started after the other; ``close`` gives back all that the next one needs.
    """

    def describe(self) -> dict[str, str]:
        """``engine``: its name, ``version``: of the engine."""
        ...

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker, a ``CertifiedWorker``; the results in rank order.

        Raises:
            Exception: a worker raised, or did not answer in time; the text says why.
        """
        ...

    def generate(self, prompts: list[list[int]], count: int) -> list[Output]:
        """``count`` greedy tokens for each prompt. Nothing computed with older weights is used."""
        ...

    def close(self) -> None:
        """End the engine."""
        ...


Adapter = Callable[[Start], Engine]


def find_adapter(name: str) -> Adapter:
    """``vllm`` or ``server``, or an adapter in a module: ``my.module:Class``, ``path.py:Class``.

    Raises:
        OrderError: there is none of that name.
    """
    module, _, attribute = _KNOWN.get(name, name).rpartition(":")
    try:
        found = getattr(_load(module), attribute)
    except (ImportError, AttributeError, OSError, ValueError) as error:
        known = ", ".join(_KNOWN)
        raise OrderError(
            f"no adapter {name!r} ({error}): known are {known}; others are given as module:Class "
            "or path.py:Class"
        ) from error
    return cast(Adapter, found)


def _load(module: str) -> Any:
    if not module.endswith(".py"):
        return importlib.import_module(module)
    path = Path(module).resolve()
    sys.path.insert(0, str(path.parent))  # for what lies beside it
    return importlib.import_module(path.stem)
