"""The exceptions that callers may want to tell apart. All are ``RuntimeError``s."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # not: tab, newline
_LONGEST_TEXT = 64 << 10
_HEAD = 4 << 10

KINDS = (
    "broadcast_failed",
    "busy",
    "disagreement",
    "failed",
    "forbidden",
    "interrupted",
    "invalid",
    "no_engine_left",
    "not_found",
    "out_of_memory",
    "p2p_failed",
    "rank_gone",
    "rank_missing",
    "request_failed",
    "source_changed",
    "store_lost",
    "timeout",
    "worker_failed",
    "worker_lost",
)
"""What ``kind_of`` says, for programs that count failures by what caused them."""


class AccessError(RuntimeError):
    """A file or an engine was named that this server may not touch."""

    kind = "forbidden"


class BusyError(RuntimeError):
    """A call was refused because it conflicts with one that is still running on this rank."""

    kind = "busy"


class UpdateError(RuntimeError):
    """A collective call failed on some rank and was ended on all of them.

    The same text is raised on every rank. ``rank`` failed first, in ``phase``; ``cause`` is what it
    said, a worker's remote traceback included, and ``kind``, one of ``KINDS``, what that was.
    ``engines`` says of each rank of an update what its engine holds now: ``untouched``, ``partly
    written`` or ``holds VERSION``. A rank that is gone, or does not say so soon, is not in it.
    ``seconds`` is what the rank that raises this had spent in each phase; ``trace`` the file with
    what it had done until then, if traces were asked for.
    """

    def __init__(
        self, operation: str, rank: int, phase: str, cause: str, kind: str = "failed"
    ) -> None:
        super().__init__(f"{operation} failed on rank {rank} during {phase}: {cause}")
        self.operation = operation
        self.rank = rank
        self.phase = phase
        self.cause = cause
        self.kind = kind
        self.engines: dict[int, str] = {}
        self.seconds: dict[str, float] = {}
        self.trace: str | None = None

    def __reduce__(self) -> tuple[object, ...]:
        """By the constructor's arguments: for callers in another process, as with Ray."""
        made_of = (self.operation, self.rank, self.phase, self.cause, self.kind)
        return type(self), made_of, self.__dict__


class CollectiveError(RuntimeError):
    """Why a collective call fails, raised within it and told to the other ranks. Callers get an
    ``UpdateError``.

    Attributes:
        kind: one of ``KINDS``.
        missing: the ranks that do not make this call; their next call is the one after it.
        rank: which is to blame, if it is not the one that raises this.
        calls: of a disagreement, the calls that do not go together, as their ranks made them.
        phase: what the rank was doing.
        other: of a call that fails with this one, its part of the store and its outcome.
    """

    def __init__(
        self,
        cause: str,
        kind: str,
        missing: Sequence[int] = (),
        rank: int | None = None,
        calls: Sequence[str] = (),
        phase: str = "",
        other: Sequence[str] = (),
    ) -> None:
        super().__init__(cause)
        self.cause, self.kind, self.phase, self.rank = cause, kind, phase, rank
        self.missing, self.calls, self.other = list(missing), list(calls), list(other)


def broadcast_failed(cause: str) -> CollectiveError:
    """The ranks cannot broadcast: most often because one of them failed, and says why itself."""
    return CollectiveError(cause, "broadcast_failed")


class EngineError(RuntimeError):
    """An inference engine cannot be updated: its worker reported a failure, whose traceback is in
    the text, or ``kind`` says why.

    Control characters in it are escaped, and its middle is left out where it is very long: it goes
    into logs, terminals and HTTP answers.
    """

    kind = "worker_failed"

    def __init__(self, text: str, kind: str | None = None) -> None:
        self.kind = kind or self.kind
        if len(text) > _LONGEST_TEXT:
            text = f"{text[:_HEAD]}\n[...]\n{text[_HEAD + 7 - _LONGEST_TEXT :]}"
        super().__init__(_CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text))


class WireError(EngineError):
    """A message broke the protocol of ``wire.py``, or its sender is gone."""

    kind = "worker_lost"


def kind_of(error: BaseException) -> str:
    """One of ``KINDS``: what failed."""
    kinds: list[tuple[type[BaseException] | tuple[type[BaseException], ...], str]] = [
        (torch.distributed.DistError, "store_lost"),
        (FileNotFoundError, "not_found"),
        ((MemoryError, torch.OutOfMemoryError), "out_of_memory"),
        (TimeoutError, "timeout"),
        (ValueError, "invalid"),
        ((KeyboardInterrupt, SystemExit), "interrupted"),
    ]
    found = next((kind for of, kind in kinds if isinstance(error, of)), "failed")
    own = getattr(error, "kind", None)  # also of exceptions that are not ours
    return own if isinstance(own, str) and own in KINDS else found
