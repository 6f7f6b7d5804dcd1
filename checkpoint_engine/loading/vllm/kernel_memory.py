"""What an engine computes with, lent to layers that are loaded.

vLLM's layerwise reload loads a layer into memory of its own, processes it, and copies it into what
the engine computes with. Where the latter has the form of the checkpoint, the layer is loaded and
processed right there: nothing is held a second time, whatever the processing does.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakSet

import torch

from checkpoint_engine.loading.replay.adapter import every_tensor
from checkpoint_engine.loading.replay.geometry import View
from checkpoint_engine.loading.replay.memory import is_in_place, key_of
from checkpoint_engine.loading.vllm.captured import Captured, has_graphs

_loaded_whole: WeakSet[torch.nn.Module] = WeakSet()
"""Layers that some update loaded whole. In any other, as one with padding, what is not loaded would
be what processing has made of the weights before: it is zeroed."""


class KernelMemory:
    """Of one model.

    Attributes:
        lent: the layers all of whose tensors are the engine's own, in this update; their elements.
    """

    def __init__(
        self,
        vllm: Any,
        modules: Mapping[str, torch.nn.Module],
        infos: Mapping[torch.nn.Module, Any],
        device: torch.device,
        model_config: Any,
        shared: Set[int],
    ) -> None:
        """
        Args:
            vllm: the module that layerwise reload is in. If it does not copy as it does today,
                nothing is lent.
            infos: what it knows of each layer.
            model_config: vLLM's, of the model.
            shared: as of ``storages_of_several``; not lent.
        """
        self.lent: dict[torch.nn.Module, int] = {}
        self._vllm = vllm
        self._modules = modules
        self._infos = infos
        self._device_type = device.type
        self._make = vllm.materialize_layer
        self._copy_and_restore = getattr(vllm, "_copy_and_restore_kernel_tensors", None)
        self._shared = shared
        self._captured = Captured(modules if has_graphs(device, model_config) else {})
        self._unshared: set[int | None] = set()
        self._of_parameters: set[int | None] = set()
        self._in_use: dict[torch.nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def look(self) -> None:
        """Nothing of this update has been done to the model.

        Raises:
            RuntimeError: an update before has left CUDA graphs with what is not right any more.
        """
        self._captured.look()

    def begin(self) -> None:
        """The layers wait for new weights."""
        self.lent.clear()
        if self._copy_and_restore is None:
            return
        waiting = [info for info in self._infos.values() if info.kernel_tensors is not None]
        parameters = (one for info in waiting for one in info.kernel_tensors[0].values())
        self._of_parameters = {key_of(one) for one in parameters} - {None}
        kernel = (one for info in waiting for one in _kernel_of(info).values())
        others = (one for _, one in every_tensor(self._modules) if not one.is_meta)
        # Of tied weights, one could be loaded over the other after that was processed.
        counts = Counter(key_of(one) for one in (*kernel, *others))
        once = {key for key, count in counts.items() if count == 1}
        self._unshared = once - self._shared - {None}

    def materialize(self, layer: torch.nn.Module, info: Any) -> None:
        """As vLLM's function, which makes what is lent here.

        Parameters are lent. Buffers are made anew, as the engine has them: most are in no
        checkpoint, and vLLM would take what happens to be in their memory.
        """
        kernel = {} if info.kernel_tensors is None else _kernel_of(info)
        lacking, wanted, served = self._served(layer, kernel)
        for name, there in served.items():
            tensor = there.data
            tensor.__class__ = lacking[name].__class__
            tensor.__dict__ = lacking[name].__dict__.copy()
            if layer not in _loaded_whole:
                there.data.zero_()
            setattr(layer, name, tensor)
        if wanted and len(served) == len(wanted):
            self.lent[layer] = self._numel_of(layer)
        self._make(layer, info)
        for name in (lacking.keys() - wanted) & kernel.keys():
            made, held = getattr(layer, name), kernel[name]
            if (held.dtype, held.shape) == (made.dtype, made.shape) and not held.is_meta:
                made.data.copy_(held)

    def put_back(self) -> None:
        """All layers have been processed: attention is the last. Raises ``RuntimeError`` if CUDA
        graphs would go on with what is not right any more."""
        self._captured.put_back()

    def abandon(self) -> None:
        """Put memory back that a layer lost whose processing failed; nothing of it is right."""
        self._captured.abandon()
        for pairs in self._in_use.values():
            for tensor, memory in pairs:
                tensor.data = memory
        self._in_use.clear()

    def _numel_of(self, layer: torch.nn.Module) -> int:
        """Of all that may be loaded of a layer."""
        skipped = _names_left_alone(self._vllm) | layer._non_persistent_buffers_set
        tensors = self._vllm.get_layer_tensors(layer)
        return sum(one.numel() for name, one in tensors.items() if name not in skipped)

    def _materialize_to_process(self, layer: torch.nn.Module, info: Any) -> None:
        """As ``materialize``, where vLLM goes on to process the layer.

        From 0.28 on it leaves a layer the bias that the engine computes with, and processing may
        give that other memory, which CUDA graphs know nothing of.
        """
        self.materialize(layer, info)
        tensors = self._vllm.get_layer_tensors(layer)
        kernel = {} if info.kernel_tensors is None else _kernel_of(info)
        in_use = [one for name, one in kernel.items() if tensors.get(name) is one]
        self._in_use[layer] = [(one, one.data) for one in in_use]

    def lends(self, layer: torch.nn.Module, info: Any) -> bool:
        """Whether all parameters of a layer are the engine's own, or are going to be."""
        if layer in self.lent or info.kernel_tensors is None:
            return layer in self.lent
        _, wanted, served = self._served(layer, _kernel_of(info))
        return bool(wanted) and len(served) == len(wanted)

    def _served(
        self, layer: torch.nn.Module, kernel: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], Set[str], dict[str, torch.Tensor]]:
        """The tensors of a layer that have no memory, which of them are parameters, and the memory
        that there is for those."""
        tensors: dict[str, torch.Tensor] = self._vllm.get_layer_tensors(layer)
        lacking = {name: one for name, one in tensors.items() if one.is_meta}
        wanted = lacking.keys() - layer._buffers.keys()
        served = {n: kernel[n] for n in wanted if self._serves(kernel.get(n), lacking[n])}
        return lacking, wanted, served

    def lending(self) -> AbstractContextManager[None]:
        """Around whatever may have vLLM make layers, or process them."""
        if self._copy_and_restore is None:
            return nullcontext()
        return replacing(
            self._vllm,
            materialize_layer=self._materialize_to_process,
            _copy_and_restore_kernel_tensors=self._restore,
        )

    def _serves(self, kernel: torch.Tensor | None, tensor: torch.Tensor) -> bool:
        """Whether what the engine computes with has the form of the checkpoint's."""
        return (
            kernel is not None
            and key_of(kernel) in self._unshared
            and key_of(tensor) is not None
            and kernel.device.type == self._device_type
            and View.of(kernel) == View.of(tensor)
            and View.of(kernel).span[1] <= kernel.untyped_storage().nbytes()
        )

    def _restore(self, layer: torch.nn.Module, info: Any) -> None:
        """As vLLM's function, which copies one tensor after the other: what processing left in
        another one's place has to be out of it before."""
        if layer in self.lent and info.load_numel >= self.lent[layer]:
            _loaded_whole.add(layer)
        kernel = _kernel_of(info)
        for tensor, memory in self._in_use.pop(layer, ()):
            if not is_in_place(tensor, memory):
                tensor.data = memory.copy_(tensor.data)
        for name in layer._buffers.keys() & kernel.keys():
            if key_of(kernel[name]) in self._of_parameters:
                # A view: copied by itself, it would bring the parameter's old weights back.
                layer._buffers[name] = kernel[name]
        self._move_apart(layer, kernel)
        # Before what was processed is copied there: helpers may hold what is in that memory now.
        self._captured.put_back([layer])
        self._move_apart(layer, kernel)
        assert self._copy_and_restore is not None
        self._copy_and_restore(layer, info)

    def _move_apart(self, layer: torch.nn.Module, kernel: Mapping[str, torch.Tensor]) -> None:
        """No tensor of a layer stays in the memory of another one, into which that is copied."""
        keys = {key_of(one) for one in kernel.values()} - {None}
        for name, tensor in self._vllm.get_layer_tensors(layer).items():
            if key_of(tensor) in keys and not is_in_place(tensor, kernel.get(name)):
                tensor.data = tensor.data.clone()


def storages_of_several(models: Sequence[Any]) -> set[int]:
    """The memory that more than one of an engine's models computes with, as a drafter's head: each
    of them loads and processes it."""
    counts: Counter[int] = Counter()
    for model in models if len(models) > 1 else ():
        modules = dict(model.named_modules())
        counts.update({key for _, one in every_tensor(modules) if (key := key_of(one)) is not None})
    return {key for key, count in counts.items() if count > 1}


@contextlib.contextmanager
def replacing(vllm: Any, **functions: Callable[..., Any]) -> Iterator[None]:
    """Around calls of vLLM's own functions of those names, in the module that they are in."""
    kept = {name: getattr(vllm, name) for name in functions}
    vars(vllm).update(functions)
    try:
        yield
    finally:
        vars(vllm).update(kept)


def _names_left_alone(vllm: Any) -> Set[str]:
    """The tensors that vLLM neither restores nor counts."""
    found: Set[str] = getattr(vllm, "SKIP_LOAD_TENSORS", getattr(vllm, "SKIP_TENSORS", frozenset()))
    return found


def _kernel_of(info: Any) -> dict[str, torch.Tensor]:
    """What the engine computes with, of a layer that waits for weights."""
    parameters, buffers = info.kernel_tensors
    return {**parameters, **buffers}
