"""Every message between server and worker: named, encoded, decoded.

Server to worker: a handle, then buckets, then twice ``None`` (release the buffer; finish), or at
any time an abort. Worker to server: ``ACK``, or the UTF-8 text of a traceback. The bytes are those
of the original's release 0.4, so either end also talks to the original's other end.

What comes from the other process is unpickled with a reader that knows only the types of these
messages and calls nothing but ``torch.Size`` and exception classes.
"""

from __future__ import annotations

import builtins
import importlib
import io
import json
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict

import torch

from checkpoint_engine.errors import WireError

ACK = b""
NOTHING_MORE = pickle.dumps(None)
"""Sent twice: first drop the buffer, then run the post hook."""

_EXTENSION_MARK = b"\x00checkpoint-engine\x00"


class FlattenedTensorMetadata(TypedDict):
    """One tensor of a bucket: ``offset`` in bytes from the start of the double buffer."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    offset: int


@dataclass(frozen=True)
class Handle:
    """The double buffer: calling ``rebuild(*args)`` maps it."""

    rebuild: Callable[..., torch.Tensor]
    args: tuple[Any, ...]
    extensions: dict[str, Any]


@dataclass(frozen=True)
class Bucket:
    """Tensors that are now in the double buffer."""

    tensors: list[FlattenedTensorMetadata]
    extensions: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NothingMore:
    """No more buckets (first), no more messages (second)."""


@dataclass(frozen=True)
class Abort:
    """The update failed elsewhere; the worker raises this and does not reply."""

    error: Exception


def encode_handle(
    rebuild: Callable[..., torch.Tensor], args: tuple[Any, ...], extensions: dict[str, Any]
) -> bytes:
    """The first message. ``extensions`` stand behind the pickle, where readers of 0.4 do not
    look."""
    return pickle.dumps((rebuild, args)) + _EXTENSION_MARK + json.dumps(extensions).encode()


def encode_acceptance(extensions: dict[str, Any]) -> bytes:
    """A worker's reply to a handle that has extensions; to any other it replies ``ACK``."""
    return _EXTENSION_MARK + json.dumps(extensions).encode()


def decode_acceptance(reply: bytes) -> dict[str, Any] | None:
    """The extensions of a worker that accepts, ``None`` if it refuses."""
    if reply == ACK:
        return {}
    return _extensions_of(reply) if reply.startswith(_EXTENSION_MARK) else None


def encode_bucket(tensors: Iterable[dict[str, Any]]) -> bytes:
    """A bucket's message, from what ``plan.to_named_tensor`` returns."""
    return pickle.dumps(list(tensors))


def encode_extensions(extensions: dict[str, Any]) -> bytes:
    """What may follow a bucket's message, where readers of 0.4 do not look."""
    return _EXTENSION_MARK + json.dumps(extensions).encode()


def encode_abort(reason: str) -> bytes:
    return pickle.dumps(RuntimeError(reason))


def decode_handle(message: bytes) -> Handle | Abort:
    """The first message. Raises ``WireError`` if it is anything else."""
    content = _load(message)
    if isinstance(content, Exception):
        return Abort(content)
    if not (
        isinstance(content, tuple)
        and len(content) == 2
        and isinstance(content[0], _Global)
        and isinstance(content[1], tuple)
    ):
        raise WireError(f"expected the handle of a buffer, got {_shown(content)}")
    rebuild, args = content
    arguments = tuple(arg.resolve(_ARGUMENTS) if isinstance(arg, _Global) else arg for arg in args)
    return Handle(rebuild.resolve(_REBUILD_FUNCTIONS), arguments, _extensions_of(message))


def decode_message(message: bytes) -> Bucket | NothingMore | Abort:
    """Any message after the handle. Raises ``WireError`` on what is none of them."""
    content = _load(message)
    if content is None:
        return NothingMore()
    if isinstance(content, Exception):
        return Abort(content)
    if isinstance(content, list) and all(_is_tensor_metadata(entry) for entry in content):
        return Bucket(content, _extensions_of(message))
    raise WireError(f"expected a bucket, an abort or None, got {_shown(content)}")


def encode_failure(traceback: str) -> bytes:
    """A worker's negative reply; never empty, for that would say it succeeded."""
    return traceback.encode(errors="replace") or b"failed without a message"


def _extensions_of(message: bytes) -> dict[str, Any]:
    _, mark, tail = message.rpartition(_EXTENSION_MARK)
    if not mark:
        return {}
    try:
        extensions = json.loads(tail)
    except ValueError as error:
        raise WireError(f"the handle's extensions are not JSON: {error}") from error
    return extensions if isinstance(extensions, dict) else {}


def _is_tensor_metadata(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("dtype"), torch.dtype)
        and isinstance(entry.get("shape"), tuple)
        and all(type(length) is int and length >= 0 for length in entry["shape"])
        and type(entry.get("offset")) is int
        and entry["offset"] >= 0
    )


def _shown(content: Any) -> str:
    return f"{type(content).__name__} {content!r:.200}"


_REBUILD_FUNCTIONS = {
    ("checkpoint_engine.ipc", "map_shared_memory"),
    ("torch.multiprocessing.reductions", "rebuild_cuda_tensor"),
    ("torch_npu.multiprocessing.reductions", "rebuild_npu_tensor"),
}
_ARGUMENTS = {
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.storage", "TypedStorage"),
    ("torch.storage", "UntypedStorage"),
}


class _Global(NamedTuple):
    """Stands for a function or class named in a message, so that unpickling cannot call it.

    A named tuple, because nothing in a message can change one.
    """

    module: str
    name: str

    def resolve(self, allowed: set[tuple[str, str]]) -> Any:
        if tuple(self) not in allowed:
            raise WireError(f"a message has {self.module}.{self.name} where it must not be")
        return getattr(importlib.import_module(self.module), self.name)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _REBUILD_FUNCTIONS | _ARGUMENTS:
            return _Global(module, name)
        if module == "torch":
            value = getattr(torch, name, None)
            if value is torch.Size or isinstance(value, torch.dtype):
                return value
        if module == "builtins":
            value = getattr(builtins, name, None)
            if isinstance(value, type) and issubclass(value, Exception):
                return value
        raise WireError(f"a message names {module}.{name}, which is no part of the protocol")


def _load(message: bytes) -> Any:
    try:
        return _Unpickler(io.BytesIO(message)).load()
    except WireError:
        raise
    except Exception as error:
        raise WireError(f"a message of {len(message)} bytes cannot be read: {error!r}") from error
