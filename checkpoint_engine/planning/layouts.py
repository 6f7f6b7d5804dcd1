"""What the ranks tell each other about a checkpoint, compact on the wire.

A rank's part is a place (addresses, lease) and a layout (names, dtypes, shapes). Places are small
and always sent; layouts only where some rank does not have them from the gather before. Models
repeat a few kinds of tensors thousands of times, so a layout holds each kind once.
"""

from __future__ import annotations

import gc
import hashlib
import json
import reprlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from checkpoint_engine.data_types import (
    DataToGather,
    Lease,
    MemoryBufferMetas,
    ParameterMeta,
    is_shape,
    make_metas,
    parse_dtype,
)

_MAX_EXPANSION = 200
"""No tensor without a name of its own: real layouts are 10 to 30 times as large as compressed."""
_MIN_EXPANDED = 1 << 20

Layout = list[list[ParameterMeta]]
"""The tensors of each host buffer."""


@dataclass(frozen=True)
class EncodedLayout:
    """A layout as it is sent."""

    blob: bytes
    digest: str


def encode_layout(buffers: Sequence[Sequence[ParameterMeta]]) -> EncodedLayout:
    """One rank's layout, for ``decode_layout``."""
    kinds: dict[tuple[Any, ...], int] = {}
    names: list[str] = []
    kind_of: list[int] = []
    for metas in buffers:
        names += [meta.name for meta in metas]
        kind_of += [
            kinds.setdefault((meta.dtype, meta.shape, meta.aligned_size), len(kinds))
            for meta in metas
        ]
    content = {
        "counts": [len(metas) for metas in buffers],
        "kinds": [(str(dtype), list(shape), size) for dtype, shape, size in kinds],
        "names": names,
        "kind_of": kind_of,
    }
    blob = zlib.compress(json.dumps(content, separators=(",", ":")).encode(), level=1)
    return EncodedLayout(blob, hashlib.sha256(blob).hexdigest())


def decode_layout(blob: bytes) -> Layout:
    """The inverse of ``encode_layout``.

    Raises:
        ValueError: it is something else, or far larger than its compressed form can be.
    """
    content = _parse(_decompress(blob))
    try:
        kinds = [_kind(*kind) for kind in content["kinds"]]
        names, kind_of, counts = content["names"], content["kind_of"], content["counts"]
        _check_layout(names, kind_of, counts, len(kinds))
    except (TypeError, KeyError) as error:
        raise ValueError(f"not a layout: {error!r:.100}") from error
    metas = make_metas(names, kinds, kind_of)
    layout, start = [], 0
    for count in counts:
        layout.append(metas[start : start + count])
        start += count
    return layout


def _decompress(blob: bytes) -> bytes:
    limit = _MAX_EXPANSION * len(blob) + _MIN_EXPANDED
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(blob, limit)
    except zlib.error as error:
        raise ValueError(f"not a layout: {error}") from error
    if not stream.eof or stream.unused_data:
        raise ValueError(f"not a layout: {len(blob)} bytes that are cut off, or hold too much")
    return content


def _parse(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error!r:.100}") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def _kind(dtype: Any, shape: Any, size: Any) -> tuple[torch.dtype, torch.Size, int]:
    if not is_shape(shape) or not _is_size(size):
        raise ValueError(f"not a kind of tensor: {reprlib.repr((dtype, shape, size))}")
    return parse_dtype(dtype), torch.Size(shape), size


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 96  # also of tensors that nobody could have


def _check_layout(names: Any, kind_of: Any, counts: Any, kinds: int) -> None:
    """All types at once, and not one by one: a large model has hundreds of thousands."""
    if not set(map(type, names)) <= {str} or not set(map(type, [*kind_of, *counts])) <= {int}:
        raise ValueError("not a layout: names are strings, kinds and counts integers")
    if len(names) != len(kind_of) or sum(counts) != len(names) or min(counts, default=0) < 0:
        raise ValueError(f"not a layout: {len(names)} names, {len(kind_of)} of a kind")
    if min(kind_of, default=0) < 0 or max(kind_of, default=-1) >= kinds:
        raise ValueError(f"not a layout: of the {kinds} kinds one is missing")


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Making objects by the hundred thousand would set it off again and again, for nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def encode_place(data: DataToGather, layout_digest: str, known: str) -> bytes:
    """Everything of a rank's part but the layout; ``known``: digest of the layouts it has."""
    return json.dumps(
        {
            "store": data.p2p_store_addr,
            "device": data.rdma_device,
            "host": data.host_ip,
            "uuid": data.device_uuid,
            "lease": data.lease and (data.lease.ptr, data.lease.id),
            "buffers": [
                (buffer.ptr, buffer.size, buffer.checksums)
                for buffer in data.memory_buffer_metas_list
            ],
            "layout": layout_digest,
            "known": known,
        }
    ).encode()


def decode_place(data: bytes) -> dict[str, Any]:
    """What ``encode_place`` sent, for ``join_place``.

    Raises:
        ValueError: it is something else.
    """
    place = _parse(data)
    match place:
        case {
            "store": str() | None,
            "device": str(),
            "host": str(),
            "uuid": str(),
            "lease": None | [int(), str()],
            "buffers": [*buffers],
            "layout": str(),
            "known": str(),
        } if all(_is_buffer(buffer) for buffer in buffers):
            return place
    raise ValueError(f"not a rank's part of a checkpoint: {reprlib.repr(place)}")


def _is_buffer(buffer: Any) -> bool:
    match buffer:
        case [ptr, size, str() | None]:
            return _is_size(ptr) and _is_size(size)
    return False


def join_place(place: dict[str, Any], layout: Layout) -> DataToGather:
    """A rank's whole part, from what ``encode_place`` sent and its layout.

    Raises:
        ValueError: they do not belong together.
    """
    return DataToGather.model_construct(
        p2p_store_addr=place["store"],
        memory_buffer_metas_list=[
            MemoryBufferMetas.model_construct(metas=metas, ptr=ptr, size=size, checksums=sums)
            for (ptr, size, sums), metas in zip(place["buffers"], layout, strict=True)
        ],
        rdma_device=place["device"],
        host_ip=place["host"],
        device_uuid=place["uuid"],
        lease=place["lease"] and Lease(ptr=place["lease"][0], id=place["lease"][1]),
    )


def known_digest(layouts: Mapping[str, Layout]) -> str:
    """Equal on ranks that know the same layouts."""
    return hashlib.sha256("".join(sorted(layouts)).encode()).hexdigest()


def missing_layouts(places: Sequence[dict[str, Any]], known: Mapping[str, Layout]) -> list[int]:
    """The places in the list whose layout has to be sent; the same on every rank.

    Args:
        known: the layouts that this rank has from its last gather, by digest.
    """
    digest = known_digest(known)
    if any(place["known"] != digest for place in places):
        return list(range(len(places)))
    return [i for i, place in enumerate(places) if place["layout"] not in known]


def decode_layouts(
    places: Sequence[dict[str, Any]], known: Mapping[str, Layout], received: Mapping[int, bytes]
) -> dict[str, Layout]:
    """The layouts of all places by digest: ``known`` ones, and those that were ``received``."""
    with _without_garbage_collection():
        fresh = {places[i]["layout"]: decode_layout(blob) for i, blob in received.items()}
    both = {**known, **fresh}
    return {place["layout"]: both[place["layout"]] for place in places}
