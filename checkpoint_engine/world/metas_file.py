"""What ``get_metas`` returns, as bytes for a file or an HTTP body, and back.

We write JSON. Programs written for the original library left pickles; these are still read, by
``plain_pickle``, which knows the types that such a file holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from checkpoint_engine.data_types import MemoryBufferMetaList
from checkpoint_engine.handover.plain_pickle import MODEL_WORDS, PlainPickleError, read_pickle

T = TypeVar("T")
Metas = dict[int, MemoryBufferMetaList]
"""By owner rank: what it owns and how to read it."""

_ADAPTER = TypeAdapter(Metas)
_PICKLE_MARK = b"\x80"


def encode_metas(metas: Mapping[int, MemoryBufferMetaList]) -> bytes:
    """The metas as JSON, for ``decode_metas``."""
    return _ADAPTER.dump_json(dict(metas))


def decode_metas(data: bytes) -> Metas:
    """The metas from JSON, or from a pickle of the original's releases.

    Raises:
        ValueError: they are neither, or hold something else.
    """
    try:
        if data.startswith(_PICKLE_MARK):
            return _ADAPTER.validate_python(read_pickle(data, MODEL_WORDS))
        return read_metas(data)
    except (ValidationError, PlainPickleError, ValueError) as error:
        raise ValueError(f"not the metas of a checkpoint: {error}") from error


def _let_others_run(parsed: T) -> T:
    """Python runs between any two objects, and another thread may: parsing alone never lets go."""
    return parsed


def read_metas(data: bytes) -> Metas:
    """The metas from JSON, whoever sent it: takes memory in proportion to ``data``, and stops at
    the first owner with a mistake.

    Raises:
        ValueError: it is something else; a ``ValidationError`` if it is JSON at least.
    """
    try:
        owners = json.loads(data, object_hook=_let_others_run)
    except RecursionError:
        raise ValueError("too deeply nested") from None
    if not isinstance(owners, dict):
        raise ValueError("metas are a JSON object: what each owner rank has")
    found: Metas = {}
    for owner in owners.items():
        found |= _ADAPTER.validate_python(dict([owner]))
    return found
