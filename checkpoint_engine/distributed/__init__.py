"""Collectives behind one small interface, for programs that bring their own communicator.

The functions act on the current backend: torch's, unless ``use_backend`` chose another.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

Group = Any
"""Some of the ranks; ``None`` means all of them."""
_SEPARATE = ("vllm_nccl", "vllm_hccl")
_backend: Any = dist
"""``torch.distributed``, or an object with the same functions."""


def use_backend(backend: str | None) -> None:
    """Choose the backend of this process by name; ``None`` leaves the current one.

    Raises:
        ValueError: no such backend.
        RuntimeError: the current backend still has a group.
    """
    global _backend
    if backend is None:
        return
    if backend not in ("torch", *_SEPARATE):
        raise ValueError(
            f"no distributed backend {backend!r}: known are torch, vllm_nccl, vllm_hccl"
        )
    if _backend is not dist and _backend.is_initialized():
        raise RuntimeError("destroy the current process group before choosing another backend")
    if backend in _SEPARATE:
        from checkpoint_engine.distributed.separate_backend import SeparateBackend

        _backend = SeparateBackend()
    else:
        _backend = dist


def init_process_group(rank: int, world_size: int, store: dist.Store, **kwargs: Any) -> None:
    """Create the group of all ranks, which meet in ``store``. Called by every rank."""
    _backend.init_process_group(rank=rank, world_size=world_size, store=store, **kwargs)


def destroy_process_group(group: Group = None) -> None:
    """Destroy ``group``, or everything if it is ``None``."""
    _backend.destroy_process_group(group)


def is_initialized() -> bool:
    """Whether the group of all ranks exists."""
    return _backend.is_initialized()


def all_gather_object(object_list: list[Any], obj: Any, group: Group = None) -> None:
    """Fill ``object_list`` with every rank's ``obj``."""
    _backend.all_gather_object(object_list, obj, group)


def all_reduce(
    tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Group = None, **kwargs: Any
) -> Any:
    """Reduce ``tensor`` over the ranks of ``group``, in place."""
    return _backend.all_reduce(tensor, op, group, **kwargs)


def broadcast(tensor: torch.Tensor, src: int = 0, group: Group = None, **kwargs: Any) -> Any:
    """Overwrite ``tensor`` with that of global rank ``src``."""
    return _backend.broadcast(tensor, src, group, **kwargs)


def barrier(group: Group = None, **kwargs: Any) -> Any:
    """Return once every rank of ``group`` has called it."""
    return _backend.barrier(group, **kwargs)


def new_group(ranks: list[int], **kwargs: Any) -> Group:
    """A group of just ``ranks``. Called by every rank."""
    return _backend.new_group(ranks, **kwargs)
