"""The operations and functions of torch that a recording may be made of. There are no others.

Operations are what torch's dispatcher sees. A rule says what an operation does to the origins of
elements: it gets what is known of memory, the operation's result and its arguments, and raises an
error where the result is no copy of its arguments' elements.

Functions are what Python calls. Some look at values without an operation that the dispatcher sees,
as ``torch.tensor([a_tensor])`` and ``tensor_split`` by a tensor do. So these are listed as well.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

from checkpoint_engine.loading.replay.memory import KnownMemory


def _filled(memory: KnownMemory, _: Any, target: Any, source: Any = 0, *__: Any) -> None:
    memory.copy(target, source)


def _lifted(memory: KnownMemory, result: torch.Tensor, *_: Any) -> None:
    memory.make_of_numbers(result)


def _cloned(memory: KnownMemory, result: torch.Tensor, source: Any, *_: Any, **__: Any) -> None:
    memory.make_copy(result, source)


def _empty(memory: KnownMemory, result: torch.Tensor, *_: Any, **__: Any) -> None:
    memory.make(result)


def _zeros(memory: KnownMemory, result: torch.Tensor, *_: Any, **__: Any) -> None:
    memory.make(result)
    memory.copy(result, 0)


def _cat(memory: KnownMemory, result: torch.Tensor, tensors: Any, dim: int = 0) -> None:
    memory.make(result)
    given = [tensor for tensor in tensors if tensor.numel()]  # it may have fewer dimensions
    lengths = [tensor.shape[dim] for tensor in given]
    for part, tensor in zip(result.split(lengths, dim), given, strict=True):
        memory.copy(part, tensor)


def _stack(memory: KnownMemory, result: torch.Tensor, tensors: Any, dim: int = 0) -> None:
    memory.make(result)
    for part, tensor in zip(result.unbind(dim), tensors, strict=True):
        memory.copy(part, tensor)


_aten = torch.ops.aten
_RULES: dict[Callable[..., None], str] = {
    _filled: "copy_.default fill_.Scalar fill_.Tensor zero_.default",
    _lifted: "lift_fresh.default",
    _cloned: "clone.default _to_copy.default",
    _cat: "cat.default",
    _stack: "stack.default",
    _empty: "empty.memory_format empty_like.default empty_strided.default "
    "new_empty.default new_empty_strided.default",
    _zeros: "zeros.default zeros_like.default new_zeros.default",
}
RULES = {attrgetter(name)(_aten): rule for rule, names in _RULES.items() for name in names.split()}
_VIEWS = (
    "view _unsafe_view _reshape_alias slice select transpose t permute expand squeeze unsqueeze "
    "split split_with_sizes unbind diagonal detach alias"
)
VIEWS: set[Any] = {
    getattr(getattr(_aten, name), overload)
    for name in _VIEWS.split()
    for overload in getattr(_aten, name).overloads()
    if overload != "out"
}
"""They give nothing away. Not those that leave it to readers to change bits, as ``conj`` does."""
LOOK_AT_NO_VALUES: set[Any] = {
    _aten.is_same_size.default,
    _aten.is_pinned.default,
    _aten.record_stream.default,
}
COPY = _aten.copy_.default
READ_A_NUMBER = _aten._local_scalar_dense.default


_KNOWN = {*RULES, *VIEWS, *LOOK_AT_NO_VALUES, READ_A_NUMBER}


def is_seen_by_dispatcher(func: Any) -> bool:
    """Whether a mode of operations sees what this, called from Python, does. Somebody else's may be
    registered as made of other operations, and be made of none; some of torch's are no operations
    of the dispatcher's at all."""
    if isinstance(func, OpOverloadPacket):
        return all(is_seen_by_dispatcher(getattr(func, one)) for one in func.overloads())
    return isinstance(func, OpOverload) and func in _KNOWN


def _named(names: str) -> set[Any]:
    """The methods of tensors and the functions of torch that have these names."""
    owners = (torch.Tensor, torch)
    return {getattr(owner, n) for n in names.split() for owner in owners if hasattr(owner, n)}


FUNCTIONS = _named(
    # shapes and the like
    "size dim ndimension stride numel nelement element_size __len__ is_contiguous "
    "is_floating_point is_complex is_signed is_pinned is_same_size get_device is_conj is_neg "
    # views
    "view view_as reshape reshape_as flatten ravel unflatten t transpose swapaxes swapdims permute "
    "movedim moveaxis narrow select __getitem__ __iter__ chunk split split_with_sizes unbind "
    "squeeze unsqueeze expand expand_as broadcast_to diagonal detach "
    # copies
    "copy_ fill_ zero_ __setitem__ clone contiguous to type_as cpu cuda double float half bfloat16 "
    "cat concat concatenate stack empty_like zeros_like new_empty new_empty_strided new_zeros"
)
"""What may be called with any tensor. Where an argument is a tensor that stands for a number, the
dispatcher sees it read."""
_PROPERTIES = (
    "shape dtype device layout ndim itemsize nbytes requires_grad grad is_leaf "
    "is_meta is_cpu is_cuda is_sparse is_quantized is_nested"
)


def _getters(names: str) -> set[Any]:
    return {getattr(torch.Tensor, name).__get__ for name in names.split()}


SHAPES = _getters(_PROPERTIES) | _named(
    "size dim ndimension stride numel nelement element_size __len__ is_contiguous "
    "is_floating_point is_complex get_device"
)
"""No operations are behind these."""
FUNCTIONS |= SHAPES | _getters("data T mT")
QUICK = _getters("data T mT") | _named(
    "view t transpose permute narrow select __getitem__ __iter__ chunk split unbind squeeze "
    "unsqueeze expand detach"
)
"""Those that can give no more than views, if no argument but the first is a tensor."""
LOOKS = _named("item tolist __int__ __index__ __float__ __bool__")
"""What may be called with numbers of the model as it was before, as a map of experts."""
CALLS_BACK = _named("apply_ map_ map2_")
"""They run functions of Python's where no mode sees what these do."""
