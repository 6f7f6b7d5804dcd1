"""A checkpoint as its owners would hold it, and the plan of its update, without its bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from checkpoint_engine.data_types import (
    MemoryBufferMetaList,
    MemoryBufferMetas,
    ParameterMeta,
)
from checkpoint_engine.memory.files import open_files
from checkpoint_engine.memory.sources import natural_key
from checkpoint_engine.planning.plan import (
    DEVICE_PACE,
    HOST_PACE,
    READ_PACE,
    TransferPlan,
    bucket_size,
    largest_tensor,
    paced,
    plan_transfer,
)
from checkpoint_engine.tools.simulate.cluster import Cluster

Metas = dict[int, MemoryBufferMetaList]


def read_headers(checkpoint: Path) -> list[ParameterMeta]:
    """The tensors of a safetensors file, or of the checkpoint in a folder; only headers are read.

    Raises:
        ValueError: as ``open_files``.
    """
    return [
        ParameterMeta(name=source.name, dtype=source.dtype, shape=source.shape)
        for source in open_files([checkpoint]).values()
    ]


def share_out(tensors: Iterable[ParameterMeta], owners: Sequence[int]) -> Metas:
    """Deal the tensors to the owners, in natural order and by bytes, as ``examples/update.py``
    does."""
    in_order = sorted(tensors, key=lambda meta: natural_key(meta.name))
    total = max(sum(meta.aligned_size for meta in in_order), 1)
    shares: defaultdict[int, list[ParameterMeta]] = defaultdict(list)
    begin = 0
    for meta in in_order:
        place = min(begin * len(owners) // total, len(owners) - 1)
        shares[owners[place]].append(meta)
        begin += meta.aligned_size
    return {owner: _owned(share) for owner, share in shares.items()}


def _owned(metas: list[ParameterMeta]) -> MemoryBufferMetaList:
    size = sum(meta.aligned_size for meta in metas)
    buffer = MemoryBufferMetas.model_construct(metas=metas, ptr=0, size=size)
    return MemoryBufferMetaList.model_construct(
        p2p_store_addr=None, memory_buffer_metas_list=[buffer], rdma_device="", lease=None
    )


def make_plan(
    metas: Metas,
    cluster: Cluster,
    *,
    free_device_bytes: int,
    cap: int,
    receivers: Sequence[int] | None = None,
    joins_parts: bool = True,
) -> TransferPlan:
    """The plan that the ranks would cut.

    Args:
        free_device_bytes: that the buffers may take on the fullest device.
        cap: ``PS_MAX_BUCKET_SIZE_GB`` in bytes.
        receivers: P2P to these ranks. ``None``: broadcast to all.
        joins_parts: the workers are this library's and have been updated before: then a broadcast
            may cut tensors, as ``ParameterServer`` decides it.

    Raises:
        ValueError: the largest tensor does not fit.
    """
    p2p = receivers is not None
    may_cut = joins_parts and not p2p
    size = bucket_size(free_device_bytes, largest_tensor(metas), cap, may_cut)
    local, remote = on_nics(range(cluster.gpus), cluster), on_nics(metas, cluster)
    pace = DEVICE_PACE if cluster.cores is None else HOST_PACE
    size = paced(size, READ_PACE if p2p else pace, metas, may_cut)
    return plan_transfer(metas, size, local, remote, receivers, may_cut)


def on_nics(ranks: Iterable[int], cluster: Cluster) -> dict[str, set[int]]:
    """Which of ``ranks`` share each NIC, by its name."""
    topology: defaultdict[str, set[int]] = defaultdict(set)
    for rank in ranks:
        topology[cluster.nic_of(rank)].add(rank)
    return dict(topology)
