"""Loaders that write into parameters themselves, where others call their ``weight_loader``.

Under layerwise reload a parameter has no memory while its layer waits for weights: it is on the
meta device. vLLM sees calls of ``weight_loader`` alone, so what such a loader writes would be lost,
and the old weights come back. Here each write is done again in the layer's memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _pop_mode,
    _push_mode,
)
from torch.utils._pytree import tree_map_only

from checkpoint_engine.loading.replay.geometry import View, whole_storage
from checkpoint_engine.loading.replay.memory import Slot, SlotTensors, key_of
from checkpoint_engine.loading.replay.operations import COPY
from checkpoint_engine.loading.replay.recorder import Recorder

Copied = tuple[int | None, View]
"""The storage, and the elements of it."""


class DirectWrites(TorchDispatchMode):
    """Around one call of a loader, in its thread."""

    def __init__(
        self,
        tensors: SlotTensors,
        memory_of: Callable[[Slot], torch.Tensor],
        written: defaultdict[str, set[tuple[Slot, View]]],
        recorder: Recorder | None,
    ) -> None:
        """
        Args:
            tensors: of the layers that wait for weights.
            memory_of: makes a layer's memory, if it has none yet.
            written: what the loader writes of each layer is added to it.
            recorder: of an update that learns; need not see what is done here.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory_of = memory_of
        self._all_written = written
        self._recorder = recorder
        with self.unrecorded():
            waiting = [(s, one) for s, one in tensors if one.is_meta or s.module in written]
            self._kept = [tensor for _, tensor in waiting]  # keys are used again
            self._slots = {key_of(tensor): slot for slot, tensor in waiting}
        self._is_aside = False
        self._copied: list[Copied] | None = None  # where a loader's copies are counted

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in ``recorder``

    def needs(self, target: torch.Tensor) -> bool:
        """Whether a write into this tensor has to be done again."""
        return not self._is_aside and key_of(target) in self._slots

    def note_copy(self, target: torch.Tensor) -> None:
        if self._copied is not None:
            self._copied.append((key_of(target), View.of(target)))

    def count(self, load: Callable[[], Any]) -> tuple[list[Copied], Any]:
        """Call the loader of one parameter. Returns what it copied into, and what it returns."""
        before, self._is_aside, self._copied = (self._is_aside, self._copied), True, []
        try:
            result = load()
            return self._copied, result
        finally:
            self._is_aside, self._copied = before

    def aside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, what it writes being none of the loader's own writes."""

        def call(*args: Any) -> Any:
            before, self._is_aside = self._is_aside, True
            # A recorder counts on this mode. Without one, operations are quicker without it, too.
            is_last = self._recorder is None and _last_mode() is self
            if is_last:
                _pop_mode()
            try:
                return function(*args)
            finally:
                self._is_aside = before
                if is_last:
                    _push_mode(self)

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is COPY:
            self.note_copy(args[0])
        if not self._is_aside and func._schema.is_mutable:
            with self.unrecorded(), _disable_current_modes():
                self._do_again(func, args, kwargs or {})
        return result

    def _do_again(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        here = {}
        for tensor in _written(func, args, kwargs):
            if slot := self._slots.get(key_of(tensor)):
                self._all_written[slot.module].add((slot, View.of(tensor)))
                if tensor.is_meta:
                    here[id(tensor)] = self._in_memory(slot, View.of(tensor))
        if not here:
            return

        def replaced(tensor: torch.Tensor) -> torch.Tensor:
            return here.get(id(tensor), tensor)

        args, kwargs = tree_map_only(torch.Tensor, replaced, (args, kwargs))
        func(*args, **kwargs)  # raises where it reads a parameter that has no memory, either

    def _in_memory(self, slot: Slot, view: View) -> torch.Tensor:
        return view.in_storage(whole_storage(self._memory_of(slot), view.dtype))

    def unrecorded(self) -> AbstractContextManager[None]:
        """Around looks at tensors that are not the loader's."""
        return nullcontext() if self._recorder is None else self._recorder.paused()


def _last_mode() -> Any:
    count = torch._C._len_torch_dispatch_stack()
    return torch._C._get_dispatch_stack_at(count - 1) if count else None


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors that an operation changes."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            for one in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(one, torch.Tensor):
                    yield one
