"""torch's default process group, which callers of ``init_process_group`` want for their own use."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from loguru import logger

from checkpoint_engine import distributed
from checkpoint_engine.world.control import ControlPlane, master_addr, master_port
from checkpoint_engine.world.store import connect_store


class DefaultGroup:
    """Owns the default group where this server made it. Updates do not need it."""

    def __init__(self, control: ControlPlane, backend: str) -> None:
        self._control = control
        self._backend = backend
        self._groups_made = 0
        self._is_ours = False

    def create(
        self, ranks: Sequence[int], addr: str | None, port: int | None, timeout: timedelta
    ) -> None:
        """Called by each of ``ranks``. Does nothing if there is a default group."""
        rank = self._control.rank
        if distributed.is_initialized():
            logger.bind(rank=rank).debug("the default process group exists already")
            return
        self._groups_made += 1
        distributed.init_process_group(
            rank=list(ranks).index(rank),
            world_size=len(ranks),
            store=dist.PrefixStore(f"default-group/{self._groups_made}", self._store(addr, port)),
            backend=self._backend,
            timeout=timeout,
        )
        self._is_ours = True

    def leave(self) -> None:
        """Destroy it if this server made it."""
        if self._is_ours:
            distributed.destroy_process_group()
            self._is_ours = False

    def _store(self, addr: str | None, port: int | None) -> Any:
        size = self._control.world_size
        if size == 1 or (addr is None and port is None):
            return self._control.store()
        return connect_store(self._control.rank, size, master_addr(addr), master_port(port))
