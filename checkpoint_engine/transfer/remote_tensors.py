"""The tensors of a checkpoint in other ranks' memory, one after the other, for a reader without an
update: an engine that starts, a rollout of verl."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing

import torch

from checkpoint_engine.data_types import (
    H2DBucket,
    MemoryBufferMetaList,
    align_up,
    placed,
    tensor_nbytes,
)
from checkpoint_engine.ground.checksum import check_bytes
from checkpoint_engine.ground.local_rank import LocalRank
from checkpoint_engine.memory.checksum import sum_of, sums_of
from checkpoint_engine.planning.plan import gen_h2d_buckets, largest_tensor
from checkpoint_engine.transfer.p2p_store import P2PStore
from checkpoint_engine.transfer.remote_loader import RemoteLoader

_BUFFER = "__remote_tensors__"


def read_tensors(
    store: P2PStore,
    here: LocalRank,
    owners: Mapping[int, MemoryBufferMetaList],
    bucket_bytes: int,
    check: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of each owner, on this rank's device; the caller may keep it.

    Args:
        bucket_bytes: read at once, and taken on the device for it; as much as the largest tensor.
        check: called before each bucket; may raise.

    Raises:
        P2PError: an owner is gone, or holds another checkpoint by now.
        ValueError: bytes are not those that were registered.
    """
    size = align_up(max(bucket_bytes, largest_tensor(owners)))
    memory = torch.empty(size, dtype=torch.uint8, device=here.device)
    if store.needs_registered_targets:
        store.register_named_tensors({_BUFFER: memory})
    sums = {owner: sums_of(owner, owned) for owner, owned in owners.items()}
    try:
        with closing(RemoteLoader(store, owners, here.device_manager, here.device)) as remote:
            for _, owner, bucket in gen_h2d_buckets(owners, size, {}, {}):
                check()
                remote.read(owner, bucket, memory)
                if (expected := sum_of(sums[owner], bucket)) is not None:
                    check_bytes(memory[: align_up(bucket.size)], *expected, f"owner {owner}")
                yield from _tensors(bucket, memory)
    finally:
        if store.needs_registered_targets:
            store.unregister_named_tensors([_BUFFER])


def _tensors(bucket: H2DBucket, memory: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Copies: the buffer is used again."""
    for start, meta in placed(bucket.items):
        nbytes = tensor_nbytes(meta.dtype, meta.shape)
        yield meta.name, memory[start : start + nbytes].clone().view(meta.dtype).view(meta.shape)
