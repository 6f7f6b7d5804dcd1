"""Every message between server and worker: named, encoded, decoded.

Server to worker: a handle, then buckets, then twice ``None`` (release the buffer; finish), or at
any time an abort. Worker to server: ``ACK``, or the UTF-8 text of a traceback. The bytes are those
of the original's release 0.4, so either end also talks to the original's other end.

What comes from the other process is read by ``plain_pickle``, with the types of these messages for
a vocabulary; nothing but shapes and exceptions is made by calls. Between our own two ends
buckets are JSON.
"""

from __future__ import annotations

import base64
import builtins
import importlib
import json
import math
import pickle
import reprlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypedDict

import torch

from checkpoint_engine.data_types import is_shape, parse_dtype
from checkpoint_engine.errors import WireError
from checkpoint_engine.ground.needs import Needs
from checkpoint_engine.handover.plain_pickle import PLAIN_WORDS, PlainPickleError, read_pickle

ACK = b""
NOTHING_MORE = pickle.dumps(None)
"""Sent twice: first drop the buffer, then run the post hook."""

JSON_BUCKETS = "json buckets"
"""An extension that the server offers by naming it ``True``, and a worker accepts likewise."""

PART = "part"
"""An extension: a worker that accepts it takes tensors in parts. A part's message is that of the
whole tensor, alone in a buffer, followed by where the part lies in the double buffer, its bytes,
where it belongs in the tensor, the tensor's bytes, and its owner."""

CHECKSUM = "checksum"
"""An extension: a worker that checks sums itself accepts it with the formula that it knows. With a
bucket: where the bytes lie, how many, the place of the first block, and the sum."""

DELIVERED = "delivered"
"""An extension: a worker that accepts it is told with the first ``None`` which buckets there were,
and fails if it loaded others; see ``loading.loaded``."""

STATEMENT = "statement"
"""An extension: a worker that knows it states with its last answer what the update wrote."""

SOURCES = "sources"
"""An extension: the server offers how many more buffers there are to map, those of the other ranks
of its host. A worker that accepts it gets their handles in the next message, if there are any, and
answers with ``SOURCES`` again: why it cannot map them, or an empty text. Its buckets' offsets count
from the bucket's first byte."""

SOURCE = "source"
"""With a bucket, to a worker that accepted ``SOURCES``: which buffer it is in (0: that of the first
handle, then the others in order), where, and its bytes."""

NEEDS = "needs"
"""An extension between several hosts. The server offers the digest of what it knows that this
worker needs; empty: nothing is known. A worker that accepts answers with the digest of what it is
going to read in this update; empty: everything. With its last answer it states what its loader
needs from now on, as ``ground.needs.Needs.text``; ``True``: what the offered digest stands for;
empty: everything. With a bucket: the digest of the needs that its bytes suffice for. What else the
bucket holds is not what was registered: a worker that does not read by just these needs fails."""

HELD = "held"
"""An extension with ``PS_SKIP_EQUAL=1``, offered as ``True``. A worker that accepts it is sent,
once it has mapped all buffers, the ``tensors_digest`` of the checkpoint and a hash of each tensor's
content, of ``needs.HASH_BYTES``, in the order of the names; zeros where it is not known. It answers
with ``HELD``: a bit for each tensor that it holds, see ``encode_bits``."""

LEFT_OUT = "left out"
"""The next messages to a worker that accepted ``HELD``: bits of tensors to be left out, and whether
that is settled. It answers with those of them that may be: all, or fewer, as of what it processes
together it needs all or nothing. If settled it answers the same bits, or fails. Buckets follow."""

_MOST_BITS = 8 << 20  # bytes

_EXTENSION_MARK = b"\x00checkpoint-engine\x00"


class FlattenedTensorMetadata(TypedDict):
    """One tensor of a bucket: ``offset`` in bytes from the start of the double buffer."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    offset: int


Bucket = list[FlattenedTensorMetadata]
"""Tensors that are now in the double buffer."""


@dataclass(frozen=True)
class Handle:
    """The double buffer: calling ``rebuild(*args)`` maps it."""

    rebuild: Callable[..., torch.Tensor]
    args: tuple[Any, ...]
    extensions: dict[str, Any]


def encode_handle(
    rebuild: Callable[..., torch.Tensor], args: tuple[Any, ...], extensions: dict[str, Any]
) -> bytes:
    """The first message. ``extensions`` stand behind the pickle, where readers of 0.4 do not
    look."""
    return pickle.dumps((rebuild, args)) + encode_extensions(extensions)


def encode_sources(handles: Sequence[bytes]) -> bytes:
    """The handles of other ranks' buffers, as ``encode_handle`` made them."""
    return pickle.dumps(list(handles))


def decode_sources(message: bytes) -> list[Handle] | Exception:
    """Those handles, or why the server aborts. Raises ``WireError`` if it is anything else."""
    match _load(message):
        case _Made(error=error):
            return error
        case list() as encoded if all(isinstance(one, bytes) for one in encoded):
            handles = [decode_handle(one) for one in encoded]
            if not any(isinstance(one, Exception) for one in handles):
                return handles  # type: ignore[return-value]
    raise WireError(f"a message of {len(message)} bytes holds no handles of buffers")


def decode_acceptance(reply: bytes) -> dict[str, Any] | None:
    """What a worker says to a handle: extensions that it accepts, ``None`` if it refuses."""
    if reply.startswith(_EXTENSION_MARK):
        return _parse_extensions(reply[len(_EXTENSION_MARK) :])
    return {} if reply == ACK else None


def encode_contents(tensors: str, hashes: bytes) -> bytes:
    """What a worker that accepted ``HELD`` is sent first."""
    return encode_extensions({HELD: [tensors, base64.b64encode(hashes).decode()]})


def encode_left_out(bits: bytes, is_settled: bool) -> bytes:
    """What it is sent next, once or more often."""
    return encode_extensions({LEFT_OUT: [encode_bits(bits), is_settled]})


def decode_held(message: bytes) -> tuple[str, Any, bytes] | Exception:
    """One of those: ``HELD``, the digest and the hashes, or ``LEFT_OUT``, whether that is settled
    and the bits; or why the server aborts. Raises ``WireError`` if it is anything else."""
    if not message.startswith(_EXTENSION_MARK):
        match _load(message):
            case _Made(error=error):
                return error
    try:
        match _parse_extensions(message[len(_EXTENSION_MARK) :]):
            case {"held": [str() as tensors, str() as hashes]}:
                return HELD, tensors, base64.b64decode(hashes, validate=True)
            case {"left out": [str() as bits, bool() as is_settled]}:
                return LEFT_OUT, is_settled, decode_bits(bits)
    except ValueError as error:  # no base64
        raise WireError(f"a message of {len(message)} bytes cannot be read: {error}") from error
    raise WireError(f"a message of {len(message)} bytes says nothing of what is left out")


def encode_bits(bits: bytes) -> str:
    """A bit of each tensor of a checkpoint, in the order of the names."""
    return base64.b64encode(zlib.compress(bits, 1)).decode()


def decode_bits(told: Any) -> bytes:
    """Raises ``WireError`` if those are none."""
    try:
        stream = zlib.decompressobj()
        bits = stream.decompress(base64.b64decode(told, validate=True), _MOST_BITS)
    except (TypeError, ValueError, zlib.error) as error:
        raise WireError(f"what is held or left out is told wrongly: {error}") from error
    if not stream.eof:
        raise WireError("what is held or left out is told wrongly: it is too much, or too little")
    return bits


def encode_bucket(tensors: Iterable[dict[str, Any]]) -> bytes:
    """A bucket's message, from what ``plan.to_named_tensor`` returns."""
    return pickle.dumps(list(tensors))


def encode_bucket_as_json(tensors: Sequence[dict[str, Any]]) -> bytes:
    """The same for a worker that accepted ``JSON_BUCKETS``. Dtypes and shapes, of which a model
    has few, stand there once."""
    kinds: dict[tuple[torch.dtype, torch.Size], int] = {}
    kind_of = [kinds.setdefault((entry["dtype"], entry["shape"]), len(kinds)) for entry in tensors]
    content = {
        "kinds": [(str(dtype), list(shape)) for dtype, shape in kinds],
        "names": [entry["name"] for entry in tensors],
        "offsets": [entry["offset"] for entry in tensors],
        "kind_of": kind_of,
    }
    return _EXTENSION_MARK + json.dumps(content, separators=(",", ":")).encode()


def _decode_json_bucket(text: bytes) -> Bucket:
    content = _parse(text)
    try:
        kinds = dict(enumerate(_kind(*kind) for kind in content["kinds"]))
        names, offsets, kind_of = content["names"], content["offsets"], content["kind_of"]
        is_table = {type(names), type(offsets), type(kind_of)} == {list}
        if not is_table or {*map(type, names)} - {str} or {*map(type, offsets)} - {int}:
            raise TypeError("names are no list of strings, or offsets no list of integers")
        if min(offsets, default=0) < 0:
            raise ValueError(f"a tensor lies at {min(offsets)}")
        return [
            {"name": name, "dtype": kinds[kind][0], "shape": kinds[kind][1], "offset": offset}
            for name, offset, kind in zip(names, offsets, kind_of, strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"a bucket cannot be read: {error!r:.200}") from error


def _kind(dtype: Any, shape: Any) -> tuple[torch.dtype, torch.Size]:
    if not is_shape(shape):
        raise ValueError(f"{reprlib.repr(shape)} is no shape")
    return parse_dtype(dtype), torch.Size(shape)


def encode_extensions(extensions: dict[str, Any]) -> bytes:
    """What may follow a message, where readers of 0.4 do not look; what a worker replies to a
    handle that has extensions."""
    return _EXTENSION_MARK + json.dumps(extensions).encode()


def encode_needs(needs: Needs | None, known: str) -> str | bool:
    """What a worker states with its last answer; ``known``: the digest that the server offered."""
    if needs is None:
        return ""
    return True if needs.digest == known else needs.text


def decode_needs(told: Any) -> str:
    """That text. Raises ``WireError`` if it is anything else."""
    try:
        if told != "":
            Needs.decode(told)
        return str(told)
    except (TypeError, ValueError) as error:
        raise WireError(f"a worker has stated its needs wrongly: {error}") from error


def split_extensions(message: bytes) -> tuple[bytes, dict[str, Any]]:
    """A message, and what follows it."""
    body, mark, tail = message.rpartition(_EXTENSION_MARK)
    if not (mark and body):  # the mark that a bucket in JSON begins with is its own
        return message, {}
    return body, _parse_extensions(tail)


def _parse_extensions(text: bytes) -> dict[str, Any]:
    extensions = _parse(text)
    if not isinstance(extensions, dict):
        raise WireError(f"expected extensions, got {_shown(extensions)}")
    return extensions


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a message of {len(text)} bytes is not JSON: {error!r:.200}") from error


def encode_abort(reason: str) -> bytes:
    return pickle.dumps(RuntimeError(reason))


def decode_handle(message: bytes) -> Handle | Exception:
    """The first message, or why the server aborts. Raises ``WireError`` if it is anything else."""
    match _load(message):
        case _Made(error=error):
            return error
        case tuple((_Global() as rebuild, tuple() as args)):
            pass
        case content:
            raise WireError(f"expected the handle of a buffer, got {_shown(content)}")
    _, extensions = split_extensions(message)
    seconds = extensions.get("timeout", 0.0)
    if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
        raise WireError(f"the time left is {_shown(seconds)}")
    arguments = tuple(arg.resolve(_ARGUMENTS) if isinstance(arg, _Global) else arg for arg in args)
    return Handle(rebuild.resolve(_REBUILD_FUNCTIONS), arguments, extensions)


def decode_message(message: bytes) -> Bucket | Exception | None:
    """Any message after the handle: a bucket, why the server aborts, which gets no reply, or
    ``None``, see ``NOTHING_MORE``. Raises ``WireError`` on what is none of them."""
    if message.startswith(_EXTENSION_MARK):
        return _decode_json_bucket(message[len(_EXTENSION_MARK) :])
    match _load(message):
        case None:
            return None
        case _Made(error=error):
            return error
        case list() as entries if all(map(_is_tensor_metadata, entries)):
            return entries
        case content:
            raise WireError(f"expected a bucket, an abort or None, got {_shown(content)}")


def encode_failure(traceback: str) -> bytes:
    """A worker's negative reply; never empty, for that would say it succeeded."""
    return traceback.encode(errors="replace") or b"failed without a message"


def _is_tensor_metadata(entry: Any) -> bool:
    match entry:
        case {"name": str(), "dtype": torch.dtype(), "shape": tuple() as shape, "offset": offset}:
            return is_shape(shape) and type(offset) is int and offset >= 0
    return False


def _shown(content: Any) -> str:
    return f"{type(content).__name__} {reprlib.repr(content)}"


_REBUILD_FUNCTIONS = {
    ("checkpoint_engine.handover.ipc", "map_shared_memory"),
    ("torch.multiprocessing.reductions", "rebuild_cuda_tensor"),
    ("torch_npu.multiprocessing.reductions", "rebuild_npu_tensor"),
}
_ARGUMENTS = {("torch", "Tensor"), ("torch.nn.parameter", "Parameter")}
_ARGUMENTS |= {("torch.storage", "TypedStorage"), ("torch.storage", "UntypedStorage")}


class _Global(NamedTuple):
    """Stands for a function or class named in a message, so that reading it cannot call it."""

    module: str
    name: str

    def resolve(self, allowed: set[tuple[str, str]]) -> Any:
        if self not in allowed:
            raise WireError(f"a message has {self.module}.{self.name} where it must not be")
        return getattr(importlib.import_module(self.module), self.name)


class _Made:
    """Stands for an exception in a message. Its notes and other attributes are left out."""

    def __init__(self, cls: type[Exception], *args: Any) -> None:
        plain = [arg if isinstance(arg, _PLAIN) else reprlib.repr(arg) for arg in args]
        try:
            self.error = cls(*plain)
            str(self.error), repr(self.error)
        except Exception:  # its arguments do not suit it
            self.error = RuntimeError(f"{cls.__name__}{reprlib.repr(tuple(plain))}")

    def __setstate__(self, state: Any) -> None: ...

    def __repr__(self) -> str:
        return repr(self.error)


_PLAIN = (str, bytes, int, float, type(None))

# Of these only exceptions can be called.
_WORDS = {
    **PLAIN_WORDS,
    **{word: _Global(*word) for word in _REBUILD_FUNCTIONS | _ARGUMENTS},
    **{
        ("builtins", name): partial(_Made, value)
        for name, value in vars(builtins).items()
        if isinstance(value, type) and issubclass(value, Exception)
    },
}


def _load(message: bytes) -> Any:
    try:
        return read_pickle(message, _WORDS)
    except PlainPickleError as error:
        raise WireError(f"a message of {len(message)} bytes cannot be read: {error}") from error
