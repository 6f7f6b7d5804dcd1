"""Learn an engine's loader in two updates, replay it ever after.

The first two updates of a model go through the engine's own loader while it is watched. What it did
becomes a plan: copies from regions of the checkpoint's tensors to regions of the model's. Later
updates execute those copies, a few per layer and bucket, without a look at single tensors.

There is a plan only if the loader did nothing but views and copies, did the same twice, and left
exactly what the plan would have written, in every parameter and buffer. Otherwise it is called for
every tensor, and ``report`` says why. One condition remains: a loader must not change its behaviour
later. Every so many updates (``PS_REPLAY_CHECK``) one bucket goes through the loader too and is
compared; a difference is an error, and the loader is not replayed any more.

    from checkpoint_engine.replay import replayed
    update_weights_from_ipc(context, address, device_id, run=replayed(model.load_weights))
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from checkpoint_engine.ground.needs import Needs
from checkpoint_engine.loading.replay.adapter import InPlace, ModelUpdate
from checkpoint_engine.loading.replay.learned_loader import LearnedLoader
from checkpoint_engine.loading.replay.recording import (
    KEEPS_TENSORS,
    NamedTensors,
    ReceivedBucket,
    Recording,
)

LoadWeights = Callable[[NamedTensors], Any]


class Replayed:
    """A ``load_weights`` that learns; see ``replayed``."""

    def __init__(self, load_weights: LoadWeights, model: torch.nn.Module, learned: LearnedLoader):
        self.report: dict[str, Any] = {}
        self._taken: dict[str, int] = {}
        self._load_weights = load_weights
        self._model = model
        self._learned = learned
        self._update: ModelUpdate | None = None

    @property
    def plan(self) -> Recording | None:
        """What was learned, if anything; replayed once two updates agree."""
        return self._learned.recording

    def __call__(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load some tensors of an update; the first one begins it."""
        self._load(list(weights), None)

    @property
    def needs(self) -> Needs | None:
        """As of ``BucketLoader``."""
        return self._learned.needs

    @property
    def reads_next(self) -> str:
        """As of ``BucketLoader``."""
        return self._begun().needs

    def begin(self) -> None:
        """As of ``BucketLoader``."""
        self._begun()

    def load_bucket(
        self, weights: NamedTensors, message: bytes, buffer: torch.Tensor, needs: str = ""
    ) -> None:
        """Called by ``worker.update_weights_from_ipc`` for a bucket that is new."""
        self._load(weights, ReceivedBucket(message, buffer, needs))

    def knows(self, message: bytes) -> bool:
        return self._learned.recognises(message) and self._begun().knows(message)

    def replay(self, message: bytes, buffer: torch.Tensor, needs: str = "") -> None:
        received = ReceivedBucket(message, buffer, needs)
        received.check(self._begun().needs)
        self._begun().replay(received)

    def finish(self) -> None:
        """The update is complete: keep what was learned, and fill in ``report``.

        Raises:
            RuntimeError: nothing was written, or tensors that were needed before did not come.
        """
        update = self._begun()
        update.finish()
        written = update.loaded()
        if update.tensors and written is not None and not written:
            raise RuntimeError(
                f"none of {update.tensors} tensors was written into the model, as "
                f"{sorted(update.unused())[:3]}: are these the names that its loader knows?"
            )
        if absent := update.absent():
            raise RuntimeError(
                f"{len(absent)} tensors did not come that the model needs, as {sorted(absent)[:3]}"
            )
        update.commit()
        self.report = summary(update, self._learned)
        self._taken = {"tensors": update.tensors, "left_over": len(update.unused())}
        self._update = None

    def statement(self) -> dict[str, dict[str, int]]:
        """As of ``BucketLoader``."""
        return {"model": self._taken}

    def abandon(self) -> None:
        """The update failed: nothing is learned from it."""
        update, self._update = self._update, None
        if update is not None:
            update.abandon()

    @property
    def held(self) -> ModelUpdate:
        """As of ``BucketLoader``."""
        return self._begun()

    def __enter__(self) -> Replayed:
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        self.finish() if exc is None else self.abandon()

    def _begun(self) -> ModelUpdate:
        if self._update is None:
            adapter = InPlace(self._model, self._load_weights)
            self._learned.held.look(adapter)
            self._update = self._learned.begin(adapter, version_of(self._model))
        return self._update

    def _load(self, weights: NamedTensors, received: ReceivedBucket | None) -> None:
        update = self._begun()
        if received is not None:
            received.check(update.needs)
        with torch.no_grad():
            update.load(weights, received)
        kept = update.settle()
        if kept and received is not None and not self._learned.keeps_tensors:
            self._learned.keeps_tensors = True
            raise RuntimeError(KEEPS_TENSORS)


_learned_loaders: weakref.WeakKeyDictionary[torch.nn.Module, LearnedLoader]
_learned_loaders = weakref.WeakKeyDictionary()


def replayed(load_weights: LoadWeights, model: torch.nn.Module | None = None) -> Replayed:
    """``load_weights``, learned in the first two updates of a model and replayed in later ones.

    Pass it as ``run`` to ``worker.update_weights_from_ipc``, which says when an update ends. Other
    callers use it in a ``with`` block for each update, and call it with lists of (name, tensor).

    Args:
        model: whose parameters and buffers it fills; default: the module that it is a method of.

    Raises:
        TypeError: it is no method of a module, and no ``model`` is given.
    """
    model = getattr(load_weights, "__self__", None) if model is None else model
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{load_weights!r} is no method of a torch.nn.Module: give model=")
    learned = _learned_loaders.setdefault(model, LearnedLoader())
    return Replayed(load_weights, model, learned)


def version_of(model: Any) -> str:
    """Of the package that the model's class is from."""
    package = sys.modules.get(type(model).__module__.partition(".")[0])
    return str(getattr(package, "__version__", ""))


def summary(update: ModelUpdate, learned: LearnedLoader) -> dict[str, Any]:
    """What an update made of what is known of a loader, as plain data."""
    report: dict[str, Any] = {
        "loaded": update.how,
        "replayed": update.replayed,
        "reason": update.reason or learned.why_not,
    }
    return report if learned.recording is None else report | learned.recording.figures
