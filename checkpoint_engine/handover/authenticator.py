"""Who may connect to a rank's address: one worker process.

libzmq asks about every connection before it carries a message (ZAP, ZeroMQ's RFC 27), and passes on
which user and process the kernel found at the other end. The first process of an admitted user is
let in. All others are refused at once. Nobody waits.
"""

from __future__ import annotations

import os
import socket
import struct

import zmq
from loguru import logger
from zmq.utils.monitor import recv_monitor_message

from checkpoint_engine.settings import admitted_users

_UNSEEN = 0  # the kernel's number for every process in a PID namespace that this one cannot see


class Authenticator:
    """Lives in the thread that runs the update, which has to call ``answer`` often."""

    def __init__(self, context: zmq.Context, guarded: zmq.Socket, poller: zmq.Poller) -> None:
        """
        Args:
            context: has no other authenticator.
            guarded: must not be bound yet.
            poller: is going to see when a process connects or leaves.
        """
        self.closed = False
        """Nobody is let in any more: the worker has its first message, and is known by it."""
        self._users = {os.geteuid(), 0, *admitted_users()}
        self._worker: int | None = None
        self._connections: dict[int, int] = {}  # descriptor: process
        self._refused: set[int] = set()
        guarded.setsockopt(zmq.ZAP_DOMAIN, b"checkpoint-engine")  # without one, nobody is asked
        self._guarded = guarded
        self._monitor = guarded.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._requests: zmq.Socket = context.socket(zmq.REP)
        self._requests.setsockopt(zmq.LINGER, 0)
        self._requests.bind("inproc://zeromq.zap.01")
        poller.register(self._requests, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)

    @property
    def worker_is_connected(self) -> bool:
        """Whether the process that was let in has a connection."""
        return self._worker in self._connections.values()

    def answer(self) -> None:
        """Let in or refuse the processes that have come."""
        while self._requests.poll(0):
            _version, request_id, _domain, address, *_ = self._requests.recv_multipart()
            _, uid, _gid, pid = address.rsplit(b":", 3)
            status = b"200" if self._lets_in(int(uid), int(pid)) else b"400"
            self._requests.send_multipart([b"1.0", request_id, status, b"", b"", b""])
        self._follow_connections()

    def close(self) -> None:
        """Before the guarded socket is closed."""
        self._guarded.disable_monitor()
        self._monitor.close(0)
        self._requests.close()

    def _lets_in(self, uid: int, pid: int) -> bool:
        self._follow_connections()
        others = list(self._connections.values())
        if pid not in others:  # the process has left already
            return False
        others.remove(pid)
        comes_again = pid == self._worker != _UNSEEN
        taken = self.closed or (self._worker in others and not comes_again)
        if not taken and uid in self._users:
            self._worker = pid
            return True
        if pid not in self._refused:
            self._refused.add(pid)
            hint = "" if uid in self._users else "; PS_IPC_UIDS lets other users in"
            logger.warning("refused process {} of user {} as this rank's worker{}", pid, uid, hint)
        return False

    def _follow_connections(self) -> None:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            descriptor = event["value"]
            self._connections.pop(descriptor, None)
            if event["event"] == zmq.EVENT_ACCEPTED and (pid := _peer_of(descriptor)) is not None:
                self._connections[descriptor] = pid


def _peer_of(descriptor: int) -> int | None:
    """The process at the other end of a Unix connection; ``None`` if it is closed already."""
    try:
        connection = socket.socket(fileno=descriptor)  # no second descriptor: there may be none
    except OSError:
        return None
    try:
        size = struct.calcsize("3i")
        found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        return int(struct.unpack("3i", found)[0])
    except OSError:
        return None
    finally:
        connection.detach()  # it is zmq's
