"""An inference worker in a process of its own, for benchmarks that update it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch
import zmq

from checkpoint_engine.worker import update_weights_from_ipc


def device() -> str:
    """Called in the worker alone: asking for a GPU before a fork leaves none to the child."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class WorkerProcess:
    """Make it before this process has threads or uses the GPU: it forks."""

    def __init__(self, make_engine: Callable[..., Any], *arguments: Any) -> None:
        """``make_engine``: what makes the object whose methods ``call`` calls, in the process."""
        self._pipe, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(theirs, make_engine, arguments), daemon=True
        )
        process.start()

    def call(self, method: str, *args: Any) -> Any:
        """Returns what the method returns; raises what it raises."""
        self._pipe.send((method, args))
        result = self._pipe.recv()
        if isinstance(result, Exception):
            raise result
        return result


def _serve(pipe: Any, make_engine: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    engine = make_engine(*arguments)
    while True:
        try:
            method, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(getattr(engine, method)(*args))
        except Exception as error:
            pipe.send(error)


class CopyingEngine:
    """Copies all tensors of a bucket into parameters that stay where they are, with one call."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """``shapes``: of the parameters, all bf16."""
        self.parameters = {
            name: torch.zeros(shape, dtype=torch.bfloat16, device=device())
            for name, shape in shapes.items()
        }

    def update(self, address: str) -> None:
        with zmq.Context() as context:
            update_weights_from_ipc(context, address, 0, run=self._load)

    def wrong(self, expected: dict[str, torch.Tensor]) -> list[str]:
        """The tensors that differ by a bit; afterwards all are cleared."""
        wrong = []
        for name, parameter in self.parameters.items():
            found = parameter.cpu().view(torch.int16)
            if not torch.equal(found, expected[name].view(torch.int16)):
                wrong.append(name)
            parameter.zero_()
        return wrong

    def _load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        targets = [self.parameters[name] for name, _ in weights]
        torch._foreach_copy_(targets, [tensor for _, tensor in weights])
