"""The tensors of a running world, read into a vLLM worker that starts."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from loguru import logger
from vllm.distributed.parallel_state import get_world_group

from checkpoint_engine.ground import rdma
from checkpoint_engine.ground.local_rank import find_local_rank
from checkpoint_engine.transfer.p2p_store import P2PStore
from checkpoint_engine.transfer.remote_tensors import read_tensors
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
    nic = "" if is_npu else here.choose_nic(rdma.selected_devices())
    store = P2PStore(here.device_manager, device=nic)
    total, started = 0, time.perf_counter()
    for name, tensor in read_tensors(store, here, metas, _BUCKET_BYTES):
        total += tensor.nbytes
        yield name, tensor
    logger.info(
        "read {:.3f} GB from {} owners, and loaded them, in {:.1f} s",
        total / 1e9,
        len(metas),
        time.perf_counter() - started,
    )
