"""The tensors of a running world, read into a vLLM worker that starts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing

import torch
from loguru import logger
from vllm.distributed.parallel_state import get_world_group

from checkpoint_engine.data_types import H2DBucket, align_up, placed, tensor_nbytes
from checkpoint_engine.ground.checksum import check_bytes
from checkpoint_engine.ground.local_rank import find_local_rank
from checkpoint_engine.memory.checksum import sum_of, sums_of
from checkpoint_engine.planning.plan import gen_h2d_buckets, largest_tensor
from checkpoint_engine.ps import _choose_nic
from checkpoint_engine.transfer.p2p_store import P2PStore
from checkpoint_engine.transfer.remote_loader import RemoteLoader
from checkpoint_engine.world.metas_file import Metas

_BUCKET_BYTES = 256 << 20

Weights = Iterator[tuple[str, torch.Tensor]]


def read_weights(metas: Metas) -> Weights:
    """The tensors, in the order of their owners; each bucket's bytes are checked before.

    Raises:
        P2PError: an owner is gone, or holds another checkpoint by now.
        ValueError: bytes are not those that were registered.
    """
    group = get_world_group()
    here = find_local_rank(group.rank_in_group, group.world_size, None, None)
    is_npu = here.device_manager.device_type == "npu"
    store = P2PStore(here.device_manager, device="" if is_npu else _choose_nic(here))
    size = align_up(max(_BUCKET_BYTES, largest_tensor(metas)))
    memory = torch.empty(size, dtype=torch.uint8, device=here.device)
    if store.needs_registered_targets:
        store.register_named_tensors({"__buffer__": memory})
    sums = {owner: sums_of(owner, owned) for owner, owned in metas.items()}
    total, started = 0, time.perf_counter()
    with closing(RemoteLoader(store, metas, here.device_manager, here.device)) as remote:
        for _, owner, bucket in gen_h2d_buckets(metas, size, {}, {}):
            remote.read(owner, bucket, memory)
            if (expected := sum_of(sums[owner], bucket)) is not None:
                check_bytes(memory[: align_up(bucket.size)], *expected, f"owner {owner}")
            total += bucket.size
            yield from _tensors(bucket, memory)
    logger.info(
        "read {:.3f} GB from {} owners, and loaded them, in {:.1f} s",
        total / 1e9,
        len(metas),
        time.perf_counter() - started,
    )


def _tensors(bucket: H2DBucket, memory: torch.Tensor) -> Weights:
    """Copies: a loader may keep them, and the buffer is used again."""
    for start, meta in placed(bucket.items):
        nbytes = tensor_nbytes(meta.dtype, meta.shape)
        yield meta.name, memory[start : start + nbytes].clone().view(meta.dtype).view(meta.shape)
