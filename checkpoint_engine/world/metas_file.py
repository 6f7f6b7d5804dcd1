"""What ``get_metas`` returns, as bytes for a file or an HTTP body, and back.

We write JSON. Programs written for the original library left pickles; these are still read, by
``plain_pickle``, which knows the types that such a file holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, cast

from pydantic import AfterValidator, TypeAdapter, ValidationError, ValidationInfo

from checkpoint_engine.data_types import MemoryBufferMetaList
from checkpoint_engine.ground.collector import collector_at_rest
from checkpoint_engine.handover.plain_pickle import MODEL_WORDS, PlainPickleError, read_pickle

Metas = dict[int, MemoryBufferMetaList]
"""By owner rank: what it owns and how to read it."""

_ADAPTER = TypeAdapter(Metas)
_PICKLE_MARK = b"\x80"
_OWNER = re.compile("0|[1-9][0-9]{0,9}")
_LAST_OWNER = 2**31
_MOST_OWNERS = 1 << 16
"""Each with a mistake costs its own errors."""
_SMALL = 1 << 20
"""Bytes that may hold whatever they want: it does not take long."""


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


def read_metas(data: bytes) -> Metas:
    """The metas from JSON, whoever sent it. What no field takes is parsed and makes no objects, so
    that ``data`` costs no more than honest metas of as many bytes do.

    Raises:
        ValueError: it is something else, names one owner twice or one that is no rank, or has far
            more lists or commas than metas have; a ``ValidationError`` if pydantic found it.
    """
    _check_proportions(data)
    with collector_at_rest():
        try:
            owners = _OWNERS.validate_json(data, context=set())
        except RuntimeError as error:
            raise ValueError(str(error)) from None
    return {int(owner): owned for owner, owned in owners.items()}


def _check_owner(owner: str, info: ValidationInfo) -> str:
    """``info.context``: those that were named before. A ``RuntimeError`` ends the validation."""
    if not _OWNER.fullmatch(owner) or int(owner) > _LAST_OWNER:
        raise RuntimeError(f"{owner!a:.80} is not the number of an owner rank")
    named = cast("set[str]", info.context)
    if owner in named or len(named) == _MOST_OWNERS:
        raise RuntimeError(f"owner {owner} is named twice, or there are more than {_MOST_OWNERS}")
    named.add(owner)
    return owner


_OWNERS = TypeAdapter(dict[Annotated[str, AfterValidator(_check_owner)], MemoryBufferMetaList])


def _check_proportions(data: bytes) -> None:
    """Refuse a large body of many small values, before they take memory: an empty list takes 20
    times what its text does. Of metas of many tensors, most of the text is their names and dtypes:
    at least 44 bytes for the two brackets of a tensor, and a comma."""
    lists, commas = data.count(b"[") + data.count(b"{"), data.count(b",")
    if len(data) > _SMALL and (lists > len(data) // 16 or commas > len(data) // 6):
        raise ValueError(f"{lists} lists and objects, {commas} commas: too many for {len(data)} B")
