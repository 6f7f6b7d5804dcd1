"""What an engine holds and says, and how that differs from a fresh start. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from checkpoint_engine.certify.engine import Output

Digests = Sequence[dict[str, str]]
"""Of each worker, the digest of every parameter and buffer by name."""

_UNLIKE = float("inf")


@dataclass(frozen=True)
class Seen:
    """An engine at one moment.

    Attributes:
        noise: the largest difference between the log probabilities of two equal requests, to one
            engine or to two that were started alike.
    """

    digests: Digests
    outputs: list[Output]
    noise: float = 0.0

    @property
    def tensors(self) -> int:
        """Of all workers."""
        return sum(map(len, self.digests))


@dataclass(frozen=True)
class Difference:
    """Between an updated engine and a fresh start from the same files.

    Attributes:
        tensors: the parameters and buffers that differ, with their workers.
        undetermined: of those that would differ, the ones that two fresh starts do not agree on.
        tokens: whether greedy tokens differ.
        log_probability: the largest difference of one; infinite if one engine tells fewer.
        shown: whether the outputs differ by more than an engine's noise.
    """

    tensors: list[str]
    undetermined: list[str]
    tokens: bool
    log_probability: float
    shown: bool

    @property
    def any(self) -> bool:
        return bool(self.tensors) or self.shown


def compare(seen: Seen, fresh: Seen, undetermined: frozenset[str] = frozenset()) -> Difference:
    """``undetermined``: the names of tensors on which two fresh starts do not agree."""
    differ = differing(seen.digests, fresh.digests)
    tokens = [one.tokens for one in seen.outputs] != [one.tokens for one in fresh.outputs]
    distance = largest_distance(seen.outputs, fresh.outputs)
    return Difference(
        tensors=[name for name in differ if name not in undetermined],
        undetermined=[name for name in differ if name in undetermined],
        tokens=tokens,
        log_probability=distance,
        # With noise a near tie may go either way, and all after it.
        shown=distance > 2 * fresh.noise or (tokens and not fresh.noise),
    )


def differing(digests: Digests, others: Digests) -> list[str]:
    """The names of tensors with another digest, or on one side only."""
    names = []
    for worker in range(max(len(digests), len(others))):
        one, other = _of(digests, worker), _of(others, worker)
        where = f" (worker {worker})" if max(len(digests), len(others)) > 1 else ""
        both = dict.fromkeys([*other, *one])
        names += [f"{name}{where}" for name in both if one.get(name) != other.get(name)]
    return names


def largest_distance(outputs: Sequence[Output], others: Sequence[Output]) -> float:
    """The largest difference of a log probability. Those after a token that differs belong to
    other texts and do not count, the token's own does."""
    largest = 0.0
    for one, other in zip(outputs, others, strict=True):
        told, told_by_other = one.log_probabilities, other.log_probabilities
        if len(told) != len(told_by_other):
            return _UNLIKE
        of_prompt = len(told) - len(one.tokens)
        pairs = list(zip(told, told_by_other, strict=True))
        same = [a == b for a, b in zip(one.tokens, other.tokens, strict=True)]
        if told and False in same:
            pairs = pairs[: of_prompt + same.index(False) + 1]
        largest = max([largest, *(_distance(a, b) for a, b in pairs)])
    return largest


def _distance(one: float, other: float) -> float:
    distance = 0.0 if one == other else abs(one - other)
    return _UNLIKE if distance != distance else distance  # not a number


def _of(digests: Digests, worker: int) -> dict[str, str]:
    return digests[worker] if worker < len(digests) else {}
