"""What a loader did twice, done again: bit for bit what it does itself, or left to it."""

from __future__ import annotations

import contextlib
import cProfile
import ctypes
import gc
import hashlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoint_engine.data_types import align_up
from checkpoint_engine.loading.replay import digests as digests_of
from checkpoint_engine.loading.replay.adapter import InPlace
from checkpoint_engine.loading.replay.canvas import Canvas
from checkpoint_engine.loading.replay.geometry import UNITS
from checkpoint_engine.loading.replay.learned_loader import LearnedLoader
from checkpoint_engine.loading.replay.memory import Slot
from checkpoint_engine.loading.replay.recorder import Recorder
from checkpoint_engine.replay import Replayed, replayed
from hostile_loaders import draw_case, run_case

Weights = list[tuple[str, torch.Tensor]]
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Load = Callable[["Model", str, torch.Tensor], None]

BF16, FP32 = torch.bfloat16, torch.float32


class Model(torch.nn.Module):
    """Parameters and buffers by name, zero at first, and a loader of one tensor after another."""

    def __init__(self, tensors: Layout, load: Load, buffers: Layout | None = None) -> None:
        super().__init__()
        for name, (dtype, shape) in tensors.items():
            data = torch.zeros(shape, dtype=dtype)
            self.register_parameter(name, torch.nn.Parameter(data, requires_grad=False))
        for name, (dtype, shape) in (buffers or {}).items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))
        self.load = load
        self.calls = 0

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.calls += 1
        for name, tensor in weights:
            self.load(self, name, tensor)


class Bytes:
    """A checkpoint in one buffer, whose tensors are views of it."""

    def __init__(self, layout: Layout, seed: int) -> None:
        self.layout = layout
        generator = torch.Generator().manual_seed(seed)
        self._places, size = {}, 0
        for name, (dtype, shape) in layout.items():
            self._places[name] = size
            size += align_up(dtype.itemsize * torch.Size(shape).numel())
        # Finite in every dtype: how torch converts the bits of a NaN depends on alignment.
        noise = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        self.buffer = noise & 0xBF

    def weights(self, names: Iterable[str] | None = None) -> Weights:
        return [(name, self._tensor(name)) for name in (names or self.layout)]

    def _tensor(self, name: str) -> torch.Tensor:
        dtype, shape = self.layout[name]
        start = self._places[name]
        end = start + dtype.itemsize * torch.Size(shape).numel()
        return self.buffer[start:end].view(dtype).view(shape)


def state(model: torch.nn.Module) -> dict[str, str]:
    """A digest of every parameter's and buffer's bytes."""
    return {
        name: hashlib.sha256(
            tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()
        ).hexdigest()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    return digests_of.digests([tensor])[0]


def update(model: Model, checkpoint: Bytes, buckets: list[list[str]] | None = None) -> Replayed:
    with replayed(model.load_weights) as load:
        for names in buckets or [list(checkpoint.layout)]:
            load(checkpoint.weights(names))
    return load


HOW = ("recorded", "recorded", "replayed", "replayed")
"""What the first updates of a model are."""


def same_as_plain(
    make: Callable[[], Model], layout: Layout, buckets: list[list[list[str]]] | None = None
) -> Replayed:
    """Four updates, each also loaded plainly into another model; returns the last."""
    model, plain = make(), make()
    for seed, how in enumerate(HOW):
        checkpoint = Bytes(layout, seed)
        load = update(model, checkpoint, buckets[seed % len(buckets)] if buckets else None)
        plain.load_weights(checkpoint.weights())
        assert state(model) == state(plain), seed
        assert load.report["loaded"] == how or load.report["reason"], load.report
    return load


# ---------------------------------------------------------------------- what can be replayed


def transposes(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data.copy_(tensor.t())


def splits(model: Model, name: str, tensor: torch.Tensor) -> None:
    first, second, third = tensor.split([2, 1, 1])
    model.w.data[2:4] = first.reshape(2, 6)
    model.w.data[0].copy_(second.squeeze(0))
    model.w[1] = third[0]


def casts(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data.copy_(tensor.to(torch.float16).narrow(0, 0, 4))  # to float32 by way of float16


def fills_up(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w[: len(tensor)].data.copy_(tensor)
    model.w[len(tensor) :].data.fill_(1)


def fills_first(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data.zero_()
    model.w.data.narrow(1, 1, 4).copy_(tensor)


def ties(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data.copy_(tensor)
    model.tied.data.copy_(model.w.data)


def interleaves(model: Model, name: str, tensor: torch.Tensor) -> None:
    even, odd = tensor.chunk(2)
    model.w.data[::2].copy_(even)
    model.w.data[1::2] = odd


def flattens(model: Model, name: str, tensor: torch.Tensor) -> None:
    flat = model.w.data.view(-1)
    flat[:5] = tensor.flatten()[:5]
    flat[5:].copy_(tensor.reshape(-1)[5:])


def reads_bits(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data.view(torch.int16).copy_(tensor.view(torch.int32).view(torch.int16))


def joins(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data.copy_(torch.cat([tensor[2:], torch.zeros(1, 6, dtype=BF16), tensor[:1]]))


def stacks(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data.copy_(torch.stack(tensor.unbind(1), dim=1).contiguous())


def fills_from_one(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data.fill_(tensor[0, 0])


def copies_a_number(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data[0].copy_(torch.tensor(2.7))  # 2.703125 in bfloat16
    model.w.data[1:].copy_(tensor)


def loads_a_buffer(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.scale.copy_(tensor[0, :2].mT if tensor.dim() > 2 else tensor[0, :2])
    model.w.data.copy_(tensor)


REPLAYED: list[tuple[Load, Layout, tuple[torch.dtype, tuple[int, ...]]]] = [
    (transposes, {"w": (BF16, (6, 4))}, (BF16, (4, 6))),
    (splits, {"w": (BF16, (4, 6))}, (BF16, (4, 6))),
    (casts, {"w": (FP32, (4, 6))}, (BF16, (5, 6))),
    (fills_up, {"w": (BF16, (6, 6))}, (BF16, (4, 6))),
    (fills_first, {"w": (BF16, (4, 6))}, (BF16, (4, 4))),
    (ties, {"w": (BF16, (4, 6)), "tied": (FP32, (4, 6))}, (BF16, (4, 6))),
    (interleaves, {"w": (BF16, (6, 4))}, (BF16, (6, 4))),
    (flattens, {"w": (BF16, (4, 6))}, (BF16, (2, 12))),
    (reads_bits, {"w": (BF16, (4, 6))}, (FP32, (4, 3))),
    (joins, {"w": (BF16, (4, 6))}, (BF16, (4, 6))),
    (stacks, {"w": (BF16, (4, 6))}, (BF16, (4, 6))),
    (fills_from_one, {"w": (FP32, (4, 6))}, (BF16, (1, 1))),
    (copies_a_number, {"w": (BF16, (5, 6))}, (BF16, (4, 6))),
    (loads_a_buffer, {"w": (BF16, (4, 6))}, (BF16, (4, 6))),
]


@pytest.mark.parametrize(
    ("load", "parameters", "given"), REPLAYED, ids=lambda v: getattr(v, "__name__", "")
)
def test_copies_of_every_kind_are_replayed(
    load: Load, parameters: Layout, given: tuple[torch.dtype, tuple[int, ...]]
) -> None:
    made: list[Model] = []

    def make() -> Model:
        made.append(Model(parameters, load, {"scale": (FP32, (2,))}))
        return made[-1]

    last = same_as_plain(make, {"x": given})
    assert last.report["reason"] == ""
    assert last.report["replayed"] == 1
    assert made[0].calls == 2  # the first two updates'


# ---------------------------------------------------------------------- what stays with the loader


def accumulates(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data.add_(tensor)


def scales(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data.copy_(tensor * 2)


def branches(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data.copy_(tensor if tensor.view(torch.int16)[0, 0] > 0 else -tensor)


def looks_at_a_number(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data.fill_(tensor.view(torch.int16)[0, 0].item())


def goes_by_numpy(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data.view(torch.int16).numpy()[:] = tensor.view(torch.int16).numpy()


def goes_by_an_array_that_it_has(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.__dict__.setdefault("array", model.w.data.view(torch.int16).numpy())
    model.w.data.copy_(tensor)
    if model.array[0, 0] > 0:  # no call of torch's
        model.w.data.copy_(tensor.view(6, 4).t())


def goes_by_dlpack(model: Model, name: str, tensor: torch.Tensor) -> None:
    bits = torch.from_dlpack(torch.utils.dlpack.to_dlpack(tensor.view(torch.int16)))
    model.w.data.fill_(bits[0, 0].item())


def replaces_memory(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data = tensor.clone()


def leaves_a_hole(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data[1:].copy_(tensor[1:])


def normalises(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data.copy_(tensor)
    model.w.data.copy_(model.w.data.abs())


def writes_where_it_is_masked(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data[tensor.view(torch.int16) > 0] = 1


def overwrites_what_it_is_given(model: Model, name: str, tensor: torch.Tensor) -> None:
    tensor[0].fill_(1)
    model.w.data.copy_(tensor)


def lists(model: Model, name: str, tensor: torch.Tensor) -> None:
    first = torch.tensor([tensor.view(torch.int16)[0, 0]])
    model.w.data.copy_(tensor if first > 0 else -tensor)


def splits_where_it_says(model: Model, name: str, tensor: torch.Tensor) -> None:
    place = torch.empty(1, dtype=torch.int64)
    place.copy_(tensor.view(torch.int16)[0, :1])
    before, after = torch.tensor_split(tensor, place)
    model.w.data.copy_(tensor if len(before) > len(after) else tensor.view(6, 4).t())


def applies(model: Model, name: str, tensor: torch.Tensor) -> None:
    tensor.view(torch.int16).clone().apply_(lambda value: model.seen.append(value) or value)
    model.w.data.fill_(model.seen[-1])


def picks(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data.copy_(tensor[[3, 0, 1, 2]])


def pads(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data.copy_(torch.nn.functional.pad(tensor[1:], (0, 0, 1, 0), value=3.0))


def broadcasts_a_copy(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data.copy_(tensor[:1].clone().expand(4, 6))


def draws(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data.copy_(tensor if torch.rand(1).item() < 2 else -tensor)


def stashes(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.__dict__.setdefault("stash", torch.zeros(4, 6, dtype=BF16)).copy_(tensor)
    model.w.data.copy_(tensor)


def copies_in_a_pool(model: Model, name: str, tensor: torch.Tensor) -> None:
    with ThreadPoolExecutor(2) as pool:
        for row in range(len(tensor)):
            pool.submit(model.w.data[row].copy_, tensor[row]).result()


def looks_in_a_pool(model: Model, name: str, tensor: torch.Tensor) -> None:
    number = POOL.submit(tensor.view(torch.int16)[0, 0].item).result()
    model.w.data.copy_(tensor if number > 0 else tensor.view(6, 4).t())


def looks_in_a_thread(model: Model, name: str, tensor: torch.Tensor) -> None:
    thread = threading.Thread(target=lambda: model.seen.append(tensor[0, 0].item()), name="it")
    thread.start()
    thread.join()
    model.w.data.copy_(tensor if model.seen.pop() > 0 else tensor.view(6, 4).t())


POOL = ThreadPoolExecutor(1)  # has a thread already, when loaders come
POOL.submit(bool).result()

LEFT = [
    accumulates,
    scales,
    branches,
    looks_at_a_number,
    goes_by_numpy,
    goes_by_an_array_that_it_has,
    goes_by_dlpack,
    replaces_memory,
    leaves_a_hole,
    normalises,
    writes_where_it_is_masked,
    overwrites_what_it_is_given,
    lists,
    splits_where_it_says,
    applies,
    picks,
    pads,
    broadcasts_a_copy,
    draws,
    stashes,
    copies_in_a_pool,
    looks_in_a_pool,
    looks_in_a_thread,
]


class TwoModules(torch.nn.Module):
    """``odd`` is loaded in a way of its own, ``plain`` by a copy."""

    def __init__(self, load: Load) -> None:
        super().__init__()
        self.odd = Model({"w": (BF16, (4, 6))}, load)
        self.odd.seen = []
        self.plain = Model({"w": (BF16, (4, 6))}, lambda m, _, t: m.w.data.copy_(t))
        self.seen: list[str] = []

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.seen.append(name)
            getattr(self, name).load_weights([(name, tensor)])


@pytest.mark.parametrize("load", LEFT, ids=lambda load: load.__name__)
def test_a_loader_that_does_more_than_copy_is_called_for_every_tensor(load: Load) -> None:
    """A part of its tensors would not do: it may count them, and wait for the last."""
    layout = {"plain": (BF16, (4, 6)), "odd": (BF16, (4, 6))}
    made: list[TwoModules] = []

    def make() -> TwoModules:
        made.append(TwoModules(load))
        return made[-1]

    last = same_as_plain(make, layout)  # type: ignore[arg-type]
    assert last.report["loaded"] == "plain"
    assert last.report["reason"]
    assert made[0].seen == ["plain", "odd"] * len(HOW)


def test_a_slot_that_the_engine_must_load_itself_leaves_everything_to_its_loader() -> None:
    class Attention(InPlace):
        def refuses(self, slot: Slot) -> str | None:
            return "attention is loaded last" if slot.name == "scale" else None

    model = Model({"w": (BF16, (4, 6)), "scale": (FP32, (2,))}, loads_a_buffer)
    learned = LearnedLoader()
    for how in ("recorded", "plain"):
        update = learned.begin(Attention(model, model.load_weights))
        update.load(Bytes({"x": (BF16, (4, 6))}, 1).weights())
        update.settle()
        update.finish()
        update.commit()
        assert (update.how, update.reason) == (how, "scale: attention is loaded last")


def test_a_write_that_was_not_seen_leaves_everything_to_the_loader() -> None:
    class Sly(Model):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            address = self.addresses["b"]
            for name, tensor in weights:
                if name == "a":
                    self.a.data.copy_(tensor)
                ctypes.memset(address, 7, 8)

    layout = {"a": (BF16, (4,)), "b": (BF16, (4,))}
    model = Sly(layout, lambda *_: None)
    model.addresses = {"b": model.b.data_ptr()}
    load = update(model, Bytes(layout, 1))
    assert load.report["reason"] == "the loader wrote something else than was recorded into ['b']"
    assert update(model, Bytes(layout, 2)).report["loaded"] == "plain"


def test_what_is_written_over_unseen_is_found_by_comparison() -> None:
    def slyly(model: Model, name: str, tensor: torch.Tensor) -> None:
        model.w.data.copy_(tensor)
        ctypes.memset(model.address, 7, 4)

    def make() -> Model:
        model = Model({"w": (BF16, (4, 6))}, slyly)
        model.address = model.w.data_ptr()
        return model

    last = same_as_plain(make, {"x": (BF16, (4, 6))})
    assert last.report["reason"] == "the loader wrote something else than was recorded into ['w']"


def test_a_loader_that_changes_the_model_by_itself_is_called_every_time() -> None:
    def count(model: Model, name: str, tensor: torch.Tensor) -> None:
        model.inner.w.data.copy_(tensor)
        model.updates.add_(1)

    def zero(model: Model, name: str, tensor: torch.Tensor) -> None:
        model.inner.w.data.copy_(tensor)
        model.updates.zero_()

    for load, reason in (
        (count, "aten.add_.Tensor was used on updates"),
        (zero, "updates was written, but from no tensor of the checkpoint"),
    ):

        def make(load: Load = load) -> Model:
            model = Model({}, load, {"updates": (torch.int64, ())})
            model.inner = Model({"w": (BF16, (4,))}, lambda *_: None)
            return model

        assert reason in same_as_plain(make, {"x": (BF16, (4,))}).report["reason"] or load is count


def test_what_two_tensors_write_to_the_same_place_depends_on_their_order() -> None:
    layout = {"a": (BF16, (4,)), "b": (BF16, (4,))}
    last = same_as_plain(
        lambda: Model({"w": (BF16, (4,))}, lambda m, _, t: m.w.data.copy_(t)), layout
    )
    assert last.report["reason"] == "w: what a wrote was written over"


def test_a_loader_that_does_not_do_the_same_twice_is_left_alone() -> None:
    def alternate(model: Model, name: str, tensor: torch.Tensor) -> None:
        model.w.data.copy_(tensor if model.calls % 2 else tensor.view(6, 4).t())

    model, plain = (Model({"w": (BF16, (4, 6))}, alternate) for _ in range(2))
    for seed in range(6):
        checkpoint = Bytes({"x": (BF16, (4, 6))}, seed)
        load = update(model, checkpoint)
        plain.load_weights(checkpoint.weights())
        assert state(model) == state(plain)
    assert load.report["loaded"] == "plain"
    assert load.report["reason"] == "its loader does something else in every update"


def test_a_loader_that_begins_otherwise_is_learned_from_the_second_call_on() -> None:
    def begin(model: Model, name: str, tensor: torch.Tensor) -> None:
        model.w.data.copy_(tensor if model.calls > 1 else tensor.view(6, 4).t())

    model, plain = (Model({"w": (BF16, (4, 6))}, begin) for _ in range(2))
    how = []
    for seed in range(5):
        checkpoint = Bytes({"x": (BF16, (4, 6))}, seed)
        how.append(update(model, checkpoint).report["loaded"])
        plain.load_weights(checkpoint.weights())
        assert state(model) == state(plain)
    assert how == ["recorded"] * 3 + ["replayed"] * 2


# ---------------------------------------------------------------------- what a loader may look at


def by_map(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data[int(model.map[int(name)])].copy_(tensor)


MAPPED = {str(n): (BF16, (4,)) for n in range(3)}


def mapped_model(is_buffer: bool) -> Model:
    model = Model({"w": (BF16, (3, 4))}, by_map, {"map": (torch.int64, (3,))} if is_buffer else {})
    if not is_buffer:
        model.map = torch.zeros(3, dtype=torch.int64)
    model.map.copy_(torch.tensor([2, 0, 1]))
    return model


@pytest.mark.parametrize("is_buffer", [True, False])
@pytest.mark.parametrize("is_made_anew", [True, False])
def test_numbers_of_the_model_are_compared_before_a_replay(
    is_buffer: bool, is_made_anew: bool
) -> None:
    model, plain = mapped_model(is_buffer), mapped_model(is_buffer)
    how = []
    for seed in range(7):
        if seed == 4:
            for one in (model, plain):
                rolled = one.map.roll(1)
                one.map = rolled if is_made_anew else one.map.copy_(rolled)
        checkpoint = Bytes(MAPPED, seed)
        how.append(update(model, checkpoint).report["loaded"])
        plain.load_weights(checkpoint.weights())
        assert state(model) == state(plain), seed
    assert how == ["recorded", "recorded", "replayed", "replayed"] + ["recorded"] * 2 + ["replayed"]


def test_numbers_that_change_with_every_update_are_not_learned() -> None:
    model, plain = mapped_model(True), mapped_model(True)
    for seed in range(5):
        for one in (model, plain):
            one.map.copy_(one.map.roll(1))
        checkpoint = Bytes(MAPPED, seed)
        load = update(model, checkpoint)
        plain.load_weights(checkpoint.weights())
        assert state(model) == state(plain), seed
    assert load.report["loaded"] == "plain"


# ---------------------------------------------------------------------- loaders that keep tensors


class Hoarder(Model):
    """Stacks its tensors when it has them all."""

    def __init__(self) -> None:
        super().__init__({"w": (BF16, (3, 4))}, lambda *_: None)
        self.kept: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.kept.update(weights)
        if len(self.kept) == 3:
            self.w.data.copy_(torch.stack([self.kept.pop(name) for name in "abc"]))


HOARD = {name: (BF16, (4,)) for name in "abc"}


def deliver(load: Replayed, checkpoint: Bytes, buckets: list[list[str]]) -> None:
    """As the worker does, in memory that every bucket overwrites."""
    memory = torch.empty(1024, dtype=torch.uint8)
    for number, names in enumerate(buckets):
        weights: Weights = []
        for place, (name, tensor) in enumerate(checkpoint.weights(names)):
            view = memory[256 * place : 256 * place + tensor.nbytes].view(tensor.dtype)
            view.view(tensor.shape).copy_(tensor)
            weights.append((name, view.view(tensor.shape)))
        message = f"{number} {names}".encode()
        if load.knows(message):
            load.replay(message, memory)
        else:
            load.load_bucket(weights, message, memory)
        del weights, view, tensor
        memory.fill_(255)


def test_tensors_kept_for_later_are_not_seen_overwritten() -> None:
    model, plain = Hoarder(), Hoarder()
    with pytest.raises(RuntimeError, match="update again"), replayed(model.load_weights) as load:
        deliver(load, Bytes(HOARD, 0), [["a"], ["b"], ["c"]])
    model.kept.clear()
    for seed in range(1, 5):
        checkpoint = Bytes(HOARD, seed)
        with replayed(model.load_weights) as load:
            deliver(load, checkpoint, [["a"], ["b"], ["c"]])
        plain.load_weights(checkpoint.weights())
        assert state(model) == state(plain)
    assert load.report["loaded"] == "replayed"


def test_a_tensor_that_is_kept_for_good_stays_with_the_loader() -> None:
    def keep(model: Model, name: str, tensor: torch.Tensor) -> None:
        model.w.data.copy_(tensor)
        model.kept = tensor.clone()

    last = same_as_plain(lambda: Model({"w": (BF16, (4,))}, keep), {"w": (BF16, (4,))})
    assert last.report["reason"] == "the loader keeps a copy of w"


def test_a_loader_that_looks_at_tensors_together_needs_them_all() -> None:
    model = Hoarder()
    learn(model, HOARD)
    with pytest.raises(RuntimeError, match="lacks 1 tensors that it had before"):
        update(model, Bytes({name: HOARD[name] for name in "ab"}, 1))
    model.kept.clear()
    learn(model, HOARD)
    more = Bytes(HOARD | {"d": (BF16, (4,))}, 2)
    with pytest.raises(RuntimeError, match="1 tensors that it did not have before"):
        update(model, more, [["a"], ["b", "c", "d"]])


def learn(model: Model, layout: Layout) -> None:
    for seed in (11, 12):
        assert update(model, Bytes(layout, seed)).report["loaded"] == "recorded"


# ---------------------------------------------------------------------- how buckets come


STACKED = {f"{e}.{part}": (BF16, (8, 16)) for e in range(5) for part in ("down", "gate", "up")}


def stack(model: Model, name: str, tensor: torch.Tensor) -> None:
    expert, part = name.split(".")
    if part == "down":
        model.w2.data[int(expert)].copy_(tensor.narrow(1, 8, 8))
    else:
        model.w13.data[int(expert)].narrow(0, 4 * (part == "up"), 4).copy_(tensor.narrow(0, 4, 4))


def stacked_model() -> Model:
    return Model({"w13": (BF16, (5, 8, 16)), "w2": (BF16, (5, 8, 8))}, stack)


def test_any_cut_and_order_will_do() -> None:
    names = list(STACKED)
    cuts = [[names], [names[9:], names[:9]], [[name] for name in reversed(names)]]
    last = same_as_plain(stacked_model, STACKED, cuts)
    assert last.report["replayed"] == 15


def test_tensors_that_overlap_are_told_apart() -> None:
    """Two names of one memory, and a tensor that is a part of another one."""
    layout = {name: (BF16, (4,)) for name in "abc"}

    def load(model: Model, name: str, tensor: torch.Tensor) -> None:
        getattr(model, name).data.copy_(tensor[:4])

    model, plain = Model(layout, load), Model(layout, load)
    for seed in range(4):
        memory = Bytes({"x": (BF16, (8,))}, seed).weights()[0][1]
        weights = [("a", memory[:4]), ("b", memory[:4]), ("c", memory[2:])]
        with replayed(model.load_weights) as learned:
            learned(weights)
        plain.load_weights(weights)
        assert state(model) == state(plain)
    assert learned.report["loaded"] == "replayed"


@pytest.mark.parametrize("asks", ["storage_offset", "as_strided"])
def test_a_view_beyond_its_tensor_is_left_to_the_loader(asks: str) -> None:
    """Tensors of a bucket share memory; a loader could read its neighbour's."""

    def load(model: Model, name: str, tensor: torch.Tensor) -> None:
        if name == "a":
            offset = tensor.storage_offset() if asks == "storage_offset" else 0
            model.w.data.copy_(tensor.as_strided((4,), (1,), offset + 4))

    layout = {"a": (BF16, (4,)), "b": (BF16, (4,))}
    report = update(Model({"w": (BF16, (4,))}, load), Bytes(layout, 1)).report
    assert f"{asks} was used on a" in report["reason"]


class Refuse(TorchDispatchMode):
    """A loader's own: it lets nobody transpose."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.t.default, torch.ops.aten.transpose.int):
            raise TypeError("not here")
        return func(*args, **(kwargs or {}))


def under_its_own_mode(model: Model, name: str, tensor: torch.Tensor) -> None:
    with Refuse():
        with contextlib.suppress(TypeError):
            tensor = tensor.t()
        model.w.data.copy_(tensor)


def with_its_own_copy(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.copy_ = lambda source: torch.Tensor.copy_(model.w.data, source.t())
    model.w.copy_(tensor)


@pytest.mark.parametrize("load", [under_its_own_mode, with_its_own_copy])
def test_what_a_loader_changes_of_torch_holds_while_it_is_watched(load: Any) -> None:
    layout = {"w": (BF16, (4, 4))}
    model, plain = Model(layout, load), Model(layout, load)
    for seed in range(4):
        weights = Bytes(layout, seed).weights()
        with replayed(model.load_weights) as learned:
            learned(weights)
        plain.load_weights(weights)
        assert state(model) == state(plain)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.int32, (32, 4094)), (torch.uint8, (24, 16376)), (torch.int64, (40, 2047))],
)
def test_rows_that_change_places_are_told_apart(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Of numbers that are not negative, at every distance."""
    one = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for row in range(1, shape[0]):
        other = one.clone()
        other[[0, row]] = other[[row, 0]]
        assert _digest(one) != _digest(other)


@pytest.mark.parametrize("bits", [1 << 28, 1 << 29, 1 << 30, -(1 << 31)])
def test_a_bit_that_changes_everywhere_is_seen(bits: int) -> None:
    one = torch.zeros(2 * 65_536, dtype=torch.int32)
    assert _digest(one) != _digest(one | bits)
    assert _digest(one[:100]) != _digest((one | bits)[:100])


def by_list(model: Model, name: str, tensor: torch.Tensor) -> None:
    copy = tensor[[1, 0, 3, 2]]
    copy[0] = 0
    model.w.data.copy_(copy)


def by_nested_tuple(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data.copy_(tensor[((0, 3, 1, 2), (0, 0, 0, 0))].view(4, 1).expand(4, 6))


def by_tensor(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data.copy_(tensor.narrow(0, (tensor[0, 0] > 0).long(), 1).expand(4, 6))


def by_slice_of_tensor(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data.copy_(tensor[(tensor[0, 0] > 0).long() :][:1].expand(4, 6))


@pytest.mark.parametrize("load", [by_list, by_nested_tuple, by_tensor, by_slice_of_tensor])
def test_what_is_indexed_otherwise_than_by_numbers_is_no_view(load: Load) -> None:
    last = same_as_plain(lambda: Model({"w": (FP32, (4, 6))}, load), {"x": (FP32, (4, 6))})
    assert last.report["loaded"] == "plain"
    assert last.report["reason"]


def test_learning_does_nothing_tensor_by_tensor_that_can_be_done_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Experts in an order that is not that of their places: neither a grid nor a sum for each."""
    sums: list[int] = []
    weighted = digests_of.weighted
    monkeypatch.setattr(
        digests_of, "weighted", lambda t, seed: sums.append(t.numel()) or weighted(t, seed)
    )
    monkeypatch.setattr(Canvas, "_write_on_grid", lambda *_: pytest.fail("a grid"))
    experts = 150
    names = sorted(f"{e}.{part}" for e in range(experts) for part in ("down", "gate", "up"))
    layout = {name: (BF16, (8, 16)) for name in names}
    model = Model({"w13": (BF16, (experts, 8, 16)), "w2": (BF16, (experts, 8, 8))}, stack)
    learn(model, layout)
    assert len(sums) < 20
    assert update(model, Bytes(layout, 3)).report["replayed"] == 3 * experts


def test_experts_at_equal_distances_are_moved_at_once() -> None:
    model = stacked_model()
    learn(model, STACKED)
    load = update(model, Bytes(STACKED, 2))
    assert load.plan is not None
    (program,) = load.plan.programs.values()
    (part,) = program.parts
    assert sorted(len(move.copies) for move in part.moves) == [1, 1]


def test_a_bucket_is_copied_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout: Layout = {str(n): (BF16, (3, 4 + n % 5)) for n in range(40)}
    model, plain = (
        Model({f"p{name}": form for name, form in layout.items()}, into_its_own) for _ in range(2)
    )
    learn(model, layout)
    update(model, Bytes(layout, 2))
    copies: list[int] = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda t, s: copies.append(len(t)) or copy(t, s))
    load = update(model, Bytes(layout, 3))
    plain.load_weights(Bytes(layout, 3).weights())
    assert state(model) == state(plain)
    assert load.report["replayed"] == 40
    assert sorted(copies) == [8, 16, 16]  # of units of 4, 2 and 8 bytes


def test_what_the_engine_does_in_between_is_not_noticed() -> None:
    """Also after a function of torch's, around which the profile hook rests."""
    recorder = Recorder([], [])
    one = torch.zeros(2)
    with recorder.watching():
        one.view(1, 2)
        with recorder.paused():
            one.view(2, 1)
            thread = threading.Thread(target=one.sum)
            thread.start()
            thread.join()
        assert not recorder.failure
        one.view(2, 1)
        threading.Thread(target=one.sum).start()
        assert "start_new_thread" in recorder.failure
    assert sys.getprofile() is None


def test_replays_keep_no_view_of_memory_that_arrays_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a later update that learns, it would be a holder that nobody knows."""
    model = stacked_model()
    for parameter in model.parameters():
        parameter.view(torch.int16).numpy()
    learn(model, STACKED)
    for seed in (2, 3):
        assert update(model, Bytes(STACKED, seed)).report["loaded"] == "replayed"
    monkeypatch.setenv("PS_REPLAY", "verify")
    assert update(model, Bytes(STACKED, 4)).report["loaded"] == "verified"
    assert update(model, Bytes(STACKED, 5)).report["loaded"] == "replayed"


def into_its_own(model: Model, name: str, tensor: torch.Tensor) -> None:
    getattr(model, f"p{name}").data.copy_(tensor)


def test_known_messages_are_replayed_out_of_the_buffer() -> None:
    model, plain = Hoarder(), Hoarder()
    model.load_weights = lambda weights: [model.w.data["abc".index(n)].copy_(t) for n, t in weights]
    for seed in range(4):
        load = replayed(model.load_weights, model)
        assert load.knows(b"0 ['b', 'c']") == (seed > 1)
        deliver(load, Bytes(HOARD, seed), [["b", "c"], ["a"]])
        load.finish()
        plain.load_weights(Bytes(HOARD, seed).weights())
        assert state(model) == state(plain)


def test_buckets_of_the_cuts_before_are_known_too() -> None:
    """As of a server that is started for each update, and does not know the worker yet."""
    model, plain = Hoarder(), Hoarder()
    model.load_weights = lambda weights: [model.w.data["abc".index(n)].copy_(t) for n, t in weights]
    cuts = [[["a", "b", "c"]], [["b", "c"], ["a"]], [["a"], ["b"], ["c"]], [["c", "a"], ["b"]]]
    kept = []
    for seed, cut in enumerate([*cuts[:1] * 2, *cuts[1:], *cuts, *cuts]):
        load = replayed(model.load_weights, model)
        known = load.knows(f"0 {cut[0]}".encode())
        deliver(load, Bytes(HOARD, seed), cut)
        load.finish()
        plain.load_weights(Bytes(HOARD, seed).weights())
        assert state(model) == state(plain)
        kept.append((known, len(load.plan.programs)))
    assert any(known for known, _ in kept[5:])
    assert max(programs for _, programs in kept) <= 9


def test_another_layout_is_learned_anew() -> None:
    model = Model(
        {"a": (BF16, (4,)), "b": (BF16, (4,))}, lambda m, n, t: getattr(m, n).data.copy_(t.view(4))
    )
    plain = Model({"a": (BF16, (4,)), "b": (BF16, (4,))}, model.load)
    one = {"a": (BF16, (4,)), "b": (BF16, (4,))}
    other = {"a": (BF16, (4,)), "b": (BF16, (2, 2))}
    how = []
    for seed, layout in enumerate([one, one, one, other, other, other, other]):
        checkpoint = Bytes(layout, seed)
        load = update(model, checkpoint, [["a"], ["b"]])
        plain.load_weights(checkpoint.weights())
        assert state(model) == state(plain)
        how.append((load.report["loaded"], load.report["replayed"]))
    assert how == [
        ("recorded", 0),
        ("recorded", 0),
        ("replayed", 2),
        ("replayed", 1),
        ("recorded", 0),
        ("recorded", 0),
        ("replayed", 2),
    ]


def test_other_parameters_are_learned_anew() -> None:
    model = stacked_model()
    how = []
    for seed in range(6):
        if seed == 3:
            model.w2.data = model.w2.data.clone()
        load = update(model, Bytes(STACKED, seed))
        how.append(load.report["loaded"])
    assert how == ["recorded", "recorded", "replayed"] * 2
    plain = stacked_model()
    plain.load_weights(Bytes(STACKED, 5).weights())
    assert state(model) == state(plain)


def test_an_interrupted_recording_leaves_nothing() -> None:
    model = stacked_model()
    checkpoint = Bytes(STACKED, 1)
    load = replayed(model.load_weights)
    load(checkpoint.weights(list(STACKED)[:4]))
    load.abandon()
    assert load.plan is None
    assert sys.getprofile() is None
    same_as_plain(lambda: model if model.calls < 2 else stacked_model(), STACKED)


def test_a_profiler_keeps_its_place() -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    load = update(stacked_model(), Bytes(STACKED, 1))
    is_there = sys.getprofile() is profiler
    profiler.disable()
    if sys.version_info >= (3, 12):  # each has a place of its own
        assert not load.report["reason"]
        return
    assert is_there
    assert load.report["reason"] == "this thread has a profiler, whose place the recorder needs"


def test_two_models_do_not_mix() -> None:
    one, other = stacked_model(), stacked_model()
    plain_one, plain_other = stacked_model(), stacked_model()
    for seed in range(3):
        load_one, load_other = replayed(one.load_weights), replayed(other.load_weights)
        for names in (list(STACKED)[:7], list(STACKED)[7:]):
            load_one(Bytes(STACKED, seed).weights(names))
            load_other(Bytes(STACKED, 10 + seed).weights(names))
        load_one.finish()
        load_other.finish()
        plain_one.load_weights(Bytes(STACKED, seed).weights())
        plain_other.load_weights(Bytes(STACKED, 10 + seed).weights())
        assert (state(one), state(other)) == (state(plain_one), state(plain_other))
    assert load_other.report["loaded"] == "replayed"


def test_nothing_outlives_its_model() -> None:
    model = stacked_model()
    for seed in range(3):
        load = update(model, Bytes(STACKED, seed))
    gone = weakref.ref(model), weakref.ref(model.w2)
    del model, load
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


# ---------------------------------------------------------------------- switches and reports


def test_off_never_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_REPLAY", "off")
    model = stacked_model()
    for seed in range(2):
        load = update(model, Bytes(STACKED, seed))
    assert load.report == {"loaded": "plain", "replayed": 0, "reason": "PS_REPLAY=off"}


def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_REPLAY", "perhaps")
    with pytest.raises(ValueError, match="PS_REPLAY must be one of on, off, verify"):
        update(stacked_model(), Bytes(STACKED, 0))


def test_a_plan_is_verified_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_REPLAY", "verify")
    model, plain = stacked_model(), stacked_model()
    how = []
    for seed in range(5):
        load = update(model, Bytes(STACKED, seed))
        plain.load_weights(Bytes(STACKED, seed).weights())
        assert state(model) == state(plain)
        how.append(load.report["loaded"])
    assert how == ["recorded", "recorded", "verified", "replayed", "replayed"]


def fickle(since: int, otherwise: Load) -> Callable[[], Model]:
    """Makes models whose loaders change their minds after so many calls."""

    def load(model: Model, name: str, tensor: torch.Tensor) -> None:
        if model.calls > since:
            otherwise(model, name, tensor)
        else:
            model.w.data[:2].fill_(1)
            model.w.data[2:].copy_(tensor)

    return lambda: Model({"w": (FP32, (4, 6))}, load, {"b": (FP32, (3,))})


def writes_elsewhere(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data[:2].fill_(1)
    model.w.data[2:].copy_(tensor.view(6, 2).t())


def fills_otherwise(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data[:2].fill_(2)
    model.w.data[2:].copy_(tensor)


def writes_more(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.w.data[:2].fill_(1)
    model.w.data[2:].copy_(tensor)
    model.b.add_(1)


@pytest.mark.parametrize("otherwise", [writes_elsewhere, fills_otherwise, writes_more])
def test_verifying_finds_a_loader_that_changed_its_mind(
    monkeypatch: pytest.MonkeyPatch, otherwise: Load
) -> None:
    monkeypatch.setenv("PS_REPLAY", "verify")
    make = fickle(2, otherwise)
    model, plain = make(), make()
    for seed in range(4):
        checkpoint = Bytes({"x": (BF16, (2, 6))}, seed)
        load = update(model, checkpoint)
        plain.load_weights(checkpoint.weights())
        assert state(model) == state(plain)
    assert load.report["loaded"] != "replayed"


@pytest.mark.parametrize("otherwise", [writes_elsewhere, fills_otherwise, writes_more])
def test_every_so_many_updates_a_bucket_is_compared(
    monkeypatch: pytest.MonkeyPatch, otherwise: Load
) -> None:
    monkeypatch.setenv("PS_REPLAY_CHECK", "3")
    make = fickle(3, otherwise)  # the third call is the first check's
    model, plain = make(), make()
    layout: Layout = {"x": (BF16, (2, 6))}
    how = [update(model, Bytes(layout, seed)).report["loaded"] for seed in range(7)]
    assert how == ["recorded"] * 2 + ["replayed"] * 5
    assert model.calls == 3
    with pytest.raises(RuntimeError, match="wrote something else than was recorded into"):
        update(model, Bytes(layout, 8))
    plain.calls = model.calls
    last = update(model, Bytes(layout, 9))
    plain.load_weights(Bytes(layout, 9).weights())
    assert last.report["loaded"] == "plain"
    assert state(model)["w"] == state(plain)["w"]


def test_the_buckets_are_compared_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_REPLAY_CHECK", "1")
    model = stacked_model()
    seen: list[str] = []
    model.load = lambda m, n, t: (seen.append(n), stack(m, n, t))[1]
    halves = [list(STACKED)[:7], list(STACKED)[7:]]
    for seed in range(4):
        if seed == 2:
            seen.clear()
        update(model, Bytes(STACKED, seed), halves)
    assert seen == [*halves[1], *halves[0]]


def test_tensors_with_memory_of_their_own_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_REPLAY_CHECK", "1")
    model = stacked_model()
    model.load = lambda m, n, t: stack(m, n, t if m.calls < 3 else t.flip(0))

    def load(seed: int) -> None:
        with replayed(model.load_weights) as load:
            load([(name, tensor.clone()) for name, tensor in Bytes(STACKED, seed).weights()])

    load(0)
    load(1)
    with pytest.raises(RuntimeError, match="wrote something else than was recorded into"):
        load(2)


def test_a_loader_that_pairs_tensors_is_compared_over_whole_updates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PS_REPLAY_CHECK", "2")
    model = Hoarder()
    buckets = [["a"], ["b", "c"]]
    how = [update(model, Bytes(HOARD, seed), buckets).report["loaded"] for seed in range(5)]
    assert how == ["recorded", "recorded", "replayed", "verified", "replayed"]


@given(
    shape=st.lists(st.sampled_from([1, 2, 3, 7, 2047, 40_000]), max_size=3)
    .filter(lambda shape: torch.Size(shape).numel() < 200_000)
    .map(tuple),
    dtype=st.sampled_from([torch.int8, BF16, FP32, torch.int64, torch.complex64]),
    place=st.floats(0, 1),
)
@settings(max_examples=100, deadline=None)
def test_a_digest_tells_changed_and_exchanged_elements(
    shape: tuple[int, ...], dtype: torch.dtype, place: float
) -> None:
    size = torch.Size(shape).numel() * dtype.itemsize
    noise = torch.randint(0, 256, (size,), dtype=torch.uint8)
    tensor = noise.view(dtype).view(shape)
    one = int(place * (size - 1))
    other = (one + 1) % size
    exchanged, changed = noise.clone(), noise.clone()
    exchanged[[one, other]] = exchanged[[other, one]]
    changed[one] ^= 1
    same = bool(_digest(tensor) == _digest(exchanged.view(dtype).view(shape)))
    assert same == torch.equal(noise, exchanged)
    assert _digest(tensor) != _digest(changed.view(dtype).view(shape))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64, BF16])
def test_a_digest_tells_signs(dtype: torch.dtype) -> None:
    """Of words that are added up only the topmost bits differ, everywhere."""
    bits = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8)
    changed = bits.clone()
    changed[7::8] ^= 128
    assert _digest(bits.view(dtype)) != _digest(changed.view(dtype))


@pytest.mark.parametrize("shape", [(3, 700, 1000), (64, 5), (1, 9), (5, 1_300_001)])
def test_a_digest_is_the_same_wherever_elements_lie(shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 2**14, shape, dtype=torch.int16).view(BF16)
    apart = torch.zeros(*shape[:-1], shape[-1] + 3, dtype=BF16)[..., 1:-2]
    assert _digest(apart.copy_(tensor)) == _digest(tensor)
    assert _digest(tensor.t().contiguous().t() if len(shape) == 2 else apart) == _digest(tensor)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, BF16, FP32, torch.int64])
def test_what_is_summed_up_beside_it_changes_no_digest(dtype: torch.dtype) -> None:
    """Of whole rows, which are put behind one another, of parts of them, of columns, of nothing."""
    row = (4 << 14) // dtype.itemsize
    noise = torch.randint(0, 255, (64 * row * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    tensors = [
        noise[: 3 * row],
        noise[row : 2 * row],
        noise[: 4 * row].view(-1, 64)[:, 32:],
        noise[: 8 * row].view(2, -1, 64)[:, :, 16:32],
        noise[: 2 * row].view(-1, 8).t(),
        noise[: row + 3],
        noise[: 3 * row].view(3, row),
        noise[5 * row : 40 * row],
        noise[:0],
        noise[row:row],
        noise[7],
        noise[: 2 * row : 2],
        noise[: 2 * row].view(UNITS[dtype.itemsize]),
        noise[: 6 * row].view(torch.uint8),
        noise[: 6 * row].view(torch.float64),
        noise[: 2 * row].view(-1, 64)[:, 32:],
        *(noise[:row].view(other) for other in (torch.uint8, torch.float64, torch.float32)),
    ]
    apart = [_digest(tensor).item() for tensor in tensors]
    assert digests_of.digests(tensors).tolist() == apart
    assert digests_of.digests(tensors[::-1]).tolist() == apart[::-1]
    assert apart[0] == apart[6]
    for number, tensor in enumerate(tensors):
        if tensor.numel():
            changed = [one.clone() for one in tensors]
            at = torch.randint(0, tensor.numel(), ()).item()
            bits = changed[number].reshape(-1).view(UNITS[tensor.itemsize])
            bits[at] ^= 1
            changed[number] = bits.view(tensor.dtype).view(tensor.shape)
            found = digests_of.digests(changed).tolist()
            assert [one != now for one, now in zip(apart, found, strict=True)] == [
                n == number for n in range(len(tensors))
            ]


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("columns", [False, True])
def test_a_digest_tells_exchanged_words_and_rows(rows: int, columns: bool) -> None:
    """Of more bytes than are summed up at once, too."""
    row = 1 << 14
    words = torch.randint(0, 1 << 30, (2 * rows * row,), dtype=torch.int32)
    words = words.view(-1, 64)[:, 32:] if columns else words[: rows * row]

    def exchanged(first: int, second: int, count: int) -> torch.Tensor:
        found = words.reshape(-1).clone()
        there = found[first : first + count].clone()
        found[first : first + count] = found[second : second + count]
        found[second : second + count] = there
        return found.view(words.shape)

    changed = [exchanged(7, 8, 1), exchanged(0, row // 2, row // 2)]
    if rows > 1:
        last = (rows - 1) * row
        changed += [exchanged(0, last, row), exchanged(last - row, last, 5), exchanged(3, last, 1)]
    assert len({_digest(one).item() for one in [words, *changed]}) == 1 + len(changed)


@pytest.mark.parametrize("dtype", [BF16, torch.uint8, FP32])
def test_a_model_with_empty_buffers_is_learned(dtype: torch.dtype) -> None:
    """As engines keep for what they do not use."""

    def make() -> Model:
        return Model(
            {"w": (BF16, (8,))},
            lambda m, n, t: m.get_parameter(n).data.copy_(t),
            buffers={f"empty{n}": (dtype, (0,)) for n in range(3)},
        )

    assert same_as_plain(make, {"w": (BF16, (8,))}).report["loaded"] == "replayed"


def test_a_loader_that_takes_a_parameter_its_memory_is_left_alone() -> None:
    def load(model: Model, name: str, tensor: torch.Tensor) -> None:
        model.get_parameter(name).data.copy_(tensor)
        if model.calls == 2 and name == "last":
            gone = torch.zeros(8, dtype=BF16, device="meta")
            model._parameters["w"] = torch.nn.Parameter(gone, requires_grad=False)

    layout: Layout = {"w": (BF16, (8,)), "last": (BF16, (8,))}
    model = Model(layout, load)
    update(model, Bytes(layout, 0))
    load_again = update(model, Bytes(layout, 1))
    assert load_again.report["reason"].endswith("than was recorded into ['w']")


@pytest.mark.parametrize("every", ["0", "-1", "often"])
def test_a_check_of_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, every: str) -> None:
    monkeypatch.setenv("PS_REPLAY_CHECK", every)
    with pytest.raises(ValueError, match="PS_REPLAY_CHECK"):
        update(stacked_model(), Bytes(STACKED, 0))


def test_what_is_needed_is_known_by_region() -> None:
    ignoring = Model(
        {"w13": (BF16, (5, 8, 16)), "w2": (BF16, (5, 8, 8))},
        lambda m, n, t: None if n == "ignored" else stack(m, n, t),
    )
    load = update(ignoring, Bytes(STACKED | {"ignored": (BF16, (8, 16))}, 0))
    assert load.plan is not None
    needed = {one.name: one for one in load.plan.needed}
    assert "ignored" not in needed
    assert needed["0.gate"].regions == [(128, 128, (), ())]  # rows 4 to 8 of 32 bytes
    assert needed["0.down"].regions == [(16, 16, (8,), (32,))]  # the second half of 8 rows
    assert load.report["needed_bytes"] == 15 * 128
    assert load.report["needed_share"] == pytest.approx(15 / 32)
    assert 0 < load.report["plan_bytes"] < 100_000


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["numbers", "letters"])
def test_experts_in_any_order_arrive_on_a_gpu(order: str) -> None:
    """In the order of letters their distances vary, which is what the fused kernel is for."""
    experts = sorted(range(300), key=str) if order == "letters" else range(300)
    layout = {f"{e}.{part}": (BF16, (8, 16)) for e in experts for part in ("down", "gate", "up")}
    shapes: Layout = {"w13": (BF16, (300, 8, 16)), "w2": (BF16, (300, 8, 8))}
    model, plain = Model(shapes, stack).cuda(), Model(shapes, stack)
    for seed in range(4):
        checkpoint = Bytes(layout, seed)
        plain.load_weights(checkpoint.weights())
        checkpoint.buffer = checkpoint.buffer.cuda()
        load = update(model, checkpoint)
        assert state(model) == state(plain)
    assert load.report["replayed"] == 900


# ---------------------------------------------------------------------- any chain of operations


def _narrow(draw: Any, t: torch.Tensor) -> torch.Tensor:
    dim = draw(st.integers(0, t.dim() - 1))
    start = draw(st.integers(0, t.shape[dim] - 1))
    return t.narrow(dim, start, draw(st.integers(1, t.shape[dim] - start)))


def _transpose(draw: Any, t: torch.Tensor) -> torch.Tensor:
    return t.transpose(draw(st.integers(0, t.dim() - 1)), draw(st.integers(0, t.dim() - 1)))


def _step(draw: Any, t: torch.Tensor) -> torch.Tensor:
    return t[:: draw(st.integers(1, 3))]


def _unsqueeze(draw: Any, t: torch.Tensor) -> torch.Tensor:
    return t.unsqueeze(draw(st.integers(0, t.dim())))


def _reshape(draw: Any, t: torch.Tensor) -> torch.Tensor:
    divisors = [n for n in range(1, t.numel() + 1) if t.numel() % n == 0]
    return t.reshape(draw(st.sampled_from(divisors)), -1)


def _chunk(draw: Any, t: torch.Tensor) -> torch.Tensor:
    chunks = t.chunk(draw(st.integers(1, 3)), dim=draw(st.integers(0, t.dim() - 1)))
    return chunks[draw(st.integers(0, len(chunks) - 1))]


def _expand(draw: Any, t: torch.Tensor) -> torch.Tensor:
    return t.unsqueeze(0).expand(draw(st.integers(1, 3)), *t.shape)


def _dtype(draw: Any, t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.float16 if t.dtype == BF16 else BF16) if t.itemsize == 2 else t


def _to(draw: Any, t: torch.Tensor) -> torch.Tensor:
    return t.to(draw(st.sampled_from([FP32, torch.float64, BF16])))


CHAIN = [
    _narrow,
    _transpose,
    _step,
    _unsqueeze,
    _reshape,
    _chunk,
    _expand,
    _dtype,
    _to,
    lambda _, t: t.contiguous(),
    lambda _, t: t.clone(),
    lambda _, t: torch.cat([t, t]),
]


INEXPRESSIBLE = ("stride", "run along", "read as", "from no tensor")
"""Parts of the reasons why a chain may stay with the loader: it cuts across what it copied."""


class Replayable:
    """Draws once and gives the same again, so that a drawn loader can be called many times."""

    def __init__(self, draw: Any) -> None:
        self._draw, self._drawn, self._at = draw, [], 0

    def __call__(self, strategy: Any) -> Any:
        if self._at == len(self._drawn):
            self._drawn.append(self._draw(strategy))
        self._at += 1
        return self._drawn[self._at - 1]

    def again(self) -> Replayable:
        self._at = 0
        return self


@st.composite
def drawn_loaders(draw: Any) -> tuple[tuple[int, ...], torch.dtype, Load, tuple[int, ...]]:
    """A source's shape, and a loader of a random chain into a random place of ``w``."""
    given_shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
    chain = draw(st.lists(st.sampled_from(CHAIN), max_size=6))
    choose = Replayable(draw)

    def shaped(tensor: torch.Tensor) -> torch.Tensor:
        choices = choose.again()
        for operation in chain:
            if tensor.numel() < 2000:
                tensor = operation(choices, tensor)
        return tensor

    result = shaped(torch.zeros(given_shape, dtype=BF16))
    before = draw(st.tuples(*[st.integers(0, 2)] * result.dim()))
    after = draw(st.tuples(*[st.integers(0, 2)] * result.dim()))
    is_transposed = draw(st.booleans())
    shape = tuple(a + n + b for a, n, b in zip(before, result.shape, after, strict=True))

    def load(model: Model, name: str, tensor: torch.Tensor) -> None:
        model.w.data.fill_(0.5)
        place = model.w.data.mT if is_transposed and len(shape) > 1 else model.w.data
        for dim, (start, length) in enumerate(zip(before, result.shape, strict=True)):
            place = place.narrow(dim, start, length)
        place.copy_(shaped(tensor))

    stored = (*shape[:-2], shape[-1], shape[-2]) if is_transposed and len(shape) > 1 else shape
    return given_shape, draw(st.sampled_from([BF16, FP32])), load, stored


@given(drawn=drawn_loaders())
@settings(max_examples=100, deadline=None)
def test_any_chain_of_operations_gives_the_same_bits(drawn: Any) -> None:
    given_shape, dtype, load, shape = drawn
    layout: Layout = {"x": (BF16, given_shape)}
    last = same_as_plain(lambda: Model({"w": (dtype, shape)}, load), layout)
    reason = last.report["reason"]
    assert not reason or any(known in reason for known in INEXPRESSIBLE), reason


@pytest.mark.parametrize("mode", ["on", "verify"])
@pytest.mark.parametrize("first_seed", range(0, 100, 50))
def test_hostile_loaders_are_loaded_as_plainly(
    monkeypatch: pytest.MonkeyPatch, mode: str, first_seed: int
) -> None:
    monkeypatch.setenv("PS_REPLAY", mode)
    replayed_of_copies = []
    for seed in range(first_seed, first_seed + 50):
        case = draw_case(seed)
        how, wrong = run_case(case, changes_maps=seed % 2 == 0)
        assert not wrong, (seed, case.kinds, how)
        if case.is_allowed:
            replayed_of_copies.append(how[-1] == "replayed")
    assert sum(replayed_of_copies) >= 0.9 * len(replayed_of_copies)


@pytest.fixture(autouse=True, scope="module")
def _what_is_there_is_not_collected() -> None:
    """To learn a loader is to collect garbage several times: as much as tests before these made."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _with_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PS_REPLAY", raising=False)
