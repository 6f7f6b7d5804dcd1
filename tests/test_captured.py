"""What CUDA graphs may have captured stays where it is, whatever processing makes anew."""

from __future__ import annotations

import gc
import json
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from checkpoint_engine.loading.vllm import captured
from checkpoint_engine.loading.vllm.captured import Captured, has_graphs


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    """Tensors of CPUs stand for those of a GPU."""
    with mock.patch.object(captured, "_may_be_captured", lambda tensor: not tensor.is_meta):
        yield


@dataclass(frozen=True)
class Config:
    scale: torch.Tensor


@dataclass(slots=True)
class Slotted:
    strides: torch.Tensor


class Pair(NamedTuple):
    one: torch.Tensor
    other: Any


class Kernel:
    def __init__(self, **parts: Any) -> None:
        vars(self).update(parts)

    def run(self) -> None:
        """Its bound method leads to it."""


def made(number: float) -> torch.Tensor:
    return torch.full((3,), float(number))


Made = tuple[Any, Callable[[Any], torch.Tensor]]


def attribute(number: float) -> Made:
    return Kernel(workspace=made(number)), lambda held: held.workspace


def frozen_configuration(number: float) -> Made:
    return Kernel(config=Config(made(number))), lambda held: held.config.scale


def slots(number: float) -> Made:
    return Slotted(made(number)), lambda held: held.strides


def listed(number: float) -> Made:
    return {"scales": [0, made(number)]}, lambda held: held["scales"][1]


def in_a_tuple(number: float) -> Made:
    return Kernel(pair=(made(number), "x")), lambda held: held.pair[0]


def in_tuples_of_tuples(number: float) -> Made:
    return Pair(torch.zeros(1), (1, made(number))), lambda held: held.other[1]


def keyword_of_a_partial(number: float) -> Made:
    return partial(print, end=made(number)), lambda held: held.keywords["end"]


def bound_method(number: float) -> Made:
    return Kernel(workspace=made(number)).run, lambda held: held.__self__.workspace


def closure(number: float) -> Made:
    workspace = made(number)

    def apply() -> torch.Tensor:
        return workspace

    return apply, lambda held: held()


def helper_that_is_a_module(number: float) -> Made:
    kernel = torch.nn.Module()
    kernel.__class__ = type("Experts", (torch.nn.Module,), {})
    kernel.register_buffer("strides", made(number))
    return kernel, lambda held: held.strides


def positional_of_a_partial(number: float) -> Made:
    return partial(print, made(number)), lambda held: held.args[0]


def default_of_a_function(number: float) -> Made:
    def apply(workspace: torch.Tensor = made(number)) -> torch.Tensor:  # noqa: B008
        return workspace

    return apply, lambda held: held()


def attribute_of_a_function(number: float) -> Made:
    def apply() -> None:
        pass

    vars(apply)["workspace"] = made(number)
    return apply, lambda held: held.workspace


class Private:
    __slots__ = ("__strides",)

    def __init__(self, strides: torch.Tensor) -> None:
        self.__strides = strides

    def strides(self) -> torch.Tensor:
        return self.__strides


def private_slot(number: float) -> Made:
    return Private(made(number)), lambda held: held.strides()


class One:
    __slots__ = "strides"

    strides: torch.Tensor


def slot_by_a_word(number: float) -> Made:
    one = One()
    one.strides = made(number)
    return one, lambda held: held.strides


class Bag(dict[str, Any]):
    """It has attributes, too."""


def attribute_of_a_dictionary(number: float) -> Made:
    bag = Bag(plain=1)
    vars(bag)["workspace"] = made(number)
    return bag, lambda held: held.workspace


def queue_and_view(number: float) -> Made:
    held = MappingProxyType({"all": deque([made(number)])})
    return held, lambda held: held["all"][0]


def linear_of_torchs(number: float) -> Made:
    linear = torch.nn.Linear(1, 3, bias=False)
    linear.weight.data = made(number)
    return [linear], lambda held: held[0].weight.data


def shown_several_times(number: float) -> Made:
    return Kernel(scale=torch.full((1,), number).expand(3)), lambda held: held.scale


def directly(number: float) -> Made:
    return made(number), lambda held: held


KINDS = [
    attribute,
    frozen_configuration,
    slots,
    listed,
    in_a_tuple,
    in_tuples_of_tuples,
    keyword_of_a_partial,
    bound_method,
    closure,
    helper_that_is_a_module,
    positional_of_a_partial,
    default_of_a_function,
    attribute_of_a_function,
    private_slot,
    slot_by_a_word,
    attribute_of_a_dictionary,
    queue_and_view,
    linear_of_torchs,
    shown_several_times,
    directly,
]


def model_with(helper: Any) -> torch.nn.Module:
    model = torch.nn.Module()
    model.layer = torch.nn.Linear(2, 2)
    vars(model.layer)["helper"] = helper  # as what is no module is kept
    return model


def update(model: torch.nn.Module, process: Callable[[Any], None]) -> None:
    """As the adapter, whose objects are of one update."""
    one = Captured(dict(model.named_modules()))
    one.look()
    process(model.layer)
    one.put_back([model.layer])
    one.put_back()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_made_anew_is_filled_and_put_back(kind: Callable[[float], Made]) -> None:
    first, tensor_of = kind(0.0)
    model = model_with(first)
    address = tensor_of(first).data_ptr()
    for step in (1.0, 2.0, 3.0):

        def process(layer: Any, step: float = step) -> None:
            vars(layer)["helper"] = kind(step)[0]

        update(model, process)
        found = tensor_of(vars(model.layer)["helper"])
        assert found.data_ptr() == address
        assert found.tolist() == [step] * 3


def test_two_parts_of_a_tuple_are_both_put_back() -> None:
    model = model_with((made(0), made(1)))
    addresses = [one.data_ptr() for one in model.layer.helper]
    one = Captured(dict(model.named_modules()))
    one.look()
    model.layer.helper = (made(2), made(3))
    one.put_back()
    assert [one.data_ptr() for one in model.layer.helper] == addresses
    assert [one[0].item() for one in model.layer.helper] == [2, 3]


def test_a_parameter_that_a_configuration_refers_to_is_the_layers_own_again() -> None:
    """vLLM's issue 41670: processing makes a configuration of the scales that it loads into, which
    are copied into the layer's own later."""
    model = model_with(None)
    layer = model.layer
    own = layer.weight
    layer.helper = Config(own.data)

    def process(layer: Any) -> None:
        fresh = torch.full((2, 2), 7.0)
        layer.helper = Config(fresh)
        own.data.copy_(fresh)

    update(model, process)
    assert layer.helper.scale.data_ptr() == own.data_ptr()
    assert own.tolist() == [[7.0, 7.0], [7.0, 7.0]]


def test_a_configuration_that_stays_knows_the_parameter_that_another_is_made_of() -> None:
    model = model_with(None)
    layer = model.layer
    layer.stays, layer.helper = Config(layer.weight), Config(layer.weight)
    place = layer.weight.data_ptr()

    def process(layer: Any) -> None:
        layer.helper = Config(torch.full((2, 2), 7.0))

    update(model, process)
    assert layer.helper.scale.data_ptr() == layer.stays.scale.data_ptr() == place
    assert layer.stays.scale.tolist() == [[7.0, 7.0], [7.0, 7.0]]


def test_a_helper_of_two_layers_is_found_by_either() -> None:
    shared = Kernel(workspace=made(0))
    model = torch.nn.Module()
    model.a, model.b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    model.a.helper = model.b.helper = shared
    address = shared.workspace.data_ptr()
    one = Captured(dict(model.named_modules()))
    one.look()
    shared.workspace = made(4)
    one.put_back([model.b])
    assert shared.workspace.data_ptr() == address
    assert shared.workspace.tolist() == [4] * 3


def test_what_a_forward_pass_made_lives_on_once() -> None:
    model = model_with(Kernel(workspace=made(0)))
    scratch = [torch.zeros(9), torch.zeros(9)]
    places = [one.data_ptr() for one in scratch]

    def process(layer: Any) -> None:
        layer.helper = Kernel(workspace=made(1))

    for _ in range(2):  # the second was made after the graphs
        model.layer.helper.scratch = scratch.pop(0)
        update(model, process)
        gc.collect()
    update(model, process)
    gc.collect()
    kept = captured._pasts[model.layer].kept
    assert [one.data_ptr() for one in kept.values()] == places[:1]


def test_a_copy_that_fails_is_an_error_in_later_updates_too() -> None:
    model = model_with(Kernel(workspace=made(0)))

    def process(layer: Any) -> None:
        layer.helper = Kernel(workspace=made(1))

    with (
        mock.patch.object(torch.Tensor, "copy_", side_effect=RuntimeError("no memory")),
        pytest.raises(RuntimeError, match="no memory"),
    ):
        update(model, process)
    with pytest.raises(RuntimeError, match="no memory"):
        update(model, process)


def test_what_was_made_in_inference_mode_is_filled() -> None:
    with torch.inference_mode():
        workspace = made(0)
    model = model_with(Kernel(workspace=workspace))

    def process(layer: Any) -> None:
        layer.helper = Kernel(workspace=made(6))

    update(model, process)
    found = model.layer.helper.workspace
    assert found.data_ptr() == workspace.data_ptr()
    assert workspace.tolist() == [6] * 3
    assert found.view(-1).add_(1).tolist() == [7] * 3  # it is an ordinary one


class Layer(torch.nn.Module):
    """No module of torch's."""


def paths_of(helper: Any) -> list[tuple[Any, ...]]:
    """By which ways what it holds is found."""
    layer = Layer()
    vars(layer)["helper"] = helper
    one = Captured({"layer": layer})
    one.look()
    return list(one._held.get(layer, ()))


def test_what_is_found_by_another_name_is_an_error() -> None:
    """Nobody knows whether it is the same."""
    model = model_with(Kernel(workspace=made(0)))

    def process(layer: Any) -> None:
        layer.helper = Kernel(place=made(5))

    with pytest.raises(RuntimeError, match=r"helper\.workspace is gone, and helper\.place is new"):
        update(model, process)


@pytest.mark.parametrize("other", [torch.zeros(4), torch.zeros(3, dtype=torch.int32)])
def test_another_form_is_an_error_until_the_engine_starts_anew(other: torch.Tensor) -> None:
    model = model_with(Kernel(workspace=made(0)))
    place = model.layer.helper.workspace.data_ptr()

    def process(layer: Any) -> None:
        layer.helper = Kernel(workspace=other)

    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"'layer' held.*: helper\.workspace is"):
            update(model, process)
    with pytest.raises(RuntimeError, match="enforce_eager"):
        update(model, lambda _: None)
    kept = captured._pasts[model.layer].kept  # graphs may still write there
    assert [one.data_ptr() for one in kept.values()] == [place]
    update(model_with(Kernel(workspace=made(0))), lambda _: None)  # another engine's


def test_a_layer_that_fails_does_not_keep_others_from_being_filled() -> None:
    model = torch.nn.Module()
    model.a, model.b = Layer(), Layer()
    for layer in (model.a, model.b):
        layer.helper = Kernel(workspace=made(0))
    place = model.b.helper.workspace.data_ptr()
    one = Captured(dict(model.named_modules()))
    one.look()
    model.a.helper, model.b.helper = Kernel(workspace=torch.zeros(4)), Kernel(workspace=made(1))
    with pytest.raises(RuntimeError, match="'a' held"):
        one.put_back()
    assert model.b.helper.workspace.data_ptr() == place
    assert model.b.helper.workspace.tolist() == [1] * 3


def test_the_stride_of_one_element_is_no_other_form() -> None:
    model = model_with(Kernel(workspace=torch.zeros(1, 4).t()))
    place = model.layer.helper.workspace.data_ptr()

    def process(layer: Any) -> None:
        layer.helper = Kernel(workspace=torch.ones(4, 1))

    update(model, process)
    assert model.layer.helper.workspace.data_ptr() == place
    assert model.layer.helper.workspace.flatten().tolist() == [1] * 4


def other_memory(helper: Any) -> None:
    helper.workspace.data = made(1)


def set_to_other_memory(helper: Any) -> None:
    helper.workspace.set_(made(1))


@pytest.mark.parametrize("change", [other_memory, set_to_other_memory])
def test_the_same_object_with_other_memory_is_noticed(change: Callable[[Any], None]) -> None:
    model = model_with(Kernel(workspace=made(0)))
    place = model.layer.helper.workspace.data_ptr()
    update(model, lambda layer: change(layer.helper))
    assert model.layer.helper.workspace.data_ptr() == place
    assert model.layer.helper.workspace.tolist() == [1] * 3


def test_memory_that_was_resized_is_an_error() -> None:
    model = model_with(Kernel(workspace=made(0)))

    def process(layer: Any) -> None:
        layer.helper.workspace.resize_(5000)

    with pytest.raises(RuntimeError, match="was resized"):
        update(model, process)


def model_with_two(one: torch.Tensor, other: torch.Tensor) -> torch.nn.Module:
    model = model_with(None)
    model.layer.one, model.layer.other = one, other
    return model


def test_views_of_each_others_memory_are_both_right() -> None:
    model = model_with_two(made(1), made(2))
    graphs = [model.layer.one.detach(), model.layer.other.detach()]

    def process(layer: Any) -> None:
        layer.one, layer.other = layer.other.detach(), layer.one.detach()

    update(model, process)
    assert [graph.tolist() for graph in graphs] == [[2] * 3, [1] * 3]
    assert (model.layer.one.tolist(), model.layer.other.tolist()) == ([2] * 3, [1] * 3)


def test_what_was_somewhere_else_is_not_given_other_memory() -> None:
    """It may be another layer's parameter, and known to other graphs."""
    model = model_with_two(made(1), made(2))

    def process(layer: Any) -> None:
        layer.one, layer.other = layer.other, layer.one

    with pytest.raises(RuntimeError, match="was somewhere else before"):
        update(model, process)

    model = torch.nn.Module()
    model.a, model.b = torch.nn.Linear(2, 2), Layer()
    model.b.helper = Kernel(scale=torch.zeros(2))
    one = Captured(dict(model.named_modules()))
    one.look()
    bias, place = model.a.bias, model.a.bias.data_ptr()
    model.b.helper.scale = bias
    one.abandon()
    assert bias.data_ptr() == place
    with pytest.raises(RuntimeError, match="was somewhere else before"):
        Captured(dict(model.named_modules())).look()


@pytest.mark.parametrize("apart", [0, 1])
def test_two_of_the_same_memory_that_differ_now_are_an_error(apart: int) -> None:
    memory = torch.zeros(4)
    model = model_with_two(memory[:3], memory[apart:][:3])

    def process(layer: Any) -> None:
        layer.one, layer.other = made(1), made(2)

    with pytest.raises(RuntimeError, match="shares memory"):
        update(model, process)


def test_layers_that_shared_what_differs_now_are_an_error() -> None:
    shared = made(0)
    model = torch.nn.Module()
    model.a, model.b = Layer(), Layer()
    model.a.scale = model.b.scale = shared
    one = Captured(dict(model.named_modules()))
    one.look()
    model.a.scale, model.b.scale = made(1), made(2)
    one.put_back([model.a])
    with pytest.raises(RuntimeError, match="shares memory"):
        one.put_back([model.b])


def test_parts_of_one_memory_are_filled_each() -> None:
    """As MLA's two matrices; and of several layers."""
    memory = torch.zeros(12)
    model = torch.nn.Module()
    model.a, model.b = Layer(), Layer()
    for number, layer in enumerate((model.a, model.b)):
        layer.one, layer.other = memory[number * 6 :][:3], memory[number * 6 + 3 :][:3]
    one = Captured(dict(model.named_modules()))
    one.look()
    for number, layer in enumerate((model.a, model.b)):
        fresh = torch.cat([made(number * 2), made(number * 2 + 1)])
        layer.one, layer.other = fresh[:3], fresh[3:]
        one.put_back([layer])
    one.put_back()
    assert memory.view(4, 3).tolist() == [[number] * 3 for number in range(4)]
    assert model.b.other.data_ptr() == memory[9:].data_ptr()


def test_two_objects_that_become_one_are_both_filled() -> None:
    """The way to one of them is a longer one then."""
    model = model_with(Kernel(inner=Kernel(config=Kernel(scale=made(0)))))
    model.layer.config = Kernel(scale=made(0))
    graphs = [model.layer.config.scale.detach(), model.layer.helper.inner.config.scale.detach()]
    for step in (1, 2):

        def process(layer: Any, step: int = step) -> None:
            layer.config = layer.helper.inner.config = Kernel(scale=made(step))

        update(model, process)
        assert [one.tolist() for one in graphs] == [[step] * 3] * 2


def test_a_shorter_way_that_comes_between_updates_hides_nothing() -> None:
    model = model_with(Kernel(inner=Kernel(scale=made(0))))
    graph = model.layer.helper.inner.scale.detach()
    update(model, lambda _: None)
    model.layer.noted = model.layer.helper.inner

    def process(layer: Any) -> None:
        layer.helper.inner = layer.noted = Kernel(scale=made(3))

    update(model, process)
    assert graph.tolist() == [3] * 3
    assert model.layer.helper.inner.scale.data_ptr() == graph.data_ptr()


def test_the_order_of_attributes_is_nothing() -> None:
    shared = Kernel(scale=made(0))
    model = model_with(Kernel(kernel=shared))
    model.layer.more = Kernel(kernel=shared)
    update(model, lambda _: None)

    def process(layer: Any) -> None:
        del layer.helper
        layer.helper = Kernel(kernel=shared)

    update(model, process)


def test_one_object_of_two_layers_keeps_the_memory_that_it_got_first() -> None:
    model = torch.nn.Module()
    model.a, model.b = Layer(), Layer()
    model.a.scale, model.b.scale = made(0), made(0)
    graphs = [model.a.scale.detach(), model.b.scale.detach()]
    one = Captured(dict(model.named_modules()))
    one.look()
    model.a.scale = model.b.scale = made(4)
    one.put_back([model.a])
    one.put_back([model.b])
    one.put_back()
    assert [graph.tolist() for graph in graphs] == [[4] * 3] * 2
    assert model.a.scale.data_ptr() == graphs[0].data_ptr()
    (kept,) = captured._pasts[model.b].kept.values()
    assert kept.data_ptr() == graphs[1].data_ptr()


def test_a_layer_may_be_processed_in_two_steps() -> None:
    """As attention, whose scales vLLM reloads before it processes it."""
    model = model_with(Kernel(scale=made(0)))
    graph = model.layer.helper.scale.detach()
    one = Captured(dict(model.named_modules()))
    for update_number in range(2):
        one.look()
        for step in (1, 2):
            model.layer.helper = Kernel(scale=made(step + update_number))
            one.put_back([model.layer])
        one.put_back()
    assert graph.tolist() == [3] * 3


def test_what_came_after_the_first_update_is_not_kept() -> None:
    """Graphs were captured before; each update would keep more."""
    model = model_with(Kernel(workspace=made(0)))
    update(model, lambda _: None)
    for number in range(3):
        setattr(model.layer, f"scratch_{number}", torch.zeros(9))
        update(model, lambda layer, number=number: delattr(layer, f"scratch_{number}"))
    assert captured._pasts[model.layer].kept == {}


def test_what_one_layer_made_anew_and_another_still_holds_is_an_error() -> None:
    shared = made(1)
    model = torch.nn.Module()
    model.a, model.b = Layer(), Layer()
    model.a.scale = model.b.scale = shared
    one = Captured(dict(model.named_modules()))
    one.look()
    model.b.scale = made(2)  # graphs of both read it where it was
    one.put_back([model.b])
    with pytest.raises(RuntimeError, match=r"'a' held.*shares memory"):
        one.put_back()


def test_what_one_layer_made_anew_alike_and_another_still_holds_is_right() -> None:
    shared = made(0)
    model = torch.nn.Module()
    model.a, model.b = Layer(), Layer()
    model.a.workspace = model.b.workspace = shared
    one = Captured(dict(model.named_modules()))
    one.look()
    model.b.workspace = made(0)
    one.put_back([model.b])
    one.put_back()
    assert model.b.workspace.data_ptr() == shared.data_ptr()


def test_two_that_become_one_are_both_filled_and_live_on() -> None:
    model = model_with_two(made(0), made(0))
    places = {model.layer.one.data_ptr(), model.layer.other.data_ptr()}
    for step in (1.0, 2.0, 2.0):

        def process(layer: Any, step: float = step) -> None:
            if layer.one[0] != step:
                layer.one = layer.other = made(step)

        was = model.layer.one.data_ptr()
        update(model, process)
        assert step == 1.0 or model.layer.one.data_ptr() == was
        there = [model.layer.one, *captured._pasts[model.layer].kept.values()]
        assert {one.data_ptr() for one in there} == places
        assert all(one.tolist() == [step] * 3 for one in there)


def test_a_failed_update_forgets_nothing_that_graphs_know() -> None:
    """Whatever it left behind."""
    model = model_with(Kernel(workspace=made(0)))
    place = model.layer.helper.workspace.data_ptr()
    one = Captured(dict(model.named_modules()))
    one.look()
    model.layer.helper = None
    one.abandon()

    def process(layer: Any) -> None:
        layer.helper = Kernel(workspace=made(3))

    update(model, process)
    assert model.layer.helper.workspace.data_ptr() == place
    assert model.layer.helper.workspace.tolist() == [3] * 3


def test_a_failed_update_leaves_what_belongs_to_the_weights_that_are_there() -> None:
    model = model_with(Kernel(workspace=made(7)))
    place = model.layer.helper.workspace.data_ptr()
    one = Captured(dict(model.named_modules()))
    one.look()
    model.layer.helper = Kernel(workspace=made(8))
    one.abandon()
    assert model.layer.helper.workspace.data_ptr() == place
    assert model.layer.helper.workspace.tolist() == [7] * 3


def test_a_failed_update_that_left_one_object_to_two_layers_loses_neithers_memory() -> None:
    model = torch.nn.Module()
    model.a, model.b = Layer(), Layer()
    model.a.scale, model.b.scale = made(1), made(2)
    graphs = [model.a.scale.detach(), model.b.scale.detach()]
    one = Captured(dict(model.named_modules()))
    one.look()
    model.a.scale = model.b.scale = made(4)
    one.abandon()
    assert model.a.scale.data_ptr() == graphs[0].data_ptr()
    one.look()
    one.put_back()  # nothing was made anew
    assert model.a.scale.data_ptr() == graphs[0].data_ptr()
    one.look()
    model.a.scale, model.b.scale = made(5), made(6)
    one.put_back()
    assert [graph.tolist() for graph in graphs] == [[5] * 3, [6] * 3]


@pytest.mark.parametrize("left", [torch.zeros(5), made(8).int()])
def test_a_failed_update_that_left_another_form_is_told_of_in_the_next(left: torch.Tensor) -> None:
    model = model_with(Kernel(workspace=made(7)))
    one = Captured(dict(model.named_modules()))
    one.look()
    model.layer.helper = Kernel(workspace=left.clone())
    one.abandon()
    assert model.layer.helper.workspace.dtype == left.dtype
    with pytest.raises(RuntimeError, match="cannot be filled anew"):
        update(model, lambda _: None)


def test_abandoning_raises_nothing_and_the_next_update_is_told() -> None:
    model = model_with(Kernel(workspace=made(7)))
    one = Captured(dict(model.named_modules()))
    one.look()
    with mock.patch.object(captured, "_parts_of", side_effect=ValueError("a strange helper")):
        one.abandon()
    with pytest.raises(RuntimeError, match="a strange helper"):
        update(model, lambda _: None)


class Strange:
    __slots__ = ("never_set",)

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


class Lazy:
    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("not ready")


class Nameless:
    __module__ = None  # type: ignore[assignment]


def test_whatever_a_helper_holds_the_look_goes_on() -> None:
    gone = Kernel()
    proxy = weakref.proxy(gone)
    del gone
    strange = [list[int], json, torch, proxy, Strange(), Lazy(), Nameless(), Kernel, {1, 2}]
    strange += [iter([1]), (one for one in "a"), object(), weakref.ref(Strange), 1j, ...]
    paths = paths_of([*strange, Kernel(workspace=made(0))])
    assert paths == [("helper", f"[{len(strange)}]", "workspace")]


def test_helpers_that_all_know_each_other_are_looked_at_once_each() -> None:
    kernels = [Kernel(workspace=made(0)) for _ in range(200)]
    for kernel in kernels:
        kernel.others = kernels
    assert len(paths_of(kernels)) == 200


def test_an_engine_that_is_gone_takes_what_was_kept_with_it() -> None:
    model = model_with(None)
    layer = model.layer
    parameter = torch.nn.Parameter(made(0))
    parameter.weight_loader = layer.forward  # as vLLM's, which know their layer
    layer.helper = {layer: Kernel(scale=parameter)}
    alive = weakref.ref(layer)

    def process(layer: Any) -> None:
        layer.helper = {layer: None}

    update(model, process)
    del model, layer, parameter
    gc.collect()
    assert alive() is None


def test_the_models_own_layers_are_no_helpers() -> None:
    model, layer = Layer(), Layer()
    model.layer, model.here = layer, made(0)
    layer.back = SimpleNamespace(models=[model], layer=layer)
    layer.here = made(1)
    one = Captured(dict(model.named_modules()))
    one.look()
    held = {layer: list(held) for layer, held in one._held.items()}
    assert held == {model: [("here",)], layer: [("here",)]}


def test_what_leads_to_itself_or_is_there_twice_is_looked_at_once() -> None:
    kernel = Kernel(workspace=made(0))
    kernel.more = {"back": [kernel]}
    assert paths_of([kernel, kernel]) == [("helper", "[0]", "workspace")]


def test_what_is_deep_is_found_and_what_is_deeper_is_not_looked_for() -> None:
    helper: Any = made(0)
    for _ in range(captured._DEEPEST - 1):
        helper = [helper]
    assert len(paths_of(helper)) == 1
    assert paths_of([helper]) == []


def test_configurations_of_vllms_are_not_looked_into() -> None:
    kind = type("VllmConfig", (Kernel,), {"__module__": "vllm.config.vllm"})
    assert paths_of(kind(everything=made(0))) == []
    assert len(paths_of(Kernel(everything=made(0)))) == 1


def test_layers_without_helpers_are_looked_at_once() -> None:
    modules = dict(model_with(Kernel(size=1)).named_modules())
    Captured(modules).look()
    with mock.patch.object(captured, "_parts_of", side_effect=AssertionError):
        Captured(modules).look()


def test_graphs_may_be_captured_unless_an_engine_is_eager_or_on_cpus() -> None:
    eager = SimpleNamespace(enforce_eager=True)
    assert has_graphs(torch.device("cuda"), SimpleNamespace(enforce_eager=False))
    assert has_graphs(torch.device("cuda"), None)
    assert not has_graphs(torch.device("cuda"), eager)
    assert not has_graphs(torch.device("cpu"), None)


# ------------------------------------------------------------------ whatever helpers are


def helper_of(chance: random.Random, depth: int, parts: list[Any]) -> Any:
    """Tensors, views of them and objects that are there twice; ``parts``: those that there are."""
    tensors = [one for one in parts if isinstance(one, torch.Tensor)]
    if parts and chance.random() < 0.15:
        part = chance.choice(parts)
    elif tensors and chance.random() < 0.2:
        part = chance.choice(tensors)[-2:]
    elif depth == 0 or chance.random() < 0.3:
        part = torch.full((chance.choice([2, 2, 3]),), float(chance.randint(1, 99)))
    else:
        several = [helper_of(chance, depth - 1, parts) for _ in range(chance.randint(1, 3))]
        kernel = Kernel(**{f"part_{n}": one for n, one in enumerate(several)})
        part = chance.choice([several, tuple(several), kernel])
    parts.append(part)
    return part


def process_randomly(chance: random.Random, layers: list[Any]) -> None:
    for layer in layers:
        for name, seed in layer.seeds.items():
            how = chance.random()
            if how < 0.4:  # alike, with other numbers
                parts: list[Any] = []
                setattr(layer, name, helper_of(random.Random(seed), 3, parts))
                for part in parts:
                    if isinstance(part, torch.Tensor):
                        part.fill_(chance.randint(1, 99))
            elif how < 0.5:
                setattr(layer, name, helper_of(chance, 3, []))
            elif how < 0.55:
                setattr(layer, name, None)
            elif how < 0.65:
                setattr(layer, name, getattr(layers[0], name, None))


@pytest.mark.parametrize("seed", range(200))
def test_graphs_read_what_helpers_hold_or_the_update_is_an_error(seed: int) -> None:
    chance = random.Random(seed)
    model = torch.nn.Module()
    layers = [Layer() for _ in range(chance.randint(1, 3))]
    for number, layer in enumerate(layers):
        setattr(model, f"layer_{number}", layer)
        layer.seeds = {f"helper_{n}": chance.random() for n in range(chance.randint(1, 3))}
        for name, one in layer.seeds.items():
            setattr(layer, name, helper_of(random.Random(one), 3, []))
    modules = dict(model.named_modules())
    first = Captured(modules)
    graphs = [{p: t.detach() for p, t in first._held_by(layer).items()} for layer in layers]
    for _ in range(5):
        one = Captured(modules)
        try:
            one.look()
            process_randomly(chance, layers)
            if chance.random() < 0.2:
                one.abandon()
                continue
            meant = [
                {path: held.clone() for path, held in one._held_by(layer, graph).items()}
                for layer, graph in zip(layers, graphs, strict=True)
            ]
            for layer in chance.sample(layers, chance.randint(0, len(layers))):
                one.put_back([layer])
            one.put_back()
        except RuntimeError as error:
            assert "cannot be filled anew" in str(error)  # noqa: PT017
            break
        for layer, graph, wanted in zip(layers, graphs, meant, strict=True):
            now = one._held_by(layer, graph)
            for path in wanted.keys() & graph.keys():
                assert torch.equal(graph[path], wanted[path]), path
                assert torch.equal(now[path], wanted[path]), path
