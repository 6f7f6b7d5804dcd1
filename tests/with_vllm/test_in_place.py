"""Layers are loaded and processed where vLLM computes with them, if they have the right form."""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from vllm._custom_ops import create_onednn_mm
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.utils import replace_parameter

from checkpoint_engine.loading.reload import EngineReload, LoaderHabits
from checkpoint_engine.loading.vllm import captured, kernel_memory

SIDE, HALF = 4, 2
LEARNING = 2  # updates
Process = Callable[[torch.nn.Module], None]
Bucket = dict[str, torch.Tensor]


class Method(QuantizeMethodBase):
    def __init__(self, process: Process) -> None:
        self._process = process

    def create_weights(self, layer: torch.nn.Module, *args: Any, **options: Any) -> None:
        pass

    def apply(self, layer: torch.nn.Module, *args: Any, **options: Any) -> torch.Tensor:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self._process(layer)


def load_rows(param: torch.Tensor, tensor: torch.Tensor, half: int) -> None:
    param.data[HALF * half :][:HALF].copy_(tensor)


class Layer(torch.nn.Module):
    def __init__(self, process: Process | None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(SIDE, SIDE), requires_grad=False)
        self.weight.weight_loader = load_rows
        if process is not None:
            self.quant_method = Method(process)


class Model(torch.nn.Module):
    """The halves of its layers: "a.0", "a.1", "b.0" and so on. Layer ``b`` needs no processing."""

    def __init__(self, process: Process | None) -> None:
        super().__init__()
        self.a, self.b = Layer(process), Layer(None)
        layerwise.record_metadata_for_reloading(self)
        for layer in (self.a, self.b):
            if process is not None and hasattr(layer, "quant_method"):
                process(layer)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            layer, _, half = name.partition(".")
            weight = getattr(self, layer).weight
            weight.weight_loader(weight, tensor, int(half) % 2)
            loaded.add(f"{layer}.weight")
        return loaded


class Engine:
    def __init__(self, process: Process | None) -> None:
        self.model = Model(process)
        self._habits: dict[str, LoaderHabits] = {}
        config = SimpleNamespace(dtype=torch.float32, quantization=None)
        self.runner = runner = SimpleNamespace(model=self.model, model_config=config)
        self._worker = SimpleNamespace(device=torch.device("cpu"), model_runner=runner)
        self.made: list[str] = []

    def update(self, buckets: list[Bucket], fails_after: int = 99) -> dict[str, Any]:
        """The memory of every bucket is overwritten after it. ``made``: the layers that have memory
        of their own while they are loaded."""
        names = {layer: name for name, layer in self.model.named_modules()}
        memory = torch.empty(4, SIDE * HALF)
        materialize = layerwise.materialize_layer

        def noted(layer: torch.nn.Module, info: Any) -> None:
            if layer in names and any(one.is_meta for one in layer.parameters(recurse=False)):
                self.made.append(names[layer])
            materialize(layer, info)

        self.made.clear()
        with mock.patch.object(layerwise, "materialize_layer", noted):
            reload = EngineReload(self._worker, self._habits)
            try:
                reload.check()
                for number, bucket in enumerate(buckets):
                    if number == fails_after:
                        raise ConnectionError("the server is gone")
                    weights = []
                    for place, (name, tensor) in zip(memory, bucket.items(), strict=False):
                        one = place[: tensor.numel()].view(tensor.shape).copy_(tensor)
                        weights.append((name, one))
                    del place, one
                    reload.load(weights)
                    memory.fill_(float("nan"))
                reload.finish()
            finally:
                reload.close()
        return dict(reload.summary()["model"])


def halves(step: int) -> Bucket:
    """Of both layers."""
    whole = torch.arange(SIDE * SIDE, dtype=torch.float32).view(SIDE, SIDE) + 100 * step
    return {f"{layer}.{n}": whole[HALF * n :][:HALF] + ord(layer) for layer in "ab" for n in (0, 1)}


def whole(of: Bucket, layer: str) -> torch.Tensor:
    return torch.cat([of[f"{layer}.0"], of[f"{layer}.1"]])


def spread(of: Bucket) -> list[Bucket]:
    """Every layer over two buckets."""
    return [{n: of[n] for n in ("a.0", "b.0")}, {n: of[n] for n in ("b.1", "a.1")}]


# ------------------------------------------------------------------ what leaves everything


def nothing(layer: torch.nn.Module) -> None:
    pass


def the_same_parameter_anew(layer: torch.nn.Module) -> None:
    layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)


def the_same_data(layer: torch.nn.Module) -> None:
    layer.weight.data = layer.weight.data.contiguous()


def shapes_and_logs(layer: torch.nn.Module) -> None:
    layer.rows = layer.weight.shape[0] * layer.weight.element_size()
    logging.getLogger("engine").info("rows: %s", sorted([layer.rows]))
    layer.workspace = torch.zeros(3)


def copies_onto_itself(layer: torch.nn.Module) -> None:
    """As vLLM's method of experts that are not quantised, on GPUs."""
    replace_parameter(layer, "weight", layer.weight.contiguous(), prefer_copy=True)


class Biased(torch.nn.Module):
    """Its layer's bias is put in another order once it is loaded, as Marlin's kernels have it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer(self.process)
        self.layer.bias = torch.nn.Parameter(torch.zeros(SIDE), requires_grad=False)
        self.layer.bias.weight_loader = load_rows
        layerwise.record_metadata_for_reloading(self)
        self.process(self.layer)

    @staticmethod
    def process(layer: torch.nn.Module) -> None:
        layer.bias.data = layer.bias.data.flip(0).clone()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            own, _, half = name.partition(".")
            param = getattr(self.layer, own)
            param.weight_loader(param, tensor, int(half))
            loaded.add(f"layer.{own}")
        return loaded


@pytest.mark.parametrize("first", ["bias", "weight"])
def test_a_bias_that_processing_gives_other_memory_stays_where_it_is(first: str) -> None:
    """CUDA graphs read what is there."""
    engine = Engine(None)
    engine.model = engine.runner.model = Biased()
    bias = engine.model.layer.bias
    address = bias.data_ptr()
    for step in range(1, 5):
        of = {f"weight.{n}": torch.full((HALF, SIDE), 10.0 * step + n) for n in (0, 1)}
        of |= {f"bias.{n}": torch.arange(HALF) + 100.0 * step + HALF * n for n in (0, 1)}
        names = sorted(of, key=lambda name: (not name.startswith(first), name))
        engine.update([{name: of[name] for name in names[at:][:2]} for at in (0, 2)])
        assert engine.model.layer.bias is bias
        assert bias.data_ptr() == address
        assert bias.tolist() == [100.0 * step + n for n in reversed(range(SIDE))]


def test_a_bias_is_put_back_also_where_processing_fails() -> None:
    engine = Engine(None)
    model = engine.model = engine.runner.model = Biased()
    address = model.layer.bias.data_ptr()
    of = {f"weight.{n}": torch.ones(HALF, SIDE) for n in (0, 1)}
    of |= {f"bias.{n}": torch.arange(HALF) + 1.0 + HALF * n for n in (0, 1)}
    engine.update([of])

    def fail(layer: torch.nn.Module) -> None:
        model.process(layer)
        raise torch.OutOfMemoryError("no memory to pack it")

    failing = mock.patch.object(model.layer.quant_method, "_process", fail)
    with failing, pytest.raises(torch.OutOfMemoryError):
        engine.update([of])
    assert model.layer.bias.data_ptr() == address
    engine.update([of])
    assert model.layer.bias.data_ptr() == address
    assert model.layer.bias.tolist() == [4.0, 3.0, 2.0, 1.0]


@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_that_are_in_no_checkpoint_stay_as_they_are(persistent: bool) -> None:
    """As the places of vLLM's CLIP, beside the parameter that is looked up by them."""
    engine = Engine(None)
    engine.model.a.register_buffer("places", torch.arange(5), persistent=persistent)
    layerwise.record_metadata_for_reloading(engine.model)
    for step in range(LEARNING + 2):
        before = addresses(engine.model)
        engine.update(spread(halves(step)))
        assert torch.equal(engine.model.a.weight, whole(halves(step), "a"))
        assert engine.model.a.places.tolist() == list(range(5))
        assert addresses(engine.model) == before
        assert engine.made == []


@pytest.mark.parametrize(
    "process",
    [
        None,
        nothing,
        the_same_parameter_anew,
        the_same_data,
        shapes_and_logs,
        copies_onto_itself,
    ],
)
def test_a_layer_that_is_left_as_it_is_loaded(process: Process | None) -> None:
    engine = Engine(process)
    for step in range(LEARNING + 3):
        before = addresses(engine.model)
        report = engine.update(spread(halves(step)))
        for layer in ("a", "b"):
            assert torch.equal(getattr(engine.model, layer).weight, whole(halves(step), layer))
        assert addresses(engine.model) == before
        assert (report["replay"]["loaded"] == "replayed") == (step >= LEARNING)
        assert engine.made == []
        assert report["held_bytes"] == 0
        assert report["missing"] == report["partial"] == []


def addresses(model: Model) -> list[int]:
    return [one.data_ptr() for one in model.parameters()]


# ------------------------------------------------------------------ what processes


def moves(layer: torch.nn.Module) -> None:
    layer.weight.data.copy_(layer.weight.data.t().clone())


def computes(layer: torch.nn.Module) -> None:
    layer.seen = layer.weight.max()


def computes_by_a_method(layer: torch.nn.Module) -> None:
    layer.seen = layer.weight.data.sum().item()


def keeps(layer: torch.nn.Module) -> None:
    layer.seen = [layer.weight.data]


def keeps_in_a_function(layer: torch.nn.Module) -> None:
    weight = layer.weight
    layer.seen = lambda: weight


def goes_by_the_address(layer: torch.nn.Module) -> None:
    ctypes.memset(layer.weight.data_ptr(), 0, 4)


def goes_by_numpy(layer: torch.nn.Module) -> None:
    layer.weight.numpy()[0, 0] = 7


def goes_by_the_storage(layer: torch.nn.Module) -> None:
    layer.weight.untyped_storage()[0] = 3


def lists(layer: torch.nn.Module) -> None:
    layer.seen = layer.weight.tolist()


def lists_by_a_function(layer: torch.nn.Module) -> None:
    layer.seen = list(map(torch.Tensor.tolist, [layer.weight]))


def packs(layer: torch.nn.Module) -> None:
    """By an operation of vLLM's that torch's dispatcher takes for one that is made of others."""
    layer.packed = create_onednn_mm(layer.weight.t(), 32)


def saves(layer: torch.nn.Module) -> None:
    layer.seen = layer.weight.__reduce_ex__(2)


def another_memory(layer: torch.nn.Module) -> None:
    layer.weight = torch.nn.Parameter(layer.weight.data.clone(), requires_grad=False)


def another_form(layer: torch.nn.Module) -> None:
    layer.weight.data = layer.weight.data.t()


@pytest.mark.parametrize(
    "process",
    [
        moves,
        computes,
        computes_by_a_method,
        keeps,
        keeps_in_a_function,
        goes_by_the_address,
        goes_by_numpy,
        goes_by_the_storage,
        lists,
        lists_by_a_function,
        packs,
        saves,
        another_memory,
        another_form,
    ],
)
def test_a_layer_that_is_processed_goes_through_that_in_every_update(process: Process) -> None:
    """Everything is as after a start from the same weights."""
    engine, fresh = Engine(process), Layer(process)
    for step in range(LEARNING + 3):
        before = addresses(engine.model)
        engine.update(spread(halves(step)))
        with torch.no_grad():
            fresh.weight = torch.nn.Parameter(whole(halves(step), "a"), requires_grad=False)
        process(fresh)
        assert torch.equal(engine.model.a.weight, fresh.weight)
        assert addresses(engine.model) == before
        assert set(engine.made) == ({"a"} if process is another_form else set())
        if process in (computes, computes_by_a_method, lists, lists_by_a_function):
            assert str(engine.model.a.seen) == str(fresh.seen)


@pytest.mark.parametrize("reads", [True, False])
def test_a_layer_whose_processing_has_to_do_with_another(reads: bool) -> None:
    def derives(layer: torch.nn.Module) -> None:
        if of and reads:
            layer.seen = of[0].weight.sum().item()
        elif of:
            of[0].weight.mul_(2)

    of: list[torch.nn.Module] = []
    engine = Engine(derives)
    of.append(engine.model.b)
    for step in range(LEARNING + 3):
        new = halves(step)
        engine.update([{n: new[n]} for n in ("b.0", "b.1", "a.0", "a.1")])
        if reads:
            assert engine.model.a.seen == whole(new, "b").sum().item()
        assert torch.equal(engine.model.b.weight, whole(new, "b") * (1 if reads else 2))


def loading_beside(engine: Engine, name: str, load: Callable[[torch.Tensor], None]) -> None:
    """The model's loader takes this tensor of the checkpoint elsewhere."""
    load_weights = engine.model.load_weights

    def load_all(weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        rest = []
        for own, tensor in weights:
            if own == name:
                load(tensor)
            else:
                rest.append((own, tensor))
        return load_weights(rest)

    engine.model.load_weights = load_all  # type: ignore[method-assign]


def test_two_tensors_that_processing_exchanges() -> None:
    """Each is in the other's place when vLLM copies them."""

    def exchanges(layer: torch.nn.Module) -> None:
        layer.weight.data, layer.other.data = layer.other.data, layer.weight.data

    engine = Engine(None)
    layer = engine.model.a
    layer.weight.data = torch.zeros(HALF, SIDE)
    layer.other = torch.nn.Parameter(torch.zeros(HALF, SIDE), requires_grad=False)
    layer.other.weight_loader = load_rows
    layer.quant_method = Method(exchanges)
    layerwise.record_metadata_for_reloading(engine.model)
    loading_beside(engine, "a.1", lambda one: layer.other.weight_loader(layer.other, one, 0))
    for step in range(LEARNING + 3):
        new = halves(step)
        engine.update(spread(new))
        assert torch.equal(layer.weight, new["a.1"])
        assert torch.equal(layer.other, new["a.0"])
        assert engine.made == []


def test_what_is_not_loaded_of_a_layer_is_zero() -> None:
    """As padding at a start. Processing has moved weights to where there is none by then."""
    engine = Engine(turns)
    for step in range(LEARNING + 3):
        new = halves(step)
        del new["a.1"]
        report = engine.update([{n: new[n]} for n in new])
        assert report["partial"] == ["a"]
        assert torch.equal(engine.model.a.weight[HALF:], new["a.0"].flip(0))
        assert (engine.model.a.weight[:HALF] == 0).all()
    engine.update(spread(halves(7)))
    assert torch.equal(engine.model.a.weight, whole(halves(7), "a").flip(0))


def turns(layer: torch.nn.Module) -> None:
    layer.weight.data.copy_(layer.weight.data.flip(0))


def test_a_parameter_that_a_drafter_has_as_well() -> None:
    """Both load it, bucket by bucket, and process it where it is."""
    engine, drafter = Engine(turns), Model(turns)
    drafter.a.weight = engine.model.a.weight
    engine.runner.drafter = SimpleNamespace(model=drafter)
    for step in range(LEARNING + 3):
        new = halves(step)
        engine.update(spread(new))
        for model in (engine.model, drafter):
            assert torch.equal(model.a.weight, whole(new, "a").flip(0))
            assert torch.equal(model.b.weight, whole(new, "b"))


def share(model: Model) -> None:
    model.a.weight = model.b.weight


def keep_a_view(model: Model) -> None:
    model.a.rows = model.a.weight.data[:HALF]


def lie_in_larger_memory(model: Model) -> None:
    larger = torch.full((3 * SIDE, SIDE), 7.0)
    model.a.weight.data = larger[SIDE : 2 * SIDE]


@pytest.mark.parametrize("arrange", [share, keep_a_view, lie_in_larger_memory])
def test_memory_that_is_not_a_tensors_alone_is_not_lent(arrange: Callable[[Model], None]) -> None:
    engine = Engine(nothing)
    arrange(engine.model)
    around = engine.model.a.weight.untyped_storage()
    for step in range(LEARNING + 3):
        new = halves(step)
        if arrange is share:
            new |= {f"a.{n}": new[f"b.{n}"] for n in (0, 1)}
        engine.update(spread(new))
        for layer in ("a", "b"):
            assert torch.equal(getattr(engine.model, layer).weight, whole(new, layer))
        if arrange is keep_a_view:
            assert torch.equal(engine.model.a.rows, new["a.0"])
        if arrange is lie_in_larger_memory:
            larger = torch.empty(0).set_(around).view(3 * SIDE, SIDE)
            assert (larger[:SIDE] == 7).all()
            assert (larger[2 * SIDE :] == 7).all()
        assert "a" in engine.made


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_that_is_loaded(persistent: bool) -> None:
    """vLLM knows loaded buffers by the calls that it keeps."""
    engine = Engine(nothing)
    layer = engine.model.a
    layer.register_buffer("scale", torch.zeros(2), persistent=persistent)
    layerwise.record_metadata_for_reloading(engine.model)
    loading_beside(engine, "scale", lambda one: layer.scale.weight_loader(layer.scale, one))
    for step in range(LEARNING + 3):
        new, scale = halves(step), torch.full((2,), float(step))
        for buckets in ([*spread(new), {"scale": scale}], [{"scale": scale}, *spread(new)]):
            engine.update(buckets)
            assert torch.equal(layer.scale, scale)
            assert torch.equal(layer.weight, whole(new, "a"))


# ------------------------------------------------------------------ when it does not go on


def learned() -> Engine:
    engine = Engine(nothing)
    for step in range(LEARNING + 1):
        engine.update(spread(halves(step)))
    assert engine.made == []
    return engine


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_checkpoint_that_changes_on_its_way_is_loaded_by_the_engine(first: int) -> None:
    """``first``: the bucket in which a name comes that was never there."""
    engine, new = learned(), halves(7)
    buckets = [{n: new[n]} for n in ("a.0", "b.0", "b.1", "a.1")]
    (name,) = buckets[first]
    renamed = name.replace(".", ".1")  # "a.10" is the first half as well
    renamed = renamed if name.endswith("0") else name.replace(".1", ".11")
    buckets[first] = {renamed: new[name]}
    report = engine.update(buckets)
    assert report["missing"] == report["partial"] == []
    for _ in range(LEARNING + 2):
        for layer in ("a", "b"):
            assert torch.equal(getattr(engine.model, layer).weight, whole(new, layer))
        engine.update(buckets)


@pytest.mark.parametrize("number", [0, 1])
def test_after_a_failure_the_next_update_is_right(number: int) -> None:
    engine = learned()
    with pytest.raises(ConnectionError):
        engine.update(spread(halves(8)), fails_after=number)
    for step in (9, 10):
        engine.update(spread(halves(step)))
        assert engine.made == []
        for layer in ("a", "b"):
            assert torch.equal(getattr(engine.model, layer).weight, whole(halves(step), layer))


def test_a_part_that_does_not_come_is_reported() -> None:
    engine, new = learned(), halves(5)
    del new["b.1"]
    report = engine.update([{n: new[n]} for n in new])
    assert report["partial"] == ["b"]
    del new["b.0"]
    with pytest.raises(ValueError, match=r"lacks 1 parameters .*\['b\.weight'\]"):
        engine.update([{n: new[n]} for n in new])
    engine.update(spread(halves(6)))
    for layer in ("a", "b"):
        assert torch.equal(getattr(engine.model, layer).weight, whole(halves(6), layer))


def test_memory_that_moved_between_updates_is_found_again() -> None:
    engine = learned()
    engine.model.a.weight.data = engine.model.a.weight.data.clone()
    engine.update(spread(halves(6)))
    for layer in ("a", "b"):
        assert torch.equal(getattr(engine.model, layer).weight, whole(halves(6), layer))


def test_a_bucket_that_is_checked_goes_through_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_REPLAY_CHECK", "2")
    engine = learned()
    for step in range(3, 9):
        engine.update(spread(halves(step)))
        for layer in ("a", "b"):
            assert torch.equal(getattr(engine.model, layer).weight, whole(halves(step), layer))


# ------------------------------------------------------------------ what graphs have captured


class Kernel:
    def __init__(self, layer: torch.nn.Module) -> None:
        self.workspace = torch.zeros(3)
        self.scale = layer.weight.data.sum().reshape(1)


def makes_a_kernel(layer: torch.nn.Module) -> None:
    """As Marlin's do, and those for experts."""
    layer.quant_method.kernel = Kernel(layer)


def with_graphs() -> Any:
    """Of an engine on a GPU: tensors of CPUs stand for its."""
    patches = contextlib.ExitStack()
    patches.enter_context(mock.patch.object(kernel_memory, "has_graphs", return_value=True))
    is_one = mock.patch.object(captured, "_may_be_captured", lambda tensor: not tensor.is_meta)
    patches.enter_context(is_one)
    return patches


@pytest.mark.parametrize("spreads", [True, False])
def test_what_a_kernel_holds_is_filled_where_graphs_have_captured_it(spreads: bool) -> None:
    engine = Engine(makes_a_kernel)
    kernel = engine.model.a.quant_method.kernel
    places = kernel.workspace.data_ptr(), kernel.scale.data_ptr()
    del kernel
    with with_graphs():
        for step in range(1, 6):
            of = halves(step)
            report = engine.update(spread(of) if spreads else [of])
            kernel = engine.model.a.quant_method.kernel
            assert (kernel.workspace.data_ptr(), kernel.scale.data_ptr()) == places
            assert kernel.scale.item() == whole(of, "a").sum().item()
    assert report["replay"]["loaded"] == "replayed"


def test_an_update_that_fails_leaves_what_graphs_have_captured_where_it_is() -> None:
    engine = Engine(makes_a_kernel)
    model = engine.model
    place = model.a.quant_method.kernel.workspace.data_ptr()

    def fail(layer: torch.nn.Module) -> None:
        makes_a_kernel(layer)
        raise torch.OutOfMemoryError("no memory to pack it")

    with with_graphs():
        failing = mock.patch.object(model.a.quant_method, "_process", fail)
        with failing, pytest.raises(torch.OutOfMemoryError):
            engine.update([halves(1)])
        assert model.a.quant_method.kernel.workspace.data_ptr() == place
        engine.update([halves(2)])
        kernel = model.a.quant_method.kernel
        assert kernel.workspace.data_ptr() == place
        assert kernel.scale.item() == whole(halves(2), "a").sum().item()


def test_a_kernel_of_another_form_fails_this_update_and_later_ones() -> None:
    engine = Engine(makes_a_kernel)

    def other(layer: torch.nn.Module) -> None:
        makes_a_kernel(layer)
        layer.quant_method.kernel.workspace = torch.zeros(4)

    with with_graphs():
        with (
            mock.patch.object(engine.model.a.quant_method, "_process", other),
            pytest.raises(RuntimeError, match=r"'a' held.*quant_method\.kernel\.workspace is"),
        ):
            engine.update([halves(1)])
        with pytest.raises(RuntimeError, match="Start the engine with the new weights"):
            engine.update([halves(2)])


def test_an_engine_without_graphs_keeps_what_processing_made() -> None:
    engine = Engine(makes_a_kernel)
    for step in (1, 2, 3):
        before = engine.model.a.quant_method.kernel
        engine.update([halves(step)])
        assert engine.model.a.quant_method.kernel is not before


def test_attention_which_vllm_processes_last_of_all_is_filled_too() -> None:
    """MLA keeps what it made of ``kv_b_proj``; vLLM up to 0.25 makes it anew."""
    from vllm.model_executor.layers.attention import Attention

    class Mla(Attention):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
            self.absorbed = engine.model.a.weight.data.transpose(0, 1).contiguous()

    engine = Engine(nothing)
    engine.model.mla = Mla()
    layerwise.record_metadata_for_reloading(engine.model)
    engine.model.mla.process_weights_after_loading(torch.float32)
    place = engine.model.mla.absorbed.data_ptr()
    with with_graphs():
        for step in range(1, 5):
            engine.update([halves(step)])
            assert engine.model.mla.absorbed.data_ptr() == place
            assert torch.equal(engine.model.mla.absorbed, whole(halves(step), "a").t())
