"""What ``certify`` found, for programs and for readers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from checkpoint_engine.certify.comparison import Difference

Result = Literal["right", "differs", "refused"]
_SHOWN_NAMES = 3
_SHOWN_REASON = 400


@dataclass(frozen=True)
class Started:
    """An engine that was started.

    Attributes:
        weights: ``first`` or ``other``: from the files of that checkpoint; ``dummy``.
    """

    weights: str
    seconds: float


@dataclass(frozen=True)
class Updated:
    """An update of the engine that started with dummy weights.

    Attributes:
        to: ``first`` or ``other``.
        replay: ``PS_REPLAY`` of the workers.
        loaded: by each worker and model: ``recorded``, ``replayed`` or ``plain``.
        reasons: why a loader was not learned or replayed, where the workers say so.
        buckets: of ``bucket_bytes`` at most.
        held_share: the most that a worker held of incomplete layers beside what the engine computes
            with, of the bytes that arrived.
        error: of the update, if it failed.
        difference: from a fresh start; ``None`` if it failed.
    """

    to: str
    replay: str
    bucket_bytes: int
    seconds: float
    buckets: int = 0
    loaded: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    held_share: float = 0.0
    error: str = ""
    difference: Difference | None = None

    @property
    def label(self) -> str:
        return f"update to {self.to}, {self.buckets or 'no'} buckets, {self.how}"

    @property
    def how(self) -> str:
        return " and ".join(dict.fromkeys(self.loaded)) or f"PS_REPLAY={self.replay}"


@dataclass
class Certificate:
    """Filled in as engines start and are updated.

    Attributes:
        about: versions, the model, the engine, the device, parallel sizes.
        compared: how many tensors, prompts, tokens and log probabilities each update is compared
            by, and the ``noise`` of the latter.
        refusal: the error of an engine that did not start, or that refused to be updated twice.
    """

    about: dict[str, Any]
    compared: dict[str, Any] = field(default_factory=dict)
    starts: list[Started] = field(default_factory=list)
    updates: list[Updated] = field(default_factory=list)
    refusal: str = ""
    seconds: float = 0.0

    @property
    def result(self) -> Result:
        """``differs`` also where no output shows it."""
        if any(one.any for one in self._differences()):
            return "differs"
        return "refused" if self.refusal else "right"

    @property
    def reason(self) -> str:
        """Why it is not right, or what has to be known though it is; may be empty."""
        texts = []
        if differing := [one for one in self.updates if one.difference and one.difference.any]:
            first = differing[0]
            texts.append(f"{len(differing)} of {len(self.updates)} updates, first {first.label}")
            texts.append(_described(first.difference))
        if self.refusal:
            texts.append(last_line(self.refusal))
        elif failed := [one for one in self.updates if one.error]:
            texts.append(f"an update failed, and the next one worked: {last_line(failed[0].error)}")
        if names := self.undetermined:
            texts.append(f"two fresh starts do not agree on {_listed(names)}")
        return "; ".join(texts)

    @property
    def unseen(self) -> list[str]:
        """Tensors that differ after an update, though no output shows it."""
        found = [one.tensors for one in self._differences() if not one.shown]
        return list(dict.fromkeys(name for names in found for name in names))

    @property
    def undetermined(self) -> list[str]:
        """Tensors that differ between two fresh starts, too."""
        names = [name for one in self._differences() for name in one.undetermined]
        return list(dict.fromkeys(names))

    @property
    def loaded(self) -> str:
        """How the updates were loaded, and why not all were learned and replayed."""
        how = dict.fromkeys(kind for one in self.updates for kind in one.loaded)
        reasons = dict.fromkeys(reason for one in self.updates for reason in one.reasons)
        return ", ".join(how) + "".join(f"; {reason}" for reason in reasons)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "result": self.result,
            "reason": self.reason,
            **self.about,
            "compared": self.compared,
            "starts": [vars(one) for one in self.starts],
            "updates": [_as_dict(one) for one in self.updates],
            "unseen": self.unseen,
            "undetermined": self.undetermined,
            "refusal": self.refusal,
            "seconds": round(self.seconds, 2),
        }

    def table(self) -> str:
        """For a terminal."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        model, engine = self.about["model"], self.about.get("engine", {})
        quantised = f", {model['quantisation']}" if model["quantisation"] else ""
        yield f"{model['architecture']}{quantised}: {model['path']}"
        named = " ".join(engine.get(part, "") for part in ("engine", "version"))
        where = f"{named} on {engine.get('device', 'unknown')}" if engine else "no engine started"
        yield f"{where}, tensor parallel {self.about['parallel']['tensor']}"
        for start in self.starts:
            yield f"  {'start, ' + start.weights:<52} {start.seconds:7.2f} s"
        for one in self.updates:
            verdict = one.error and f"failed: {last_line(one.error)}"
            if one.difference is not None:
                verdict = _described(one.difference) if one.difference.any else "right"
            yield f"  {one.label:<52} {one.seconds:7.2f} s  {verdict}"
        yield f"{self.result}{': ' + self.reason if self.reason else ''}"

    def _differences(self) -> list[Difference]:
        return [one.difference for one in self.updates if one.difference is not None]


def last_line(text: str) -> str:
    """What a traceback ends with; the rest of an error is in the certificate."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:_SHOWN_REASON] if lines else ""


def _described(difference: Difference | None) -> str:
    if difference is None:
        return ""
    texts = []
    if difference.tensors:
        texts.append(f"{len(difference.tensors)} tensors differ, {_listed(difference.tensors)}")
    if difference.tokens:
        texts.append("other tokens")
    if difference.log_probability:
        texts.append(f"log probabilities differ by up to {difference.log_probability:.2g}")
    if not difference.shown:
        is_noise = difference.tokens or difference.log_probability
        texts.append("no more than equal starts do" if is_noise else "no output shows it")
    return "; ".join(texts)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


def _as_dict(update: Updated) -> dict[str, Any]:
    told: dict[str, Any] = {**vars(update), "seconds": round(update.seconds, 3)}
    if update.difference is not None:
        distance = update.difference.log_probability
        told["difference"] = {
            **vars(update.difference),
            "log_probability": distance if math.isfinite(distance) else None,
        }
    return told
