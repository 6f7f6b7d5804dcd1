"""What each operation of torch does to the origins of elements, by the operation's name.

A rule gets the recorder, the operation's result and its arguments. It raises ``InexpressibleError``
where the result is no copy of its arguments' elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from checkpoint_engine.strided import InexpressibleError, View

_MOST_PIECES = 4096
"""Of one operation; beyond, its tensors stay with the loader."""


class Origins(Protocol):
    """What rules tell: the recorder."""

    def make(self, result: torch.Tensor) -> None:
        """``result`` is new memory."""
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
        """``target`` was filled with a number."""
        ...

    def is_constant(self, tensor: torch.Tensor) -> bool:
        """Whether its values have nothing to do with the checkpoint or the model."""
        ...


def _copy_(recorder: Origins, result: Any, target: Any, source: Any, *_: Any, **__: Any) -> None:
    recorder.copy(target, source)


def _filled(recorder: Origins, result: Any, target: Any, value: Any = 0) -> None:
    if isinstance(value, torch.Tensor):
        recorder.copy(target, value)
    else:
        recorder.fill(target, value)


def _copied(recorder: Origins, result: torch.Tensor, source: Any, *_: Any, **__: Any) -> None:
    recorder.make(result)
    recorder.copy(result, source)


def _empty(recorder: Origins, result: torch.Tensor, *_: Any, **__: Any) -> None:
    recorder.make(result)


def _zeros(recorder: Origins, result: torch.Tensor, *_: Any, **__: Any) -> None:
    recorder.make(result)
    recorder.fill(result, 0)


def _ones(recorder: Origins, result: torch.Tensor, *_: Any, **__: Any) -> None:
    recorder.make(result)
    recorder.fill(result, 1)


def _full(
    recorder: Origins, result: torch.Tensor, _: Any, value: Any, *__: Any, **___: Any
) -> None:
    recorder.make(result)
    recorder.fill(result, value)


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


def _padded(
    recorder: Origins, result: torch.Tensor, source: torch.Tensor, pad: list[int], value: Any = 0
) -> None:
    if min(pad) < 0:
        raise InexpressibleError("padding that cuts off")
    recorder.make(result)
    recorder.fill(result, value)
    into = View.of(result)
    for number in range(len(pad) // 2):
        dim = source.dim() - 1 - number
        into = _cut(into, dim, pad[2 * number], source.shape[dim])
    recorder.copy_region(result, into, source, View.of(source))


def _repeated(
    recorder: Origins, result: torch.Tensor, source: torch.Tensor, repeats: list[int]
) -> None:
    recorder.make(result)
    missing = len(repeats) - source.dim()
    view = View.of(source)
    view = view._replace(sizes=(1,) * missing + view.sizes, strides=(0,) * missing + view.strides)
    if math.prod(repeats) > _MOST_PIECES:
        raise InexpressibleError("repeated too often")
    tiles = [View.of(result)]
    for dim, (times, size) in enumerate(zip(repeats, view.sizes, strict=True)):
        tiles = [_cut(tile, dim, i * size, size) for tile in tiles for i in range(times)]
    for tile in tiles:
        recorder.copy_region(result, tile, source, view)


def _selected(
    recorder: Origins, result: torch.Tensor, source: torch.Tensor, dim: int, index: torch.Tensor
) -> None:
    recorder.make(result)
    for place, begin, length in _runs(recorder, index, source.shape[dim]):
        recorder.copy_region(
            result,
            _cut(View.of(result), dim, place, length),
            source,
            _cut(View.of(source), dim, begin, length),
        )


def _indexed(
    recorder: Origins, result: torch.Tensor, source: torch.Tensor, indices: list[Any]
) -> None:
    dim, index = _only(indices)
    _selected(recorder, result, source, dim, index)


def _index_put(
    recorder: Origins,
    result: torch.Tensor,
    target: torch.Tensor,
    indices: list[Any],
    values: torch.Tensor,
    accumulate: bool = False,
) -> None:
    dim, index = _only(indices)
    if accumulate:
        raise InexpressibleError("accumulates")
    whole = View.of(target)
    sizes = (*whole.sizes[:dim], len(index), *whole.sizes[dim + 1 :])
    given = View.of(values).expand(sizes)
    for place, begin, length in _runs(recorder, index, target.shape[dim]):
        recorder.copy_region(
            target, _cut(whole, dim, begin, length), values, _cut(given, dim, place, length)
        )


def _only(indices: list[Any]) -> tuple[int, torch.Tensor]:
    """The one dimension that is indexed, by a list of positions."""
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].dim() != 1 or given[0][1].dtype in (torch.bool, torch.uint8):
        raise InexpressibleError("indexed by a mask or in several dimensions")
    return given[0]


def _runs(recorder: Origins, index: torch.Tensor, size: int) -> Iterator[tuple[int, int, int]]:
    """(place in the index, first position, length) of consecutive positions."""
    if not recorder.is_constant(index):
        raise InexpressibleError("indexed by what is no constant")
    positions = [int(i) % size for i in index.tolist()]
    begin = 0
    for number in range(_MOST_PIECES + 1):
        if begin == len(positions):
            return
        if number == _MOST_PIECES:
            raise InexpressibleError("indexed too often")
        end = begin + 1
        while end < len(positions) and positions[end] == positions[end - 1] + 1:
            end += 1
        yield begin, positions[begin], end - begin
        begin = end


def _cut(view: View, dim: int, begin: int, length: int) -> View:
    """``narrow``."""
    dim %= len(view.sizes)
    sizes = (*view.sizes[:dim], length, *view.sizes[dim + 1 :])
    return View(view.dtype, view.offset + begin * view.strides[dim], sizes, view.strides)


_aten = torch.ops.aten
FACTORIES: set[Any] = {_empty, _zeros, _ones, _full}
RULES: dict[Any, Any] = {
    _aten.copy_.default: _copy_,
    _aten.fill_.Scalar: _filled,
    _aten.fill_.Tensor: _filled,
    _aten.zero_.default: _filled,
    _aten.clone.default: _copied,
    _aten._to_copy.default: _copied,
    _aten.cat.default: _cat,
    _aten.stack.default: _stack,
    _aten.constant_pad_nd.default: _padded,
    _aten.repeat.default: _repeated,
    _aten.index_select.default: _selected,
    _aten.index.Tensor: _indexed,
    _aten.index_put_.default: _index_put,
    _aten.empty.memory_format: _empty,
    _aten.empty_like.default: _empty,
    _aten.empty_strided.default: _empty,
    _aten.new_empty.default: _empty,
    _aten.new_empty_strided.default: _empty,
    _aten.zeros.default: _zeros,
    _aten.zeros_like.default: _zeros,
    _aten.new_zeros.default: _zeros,
    _aten.ones.default: _ones,
    _aten.ones_like.default: _ones,
    _aten.new_ones.default: _ones,
    _aten.full.default: _full,
    _aten.full_like.default: _full,
    _aten.new_full.default: _full,
}
LOOK_AT_NO_VALUES: set[Any] = {
    _aten.is_same_size.default,
    _aten.is_pinned.default,
    _aten.record_stream.default,
    _aten.rand_like.default,
    _aten.randn_like.default,
}
ESCAPES: set[Any] = {
    torch.Tensor.numpy,
    torch.Tensor.__array__,
    torch.Tensor.tolist,
    torch.Tensor.data_ptr,
    torch.Tensor.__dlpack__,
    torch.Tensor.untyped_storage,
    torch.Tensor.storage,
    torch.Tensor.share_memory_,
    torch.Tensor.__reduce_ex__,
    torch.Tensor.data.__set__,  # type: ignore[attr-defined]
}
