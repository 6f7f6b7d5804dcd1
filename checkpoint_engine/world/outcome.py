"""How a collective call ends, the same on every rank: as a value in the store, and as an error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist

from checkpoint_engine.errors import UpdateError, kind_of

SUCCESS = b"ok"


class MissingRanksError(TimeoutError):
    """Some ranks did not make a collective call before its deadline."""

    kind = "rank_missing"

    def __init__(self, why: str, call: str, ranks: list[int]) -> None:
        super().__init__(f"{why}: ranks {ranks} did not join {call}")
        self.missing_ranks = ranks


class GoneError(RuntimeError):
    """Ranks of a call whose process has ended, or whose host is cut off."""

    kind = "rank_gone"

    def __init__(self, ranks: list[int], call: str) -> None:
        one = f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {ranks} are"
        super().__init__(
            f"{one} gone before {call} was over: its process has ended, or its host is cut "
            "off; start it again"
        )
        self.missing_ranks = ranks
        self.rank_at_fault = ranks[0]


class DisagreementError(RuntimeError):
    """Ranks that were to make one collective call together make different ones.

    Attributes:
        calls: the calls that do not go together, as their ranks made them.
        missing_ranks: ranks that make another call than the one that this error ends.
    """

    kind = "disagreement"

    def __init__(
        self, text: str, calls: Sequence[str] = (), missing_ranks: Sequence[int] = ()
    ) -> None:
        super().__init__(text)
        self.calls = list(calls)
        self.missing_ranks = list(missing_ranks)


class Failure(NamedTuple):
    """A failed call's outcome, as it stands in the store.

    ``missing``: ranks that did not make this call; their next call is the one after it.
    ``calls``: of a disagreement, the calls that did not go together.
    """

    rank: int
    phase: str
    cause: str
    missing: list[int]
    kind: str = "failed"
    calls: tuple[str, ...] | list[str] = ()

    @staticmethod
    def of(error: BaseException, rank: int, phase: str, lost: str) -> Failure:
        """``lost``: what is wrong where the store is what failed."""
        return Failure(
            getattr(error, "rank_at_fault", rank),
            phase,
            describe(error, lost),
            list(getattr(error, "missing_ranks", [])),
            kind_of(error),
            list(getattr(error, "calls", [])),
        )

    def encode(self) -> bytes:
        return json.dumps(self).encode()

    @staticmethod
    def decode(outcome: bytes) -> Failure:
        return Failure(*json.loads(outcome))

    def error(self, call: str) -> UpdateError:
        return UpdateError(call, self.rank, self.phase, self.cause, self.kind)


class Last(NamedTuple):
    """The call that some ranks finished last: its number and outcome."""

    number: int
    outcome: bytes

    def encode(self) -> str:
        return f"{self.number} {self.outcome.decode()}"

    @staticmethod
    def decode(last: bytes) -> Last:
        number, _, outcome = last.partition(b" ")
        return Last(int(number), outcome)


def describe(error: BaseException, lost: str) -> str:
    """An error as other ranks shall read it. ``lost``: what is wrong where the store fails."""
    if isinstance(error, dist.DistError):
        return f"{lost}: {str(error).splitlines()[0]}"
    plain = isinstance(error, (ValueError, RuntimeError, TimeoutError))
    return str(error) if plain else f"{type(error).__name__}: {error}"
