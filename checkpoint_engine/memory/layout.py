"""Which tensor of a checkpoint lies where in which host buffer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import repeat, takewhile

from checkpoint_engine.data_types import ParameterMeta
from checkpoint_engine.memory.sources import TensorSource, natural_key

MAX_BUFFER_BYTES = 4 << 30
"""Most bytes of one host buffer, unless a single tensor needs more."""


def pack(sources: Mapping[str, TensorSource]) -> list[list[ParameterMeta]]:
    """The tensors of each host buffer: natural order, padded, consecutive from offset 0.

    No buffer takes more than ``MAX_BUFFER_BYTES``, or the largest tensor if that is larger.
    """
    metas = _sorted_metas(sources)
    limit = max([MAX_BUFFER_BYTES, *(meta.aligned_size for meta in metas)])
    return list(takewhile(bool, _next_fit(metas, repeat(limit))))


def pack_into(
    sources: Mapping[str, TensorSource], capacities: list[int]
) -> list[list[ParameterMeta]]:
    """As ``pack``, but into buffers of these sizes in bytes. One list for each, maybe empty.

    Raises:
        ValueError: they do not fit.
    """
    metas = _sorted_metas(sources)
    layout = list(_next_fit(metas, capacities))
    if sum(map(len, layout)) < len(metas):
        raise ValueError(
            f"the shared memory pool has buffers of {capacities} bytes; {len(metas)} tensors of "
            f"{packed_size(metas)} bytes, the largest of "
            f"{max(meta.aligned_size for meta in metas)}, do not fit: free the pool first with "
            f"unregister_checkpoint(name, force=True)"
        )
    return layout


def packed_size(metas: Iterable[ParameterMeta]) -> int:
    """Bytes of tensors that lie one behind the other, padding included."""
    return sum(meta.aligned_size for meta in metas)


def _sorted_metas(sources: Mapping[str, TensorSource]) -> list[ParameterMeta]:
    return [sources[name].meta for name in sorted(sources, key=natural_key)]


def _next_fit(
    metas: list[ParameterMeta], capacities: Iterable[int]
) -> Iterator[list[ParameterMeta]]:
    """The tensors of each buffer: as many of those that are left as fit one behind the other."""
    left = deque(metas)
    for room in capacities:
        taken: list[ParameterMeta] = []
        while left and left[0].aligned_size <= room:
            room -= left[0].aligned_size
            taken.append(left.popleft())
        yield taken
