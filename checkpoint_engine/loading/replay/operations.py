"""The operations and functions of torch that a recording may be made of. There are no others.

Operations are what torch's dispatcher sees. A rule says what an operation does to the origins of
elements: it gets the recorder, the operation's result and its arguments, and raises
``InexpressibleError`` where the result is no copy of its arguments' elements.

Functions are what Python calls. Some look at values without an operation that the dispatcher sees,
as ``torch.tensor([a_tensor])`` and ``tensor_split`` by a tensor do. So these are listed as well.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from checkpoint_engine.loading.replay.geometry import View


class Origins(Protocol):
    """What rules tell: the recorder."""

    def make(self, result: torch.Tensor) -> None:
        """``result`` is new memory."""
        ...

    def make_of_numbers(self, result: torch.Tensor) -> None:
        """``result`` holds what Python had."""
        ...

    def make_copy(self, result: torch.Tensor, source: torch.Tensor) -> None:
        """``result`` is new memory, filled from ``source``."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """``target`` was filled from ``source``, broadcast and converted."""
        ...

    def copy_region(
        self, target: torch.Tensor, into: View, source: torch.Tensor, out_of: View
    ) -> None:
        """A view of the memory of one tensor was filled from a view of another's."""
        ...

    def fill(self, target: torch.Tensor, value: Any) -> None:
        """``target`` was filled with a number, or a tensor that holds one."""
        ...


def _copy_(recorder: Origins, result: Any, target: Any, source: Any, *_: Any, **__: Any) -> None:
    recorder.copy(target, source)


def _filled(recorder: Origins, result: Any, target: Any, value: Any = 0) -> None:
    recorder.fill(target, value)


def _lifted(recorder: Origins, result: torch.Tensor, *_: Any) -> None:
    recorder.make_of_numbers(result)


def _copied(recorder: Origins, result: torch.Tensor, source: Any, *_: Any, **__: Any) -> None:
    recorder.make_copy(result, source)


def _empty(recorder: Origins, result: torch.Tensor, *_: Any, **__: Any) -> None:
    recorder.make(result)


def _zeros(recorder: Origins, result: torch.Tensor, *_: Any, **__: Any) -> None:
    recorder.make(result)
    recorder.fill(result, 0)


def _cat(recorder: Origins, result: torch.Tensor, tensors: Any, dim: int = 0) -> None:
    recorder.make(result)
    begin = 0
    for tensor in tensors:
        if tensor.numel():
            length = tensor.shape[dim]
            recorder.copy_region(
                result, _cut(View.of(result), dim, begin, length), tensor, View.of(tensor)
            )
            begin += length


def _stack(recorder: Origins, result: torch.Tensor, tensors: Any, dim: int = 0) -> None:
    recorder.make(result)
    dim %= result.dim()
    for index, tensor in enumerate(tensors):
        view = View.of(tensor)
        sizes = (*view.sizes[:dim], 1, *view.sizes[dim:])
        strides = (*view.strides[:dim], 0, *view.strides[dim:])
        recorder.copy_region(
            result,
            _cut(View.of(result), dim, index, 1),
            tensor,
            view._replace(sizes=sizes, strides=strides),
        )


def _cut(view: View, dim: int, begin: int, length: int) -> View:
    """``narrow``."""
    dim %= len(view.sizes)
    sizes = (*view.sizes[:dim], length, *view.sizes[dim + 1 :])
    return View(view.dtype, view.offset + begin * view.strides[dim], sizes, view.strides)


_aten = torch.ops.aten
RULES: dict[Any, Any] = {
    _aten.copy_.default: _copy_,
    _aten.fill_.Scalar: _filled,
    _aten.fill_.Tensor: _filled,
    _aten.zero_.default: _filled,
    _aten.lift_fresh.default: _lifted,
    _aten.clone.default: _copied,
    _aten._to_copy.default: _copied,
    _aten.cat.default: _cat,
    _aten.stack.default: _stack,
    _aten.empty.memory_format: _empty,
    _aten.empty_like.default: _empty,
    _aten.empty_strided.default: _empty,
    _aten.new_empty.default: _empty,
    _aten.new_empty_strided.default: _empty,
    _aten.zeros.default: _zeros,
    _aten.zeros_like.default: _zeros,
    _aten.new_zeros.default: _zeros,
}
VIEWS: set[Any] = {
    getattr(packet, overload)
    for packet in (
        _aten.view,
        _aten._unsafe_view,
        _aten._reshape_alias,
        _aten.slice,
        _aten.select,
        _aten.transpose,
        _aten.t,
        _aten.permute,
        _aten.expand,
        _aten.squeeze,
        _aten.unsqueeze,
        _aten.split,
        _aten.split_with_sizes,
        _aten.unbind,
        _aten.diagonal,
        _aten.as_strided,
        _aten.detach,
        _aten.alias,
    )
    for overload in packet.overloads()
    if overload != "out"
}
"""They give nothing away. Not those that leave it to readers to change bits, as ``conj`` does."""
LOOK_AT_NO_VALUES: set[Any] = {
    _aten.is_same_size.default,
    _aten.is_pinned.default,
    _aten.record_stream.default,
}
READ_A_NUMBER = _aten._local_scalar_dense.default


def _named(names: str) -> set[Any]:
    """The methods of tensors and the functions of torch that have these names."""
    owners = (torch.Tensor, torch)
    return {getattr(owner, n) for n in names.split() for owner in owners if hasattr(owner, n)}


FUNCTIONS = _named(
    # shapes and the like
    "size dim ndimension stride numel nelement element_size storage_offset __len__ is_contiguous "
    "is_floating_point is_complex is_signed is_pinned is_same_size get_device is_conj is_neg "
    # views
    "view view_as reshape reshape_as flatten ravel unflatten t transpose swapaxes swapdims permute "
    "movedim moveaxis narrow select __getitem__ __iter__ chunk split split_with_sizes unbind "
    "squeeze unsqueeze expand expand_as broadcast_to as_strided diagonal detach "
    # copies
    "copy_ fill_ zero_ __setitem__ clone contiguous to type_as cpu cuda double float half bfloat16 "
    "cat concat concatenate stack empty_like zeros_like new_empty new_empty_strided new_zeros"
)
"""What may be called with any tensor. Where an argument is a tensor that stands for a number, the
dispatcher sees it read."""
_PROPERTIES = (
    "shape dtype device layout ndim itemsize nbytes data T mT requires_grad grad is_leaf "
    "is_meta is_cpu is_cuda is_sparse is_quantized is_nested"
)
FUNCTIONS |= {getattr(torch.Tensor, name).__get__ for name in _PROPERTIES.split()}
LOOKS = _named("item tolist __int__ __index__ __float__ __bool__")
"""What may be called with numbers of the model as it was before, as a map of experts."""
