"""What ``get_metas`` returns, as bytes for a file or an HTTP body, and back.

We write JSON. Programs written for the original library left pickles; these are still read, with an
unpickler that knows only the types such a file holds, and calls nothing but ``torch.Size``.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from checkpoint_engine.data_types import MemoryBufferMetaList, parse_dtype

Metas = dict[int, MemoryBufferMetaList]
"""By owner rank: what it owns and how to read it."""

_ADAPTER = TypeAdapter(Metas)
_PICKLE_MARK = b"\x80"
_MODULES = ("checkpoint_engine.ps", "checkpoint_engine.data_types")
_RECORDS = ("MemoryBufferMetaList", "MemoryBufferMetas", "ParameterMeta")


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
            return _ADAPTER.validate_python(_unpickle(data), from_attributes=True)
        return _ADAPTER.validate_json(data)
    except ValidationError as error:
        raise ValueError(f"not the metas of a checkpoint: {error}") from error


class _Record:
    """Takes the place of the original's classes: holds their fields, checks and calls nothing."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state["__dict__"])


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _MODULES and name in _RECORDS:
            return _Record
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if module == "torch":
            return parse_dtype(name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into metas")


def _unpickle(data: bytes) -> Any:
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a broken or hostile pickle can raise anything
        raise ValueError(f"not a pickle of a checkpoint's metas: {error}") from error
