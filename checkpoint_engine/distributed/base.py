"""The interface of a collectives backend, and the registry of those that can be chosen by name."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist

Group = Any
"""A backend's handle of some of its ranks; ``None`` means all of them."""


class Distributed(ABC):
    """What ``checkpoint_engine.distributed``'s functions call. One instance is current per
    process."""

    @abstractmethod
    def init_process_group(
        self, rank: int, world_size: int, store: dist.Store, **kwargs: Any
    ) -> None:
        """Create the group of all ranks, which meet in ``store``. Called by every rank."""

    @abstractmethod
    def destroy_process_group(self, group: Group = None) -> None:
        """Destroy ``group``, or everything."""

    @abstractmethod
    def is_initialized(self) -> bool:
        """Whether the group of all ranks exists."""

    @abstractmethod
    def all_gather_object(self, object_list: list[Any], obj: Any, group: Group = None) -> None:
        """Fill ``object_list`` with every rank's ``obj``."""

    @abstractmethod
    def all_reduce(
        self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Group = None, **kwargs: Any
    ) -> Any:
        """Reduce ``tensor`` over the ranks, in place."""

    @abstractmethod
    def broadcast(
        self, tensor: torch.Tensor, src: int = 0, group: Group = None, **kwargs: Any
    ) -> Any:
        """Overwrite ``tensor`` with that of global rank ``src``."""

    @abstractmethod
    def barrier(self, group: Group = None, **kwargs: Any) -> Any:
        """Return once every rank has called it."""

    @abstractmethod
    def new_group(self, ranks: list[int], **kwargs: Any) -> Group:
        """A group of just ``ranks``. Called by every rank."""


_SEPARATE = "checkpoint_engine.distributed.separate_backend:SeparateBackend"
_FACTORIES: dict[str, str] = {
    "torch": "checkpoint_engine.distributed.torch_backend:TorchBackend",
    "vllm_nccl": _SEPARATE,
    "vllm_hccl": _SEPARATE,
}


def register_backend(name: str, factory: str) -> None:
    """Make a backend of another package known: ``factory`` is ``"module:class"``, loaded when
    used."""
    _FACTORIES[name] = factory


def load_backend(name: str) -> Distributed:
    """An instance of the backend ``name``.

    Raises:
        ValueError: no backend of that name is registered.
        RuntimeError: its package is not installed.
    """
    if name not in _FACTORIES:
        raise ValueError(f"no distributed backend {name!r}: known are {sorted(_FACTORIES)}")
    module, _, attribute = _FACTORIES[name].partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise RuntimeError(f"distributed backend {name!r} cannot be loaded: {error}") from error
    backend = factory()
    if not isinstance(backend, Distributed):
        raise TypeError(f"{_FACTORIES[name]} is not a {Distributed.__name__}")
    return backend
