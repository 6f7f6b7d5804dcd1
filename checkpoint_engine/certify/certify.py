"""Starts engines from files, updates one, and compares it with the others."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import checkpoint_engine
from checkpoint_engine.certify.certificate import Certificate, Started, Updated
from checkpoint_engine.certify.comparison import Seen, compare, differing, largest_distance
from checkpoint_engine.certify.engine import Adapter, Engine, OrderError, Start, find_adapter
from checkpoint_engine.certify.perturb import link_the_rest, perturb_checkpoint, reverse_files
from checkpoint_engine.certify.ranks import Ranks
from checkpoint_engine.memory.files import open_files
from checkpoint_engine.memory.folder import checkpoint_of

FIRST, OTHER = "first", "other"
_TOKENS = 16
_PROMPT_LENGTHS = (4, 9, 24, 40)
_SMALL_SHARE = 64
"""So many small buckets hold a checkpoint: most models have fewer layers, so that layers straddle
buckets."""
_LEAST_BUCKET = 1 << 14


class Step(NamedTuple):
    """An update that is certified."""

    to: str
    is_small: bool
    replay: str


STEPS = (
    # The first two are recorded, the next two replay that.
    Step(FIRST, True, "on"),
    Step(OTHER, False, "on"),
    Step(FIRST, False, "on"),
    Step(OTHER, True, "on"),
    Step(FIRST, True, "off"),
    Step(OTHER, False, "off"),
)


@dataclass(frozen=True)
class Order:
    """What is certified.

    Attributes:
        other: the folder of another checkpoint; ``None``: one is made of the first.
        engine: an adapter, see ``engine.find_adapter``.
        workers: the tensor-parallel size.
        arguments: for the adapter.
        timeout: seconds for each update and request, and for a server to start.
    """

    model: Path
    other: Path | None = None
    engine: str = "vllm"
    workers: int = 1
    arguments: str = ""
    timeout: float = 1800.0


def certify(order: Order, tell: Callable[[str], None] = lambda _: None) -> Certificate:
    """Start, update, compare. ``tell`` gets a line before everything that takes long.

    Raises:
        OrderError: the order is wrong: a model that is no folder of safetensors files, an option
            that the engine does not know, two checkpoints that no output tells apart.
    """
    began = time.monotonic()
    adapter = find_adapter(order.engine)
    certificate = Certificate(_about(order))
    with contextlib.ExitStack() as held:
        work = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="certify-")))
        try:
            other = _other_checkpoint(order, work, tell)
            checkpoints = {FIRST: order.model.resolve(), OTHER: other}
            run = _Run(order, adapter, checkpoints, certificate, work, tell)
        except (OSError, ValueError) as error:
            raise OrderError(f"a checkpoint cannot be read: {error}") from error
        try:
            run.perform()
        except OrderError:
            raise
        except Exception:  # what the engine says: it does not know the model, it died
            certificate.refusal = traceback.format_exc()
    certificate.seconds = time.monotonic() - began
    return certificate


class _Run:
    """One run of ``certify``."""

    def __init__(
        self,
        order: Order,
        adapter: Adapter,
        checkpoints: dict[str, Path],
        certificate: Certificate,
        work: Path,
        tell: Callable[[str], None],
    ) -> None:
        self._order, self._adapter, self._work = order, adapter, work
        self._checkpoints, self._certificate, self._tell = checkpoints, certificate, tell
        self._prompts = _prompts(order.model)
        stored = [open_files([folder]).values() for folder in checkpoints.values()]
        self._bytes = max(sum(source.nbytes for source in sources) for sources in stored)

    def perform(self) -> None:
        fresh = {which: self._fresh(which) for which in (FIRST, OTHER)}
        if fresh[FIRST].outputs == fresh[OTHER].outputs:
            raise OrderError(
                "both checkpoints give the same tokens and log probabilities, so outputs would "
                "show nothing: give another --other-checkpoint"
            )
        with Ranks(len(fresh[FIRST].digests)) as ranks, self._started("dummy", FIRST) as engine:
            after = list(self._after_updates(engine, ranks))
        undetermined: frozenset[str] = frozenset()
        if any(seen and compare(seen, fresh[one.to]).any for one, seen in after):
            # It may be memory that no start initialises, a kernel that each start tunes anew, or a
            # tensor that has what came last: what do two fresh starts agree on, of which one reads
            # the files in the opposite order?
            model = self._order.model.resolve()
            self._checkpoints[FIRST] = reverse_files(model, self._work / "reversed")
            again = self._fresh(FIRST)
            undetermined = frozenset(differing(again.digests, fresh[FIRST].digests))
            noise = largest_distance(again.outputs, fresh[FIRST].outputs)
            fresh = {name: replace(one, noise=max(one.noise, noise)) for name, one in fresh.items()}
        self._certificate.compared = _compared(fresh[FIRST])
        for one, seen in after:
            difference = compare(seen, fresh[one.to], undetermined) if seen else None
            self._certificate.updates.append(replace(one, difference=difference))

    def _fresh(self, which: str) -> Seen:
        """A start from the files."""
        with self._started(which, which) as engine:
            self._describe(engine)
            seen, again = self._look(engine), engine.generate(self._prompts, _TOKENS)
            return replace(seen, noise=largest_distance(seen.outputs, again))

    def _describe(self, engine: Engine) -> None:
        devices = engine.call("certify_device")
        about = self._certificate.about
        about["engine"] = {**engine.describe(), **devices[0]}
        about["parallel"]["workers"] = len(devices)

    def _after_updates(self, engine: Engine, ranks: Ranks) -> Iterator[tuple[Updated, Seen | None]]:
        """Each update, and what the engine is then. One that fails is tried once more, as its users
        would; then no more follow."""
        for step in STEPS:
            for _ in range(2):
                updated, seen = self._updated(engine, ranks, step)
                yield updated, seen
                if seen is not None:
                    break
            else:
                self._certificate.refusal = updated.error
                return

    def _updated(self, engine: Engine, ranks: Ranks, step: Step) -> tuple[Updated, Seen | None]:
        updated = self._update(engine, ranks, step)
        if updated.error:
            return updated, None
        try:
            return updated, self._look(engine)
        except Exception:
            return replace(updated, error=traceback.format_exc()), None

    def _update(self, engine: Engine, ranks: Ranks, step: Step) -> Updated:
        size = max(self._bytes // _SMALL_SHARE, _LEAST_BUCKET) if step.is_small else 2 * self._bytes
        updated = Updated(step.to, step.replay, size, seconds=0.0)
        self._tell(updated.label)
        began = time.monotonic()
        try:
            engine.call("certify_replay", step.replay)
            folder = self._checkpoints[step.to]
            ask = partial(engine.call, "update_weights_from_ipc")
            found = ranks.update(folder, size, ask, self._order.timeout)
        except Exception as error:
            return replace(updated, seconds=time.monotonic() - began, error=str(error))
        loaded, reasons = _replay_of(found["answer"])
        spent, buckets = time.monotonic() - began, found["buckets"]
        told: dict[str, Any] = {"loaded": loaded, "reasons": reasons}
        told |= {"held_share": _held_of(found["answer"])}
        return replace(updated, seconds=spent, buckets=buckets, **told)

    def _look(self, engine: Engine) -> Seen:
        outputs = engine.generate(self._prompts, _TOKENS)
        return Seen(engine.call("certify_digests"), outputs)

    @contextlib.contextmanager
    def _started(self, weights: str, which: str) -> Iterator[Engine]:
        """``weights``: ``dummy``, or those of ``which``."""
        order, is_dummy = self._order, weights == "dummy"
        self._tell(f"start, {weights}")
        began = time.monotonic()
        start = Start(
            self._checkpoints[which], is_dummy, order.workers, order.arguments, order.timeout
        )
        with contextlib.closing(self._adapter(start)) as engine:
            self._certificate.starts.append(Started(weights, time.monotonic() - began))
            yield engine


def _about(order: Order) -> dict[str, Any]:
    """What is certified, by what."""
    path = order.model / "config.json"
    if not path.is_file():
        raise OrderError(f"{order.model} has no config.json: is it the folder of a model?")
    content = path.read_bytes()
    config = json.loads(content)
    architectures = config.get("architectures") or [config.get("model_type", "unknown")]
    return {
        "versions": {
            "checkpoint_engine": checkpoint_engine.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "model": {
            "path": str(order.model),
            "architecture": architectures[0],
            "config": hashlib.sha256(content).hexdigest(),
            "quantisation": _quantisation(config),
        },
        "other_checkpoint": "the first one, changed" if order.other is None else str(order.other),
        "parallel": {"tensor": order.workers},
        "engine_args": order.arguments,
    }


def _quantisation(config: dict[str, Any]) -> str:
    quantised = config.get("quantization_config") or {}
    return " ".join(str(quantised[key]) for key in ("quant_method", "format") if key in quantised)


def _compared(fresh: Seen) -> dict[str, Any]:
    return {
        "tensors": fresh.tensors,
        "prompts": len(fresh.outputs),
        "tokens": sum(len(one.tokens) for one in fresh.outputs),
        "log_probabilities": sum(len(one.log_probabilities) for one in fresh.outputs),
        "noise": fresh.noise if math.isfinite(fresh.noise) else None,
    }


def _other_checkpoint(order: Order, work: Path, tell: Callable[[str], None]) -> Path:
    folder = work / "other"
    if order.other is None:
        tell("another checkpoint")
        return perturb_checkpoint(order.model, folder)
    files = [Path(file) for file in checkpoint_of(order.other)]
    # With the first one's configuration, which a trainer may not have written.
    link_the_rest(order.model, folder)
    for file in files:
        (folder / file.name).symlink_to(file.resolve())
    return folder


def _prompts(model: Path) -> list[list[int]]:
    """Token ids, the same for the same vocabulary."""
    config = json.loads((model / "config.json").read_text())
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 256
    draw = random.Random(size)
    return [[draw.randrange(3, size) for _ in range(length)] for length in _PROMPT_LENGTHS]


def _replay_of(answer: Any) -> tuple[list[str], list[str]]:
    """How the workers say that they loaded, and why they did not learn or replay."""
    told = [one.get("replay", {}) for worker in answer or () for one in worker.values()]
    loaded = [one["loaded"] for one in told if one.get("loaded")]
    reasons = dict.fromkeys(one.get("reason") for one in told)
    return loaded, [reason for reason in reasons if reason and reason != "PS_REPLAY=off"]


def _held_of(answer: Any) -> float:
    """The most that a worker says it held of a layer that was not complete, as a share of what it
    was sent."""
    told = [one for worker in answer or () for one in worker.values()]
    shares = [one.get("held_bytes", 0) / max(1, one.get("bytes", 0)) for one in told]
    return round(max(shares, default=0.0), 4)
