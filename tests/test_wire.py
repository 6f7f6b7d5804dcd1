"""The messages are those of the original's release 0.4, and reading one runs nobody's code."""

from __future__ import annotations

import builtins
import contextlib
import functools
import json
import os
import pickle
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from checkpoint_engine.data_types import ParameterMeta
from checkpoint_engine.errors import EngineError, WireError
from checkpoint_engine.handover import wire
from checkpoint_engine.handover.ipc import map_shared_memory
from checkpoint_engine.planning.plan import to_named_tensor

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))
from samples import CUDA_ARGS

PROTOCOLS = range(3, pickle.HIGHEST_PROTOCOL + 1)  # below 3, Python writes Python 2's names

SEGMENT = ("/dev/shm/checkpoint-engine-0-abc", 1024)
ENTRIES = [
    {"name": "a", "dtype": torch.bfloat16, "shape": torch.Size([3, 4]), "offset": 0},
    {"name": "b", "dtype": torch.float8_e4m3fn, "shape": torch.Size([]), "offset": 256},
    {"name": "ü\n\0", "dtype": torch.complex64, "shape": torch.Size([0]), "offset": 512},
]


# ---------------------------------------------------------------------- what the original reads


def test_a_handle_is_a_pickled_pair_with_something_behind_it() -> None:
    message = wire.encode_handle(map_shared_memory, SEGMENT, {"timeout": 5.0})
    assert pickle.loads(message) == (map_shared_memory, SEGMENT)
    assert isinstance(pickle.loads(message), tuple)


def test_a_bucket_is_a_list_of_dicts() -> None:
    metas = [
        ParameterMeta(name=entry["name"], dtype=entry["dtype"], shape=entry["shape"])
        for entry in ENTRIES
    ]
    read = pickle.loads(wire.encode_bucket(to_named_tensor(metas)))
    assert read == ENTRIES
    assert type(read) is list
    for entry in read:
        assert type(entry) is dict
        assert set(entry) == {"name", "dtype", "shape", "offset"}
        assert type(entry["shape"]) is torch.Size
        assert type(entry["dtype"]) is torch.dtype
        assert type(entry["offset"]) is int


def test_the_end_is_none_and_an_abort_an_exception() -> None:
    assert pickle.loads(wire.NOTHING_MORE) is None
    read = pickle.loads(wire.encode_abort("rank 3 failed"))
    assert type(read) is RuntimeError
    assert str(read) == "rank 3 failed"
    assert wire.ACK == b""


@pytest.mark.parametrize("traceback", ["", "boom", "naïve \udcff \U0001f600"])
def test_a_failure_is_never_taken_for_success(traceback: str) -> None:
    reply = wire.encode_failure(traceback)
    assert reply != wire.ACK
    reply.decode()


def test_a_workers_text_is_safe_to_print() -> None:
    error = EngineError("first line\n" + "\ta \x1b[2J\x00\r\x9b\x7f ü\n" * 100_000 + "last line")
    text = str(error)
    assert text.startswith("first line\n\ta \\x1b[2J\\x00\\x0d\\x9b\\x7f ü\n")
    assert text.endswith("\nlast line")
    assert "\n[...]\n" in text
    assert len(text) < 200_000
    assert str(EngineError("x" * 70_000)).count("x") == (64 << 10) - 7


# ---------------------------------------------------------------------- what the original sends


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_messages_of_the_original_are_read(protocol: int) -> None:
    handle = wire.decode_handle(pickle.dumps((map_shared_memory, SEGMENT), protocol))
    assert handle == wire.Handle(map_shared_memory, SEGMENT, {})
    assert wire.decode_message(pickle.dumps(ENTRIES, protocol)) == ENTRIES
    assert wire.decode_message(pickle.dumps([], protocol)) == []
    assert wire.decode_message(pickle.dumps(None, protocol)) is None
    abort = wire.decode_message(pickle.dumps(RuntimeError("why"), protocol))
    assert (type(abort), str(abort)) == (RuntimeError, "why")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_cuda_handle_is_read(protocol: int) -> None:
    handle = wire.decode_handle(pickle.dumps((rebuild_cuda_tensor, CUDA_ARGS), protocol))
    assert handle.rebuild is rebuild_cuda_tensor
    assert handle.args == CUDA_ARGS


def test_extensions_come_back() -> None:
    sent = {"timeout": 1.5, "more": ["\0", {"x": None}]}
    handle = wire.decode_handle(wire.encode_handle(map_shared_memory, SEGMENT, sent))
    assert handle.extensions == sent


def test_bytes_behind_a_handle_that_are_not_ours_are_ignored() -> None:
    handle = wire.decode_handle(pickle.dumps((map_shared_memory, SEGMENT)) + b"something else")
    assert handle.extensions == {}


@pytest.mark.parametrize(
    "error", [RuntimeError("a", 1), KeyError("k"), OSError(2, "No such file"), TimeoutError()]
)
def test_an_abort_may_be_any_builtin_exception(error: Exception) -> None:
    message = pickle.dumps(error)
    abort = wire.decode_message(message)
    assert repr(abort) == repr(error)
    assert repr(wire.decode_handle(message)) == repr(error)


dtypes = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.bool, torch.uint64, torch.complex64]
)
entries = st.fixed_dictionaries(
    {
        "name": st.text(max_size=20),
        "dtype": dtypes,
        "shape": st.lists(st.integers(0, 1 << 40), max_size=5).map(torch.Size),
        "offset": st.integers(0, 1 << 50),
    }
)


@settings(deadline=None, max_examples=100)
@given(st.lists(entries, max_size=6))
def test_any_bucket_round_trips(sent: list[dict[str, Any]]) -> None:
    assert wire.decode_message(wire.encode_bucket(sent)) == sent
    assert pickle.loads(wire.encode_bucket(sent)) == sent


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "content",
    [
        0,
        "text",
        (1, 2),
        (map_shared_memory,),
        (map_shared_memory, list(SEGMENT)),
        (torch.Size, SEGMENT),
        (ValueError, ("called",)),
        [],
        None,
    ],
)
def test_what_is_no_handle(content: Any) -> None:
    with pytest.raises(WireError):
        wire.decode_handle(pickle.dumps(content))


@pytest.mark.parametrize("rebuild", [torch.Tensor, torch.nn.Parameter, torch.UntypedStorage])
def test_only_rebuild_functions_rebuild(rebuild: type) -> None:
    """The classes are named by a CUDA handle's arguments; nothing is to call them."""
    with pytest.raises(WireError):
        wire.decode_handle(pickle.dumps((rebuild, (4,))))


@pytest.mark.parametrize(
    "content",
    [
        0,
        "text",
        {},
        (map_shared_memory, SEGMENT),
        [None],
        [{**ENTRIES[0], "name": b"bytes"}],
        [{**ENTRIES[0], "dtype": "bfloat16"}],
        [{**ENTRIES[0], "shape": [3, 4]}],
        [{**ENTRIES[0], "offset": -1}],
        [{**ENTRIES[0], "offset": 1.5}],
        [{**ENTRIES[0], "offset": True}],
        [{"name": "a", "dtype": torch.int8, "shape": torch.Size([1])}],
        [ENTRIES[0], 3],
        RuntimeError,
    ],
)
def test_what_is_no_message(content: Any) -> None:
    with pytest.raises(WireError):
        wire.decode_message(pickle.dumps(content))


@pytest.mark.parametrize(
    "damage",
    [
        {"offsets": [-256, 0, 512]},
        {"offsets": [0.0, 256, 512]},
        {"offsets": [True, 256, 512]},
        {"offsets": [0, 256]},
        {"kind_of": [0, 1, 3]},
        {"kind_of": [0, 1, -1]},
        {"kind_of": None},
        {"names": ["a", "b", None]},
        {"kinds": [["torch.int8", [-1]]] * 3},
        {"kinds": [["torch.nonsense", [1]]] * 3},
    ],
)
def test_what_is_no_bucket_in_json(damage: dict[str, Any]) -> None:
    message = wire.encode_bucket_as_json(ENTRIES)
    assert wire.decode_message(message) == wire.Bucket(ENTRIES)
    mark, start, content = message.partition(b"{")
    damaged = json.loads(start + content) | damage
    with pytest.raises(WireError):
        wire.decode_message(mark + json.dumps(damaged).encode())


class Calls:
    """Pickles to a call of ``function``."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def hostile(marker: Path) -> dict[str, Any]:
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Calls(os.system, f"touch {marker}"),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "open": Calls(open, str(marker), "w"),
        "getattr": Calls(getattr, "text", "format"),
        "partial": Calls(functools.partial, os.system, f"touch {marker}"),
        "torch.load": Calls(torch.load, str(marker)),
        "torch.save": Calls(torch.save, 1, str(marker)),
        "a tensor": torch.zeros(2),
        "torch.Tensor": Calls(torch.Tensor, 3),
        "UntypedStorage": Calls(torch.UntypedStorage, 3),
        "map_shared_memory": Calls(map_shared_memory, *SEGMENT),
        "rebuild_cuda_tensor": Calls(rebuild_cuda_tensor, *CUDA_ARGS),
        "numpy array": np.zeros(3),
        "numpy scalar": np.float64(1),
        "object": object(),
        "type": type,
        "dict class": dict,
        "KeyboardInterrupt": KeyboardInterrupt(),
        "SystemExit": SystemExit(1),
        "our exception": WireError("x"),
        "our class": wire.Handle(print, (), {}),
        "Path": marker,
    }


@pytest.mark.parametrize("name", hostile(Path("x")))
@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_nothing_else_is_named_or_called(tmp_path: Path, name: str, protocol: int) -> None:
    marker = tmp_path / "called"
    content = hostile(marker)[name]
    for message in (
        content,
        [content],
        [{**ENTRIES[0], "shape": content}],
        (map_shared_memory, (content,)),
        (content, SEGMENT),
        RuntimeError(content),
    ):
        for decode in (wire.decode_handle, wire.decode_message):
            with pytest.raises(WireError):
                decode(pickle.dumps(message, protocol))
    assert not marker.exists()


GLOBAL = b"ccheckpoint_engine.handover.ipc\nmap_shared_memory\n"
NAME_SYSTEM = b"(Vmodule\nVos\nVname\nVsystem\nd"


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(NAME_SYSTEM, id="dict"),
        pytest.param(b"(N" + NAME_SYSTEM + b"t", id="slots"),
        pytest.param(b"(" + NAME_SYSTEM + NAME_SYSTEM + b"t", id="both"),
    ],
)
def test_a_name_cannot_be_rewritten_once_it_was_let_through(state: bytes) -> None:
    """pickle's BUILD sets the attributes of any object it has made."""
    message = b"(" + GLOBAL + state + b"b(Vtrue\ntt."
    with pytest.raises(WireError):
        wire.decode_handle(message)


@pytest.mark.parametrize(
    "message",
    [
        b"ctorch\nSize\n" + NAME_SYSTEM + b"b.",
        b"ctorch\nfloat32\n" + NAME_SYSTEM + b"b.",
        b"cbuiltins\nValueError\n" + NAME_SYSTEM + b"b.",
        b"cbuiltins\nValueError.__init__\n.",
        b"ctorch\nserialization.load\n.",
        b"ctorch\nos\n.",
        b"ctorch\nimport\n.",
        b"c__main__\nmap_shared_memory\n.",
        b"ccheckpoint_engine.handover.ipc\nos.system\n.",
        b"ccheckpoint_engine.handover.ipc\nmap_shared_memory.__globals__\n.",
        b"(ios\nsystem\n.",
        b"\x80\x02\x82\x01.",
        b"P0\n.",
        b".",
        b"",
        b"N",
    ],
)
def test_other_ways_to_a_name(message: bytes) -> None:
    for decode in (wire.decode_handle, wire.decode_message):
        with pytest.raises(WireError):
            decode(message)
    assert "module" not in vars(ValueError)
    assert builtins.ValueError is ValueError


# ---------------------------------------------------------------------- any bytes at all


@contextlib.contextmanager
def little_memory(extra: int = 256 << 20) -> Iterator[None]:
    """A pickle may announce any size: here it does not get it."""
    kept = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, kept)


def read(message: bytes) -> None:
    """Nothing but ``WireError``."""
    with contextlib.suppress(WireError):
        wire.decode_message(message)
    with contextlib.suppress(WireError):
        handle = wire.decode_handle(message)
        if isinstance(handle, wire.Handle):
            assert handle.rebuild in (map_shared_memory, rebuild_cuda_tensor)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes(message: bytes) -> None:
    with little_memory():
        read(message)


VALID = [
    wire.encode_handle(map_shared_memory, SEGMENT, {"timeout": 1.0}),
    *(pickle.dumps((rebuild_cuda_tensor, CUDA_ARGS), protocol) for protocol in (3, 4)),
    *(pickle.dumps(ENTRIES, protocol) for protocol in (3, 4)),
    wire.NOTHING_MORE,
    wire.encode_abort("why"),
]


@settings(deadline=None, max_examples=500)
@given(st.data())
def test_mutated_messages(data: st.DataObject) -> None:
    message = bytearray(data.draw(st.sampled_from(VALID)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(message)))
        cut = data.draw(st.integers(0, 3))
        message[at : at + cut] = data.draw(st.binary(max_size=4))
    with little_memory():
        read(bytes(message))


@pytest.mark.parametrize("shape", [(-1,), (2, -3), (True,), (1.0,)])
def test_a_shape_has_lengths(shape: tuple[Any, ...]) -> None:
    entry = {"name": "w", "dtype": torch.uint8, "shape": shape, "offset": 0}
    with pytest.raises(WireError, match="expected a bucket"):
        wire.decode_message(pickle.dumps([entry]))
