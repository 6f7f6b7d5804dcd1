"""``ParameterServer``: one per GPU, beside an inference worker. Register, gather, update.

Also the home of the private helpers that programs written for the original import or patch here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from loguru import logger

from checkpoint_engine import settings
from checkpoint_engine.client import request_inference_to_update as request_inference_to_update
from checkpoint_engine.contract import Contract
from checkpoint_engine.data_types import BucketRange as BucketRange
from checkpoint_engine.data_types import DataToGather as DataToGather
from checkpoint_engine.data_types import H2DBucket as H2DBucket
from checkpoint_engine.data_types import MemoryBuffer as MemoryBuffer
from checkpoint_engine.data_types import MemoryBufferMetaList as MemoryBufferMetaList
from checkpoint_engine.data_types import MemoryBufferMetas as MemoryBufferMetas
from checkpoint_engine.data_types import ParameterMeta as ParameterMeta
from checkpoint_engine.data_types import align_up, tensor_nbytes
from checkpoint_engine.errors import BusyError as BusyError
from checkpoint_engine.errors import UpdateError as UpdateError
from checkpoint_engine.ground import rdma
from checkpoint_engine.ground.devices import DeviceManager
from checkpoint_engine.ground.local_rank import LocalRank, find_local_rank
from checkpoint_engine.ground.progress import Progress
from checkpoint_engine.ground.report import LoadedCheckpoint, UpdateReport
from checkpoint_engine.memory.checkpoints import POOL, Checkpoints
from checkpoint_engine.memory.host_memory import HostMemory
from checkpoint_engine.planning import plan
from checkpoint_engine.transfer.p2p import P2P
from checkpoint_engine.transfer.p2p_store import P2PStore
from checkpoint_engine.update.order import Order, RequestFunction, members_of
from checkpoint_engine.update.snapshot import Snapshot
from checkpoint_engine.update.update import Server, run_update
from checkpoint_engine.update.ways.broadcast import Broadcast
from checkpoint_engine.update.ways.peers import Peers
from checkpoint_engine.update.ways.pull import Pull
from checkpoint_engine.update.ways.shard import Shard
from checkpoint_engine.world import control
from checkpoint_engine.world.call import Call
from checkpoint_engine.world.control import ControlPlane
from checkpoint_engine.world.default_group import DefaultGroup
from checkpoint_engine.world.gathered import Gathered, Metas, gather, load
from checkpoint_engine.world.hello import Hello

if TYPE_CHECKING:
    from fastapi import FastAPI

_LONGEST_READ = 120.0  # seconds that a P2P read of one bucket may take after its owner withdrew it


class ParameterServer(Contract):
    """Holds one rank's part of checkpoints in host memory and sends them to inference workers.

    Every rank of the world makes one. Methods marked "all ranks" are collective: call them on every
    rank, in the same order.
    """

    shared_memory_pool_name = POOL

    def __init__(
        self,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        auto_pg: bool | None = None,
        gpu_count: int | None = None,
        mem_fraction: float | None = None,
        master_addr: str | None = None,
        master_port: int | None = None,
    ) -> None:
        """Nothing is connected yet; ranks meet in their first collective call.

        Args:
            rank: default: ``RANK``.
            world_size: default: ``WORLD_SIZE``.
            auto_pg: who owns torch's default process group. True: this server, whose
                ``gather_metas`` makes it; it is gone after every update. False: the caller. None:
                whoever made it, by ``init_process_group`` or without this server.
            gpu_count: ranks per node. Default: the visible devices; on the cpu device
                ``LOCAL_WORLD_SIZE``, else 1.
            mem_fraction: share of free device memory that an update's buffers may take.
                Default: ``PS_MEM_FRACTION``, else 0.9.
            master_addr: rank 0's host, where the ranks meet. Default: ``MASTER_ADDR``.
            master_port: a port of it. Default: ``MASTER_PORT`` + 1.

        Raises:
            ValueError: a value is missing or out of range.
        """
        here = find_local_rank(rank, world_size, gpu_count, mem_fraction)
        self._rank, self._world_size = here.rank, here.world_size
        self._local_rank, self._gpu_count = here.local_rank, here.gpu_count
        self._device_uuid, self._mem_fraction = here.device_uuid, here.mem_fraction
        self.device_manager = here.device_manager
        self._auto_pg = auto_pg
        self.allowed_folders: Sequence[str] | None = None
        """Real paths of the folders that files may be registered from, symbolic links resolved;
        ``None``: from anywhere."""
        self._log = logger.bind(rank=here.rank)
        self._control = ControlPlane(here.rank, here.world_size, master_addr, master_port)
        self._default_group = DefaultGroup(self._control, self.device_manager.backend)
        reachable = settings.p2p_host() or self._control.reachable_ip()
        local = self._control.local_ip()
        here = replace(here, host_ip=reachable, group_ip=local)
        here.make_device_current()
        self._p2p = p2p = P2P(here)
        _start_p2p(p2p, here)
        self._checkpoints = Checkpoints(_host_memory(here, p2p), p2p, here)
        self._gathered = Gathered()
        inside = Peers(here)
        ways = (inside, Shard(here, p2p, inside), Pull(here, p2p), Broadcast(here))
        self._server = Server(here, ways)

    # ------------------------------------------------------------------ checkpoints on this rank

    def register_checkpoint(
        self,
        checkpoint_name: str,
        *,
        files: Sequence[str] | None = None,
        named_tensors: Mapping[str, torch.Tensor] | None = None,
        use_shared_memory_pool: bool = False,
        use_inplace_pin_memory: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """Take this rank's part of a checkpoint into pinned host memory. This rank alone.

        Without input the rank owns nothing of it. The tensors and files are not needed afterwards.

        Args:
            files: ``.safetensors`` files, ``.npy`` files with their ``.meta``, or folders; a folder
                is read by its index if it has one.
            named_tensors: on any device; they override same-named tensors of the files.
            use_shared_memory_pool: fill memory that successive checkpoints share, one at a time.
            use_inplace_pin_memory: pin ``.safetensors`` files below ``/dev/shm`` where they are
                instead of copying them, and then DELETE them. The shared memory pool copies.
            on_progress: called as memory fills with what is copied; what it raises fails the call.
                Without it the first rank of each node draws a bar, if stderr is a terminal.

        Raises:
            AccessError: a file is outside ``allowed_folders``; nothing is kept.
            ValueError: the name is taken, or a file or tensor cannot be used; nothing is kept.
            MemoryError: there is not enough host memory; nothing is kept.
            RuntimeError: memory cannot be pinned, or a file cannot be read; nothing is kept.
        """
        self._checkpoints.register(
            checkpoint_name,
            files or (),
            named_tensors or {},
            pooled=use_shared_memory_pool,
            in_place=use_inplace_pin_memory,
            allowed_folders=self.allowed_folders,
            on_progress=on_progress,
        )

    def unregister_checkpoint(self, checkpoint_name: str, force: bool = False) -> None:
        """Free this rank's part of a checkpoint. This rank alone.

        Its memory is kept for the next ``register_checkpoint``, as much as the largest checkpoint
        so far took, unless ``PS_RETAIN_HOST_MEMORY=0``.

        Args:
            force: give all memory that is kept back to the system, and that of the shared memory
                pool if the checkpoint is in it.

        Raises:
            BusyError: an update is sending it.
        """
        self._checkpoints.unregister(checkpoint_name, force)

    # ------------------------------------------------------------------ who owns what

    def gather_metas(
        self, checkpoint_name: str, *, timeout: timedelta = timedelta(minutes=10)
    ) -> None:
        """Learn what every rank owns of a checkpoint, replacing what was gathered before. All
        ranks.

        Raises:
            UpdateError: a rank did not come or is in another call, no rank has registered the
                checkpoint (unless P2P works, for a join), or two ranks own different tensors.
        """
        with (
            self._begin("gather_metas", checkpoint_name, timeout) as call,
            self._checkpoints.pin(checkpoint_name) as source,
        ):
            gathered = gather(call, source, self._gathered)
            if self._auto_pg:
                self._default_group.create_within(call)
            call.on_success = partial(setattr, self, "_gathered", gathered)

    def get_metas(self) -> Metas:
        """What was gathered or loaded last, by owner rank. This rank alone."""
        return dict(self._gathered.metas)

    def load_metas(self, metas: Metas) -> None:
        """Take over the metas of another world, to read its ranks' memory by P2P. This rank alone.

        Raises:
            ValueError: an owner has no P2P address, or what an owner says is damaged.
            BusyError: this server is in a collective call.
        """
        with self._control.alone("load_metas"):
            self._gathered = load(metas)

    # ------------------------------------------------------------------ process groups

    def init_process_group(
        self,
        *,
        master_addr: str | None = None,
        master_port: int | None = None,
        timeout: timedelta = timedelta(minutes=10),
    ) -> None:
        """Create torch's default process group of the world, for the caller's use. All ranks.

        Updates do not need it. Does nothing if there is one.
        """
        self._default_group.create(range(self._world_size), master_addr, master_port, timeout)

    def init_process_group_for_ranks(
        self,
        ranks: Sequence[int],
        *,
        master_port: int | None = None,
        timeout: timedelta = timedelta(minutes=10),
    ) -> None:
        """Create a default process group of exactly ``ranks``; other ranks return at once."""
        if self._rank in ranks:
            self._default_group.create(ranks, None, master_port, timeout)

    def store_based_barrier(self, timeout: timedelta = timedelta(minutes=5)) -> None:
        """Return once every rank has called it, without any process group. All ranks."""
        with self.in_step("store_based_barrier", "", timeout):
            pass

    @contextmanager
    def in_step(self, what: str, checkpoint_name: str, timeout: timedelta) -> Iterator[Call]:
        """A collective call of the caller's own, which ends on every rank as on the one that fails
        first: in ``UpdateError``, also where ranks do not say the same. All ranks."""
        with self._begin(what, checkpoint_name, timeout) as call:
            call.exchange(Hello(self._rank, what, checkpoint_name))
            yield call

    def release_groups(self) -> None:
        """Give back the groups that are kept between updates. This rank alone; the next update
        makes new ones on all ranks.

        Raises:
            BusyError: this server is in a collective call.
        """
        with self._control.alone("release_groups"):
            for way in self._server.ways:
                way.release()

    # ------------------------------------------------------------------ update

    def update(
        self,
        checkpoint_name: str,
        req_func: RequestFunction,
        *,
        ranks: Sequence[int] | None = None,
        timeout: timedelta = timedelta(minutes=10),
        version: str | None = None,
        on_instance_failure: Literal["abort", "continue"] = "abort",
        on_progress: Callable[[Progress], None] | None = None,
        compare_ranks: bool = False,
        trace: str | os.PathLike[str] | None = None,
    ) -> UpdateReport:
        """Send a checkpoint to the inference workers of all ranks. All ranks.

        Args:
            req_func: asks the inference engine to start receiving. Gets the (device identity, zmq
                address) of every rank, in rank order; runs in a thread of its own on every rank.
                Once it has returned on all ranks, a worker has 30 s or half of
                ``timeout`` to come, whichever is longer.
            ranks: send to the workers of these ranks only, by P2P. Other ranks that call it return
                once it is over; of updates with one checkpoint they call all or none.
            timeout: of the whole call.
            version: an id for what the workers hold then, see ``worker.weight_version``; default:
                a random one. The same on all ranks that give one.
            on_instance_failure: ``continue``: update the other engine instances, and name those
                that failed in the report. The ranks whose ``req_func`` has an equal attribute
                ``instance`` serve one instance (``client``'s functions have it); without, each
                rank serves one. An engine that does not answer fails once half of the time is over.
            on_progress: called after every bucket that this rank's worker has loaded; what it
                raises fails the update. Without it the first rank of each node draws a bar, if
                stderr is a terminal.
            compare_ranks: learn what every rank spent its time with, for the report's ``by_rank``
                and ``slowest``; the same on all ranks. Takes one more exchange between them.
            trace: a folder, for a Chrome trace of all ranks. Default: ``PS_TRACE``. Enough on one
                rank; the first that has it writes, and its report names the file. If the update
                fails, each rank writes its own part, which its error names.

        Raises:
            UpdateError: on every rank, naming the rank that failed first, its phase and the cause.
                Everything is released, and the next update works.
            BusyError: this server is in another collective call.
        """
        members = members_of(ranks, self._world_size)
        if members is not None and self._rank not in members:
            return self._await_update(checkpoint_name, members, timeout)
        options = (version, on_instance_failure, on_progress, compare_ranks, trace)
        order = Order(checkpoint_name, req_func, members, *options)
        try:
            with (
                self._begin("update", checkpoint_name, timeout, members) as call,
                self._checkpoints.pin(checkpoint_name) as source,
            ):
                self._p2p.release_finished()  # before it is counted what memory is free
                report, gathered = run_update(call, source, self._gathered, order, self._server)
                if members is None:
                    call.on_success = partial(setattr, self, "_gathered", gathered)
        finally:
            if self._auto_pg:
                self._default_group.leave()
        report = report.completed(call.clock.seconds, *self._checkpoints.memory.usage)
        if call.leads:
            self._log.info("rank {}: updated {}", self._rank, report)
        return report

    @property
    def served(self) -> LoadedCheckpoint | None:
        """What this rank's engine holds; ``None`` before the first update, and while the weights
        are partly written. Any thread."""
        return self._server.served

    @property
    def progress(self) -> Progress | None:
        """How far the call that is running on this rank has come: a collective one, else the
        registering of a checkpoint. Any thread."""
        call = self._control.running
        return self._checkpoints.filling if call is None else call.clock.progress

    def snapshot(self) -> Snapshot:
        """What this rank holds and does now; never waits for a call that is running. Any thread."""
        holds = self._server.here, self._p2p, self._checkpoints, self._gathered
        return Snapshot.of(*holds, self.served, self.progress)

    # ------------------------------------------------------------------ parts of the above

    def _await_update(
        self, checkpoint_name: str, members: Sequence[int], timeout: timedelta
    ) -> UpdateReport:
        """Return once an update that this rank has no part in is over: it may own what is read."""
        waited = self._control.await_others("update", timeout, members, checkpoint_name)
        report = UpdateReport.of_nothing(checkpoint_name, self._rank, self._world_size)
        return report.completed({"waiting": waited}, *self._checkpoints.memory.usage)


def _start_p2p(p2p: P2P, here: LocalRank) -> None:
    """Without P2P everything but ``update(ranks=...)`` works."""
    if settings.p2p() == "off":
        p2p.missing = "PS_P2P=off"
        return
    try:
        device = (
            "" if here.device_manager.device_type == "npu" else here.choose_nic(_get_rdma_devices())
        )
        p2p.store = P2PStore(here.device_manager, device=device, host=here.host_ip)
        p2p.device = p2p.store.device
    except (RuntimeError, AssertionError) as error:
        p2p.missing = str(error)
        if here.local_rank == 0:
            logger.bind(rank=here.rank).log("WARNING", "rank {}: no P2P: {}", here.rank, error)


def _host_memory(here: LocalRank, p2p: P2P) -> HostMemory:
    memory = HostMemory(
        here.device_manager.device_type,
        retain_bytes=None if settings.retain_host_memory() else 0,
        cpus=here.device_manager.nearby_cpus(here.local_rank),
    )
    if p2p.store is not None:
        memory.keep_addresses(_LONGEST_READ)
    return memory


# ---------------------------------------------------------------------- names that callers know


def _get_physical_gpu_id(device_manager: Any = None, device_index: int | None = None) -> str:
    """A device's identity; called as ``(index)`` by 0.2's callers, ``(device_manager, index)`` by
    0.4's."""
    if not isinstance(device_manager, DeviceManager):
        device_manager, device_index = DeviceManager(), device_manager
    if device_index is None:
        module = device_manager.device_module
        device_index = module.current_device() if device_manager.is_accelerator else 0
    return device_manager.identity(device_index)


_ibv_get_device_list, _get_rdma_devices, _parse_NCCL_IB_HCA, _get_my_rdma_device = rdma.names_for(
    globals()
)


def _get_master_port(master_port: int | None = None) -> int:
    return control.master_port(master_port)


def _get_bcast_rank_map(world_size: int, ranks: list[int] | None) -> dict[int, int]:
    """Global rank to rank within the group that broadcasts."""
    return {rank: place for place, rank in enumerate(ranks or range(world_size))}


def _align_size(dtype: torch.dtype, shape: torch.Size) -> int:
    return align_up(tensor_nbytes(dtype, shape))


_to_named_tensor = plan.to_named_tensor
_gen_h2d_buckets = plan.gen_h2d_buckets
_assign_receiver_ranks = plan.assign_receiver_ranks


def _init_api(ps: ParameterServer) -> FastAPI:
    from checkpoint_engine.api import _init_api as init_api

    return init_api(ps)


def run_from_cli() -> None:
    """Serve this rank's ``ParameterServer`` over HTTP."""
    from checkpoint_engine.__main__ import main

    main()


if __name__ == "__main__":
    run_from_cli()
