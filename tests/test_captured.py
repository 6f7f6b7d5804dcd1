"""What CUDA graphs may have captured stays where it is, whatever processing makes anew."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock
from weakref import ref

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
    return torch.full((3,), number)


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


def test_one_way_to_a_tensor_that_is_gone_leaves_the_other() -> None:
    """A forward pass may have noted a helper somewhere else, too."""
    model = model_with(Kernel(workspace=made(0)))
    model.layer.aaa_noted = model.layer.helper
    address = model.layer.helper.workspace.data_ptr()

    def process(layer: Any) -> None:
        del layer.aaa_noted
        layer.helper = Kernel(workspace=made(5))

    update(model, process)
    assert model.layer.helper.workspace.data_ptr() == address
    assert model.layer.helper.workspace.tolist() == [5] * 3


def test_what_a_forward_pass_made_lives_on_once() -> None:
    model = model_with(Kernel(workspace=made(0)))
    scratch = [torch.zeros(9), torch.zeros(9)]
    alive = [ref(one) for one in scratch]

    def process(layer: Any) -> None:
        layer.helper = Kernel(workspace=made(1))

    for _ in range(2):  # the second was made after the graphs
        model.layer.helper.scratch = scratch.pop(0)
        update(model, process)
        gc.collect()
    update(model, process)
    gc.collect()
    assert [one() is not None for one in alive] == [True, False]


@pytest.mark.parametrize("other", [torch.zeros(4), torch.zeros(3, dtype=torch.int32)])
def test_another_form_is_an_error_until_the_engine_starts_anew(other: torch.Tensor) -> None:
    model = model_with(Kernel(workspace=made(0)))

    def process(layer: Any) -> None:
        layer.helper = Kernel(workspace=other)

    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"layer\.helper\.workspace anew"):
            update(model, process)
    with pytest.raises(RuntimeError, match="enforce_eager"):
        update(model, lambda _: None)
    update(model_with(Kernel(workspace=made(0))), lambda _: None)  # another engine's


def test_what_nothing_can_replace_is_an_error() -> None:
    model = model_with(partial(print, made(0)))

    def process(layer: Any) -> None:
        vars(layer)["helper"] = partial(print, made(1))

    with pytest.raises(RuntimeError, match=r"layer\.helper\.args\.0 anew"):
        update(model, process)


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
    assert model.layer.helper.workspace is workspace
    assert workspace.tolist() == [6] * 3


class Layer(torch.nn.Module):
    """No module of torch's."""


def paths_of(helper: Any) -> list[tuple[Any, ...]]:
    """By which ways what it holds is found."""
    layer = Layer()
    vars(layer)["helper"] = helper
    one = Captured({"layer": layer})
    one.look()
    return list(one._before[layer])


def test_the_models_own_layers_are_no_helpers() -> None:
    model, layer = Layer(), Layer()
    model.layer, model.here = layer, made(0)
    layer.back = SimpleNamespace(models=[model], layer=layer)
    layer.here = made(1)
    one = Captured(dict(model.named_modules()))
    one.look()
    held = {layer: list(held) for layer, held in one._before.items()}
    assert held == {model: [("here",)], layer: [("here",)]}


def test_what_leads_to_itself_is_looked_at_once_and_what_is_there_twice_twice() -> None:
    kernel = Kernel(workspace=made(0))
    kernel.more = {"back": [kernel]}
    assert paths_of([kernel, kernel]) == [
        ("helper", 0, "workspace"),
        ("helper", 1, "workspace"),
    ]


def test_what_is_deep_is_found_and_what_is_deeper_is_not_looked_for() -> None:
    helper: Any = made(0)
    for _ in range(captured._DEEPEST):
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
