"""Reads pickles of plain data, from anybody.

Programs written for the original library send and store pickles: numbers, strings, lists, dicts,
dtypes, shapes and a few models. ``read_pickle`` first scans the opcodes without executing any, and
refuses those that such pickles do not have. Then ``pickle.Unpickler`` executes them. Every name in
the pickle is looked up in a ``Vocabulary``, which has nothing that is dangerous to call.

The scan is there because ``pickle`` alone allocates gigabytes for a message of eight bytes (a memo
index), sets attributes of whatever a name stands for, and makes tuples that contain themselves
so many times that hashing or printing them takes years.
"""

from __future__ import annotations

import functools
import io
import pickle
import pickletools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from checkpoint_engine import data_types

_DEEPEST = 100
"""How many containers and objects may lie inside each other."""
_LARGEST_SHARED = 256
"""Characters, bytes and elements of a value that a pickle may refer to again."""


class PlainPickleError(ValueError):
    """The pickle is malformed, or holds something that is not allowed."""


def _make_size(lengths: Any) -> torch.Size:
    if not data_types.is_shape(lengths):
        raise PlainPickleError("a shape is no sequence of lengths")
    return torch.Size(lengths)


Vocabulary = Mapping[tuple[str, str], Any]
"""By module and name, what the names in a pickle stand for. Pickles may call it with any arguments,
and make objects of its classes. They cannot change its attributes."""

PLAIN_WORDS: Vocabulary = {
    ("torch", "Size"): _make_size,
    **{("torch", name): dtype for name, dtype in data_types.DTYPES.items()},
}

# Models, which the original's programs store and exchange, validate what they are made of.
_MODELS = ("DataToGather", "Lease", "MemoryBufferMetaList", "MemoryBufferMetas", "ParameterMeta")
MODEL_WORDS: Vocabulary = {
    **PLAIN_WORDS,
    **{("checkpoint_engine.ps", name): getattr(data_types, name) for name in _MODELS},
    **{("checkpoint_engine.data_types", name): getattr(data_types, name) for name in _MODELS},
}


def read_pickle(data: bytes, vocabulary: Vocabulary) -> Any:
    """The object at the start of ``data``; what stands behind it is ignored.

    Raises:
        PlainPickleError: it is none, or has a name that ``vocabulary`` lacks.
    """
    try:
        _scan(data)
        return _Unpickler(data, vocabulary).load()
    except PlainPickleError:
        raise
    except Exception as error:  # whatever the called constructors and pickle itself raise
        raise PlainPickleError(f"it is malformed: {error!r:.300}") from None


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, vocabulary: Vocabulary) -> None:
        super().__init__(io.BytesIO(data))
        self._vocabulary = vocabulary

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._vocabulary:
            raise PlainPickleError(f"{module:.100}.{name:.100} is not allowed in it")
        return self._vocabulary[module, name]


# ---------------------------------------------------------------------- the scan

_KEYS = {"BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
_ATOMS = _KEYS | _BYTES | {"NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT", "EMPTY_TUPLE", "GLOBAL"}
_CONTAINERS = {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
_COMBINES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "STOP"}
"""Make a value of others."""
_LIST, _DICT, _SET, _MADE = {"EMPTY_LIST"}, {"EMPTY_DICT"}, {"EMPTY_SET"}, {"NEWOBJ", "REDUCE"}
_CHANGES = {"APPEND": _LIST, "APPENDS": _LIST, "SETITEM": _DICT, "SETITEMS": _DICT}
_CHANGES |= {"ADDITEMS": _SET, "BUILD": _MADE}
"""Put values into one before them, and what must have made that."""
_NAMES = {"GLOBAL", "STACK_GLOBAL"}
_FIRST = _CHANGES | {"REDUCE": _NAMES, "NEWOBJ": _NAMES}
"""What must have made the first of the values that an opcode takes."""
_KEY_STEP = {"SETITEM": 2, "SETITEMS": 2, "ADDITEMS": 1}
_IN_ONE_PLACE = {"EMPTY_LIST", "EMPTY_DICT", "NEWOBJ", "BUILD"}
"""May not be referred to again, so that what is read is a tree."""


@dataclass(slots=True)
class _Value:
    """What an object on the stack will be: made by which opcode, how large, how deep."""

    made_by: str
    size: int = 1
    depth: int = 0

    def take_in(self, items: Iterable[_Value]) -> None:
        for item in items:
            _require(item.made_by != "NEWOBJ", "an object has no state")
            self.size += item.size
            self.depth = max(self.depth, item.depth + 1)
        _require(self.depth <= _DEEPEST, f"it is nested more than {_DEEPEST} deep")


# A pickle may have a thousand million atoms. Their values never change, so that they can be shared.
_atom = functools.cache(_Value)


def _scan(data: bytes) -> None:
    """Raises an error if executing the opcodes could do harm, or needs more memory than they do."""
    stack: list[_Value] = []
    marks: list[int] = []
    memo: list[_Value] = []
    arg: Any
    for opcode, arg, _position in pickletools.genops(data):
        name = opcode.name
        if name in _ATOMS:
            size = len(arg) if isinstance(arg, (str, bytes)) else 1
            stack.append(_atom(name, min(size, _LARGEST_SHARED + 1)))
        elif name in _CONTAINERS:
            stack.append(_Value(name))
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            at = len(memo) if arg is None else arg
            _require(at <= len(memo), "a memo index is too large")
            memo[at : at + 1] = [stack[-1]]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(_shared(memo[arg]))
        elif name == "MARK":
            _require(len(marks) < _DEEPEST, f"it is nested more than {_DEEPEST} deep")
            marks.append(len(stack))
        elif name in _COMBINES or name in _CHANGES:
            start = len(stack) - len(opcode.stack_before)
            if pickletools.markobject in opcode.stack_before:  # it takes all since the mark
                start = marks.pop() - len(opcode.stack_before) + 2
            _require(start >= (marks[-1] if marks else 0), "something is missing")
            values = stack[start:]
            stack[start:] = [_result(name, values)]
        else:
            _require(name in ("PROTO", "FRAME"), f"opcode {name} is not allowed")
    _require(len(stack) == 1 and not marks, "it is not one object")


def _shared(value: _Value) -> _Value:
    """``value``, which is referred to again."""
    _require(
        value.made_by not in _IN_ONE_PLACE and value.size <= _LARGEST_SHARED,
        "it refers again to what is large or can change",
    )
    if value.made_by in ("EMPTY_SET", "REDUCE"):
        value.made_by = "SHARED"  # it is not filled or given a state any more: it would grow
    return value


def _result(name: str, values: list[_Value]) -> _Value:
    """What opcode ``name`` makes of the values that it takes off the stack."""
    first = _FIRST.get(name)
    _require(first is None or values[0].made_by in first, f"{name} of something else")
    _require(name != "NEWOBJ" or values[1].made_by == "EMPTY_TUPLE", "an object has arguments")
    keys = values[1 :: _KEY_STEP[name]] if name in _KEY_STEP else []
    _require(all(key.made_by in _KEYS for key in keys), "a key is no string or integer")
    made = values.pop(0) if name in _CHANGES else _Value(name)
    made.take_in(values)
    if name == "BUILD":
        made.made_by = name
    return made


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise PlainPickleError(otherwise)
