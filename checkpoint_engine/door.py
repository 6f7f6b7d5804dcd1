"""Who gets in at a rank's address.

libzmq asks about every connection before it carries a message (ZAP, ZeroMQ's RFC 27) and says which
process is there, by the kernel's word. One process is let in; all others, before and after it, get
and spoil nothing:

- Processes of other users are refused.
- Workers of ours prove that they were given the address, by a password made of it; they are let in
  at once, whoever else is waiting.
- The original's workers cannot prove anything. One that had replied in an earlier update is let in
  at once; otherwise the first to come, after those that can prove something had time to.
"""

from __future__ import annotations

import hmac
import os
import socket
import struct
from collections.abc import Container
from dataclasses import dataclass
from typing import NamedTuple

import zmq
from loguru import logger

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.settings import admitted_users

_ZAP = "inproc://zeromq.zap.01"
_USER = b"checkpoint-engine"
_DOMAIN = b"checkpoint-engine"
_YES, _NO = b"200", b"400"
_STRANGER = 0
"""Process number of whoever is in a PID namespace that this process cannot see."""
_WAIT = 1.0
"""Seconds that one that cannot prove anything waits for one that can."""
_WAIT_IF_PROVED = 10.0
"""The same where the worker of the last update could."""


@dataclass
class KnownWorker:
    """What a rank remembers of its worker from one update to the next.

    ``joins_parts``: whether it puts tensors together that travel in parts. Plans are made before a
    worker is there to be asked.
    """

    pid: int | None = None
    proves: bool = False
    joins_parts: bool = False


class Peer(NamedTuple):
    """A connection that asks to be let in. ``proves``: it presented the right proof."""

    envelope: list[bytes]
    request_id: bytes
    uid: int
    pid: int
    tries: bool
    proves: bool


class Door:
    """Lives in the thread that runs the update, which has to look often."""

    def __init__(self, context: zmq.Context, known: KnownWorker) -> None:
        """``context``: has this door alone."""
        self.entered: Peer | None = None
        self._known = known
        self._proof = b""
        self._users = {os.geteuid(), 0, *admitted_users()}
        self._waiting: list[Peer] = []
        self._refused: set[int] = set()
        self._patience = Deadline(_WAIT)
        self._socket: zmq.Socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(_ZAP)

    def guard(self, socket: zmq.Socket, proof: bytes | None) -> None:
        """Before ``socket`` binds: nobody gets in there unasked; with ``proof``, nobody without."""
        socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
        if proof is not None:
            self._proof = proof
            socket.setsockopt(zmq.PLAIN_SERVER, 1)

    def wait(self, timeout_ms: int) -> None:
        """Until somebody asks to be let in, at most."""
        self._socket.poll(timeout_ms)

    def look(self, present: Container[int | None], patient: bool = True) -> None:
        """Answer those that have come.

        Args:
            present: the processes that have a connection.
            patient: whether to wait for somebody better than those that can prove nothing.
        """
        while self._socket.poll(0):
            self._consider(self._parse(self._socket.recv_multipart()))
        self._waiting = [peer for peer in self._waiting if peer.pid in present]
        if self._waiting and not (patient and self._patience.remaining()):
            self._let_in(self._waiting.pop(0))

    def remember(self) -> None:
        """The one that was let in behaves as a worker does."""
        if self.entered is not None:
            self._known.pid, self._known.proves = self.entered.pid, self.entered.proves

    def close(self) -> None:
        self._socket.close()

    def _parse(self, request: list[bytes]) -> Peer:
        sender, empty, _version, request_id, _domain, address, _identity, mechanism, *given = (
            request
        )
        _, uid, _gid, pid = address.rsplit(b":", 3)
        proves = (
            len(given) == 2 and given[0] == _USER and hmac.compare_digest(given[1], self._proof)
        )
        return Peer([sender, empty], request_id, int(uid), int(pid), mechanism == b"PLAIN", proves)

    def _consider(self, peer: Peer) -> None:
        if self.entered is not None or peer.uid not in self._users or peer.tries > peer.proves:
            self._refuse(peer)
        elif peer.proves or (peer.pid == self._known.pid != _STRANGER and not self._known.proves):
            self._let_in(peer)
        else:
            self._wait_for_better(peer)

    def _wait_for_better(self, peer: Peer) -> None:
        if not self._waiting:
            self._patience = Deadline(_WAIT_IF_PROVED if self._known.proves else _WAIT)
        again = [one for one in self._waiting if one.pid == peer.pid != _STRANGER]
        for one in again:  # it lost its connection, or has two
            self._waiting.remove(one)
            self._answer(one, _NO)
        self._waiting.append(peer)

    def _let_in(self, peer: Peer) -> None:
        self.entered = peer
        self._answer(peer, _YES)
        while self._waiting:
            self._refuse(self._waiting.pop())

    def _refuse(self, peer: Peer) -> None:
        if peer.pid not in self._refused:  # zmq comes again ten times a second
            self._refused.add(peer.pid)
            logger.warning(
                "refused process {} of user {} at this rank's address for its worker{}",
                peer.pid,
                peer.uid,
                "" if peer.uid in self._users else "; PS_IPC_UIDS lets other users in",
            )
        self._answer(peer, _NO)

    def _answer(self, peer: Peer, status: bytes) -> None:
        self._socket.send_multipart(
            [*peer.envelope, b"1.0", peer.request_id, status, b"", b"", b""]
        )


def present_proof(socket: zmq.Socket, proof: bytes) -> None:
    """Before a worker's ``socket`` connects to a door that wants ``proof``."""
    socket.setsockopt(zmq.PLAIN_USERNAME, _USER)
    socket.setsockopt(zmq.PLAIN_PASSWORD, proof)


def peer_of(fd: int) -> int | None:
    """The process at the other end of the Unix connection ``fd`` of this process; ``None`` if it
    is closed already."""
    try:
        with socket.socket(fileno=os.dup(fd)) as connection:
            size = struct.calcsize("3i")
            found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    except OSError:
        return None
    return int(struct.unpack("3i", found)[0])
