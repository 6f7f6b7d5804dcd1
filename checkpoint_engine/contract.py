"""Private names of ``ParameterServer`` that programs written for the original use."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import zmq

from checkpoint_engine.data_types import H2DBucket, MemoryBuffer
from checkpoint_engine.ground.devices import DeviceManager
from checkpoint_engine.handover.link import new_address
from checkpoint_engine.memory.checkpoints import Checkpoints
from checkpoint_engine.settings import max_bucket_bytes
from checkpoint_engine.transfer.p2p import P2P
from checkpoint_engine.transfer.p2p_store import P2PStore
from checkpoint_engine.transfer.remote_loader import RemoteLoader
from checkpoint_engine.update.order import SocketPaths
from checkpoint_engine.update.update import Server
from checkpoint_engine.update.ways.base import bucket_size
from checkpoint_engine.world.call import Call
from checkpoint_engine.world.control import ControlPlane
from checkpoint_engine.world.gathered import Gathered, Metas
from checkpoint_engine.world.hello import Hello

_TEN_MINUTES = timedelta(minutes=10)


class Contract:
    """What clients reach into, and what it needs of the server; the owners of the state hold it."""

    _rank: int
    _device_uuid: str
    device_manager: DeviceManager
    _server: Server
    _p2p: P2P
    _checkpoints: Checkpoints
    _gathered: Gathered
    _control: ControlPlane

    def _begin(
        self,
        name: str,
        checkpoint_name: str,
        timeout: timedelta,
        members: Sequence[int] | None = None,
    ) -> contextlib.AbstractContextManager[Call]:
        """One collective call at a time; ends with the same outcome on every rank."""
        self._server.here.make_device_current()
        return self._control.call(name, timeout, members, checkpoint_name)

    @property
    def _memory_pool(self) -> dict[str, list[MemoryBuffer]]:
        return self._checkpoints.by_name()

    @property
    def _current_global_parameter_metas(self) -> Metas:
        return self._gathered.metas

    @property
    def _local_rdma_devices(self) -> dict[str, set[int]]:
        return dict(self._gathered.nics)

    @property
    def _remote_rdma_devices(self) -> dict[str, set[int]]:
        return self._gathered.owner_nics

    @property
    def _rdma_device(self) -> str | None:
        return self._p2p.device or None

    @property
    def _p2p_store(self) -> P2PStore | None:
        return self._p2p.store

    @_p2p_store.setter
    def _p2p_store(self, store: P2PStore | None) -> None:
        """Clients assign ``None`` to switch P2P off."""
        self._p2p.store = store

    def _copy_to_buffer(
        self,
        checkpoint_name: str,
        bucket: H2DBucket,
        buffer: torch.Tensor,
        owner_rank: int | None = None,
    ) -> None:
        """Copy a bucket from host memory into ``buffer``: this rank's own on the current stream,
        another's by P2P before it returns.

        Args:
            buffer: uint8, of at least ``bucket.size`` bytes.
            owner_rank: whose memory to read; ``None``: this rank's own.
        """
        is_own = owner_rank == self._rank and self._gathered.name == checkpoint_name
        if owner_rank is None or is_own:
            with self._checkpoints.pin(checkpoint_name) as source:
                source.copy(bucket, buffer)
            return
        here, store = self._server.here, self._p2p.require("_copy_to_buffer")
        metas = self._gathered.metas
        loader = RemoteLoader(store, metas, self.device_manager, here.device)
        loader.read(owner_rank, bucket, buffer)

    def _bind_zmq_socket(self) -> tuple[zmq.Socket[bytes], SocketPaths]:
        """A bound REQ socket for this rank's worker, and all ranks' addresses. All ranks.

        For programs that drive the worker's protocol themselves; the caller closes the socket.
        """
        address, _, _ = new_address()  # its file goes with this process, not before
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.REQ)
        socket.bind(address)
        mine = Hello(self._rank, "_bind_zmq_socket", device=self._device_uuid, address=address)
        with self._begin("_bind_zmq_socket", "", _TEN_MINUTES) as call:
            hellos = call.exchange(mine)
        return socket, [(hello.device, hello.address) for hello in hellos]

    def _detect_bucket_size(
        self, ranks_group: Any = None, *, disable_h2d_buffer: bool = False
    ) -> tuple[int, bool]:
        """Bytes of a bucket and whether staging is off, for what was gathered. All ranks."""
        mine = Hello(
            self._rank,
            "_detect_bucket_size",
            free_bytes=self._server.here.spare_memory(),
            bucket_cap=max_bucket_bytes(),
        )
        with self._begin("_detect_bucket_size", "", _TEN_MINUTES) as call:
            size = bucket_size(call.exchange(mine), self._gathered, may_cut=False)
        return size.bytes, disable_h2d_buffer or not size.staging
