"""Communicators of our own beside torch's default group, which belongs to a trainer.

Programs know this as ``vllm_nccl`` and ``vllm_hccl``, where release 0.4 took vLLM's communicators.
"""

from __future__ import annotations

import pickle
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from checkpoint_engine.distributed import Group
from checkpoint_engine.distributed.weights_group import CREATE, TorchGroup
from checkpoint_engine.ground.devices import get_ip
from checkpoint_engine.handover.plain_pickle import MODEL_WORDS, read_pickle

NOT_A_MEMBER = object()
_DEVICES = {"gloo": "cpu", "nccl": "cuda", "hccl": "npu"}


class _Members(TorchGroup):
    """Some ranks, and a store of their own."""

    def __init__(
        self, store: dist.Store, ranks: list[int], rank: int, options: tuple[str, timedelta]
    ) -> None:
        """``options``: torch's name of the backend, and the timeout of a call."""
        backend, timeout = options
        own = dist.PrefixStore("communicator", store)
        place = ranks.index(rank), len(ranks)
        super().__init__(ranks, CREATE[backend](own, *place, timeout, get_ip()))
        self.store = store
        self.rank = rank
        self.options = options
        self.groups_made = 0
        self._objects_gathered = 0

    def gather(self, obj: Any) -> list[Any]:
        """Every member's object, in the order of ``ranks``: plain data, or of our data types.

        Raises:
            ValueError: a member sent something else.
        """
        self._objects_gathered += 1
        mine = f"{self._objects_gathered}/{self.rank}"
        self.store.set(mine, pickle.dumps(obj))  # type: ignore[arg-type]  # bytes are fine
        keys = [f"{self._objects_gathered}/{rank}" for rank in self.ranks]
        gathered = [read_pickle(self.store.get(key), MODEL_WORDS) for key in keys]
        self.barrier()
        self.store.delete_key(mine)
        return gathered

    def all_reduce(self, tensor: torch.Tensor, op: Any) -> Any:
        options = dist.AllreduceOptions()
        options.reduceOp = op
        return self.group.allreduce([tensor], options)

    def barrier(self) -> None:
        device = torch.device(_DEVICES[self.options[0]])
        token = torch.ones(1, device=device)
        self.all_reduce(token, dist.ReduceOp.SUM).wait()
        token.item()  # on an accelerator, ``wait`` only orders the stream


class SeparateBackend:
    """Groups that torch's default group knows nothing of, by the functions of
    ``torch.distributed``."""

    def __init__(self) -> None:
        self._world: _Members | None = None

    def init_process_group(
        self, rank: int, world_size: int, store: dist.Store, **kwargs: Any
    ) -> None:
        options = kwargs.get("backend", "nccl"), kwargs.get("timeout", timedelta(minutes=10))
        self._world = _Members(store, list(range(world_size)), rank, options)

    def destroy_process_group(self, group: Group = None) -> None:
        members = self._members(group)
        members.close()
        if members is self._world:
            self._world = None

    def is_initialized(self) -> bool:
        return self._world is not None

    def all_gather_object(self, object_list: list[Any], obj: Any, group: Group = None) -> None:
        object_list[:] = self._members(group).gather(obj)

    def all_reduce(
        self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Group = None, **kwargs: Any
    ) -> Any:
        return _finish(self._members(group).all_reduce(tensor, op), **kwargs)

    def broadcast(
        self, tensor: torch.Tensor, src: int = 0, group: Group = None, **kwargs: Any
    ) -> Any:
        return _finish(self._members(group).broadcast(tensor, src), **kwargs)

    def barrier(self, group: Group = None, **kwargs: Any) -> Any:
        self._members(group).barrier()

    def new_group(self, ranks: list[int], **kwargs: Any) -> Group:
        """On a rank that is not in it, something that cannot be used."""
        world = self._members(None)
        world.groups_made += 1
        if world.rank not in ranks:
            return NOT_A_MEMBER
        store = dist.PrefixStore(f"group-{world.groups_made}", world.store)
        return _Members(store, list(ranks), world.rank, world.options)

    def _members(self, group: Group) -> _Members:
        members = self._world if group is None else group
        if members is None:
            raise RuntimeError("there is no process group: call init_process_group() first")
        if members is NOT_A_MEMBER:
            raise RuntimeError("this rank is not in the group")
        return members


def _finish(work: Any, async_op: bool = False) -> Any:
    """As torch does: the work itself, or nothing once it is done."""
    if async_op:
        return work
    work.wait()
    return None
