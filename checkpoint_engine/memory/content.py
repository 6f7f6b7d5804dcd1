"""Hashes that say whether tensors have the same content, wherever they lie and whoever has them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from checkpoint_engine.data_types import MemoryBuffer, placed, tensor_nbytes
from checkpoint_engine.ground.needs import HASH_BYTES
from checkpoint_engine.memory import threads

_PIECE = 16 << 20
"""Bytes that a thread hashes at a time. A larger tensor's hash is that of its pieces' hashes."""

_Content = tuple[bytes, memoryview]
"""What a tensor is, as text, and its bytes."""


def content_hashes(buffers: Sequence[MemoryBuffer], check: Callable[[], None]) -> bytes:
    """A 128-bit BLAKE2b hash of each tensor's dtype, shape and bytes, in the order of the buffers.

    Nothing is kept: the memory is the user's, too, who may have changed it since.

    Args:
        check: called in this thread now and then; what it raises ends it.
    """
    contents = list(_contents(buffers))
    found: list[list[bytes]] = [[b""] * _count_pieces(content) for _, content in contents]
    tasks = [(0, partial(_hash, contents, found, some)) for some in _shares(contents)]
    threads.run_tasks(tasks, lambda _: check())
    return b"".join(
        pieces[0] if len(pieces) == 1 else _hash_of(about + b"".join(pieces))
        for (about, _), pieces in zip(contents, found, strict=True)
    )


def _contents(buffers: Sequence[MemoryBuffer]) -> Iterator[_Content]:
    for buffer in buffers:
        memory = buffer.buffer.numpy().data
        for start, meta in placed(buffer.metas):
            nbytes = tensor_nbytes(meta.dtype, meta.shape)
            yield f"{meta.dtype} {list(meta.shape)}\0".encode(), memory[start : start + nbytes]


def _count_pieces(content: memoryview) -> int:
    return max(1, -(-len(content) // _PIECE))


def _shares(contents: Sequence[_Content]) -> Iterator[list[tuple[int, int]]]:
    """Tensors and pieces, by number, of about so many bytes that a thread is worth while."""
    share: list[tuple[int, int]] = []
    nbytes = 0
    for number, (_, content) in enumerate(contents):
        for piece in range(_count_pieces(content)):
            share.append((number, piece))
            nbytes += min(_PIECE, len(content) - piece * _PIECE)
            if nbytes >= _PIECE // 2:
                yield share
                share, nbytes = [], 0
    if share:
        yield share


def _hash(
    contents: Sequence[_Content], found: list[list[bytes]], share: Sequence[tuple[int, int]]
) -> None:
    for number, piece in share:
        about, content = contents[number]
        is_whole = len(found[number]) == 1  # its shape says so: the two kinds are never mixed up
        part = content[piece * _PIECE : (piece + 1) * _PIECE]
        found[number][piece] = _hash_of(about if is_whole else b"", part)


def _hash_of(about: bytes, content: bytes | memoryview = b"") -> bytes:
    digest = hashlib.blake2b(about, digest_size=HASH_BYTES)
    digest.update(content)
    return digest.digest()
