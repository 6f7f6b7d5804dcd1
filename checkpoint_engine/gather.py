"""What the ranks tell each other about a checkpoint, compact on the wire.

Models repeat a few kinds of tensors (dtype, shape, padded size) thousands of times, so each kind is
sent once and every tensor names its kind.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import torch

from checkpoint_engine.data_types import (
    DataToGather,
    Lease,
    MemoryBufferMetas,
    ParameterMeta,
    parse_dtype,
)


def encode_gathered(data: DataToGather) -> bytes:
    """One rank's part, for ``decode_gathered``."""
    kinds: dict[tuple[Any, ...], int] = {}
    names: list[str] = []
    kind_of: list[int] = []
    buffers = []
    for buffer in data.memory_buffer_metas_list:
        buffers.append((buffer.ptr, buffer.size, len(buffer.metas)))
        for meta in buffer.metas:
            names.append(meta.name)
            kind = (meta.dtype, meta.shape, meta.aligned_size)
            kind_of.append(kinds.setdefault(kind, len(kinds)))
    content = {
        "store": data.p2p_store_addr,
        "device": data.rdma_device,
        "host": data.host_ip,
        "uuid": data.device_uuid,
        "lease": data.lease and (data.lease.ptr, data.lease.id),
        "buffers": buffers,
        "kinds": [(str(dtype), list(shape), size) for dtype, shape, size in kinds],
        "names": names,
        "kind_of": kind_of,
    }
    return zlib.compress(json.dumps(content, separators=(",", ":")).encode(), level=1)


def decode_gathered(blob: bytes) -> DataToGather:
    """The inverse of ``encode_gathered``."""
    content = json.loads(zlib.decompress(blob))
    kinds = [
        (parse_dtype(dtype), torch.Size(shape), size) for dtype, shape, size in content["kinds"]
    ]
    metas = [
        ParameterMeta.trusted(name, *kinds[kind])
        for name, kind in zip(content["names"], content["kind_of"], strict=True)
    ]
    buffers, start = [], 0
    for ptr, size, count in content["buffers"]:
        held = metas[start : start + count]
        buffers.append(MemoryBufferMetas.model_construct(metas=held, ptr=ptr, size=size))
        start += count
    lease = content["lease"] and Lease(ptr=content["lease"][0], id=content["lease"][1])
    return DataToGather.model_construct(
        p2p_store_addr=content["store"],
        memory_buffer_metas_list=buffers,
        rdma_device=content["device"],
        host_ip=content["host"],
        device_uuid=content["uuid"],
        lease=lease,
    )
