"""vLLM's layerwise reload itself, without an engine: loaders that do not go by weight_loader."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import layerwise

from checkpoint_engine.loading.reload import EngineReload, LoaderHabits

SIDE = 4
Load = Callable[[torch.nn.Module, int, torch.Tensor], Any]


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(shape), requires_grad=False)


class Transposing(QuantizeMethodBase):
    """What the engine computes with is the transpose: to process a layer twice undoes it."""

    def create_weights(self, layer: torch.nn.Module, *args: Any, **options: Any) -> None:
        pass

    def apply(self, layer: torch.nn.Module, *args: Any, **options: Any) -> torch.Tensor:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.weight.data.copy_(layer.weight.data.t().clone())


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = parameter(SIDE, SIDE)
        self.quant_method = Transposing()


class Model(torch.nn.Module):
    """``load`` takes half ``number`` of the layer's rows."""

    def __init__(self, load: Load) -> None:
        super().__init__()
        self.layer, self.other = Layer(), torch.nn.Linear(2, 2, bias=False)
        self.other.weight.requires_grad_(False)
        self._load = load
        layerwise.record_metadata_for_reloading(self)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        for name, tensor in weights:
            if name == "other":
                self.other.weight.weight_loader(self.other.weight, tensor)
            else:
                self._load(self.layer, int(name), tensor)
        return {"layer.weight", "other.weight"}


def update(model: Any, habits: dict[str, LoaderHabits], buckets: list[dict[str, Any]]) -> Any:
    """The memory of every bucket is overwritten after it."""
    config = SimpleNamespace(dtype=torch.float32, quantization=None)
    runner = SimpleNamespace(model=model, model_config=config)
    reload = EngineReload(SimpleNamespace(device=torch.device("cpu"), model_runner=runner), habits)
    memory = torch.empty(9, 16)
    try:
        reload.check()
        for bucket in buckets:
            weights = []
            for place, (name, tensor) in zip(memory, bucket.items(), strict=False):
                weights.append((name, place[: tensor.numel()].view(tensor.shape).copy_(tensor)))
            del place
            reload.load(weights)
            memory.fill_(float("nan"))
        reload.finish()
    finally:
        reload.close()
    return reload.summary()["model"]


def rows(layer: torch.nn.Module, half: int) -> torch.Tensor:
    return layer.weight.data[2 * half : 2 * half + 2]


def copied(layer: torch.nn.Module, half: int, tensor: torch.Tensor) -> None:
    rows(layer, half).copy_(tensor)


def copied_twice(layer: torch.nn.Module, half: int, tensor: torch.Tensor) -> None:
    for row, values in zip(rows(layer, half), tensor, strict=True):
        row.copy_(values)
    rows(layer, half).copy_(tensor)


def over_zeros(layer: torch.nn.Module, half: int, tensor: torch.Tensor) -> None:
    if half == 0:
        layer.weight.data.zero_()
    rows(layer, half).copy_(tensor)


def by_index(layer: torch.nn.Module, half: int, tensor: torch.Tensor) -> None:
    layer.weight.data[torch.tensor([2 * half, 2 * half + 1])] = tensor


def many_at_once(layer: torch.nn.Module, half: int, tensor: torch.Tensor) -> None:
    torch._foreach_copy_([rows(layer, half)], [tensor])


@pytest.mark.parametrize("load", [copied, copied_twice, over_zeros, by_index, many_at_once])
def test_what_a_loader_writes_by_itself_is_not_lost(load: Load) -> None:
    model, habits = Model(load), dict[str, LoaderHabits]()
    for step in range(4):
        whole = torch.arange(16.0).view(SIDE, SIDE) + 100 * step
        other = torch.full((2, 2), float(step))
        buckets = [{"0": whole[:2]}, {"other": other}, {"1": whole[2:]}]
        assert update(model, habits, buckets)["missing"] == []
        assert torch.equal(model.layer.weight, whole.t())
        assert torch.equal(model.other.weight, other)


def test_a_part_that_a_loader_leaves_of_a_layer_is_an_error() -> None:
    """It would be memory that nobody initialised."""
    model, habits = Model(copied), dict[str, LoaderHabits]()
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"writes a part of layer: .*start the engine"):
            update(model, habits, [{"0": torch.ones(2, SIDE)}, {"other": torch.ones(2, 2)}])


def test_what_a_loader_does_not_name_is_missing_only_where_nothing_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As that of experts through release 0.31, whose layers are loaded once they are whole."""
    monkeypatch.setenv("PS_REPLAY", "off")
    model = Model(copied)

    def load_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        for name, tensor in weights:
            weight = model.get_submodule(name).weight
            weight.weight_loader(weight, tensor)
        return set()

    model.load_weights = load_weights  # type: ignore[method-assign]
    bucket = {"layer": torch.ones(SIDE, SIDE), "other": torch.ones(2, 2)}
    assert update(model, {}, [bucket])["missing"] == []
    del bucket["layer"]
    assert update(model, {}, [bucket])["missing"] == ["layer.weight"]


def replaced(layer: torch.nn.Module, half: int, tensor: torch.Tensor) -> None:
    layer.weight = torch.nn.Parameter(tensor.clone(), requires_grad=False)


def loaded_and_replaced(layer: torch.nn.Module, half: int, tensor: torch.Tensor) -> None:
    layer.weight.weight_loader(layer.weight, tensor)
    replaced(layer, half, tensor)


@pytest.mark.parametrize("load", [replaced, loaded_and_replaced])
def test_a_parameter_that_a_loader_replaces_is_an_error(load: Load) -> None:
    """vLLM would put the old one back."""
    model = Model(load)
    model.layer.bias = parameter(2)  # so that the layer waits
    layerwise.record_metadata_for_reloading(model)
    with pytest.raises(RuntimeError, match=r"replaces layer\.weight: .*start the engine"):
        update(model, {}, [{"0": torch.ones(SIDE, SIDE)}])


def load_rows(param: torch.Tensor, tensor: torch.Tensor, half: int) -> None:
    param.data[2 * half : 2 * half + 2].copy_(tensor)


def test_a_layer_that_gets_a_parameter_while_it_is_loaded_waits_for_that() -> None:
    def load(layer: torch.nn.Module, number: int, tensor: torch.Tensor) -> None:
        if number < 2:
            layer.weight.weight_loader(layer.weight, tensor, number)
        if "late" not in layer._parameters:
            layer.late = parameter(SIDE, SIDE)
            layer.late.weight_loader = lambda param, tensor: param.data.copy_(tensor)
        if number == 2:
            layer.late.weight_loader(layer.late, tensor)

    model, habits = Model(load), dict[str, LoaderHabits]()
    model.layer.weight.weight_loader = load_rows
    layerwise.record_metadata_for_reloading(model)
    model.layer.late = parameter(SIDE, SIDE)  # as a start has left it
    for step in range(4):
        whole = torch.arange(16.0).view(SIDE, SIDE) + 100 * step
        update(model, habits, [{"0": whole[:2], "1": whole[2:]}, {"2": whole + 1}])
        assert torch.equal(model.layer.weight, whole.t())
        assert torch.equal(model.layer.late, whole + 1)


def test_a_tensor_that_vllm_neither_restores_nor_counts_is_not_counted() -> None:
    """The correction bias of a router is a parameter of the experts, too. Counted there, it would
    have them processed before they are complete, or twice."""

    def load(layer: torch.nn.Module, number: int, tensor: torch.Tensor) -> None:
        if number == 2:
            layer.e_score_correction_bias.data.copy_(tensor)
        else:
            layer.weight.weight_loader(layer.weight, tensor, number)

    model = Model(load)
    model.layer.weight.weight_loader = load_rows
    model.layer.e_score_correction_bias = parameter(8)
    layerwise.record_metadata_for_reloading(model)
    habits: dict[str, LoaderHabits] = {}
    for step in range(4):
        whole, bias = torch.arange(16.0).view(SIDE, SIDE) + step, torch.full((8,), float(step))
        for buckets in (
            [{"2": bias, "0": whole[:2], "1": whole[2:]}],
            [{"2": bias}, {"0": whole[:2]}, {"1": whole[2:]}],
        ):
            update(model, habits, buckets)
            assert torch.equal(model.layer.weight, whole.t())
            assert torch.equal(model.layer.e_score_correction_bias, bias)


class Mixer(torch.nn.Module):
    """Keeps a view of its convolution's weight, as Mamba's do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Layer()
        self.register_buffer("flat", self.conv.weight.data.view(-1), persistent=False)
        self.register_buffer("steps", torch.zeros(3), persistent=False)
        layerwise.record_metadata_for_reloading(self)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        for _, tensor in weights:
            self.conv.weight.weight_loader(self.conv.weight, tensor)
        return {"conv.weight"}


def test_a_view_that_the_engine_parts_from_its_weight_is_refused() -> None:
    """vLLM repacks the weights of convolutions on CPUs: nothing fills the view any more."""
    model, habits = Mixer(), dict[str, LoaderHabits]()
    for step in range(3):
        whole = torch.arange(16.0).view(SIDE, SIDE) + step
        update(model, habits, [{"conv": whole}])
        assert torch.equal(model.flat, whole.t().reshape(-1))
    model.conv.weight.data = model.conv.weight.data.clone()
    with pytest.raises(RuntimeError, match=r"flat, which was a view of conv\.weight until"):
        update(model, habits, [{"conv": whole + 1}])
    assert torch.equal(model.conv.weight, whole.t())


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_that_is_a_view_of_a_parameter_does_not_bring_old_weights_back(
    persistent: bool,
) -> None:
    model, habits = Mixer(), dict[str, LoaderHabits]()
    view = model.conv.weight.data.view(-1)
    model.conv.register_buffer("flat", view, persistent=persistent)
    layerwise.record_metadata_for_reloading(model)
    for step in range(4):
        whole = torch.arange(16.0).view(SIDE, SIDE) + 100 * step
        update(model, habits, [{"conv": whole}])
        assert torch.equal(model.conv.weight, whole.t())
        assert torch.equal(model.conv.flat, whole.t().reshape(-1))


PARTS = 12


class Parts(torch.nn.Module):
    """A layer of many parameters, which the engine has in another form. After each vLLM is asked
    what waits, as it asks itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.ParameterDict({str(n): parameter(2) for n in range(PARTS)})
        self.answers: list[int] = []
        layerwise.record_metadata_for_reloading(self)
        for one in self.layer.values():
            one.data = torch.zeros(4)[::2]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            target = self.layer[name]
            getattr(target, "weight_loader")(target, tensor)  # noqa: B009  # vLLM's, while it waits
            self.answers.append(layerwise.get_info_size(layerwise.get_layerwise_info(self.layer)))
            loaded.add(f"layer.{name}")
        return loaded


def test_what_waits_for_memory_is_summed_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []

    def size(info: Any) -> int:
        looked_at.append(len(info.loaded_weights))
        return 10 * len(info.loaded_weights)

    monkeypatch.setattr(layerwise, "get_info_size", size)
    model, habits = Parts(), dict[str, LoaderHabits]()
    for step in range(3):
        model.answers.clear()
        looked_at.clear()
        tensors = {str(n): torch.full((2,), float(step + n)) for n in range(PARTS)}
        names = list(tensors)
        buckets = [{n: tensors[n] for n in names[at : at + 3]} for at in range(0, PARTS, 3)]
        update(model, habits, buckets)
        if step < 2:  # what is learned is replayed, and nobody asks
            assert model.answers == [10, 20, 30] * (PARTS // 3 - 1) + [10, 20, 0]
            assert sum(looked_at) == PARTS - 1
        assert all(torch.equal(model.layer[name], one) for name, one in tensors.items())
    assert layerwise.get_info_size is size


def test_the_model_of_another_engine_is_not_processed_by_vllm() -> None:
    """Its worker has no configuration of a model, which vLLM's step goes by."""
    model = torch.nn.Linear(SIDE, SIDE, bias=False).requires_grad_(False)
    model.load_weights = lambda weights: [model.weight.copy_(one) for _, one in weights]
    runner = SimpleNamespace(model=model)
    reload = EngineReload(SimpleNamespace(device=torch.device("cpu"), model_runner=runner), {})
    reload.check()
    reload.load([("weight", torch.ones(SIDE, SIDE))])
    reload.finish()
    reload.close()
    assert torch.equal(model.weight, torch.ones(SIDE, SIDE))


class Stacked(torch.nn.Module):
    """Experts in one parameter, whose loader is called as vLLM's models do, and notes each call."""

    def __init__(self, by_name: bool, experts: int = 3) -> None:
        super().__init__()
        self.layer = torch.nn.Module()
        self.layer.weight, self.layer.scale = parameter(experts, 2, SIDE), parameter(experts)
        self.by_name, self.places, self.calls = by_name, dict[int, Any](), 0
        for one in (self.layer.weight, self.layer.scale):
            one.weight_loader = self.load_one  # type: ignore[attr-defined]
        layerwise.record_metadata_for_reloading(self)

    def load_one(self, param: torch.Tensor, loaded_weight: torch.Tensor, expert: int) -> bool:
        self.calls += 1
        if expert >= len(param):
            return False
        param.data[expert].copy_(loaded_weight)
        return True

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        parameters, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            expert, _, kind = name.partition(".")
            param: Any = parameters[f"layer.{kind}"]
            if self.by_name:
                is_loaded = param.weight_loader(
                    param=param, loaded_weight=tensor, expert=int(expert)
                )
            else:
                is_loaded = param.weight_loader(param, tensor, int(expert))
            if is_loaded:
                loaded.add(f"layer.{kind}")
        return loaded


def experts(step: int, count: int) -> dict[str, torch.Tensor]:
    return {
        f"{n}.{kind}": torch.full(shape, 10.0 * step + n)
        for n in range(count)
        for kind, shape in (("weight", (2, SIDE)), ("scale", ()))
    }


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("replay", ["on", "off"])
def test_the_loader_of_a_layer_in_place_is_called_once_for_each_tensor(
    monkeypatch: pytest.MonkeyPatch, by_name: bool, replay: str
) -> None:
    """Also for those of other ranks' experts, which load nothing."""
    monkeypatch.setenv("PS_REPLAY", replay)
    model, habits = Stacked(by_name), dict[str, LoaderHabits]()
    weight, scale = model.layer.weight, model.layer.scale
    loaders = weight.weight_loader, scale.weight_loader
    for step in range(4):
        tensors, model.calls = experts(step, count=5), 0
        names = list(tensors)
        report = update(
            model, habits, [{n: tensors[n] for n in names[at : at + 2]} for at in range(0, 10, 2)]
        )
        assert (report["held_bytes"], report["missing"]) == (0, [])
        assert model.calls == (10 if replay == "off" or step < 2 else 0)
        assert model.layer.weight is weight
        assert model.layer.scale is scale
        assert (weight.weight_loader, scale.weight_loader) == loaders
        for n in range(3):
            assert (weight[n] == 10.0 * step + n).all()
            assert scale[n] == 10.0 * step + n


def test_nothing_of_an_update_keeps_the_layers() -> None:
    """Without the collector, which may not come for long."""
    model, habits = Stacked(by_name=False), dict[str, LoaderHabits]()
    storage = model.layer.weight.untyped_storage()
    before = torch._C._storage_Use_Count(storage._cdata)
    gc.disable()
    try:
        for step in range(2):
            update(model, habits, [experts(step, count=3)])
            assert torch._C._storage_Use_Count(storage._cdata) == before
        with pytest.raises(KeyError):
            update(model, habits, [experts(0, count=1), {"0.unknown": torch.ones(1)}])
        assert torch._C._storage_Use_Count(storage._cdata) == before
    finally:
        gc.enable()


class Pair(torch.nn.Module):
    """Two layers that are processed, with a parameter of its own name in each; ``call`` has the
    loader of a parameter load a tensor into it."""

    def __init__(self, shared: bool = False, call: Any = None) -> None:
        super().__init__()
        self.a, self.b = Layer(), Layer()
        self.call = call or (lambda model, param, *args: param.weight_loader(param, *args))
        for layer in (self.a, self.b):
            layer.weight.weight_loader = load_rows
            layer.bias = self.a.bias if shared and layer is self.b else parameter(8)
            layer.bias.weight_loader = lambda param, tensor: param.data.copy_(tensor)
        layerwise.record_metadata_for_reloading(self)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            layer, kind, *half = name.split(".")
            self.call(self, getattr(self.get_submodule(layer), kind), tensor, *map(int, half))
            loaded.add(f"{layer}.{kind}")
        return loaded

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        found = {}
        for n, layer in enumerate("ab"):
            whole = torch.arange(16.0).view(SIDE, SIDE) + 100 * step + 1000 * n
            found |= {f"{layer}.weight.0": whole[:2], f"{layer}.weight.1": whole[2:]}
            found[f"{layer}.bias"] = torch.full((8,), 10.0 * step + n)
        if self.a.bias is self.b.bias:
            found["b.bias"] = found["a.bias"]
        return found

    def holds(self, tensors: dict[str, torch.Tensor]) -> bool:
        return all(
            torch.equal(
                self.get_parameter(f"{layer}.weight").t(),
                torch.cat([tensors[f"{layer}.weight.{half}"] for half in (0, 1)]),
            )
            and torch.equal(self.get_parameter(f"{layer}.bias"), tensors[f"{layer}.bias"])
            for layer in "ab"
        )


NATURAL = ["a.weight.0", "a.weight.1", "a.bias", "b.bias", "b.weight.0", "b.weight.1"]
LATE = ["b.bias", "a.weight.1", "a.bias", "a.weight.0", "b.weight.1", "b.weight.0"]


@pytest.mark.parametrize("replay", ["on", "off"])
@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("names", [NATURAL, LATE])
@pytest.mark.parametrize("shared", [True, False])
def test_layers_are_processed_when_they_are_complete_whoever_shares_a_parameter(
    monkeypatch: pytest.MonkeyPatch, replay: str, cut: int, names: list[str], shared: bool
) -> None:
    monkeypatch.setenv("PS_REPLAY", replay)
    model, habits = Pair(shared), dict[str, LoaderHabits]()
    for step in range(4):
        tensors = model.tensors(step)
        cuts = range(0, len(names), cut)
        update(model, habits, [{n: tensors[n] for n in names[at : at + cut]} for at in cuts])
        assert model.holds(tensors)


class Packed(torch.nn.Module):
    """As vLLM's layers of packed words: each of three parts has a shape of its own, all of which
    are loaded into one parameter; and as its experts: each has a scale for two of its matrices.
    What is computed with is scaled when the layer is whole."""

    def __init__(self, load: Any) -> None:
        super().__init__()
        self.layer = torch.nn.Module()
        self.layer.quant_method = Scaling()
        for name, shape in {"weight": (3, SIDE), "scale": (3,), "weight_shape": (2,)}.items():
            made = parameter(*shape)
            made.weight_loader = load_shape if name == "weight_shape" else load
            self.layer.register_parameter(name, made)
        layerwise.record_metadata_for_reloading(self)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            kind, part, *_ = name.split(".")
            param = getattr(self.layer, kind)
            param.weight_loader(param, tensor, int(part))
            loaded.add(f"layer.{kind}")
        return loaded


class Scaling(Transposing):
    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.weight.data.mul_(layer.scale.data[:, None])


def load_row(param: torch.Tensor, tensor: torch.Tensor, part: int) -> None:
    param.data[part : part + 1].copy_(tensor)


def load_row_twice(param: torch.Tensor, tensor: torch.Tensor, part: int) -> None:
    load_row(param, tensor, part)
    load_row(param, tensor, part)


def load_row_by_way_of_another(param: torch.Tensor, tensor: torch.Tensor, part: int) -> None:
    load_row(param, torch.empty_like(tensor, device=param.device).copy_(tensor), part)


def load_shape(param: torch.Tensor, tensor: torch.Tensor, part: int) -> None:
    param.data.copy_(tensor)


@pytest.mark.parametrize("replay", ["on", "off"])
@pytest.mark.parametrize("cut", [1, 2, 9])
@pytest.mark.parametrize("load", [load_row, load_row_twice, load_row_by_way_of_another])
@pytest.mark.parametrize("last", ["scale.", "scale.2", "weight.", "weight_shape."])
def test_what_is_loaded_more_than_once_does_not_count_for_the_rest_of_a_layer(
    monkeypatch: pytest.MonkeyPatch, replay: str, cut: int, last: str, load: Any
) -> None:
    monkeypatch.setenv("PS_REPLAY", replay)
    model, habits = Packed(load), dict[str, LoaderHabits]()
    for step in range(1, 5):
        tensors = {}
        for part in range(3):
            tensors[f"weight.{part}"] = torch.arange(4.0)[None] + 10 * part + 100 * step
            tensors[f"scale.{part}"] = torch.tensor([step + 0.5 * part])
            tensors[f"scale.{part}.again"] = tensors[f"scale.{part}"]
            tensors[f"weight_shape.{part}"] = torch.tensor([float(part), SIDE])
        names = sorted(tensors, key=lambda name: (name.startswith(last), name))
        cuts = range(0, len(names), cut)
        update(model, habits, [{n: tensors[n] for n in names[at : at + cut]} for at in cuts])
        for part in range(3):
            expected = tensors[f"weight.{part}"] * tensors[f"scale.{part}"]
            assert torch.equal(model.layer.weight[part : part + 1], expected)


def by_the_loader_of_another(model: Pair, param: Any, *args: Any) -> None:
    loader = (model.a.bias if param is model.b.bias else param).weight_loader
    loader(param, *args)


def by_a_loader_that_was_kept(model: Pair, param: Any, *args: Any) -> None:
    kept = vars(model).setdefault("kept", {})
    name = next(n for n, one in model.named_parameters() if one is param)
    kept.setdefault(name, param.weight_loader)(param, *args)


def in_a_thread(model: Pair, param: Any, *args: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(param.weight_loader, param, *args).result()


@pytest.mark.parametrize("replay", ["on", "off"])
@pytest.mark.parametrize(
    ("call", "names"),
    [
        (by_the_loader_of_another, NATURAL),
        (by_a_loader_that_was_kept, NATURAL),
        (by_a_loader_that_was_kept, LATE),
        (in_a_thread, NATURAL),
        (in_a_thread, LATE),
    ],
)
def test_a_loader_is_called_as_the_model_likes(
    monkeypatch: pytest.MonkeyPatch, replay: str, names: list[str], call: Any
) -> None:
    monkeypatch.setenv("PS_REPLAY", replay)
    model, habits = Pair(call=call), dict[str, LoaderHabits]()
    for step in range(4):
        tensors = model.tensors(step)
        update(model, habits, [{n: tensors[n]} for n in names])
        assert model.holds(tensors)


def test_a_look_at_values_that_only_memory_has_is_noticed() -> None:
    def load(param: torch.Tensor, tensor: torch.Tensor) -> None:
        limit = 500.0
        if not param.is_meta and bool((tensor > limit).any()):
            tensor = tensor.clamp(max=limit)
        param.data.copy_(tensor)

    model, habits = Model(lambda layer, _, one: layer.weight.weight_loader(layer.weight, one)), {}
    model.layer.weight.weight_loader = load
    layerwise.record_metadata_for_reloading(model)
    for value in (1.0, 2.0, 3.0, 1000.0):
        report = update(model, habits, [{"0": torch.full((SIDE, SIDE), value)}])
        assert report["replay"]["loaded"] == ("recorded" if value == 1.0 else "plain")
        assert (model.layer.weight == min(value, 500.0)).all()
