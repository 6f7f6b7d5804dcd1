"""Loading a stream of buckets into the models of a running inference engine.

An engine that has loaded its weights once has often repacked them, and its loader no longer fits
them. vLLM answers with layerwise reload: every layer goes back to the form of the checkpoint, is
loaded, repacked and copied into the memory that the engine computes with. Releases before it load
over what is there and repack again.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from checkpoint_engine.loading.replay.adapter import InPlace, ModelAdapter
from checkpoint_engine.loading.replay.learned_loader import (
    KEEPS_TENSORS,
    LearnedLoader,
    ModelUpdate,
)
from checkpoint_engine.loading.replay.memory import Slot
from checkpoint_engine.loading.replay.recorder import Recorder
from checkpoint_engine.loading.replay.recording import NamedTensors, ReceivedBucket
from checkpoint_engine.loading.vllm_on_cpu import CpuRepairs
from checkpoint_engine.replay import summary, version_of

_SHOWN_NAMES = 20
_LAYERWISE = "vllm.model_executor.model_loader.reload.layerwise"


@dataclass
class ModelReport:
    """What one worker's model took of an update.

    Attributes:
        tensors, nbytes: what arrived.
        held_bytes: of those, what had to be loaded before its layer was complete, because the layer
            was spread over buckets.
        missing: parameters that nothing was loaded into.
        partial: layers of which a part was not loaded. Padding is such a part; so is what a
            checkpoint lacks of a layer that is fused from several of its tensors.
        unused: tensors that this worker's loader did not read, as other workers' experts and
            stages, or what the model does not have; not known of plain updates.
        replay: what of it was replayed, and why the rest was not; see ``replay.summary``.
    """

    tensors: int = 0
    nbytes: int = 0
    held_bytes: int = 0
    missing: set[str] = field(default_factory=set)
    partial: set[str] = field(default_factory=set)
    unused: set[str] = field(default_factory=set)
    replay: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """As plain data, with the first names of long lists."""
        return {
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "held_bytes": self.held_bytes,
            "missing_count": len(self.missing),
            "missing": sorted(self.missing)[:_SHOWN_NAMES],
            "partial_count": len(self.partial),
            "partial": sorted(self.partial)[:_SHOWN_NAMES],
            "unused_count": len(self.unused),
            "unused": sorted(self.unused)[:_SHOWN_NAMES],
            "replay": self.replay,
        }


class _Way(ModelAdapter, Protocol):
    """How an engine reloads one model."""

    @property
    def surroundings(self) -> Callable[[], AbstractContextManager[Any]]:
        """What loading happens in."""
        ...

    def begin(self) -> None:
        """Before the first tensor."""
        ...

    def after_bucket(self) -> int:
        """The bucket's memory is about to be overwritten. Returns the bytes that were held back."""
        ...

    def partial_layers(self) -> set[str]:
        """The names of layers of which a part has not been loaded."""
        ...

    def finish(self) -> None:
        """After the last tensor."""
        ...

    def abandon(self) -> None:
        """The update failed: leave a model that can be updated again."""
        ...


class _LoadOver(InPlace):
    """Loads over the weights that are there, and repacks them: releases without layerwise
    reload."""

    surroundings = staticmethod(nullcontext)

    def __init__(self, model: Any, model_config: Any, device: torch.device) -> None:
        module = model if isinstance(model, torch.nn.Module) else torch.nn.Module()
        super().__init__(module, model.load_weights)
        self._model = model
        self._model_config = model_config
        self._device = device

    def cannot(self) -> str:
        return "" if isinstance(self._model, torch.nn.Module) else "it is no torch.nn.Module"

    def begin(self) -> None:
        """Nothing to prepare."""

    def after_bucket(self) -> int:
        return 0

    def partial_layers(self) -> set[str]:
        """What was not loaded keeps its old weights; nothing tells which."""
        return set()

    def finish(self) -> None:
        try:
            from vllm.model_executor.model_loader.utils import process_weights_after_loading
        except ImportError:  # engines that have no such step
            return
        process_weights_after_loading(self._model, self._model_config, self._device)

    def abandon(self) -> None:
        """Nothing was taken apart."""


class _Layerwise:
    """vLLM's layerwise reload.

    vLLM keeps what it is given until a layer is complete. Here that is memory which the next bucket
    but one overwrites. So a layer that is incomplete at the end of a bucket gets its parameters
    now, and what has arrived is loaded into them: no copy of the tensors, and only of the shard
    that this worker keeps. Where a release cannot do that, the tensors are copied.
    """

    def __init__(
        self, vllm: Any, model: torch.nn.Module, model_config: Any, device: torch.device
    ) -> None:
        """``vllm``: the module that layerwise reload is in."""
        self._vllm = vllm
        self._model = model
        self._model_config = model_config
        self.load_weights: Any = model.load_weights
        self._names = {layer: name for name, layer in model.named_modules()}
        self.modules: Mapping[str, torch.nn.Module] = {
            name: layer for layer, name in self._names.items()
        }
        self._layers = [(layer, vllm.get_layerwise_info(layer)) for layer in model.modules()]
        self._held: dict[torch.nn.Module, int] = {}
        self._loads_early = _keeps_what_is_there(vllm)
        self._repairs = CpuRepairs(model.modules() if device.type == "cpu" else ())
        self.surroundings: Callable[[], AbstractContextManager[Any]] = (
            nullcontext if _knows_the_device(vllm) else lambda: device
        )

    @staticmethod
    def offered_for(model: Any) -> Any:
        """vLLM's module for it, if this release has one and recorded how ``model`` was made."""
        if not isinstance(model, torch.nn.Module):
            return None
        try:
            vllm = importlib.import_module(_LAYERWISE)
        except ImportError:
            return None
        recorded = (vllm.get_layerwise_info(layer).restore_metadata for layer in model.modules())
        return vllm if any(parameters for parameters, _ in recorded) else None

    def begin(self) -> None:
        self.abandon()  # what a failed update may have left
        self._vllm.initialize_layerwise_reload(self._model)
        self._repairs.begin()

    def after_bucket(self) -> int:
        nbytes = 0
        for layer, info in self._layers:
            arrived = info.loaded_weights[self._held.get(layer, 0) :]
            if not arrived:
                continue
            nbytes += sum(t.nbytes for _, call in arrived for t in _tensors(call).values())
            if self._loads_early and not self._must_wait(layer, info):
                self._load_now(layer, info)
                continue
            for _, call in arrived:
                call.arguments.update({name: t.clone() for name, t in _tensors(call).items()})
            self._held[layer] = len(info.loaded_weights)
        return nbytes

    is_persistent = False

    def cannot(self) -> str:
        return "" if self._loads_early else "this vLLM makes layers anew when they are complete"

    def tensors(self) -> Iterator[tuple[Slot, torch.Tensor]]:
        """Of the layers that wait for weights."""
        for layer, info in self._layers:
            if info.load_numel_total is not None:
                for name, tensor in self._vllm.get_layer_tensors(layer).items():
                    yield Slot(self._names[layer], name), tensor

    def refuses(self, slot: Slot) -> str | None:
        layer = self.modules[slot.module]
        if _is_deferred(self._vllm, layer):
            return "vLLM loads attention last of all"
        if slot.name in layer._buffers:
            return "vLLM recognises loaded buffers by the calls that it keeps"
        return None

    @contextlib.contextmanager
    def watching(self, recorder: Recorder) -> Iterator[None]:
        """What is loaded into a layer that waits is counted; what comes after is vLLM's own."""
        count, process = self._vllm.get_numel_loaded, self._vllm._layerwise_process

        def process_unseen(layer: torch.nn.Module, info: Any) -> None:
            with recorder.paused():
                process(layer, info)

        self._vllm.get_numel_loaded = lambda *args: recorder.count(lambda: count(*args))
        self._vllm._layerwise_process = process_unseen
        try:
            yield
        finally:
            self._vllm.get_numel_loaded, self._vllm._layerwise_process = count, process

    @contextlib.contextmanager
    def checking(self, check: Callable[[str], None]) -> Iterator[None]:
        process = self._vllm._layerwise_process

        def check_and_process(layer: torch.nn.Module, info: Any) -> None:
            self._load_now(layer, info)
            check(self._names[layer])
            process(layer, info)

        self._vllm._layerwise_process = check_and_process
        try:
            yield
        finally:
            self._vllm._layerwise_process = process

    def open(self, module: str) -> None:
        layer = self.modules[module]
        self._vllm.materialize_layer(layer, self._vllm.get_layerwise_info(layer))

    def memory(self, slot: Slot) -> torch.Tensor:
        memory = getattr(self.modules[slot.module], slot.name)
        return memory.data  # vLLM's own kinds of parameters are slow to look at

    def delivered(self, module: str, numel: int) -> bool:
        """What vLLM's wrapped loaders do once a tensor is in."""
        layer = self.modules[module]
        info = self._vllm.get_layerwise_info(layer)
        info.load_numel_total = self._vllm.get_layer_size(layer)
        info.load_numel += numel
        if info.load_numel < info.load_numel_total:
            return False
        self._vllm._layerwise_process(layer, info)
        return True

    def partial_layers(self) -> set[str]:
        return {
            self._names[layer]
            for layer, info in self._layers
            if 0 < info.load_numel < (info.load_numel_total or 0)
            and not _is_deferred(self._vllm, layer)
        }

    def finish(self) -> None:
        self._vllm.finalize_layerwise_reload(self._model, self._model_config)
        self._repairs.pack_tied()
        self._repairs.end()

    def abandon(self) -> None:
        """Put the memory that the engine computes with back in its place."""
        self._repairs.end()
        for layer, info in self._layers:
            if info.load_numel_total is None:  # not waiting for weights
                continue
            if info.kernel_tensors is not None:
                self._vllm._place_kernel_tensors(layer, info)
            info.reset()
        if hasattr(self._model, "_original_do_torchao_reload"):
            self._model._do_torchao_reload = self._model._original_do_torchao_reload

    def _must_wait(self, layer: torch.nn.Module, info: Any) -> bool:
        """Attention is loaded last of all; loaded buffers are recognised by what is kept."""
        buffers = {name for name, _ in info.loaded_weights} & layer._buffers.keys()
        return bool(buffers) or _is_deferred(self._vllm, layer)

    def _load_now(self, layer: torch.nn.Module, info: Any) -> None:
        self._vllm.materialize_layer(layer, info)
        for name, call in info.loaded_weights:
            parameter = getattr(layer, name)
            if call.arguments["param"] is not parameter:  # otherwise it is in there already
                call.arguments["param"] = parameter
                self._vllm._get_original_loader(parameter)(*call.args, **call.kwargs)
        info.loaded_weights.clear()


def _knows_the_device(vllm: Any) -> bool:
    """From 0.19 on; before, a layer is made on whatever is torch's default device."""
    return len(inspect.signature(vllm.materialize_layer).parameters) > 1


def _keeps_what_is_there(vllm: Any) -> bool:
    """Whether a layer that has its parameters already keeps them, tried out: from 0.20 or so on."""
    if not _knows_the_device(vllm):
        return False
    layer = torch.nn.Linear(1, 1, bias=False, device="cpu")
    weight = layer.weight
    vllm.materialize_layer(layer, vllm.get_layerwise_info(layer))
    return layer.weight is weight


def _is_deferred(vllm: Any, layer: torch.nn.Module) -> bool:
    if hasattr(vllm, "is_deferred_attention_layer"):
        return bool(vllm.is_deferred_attention_layer(layer))
    return callable(getattr(layer, "process_weights_after_loading", None))


def _tensors(call: inspect.BoundArguments) -> dict[str, torch.Tensor]:
    """What a loader was given, by argument."""
    return {
        name: value
        for name, value in call.arguments.items()
        if isinstance(value, torch.Tensor) and name != "param"
    }


@dataclass
class LoaderHabits:
    """What one model's loader was seen to do; kept from update to update."""

    model: Any
    learned: LearnedLoader = field(default_factory=LearnedLoader)


class ModelReload:
    """One update of one model of an engine."""

    def __init__(self, habits: LoaderHabits, model_config: Any, device: torch.device) -> None:
        self.report = ModelReport()
        self._model = habits.model
        self._learned = habits.learned
        self._model_config = model_config
        vllm = _Layerwise.offered_for(self._model)
        self._way: _Way = (
            _LoadOver(self._model, model_config, device)
            if vllm is None
            else _Layerwise(vllm, self._model, model_config, device)
        )
        self._session: ModelUpdate | None = None
        self._expected: set[str] = set()
        self._required: set[str] = set()

    def load(self, weights: NamedTensors, delivery: ReceivedBucket | None = None) -> None:
        """Load a bucket; ``delivery``: where its tensors lie."""
        session = self._begun()
        with self._way.surroundings():
            session.load(weights, delivery)
        self._end_bucket(session)

    def knows(self, message: bytes) -> bool:
        """Whether a bucket with this message can be replayed as it is."""
        return self._learned.recognises(message) and self._begun().knows(message)

    def replay(self, delivery: ReceivedBucket) -> None:
        """Load a bucket whose message is known."""
        session = self._begun()
        with self._way.surroundings():
            session.replay(delivery)
        self._end_bucket(session)

    def finish(self) -> None:
        """Everything has arrived.

        Raises:
            ValueError: the engine would not have started from such a checkpoint.
        """
        session = self._begun()
        session.finish()
        self._fill_report(session)
        self._refuse_incomplete(self.report.missing & self._required)
        with self._way.surroundings():
            self._way.finish()
        session.commit()
        self.report.replay = summary(session, self._learned)
        self._session = None

    def close(self) -> None:
        """Clean up after a failed update; nothing after a finished one."""
        if self._session is not None:
            self._session = None
            self._way.abandon()

    def _begun(self) -> ModelUpdate:
        """The session of this update, begun with the first bucket."""
        if self._session is None:
            tied = _tied(self._model)
            self._way.begin()
            self._session = ModelUpdate(self._learned, self._way)  # what close() needs
            self._session = self._learned.begin(self._way, version_of(self._model))
            self._note_what_is_expected(tied)
        return self._session

    def _end_bucket(self, session: ModelUpdate) -> None:
        self.report.held_bytes += self._way.after_bucket()
        session.settle()

    def _fill_report(self, session: ModelUpdate) -> None:
        self.report.tensors, self.report.nbytes = session.tensors, session.nbytes
        self.report.held_bytes += session.held_bytes
        self.report.partial = self._way.partial_layers()
        self.report.unused = session.unused()
        loaded = session.loaded()
        if loaded is not None:
            self.report.missing = self._expected - loaded

    def _note_what_is_expected(self, tied: set[str]) -> None:
        if not isinstance(self._model, torch.nn.Module):
            return
        names = {name.replace(".base_layer.", ".") for name, _ in self._model.named_parameters()}
        names -= tied
        quantised = getattr(self._model_config, "quantization", None) is not None
        exempt = _may_be_missing(self._model, quantised)
        self._expected = names - exempt if quantised else names
        self._required = set() if quantised else names - exempt

    def _refuse_incomplete(self, missing: set[str]) -> None:
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} parameters without which this model would "
                f"not start: {sorted(missing)[:_SHOWN_NAMES]}"
            )


def _tied(model: Any) -> set[str]:
    """The names of parameters that are another one under a second name."""
    if not isinstance(model, torch.nn.Module):
        return set()
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in model.named_parameters()}


def _may_be_missing(model: torch.nn.Module, quantised: bool) -> set[str]:
    """The parameters that vLLM's own loader does without, at start-up."""
    try:
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    except ImportError:  # another engine, which has not said
        return {name for name, _ in model.named_parameters()}
    exempt: set[str] = set()
    track = getattr(DefaultModelLoader, "track_weights_loading", None)
    if track is not None:
        options = {"quantized": True} if "quantized" in inspect.signature(track).parameters else {}
        with contextlib.suppress(ValueError):  # of what is missing; it notes what may be
            track(None, model, exempt, **(options if quantised else {}))
    return exempt


class EngineReload:
    """One update of an inference worker: its model, and its drafter's where it has one.

    A ``worker.BucketLoader``.
    """

    def __init__(self, worker: Any, habits: dict[str, LoaderHabits]) -> None:
        """
        Args:
            worker: has ``device`` and ``model_runner``, as vLLM's workers.
            habits: kept by the worker, from update to update.
        """
        runner = worker.model_runner
        self._runner = runner
        self._config = getattr(worker, "vllm_config", None)
        self._habits = habits
        self._models: dict[str, ModelReload] = {}
        for role, model, model_config in _models_of(runner, self._config):
            if role not in habits or habits[role].model is not model:
                habits[role] = LoaderHabits(model)
            self._models[role] = ModelReload(habits[role], model_config, worker.device)

    def load(self, weights: NamedTensors, delivery: ReceivedBucket | None = None) -> None:
        """Give a bucket to every model; ``weights`` is emptied. Nothing refers to its memory then.

        Raises:
            RuntimeError: a loader keeps references; from the next update on it gets copies.
        """
        if not weights:
            return
        storage = weights[0][1].untyped_storage()
        before = _references(storage) - len(weights)
        with self._as_engine():
            for model in self._models.values():
                model.load(weights, delivery)
        weights.clear()
        if _references(storage) > before:
            gc.collect()
        if _references(storage) > before:
            for habits in self._habits.values():
                habits.learned.keeps_tensors = True
            raise RuntimeError(KEEPS_TENSORS)

    def load_bucket(self, weights: NamedTensors, message: bytes, buffer: torch.Tensor) -> None:
        """Load a bucket, and remember its message."""
        self.load(weights, ReceivedBucket(message, buffer))

    def knows(self, message: bytes) -> bool:
        with self._as_engine():
            return all(model.knows(message) for model in self._models.values())

    def replay(self, message: bytes, buffer: torch.Tensor) -> None:
        """Load a bucket whose message is known."""
        with self._as_engine():
            for model in self._models.values():
                model.replay(ReceivedBucket(message, buffer))

    def finish(self) -> None:
        """Have the engine process what was loaded, and drop what it derived from old weights."""
        with self._as_engine():
            for model in self._models.values():
                model.finish()
        for cache in ("reset_lora_state", "reset_encoder_cache", "reset_mm_cache"):
            getattr(self._runner, cache, _nothing)()

    def close(self) -> None:
        """Clean up after a failed update; nothing after a finished one."""
        with self._as_engine():
            for model in self._models.values():
                model.close()

    abandon = close

    def summary(self) -> dict[str, Any]:
        """By role, what each model took."""
        return {role: model.report.summary() for role, model in self._models.items()}

    @contextlib.contextmanager
    def _as_engine(self) -> Iterator[None]:
        """The surroundings in which the engine loaded the model at start-up."""
        default = torch.get_default_dtype()
        dtype = getattr(getattr(self._runner, "model_config", None), "dtype", None)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            dtype = default  # other engines name it otherwise
        torch.set_default_dtype(dtype)  # vLLM's own reload forgets it; int8 on CPUs needs it
        try:
            with _current(self._config):
                yield
        finally:
            torch.set_default_dtype(default)


def _current(vllm_config: Any) -> AbstractContextManager[Any]:
    if vllm_config is None:
        return nullcontext()
    from vllm.config import set_current_vllm_config

    return set_current_vllm_config(vllm_config)


def _nothing() -> None:
    """For engines that lack a method."""


def _models_of(runner: Any, config: Any) -> Iterator[tuple[str, Any, Any]]:
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
    while model is not None and callable(getattr(type(model), "unwrap", None)):
        if isinstance(model, torch.nn.Module):
            break
        model = model.unwrap()
    return model


def _references(storage: torch.UntypedStorage) -> int:
    """How many tensors, about, share a storage."""
    return int(torch._C._storage_Use_Count(storage._cdata))
