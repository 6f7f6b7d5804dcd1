"""Whether what an engine does with a layer, once it is loaded, leaves every byte where it was.

Then there is no need to make such a layer anew and to copy it into the memory that the engine
computes with: new weights can be written straight there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checkpoint_engine.loading.calls import leaves_the_thread
from checkpoint_engine.loading.replay import operations
from checkpoint_engine.loading.replay.digests import digests
from checkpoint_engine.loading.replay.geometry import View
from checkpoint_engine.loading.replay.memory import Place, key_of

Tensors = Mapping[str, torch.Tensor]

_SET = {getattr(torch.Tensor, name).__set__ for name in ("data", "requires_grad")}
_MADE = {torch.Tensor.requires_grad_, torch.Tensor._make_subclass}
_HARMLESS = operations.FUNCTIONS | _SET | _MADE
"""What may be called with a loaded tensor: if it does more than to make a view, the dispatcher sees
it."""
_KNOWN = sys.stdlib_module_names | {"torch"}


class Processing:
    """Enter it around the engine's processing of one layer."""

    def __init__(self, tensors: Tensors, has_step: bool) -> None:
        """
        Args:
            tensors: the layer's, loaded.
            has_step: whether the engine has a step of the layer's own. Only then are its bytes
                compared as well: somebody may write where nobody sees it.
        """
        self._places = {name: Place.of(tensor) for name, tensor in tensors.items()}
        self._made: set[int | None] = set()
        self._storages = [StorageWeakRef(one.untyped_storage()) for one in tensors.values()]
        self._has_step = has_step
        self._sums = [self._sum_up(tensors)]
        self._is_touched = self._is_over = False
        self._locks: set[int] = set()
        self._modes = ExitStack()

    def __enter__(self) -> Processing:
        self._modes.enter_context(_Operations(self))
        self._modes.enter_context(_Functions(self))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over = True
        self._modes.close()

    def leaves(self, tensors: Tensors, kernel: Tensors) -> bool:
        """Processing is over. Whether these, the layer's tensors, are what was loaded, and the
        engine's own in ``kernel`` have the same form."""
        self._is_over = True
        self._modes.close()
        if self._is_touched or {n: Place.of(one) for n, one in tensors.items()} != self._places:
            return False
        self._sums.append(self._sum_up(tensors))
        return has_form_of(kernel, tensors)

    def _sum_up(self, tensors: Tensors) -> torch.Tensor:
        return digests([one.data for one in tensors.values()] if self._has_step else [])

    @property
    def changed(self) -> torch.Tensor:
        """Whether any byte is another one all the same, where it was ``left``; on the device, which
        would have to be waited for."""
        before, after = self._sums
        return (before != after).any()

    @property
    def is_forgotten(self) -> bool:
        """Whether nobody has the memory any more that the layer was loaded into. Asked once the
        loader's calls are over, which hold it."""
        return all(storage.expired() for storage in self._storages)

    def notice(self, function: Any, owner: Any) -> None:
        """A function written in C is called. Those of torch are seen by the modes."""
        if self._is_over:
            return
        if isinstance(owner, torch.Tensor):
            is_known = torch._C._is_torch_function_mode_enabled()
        else:
            module = getattr(function, "__module__", None) or type(owner).__module__
            is_known = str(module).partition(".")[0] in _KNOWN
        if not is_known or leaves_the_thread(function, owner, self._locks):
            self._is_touched = True

    def look(self, arguments: Any) -> None:
        """Something is called that does more than to make a view. It may be called with what was
        made meanwhile: not with this layer's weights, nor with another's, which this one may be
        derived from."""
        for one in tree_leaves(arguments):
            if isinstance(one, torch.Tensor) and key_of(one) not in self._made:
                self._is_touched = True

    def note(self, result: Any) -> None:
        """What an operation has made."""
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self._made.add(key_of(one))


def has_form_of(kernel: Tensors, tensors: Tensors) -> bool:
    """Whether the engine computes with tensors of these names and forms."""
    return kernel.keys() == tensors.keys() and all(
        _form(kernel[name]) == _form(tensor) for name, tensor in tensors.items()
    )


def _form(tensor: torch.Tensor) -> View:
    return View.of(tensor)._replace(offset=0)


class _Operations(TorchDispatchMode):
    def __init__(self, processing: Processing) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._processing = processing

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in ``recorder``

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in operations.VIEWS or _copies_onto_itself(func, args):
            return func(*args, **(kwargs or {}))
        self._processing.look((args, kwargs))
        result = func(*args, **(kwargs or {}))
        self._processing.note(result)
        return result


def _copies_onto_itself(func: Any, args: Any) -> bool:
    """As vLLM does with experts that were loaded again."""
    return func is operations.COPY and Place.of(args[0]) == Place.of(args[1])


class _Functions(TorchFunctionMode):
    def __init__(self, processing: Processing) -> None:
        super().__init__()
        self._processing = processing

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not operations.is_seen_by_dispatcher(func) and func not in _HARMLESS:
            self._processing.look((args, kwargs))
        return func(*args, **(kwargs or {}))
