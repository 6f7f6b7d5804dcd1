"""Loaders that write into parameters themselves, where others call their ``weight_loader``.

Under layerwise reload a parameter has no memory while its layer waits for weights: it is on the
meta device. vLLM sees calls of ``weight_loader`` alone, so what such a loader writes would be lost,
and the old weights come back. Here each write is done again in the layer's memory, and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from checkpoint_engine.loading.replay.geometry import View, whole_storage
from checkpoint_engine.loading.replay.memory import Slot, SlotTensors, key_of
from checkpoint_engine.loading.replay.recorder import Recorder


class DirectWrites(TorchDispatchMode):
    """Watches the loader in its thread.

    Attributes:
        recorder: of an update that learns; told how many elements the engine counts.
    """

    def __init__(self, memory_of: Callable[[Slot], torch.Tensor]) -> None:
        """``memory_of``: makes a layer's memory, if it has none yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder: Recorder | None = None
        self._memory_of = memory_of
        self._slots: dict[Any, Slot] = {}
        self._kept: list[torch.Tensor] = []  # a storage's key is another one's once it is gone
        self._seen: set[tuple[Slot, View]] = set()
        self._fresh: Counter[str] = Counter()
        self._is_aside = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in ``recorder``

    def look_at(self, tensors: SlotTensors) -> None:
        """What the loader may write into, as it is now."""
        with self._unrecorded():
            found = list(tensors)
            self._kept = [tensor for _, tensor in found]
            self._slots = {key_of(tensor): slot for slot, tensor in found}

    def aside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, what it writes being none of the loader's own writes."""

        def call(*args: Any) -> Any:
            before, self._is_aside = self._is_aside, True
            try:
                return function(*args)
            finally:
                self._is_aside = before

        return call

    def take(self) -> Counter[str]:
        """The elements that were written since the last call, by module."""
        fresh, self._fresh = self._fresh, Counter()
        return fresh

    def forget(self) -> None:
        """Another update begins."""
        self._seen.clear()
        self._fresh.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def run(*args: Any) -> Any:
            return func(*args, **(kwargs or {}))

        target = args[0] if args else None
        is_write = func._schema.is_mutable and not self._is_aside
        if not (is_write and isinstance(target, torch.Tensor)):
            return run(*args)
        with self._unrecorded():
            slot, numel = self._slots.get(key_of(target)), target.numel()
        if slot is None:
            return run(*args)
        if self.recorder is None:
            result = run(*args)
        else:
            _, result = self.recorder.count(lambda: (numel, run(*args)))
        with self._unrecorded(), _disable_current_modes():
            self._note(slot, target, lambda memory: run(memory, *args[1:]))
        return result

    def _note(self, slot: Slot, target: torch.Tensor, write: Callable[[torch.Tensor], Any]) -> None:
        view = View.of(target)
        if target.is_meta:
            write(view.in_storage(whole_storage(self._memory_of(slot), view.dtype)))
        if (slot, view) not in self._seen:  # what is written twice counts once
            self._seen.add((slot, view))
            self._fresh[slot.module] += target.numel()

    def _unrecorded(self) -> AbstractContextManager[None]:
        return nullcontext() if self.recorder is None else self.recorder.paused()
