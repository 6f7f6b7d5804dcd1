"""Whether tensors hold the same content, wherever they lie.

Not the transport's sums (``checksum``): those depend on a tensor's place, and show only that bytes
arrived.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence, Set

from checkpoint_engine.data_types import MemoryBuffer, tensor_nbytes

_HASH_BYTES = 16


def hash_tensors(buffers: Sequence[MemoryBuffer], names: Set[str]) -> dict[str, str]:
    """A 128-bit BLAKE2b hash, in hexadecimal, of the bytes of each tensor in ``names``.

    Padding is not part of it. Tensors of one buffer lie one behind the other, see ``MemoryBuffer``.
    """
    hashes = {}
    for buffer in buffers:
        sizes = (meta.aligned_size for meta in buffer.metas)
        starts = itertools.accumulate(sizes, initial=0)
        memory = buffer.buffer.numpy().data
        for meta, start in zip(buffer.metas, starts, strict=False):
            if meta.name in names:
                content = memory[start : start + tensor_nbytes(meta.dtype, meta.shape)]
                hashes[meta.name] = hashlib.blake2b(content, digest_size=_HASH_BYTES).hexdigest()
    return hashes
