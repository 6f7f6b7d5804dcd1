"""torch's default process group, which callers of ``init_process_group`` want for their own use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from checkpoint_engine import distributed
from checkpoint_engine.ground.deadline import Deadline
from checkpoint_engine.world.call import Call
from checkpoint_engine.world.control import ControlPlane, master_addr, master_port
from checkpoint_engine.world.store import connect_store


class DefaultGroup:
    """Owns the default group where this server made it. Updates do not need it."""

    def __init__(self, control: ControlPlane, backend: str) -> None:
        self._control = control
        self._backend = backend
        self._made: Counter[tuple[int, ...]] = Counter()  # groups of these ranks
        self._is_ours = False

    def create(
        self, ranks: Sequence[int], addr: str | None, port: int | None, timeout: timedelta
    ) -> None:
        """Called by each of ``ranks``. Does nothing if there is a default group."""
        timeout = timedelta(seconds=Deadline(timeout).seconds)  # torch's waits overflow
        if distributed.is_initialized():
            return
        members = tuple(ranks)
        self._made[members] += 1
        name = f"default-group/{'-'.join(map(str, members))}/{self._made[members]}"
        where = (addr, port) if 0 in members else (None, None)  # rank 0 hosts what is elsewhere
        self._create(ranks, dist.PrefixStore(name, self._store(*where)), timeout)

    def create_within(self, call: Call) -> None:
        """As ``create``, of the members of a call: programs of the original use the group that
        ``gather_metas`` leaves. Called by all of them."""
        there = b"1" if distributed.is_initialized() else b""
        if not any(call.all_gather("default group", there)):
            with call.store_to_block() as store:
                timeout = timedelta(seconds=call.deadline.remaining())
                self._create(call.members, dist.PrefixStore("default-group", store), timeout)

    def _create(self, ranks: Sequence[int], store: Any, timeout: timedelta) -> None:
        distributed.init_process_group(
            rank=list(ranks).index(self._control.rank),
            world_size=len(ranks),
            store=store,
            backend=self._backend,
            timeout=timeout,
        )
        self._is_ours = True

    def leave(self) -> None:
        """Destroy it if this server made it, and the caller has not destroyed it yet."""
        if self._is_ours and distributed.is_initialized():
            distributed.destroy_process_group()
        self._is_ours = False

    def _store(self, addr: str | None, port: int | None) -> Any:
        size = self._control.world_size
        if size == 1 or (addr is None and port is None):
            return self._control.store()
        return connect_store(self._control.rank, size, master_addr(addr), master_port(port))
