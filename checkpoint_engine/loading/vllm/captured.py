"""What CUDA graphs may have captured of a model beside its parameters and buffers.

A layer has helpers: its method of quantisation, kernels, their configurations. What processing
makes for them, as Marlin's workspace, strides of kernels for experts, or scales, is read and
written by graphs where it was when they were captured. Another processing makes it anew, and vLLM
puts back parameters and buffers alone: what the graphs know would be freed, and other tensors be
made there. Here it is filled anew, and put back. vLLM's issues 41670 and 48941 tell of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch

from checkpoint_engine.loading.replay.memory import Place

Path = tuple[Any, ...]

_OF_EVERY_MODULE = vars(torch.nn.Module()).keys()
_DEEPEST = 8
_PLAIN = {type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size}
_NO_HELPERS = ("torch", "vllm.config", "vllm.distributed", "transformers", "numpy", "logging")
"""Packages of whose objects none is made by processing; some lead to all of a program."""

_without: WeakSet[torch.nn.Module] = WeakSet()
"""Layers whose helpers held nothing when they were updated first: no graph can have it, either."""

_kept: WeakKeyDictionary[torch.nn.Module, dict[Path, torch.Tensor]] = WeakKeyDictionary()
"""What helpers do not hold any more, and graphs may use: a workspace that a forward pass made."""


_lost: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()
"""Layers of which graphs have captured what could not be filled anew, and why."""

Put = Callable[[Any], None] | None
"""What puts another thing in the place of one; ``None``: nothing can."""


class _Held(NamedTuple):
    """A tensor that a helper holds."""

    path: Path
    tensor: torch.Tensor
    put: Put


class Captured:
    """Of one model, in one update."""

    def __init__(self, modules: Mapping[str, torch.nn.Module]) -> None:
        self._modules = modules
        self._own = {id(one) for one in modules.values()}
        self._names = {layer: name for name, layer in modules.items()}
        self._before: defaultdict[torch.nn.Module, dict[Path, torch.Tensor]] = defaultdict(dict)

    def look(self) -> None:
        """No layer has been processed yet.

        Raises:
            RuntimeError: graphs have captured what an update before could not fill anew.
        """
        for layer in self._modules.values():
            if layer in _lost:
                raise RuntimeError(_lost[layer])
            if layer not in _without:
                for one in self._held_by(layer):
                    self._before[layer][one.path] = one.tensor
                if layer not in self._before:
                    _without.add(layer)

    def put_back(self, layers: Iterable[torch.nn.Module] | None = None) -> None:
        """They have been processed; default: all of them.

        Raises:
            RuntimeError: graphs have captured what cannot be filled anew.
        """
        for layer in list(self._before) if layers is None else layers:
            before = self._before.get(layer, {})
            now = {one.path: one for one in self._held_by(layer)} if before else {}
            for path, tensor in before.items():
                if path in now:
                    self._fill(layer, tensor, now[path])
                else:
                    _kept.setdefault(layer, {}).setdefault(path, tensor)

    def _fill(self, layer: torch.nn.Module, tensor: torch.Tensor, now: _Held) -> None:
        if Place.of(tensor) == Place.of(now.tensor):
            return
        was, form = _form_of(tensor), _form_of(now.tensor)
        try:
            if now.put is None or was != form:
                raise ValueError(f"it is {form}, and was {was}")
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(now.tensor)
            now.put(tensor)
        except Exception as error:
            path = ".".join(map(str, (self._names[layer], *now.path)))
            _lost[layer] = (
                f"processing made {path} anew, which CUDA graphs may have captured, and it cannot "
                f"be put back: {error}. Start the engine with the new weights, or enforce_eager"
            )
            raise RuntimeError(_lost[layer]) from error

    def _held_by(self, layer: torch.nn.Module) -> Iterator[_Held]:
        """By a layer itself, beside parameters and buffers, and by its helpers, by every path: one
        that leads there today may be gone after processing."""
        own = vars(layer)
        for name, thing in list(own.items()):
            if name not in _OF_EVERY_MODULE:
                yield from self._found((name,), thing, partial(own.__setitem__, name), [])

    def _found(self, path: Path, thing: Any, put: Put, around: list[int]) -> Iterator[_Held]:
        """``around``: what it is a part of."""
        if isinstance(thing, torch.Tensor):
            if _may_be_captured(thing):
                yield _Held(path, thing, put)
            return
        is_known = id(thing) in self._own or id(thing) in around
        if not is_known and type(thing) not in _PLAIN and len(path) <= _DEEPEST:
            around.append(id(thing))
            for key, part, put_part in _parts_of(thing, put):
                yield from self._found((*path, key), part, put_part, around)
            around.pop()


def has_graphs(device: torch.device, model_config: Any) -> bool:
    """Whether an engine may have captured any."""
    return device.type != "cpu" and not getattr(model_config, "enforce_eager", False)


def _parts_of(thing: Any, put: Put) -> Iterator[tuple[Any, Any, Put]]:
    """What a thing is made of: of each part its name, itself, and what replaces it. ``put``: what
    replaces the thing."""
    if isinstance(thing, dict):
        for key, part in list(thing.items()):
            yield key, part, partial(thing.__setitem__, key)
    elif isinstance(thing, list):
        for index, part in enumerate(thing):
            yield index, part, partial(thing.__setitem__, index)
    elif isinstance(thing, tuple):
        replace = None if put is None else partial(_replace_in_tuple, list(thing), type(thing), put)
        for index, part in enumerate(thing):
            yield index, part, replace and partial(replace, index)
    elif isinstance(thing, partial):
        yield "func", thing.func, None
        yield "args", thing.args, None
        yield "keywords", thing.keywords, None
    elif isinstance(thing, MethodType):
        yield "self", thing.__self__, None
    elif isinstance(thing, FunctionType):
        for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
            if (part := _contents_of(cell)) is not None:
                yield name, part, partial(setattr, cell, "cell_contents")
    elif not isinstance(thing, type) and not _is_no_helper(type(thing).__module__):
        own = getattr(thing, "__dict__", {})
        for name, part in list(own.items()):
            yield name, part, partial(own.__setitem__, name)
        for kind in type(thing).__mro__:
            for name in getattr(kind, "__slots__", ()):
                if name not in ("__dict__", "__weakref__") and hasattr(thing, name):
                    yield name, getattr(thing, name), partial(object.__setattr__, thing, name)


def _replace_in_tuple(
    parts: list[Any], kind: type, put: Callable[[Any], None], index: int, part: Any
) -> None:
    """``parts``: what the tuple has by now; several may be replaced, one after the other."""
    parts[index] = part
    put(getattr(kind, "_make", tuple)(parts))


def _contents_of(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _is_no_helper(package: str) -> bool:
    return any(package == one or package.startswith(f"{one}.") for one in _NO_HELPERS)


def _may_be_captured(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type not in ("cpu", "meta")


def _form_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), str(tensor.device)
