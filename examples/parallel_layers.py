"""Tensor-parallel layers in the manner of vLLM: each rank holds shards, each parameter its loader.

A parameter carries ``weight_loader(param, loaded_weight, shard_id)``, which takes a whole tensor of
the checkpoint and copies this rank's slice of it to where it belongs. The one collective that the
layers need is an in-place sum over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

WeightLoader = Callable[[nn.Parameter, torch.Tensor, str], None]


def _alone(tensor: torch.Tensor) -> None:
    """The sum over one rank: what is there already."""


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place among those that share the model; ``all_reduce`` sums in place."""

    rank: int = 0
    size: int = 1
    all_reduce: Callable[[torch.Tensor], None] = _alone

    def share(self, total: int, what: str) -> int:
        """How many of ``total`` each rank holds."""
        if total % self.size:
            raise ValueError(f"{total} {what} cannot be split evenly over {self.size} ranks")
        return total // self.size

    def narrow(self, loaded: torch.Tensor, dim: int, length: int) -> torch.Tensor:
        """This rank's ``length`` entries of a whole tensor of the checkpoint, along ``dim``."""
        if loaded.dim() <= dim or loaded.shape[dim] != length * self.size:
            raise ValueError(
                f"shape {tuple(loaded.shape)}: expected {self.size} x {length} in dimension {dim}"
            )
        return loaded.narrow(dim, self.rank * length, length)


def _copy_exact(target: torch.Tensor, loaded: torch.Tensor) -> None:
    if target.shape != loaded.shape:  # copy_ alone would broadcast
        raise ValueError(f"shape {tuple(loaded.shape)}: expected {tuple(target.shape)}")
    target.copy_(loaded)


def load_whole(param: nn.Parameter, loaded: torch.Tensor, shard_id: str) -> None:
    """The loader of a parameter that every rank holds in full."""
    _copy_exact(param.data, loaded)


def loadable(loader: WeightLoader, *shape: int) -> nn.Parameter:
    """A parameter of this local shape that is filled by ``loader``."""
    parameter = nn.Parameter(torch.empty(shape), requires_grad=False)
    parameter.weight_loader = loader  # type: ignore[attr-defined]
    return parameter


class ColumnParallelLinear(nn.Module):
    """Each rank computes its share of the outputs of every part: ``{"q_proj": 1536, ...}``.

    The parts' shares are stacked in one weight, in that order.
    """

    def __init__(
        self, tp: TensorParallel, inputs: int, parts: dict[str, int], *, bias: bool = False
    ) -> None:
        super().__init__()
        self.tp = tp
        self.rows = {part: tp.share(total, f"outputs of {part}") for part, total in parts.items()}
        self.weight = loadable(self.load, sum(self.rows.values()), inputs)
        self.bias = loadable(self.load, sum(self.rows.values())) if bias else None

    def load(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: str) -> None:
        """Copy this rank's rows of the part ``shard_id`` to their place in the stack."""
        parts = list(self.rows)
        start = sum(self.rows[part] for part in parts[: parts.index(shard_id)])
        rows = self.rows[shard_id]
        _copy_exact(param.data.narrow(0, start, rows), self.tp.narrow(loaded, 0, rows))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return functional.linear(x, self.weight, self.bias).split(list(self.rows.values()), dim=-1)


class RowParallelLinear(nn.Module):
    """Each rank multiplies its share of the inputs; the sum over the ranks is the output."""

    def __init__(self, tp: TensorParallel, inputs: int, outputs: int) -> None:
        super().__init__()
        self.tp = tp
        self.weight = loadable(self.load, outputs, tp.share(inputs, "inputs"))

    def load(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: str) -> None:
        """Copy this rank's columns."""
        _copy_exact(param.data, self.tp.narrow(loaded, 1, param.shape[1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.linear(x, self.weight)
        self.tp.all_reduce(x)
        return x


class VocabParallelEmbedding(nn.Module):
    """Each rank looks up the tokens in its share of the vocabulary; the others contribute zeros."""

    def __init__(self, tp: TensorParallel, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.tp = tp
        self.weight = loadable(self.load, tp.share(vocab_size, "vocabulary entries"), hidden_size)

    def load(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: str) -> None:
        """Copy this rank's rows."""
        _copy_exact(param.data, self.tp.narrow(loaded, 0, param.shape[0]))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = self.weight.shape[0]
        local = tokens - self.tp.rank * rows
        elsewhere = (local < 0) | (local >= rows)
        x = functional.embedding(local.masked_fill(elsewhere, 0), self.weight)
        x = x.masked_fill(elsewhere[:, None], 0)
        self.tp.all_reduce(x)
        return x
