"""Reads pickles of plain data, without the pickle module.

Programs written for the original library send and store pickles. What those hold is plain: numbers,
strings, lists, dicts, dtypes, shapes, a few names. This reader knows the opcodes that Python writes
for them and no others; what a name stands for and what may be called is up to its user. So nothing
in a pickle runs, and nothing that it builds is out of proportion to its length: pickle itself
allocates gigabytes for a message of eight bytes (a memo index), and takes years to hash, compare or
print a nested tuple that refers to itself thirty times.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from pydantic import ValidationError

from checkpoint_engine.data_types import (
    DTYPES,
    BucketRange,
    DataToGather,
    H2DBucket,
    Lease,
    MemoryBufferMetaList,
    MemoryBufferMetas,
    ParameterMeta,
    is_shape,
)

_LONGEST_SHARED = 256
"""What is referred to a second time may have this many characters, bytes or elements."""
_LONGEST_NUMBER = 64
"""Bytes, or digits, of an integer."""
_ATOMS = (type(None), bool, int, float)
_STOP = ord(".")
_MARK = object()


class PlainPickleError(ValueError):
    """The data is no pickle of what this reader's user knows."""


class Vocabulary:
    """What the names in a pickle stand for, and what may be done with them: by itself, torch's
    dtypes and shapes. Users add theirs, and leave the rest to ``super()``, which refuses it.

    What ``find`` returns must not be mutable.
    """

    strange = "does not belong there"
    """What an error says of a name that is not known."""
    shared_types: tuple[type, ...] = (torch.dtype, torch.Size, type)
    """Exact types of what may stand in several places, besides numbers, strings, flat tuples."""

    def find(self, module: str, name: str) -> Any:
        """What ``module.name`` stands for."""
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("torch", "Size"):
            return torch.Size
        raise PlainPickleError(f"{module:.100}.{name:.100} {self.strange}")

    def call(self, function: Any, args: tuple[Any, ...]) -> Any:
        """What ``function(*args)`` returns."""
        if function is torch.Size and len(args) == 1 and is_shape(args[0]):
            return torch.Size(args[0])
        raise PlainPickleError("it calls what it must not")

    def new(self, cls: Any, args: tuple[Any, ...]) -> Any:
        """What ``cls.__new__(cls, *args)`` returns."""
        raise PlainPickleError("it makes an object that it must not")

    def set_state(self, made: Any, state: Any) -> None:
        """What ``made.__setstate__(state)`` does."""
        raise PlainPickleError("it changes what it must not")


class ModelWords(Vocabulary):
    """Also the data types that the original's programs store and exchange."""

    strange = "does not belong into metas"
    shared_types = (*Vocabulary.shared_types, type(ParameterMeta))

    def find(self, module: str, name: str) -> Any:
        if module in _MODEL_MODULES and name in _MODELS:
            return _MODELS[name]
        return super().find(module, name)

    def new(self, cls: Any, args: tuple[Any, ...]) -> Any:
        if cls is BucketRange and len(args) == 3 and all(type(arg) is int for arg in args):
            return BucketRange(*args)
        if cls in _MODELS.values() and not args:
            return cls.__new__(cls)
        return super().new(cls, args)

    def set_state(self, made: Any, state: Any) -> None:
        fields = state.get("__dict__") if type(state) is dict else None
        if type(made) not in _MODELS.values() or type(fields) is not dict:
            return super().set_state(made, state)
        try:
            made.__setstate__(type(made).model_validate(fields).__getstate__())
        except ValidationError as error:
            raise PlainPickleError(f"{error.errors(include_input=False)[:3]}") from None


_MODEL_MODULES = ("checkpoint_engine.ps", "checkpoint_engine.data_types")
_MODELS = {
    model.__name__: model
    for model in (
        BucketRange,
        DataToGather,
        H2DBucket,
        Lease,
        MemoryBufferMetaList,
        MemoryBufferMetas,
        ParameterMeta,
    )
}


def read_pickle(data: bytes, vocabulary: Vocabulary) -> Any:
    """The object at the start of ``data``; what stands behind it is ignored.

    Raises:
        PlainPickleError: it is none, or ``vocabulary`` refuses something in it.
    """
    reader = _Reader(data, vocabulary)
    try:
        return reader.run()
    except PlainPickleError:
        raise
    except (IndexError, KeyError, ValueError, OverflowError) as error:
        raise PlainPickleError(f"it is malformed before byte {reader.at}: {error!r:.100}") from None


class _Reader:
    """A stack machine, as pickle's. One method for each kind of opcode."""

    def __init__(self, data: bytes, vocabulary: Vocabulary) -> None:
        self.at = 0
        self._data = data
        self.vocabulary = vocabulary
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        data, opcodes = self._data, _OPCODES
        while (opcode := data[self.at]) != _STOP:
            self.at += 1
            opcodes[opcode](self)
        if len(self._stack) != 1 or self._marks:
            self._refuse("it is not one object")
        return self._stack[0]

    def _refuse(self, why: str) -> NoReturn:
        raise PlainPickleError(f"{why}, before byte {self.at}")

    # ------------------------------------------------------------------ bytes

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self._data):
            self._refuse("it ends too early")
        taken = self._data[self.at : end]
        self.at = end
        return taken

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def line(self) -> bytes:
        end = self._data.index(b"\n", self.at)
        taken = self._data[self.at : end]
        self.at = end + 1
        return taken

    # ------------------------------------------------------------------ values

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def push_int(self, width: int) -> None:
        if width > _LONGEST_NUMBER:
            self._refuse("a number is too long")
        self.push(int.from_bytes(self.take(width), "little", signed=True))

    def push_float(self) -> None:
        self.push(struct.unpack(">d", self.take(8))[0])

    def push_text(self, width: int) -> None:
        self.push(str(self.take(self.number(width)), "utf-8", "surrogatepass"))

    def push_bytes(self, width: int) -> None:
        self.push(self.take(self.number(width)))

    def push_digits(self) -> None:
        digits = self.line()
        if digits in (b"00", b"01"):
            self.push(digits == b"01")
        elif len(digits) <= _LONGEST_NUMBER:
            self.push(int(digits.removesuffix(b"L")))
        else:
            self._refuse("a number is too long")

    # ------------------------------------------------------------------ containers

    def mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        taken, self._stack = self._stack, self._marks.pop()
        return taken

    def _pop(self, count: int) -> list[Any]:
        if count > len(self._stack):
            self._refuse("something is missing")
        taken = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return taken

    def _top(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            self._refuse(f"there is no {kind.__name__}")
        return self._stack[-1]

    def make_tuple(self, count: int | None = None) -> None:
        self.push(tuple(self._since_mark() if count is None else self._pop(count)))

    def make_list(self) -> None:
        self.push(self._since_mark())

    def make_dict(self) -> None:
        items = self._since_mark()
        self.push({})
        self._set(items)

    def append(self, count: int | None = None) -> None:
        items = self._since_mark() if count is None else self._pop(count)
        self._top(list).extend(items)

    def set_items(self, count: int | None = None) -> None:
        self._set(self._since_mark() if count is None else self._pop(count))

    def _set(self, items: list[Any]) -> None:
        keys = items[::2]
        self._check_keys(keys)
        self._top(dict).update(zip(keys, items[1::2], strict=True))

    def add_items(self) -> None:
        items = self._since_mark()
        self._check_keys(items)
        self._top(set).update(items)

    def _check_keys(self, keys: list[Any]) -> None:
        """Only what is quick to hash."""
        if not all(type(key) is str or type(key) is int for key in keys):
            self._refuse("a key is neither a string nor an integer")

    # ------------------------------------------------------------------ sharing

    def put(self, place: int | None = None) -> None:
        self._memo[len(self._memo) if place is None else place] = self._stack[-1]

    def get(self, place: int) -> None:
        """Containers and objects have one place each, so that what is read is a tree."""
        value = self._memo[place]
        kind = type(value)
        if kind is str or kind is bytes or kind is set:  # sets hold strings and integers
            shared = len(value) <= _LONGEST_SHARED
        elif kind is tuple:
            shared = len(value) <= _LONGEST_SHARED and all(type(v) in _ATOMS for v in value)
        else:
            shared = kind in _ATOMS or kind in self.vocabulary.shared_types
        if not shared:
            self._refuse("it refers again to what is large or can change")
        self.push(value)

    # ------------------------------------------------------------------ names and calls

    def find(self, module: str, name: str) -> None:
        self.push(self.vocabulary.find(module, name))

    def find_on_stack(self) -> None:
        module, name = self._pop(2)
        if type(module) is not str or type(name) is not str:
            self._refuse("a name is no string")
        self.find(module, name)

    def apply(self, how: Callable[[Any, tuple[Any, ...]], Any]) -> None:
        function, args = self._pop(2)
        if type(args) is not tuple:
            self._refuse("arguments are no tuple")
        self.push(how(function, args))

    def set_state(self) -> None:
        made, state = self._pop(2)
        self.vocabulary.set_state(made, state)
        self.push(made)


_OPCODES: dict[int, Callable[[_Reader], None]] = {
    ord(code): action
    for code, action in {
        "\x80": lambda r: r.take(1),  # the protocol's number
        "\x95": lambda r: r.take(8),  # a frame, which matters to readers of files
        "N": lambda r: r.push(None),
        "\x88": lambda r: r.push(True),
        "\x89": lambda r: r.push(False),
        "K": lambda r: r.push(r.number(1)),
        "M": lambda r: r.push(r.number(2)),
        "J": lambda r: r.push_int(4),
        "\x8a": lambda r: r.push_int(r.number(1)),
        "\x8b": lambda r: r.push_int(r.number(4)),
        "I": _Reader.push_digits,
        "L": _Reader.push_digits,
        "F": lambda r: r.push(float(r.line())),
        "G": _Reader.push_float,
        "V": lambda r: r.push(str(r.line(), "raw-unicode-escape")),
        "\x8c": lambda r: r.push_text(1),
        "X": lambda r: r.push_text(4),
        "\x8d": lambda r: r.push_text(8),
        "C": lambda r: r.push_bytes(1),
        "B": lambda r: r.push_bytes(4),
        "\x8e": lambda r: r.push_bytes(8),
        "(": _Reader.mark,
        ")": lambda r: r.push(()),
        "t": _Reader.make_tuple,
        "\x85": lambda r: r.make_tuple(1),
        "\x86": lambda r: r.make_tuple(2),
        "\x87": lambda r: r.make_tuple(3),
        "]": lambda r: r.push([]),
        "l": _Reader.make_list,
        "a": lambda r: r.append(1),
        "e": _Reader.append,
        "}": lambda r: r.push({}),
        "d": _Reader.make_dict,
        "s": lambda r: r.set_items(2),
        "u": _Reader.set_items,
        "\x8f": lambda r: r.push(set()),
        "\x90": _Reader.add_items,
        "\x94": _Reader.put,
        "q": lambda r: r.put(r.number(1)),
        "r": lambda r: r.put(r.number(4)),
        "p": lambda r: r.put(int(r.line())),
        "h": lambda r: r.get(r.number(1)),
        "j": lambda r: r.get(r.number(4)),
        "g": lambda r: r.get(int(r.line())),
        "c": lambda r: r.find(r.line().decode(), r.line().decode()),
        "\x93": _Reader.find_on_stack,
        "R": lambda r: r.apply(r.vocabulary.call),
        "\x81": lambda r: r.apply(r.vocabulary.new),
        "b": _Reader.set_state,
    }.items()
}
