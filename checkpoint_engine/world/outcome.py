"""How a collective call ends, the same on every rank: as a value in the store, and as an error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist

from checkpoint_engine.errors import UpdateError, kind_of

SUCCESS = b"ok"


class MemberError(RuntimeError):
    """Members of a call did not come, are gone, make another call, or have no engine left to
    update; ``kind`` says which.

    Attributes:
        missing_ranks: the ranks that do not make the call which this error ends.
        rank_at_fault: the rank that the error names, if it is not the one that raises it.
        calls: of a disagreement, the calls that do not go together, as their ranks made them.
    """

    def __init__(
        self,
        text: str,
        kind: str,
        missing_ranks: Sequence[int] = (),
        rank_at_fault: int | None = None,
        calls: Sequence[str] = (),
    ) -> None:
        super().__init__(text)
        self.kind = kind
        self.missing_ranks = list(missing_ranks)
        self.rank_at_fault = rank_at_fault
        self.calls = list(calls)


def missing(why: str, call: str, ranks: Sequence[int]) -> MemberError:
    """Ranks did not make a call before its deadline."""
    return MemberError(f"{why}: ranks {list(ranks)} did not join {call}", "rank_missing", ranks)


def gone(ranks: Sequence[int], call: str) -> MemberError:
    """The processes of ranks have ended, or their hosts are cut off."""
    one = f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {list(ranks)} are"
    text = (
        f"{one} gone before {call} was over: its process has ended, or its host is cut off; "
        "start it again"
    )
    return MemberError(text, "rank_gone", ranks, ranks[0])


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
        at_fault = getattr(error, "rank_at_fault", None)
        return Failure(
            rank if at_fault is None else at_fault,
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


def describe(error: BaseException, lost: str) -> str:
    """An error as other ranks shall read it. ``lost``: what is wrong where the store fails."""
    if isinstance(error, dist.DistError):
        return f"{lost}: {str(error).splitlines()[0]}"
    plain = isinstance(error, (ValueError, RuntimeError, TimeoutError))
    return str(error) if plain else f"{type(error).__name__}: {error}"


def publish(store: Any, outcome: bytes) -> bytes:
    """Make this the outcome of the call that a store is of, unless it has one; returns that."""
    return bytes(store.compare_set("outcome", "", outcome.decode()))
