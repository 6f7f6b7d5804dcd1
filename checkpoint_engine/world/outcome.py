"""How a collective call ends, the same on every rank: as a value in the store, and as an error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from pydantic import validate_call

from checkpoint_engine.errors import CollectiveError, UpdateError, kind_of

SUCCESS = b"ok"
_FIELDS = ("cause", "kind", "missing", "rank", "calls", "phase", "other")


def missing(seconds: float, call: str, ranks: Sequence[int]) -> CollectiveError:
    """Ranks did not make a call within ``seconds``, its time."""
    text = f"gave up after {seconds:g} s: ranks {list(ranks)} did not join {call}"
    return CollectiveError(text, "rank_missing", ranks)


def gone(ranks: Sequence[int], call: str) -> CollectiveError:
    """The processes of ranks have ended, or their hosts are cut off."""
    one = f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {list(ranks)} are"
    text = (
        f"{one} gone before {call} was over: its process has ended, or its host is cut off; "
        "start it again"
    )
    return CollectiveError(text, "rank_gone", ranks, ranks[0])


def encode_failure(error: BaseException, rank: int, phase: str, lost: str) -> bytes:
    """The outcome of a call that ``error`` ends on ``rank``.

    Args:
        lost: what is wrong where the store is what failed.
    """
    failure = error
    if not isinstance(failure, CollectiveError):
        failure = CollectiveError(describe(error, lost), kind_of(error))
    said = vars(failure) | {"phase": phase, "rank": rank if failure.rank is None else failure.rank}
    return json.dumps({name: said[name] for name in _FIELDS}).encode()


def decode_failure(outcome: bytes) -> CollectiveError:
    """Also of what no rank wrote: whoever reaches the store may write there."""
    try:
        return _failure(**json.loads(outcome))
    except (TypeError, ValueError, RecursionError):
        text = "what the store holds as the outcome of this call was not written by a rank"
        return CollectiveError(f"{text}: {outcome!r:.200}", "store_lost")


@validate_call
def _failure(
    cause: str,
    kind: str,
    missing: list[int],
    rank: int | None,
    calls: list[str],
    phase: str,
    other: list[str],
) -> CollectiveError:
    return CollectiveError(cause, kind, missing, rank, calls, phase, other)


def error_of(outcome: bytes, call: str) -> UpdateError:
    """What every rank raises."""
    failed = decode_failure(outcome)
    return UpdateError(call, failed.rank or 0, failed.phase, failed.cause, failed.kind)


def describe(error: BaseException, lost: str) -> str:
    """An error as other ranks shall read it. ``lost``: what is wrong where the store fails."""
    if isinstance(error, dist.DistError):
        return f"{lost}: {str(error).splitlines()[0]}"
    plain = isinstance(error, (ValueError, RuntimeError, TimeoutError))
    return str(error) if plain else f"{type(error).__name__}: {error}"


def publish(store: Any, outcome: bytes) -> bytes:
    """Make this the outcome of the call that a store is of, unless it has one; returns that."""
    return bytes(store.compare_set("outcome", "", outcome.decode()))
