"""Tensors of a model that are views of its parameters.

A layer may keep one, as Mamba's mixers keep the weight of their convolution in another shape. An
update must not part the two: the engine would go on to compute with old weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

from checkpoint_engine.loading.replay.adapter import every_tensor
from checkpoint_engine.loading.replay.geometry import View, whole_storage
from checkpoint_engine.loading.replay.memory import Slot, key_of


class KeptView(NamedTuple):
    """``view`` was in the memory of ``parameter`` when an update began."""

    slot: Slot
    view: torch.Tensor
    of: Slot
    parameter: torch.Tensor


def kept_views(modules: Mapping[str, torch.nn.Module]) -> list[KeptView]:
    """The buffers and plain tensors of a model that have memory of a parameter."""
    owners = _owners(modules)
    return [
        KeptView(slot, tensor.detach(), *_owner_of(tensor, owners[key]))
        for slot, tensor in every_tensor(modules)
        if (key := key_of(tensor)) in owners and slot.name not in modules[slot.module]._parameters
    ]


def _owner_of(
    view: torch.Tensor, owners: list[tuple[Slot, torch.Tensor]]
) -> tuple[Slot, torch.Tensor]:
    """The parameter that a view lies in, of those in its storage."""
    first, last = View.of(view).span
    for slot, parameter in owners:
        begin, end = View.of(parameter).span
        if begin <= first and last <= end:
            return slot, parameter
    return owners[0]


def keep_views(modules: Mapping[str, torch.nn.Module], views: Iterable[KeptView]) -> None:
    """After an update: a view whose parameter has other memory now is made anew. Raises
    ``RuntimeError`` if it cannot be, because the parameter has another form, too."""
    for slot, view, of, before in views:
        there, parameter = _at(modules, slot), _at(modules, of)
        if there is None or parameter is None or key_of(there) != key_of(view):
            continue  # the engine itself has made it anew
        if key_of(parameter) == key_of(view):
            continue
        if _form(parameter) != _form(before):
            raise RuntimeError(
                f"{slot.qualified} was a view of {of.qualified}, which has another form now: the "
                "engine would compute with old weights there; start it with the new ones"
            )
        setattr(modules[slot.module], slot.name, _made_anew(view, before, parameter.detach()))


def _made_anew(view: torch.Tensor, before: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """What ``view`` was of ``before``, of ``parameter``. Their dtypes may differ from its own."""
    begins = [View.of(one).span[0] for one in (parameter, view, before)]
    offset = (begins[0] + begins[1] - begins[2]) // view.itemsize
    return whole_storage(parameter, view.dtype).as_strided(view.shape, view.stride(), offset)


def parted_views(
    modules: Mapping[str, torch.nn.Module],
    restored: Mapping[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]],
    exempt: Iterable[str],
) -> Iterator[tuple[Slot, Slot]]:
    """The buffers that an engine parted from their parameters when it processed them at its start,
    so that nothing fills them any more; and the parameters.

    Args:
        restored: of each module, the parameters and buffers that vLLM remembers from before it
            loaded; views of parameters are not among them.
        exempt: names that it never remembers.
    """
    owners = _owners(modules)
    for name, module in modules.items():
        for own in module._non_persistent_buffers_set - restored[name][1].keys() - set(exempt):
            buffer = module._buffers.get(own)
            if buffer is None or not buffer.numel() or key_of(buffer) in owners:
                continue
            for inner, _ in module.named_modules(prefix=name):
                for parameter, meta in restored.get(inner, ({}, {}))[0].items():
                    if (meta.dtype, meta.numel()) == (buffer.dtype, buffer.numel()):
                        yield Slot(name, own), Slot(inner, parameter)


def _owners(
    modules: Mapping[str, torch.nn.Module],
) -> dict[int | None, list[tuple[Slot, torch.Tensor]]]:
    """By memory, the parameters."""
    owners: dict[int | None, list[tuple[Slot, torch.Tensor]]] = defaultdict(list)
    for slot, tensor in every_tensor(modules):
        if slot.name in modules[slot.module]._parameters and key_of(tensor) is not None:
            owners[key_of(tensor)].append((slot, tensor.detach()))
    return dict(owners)


def _at(modules: Mapping[str, torch.nn.Module], slot: Slot) -> torch.Tensor | None:
    there = getattr(modules[slot.module], slot.name, None)
    return there if isinstance(there, torch.Tensor) else None


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()
