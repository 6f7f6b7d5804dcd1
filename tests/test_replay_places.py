"""Replay where memory, modes or tensors are not what they were: right, plain, or an error."""

from __future__ import annotations

import contextlib
import cProfile
import sys
import sysconfig
import threading
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from checkpoint_engine.loading.calls import leaves_the_thread
from checkpoint_engine.loading.replay import digests as digests_of
from checkpoint_engine.loading.replay.memory import Place
from checkpoint_engine.replay import Replayed, replayed
from test_replay import FP32, Bytes, Layout, Model, state, update

THREE: Layout = {name: (FP32, (2, 4)) for name in "qkv"}
ALONE = [["q"], ["k"], ["v"]]


def into_rows(model: Model, name: str, tensor: torch.Tensor) -> None:
    if name == "scale":  # which earlier checkpoints did not have
        model.w = torch.nn.Parameter(model.w.data.clone(), requires_grad=False)
        return
    row = 2 * "qkv".index(name)
    model.w.data[row : row + 2].copy_(tensor)


def learned() -> Model:
    model = Model({"w": (FP32, (6, 4))}, into_rows)
    for seed in range(3):
        assert not update(model, Bytes(THREE, seed), ALONE).report["reason"]
    return model


def rows_of(checkpoint: Bytes) -> torch.Tensor:
    return torch.cat([tensor for name, tensor in checkpoint.weights() if name != "scale"])


def test_what_the_loader_makes_anew_in_the_middle_is_written_where_it_is_now() -> None:
    model, checkpoint = learned(), Bytes({**THREE, "scale": (FP32, (1,))}, 7)
    load = update(model, checkpoint, [["q"], ["k", "scale"], ["v"]])
    assert load.report["loaded"] == "replayed"
    assert torch.equal(model.w, rows_of(checkpoint))


def test_a_bucket_that_is_checked_may_move_what_it_is_loaded_into(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PS_REPLAY_CHECK", "1")
    model, checkpoint = learned(), Bytes(THREE, 7)
    load = model.load

    def moving(model: Model, name: str, tensor: torch.Tensor) -> None:
        model.w.data = model.w.data.clone()
        load(model, name, tensor)

    model.load = moving
    assert update(model, checkpoint, ALONE).report["loaded"] == "replayed"
    assert torch.equal(model.w, rows_of(checkpoint))


def test_an_engine_that_moves_weights_between_buckets_is_told_to_update_again() -> None:
    model, checkpoint = learned(), Bytes(THREE, 7)
    load = replayed(model.load_weights)
    for names in ALONE:
        load(checkpoint.weights(names))
        model.w.data = model.w.data.clone()
    with pytest.raises(RuntimeError, match="moved while it was updated: update again"):
        load.finish()
    load.abandon()
    for how in ("recorded", "recorded", "replayed"):
        assert update(model, checkpoint, ALONE).report["loaded"] == how
        assert torch.equal(model.w, rows_of(checkpoint))


MANY: Layout = {str(number): (FP32, (2, 3)) for number in range(500)}


def into_its_own(model: Model, name: str, tensor: torch.Tensor) -> None:
    model.get_parameter(f"p{name}").data.copy_(tensor)


def of_many() -> Model:
    model = Model({f"p{name}": form for name, form in MANY.items()}, into_its_own)
    for seed in range(3):
        load = update(model, Bytes(MANY, seed), IN_FIVE)
    assert load.report["loaded"] == "replayed"
    return model


IN_FIVE = [list(MANY)[begin : begin + 100] for begin in range(0, 500, 100)]


def delivered() -> Model:
    """A model whose buckets are known by their messages, which it was looked at ahead of."""
    model = Model({f"p{name}": (FP32, (2, 4)) for name in THREE}, into_its_own)
    for seed in range(3):
        with replayed(model.load_weights) as load:
            receive(load, Bytes(THREE, seed), range(3))
    assert load.report["loaded"] == "replayed"
    return model


def receive(load: Replayed, checkpoint: Bytes, numbers: Sequence[int]) -> None:
    """Some buckets as a worker gets them, in memory that each overwrites."""
    memory = torch.empty(1024, dtype=torch.uint8)
    for number in numbers:
        (name,), message = ALONE[number], f"{number} {ALONE[number]}".encode()
        view = memory[:32].view(FP32).view(2, 4)
        view.copy_(checkpoint.weights([name])[0][1])
        if load.knows(message):
            load.replay(message, memory)
        else:
            load.load_bucket([(name, view)], message, memory)
        memory.fill_(255)


CHANGES = {
    "moved": lambda data: data.clone(),
    "another view": lambda data: data.view(4, 2).t(),
    "replaced": lambda data: torch.zeros_like(data),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_parameter_that_changes_between_two_messages_is_not_lost(
    number: int, after: int, change: str
) -> None:
    """What the next bucket writes was looked at beside the one before, to no effect."""
    model, checkpoint = delivered(), Bytes(THREE, 7)
    model.load = lambda m, n, t: getattr(m, f"p{n}").data.copy_(t.view(getattr(m, f"p{n}").shape))
    load, parameter = replayed(model.load_weights), [*model.parameters()][number]
    receive(load, checkpoint, range(after))
    parameter.data = CHANGES[change](parameter.data)
    if number >= after:  # its bucket comes yet
        receive(load, checkpoint, range(after, 3))
        load.finish()
        wanted = [tensor for _, tensor in checkpoint.weights()]
        for one, tensor in zip(model.parameters(), wanted, strict=True):
            assert torch.equal(one, tensor.view(one.shape))
    elif change != "another view":  # of the same bytes
        receive(load, checkpoint, range(after, 3))
        with pytest.raises(RuntimeError, match="moved while it was updated: update again"):
            load.finish()
        load.abandon()


def test_a_parameter_that_becomes_another_between_updates_is_loaded_plainly() -> None:
    """At the same address, of another form."""
    model, checkpoint = delivered(), Bytes(THREE, 7)
    model.pk.data = model.pk.data.view(4, 2)
    model.load = lambda m, n, t: getattr(m, f"p{n}").data.view(2, 4).copy_(t)
    with replayed(model.load_weights) as load:
        receive(load, checkpoint, range(3))
    assert load.report["loaded"] == "plain" or load.report["replayed"] < 3
    assert torch.equal(
        rows_of(checkpoint).view(-1), torch.cat([p.view(-1) for p in model.parameters()])
    )


def test_buckets_may_come_in_another_order() -> None:
    model, checkpoint = delivered(), Bytes(THREE, 7)
    with replayed(model.load_weights) as load:
        receive(load, checkpoint, [2, 0, 1])
    assert (load.report["loaded"], load.report["replayed"]) == ("replayed", 3)
    assert torch.equal(rows_of(checkpoint), torch.cat([*model.parameters()]))


@pytest.mark.parametrize("number", [0, 1, 251, 499])
@pytest.mark.parametrize("turned", [False, True])
def test_one_of_many_parameters_that_moved_is_written_where_it_is(
    number: int, turned: bool
) -> None:
    """Not all are looked at before an update begins."""
    model, plain = of_many(), of_many()
    for one in (model, plain):
        parameter = one.get_parameter(f"p{number}")
        anew = torch.empty(3, 2).t() if turned else torch.empty(2, 3)
        parameter.data = anew.copy_(parameter.data)
    for seed in range(3, 8):
        load = update(model, Bytes(MANY, seed), IN_FIVE)
        plain.load_weights(Bytes(MANY, seed).weights())
        assert state(model) == state(plain)
    assert load.report["loaded"] == "replayed"


def test_a_constant_goes_where_its_parameter_is() -> None:
    def with_padding(model: Model, name: str, tensor: torch.Tensor) -> None:
        into_its_own(model, name, tensor)
        if name == "0":
            model.get_parameter("pad").data.view(6)[:2].fill_(3)
            model.get_parameter("pad").data.view(6)[2:].fill_(4)

    forms = {f"p{name}": form for name, form in MANY.items()}
    forms = dict(list(forms.items())[:251]) | {"pad": (FP32, (2, 3))} | forms
    model = Model(forms, with_padding)
    for seed in range(3):
        assert update(model, Bytes(MANY, seed), IN_FIVE).report["reason"] == ""
    assert list(model._parameters).index("pad") % 2  # not one of those that every update looks at
    model.pad.data = torch.zeros(8)[2:].view(2, 3)
    update(model, Bytes(MANY, 3), IN_FIVE)
    assert model.pad.flatten().tolist() == [3, 3, 4, 4, 4, 4]


FROM_A_TABLE = "def call_all(table):\n    for call, argument in table: call(argument)"


@pytest.mark.parametrize("folder", ["/srv", f"{sysconfig.get_path('stdlib')}/site-packages/own"])
def test_one_place_of_a_loaders_code_may_call_harmless_functions_and_others(folder: str) -> None:
    queue, code = SimpleQueue[torch.Tensor](), dict[str, Any]()
    exec(compile(FROM_A_TABLE, f"{folder}/loader.py", "exec"), code)

    def out_of_a_table(model: Model, name: str, tensor: torch.Tensor) -> None:
        code["call_all"]([(len, name), (len, name), (queue.put, tensor)])
        into_rows(model, name, tensor)

    model = Model({"w": (FP32, (6, 4))}, out_of_a_table)
    assert "SimpleQueue.put" in update(model, Bytes(THREE, 1)).report["reason"]


def test_other_memory_at_the_same_address_is_another_place() -> None:
    memory = bytearray(64)
    one, other = (torch.frombuffer(memory, dtype=FP32) for _ in range(2))
    assert one.data_ptr() == other.data_ptr()
    assert Place.of(one) == Place.of(one.view(16))
    assert Place.of(one) != Place.of(other)
    assert Place.of(one) != Place.of(one.view(4, 4))


def test_pieces_of_large_rows_that_change_places_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(digests_of, "_AT_ONCE", {True: 1 << 10, False: 1 << 10})
    tensor = torch.rand(2, 512)  # each row is two pieces
    moved = tensor.view(2, 2, 256).transpose(0, 1).reshape(2, 512)
    assert len(set(digests_of.digests([tensor, moved, tensor.clone()]).tolist())) == 2


class Clamps(TorchFunctionMode):
    """Of an engine that keeps values in a range."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            return args[0].copy_(args[1].clamp(-1, 1))
        return func(*args, **(kwargs or {}))


def test_what_a_mode_around_the_loading_does_is_seen() -> None:
    model = Model({"w": (FP32, (6, 4))}, into_rows)
    for seed in range(4):
        checkpoint = Bytes(THREE, seed)
        with Clamps():
            load = update(model, checkpoint)
        assert "clamp" in load.report["reason"]
        assert torch.equal(model.w, rows_of(checkpoint).clamp(-1, 1))


def test_a_profiler_that_comes_and_goes_is_noticed() -> None:
    def looking(model: Model, name: str, tensor: torch.Tensor) -> None:
        profiler, seen = cProfile.Profile(), []
        profiler.enable()
        thread = threading.Thread(target=lambda: seen.append(tensor.numpy()[0, 0] > 0))
        thread.start()
        thread.join()
        profiler.disable()
        into_rows(model, name, tensor.view(8).view(2, 4) if seen[0] else tensor.flip(0))

    load = update(Model({"w": (FP32, (6, 4))}, looking), Bytes(THREE, 1))
    seen = "start_new_thread" if sys.version_info >= (3, 12) else "profiler"
    assert seen in load.report["reason"]


@pytest.mark.parametrize("hide", [sys.getprofile, lambda: sys.settrace(None)])
def test_a_loader_that_asks_for_or_changes_hooks_is_left_alone(hide: Any) -> None:
    def hiding(model: Model, name: str, tensor: torch.Tensor) -> None:
        hide()
        into_rows(model, name, tensor)

    load = update(Model({"w": (FP32, (6, 4))}, hiding), Bytes(THREE, 1))
    assert "where nobody sees" in load.report["reason"]


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    mode = torch._C._pop_torch_function_stack()
    try:
        yield
    finally:
        torch._C._push_on_torch_function_stack(mode)


@pytest.mark.parametrize(
    ("blindfold", "why"),
    [
        (lambda: torch._C.DisableTorchFunction(), "disables torch functions"),
        (without_modes, "_pop_torch_function_stack where nobody sees"),
    ],
)
def test_a_loader_that_blinds_torchs_modes_is_left_alone(blindfold: Any, why: str) -> None:
    """Nobody would see what ``map`` reads."""

    def looking(model: Model, name: str, tensor: torch.Tensor) -> None:
        with blindfold():
            seen = next(map(torch.Tensor.tolist, [tensor]))
        into_rows(model, name, tensor if seen else tensor.flip(0))

    load = update(Model({"w": (FP32, (6, 4))}, looking), Bytes(THREE, 1))
    assert why in load.report["reason"]


def test_an_operation_that_is_said_to_be_made_of_others_is_not_trusted() -> None:
    """Nobody sees what an engine's operation does that torch takes for a composition, as those of
    vLLM for CPUs that are defined without a device. Here it is made of nothing that torch sees."""
    library = torch.library.Library("checkpoint_engine_tests", "FRAGMENT")
    library.define("peek(Tensor one) -> int")

    def peek(one: torch.Tensor) -> int:
        return int(one.shape[0])

    library.impl("peek", peek, "CompositeImplicitAutograd")

    def looking(model: Model, name: str, tensor: torch.Tensor) -> None:
        seen = torch.ops.checkpoint_engine_tests.peek(tensor)
        into_rows(model, name, tensor.flip(0) if seen % 2 else tensor)

    load = update(Model({"w": (FP32, (6, 4))}, looking), Bytes(THREE, 1))
    assert "peek was used on" in load.report["reason"]


@pytest.mark.parametrize("kind", ["PyCapsule", "pybind11_detail_function_record_v1"])
def test_a_function_that_pybind11_bound_is_not_trusted(kind: str) -> None:
    """It may read the tensors that it is given."""
    record = type(kind, (), {})()
    assert leaves_the_thread(max, record, set())
    assert not leaves_the_thread(torch._C._get_tracing_state, record, set())


def test_a_loader_may_have_modes_of_its_own() -> None:
    def on_a_device(model: Model, name: str, tensor: torch.Tensor) -> None:
        with torch.device("cpu"):
            into_rows(model, name, tensor)

    model = Model({"w": (FP32, (6, 4))}, on_a_device)
    loads = [update(model, Bytes(THREE, seed)) for seed in range(3)]
    assert [load.report["loaded"] for load in loads] == ["recorded", "recorded", "replayed"]


def test_a_function_that_torch_calls_back_is_not_trusted() -> None:
    def looking(model: Model, name: str, tensor: torch.Tensor) -> None:
        seen: list[bool] = []
        torch.zeros(1).apply_(lambda _: seen.append(tensor.numpy()[0, 0] > 0) or 0)
        into_rows(model, name, tensor.flip(0) if seen[0] else tensor)

    load = update(Model({"w": (FP32, (6, 4))}, looking), Bytes(THREE, 1))
    assert "apply_" in load.report["reason"]


def replays(model: Model, context: Any) -> Replayed:
    checkpoint = Bytes(THREE, 7)
    with context:
        load = update(model, checkpoint)
    assert torch.equal(model.w, rows_of(checkpoint))
    return load


def test_inference_mode_may_come_and_go() -> None:
    model = Model({"w": (FP32, (6, 4))}, into_rows)
    for context in (torch.no_grad, torch.no_grad, torch.inference_mode, torch.no_grad):
        load = replays(model, context())
    assert load.report["loaded"] == "replayed"


def test_new_tensors_may_be_made_on_meta_by_default() -> None:
    model = Model({"w": (FP32, (6, 4))}, into_rows)
    for _ in range(4):
        load = replays(model, torch.device("meta"))
    assert load.report["loaded"] == "replayed"


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize(
    "tensor",
    [
        torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8),
        torch.ones(4).to_sparse(),
        torch.ones(4, dtype=torch.complex64).conj(),
        torch.nn.parameter.UninitializedBuffer(),
    ],
    ids=["quantised", "sparse", "conjugate", "lazy"],
)
def test_a_model_with_a_tensor_that_cannot_be_compared_is_loaded_plainly(tensor: Any) -> None:
    model = Model({"w": (FP32, (6, 4))}, into_rows)
    model.register_buffer("strange", tensor, persistent=False)
    for seed in range(4):
        checkpoint = Bytes(THREE, seed)
        load = update(model, checkpoint)
        assert load.report["loaded"] == "plain"
        assert "strange is no tensor" in load.report["reason"]
        assert torch.equal(model.w, rows_of(checkpoint))


def test_memory_that_was_freed_is_not_compared() -> None:
    model = Model({"w": (FP32, (6, 4))}, into_rows)
    model.spare = torch.ones(4)
    model.spare.untyped_storage().resize_(0)
    assert "spare is no tensor" in update(model, Bytes(THREE, 1)).report["reason"]
    assert state(model)["w"]
