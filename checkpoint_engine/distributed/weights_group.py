"""The group that weights are broadcast in. It stands apart from torch's default group, which may
belong to the caller, and can be aborted and made anew without touching that.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from checkpoint_engine import settings
from checkpoint_engine.errors import broadcast_failed
from checkpoint_engine.ground.deadline import Deadline, in_thread
from checkpoint_engine.ground.sockets import connections

_MEETING_TIME = timedelta(seconds=30)
"""For what nothing ends: a peer that comes to the store, and then dies."""
_NO_TIMEOUT = timedelta(days=1)
"""Of a broadcast by a backend that can be aborted: the deadline of the update ends it."""
_LAST_MESSAGES = 2.0  # seconds for what is under way when a group is aborted
_SILENCE = 0.3  # seconds without a byte under way, after which nothing is


class TorchGroup:
    """Some ranks that broadcast weights to each other, by one of torch's communicators."""

    def __init__(self, ranks: list[int], group: Any, sockets: Sequence[socket.socket] = ()) -> None:
        """``sockets``: its connections, if it does not end them itself when it is aborted."""
        self.ranks = ranks
        self.group = group
        self._sockets = sockets
        self._in_flight: list[Any] = []

    def expect_end(self, seconds: float) -> None:
        """Gloo does not notice a peer that dies half-way through a message."""
        if self._sockets and hasattr(self.group, "set_timeout"):
            self.group.set_timeout(timedelta(seconds=seconds + 1.0))

    def broadcast(self, tensor: torch.Tensor, src: int) -> Any:
        """On an accelerator it is ordered after what the current stream holds."""
        work = broadcast(self.group, tensor, self.ranks.index(src))
        self._in_flight = [*(old for old in self._in_flight if not old.is_completed()), work]
        return work

    def abort(self) -> None:
        """Gloo blocks whoever destroys a group with something in flight, so a thread does that once
        it has ended. Not a daemon: Python kills those inside C++.
        """
        if hasattr(self.group, "abort"):
            self.group.abort()
        abandoned = threading.Thread(
            target=_destroy,
            args=([self.group], self._in_flight, self._sockets),
            name="checkpoint-engine-abort",
        )
        self.group, self._in_flight, self._sockets = None, [], ()
        abandoned.start()

    def close(self) -> None:
        if hasattr(self.group, "shutdown"):
            self.group.shutdown()
        self.group, self._in_flight = None, []
        for connection in self._sockets:
            connection.close()
        self._sockets = ()


def _destroy(holder: list[Any], in_flight: list[Any], connections: Sequence[socket.socket]) -> None:
    _await_silence(connections)
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()
    soon = Deadline(_LAST_MESSAGES)
    while not all(work.is_completed() for work in in_flight):
        # Python's end must not come between: what ends then takes the process along. But it must
        # not wait for what does not end, either, as destroying the group would.
        if soon.remaining() == 0.0 and not threading.main_thread().is_alive():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(holder[0]))
            return
        time.sleep(0.01)
    in_flight.clear()
    holder.clear()


def _await_silence(connections: Sequence[socket.socket]) -> None:
    """Until nothing comes or goes any more, a short while at most.

    When a connection ends, gloo forgets whoever waits for a message that is half-way through it.
    The peers are leaving too, and begin nothing new; what has begun ends by itself, unless one of
    them is stopped or gone: then ``expect_end`` ends it.
    """
    now = silent_since = time.monotonic()
    ends = now + _LAST_MESSAGES
    while connections and now < min(ends, silent_since + _SILENCE):
        if any(map(_is_busy, connections)):
            silent_since = now
        time.sleep(0.005)
        now = time.monotonic()


def _is_busy(connection: socket.socket) -> bool:
    """Whether the kernel holds bytes that were not read here, or not there."""
    queues = (termios.FIONREAD, termios.TIOCOUTQ)
    return any(fcntl.ioctl(connection, queue, bytes(4)) != bytes(4) for queue in queues)


def create_weights_group(
    backend: str,
    store: dist.Store,
    ranks: list[int],
    rank: int,
    local_ip: str,
    device: torch.device,
    check: Callable[[], None],
) -> TorchGroup:
    """The group of exactly ``ranks``. Called by each of them, with a store of its own.

    Args:
        backend: ``nccl``, ``gloo`` or ``hccl``.
        store: on a connection of its own, for the thread may block it.
        local_ip: where gloo listens, unless GLOO_SOCKET_IFNAME says otherwise.
        check: called while waiting; ends that by raising.
    """
    addresses = _Addresses(store)

    def meet() -> TorchGroup:
        between = addresses if backend == "gloo" else store  # NCCL and HCCL end their sockets
        place = ranks.index(rank), len(ranks)
        try:
            group = CREATE[backend](between, *place, _MEETING_TIME, local_ip)
            if device.type != "cpu":
                _connect_now(group, device)
        except BaseException as error:
            raise broadcast_failed(
                f"the ranks cannot form a group: {error}"
            ) from error.with_traceback(None)
        if hasattr(group, "set_timeout"):
            group.set_timeout(_NO_TIMEOUT)
        return TorchGroup(ranks, group, _connections_among(addresses.told))

    # Nothing ends a meeting to which a member does not come. Python kills daemons inside C++.
    return in_thread(meet, check, "checkpoint-engine-meet", daemon=False)


class _Addresses(dist.Store):
    """Between gloo and a store: there its members tell each other where each of them listens."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self._store: Any = store
        self.told = b""

    def set(self, key: str, value: str | bytes) -> None:
        self.told += value.encode() if isinstance(value, str) else value
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        value = bytes(self._store.get(key))
        self.told += value
        return value

    def wait(self, keys: list[str], timeout: timedelta = _MEETING_TIME) -> None:
        self._store.wait(keys, timeout)


def _connections_among(told: bytes) -> list[socket.socket]:
    """Gloo's connections in this process, each as one descriptor of ours, as gloo shows none.

    Each has an address at one end where a member of the group listens, and that is in what the
    members told each other. So no connection of another part of the program is among them.
    """
    # Not ``one.dup()``: that makes the connection wait, for gloo as well.
    return [
        socket.socket(fileno=os.dup(one.fileno()))
        for one in (connections() if told else ())
        if _is_among(one, told)
    ]


def _is_among(connection: socket.socket, told: bytes) -> bool:
    ends = connection.getpeername(), connection.getsockname()
    return any(_in_memory(connection.family, *end[:2]) in told for end in ends)


def _in_memory(family: int, address: str, port: int) -> bytes:
    """The beginning of a ``sockaddr``, which is what gloo tells."""
    flow = b"" if family == socket.AF_INET else bytes(4)
    host = socket.inet_pton(family, address.partition("%")[0])
    return struct.pack("=H", family) + struct.pack("!H", port) + flow + host


def _connect_now(group: Any, device: torch.device) -> None:
    """Have the communicator made here, and not in the first broadcast, which nothing could end."""
    getattr(torch, device.type).set_device(device)
    work = broadcast(group, torch.zeros(1, device=device), 0)
    while not work.is_completed():
        time.sleep(0.001)


def broadcast(group: Any, tensor: torch.Tensor, root: int) -> Any:
    """Begin to broadcast from the member number ``root``, by a communicator of ``CREATE``."""
    options = dist.BroadcastOptions()
    options.rootRank = root
    options.rootTensor = 0
    return group.broadcast([tensor], options)


def _create_gloo(store: Any, rank: int, size: int, timeout: timedelta, local_ip: str) -> Any:
    gloo: Any = dist.ProcessGroupGloo  # its options are not in torch's stubs
    options = gloo._Options()
    options._timeout = timeout
    if settings.gloo_interface():  # gloo's default device reads it, too
        options._devices = [gloo.create_default_device()]
    else:
        options._devices = [gloo.create_device(hostname=local_ip)]
    options._threads = 1
    return gloo(store, rank, size, options)


def _create_nccl(store: Any, rank: int, size: int, timeout: timedelta, local_ip: str) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    with settings.set_meanwhile(_OURS_TO_END):  # torch reads them now
        return dist.ProcessGroupNCCL(store, rank, size, options)


_OURS_TO_END = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1",  # of which it sleeps four, dump or not
}
"""Where a peer died, we end the group ourselves: torch's watchdog shall neither end the process nor
hold the group for a minute, as it does to write a report. There are no options for that."""


def _create_hccl(store: Any, rank: int, size: int, timeout: timedelta, local_ip: str) -> Any:
    from torch_npu._C._distributed_c10d import ProcessGroupHCCL

    options = ProcessGroupHCCL.Options()
    options.op_timeout = timeout
    return ProcessGroupHCCL(store, rank, size, options)


CREATE = {"gloo": _create_gloo, "nccl": _create_nccl, "hccl": _create_hccl}
