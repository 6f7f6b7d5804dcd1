"""vLLM's layerwise reload, as loading and replay see it."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from checkpoint_engine.loading.adapters import LoadOver
from checkpoint_engine.loading.replay.adapter import ModelAdapter, nothing
from checkpoint_engine.loading.replay.geometry import View
from checkpoint_engine.loading.replay.memory import Slot
from checkpoint_engine.loading.replay.recorder import Recorder
from checkpoint_engine.loading.replay.recording import NamedTensors
from checkpoint_engine.loading.views import parted_views
from checkpoint_engine.loading.vllm.counts import Counts
from checkpoint_engine.loading.vllm.direct_writes import DirectWrites
from checkpoint_engine.loading.vllm.expert_names import ExpertNames
from checkpoint_engine.loading.vllm.kernel_memory import KernelMemory, replacing
from checkpoint_engine.loading.vllm.lent_loaders import LentLoaders
from checkpoint_engine.loading.vllm.on_cpu import CpuRepairs

_ATTENTION_SCALES = {"_q_scale", "_k_scale", "_v_scale", "_prob_scale"}
_NO_UPDATE = "vLLM would lose that in an update; start the engine with the new weights"
_LAYERWISE = "vllm.model_executor.model_loader.reload.layerwise"


def adapter_for(
    model: Any, model_config: Any, device: torch.device, shared: Set[int] = frozenset()
) -> LoadOver:
    """Layerwise reload, if this vLLM has it and recorded how ``model`` was made.

    Args:
        shared: as of ``storages_of_several``.
    """
    try:
        vllm = importlib.import_module(_LAYERWISE)
    except ImportError:
        return LoadOver(model, model_config, device)
    layers = model.modules() if isinstance(model, torch.nn.Module) else ()
    recorded = (vllm.get_layerwise_info(layer).restore_metadata for layer in layers)
    if any(parameters for parameters, _ in recorded):
        return Layerwise(vllm, model, model_config, device, shared)
    return LoadOver(model, model_config, device)


class Layerwise(LoadOver):
    """vLLM's layerwise reload.

    vLLM keeps what it is given until a layer is complete. Here that is memory which the next bucket
    but one overwrites. So a layer that is incomplete at the end of a bucket gets its parameters
    now, and what has arrived is loaded into them: no copy of the tensors, and only of the shard
    that this worker keeps. Where a release cannot do that, the tensors are copied.

    Its parameters are those that the engine computes with where these serve: ``kernel_memory``.
    """

    is_persistent = False

    def __init__(
        self,
        vllm: Any,
        model: torch.nn.Module,
        model_config: Any,
        device: torch.device,
        shared: Set[int],
    ) -> None:
        """``vllm``: the module that layerwise reload is in."""
        super().__init__(model, model_config, device)
        self.keeps_others = True
        self._vllm = vllm
        self._names = {layer: name for name, layer in self.modules.items()}
        self._infos = {layer: vllm.get_layerwise_info(layer) for layer in self._names}
        self._held: dict[torch.nn.Module, int] = {}
        self._loads_early = _keeps_what_is_there(vllm)
        self._repairs = CpuRepairs(self._names if device.type == "cpu" else ())
        self._recorder: Recorder | None = None
        self._opened: set[str] = set()
        self._made: dict[Slot, torch.Tensor] = {}
        self._moved: list[torch.nn.Module] = []
        self._counts = Counts()
        self._direct: defaultdict[str, set[tuple[Slot, View]]] = defaultdict(set)
        self._kernel = KernelMemory(vllm, self.modules, self._infos, device, model_config, shared)
        self._lent = LentLoaders(vllm, {}, set())
        self._experts = ExpertNames()

    def check(self) -> None:
        restored = {
            self._names[layer]: info.restore_metadata for layer, info in self._infos.items()
        }
        exempt = getattr(self._vllm, "SKIP_LOAD_TENSORS", ())
        if parted := next(parted_views(self.modules, restored, exempt), None):
            view, parameter = (slot.qualified for slot in parted)
            raise RuntimeError(
                f"this engine computes with {view}, which was a view of {parameter} until the "
                f"engine repacked that at its start: {_NO_UPDATE}"
            )

    def surroundings(self) -> AbstractContextManager[Any]:
        return nullcontext() if _knows_the_device(self._vllm) else self._device

    def begin(self) -> None:
        self.abandon()  # what a failed update may have left
        self._kernel.look()
        self._vllm.initialize_layerwise_reload(self._model)
        for last in (self._opened, self._made, self._moved, self._direct):
            last.clear()
        self._kernel.begin()
        lent = {one for one, info in self._infos.items() if self._kernel.lends(one, info)}
        lent -= {one for one in lent if _is_deferred(self._vllm, one)}
        self._lent = LentLoaders(self._vllm, self._infos, lent)
        self._repairs.begin()

    def after_bucket(self) -> int:
        nbytes = 0
        for layer, info in self._infos.items():
            arrived = info.loaded_weights[self._held.get(layer, 0) :]
            if not arrived:
                continue
            size = sum(t.nbytes for _, call in arrived for t in _tensors(call).values())
            if self._loads_early and not self._must_wait(layer, info):
                self._load_now(layer, info)
                nbytes += 0 if layer in self._kernel.lent else size
                continue
            nbytes += size
            for _, call in arrived:
                call.arguments.update({name: t.clone() for name, t in _tensors(call).items()})
            self._held[layer] = len(info.loaded_weights)
        return nbytes

    def cannot(self) -> str:
        return "" if self._loads_early else "this vLLM makes layers anew when they are complete"

    names = ModelAdapter.names

    def tensors(self) -> Iterator[tuple[Slot, torch.Tensor]]:
        """Of the layers that wait for weights."""
        for layer, info in self._infos.items():
            if info.load_numel_total is not None:
                yield from self._tensors_of(layer)

    def moved(self) -> Iterator[tuple[Slot, torch.Tensor]]:
        """Of the layers that have got memory, and wait for more weights."""
        moved, self._moved = self._moved, []
        for layer in moved:
            if self._infos[layer].load_numel_total is not None:
                yield from self._tensors_of(layer)

    def _tensors_of(self, layer: torch.nn.Module) -> Iterator[tuple[Slot, torch.Tensor]]:
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
        """What comes once a layer is whole is vLLM's own."""
        process = self._vllm._layerwise_process

        def process_unseen(layer: torch.nn.Module, info: Any) -> None:
            with recorder.paused():
                process(layer, info)

        self._recorder = recorder
        try:
            with replacing(self._vllm, _layerwise_process=process_unseen):
                yield
        finally:
            self._recorder = None

    def load_weights(
        self, weights: NamedTensors, around: AbstractContextManager[Any] = nothing
    ) -> Any:
        """The engine's loader, some of whose writes vLLM does not see."""
        quick = replacing(self._vllm, **_quick_sizes(self._vllm))
        with quick, self._experts.around_loader(), self._kernel.lending():
            if self._loads_early:
                return self._load_through(weights, around)
            with around:
                return self._model.load_weights(weights)

    def _load_through(self, weights: NamedTensors, around: AbstractContextManager[Any]) -> Any:
        skipped = getattr(self._vllm, "SKIP_LOAD_TENSORS", ())  # neither restored nor counted
        waiting = [(slot, one) for slot, one in self.tensors() if slot.name not in skipped]
        direct = DirectWrites(waiting, self._memory_for, self._direct, self._recorder)
        count = self._vllm.get_numel_loaded
        theirs = {
            "get_numel_loaded": self._counts.of_waiting(direct, self._recorder, count),
            "_layerwise_process": direct.aside(self._vllm._layerwise_process),
        }
        beside = nullcontext() if self._recorder is None else self._recorder.beside(direct)
        lent = self._lent.in_place_of_vllms(
            partial(self._counts.of_lent, direct, self._recorder), direct.aside(self._load_first)
        )
        with lent, replacing(self._vllm, **theirs), around, direct, beside:
            loaded = self._model.load_weights(weights)
        before = {slot for slot, tensor in waiting if tensor.is_meta}
        for slot, tensor in self.tensors():
            is_ours = slot.module in self._opened or self._made.get(slot) is tensor
            if slot in before and not tensor.is_meta and not is_ours:
                raise RuntimeError(f"the model's loader replaces {slot.qualified}: {_NO_UPDATE}")
        return loaded

    def _memory_for(self, slot: Slot) -> torch.Tensor:
        """Of a layer that a loader writes into by itself."""
        layer = self.modules[slot.module]
        if self._infos[layer].load_numel_total is None or _is_deferred(self._vllm, layer):
            raise RuntimeError(f"the model's loader writes {slot.qualified} itself: {_NO_UPDATE}")
        self.open(slot.module)
        return self.memory(slot)

    def checking(self, check: Callable[[str], None]) -> AbstractContextManager[None]:
        process = self._vllm._layerwise_process

        def check_and_process(layer: torch.nn.Module, info: Any) -> None:
            if not self._must_wait(layer, info):
                self._load_now(layer, info)
                check(self._names[layer])
            process(layer, info)

        return replacing(self._vllm, _layerwise_process=check_and_process)

    def open(self, module: str) -> None:
        self._opened.add(module)
        self._materialize(self.modules[module])

    def memory(self, slot: Slot) -> torch.Tensor:
        memory = getattr(self.modules[slot.module], slot.name)
        return memory.data  # vLLM's own kinds of parameters are slow to look at

    def delivered(self, module: str, numel: int) -> bool:
        """What vLLM's wrapped loaders do once a tensor is in."""
        layer = self.modules[module]
        info = self._infos[layer]
        info.load_numel_total = self._vllm.get_layer_size(layer)
        info.load_numel += numel
        if info.load_numel < info.load_numel_total:
            return layer in self._kernel.lent
        with self._kernel.lending():
            self._vllm._layerwise_process(layer, info)
        return True

    def missing(self, expected: set[str], loaded: set[str] | None) -> set[str] | None:
        if loaded is None:
            waiting = (
                _parameters_of(self._names[layer], layer)
                for layer, info in self._infos.items()
                if info.load_numel == 0 < (info.load_numel_total or 0)
                and self._names[layer] not in self._opened
            )
            return expected.intersection(set[str]().union(*waiting))
        # Up to release 0.31 the loader of experts names what it has loaded at once: nothing, while
        # vLLM waits until the layer is whole. What was processed was whole, and is not counted any
        # more.
        whole = (
            _parameters_of(self._names[layer], layer)
            for layer, info in self._infos.items()
            if info.load_numel_total is None
        )
        return expected.difference(loaded, *(some for some in whole if some.isdisjoint(loaded)))

    def partial_layers(self) -> set[str]:
        return {
            self._names[layer]
            for layer, info in self._infos.items()
            if 0 < info.load_numel < (info.load_numel_total or 0)
            and not _is_deferred(self._vllm, layer)
        }

    def finish(self) -> None:
        for module, written in self._direct.items():
            _check_written(module, self._infos[self.modules[module]], written)
        for module in self._opened:  # what a loader wrote itself was not counted
            info = self._infos[self.modules[module]]
            if info.load_numel_total is not None:
                info.load_numel = max(info.load_numel, 1)
        if hasattr(self._vllm, "_reload_attention_scales"):  # releases before cannot reload any
            _reset_scales(self._vllm, self._infos)
        with self._kernel.lending():
            self._vllm.finalize_layerwise_reload(self._model, self._model_config)
        self._kernel.put_back()
        self._lent.clear()
        self._counts.clear()
        self._repairs.pack_tied()
        self._repairs.end()

    def keep(self, modules: Iterable[str]) -> None:
        for module in modules:
            self._put_back(self.modules[module])

    def is_done(self, module: str) -> bool:
        return self._infos[self.modules[module]].load_numel_total is None

    def abandon(self) -> None:
        """Put the memory that the engine computes with back in its place."""
        self._lent.clear()
        self._counts.clear()
        self._repairs.end()
        self._kernel.abandon()
        for layer in self._infos:
            self._put_back(layer)
        if hasattr(self._model, "_original_do_torchao_reload"):
            self._model._do_torchao_reload = self._model._original_do_torchao_reload

    def _put_back(self, layer: torch.nn.Module) -> None:
        info = self._infos[layer]
        if info.load_numel_total is None:  # not waiting for weights
            return
        if info.kernel_tensors is not None:
            self._vllm._place_kernel_tensors(layer, info)
        info.reset()

    def _must_wait(self, layer: torch.nn.Module, info: Any) -> bool:
        """Attention is loaded last of all; loaded buffers are recognised by what is kept."""
        buffers = {name for name, _ in info.loaded_weights} & layer._buffers.keys()
        return bool(buffers) or _is_deferred(self._vllm, layer)

    def _load_first(self, layer: torch.nn.Module, info: Any) -> None:
        """Of a layer that is lent its memory, before the bucket is over."""
        if self._must_wait(layer, info):
            return
        recorder = self._recorder
        with nullcontext() if recorder is None else recorder.paused():
            self._load_now(layer, info)
            self._made |= self._tensors_of(layer)
            if recorder is not None:
                recorder.rebind(self.moved())

    def _materialize(self, layer: torch.nn.Module) -> None:
        self._kernel.materialize(layer, self._infos[layer])
        self._moved.append(layer)

    def _load_now(self, layer: torch.nn.Module, info: Any) -> None:
        self._materialize(layer)
        while info.loaded_weights:  # a loader's own thread may add to them
            name, call = info.loaded_weights.pop(0)
            parameter = getattr(layer, name)
            if call.arguments["param"] is not parameter:  # otherwise it is in there already
                call.arguments["param"] = parameter
                self._vllm._get_original_loader(parameter)(*call.args, **call.kwargs)


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


def _quick_sizes(vllm: Any) -> dict[str, Callable[..., int]]:
    """For a warning, vLLM 0.26 sums up with every tensor what waits for its layer to be complete:
    with hundreds of experts in no order, most of its work. Here nothing is summed up twice."""
    size = getattr(vllm, "get_info_size", None)
    known: dict[int, tuple[list[Any], int, int]] = {}

    def size_of(info: Any) -> int:
        waiting = info.loaded_weights
        listed, count, nbytes = known.get(id(info), (waiting, 0, 0))
        if listed is not waiting or count > len(waiting):  # vLLM has begun anew
            count = nbytes = 0
        assert size is not None
        nbytes += int(size(SimpleNamespace(loaded_weights=waiting[count:])))
        known[id(info)] = waiting, len(waiting), nbytes
        return nbytes

    return {} if size is None else {"get_info_size": size_of}


def _parameters_of(name: str, layer: torch.nn.Module) -> set[str]:
    slots = (Slot(name, own) for own in layer._parameters)
    return {slot.qualified.replace(".base_layer.", ".") for slot in slots}


def _check_written(module: str, info: Any, written: set[tuple[Slot, View]]) -> None:
    """What a loader leaves of a layer that it writes itself would be uninitialised memory."""
    numel = info.load_numel + sum(math.prod(view.sizes) for _, view in written)
    if info.load_numel_total is not None and numel < info.load_numel_total:
        raise RuntimeError(f"the model's loader writes a part of {module}: {_NO_UPDATE}")


def _reset_scales(vllm: Any, infos: Mapping[torch.nn.Module, Any]) -> None:
    """Where a checkpoint has no scales for attention, a start sets them to their defaults; vLLM's
    reload leaves what is there, as the random values of a start with dummy weights."""
    for layer, info in infos.items():
        method = getattr(layer, "quant_method", None)
        if info.kernel_tensors is None or not hasattr(method, "create_weights"):
            continue
        if _is_deferred(vllm, layer):
            _, buffers = info.kernel_tensors
            for name in _ATTENTION_SCALES & buffers.keys():
                buffers[name].fill_(1.0)
            info.load_numel = max(info.load_numel, 1)  # they are made anew, and processed


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
