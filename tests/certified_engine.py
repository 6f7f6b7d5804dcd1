"""A tiny engine in the process of ``certify``, and ones whose reload has a fault."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

from checkpoint_engine.certify.engine import Output, Start
from checkpoint_engine.certify.worker import CertifiedWorker

VOCABULARY, HIDDEN, EXPERTS = 64, 16, 4


class Model(torch.nn.Module):
    """A token's vector goes through one of the experts; ``scale`` is in no checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        make = torch.nn.Parameter
        self.embedding = make(torch.empty(VOCABULARY, HIDDEN), requires_grad=False)
        self.experts = make(torch.empty(EXPERTS, HIDDEN, HIDDEN), requires_grad=False)
        self.norm = make(torch.empty(HIDDEN), requires_grad=False)
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("spare_scale", torch.ones(1))  # nothing reads it
        for tensor in (*self.parameters(), *self.buffers()):
            tensor.data.uniform_(-1e-3, 1e-3)

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            if name.startswith("experts."):
                self.experts.data[self.expert(int(name.split(".")[1]))].copy_(tensor)
                name = "experts"
            else:
                self.get_parameter(name).data.copy_(tensor)
            loaded.add(name)
        return loaded

    def expert(self, number: int) -> int:
        return number

    def reset_scales(self) -> None:
        self.scale.fill_(1)
        self.spare_scale.fill_(1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        vectors = self.embedding[tokens]
        moved = torch.einsum("tij,tj->ti", self.experts[tokens % EXPERTS], vectors)
        return ((vectors + moved) * self.norm @ self.embedding.t() * self.scale).log_softmax(-1)


class Worker(CertifiedWorker):
    def __init__(self, model: Model) -> None:
        self.device, self.local_rank = torch.device("cpu"), 0
        self.model_runner = SimpleNamespace(model=model)

    def update_weights_from_ipc(self, zmq_handles: dict[str, str]) -> dict[str, Any]:
        answer = super().update_weights_from_ipc(zmq_handles)
        self.model_runner.model.reset_scales()
        return answer


class Right:
    """A ``certify.engine.Engine``."""

    worker: type[Worker] = Worker
    model: type[Model] = Model

    def __init__(self, start: Start) -> None:
        model = self.model()
        if not start.dummy:
            for file in sorted(start.model.glob("*.safetensors")):
                model.load_weights(list(load_file(file).items()))
            model.reset_scales()
        self._worker = self.worker(model)

    def describe(self) -> dict[str, str]:
        return {"engine": "tiny", "version": "1"}

    def call(self, method: str, *args: Any) -> list[Any]:
        return [getattr(self._worker, method)(*args)]

    def generate(self, prompts: list[list[int]], count: int) -> list[Output]:
        after = self._worker.model_runner.model(torch.arange(VOCABULARY))
        told, best = after.tolist(), after.argmax(1).tolist()
        found = []
        for prompt in prompts:
            tokens = list(prompt)
            for _ in range(count):
                tokens.append(best[tokens[-1]])
            pairs = itertools.pairwise(tokens)
            found.append(
                Output(tokens[len(prompt) :], [told[last][token] for last, token in pairs])
            )
        return found

    def close(self) -> None:
        pass


class LeavingOut(Right):
    """One parameter keeps what it had."""

    class worker(Worker):  # noqa: N801
        def update_weights_from_ipc(self, zmq_handles: dict[str, str]) -> dict[str, Any]:
            kept = self.model_runner.model.norm.clone()
            answer = super().update_weights_from_ipc(zmq_handles)
            self.model_runner.model.norm.copy_(kept)
            return answer


class SwappingExperts(Right):
    """Updates, and not starts, take expert 1 for 2 and 2 for 1."""

    class worker(Worker):  # noqa: N801
        def __init__(self, model: Model) -> None:
            super().__init__(model)
            model.expert = lambda number: {1: 2, 2: 1}.get(number, number)  # type: ignore[method-assign]


class KeepingTheLast(Right):
    """A parameter that nothing reads has what the last expert to come brought."""

    class model(Model):  # noqa: N801
        def __init__(self) -> None:
            super().__init__()
            self.last = torch.nn.Parameter(torch.zeros(HIDDEN), requires_grad=False)

        def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> set[str]:
            loaded = super().load_weights(weights)
            for name, tensor in weights:
                if name.startswith("experts."):
                    self.last.data.copy_(tensor[0])
            return {*loaded, "last"}


class KeepingScales(Right):
    """No scale is reset: what a start with dummy weights made of it stays."""

    class model(Model):  # noqa: N801
        def reset_scales(self) -> None:
            if self.scale.abs() > 1e-3:
                super().reset_scales()

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        if not start.dummy:
            Model.reset_scales(self._worker.model_runner.model)


class KeepingASpareScale(KeepingScales):
    """Which nothing reads."""

    class model(Model):  # noqa: N801
        def reset_scales(self) -> None:
            self.scale.fill_(1)


class LeavingMemory(Right):
    """Every engine has something in memory that nothing initialises."""

    class model(Model):  # noqa: N801
        def reset_scales(self) -> None:
            super().reset_scales()
            self.spare_scale.uniform_()


class TuningItself(Right):
    """Every start computes a little otherwise, as with kernels that are tuned by measuring them."""

    starts = itertools.count(1)

    class model(Model):  # noqa: N801
        def __init__(self) -> None:
            super().__init__()
            self.error = 1e-4 * next(TuningItself.starts)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens) * (1 + self.error)


class Refusing(Right):
    class worker(Worker):  # noqa: N801
        def update_weights_from_ipc(self, zmq_handles: dict[str, str]) -> dict[str, Any]:
            raise RuntimeError("start the engine with the new weights")


class FailingOnce(Right):
    class worker(Worker):  # noqa: N801
        failed = False

        def update_weights_from_ipc(self, zmq_handles: dict[str, str]) -> dict[str, Any]:
            if not self.failed:
                self.failed = True
                raise RuntimeError("update again")
            return super().update_weights_from_ipc(zmq_handles)


class SpoiltByUpdates(Right):
    """Its first update succeeds, but no request does after that."""

    class worker(Worker):  # noqa: N801
        def update_weights_from_ipc(self, zmq_handles: dict[str, str]) -> dict[str, Any]:
            answer = super().update_weights_from_ipc(zmq_handles)
            del self.model_runner.model.norm
            return answer


class NotStarting(Right):
    def __init__(self, start: Start) -> None:
        raise ValueError(f"{start.model.name}: no such architecture")
