"""Loading a stream of buckets into the models of a running inference engine.

An engine that has loaded its weights once has often repacked them, and its loader no longer fits
them. vLLM answers with layerwise reload: every layer goes back to the form of the checkpoint, is
loaded, repacked and copied into the memory that the engine computes with. Releases before it load
over what is there and repack again.
"""

from __future__ import annotations

import contextlib
import gc
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from checkpoint_engine.ground.needs import Needs
from checkpoint_engine.loading.adapters import LoadOver, may_be_missing, tied_parameters
from checkpoint_engine.loading.layerwise import adapter_for
from checkpoint_engine.loading.lm_heads import SourceHeads
from checkpoint_engine.loading.refusals import refuse_unfit
from checkpoint_engine.loading.replay.adapter import ModelUpdate
from checkpoint_engine.loading.replay.learned_loader import LearnedLoader
from checkpoint_engine.loading.replay.recording import KEEPS_TENSORS, NamedTensors, ReceivedBucket
from checkpoint_engine.loading.views import KeptView, keep_views, kept_views
from checkpoint_engine.loading.vllm.kernel_memory import storages_of_several
from checkpoint_engine.replay import summary, version_of

_SHOWN_NAMES = 20


@dataclass
class LoaderHabits:
    """What one model's loader was seen to do; kept from update to update.

    Attributes:
        joined: tensors of different buckets that it has to be given in one call.
        left_alone: those that it left over also then, as it does when the engine starts.
    """

    model: Any
    learned: LearnedLoader = field(default_factory=LearnedLoader)
    joined: set[str] = field(default_factory=set)
    left_alone: set[str] = field(default_factory=set)


class ModelReload:
    """One update of one model of an engine.

    Attributes:
        report: filled in at the end, as plain data, with the first names of long lists.
            ``tensors``, ``bytes``: what arrived. ``held_bytes``: of those, what had to be loaded
            before its layer was complete, because the layer was spread over buckets. ``missing``:
            parameters that nothing was loaded into; its count is ``None`` if neither the loader nor
            the engine tells. ``partial``: layers of which a part was not loaded. Padding is such a
            part; so is what a checkpoint lacks of a layer that is fused from several of its
            tensors. ``unused``: tensors that this worker's loader did not read, as other workers'
            experts and stages, or what the model does not have; not known of plain updates.
            ``replay``: what of it was replayed, and why the rest was not; see ``replay.summary``.
    """

    def __init__(
        self,
        habits: LoaderHabits,
        adapter: LoadOver,
        model_config: Any,
        elsewhere: frozenset[str] = frozenset(),
    ) -> None:
        """``elsewhere``: parameters that are another model's, too, which gets what they need."""
        self.report: dict[str, Any] = {}
        self._held_bytes = 0
        self._model = habits.model
        self._habits, self._learned = habits, habits.learned
        self._together: NamedTensors = []
        self._model_config = model_config
        self._adapter = adapter
        self._elsewhere = elsewhere
        self._session: ModelUpdate | None = None
        self._views: list[KeptView] = []
        self._expected: set[str] = set()
        self._required: set[str] = set()

    def check(self) -> None:
        """Raises ``RuntimeError`` if the model cannot be updated."""
        self._adapter.check()

    def knows(self, message: bytes) -> bool:
        """Whether a bucket with this message can be replayed as it is."""
        return self._learned.recognises(message) and self._begun().knows(message)

    def load(self, weights: NamedTensors | None, delivery: ReceivedBucket | None) -> None:
        """Load a bucket.

        Args:
            weights: ``None`` if its message is known, so that it is replayed.
            delivery: where its tensors lie.
        """
        if weights is not None and (joined := self._habits.joined):
            if delivery is not None:
                delivery.check("")
            self._together += [(name, t.clone()) for name, t in weights if name in joined]
            weights = [one for one in weights if one[0] not in joined]
        self._load(weights, delivery)

    @property
    def needs(self) -> Needs | None:
        """What the loader reads as long as it is replayed; ``None``: everything."""
        return self._learned.needs

    @property
    def reads_next(self) -> str:
        """The digest of what the next update reads at most; empty: everything."""
        return self._learned.reads_next

    def _load(self, weights: NamedTensors | None, delivery: ReceivedBucket | None) -> None:
        session = self._begun()
        if delivery is not None and delivery.needs:
            delivery.check(session.needs)
        with self._adapter.surroundings():
            if weights is not None:
                session.load(weights, delivery)
            elif delivery is not None:
                session.replay(delivery)
        self._held_bytes += self._adapter.after_bucket()
        session.settle()

    def finish(self) -> None:
        """Everything has arrived.

        Raises:
            ValueError: the engine would not have started from such a checkpoint.
        """
        if self._together:
            self._load(self._together, None)
            self._together = []
        session = self._begun()
        session.finish()
        loaded = session.loaded()
        missing = self._adapter.missing(self._expected, loaded)
        self._check_left_over(session)
        if lacking := (missing or set()) & self._required:
            raise ValueError(
                f"the checkpoint lacks {len(lacking)} parameters without which this model would "
                f"not start: {sorted(lacking)[:_SHOWN_NAMES]}"
            )
        partial, unused = self._adapter.partial_layers(), session.unused()
        with self._adapter.surroundings():
            self._adapter.finish()
        keep_views(self._adapter.modules, self._views)
        session.commit()
        self._session = None
        held = self._held_bytes + session.held_bytes
        self.report = {"tensors": session.tensors, "bytes": session.nbytes, "held_bytes": held}
        for kind, names in {"missing": missing, "partial": partial, "unused": unused}.items():
            shown = sorted(names or ())[:_SHOWN_NAMES]
            self.report |= {f"{kind}_count": None if names is None else len(names), kind: shown}
        self.report["replay"] = summary(session, self._learned)

    def _check_left_over(self, session: ModelUpdate) -> None:
        """A loader that joins tensors within a call misses those that buckets part. What it leaves
        alone also when it has all of them in one call, a start leaves alone, too."""
        written, unused = session.written(), session.unused()
        if written is None:
            return
        lacking = self._expected - written - (session.loaded_plainly or set())
        parted = _parts_of(lacking, unused)
        habits = self._habits
        if fresh := parted - habits.joined - habits.left_alone:
            habits.joined |= fresh
            self._learned.forget()
            raise RuntimeError(
                f"{len(lacking)} parameters got nothing, as {sorted(lacking)[:_SHOWN_NAMES]}, and "
                f"tensors were left over, as {sorted(parted)[:_SHOWN_NAMES]}. Update again: the "
                "loader will be given those in one call"
            )
        habits.left_alone |= habits.joined & unused
        habits.joined -= unused
        if habits.joined:
            self._learned.refuse("its loader joins tensors of different buckets")

    def close(self) -> None:
        """Clean up after a failed update; nothing after a finished one."""
        session, self._session = self._session, None
        if session is not None:
            session.abandon(self._adapter.abandon)

    def _begun(self) -> ModelUpdate:
        """The session of this update, begun with the first bucket."""
        if self._session is None:
            tied = tied_parameters(self._adapter.module)
            self._views = kept_views(self._adapter.modules)
            self._learned.held.look(self._adapter)
            self._adapter.begin()
            self._session = ModelUpdate(self._learned, self._adapter)  # what close() needs
            self._session = self._learned.begin(self._adapter, version_of(self._model))
            self._note_what_is_expected(tied)
        return self._session

    def _note_what_is_expected(self, tied: set[str]) -> None:
        model = self._adapter.module
        names = {name.replace(".base_layer.", ".") for name, _ in model.named_parameters()}
        names -= tied | self._elsewhere
        quantised = getattr(self._model_config, "quantization", None) is not None
        exempt = may_be_missing(model, quantised)
        self._expected = names - (exempt or set()) if quantised else names
        self._required = set() if quantised or exempt is None else names - exempt


def _parts_of(parameters: set[str], tensors: set[str]) -> set[str]:
    """The tensors of a checkpoint that may be parts of the parameters: of the same layer, or of one
    that is fused of several, as ``wk_weights_proj`` of ``wk`` and ``weights_proj``."""
    layers: dict[str, set[str]] = defaultdict(set)
    for parameter in parameters:
        around, _, layer = (parameter.rpartition(".")[0] or parameter).rpartition(".")
        layers[around].add(layer)
    parts = set()
    for tensor in tensors:
        around, _, layer = tensor.rpartition(".")[0].rpartition(".")
        if layer and any(layer in fused for fused in layers.get(around, ())):
            parts.add(tensor)
    return parts


class ModelsReload:
    """One update of all models that a worker fills from one stream.

    A ``worker.BucketLoader``. ``close`` it in any case.
    """

    def __init__(self, models: dict[str, ModelReload], habits: dict[str, LoaderHabits]) -> None:
        """``models``: by role; ``habits``: theirs, kept by the worker from update to update."""
        self._models = models
        self._habits = habits

    def check(self) -> None:
        """Raises ``RuntimeError`` if the engine cannot take weights now."""
        self._each(ModelReload.check)

    def begin(self) -> None:
        """Have the engine make itself ready."""
        self._each(ModelReload._begun)

    def load(self, weights: NamedTensors, delivery: ReceivedBucket | None = None) -> None:
        """Give a bucket to every model; ``weights`` is emptied. Nothing refers to its memory then.

        Raises ``RuntimeError`` if a loader does; from the next update on it gets copies.
        """
        if not weights:
            return
        storage = weights[0][1].untyped_storage()
        bases = [one._base for _, one in weights]  # noqa: F841  # views hold them, and memory so
        before = _references(storage) - len(weights)
        self._each(lambda model: model.load(weights, delivery))
        weights.clear()
        if _references(storage) > before:
            gc.collect()
        if _references(storage) > before:
            for habits in self._habits.values():
                habits.learned.keeps_tensors = True
            raise RuntimeError(KEEPS_TENSORS)

    @property
    def needs(self) -> Needs | None:
        """As of ``BucketLoader``; of an engine with a drafter it is not told."""
        one = self._alone
        return None if one is None else one.needs

    @property
    def reads_next(self) -> str:
        """As of ``BucketLoader``."""
        one = self._alone
        return "" if one is None else one.reads_next

    @property
    def held(self) -> ModelUpdate | None:
        """As of ``BucketLoader``; with a drafter everything is sent."""
        one = self._alone
        return None if one is None else one._begun()

    @property
    def _alone(self) -> ModelReload | None:
        models = list(self._models.values())
        return models[0] if len(models) == 1 else None

    def load_bucket(
        self, weights: NamedTensors, message: bytes, buffer: torch.Tensor, needs: str = ""
    ) -> None:
        """Load a bucket, and remember its message."""
        self.load(weights, ReceivedBucket(message, buffer, needs))

    def knows(self, message: bytes) -> bool:
        return all(self._each(lambda model: model.knows(message)))

    def replay(self, message: bytes, buffer: torch.Tensor, needs: str = "") -> None:
        """Load a bucket whose message is known."""
        self._each(lambda model: model.load(None, ReceivedBucket(message, buffer, needs)))

    def finish(self) -> None:
        """Have the engine process what was loaded."""
        self._each(ModelReload.finish)

    def statement(self) -> dict[str, dict[str, int]]:
        """Of each model, how many tensors arrived and were left over, and how many parameters got
        a part or nothing, if that is known."""
        stated = {}
        for role, model in self._models.items():
            counts = {
                "tensors": model.report["tensors"],
                "left_over": model.report["unused_count"],
                "missing": model.report["missing_count"],
                "partial": model.report["partial_count"],
            }
            stated[role] = {what: count for what, count in counts.items() if count is not None}
        return stated

    def close(self) -> None:
        """Clean up after a failed update; nothing after a finished one."""
        self._each(ModelReload.close)

    def abandon(self) -> None:
        """As ``close``."""
        self.close()

    def summary(self) -> dict[str, Any]:
        """By role, what each model took."""
        return {role: model.report for role, model in self._models.items()}

    def surroundings(self) -> contextlib.AbstractContextManager[Any]:
        """Those in which the engine loaded its models at start-up."""
        return contextlib.nullcontext()

    def _each(self, action: Callable[[ModelReload], Any]) -> list[Any]:
        with self.surroundings():
            return [action(model) for model in self._models.values()]


class EngineReload(ModelsReload):
    """One update of a worker with a model as vLLM's, and its drafter's where it has one."""

    def __init__(self, worker: Any, habits: dict[str, LoaderHabits]) -> None:
        """
        Args:
            worker: has ``device`` and ``model_runner``, as vLLM's workers.
            habits: kept by the worker, from update to update.

        ``close`` it in any case: a drafter's heads are away until then.
        """
        super().__init__({}, habits)
        runner = worker.model_runner
        self._worker = worker
        self._config = getattr(worker, "vllm_config", None)
        models = list(models_of(runner, self._config))
        shared = storages_of_several([model for _, model, _ in models])
        self._heads = SourceHeads(next((m for role, m, _ in models if role == "drafter"), None))
        with contextlib.ExitStack() as undo:
            undo.callback(self._heads.restore, refresh=False)
            self._heads.share()  # first: what is made for a model looks at its layers
            for role, model, model_config in models:
                adapter = adapter_for(model, model_config, worker.device, shared)
                self._models[role] = ModelReload(
                    habits_of(habits, role, model), adapter, model_config
                )
            undo.pop_all()

    def check(self) -> None:
        """Raises ``RuntimeError`` if the engine cannot take weights now."""
        refuse_unfit(self._worker)
        super().check()

    def finish(self) -> None:
        """Have the engine process what was loaded, and drop what it derived from old weights."""
        super().finish()
        with self.surroundings():
            self._heads.restore(refresh=True)
        for cache in ("reset_lora_state", "reset_encoder_cache", "reset_mm_cache"):
            getattr(self._worker.model_runner, cache, lambda: None)()  # not every engine has it

    def close(self) -> None:
        """Clean up after a failed update; nothing after a finished one."""
        try:
            super().close()
        finally:
            self._heads.restore(refresh=False)

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        default = torch.get_default_dtype()
        dtype = getattr(getattr(self._worker.model_runner, "model_config", None), "dtype", None)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            dtype = default  # other engines name it otherwise
        with contextlib.ExitStack() as around:
            around.callback(torch.set_default_dtype, default)
            torch.set_default_dtype(dtype)  # vLLM's own reload forgets it; int8 on CPUs needs it
            if self._config is not None:
                from vllm.config import set_current_vllm_config

                around.enter_context(set_current_vllm_config(self._config))
            yield


def habits_of(habits: dict[str, LoaderHabits], role: str, model: Any) -> LoaderHabits:
    """Those of this model, which are new if another one had its role before."""
    if role not in habits or habits[role].model is not model:
        habits[role] = LoaderHabits(model)
    return habits[role]


def models_of(runner: Any, config: Any) -> Iterator[tuple[str, Any, Any]]:
    """(role, model, its config): the model, and a drafter that came from the same checkpoint."""
    yield "model", _unwrapped(runner.model), getattr(runner, "model_config", None)
    drafter = _unwrapped(getattr(getattr(runner, "drafter", None), "model", None))
    if drafter is None and hasattr(runner, "get_draft_model"):
        drafter = runner.get_draft_model()
    speculative = getattr(config, "speculative_config", None)
    drafted = getattr(speculative, "draft_model_config", None)
    target = getattr(getattr(config, "model_config", None), "model", None)
    if hasattr(drafter, "load_weights") and getattr(drafted, "model", target) == target:
        yield "drafter", drafter, drafted or getattr(runner, "model_config", None)


def _unwrapped(model: Any) -> Any:
    """The model within what vLLM wraps it in for CUDA graphs, which is no module itself."""
    while callable(getattr(type(model), "unwrap", None)) and not isinstance(model, torch.nn.Module):
        model = model.unwrap()
    return model


def _references(storage: torch.UntypedStorage) -> int:
    """How many tensors, about, share a storage."""
    return int(torch._C._storage_Use_Count(storage._cdata))
