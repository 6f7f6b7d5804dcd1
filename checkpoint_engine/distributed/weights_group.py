"""The group that weights are broadcast in. It stands apart from torch's default group, which may
belong to the caller, and can be aborted and made anew without touching that.
"""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from checkpoint_engine.deadline import Deadline

_FAREWELL = 10.0  # seconds that the peers of an aborted group have to leave it
_abandoned: list[tuple[list[Any], list[Any]]] = []
"""Groups with peers that never left. They cannot be destroyed."""


class WeightsGroup:
    """Some ranks and the communicator between them. Owned by one ``ParameterServer`` per rank."""

    def __init__(self, ranks: list[int], group: Any) -> None:
        self.ranks = ranks
        self._group = group
        self._in_flight: list[Any] = []

    def broadcast(self, tensor: torch.Tensor, src: int) -> Any:
        """Begin to overwrite ``tensor`` with that of global rank ``src``; returns torch's ``Work``.

        On an accelerator it is ordered after what the current stream holds.
        """
        options = dist.BroadcastOptions()
        options.rootRank = self.ranks.index(src)
        options.rootTensor = 0
        work = self._group.broadcast([tensor], options)
        self._in_flight = [*(old for old in self._in_flight if not old.is_completed()), work]
        return work

    def abort(self) -> None:
        """Leave at once, whatever is in flight; peers that still wait for this rank get an error.

        Gloo blocks whoever destroys a group with something in flight, so a thread does that once
        the peers, leaving too, have ended it. Not a daemon: Python kills those inside C++.
        """
        if hasattr(self._group, "abort"):
            self._group.abort()
        abandoned = threading.Thread(
            target=_destroy,
            args=([self._group], self._in_flight),
            name="checkpoint-engine-abort",
        )
        self._group, self._in_flight = None, []
        abandoned.start()

    def close(self) -> None:
        """Leave when nothing is in flight."""
        if hasattr(self._group, "shutdown"):
            self._group.shutdown()
        self._group, self._in_flight = None, []


def _destroy(holder: list[Any], in_flight: list[Any]) -> None:
    deadline = Deadline(_FAREWELL)
    while not all(work.is_completed() for work in in_flight):
        if deadline.remaining() == 0.0:  # a peer hangs: keep the group rather than hang with it
            _abandoned.append((holder, in_flight))
            return
        time.sleep(0.01)
    in_flight.clear()
    holder.clear()


def create_weights_group(
    backend: str, store: dist.Store, ranks: list[int], rank: int, local_ip: str, deadline: Deadline
) -> WeightsGroup:
    """The group of exactly ``ranks``. Called by each of them, with a store of its own.

    Args:
        backend: ``nccl``, ``gloo`` or ``hccl``.
        local_ip: where gloo listens, unless GLOO_SOCKET_IFNAME says otherwise.
    """
    timeout = timedelta(seconds=max(1.0, deadline.remaining()))
    place, size = ranks.index(rank), len(ranks)
    return WeightsGroup(ranks, CREATE[backend](store, place, size, timeout, local_ip))


def _create_gloo(store: Any, rank: int, size: int, timeout: timedelta, local_ip: str) -> Any:
    gloo: Any = dist.ProcessGroupGloo  # its options are not in torch's stubs
    options = gloo._Options()
    options._timeout = timeout
    if "GLOO_SOCKET_IFNAME" in os.environ:
        options._devices = [gloo.create_default_device()]
    else:
        options._devices = [gloo.create_device(hostname=local_ip)]
    options._threads = 1
    return gloo(store, rank, size, options)


def _create_nccl(store: Any, rank: int, size: int, timeout: timedelta, local_ip: str) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _create_hccl(store: Any, rank: int, size: int, timeout: timedelta, local_ip: str) -> Any:
    from torch_npu._C._distributed_c10d import ProcessGroupHCCL

    options = ProcessGroupHCCL.Options()
    options.op_timeout = timeout
    return ProcessGroupHCCL(store, rank, size, options)


CREATE = {"gloo": _create_gloo, "nccl": _create_nccl, "hccl": _create_hccl}
