"""The default backend: ``torch.distributed``, with nccl, gloo or hccl below it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from checkpoint_engine.distributed.base import Distributed, Group


class TorchBackend(Distributed):
    """Passes every call on to ``torch.distributed``'s default group."""

    def init_process_group(
        self, rank: int, world_size: int, store: dist.Store, **kwargs: Any
    ) -> None:
        dist.init_process_group(rank=rank, world_size=world_size, store=store, **kwargs)

    def destroy_process_group(self, group: Group = None) -> None:
        dist.destroy_process_group(group)

    def is_initialized(self) -> bool:
        return dist.is_initialized()

    def all_gather_object(self, object_list: list[Any], obj: Any, group: Group = None) -> None:
        dist.all_gather_object(object_list, obj, group=group)

    def all_reduce(
        self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Group = None, **kwargs: Any
    ) -> Any:
        return dist.all_reduce(tensor, op, group=group, **kwargs)

    def broadcast(
        self, tensor: torch.Tensor, src: int = 0, group: Group = None, **kwargs: Any
    ) -> Any:
        return dist.broadcast(tensor, src, group=group, **kwargs)

    def barrier(self, group: Group = None, **kwargs: Any) -> Any:
        return dist.barrier(group, **kwargs)

    def new_group(self, ranks: list[int], **kwargs: Any) -> Group:
        return dist.new_group(ranks, **kwargs)
