"""What CUDA graphs may have captured of a model beside its parameters and buffers.

A layer has helpers: its method of quantisation, kernels, their configurations. What processing
makes for them, as Marlin's workspace, strides of kernels for experts, or scales, is read and
written by graphs where it was when they were captured. Another processing makes it anew, and vLLM
puts back parameters and buffers alone: what the graphs know would be freed, and other tensors be
made there. Here the memory that graphs know is filled anew, and the new tensors get that memory.
vLLM's issues 41670 and 48941 tell of it.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import (
    CellType,
    FunctionType,
    GenericAlias,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any
from weakref import ProxyTypes, WeakKeyDictionary

import torch

from checkpoint_engine.loading.replay.adapter import every_tensor
from checkpoint_engine.loading.replay.geometry import View, whole_storage
from checkpoint_engine.loading.replay.memory import Place, is_in_place, key_of

Path = tuple[str, ...]
"""The attributes, keys and numbers by which a tensor is found from its layer, the shortest way."""

Tensors = dict[Path, torch.Tensor]

_DEEPEST = 10
_OF_EVERY_MODULE = vars(torch.nn.Module()).keys()
_PLAIN = {type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size}
_NO_HELPERS = (type, ModuleType, GenericAlias, *ProxyTypes)
_NO_PACKAGES = (
    "torch",
    "vllm.config",
    "vllm.compilation",
    "vllm.distributed",
    "transformers",
    "numpy",
    "logging",
)
"""Packages of whose objects none is made by processing; some lead to all of a program."""


@dataclass(eq=False)
class _Past:
    """Of a layer, from its first update on.

    Attributes:
        first: what its helpers held then; nothing else can be in graphs.
        kept: the memory of what they do not hold any more: a workspace that a forward pass made,
            or what a failed update has left out.
        lost: why graphs would go on with something else than the weights; empty: they do not.
    """

    first: frozenset[Path]
    kept: Tensors = field(default_factory=dict)
    lost: str = ""


_pasts: WeakKeyDictionary[torch.nn.Module, _Past] = WeakKeyDictionary()


class Captured:
    """Of one model, in one update."""

    def __init__(self, modules: Mapping[str, torch.nn.Module]) -> None:
        self._modules = modules
        self._own = {id(one) for one in modules.values()}
        self._names = {layer: name for name, layer in modules.items()}
        self._objects: dict[torch.nn.Module, Tensors] = {}
        self._held: dict[torch.nn.Module, Tensors] = {}
        self._wanted: dict[torch.nn.Module, dict[Path, tuple[torch.Tensor, Place]]] = {}
        self._theirs: dict[int, torch.Tensor] = {}  # by id, whatever was there before
        self._filled: defaultdict[int | None, list[tuple[View, torch.nn.Module]]]
        self._filled = defaultdict(list)  # by storage, what was filled for which layer
        self._shared: set[int | None] = set()  # storages that several know, beside parameters'
        self._altered: defaultdict[int | None, list[View]] = defaultdict(list)  # of those
        self._given: dict[int, torch.Tensor] = {}  # by id

    def look(self) -> None:
        """No layer has been processed yet.

        Raises:
            RuntimeError: graphs have captured what an update before could not fill anew.
        """
        every = (self._objects, self._held, self._wanted, self._filled, self._given, self._altered)
        for last in every:
            last.clear()
        self._theirs = {id(one): one for _, one in every_tensor(self._modules)}
        for layer in self._modules.values():
            past = _pasts.get(layer)
            if past is not None and past.lost:
                raise RuntimeError(past.lost)
            if past is None or past.first:
                objects = self._held_by(layer, () if past is None else past.first)
                held = {path: _alias_of(one) for path, one in objects.items()}
                past = _pasts.setdefault(layer, _Past(frozenset(held)))
                wanted = {p: one for p, one in (held | past.kept).items() if p in past.first}
                self._objects[layer], self._held[layer] = objects, held
                self._wanted[layer] = {p: (one, Place.of(one)) for p, one in wanted.items()}
                self._theirs |= {id(one): one for one in objects.values()}
        counts = Counter[int | None]()
        for layer, held in self._held.items():
            wanted = {path: one for path, (one, _) in self._wanted[layer].items()}
            for path in held.keys() | wanted:
                counts.update({key_of(some[path]) for some in (held, wanted) if path in some})
        owned = {  # where vLLM copies what was processed, whoever else holds it
            key_of(one)
            for layer in self._modules.values()
            for one in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
        }
        self._shared = {key for key, count in counts.items() if count > 1} - owned

    def put_back(self, layers: Iterable[torch.nn.Module] | None = None) -> None:
        """They have been processed; default: all of them.

        Raises:
            RuntimeError: graphs have captured what cannot be filled anew.
        """
        reasons = []
        for step in (self._fill, self._check_shared) if layers is None else (self._fill,):
            for layer in self._wanted if layers is None else layers:
                if self._wanted.get(layer):
                    try:
                        step(layer)
                    except Exception as error:
                        reasons.append(self._lose(layer, error))
        if reasons:
            raise RuntimeError(reasons[0])

    def abandon(self) -> None:
        """The update failed. What has not been filled stays as it was, as the weights that it is
        of. Raises nothing: the next update is told."""
        for layer in self._wanted:
            try:
                now, wanted = self._compare(layer)
                held = self._held[layer]
                changed = {
                    path: one
                    for path, one in now.items()
                    if path in wanted and not is_in_place(one, held.get(path))
                }
                for path, one in changed.items():
                    self._check(layer, path, one, wanted[path])
                self._give(layer, changed, wanted)
            except Exception as error:
                self._lose(layer, error)

    def _compare(self, layer: torch.nn.Module) -> tuple[Tensors, Tensors]:
        """What helpers hold now, and what graphs know; of the latter, what is gone is kept."""
        wanted = {path: tensor for path, (tensor, _) in self._wanted[layer].items()}
        now = self._held_by(layer, wanted)
        _pasts[layer].kept |= {path: wanted[path] for path in wanted.keys() - now.keys()}
        return now, wanted

    def _fill(self, layer: torch.nn.Module) -> None:
        held, (now, wanted) = self._held[layer], self._compare(layer)
        for path in held.keys() & wanted.keys() - now.keys():
            for other in now.keys() - held.keys():  # the same by another name?
                is_near = other[:-1] == path[:-1] or other[-1] == path[-1]
                if is_near and _form_of(now[other]) == _form_of(wanted[path]):
                    raise ValueError(f"{_named(path)} is gone, and {_named(other)} is new")
        moved = [path for path in wanted.keys() & now if not is_in_place(now[path], wanted[path])]
        for path in moved:
            self._check(layer, path, now[path], wanted[path])
        there = [_elements(wanted[path]) for path in moved]
        differs = self._copy(layer, there, [_elements(now[path]) for path in moved])
        if differs:
            raise ValueError(f"{_named(moved[differs[0]])} shares memory with what is other now")
        self._give(layer, now, wanted)

    def _check_shared(self, layer: torch.nn.Module) -> None:
        """Raise ``ValueError`` if what has not changed is in memory that was filled for another."""
        for path, one in self._objects[layer].items():
            views = self._altered.get(key_of(one), ())
            if id(one) in self._given or not (views and any(map(View.of(one).overlaps, views))):
                continue
            if self._held_by(layer, [path]).get(path) is one:
                raise ValueError(f"{_named(path)} shares memory with what is other now")

    def _copy(
        self, layer: torch.nn.Module, there: list[torch.Tensor], new: list[torch.Tensor]
    ) -> list[int]:
        """Fill what is ``there`` with what is ``new``. Returns which of it shares memory with
        something else that was filled, and is not as that is."""
        keys, views = [key_of(one) for one in there], [View.of(one) for one in there]
        new = [one.clone() if key_of(one) in keys else one for one in new]
        numbers, differs = range(len(there)), set[int]()

        def note(shared: list[int]) -> None:  # the device is waited for
            differs.update(n for n in shared if not _equal(there[n], new[n]))

        filled = [
            [view for view, of in self._filled.get(key, ()) if of is not layer] for key in keys
        ]
        note([n for n in numbers if any(map(views[n].overlaps, filled[n]))])
        for n in numbers:
            if keys[n] in self._shared and not _equal(there[n], new[n]):
                self._altered[keys[n]].append(views[n])
        with torch.no_grad():
            for tensor, one in zip(there, new, strict=True):
                tensor.copy_(one)
        own = [[views[m] for m in numbers if m != n and keys[m] == keys[n]] for n in numbers]
        note([n for n in numbers if any(map(views[n].overlaps, own[n]))])
        for key, view in zip(keys, views, strict=True):
            self._filled[key].append((view, layer))
        return sorted(differs)

    def _check(
        self, layer: torch.nn.Module, path: Path, now: torch.Tensor, wanted: torch.Tensor
    ) -> None:
        """Raise ``ValueError`` unless the tensor ``now`` can be given the memory ``wanted``."""
        if Place.of(wanted) != self._wanted[layer][path][1]:
            raise ValueError(f"{_named(path)} was resized")
        if _form_of(now) != _form_of(wanted):
            raise ValueError(f"{_named(path)} is {_form_of(now)}, and was {_form_of(wanted)}")
        if id(now) in self._theirs and self._objects[layer].get(path) is not now:
            raise ValueError(f"{_named(path)} is a tensor that was somewhere else before")

    def _give(self, layer: torch.nn.Module, now: Tensors, wanted: Tensors) -> None:
        """Have what helpers hold now use the memory that graphs know."""
        kept = _pasts[layer].kept
        paths: dict[int, list[Path]] = defaultdict(list)
        for path in now.keys() & wanted.keys():
            paths[id(now[path])].append(path)
        for number, several in paths.items():
            one = now[several[0]]
            is_there = any(is_in_place(one, wanted[path]) for path in several)
            # What has not changed may be where another layer's graphs know it.
            is_old = any(is_in_place(one, self._held[layer].get(path)) for path in several)
            if not (is_there or is_old or number in self._given):
                one.data = wanted[several[0]]
                self._given[number] = one
            # It has taken the place of others, and nothing but graphs knows their memory now.
            kept |= {p: wanted[p] for p in several if not is_in_place(one, wanted[p])}

    def _lose(self, layer: torch.nn.Module, error: Exception) -> str:
        past = _pasts[layer]
        past.kept |= {path: tensor for path, (tensor, _) in self._wanted[layer].items()}
        past.lost = past.lost or (
            f"CUDA graphs may have captured what helpers of {self._names[layer]!r} held, and it "
            f"cannot be filled anew: {error}. Start the engine with the new weights, or with "
            "enforce_eager"
        )
        return past.lost

    def _held_by(self, layer: torch.nn.Module, known: Iterable[Path] = ()) -> Tensors:
        """By a layer itself, beside parameters and buffers, and by its helpers. ``known``: where
        something was before, which may be found by a shorter way now."""
        found: Tensors = {}
        todo: deque[tuple[Path, Any]] = deque()
        for name, thing in list(vars(layer).items()):
            if name not in _OF_EVERY_MODULE and type(thing) not in _PLAIN:
                todo.append(((name,), thing))
        met: dict[int, Any] = {}  # and so kept: no other object gets an id of these
        while todo:
            path, thing = todo.popleft()
            if issubclass(type(thing), torch.Tensor):
                if _may_be_captured(thing):
                    found[path] = thing
            elif id(thing) not in met and id(thing) not in self._own and len(path) < _DEEPEST:
                met[id(thing)] = thing
                parts = ((key, one) for key, one in _parts_of(thing) if type(one) not in _PLAIN)
                todo.extend(((*path, key), one) for key, one in parts)
        for path in known:
            if path not in found and (there := _follow(layer, path)) is not None:
                found[path] = there
        return found


def _follow(layer: torch.nn.Module, path: Path) -> torch.Tensor | None:
    """The tensor at the end of a path, if there is one."""
    thing: Any = vars(layer).get(path[0])
    for step in path[1:]:
        thing = next((part for key, part in _parts_of(thing) if key == step), None)
    is_one = issubclass(type(thing), torch.Tensor) and _may_be_captured(thing)
    return thing if is_one else None


def has_graphs(device: torch.device, model_config: Any) -> bool:
    """Whether an engine may have captured any."""
    return device.type != "cpu" and not getattr(model_config, "enforce_eager", False)


def _parts_of(thing: Any) -> Iterator[tuple[str, Any]]:
    """What a thing is made of, by names that are the same whenever it is made alike."""
    kind: Any = type(thing)
    if issubclass(kind, (dict, MappingProxyType)):
        for number, (key, part) in enumerate(list(thing.items())):
            is_named = type(key) is str
            yield key if is_named else f"[{key if type(key) is int else number}]", part
    elif issubclass(kind, (list, tuple, deque)):
        yield from ((f"[{number}]", part) for number, part in enumerate(list(thing)))
    elif issubclass(kind, partial):
        yield from (("func", thing.func), ("args", thing.args), ("keywords", thing.keywords))
    elif kind is MethodType:
        yield from (("self", thing.__self__), ("function", thing.__func__))
    elif kind is FunctionType:
        names = thing.__code__.co_freevars
        for name, cell in zip(names, thing.__closure__ or (), strict=True):
            yield name, _contents_of(cell)
        yield from (("defaults", thing.__defaults__), ("keywords", thing.__kwdefaults__))
    elif issubclass(kind, _NO_HELPERS) or _is_of_another_kind(kind):
        return
    yield from _attributes_of(thing)
    for name, slot in _slots_of(kind):
        try:
            yield name, slot.__get__(thing)
        except AttributeError:  # nothing is in it
            continue


def _attributes_of(thing: Any) -> list[tuple[str, Any]]:
    try:
        own = object.__getattribute__(thing, "__dict__")
    except Exception:  # it has none, or a property that fails
        return []
    return list(own.items()) if type(own) is dict else []


@lru_cache(4096)
def _slots_of(kind: Any) -> list[tuple[str, Any]]:
    # Members of classes that are written in C lead everywhere, as a function's globals.
    bases = (base for base in kind.__mro__ if "__slots__" in vars(base))
    members = (one for base in bases for one in vars(base).items())
    return [(name, one) for name, one in members if type(one) is MemberDescriptorType]


def _contents_of(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _is_of_another_kind(kind: type) -> bool:
    package = str(kind.__module__)
    is_one = any(package == one or package.startswith(f"{one}.") for one in _NO_PACKAGES)
    return is_one and not issubclass(kind, torch.nn.Module)


def _may_be_captured(tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided or key_of(tensor) is None:
        return False
    return tensor.untyped_storage().device.type not in ("cpu", "meta")


def _alias_of(tensor: torch.Tensor) -> torch.Tensor:
    """Another tensor of its memory, whatever becomes of it; none of inference mode's."""
    return View.of(tensor).in_storage(whole_storage(tensor, tensor.dtype))


def _form_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal where one can be copied over the other, and take its memory."""
    strides = (s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)
    return tensor.dtype, tuple(tensor.shape), tuple(strides), str(tensor.device)


def _elements(tensor: torch.Tensor) -> torch.Tensor:
    """Each once, where a tensor shows one several times."""
    sizes = [n if s else min(n, 1) for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.as_strided(sizes, tensor.stride(), tensor.storage_offset())


def _equal(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit by bit."""
    bits = [one.contiguous().view(-1).view(torch.uint8) for one in (tensor, other)]
    return torch.equal(*bits)


def _named(path: Path) -> str:
    return ".".join(path).replace(".[", "[")
