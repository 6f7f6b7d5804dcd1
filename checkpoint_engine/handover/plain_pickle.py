"""Reads pickles of plain data, from anybody.

Programs written for the original library send and store pickles: numbers, strings, lists, dicts,
dtypes, shapes and a few models. ``read_pickle`` first scans the opcodes without executing any, and
refuses those that such pickles do not have. Then ``pickle.Unpickler`` executes them. Every name in
the pickle is looked up in a ``Vocabulary``, which hands out nothing that is dangerous to call.

The scan is there because ``pickle`` alone allocates gigabytes for a message of eight bytes (a memo
index), sets attributes of whatever a name stands for, and makes tuples that contain themselves
so many times that hashing or printing them takes years.
"""

from __future__ import annotations

import functools
import io
import pickle
import pickletools
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import ValidationError

from checkpoint_engine.data_types import (
    DTYPES,
    DataToGather,
    Lease,
    MemoryBufferMetaList,
    MemoryBufferMetas,
    ParameterMeta,
    is_shape,
)

_DEEPEST = 100
"""How many containers and objects may lie inside each other."""
_LARGEST_SHARED = 256
"""Characters, bytes and elements of a value that a pickle may refer to again."""


class PlainPickleError(ValueError):
    """The pickle is malformed, or holds something that is not allowed."""


class Vocabulary:
    """What the names in a pickle stand for: torch's dtypes and shapes. Subclasses add to it.

    Pickles may call what ``find`` returns with any arguments, and make objects of its classes. They
    cannot change its attributes.
    """

    strange = "does not belong there"
    """What an error says of a name that is not known."""

    def find(self, module: str, name: str) -> Any:
        """What ``module.name`` stands for."""
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("torch", "Size"):
            return _make_size
        raise PlainPickleError(f"{module:.100}.{name:.100} {self.strange}")


class ModelWords(Vocabulary):
    """Also the data types that the original's programs store and exchange, which validate what
    they are made of."""

    strange = "does not belong into metas"

    def find(self, module: str, name: str) -> Any:
        if module in ("checkpoint_engine.ps", "checkpoint_engine.data_types") and name in _MODELS:
            return _MODELS[name]
        return super().find(module, name)


_MODELS = {
    model.__name__: model
    for model in (DataToGather, Lease, MemoryBufferMetaList, MemoryBufferMetas, ParameterMeta)
}


def read_pickle(data: bytes, vocabulary: Vocabulary) -> Any:
    """The object at the start of ``data``; what stands behind it is ignored.

    Raises:
        PlainPickleError: it is none, or ``vocabulary`` refuses something in it.
    """
    try:
        _scan(data)
        return _Unpickler(data, vocabulary).load()
    except PlainPickleError:
        raise
    except ValidationError as error:
        raise PlainPickleError(f"{error.errors(include_input=False)[:3]}") from None
    except Exception as error:  # whatever the called constructors and pickle itself raise
        raise PlainPickleError(f"it is malformed: {error!r:.100}") from None


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, vocabulary: Vocabulary) -> None:
        super().__init__(io.BytesIO(data))
        self._vocabulary = vocabulary

    def find_class(self, module: str, name: str) -> Any:
        return self._vocabulary.find(module, name)


def _make_size(lengths: Any) -> torch.Size:
    if not is_shape(lengths):
        raise PlainPickleError("a shape is no sequence of lengths")
    return torch.Size(lengths)


# ---------------------------------------------------------------------- the scan

_KEYS = {"BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
_VALUES = _KEYS | _BYTES | {"NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT", "EMPTY_TUPLE", "GLOBAL"}
_CONTAINERS = {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_FILLS = {
    "APPEND": ("EMPTY_LIST", 1),
    "APPENDS": ("EMPTY_LIST", None),
    "SETITEM": ("EMPTY_DICT", 2),
    "SETITEMS": ("EMPTY_DICT", None),
    "ADDITEMS": ("EMPTY_SET", None),
}
_ARGUMENTS = {"REDUCE": ("TUPLE", "EMPTY_TUPLE"), "NEWOBJ": ("EMPTY_TUPLE",)}
_IN_ONE_PLACE = {"EMPTY_LIST", "EMPTY_DICT", "NEWOBJ", "BUILD"}
"""May not be referred to again, so that what is read is a tree."""


class _Value:
    """What an object on the stack will be: made by which opcode, how large, how deep.

    Those of atoms are cached and never change: a pickle may have a thousand million atoms.
    """

    __slots__ = ("depth", "made_by", "size")

    def __init__(self, made_by: str, size: int = 1, depth: int = 0) -> None:
        self.made_by = made_by
        self.size = size
        self.depth = depth

    def take_in(self, items: Sequence[_Value]) -> _Value:
        for item in items:
            if item.made_by == "NEWOBJ":
                raise PlainPickleError("an object has no state")
            self.size += item.size
            if item.depth >= self.depth:
                self.depth = item.depth + 1
        if self.depth > _DEEPEST:
            raise PlainPickleError(f"it is nested more than {_DEEPEST} deep")
        return self


@functools.cache
def _atom(made_by: str, size: int) -> _Value:
    return _Value(made_by, size)


def _scan(data: bytes) -> None:
    """Raises an error if executing the opcodes could do harm, or needs more memory than they do."""
    stack: list[_Value] = []
    marked: list[list[_Value]] = []
    memo: list[_Value] = []

    def pop(count: int | None) -> list[_Value]:
        """The topmost ``count``, or all since the mark."""
        nonlocal stack
        if count is None:
            popped, stack = stack, marked.pop()
        else:
            popped = stack[len(stack) - count :]
            _require(len(popped) == count, "something is missing")
            del stack[len(stack) - count :]
        return popped

    arg: Any
    for opcode, arg, _position in pickletools.genops(data):
        name = opcode.name
        if name in _VALUES:
            size = len(arg) if isinstance(arg, (str, bytes)) else 1
            stack.append(_atom(name, min(size, _LARGEST_SHARED + 1)))
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            at = len(memo) if arg is None else arg
            _require(at <= len(memo), "a memo index is too large")
            memo[at : at + 1] = [stack[-1]]
        elif name in ("BINGET", "LONG_BINGET"):
            value = memo[arg]
            _require(
                value.made_by not in _IN_ONE_PLACE and value.size <= _LARGEST_SHARED,
                "it refers again to what is large or can change",
            )
            # What is shared is not filled or given a state any more: its size would grow.
            changes = value.made_by in ("EMPTY_SET", "REDUCE")
            stack.append(_Value("SHARED", value.size, value.depth) if changes else value)
        elif name == "MARK":
            _require(len(marked) < _DEEPEST, f"it is nested more than {_DEEPEST} deep")
            marked.append(stack)
            stack = []
        elif name in _CONTAINERS:
            stack.append(_Value(name))
        elif name == "TUPLE" or name in _TUPLES:
            items = pop(_TUPLES.get(name))
            stack.append(_Value("TUPLE").take_in(items))
        elif name in _FILLS:
            kind, count = _FILLS[name]
            items = pop(count)
            _require(stack[-1].made_by == kind, "it fills what is no container")
            keys = {"EMPTY_LIST": [], "EMPTY_DICT": items[::2], "EMPTY_SET": items}[kind]
            _require(all(key.made_by in _KEYS for key in keys), "a key is no string or integer")
            stack[-1].take_in(items)
        elif name == "STACK_GLOBAL":
            pop(2)
            stack.append(_atom("GLOBAL", 1))
        elif name in ("REDUCE", "NEWOBJ"):
            function, args = pop(2)
            _require(function.made_by == "GLOBAL", "it calls what it has made")
            _require(args.made_by in _ARGUMENTS[name], "it has arguments that do not belong there")
            stack.append(_Value(name).take_in([args]))
        elif name == "BUILD":
            made, state = pop(2)
            _require(made.made_by in ("NEWOBJ", "REDUCE"), "it changes what it must not")
            made.made_by = "BUILD"
            stack.append(made.take_in([state]))
        elif name == "FRAME":
            _require(arg <= len(data), "it ends too early")
        elif name == "STOP":
            _require(len(stack) == 1 and not marked, "it is not one object")
            _Value("STOP").take_in(stack)
        else:
            _require(name == "PROTO", f"opcode {name} is not allowed")


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise PlainPickleError(otherwise)
