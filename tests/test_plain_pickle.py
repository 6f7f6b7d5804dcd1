"""A pickle from anybody gives plain data or a ``PlainPickleError``, and does nothing else."""

from __future__ import annotations

import pickle
import pickletools
from typing import Any

import pytest
import torch

from checkpoint_engine.data_types import Lease, MemoryBufferMetas, ParameterMeta
from checkpoint_engine.handover.plain_pickle import (
    MODEL_WORDS,
    PLAIN_WORDS,
    PlainPickleError,
    read_pickle,
)

META = ParameterMeta(name="w", dtype=torch.bfloat16, shape=torch.Size([2, 3]))
SHARED = torch.Size([2, 3])
PLAIN = [
    None,
    (True, False, -(1 << 70), 0, 255, 65535, 1 << 31, -1.5),
    {"a": [b"x" * 300, "y" * 70_000, {"n", "m"}], 1: ()},
    [("t", SHARED, torch.bfloat16), ("u", SHARED, torch.bfloat16), ((1, 2), (1, 2, 3, 4))],
    [META, Lease(ptr=1, id="ab"), MemoryBufferMetas(metas=[META.model_copy()], ptr=1, size=256)],
]


@pytest.mark.parametrize("content", PLAIN, ids=range(len(PLAIN)))
@pytest.mark.parametrize("protocol", [4, 5])
def test_plain_data_comes_back(content: Any, protocol: int) -> None:
    read = read_pickle(pickle.dumps(content, protocol) + b"more", MODEL_WORDS)
    assert read == content
    assert type(read) is type(content)


@pytest.mark.parametrize("protocol", [2, 3])
def test_plain_data_of_older_protocols(protocol: int) -> None:
    content = [{"dtype": torch.bfloat16, "shape": SHARED, "offset": 1 << 40}, (1.5, None, True)]
    assert read_pickle(pickle.dumps(content, protocol), PLAIN_WORDS) == content


P = b"\x80\x04"
CLASS = b"ccheckpoint_engine.data_types\nParameterMeta\n"
STATE = b"}\x8c\x08__dict__}\x8c\x04name\x8c\x01ws\x8c\x05dtypectorch\nint8\ns\x8c\x05shape)ss"
HOSTILE = {
    "empty": b"",
    "no end": P + b"N",
    "nothing": P + b".",
    "two objects": P + b"NN.",
    "open mark": P + b"(N.",
    "missing items": P + b"N\x86.",
    "mark missing": P + b"Nt.",
    "unknown memo": P + b"h\x00.",
    "memo index": P + b"Nr\xff\xff\xff\x0f.",
    "memo of nothing": P + b"\x94.",
    "long4": P + b"\x8b\xff\xff\xff\x7f.",
    "bytes8": P + b"\x8e" + b"\xff" * 7 + b"\x7f.",
    "text8": P + b"\x8d" + b"\xff" * 7 + b"\x7f.",
    "bytearray8": P + b"\x96" + b"\xff" * 7 + b"\x7f.",
    "frame": P + b"\x95" + b"\xff" * 7 + b"\x7fN.",
    "deep lists": P + b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep tuples": P + b"N" + b"\x85" * 1_000_000 + b".",
    "deep key": P + b"}N" + b"\x85" * 1_000_000 + b"Ns.",
    "deep marks": P + b"(" * 1_000_000 + b".",
    "fill a shared set": P + b"\x8f\x94h\x00(K\x01\x90\x86.",
    "dup": P + b"N" + b"2\x86" * 60 + b".",
    "tuples of themselves": P
    + b"N\x85\x94"
    + b"".join(b"h%c\x86\x94" % n for n in range(40))
    + b".",
    "a list in itself": P + b"]\x94h\x00a.",
    "a dict in itself": P + b"}\x94K\x01h\x00s.",
    "a list twice": P + b"]\x94h\x00\x86.",
    "extend twice": P + b"](" + b"N" * 10 + b"e\x94(" + b"h\x00" * 10 + b"e.",
    "extend a string": P + b"\x8c\x01a(Ne.",
    "extend a set": P + b"\x8f(Ne.",
    "unhashable key": P + b"}]Ns.",
    "tuple key": P + b"}K\x01\x85Ns.",
    "odd items": P + b"}(K\x01u.",
    "extension": P + b"\x82\x01.",
    "persistent": b"Pid\n.",
    "instance": b"(ios\nsystem\n.",
    "unknown name": P + b"cos\nsystem\n.",
    "call of data": P + b"N)R.",
    "call of a dtype": P + b"ctorch\nint8\n)R.",
    "call without tuple": P + b"ctorch\nSize\nNR.",
    "a shape of text": P + b"ctorch\nSize\n\x8c\x01a\x85R.",
    "a shape of negatives": P + b"ctorch\nSize\nJ\xff\xff\xff\xff\x85\x85R.",
    "model by call": P + CLASS + b")R.",
    "model without state": P + CLASS + b")\x81.",
    "model with arguments": P + CLASS + b"N\x85\x81" + STATE + b"b.",
    "model of a dtype": P + b"ctorch\nint8\n)\x81" + STATE + b"b.",
    "no state at all": P + CLASS + b")\x81Nb.",
    "state without fields": P + CLASS + b")\x81}b.",
    "state of wrong types": P + CLASS + b")\x81" + STATE.replace(b"int8", b"Size") + b"b.",
    "state twice": P + CLASS + b")\x81" + STATE + b"b" + STATE + b"b.",
    "state of a class": P + CLASS + STATE + b"b.",
    "state of a function": P + b"ctorch\nSize\nN}\x8c\x08__name__\x8c\x01xs\x86b.",
    "state of a shape": P + b"ctorch\nSize\n)\x85RN}\x8c\x01ans\x86b.",
}


def test_the_model_of_the_cases_is_right() -> None:
    read = read_pickle(P + CLASS + b")\x81" + STATE + b"b.", MODEL_WORDS)
    assert read == ParameterMeta(name="w", dtype=torch.int8, shape=torch.Size([]))


@pytest.mark.parametrize("case", HOSTILE)
def test_malformed_or_hostile(case: str) -> None:
    names = (_name_of_size(), ParameterMeta.__name__, vars(ParameterMeta).keys())
    with pytest.raises(PlainPickleError):
        read_pickle(HOSTILE[case], MODEL_WORDS)
    assert names == (_name_of_size(), ParameterMeta.__name__, vars(ParameterMeta).keys())


def _name_of_size() -> str:
    return str(PLAIN_WORDS["torch", "Size"].__name__)


def test_every_opcode_of_the_scan_is_one_of_pickles() -> None:
    from checkpoint_engine.handover import plain_pickle

    known = {opcode.name for opcode in pickletools.opcodes}
    named = plain_pickle._ATOMS | plain_pickle._CONTAINERS | plain_pickle._COMBINES
    assert named | set(plain_pickle._CHANGES) <= known
