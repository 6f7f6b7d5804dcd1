"""``ParameterServer``: one per GPU, beside an inference worker. Register, gather, update.

Also the home of the private helpers that programs written for the original import or patch here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import zmq
from loguru import logger

from checkpoint_engine import checksum, control, distributed, plan, rdma
from checkpoint_engine.checkpoint_files import open_files, tensor_sources
from checkpoint_engine.checksum import Checksums
from checkpoint_engine.client import request_inference_to_update
from checkpoint_engine.control import ControlPlane, Operation
from checkpoint_engine.data_types import (
    BucketRange,
    DataToGather,
    H2DBucket,
    Lease,
    MemoryBuffer,
    MemoryBufferMetaList,
    MemoryBufferMetas,
    ParameterMeta,
    align_up,
    tensor_nbytes,
)
from checkpoint_engine.device_utils import DeviceManager
from checkpoint_engine.distributed.shared_memory import Neighbours, SharedMemoryGroup
from checkpoint_engine.distributed.weights_group import (
    TorchGroup,
    WeightsGroup,
    create_weights_group,
)
from checkpoint_engine.engine_profile import EngineProfile
from checkpoint_engine.errors import BusyError, UpdateError
from checkpoint_engine.gather import (
    EncodedLayout,
    KnownLayouts,
    decode_place,
    encode_layout,
    encode_place,
    join_place,
)
from checkpoint_engine.instances import Instance
from checkpoint_engine.ipc import SharedBuffer
from checkpoint_engine.link import Address, WorkerLink, open_context
from checkpoint_engine.loaders import (
    HostLoader,
    Loader,
    MixedLoader,
    RemoteLoader,
    copy_from_host,
    lying_on_host,
)
from checkpoint_engine.p2p_store import P2PStore
from checkpoint_engine.pin_memory import HostMemory
from checkpoint_engine.pipeline import (
    Messages,
    Pipeline,
    Request,
    RequestFunction,
    Session,
    SocketPaths,
    Streams,
    WorkerSession,
    make_streams,
)
from checkpoint_engine.plan import BucketSize, TransferPlan
from checkpoint_engine.progress import Progress, drawn_bar
from checkpoint_engine.report import Served, UpdateReport
from checkpoint_engine.settings import SHARED_MEMORY, Settings, from_launcher, trace_folder
from checkpoint_engine.store import connect_store
from checkpoint_engine.trace import UNTRACED, RankTracer, Tracer, write_trace

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = [
    "BucketRange",
    "BusyError",
    "DataToGather",
    "H2DBucket",
    "MemoryBuffer",
    "MemoryBufferMetaList",
    "MemoryBufferMetas",
    "P2PStore",
    "ParameterMeta",
    "ParameterServer",
    "UpdateError",
    "UpdateReport",
    "request_inference_to_update",
    "run_from_cli",
]

T = TypeVar("T")
Metas = dict[int, MemoryBufferMetaList]
_TEN_MINUTES = timedelta(minutes=10)
_LONGEST_READ = 120.0  # seconds that a P2P read of one bucket may take after its owner withdrew it


class ParameterServer:
    """Holds one rank's part of checkpoints in host memory and sends them to inference workers.

    Every rank of the world makes one. Methods marked "all ranks" are collective: call them on every
    rank, in the same order.
    """

    shared_memory_pool_name = "__shared_memory_pool__"

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
            rank, world_size: default: ``RANK``, ``WORLD_SIZE``.
            auto_pg: who owns process groups. True: this server, which closes them after every
                update. False: the caller. None: whoever made them.
            gpu_count: ranks per node. Default: the visible devices; on the cpu device
                ``LOCAL_WORLD_SIZE``, else 1.
            mem_fraction: share of free device memory that an update's buffers may take.
                Default: ``PS_MEM_FRACTION``, else 0.9.
            master_addr, master_port: where the ranks meet, on rank 0's host. Default:
                ``MASTER_ADDR`` and ``MASTER_PORT`` + 1.

        Raises:
            ValueError: a value is missing or out of range.
        """
        self._rank = from_launcher(rank, "RANK")
        self._world_size = from_launcher(world_size, "WORLD_SIZE")
        if not 0 <= self._rank < self._world_size:
            raise ValueError(f"rank {self._rank} is not in a world of {self._world_size}")
        self.device_manager = DeviceManager()
        self._gpu_count = self.device_manager.device_count() if gpu_count is None else gpu_count
        if self._gpu_count < 1:
            raise ValueError(f"gpu_count must be at least 1, got {self._gpu_count}")
        self._local_rank = self._rank % self._gpu_count
        settings = Settings.from_env(mem_fraction)
        self._mem_fraction = settings.mem_fraction
        self._auto_pg = auto_pg
        self._device_uuid = _get_physical_gpu_id(self.device_manager, self._local_rank)
        if self.device_manager.is_accelerator:
            self.device_manager.device_module.set_device(self._local_rank)

        self.allowed_folders: Sequence[str] | None = None
        """Real paths of the folders that files may be registered from, symbolic links resolved;
        ``None``: from anywhere."""
        self._log = logger.bind(rank=self._rank)
        self._control = ControlPlane(self._rank, self._world_size, master_addr, master_port)
        self._host_ip = self._control.reachable_ip()
        self._host_memory = HostMemory(
            self.device_manager.device_type,
            retain_bytes=None if settings.retain_host_memory else 0,
            cpus=self.device_manager.nearby_cpus(self._local_rank),
        )
        self._memory_pool: dict[str, list[MemoryBuffer]] = {}
        self._pool_user: str | None = None
        self._gathered_name: str | None = None
        self._gathered_in_vain: str | None = None
        self._metas_were_loaded = False
        self._gather_seconds = 0.0
        self._gathered_digest = ""
        self._gathered_layout = ""
        self._current_global_parameter_metas: Metas = {}
        self._local_rdma_devices: dict[str, set[int]] = {}
        self._remote_rdma_devices: dict[str, set[int]] = {}
        self._device_uuids: dict[int, str] = {}
        self._leases: dict[str, Lease] = {}
        self._checksums: Checksums | None = None
        self._encoded_layouts: dict[str, EncodedLayout] = {}
        self._known_layouts = KnownLayouts()
        self._planned: _Planned | None = None
        self._known_worker = EngineProfile()
        self._weights_group: TorchGroup | None = None
        self._groups_made = 0
        self._made_default_group = False
        self._memory_lock = threading.Lock()
        self._collective_lock = threading.Lock()
        self._running = ""
        self._operation: Operation | None = None
        self._filling: Progress | None = None
        self._served: Served | None = None
        self._rdma_device: str | None = None
        self._p2p_store: P2PStore | None = None
        self._p2p_missing = ""
        self._start_p2p()

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

        Without input the rank owns nothing of it. Once this returns, the caller may change or drop
        the tensors and files.

        Args:
            files: ``.safetensors`` files, or ``.npy`` files with their ``.meta``.
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
        with self._memory_lock, ExitStack() as undo:
            self._check_can_register(checkpoint_name, use_shared_memory_pool)
            in_place, copied = _split_in_place(
                files, use_inplace_pin_memory and not use_shared_memory_pool
            )
            sources = {
                **open_files(copied, self.allowed_folders),
                **tensor_sources(named_tensors or {}),
            }
            pool = self._memory_pool.get(self.shared_memory_pool_name) or None
            add_sums = self._choose_sums(checkpoint_name, on_progress)
            nbytes = sum(source.nbytes for source in sources.values())
            with self._observed("filling", checkpoint_name, nbytes, on_progress) as advance:
                buffers = self._host_memory.fill(
                    sources, pool if use_shared_memory_pool else None, advance
                )
            if not (use_shared_memory_pool and pool):
                undo.callback(self._host_memory.release, buffers)

            if in_place:
                overridden = set(named_tensors or ())
                taken = sources.keys() - overridden
                pinned = self._pin_in_place(
                    in_place, taken, overridden, lambda pinned: add_sums([*buffers, *pinned])
                )
                buffers = [*buffers, *pinned]
            else:
                add_sums(buffers)
            undo.pop_all()
            if use_shared_memory_pool:
                self._memory_pool[self.shared_memory_pool_name] = pool or buffers
                self._pool_user = checkpoint_name
            self._memory_pool[checkpoint_name] = buffers
            self._encoded_layouts.pop(checkpoint_name, None)
            self._offer(checkpoint_name, new_memory=not use_shared_memory_pool or pool is None)
            self._log.info(
                "registered {}: {} tensors, {:.3f} GB in {} buffers",
                checkpoint_name,
                sum(len(buffer.metas) for buffer in buffers),
                sum(buffer.size for buffer in buffers) / 1e9,
                len(buffers),
            )

    def _choose_sums(
        self, checkpoint_name: str, on_progress: Callable[[Progress], None] | None
    ) -> Callable[[list[MemoryBuffer]], None]:
        """What sums all buffers of the checkpoint, if that is wanted."""
        if not checksum.is_wanted():
            return lambda buffers: None

        def add_sums(buffers: list[MemoryBuffer]) -> None:
            nbytes = sum(buffer.size for buffer in buffers)
            with self._observed("summing", checkpoint_name, nbytes, on_progress) as advance:
                checksum.add_sums(buffers, advance)

        return add_sums

    @contextlib.contextmanager
    def _observed(
        self,
        phase: str,
        checkpoint_name: str,
        total: int,
        on_progress: Callable[[Progress], None] | None,
    ) -> Iterator[Callable[[float], None]]:
        """A phase of registering. Gives what to call with the share that is done."""
        with ExitStack() as stack:
            show = on_progress
            if show is None and total and self._draws_bars():
                show = stack.enter_context(drawn_bar(f"register: {phase}", total))

            def advance(share: float) -> None:
                self._filling = Progress(
                    call="register",
                    checkpoint=checkpoint_name,
                    phase=phase,
                    done_bytes=int(share * total),
                    total_bytes=total,
                )
                if show is not None:
                    show(self._filling)

            try:
                yield advance
            finally:
                self._filling = None

    def _draws_bars(self) -> bool:
        return self._local_rank == 0 and sys.stderr.isatty()

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
        with self._memory_lock:
            if (
                checkpoint_name not in self._memory_pool
                or checkpoint_name == self.shared_memory_pool_name
            ):
                self._log.warning("checkpoint {} is not registered", checkpoint_name)
                return
            if self._running == checkpoint_name:
                raise BusyError(
                    f"checkpoint {checkpoint_name!r} is being updated from: try again after it"
                )
            self._revoke(checkpoint_name)
            self._encoded_layouts.pop(checkpoint_name, None)
            if checkpoint_name != self._pool_user:
                self._free(checkpoint_name)
            else:
                del self._memory_pool[checkpoint_name]
                self._pool_user = None
                if force:
                    self._free(self.shared_memory_pool_name)
            if force:
                self._host_memory.trim()

    def _free(self, place: str) -> None:
        """Give memory back; other ranks must not read it any more."""
        buffers = self._memory_pool.pop(place)
        try:
            if self._p2p_store is not None:
                names = [f"{place}/{index}" for index in range(len(buffers))]
                self._p2p_store.unregister_named_tensors(names)
        finally:
            self._host_memory.release(buffers)

    # ------------------------------------------------------------------ who owns what

    def gather_metas(self, checkpoint_name: str, *, timeout: timedelta = _TEN_MINUTES) -> None:
        """Learn what every rank owns of a checkpoint, replacing what was gathered before. All
        ranks.

        Raises:
            UpdateError: a rank did not come, or no rank has registered it. A world that can join
                another by P2P learns the latter from ``update``.
        """
        with self._collective("gather_metas", checkpoint_name, timeout) as operation:
            gathered, digest = self._gather(operation, checkpoint_name)
            known = any(one.memory_buffer_metas_list for one in gathered)
            known = known or self._is_registered_somewhere(operation, checkpoint_name, gathered)
        self._set_global_metas(dict(enumerate(gathered)))
        self._local_rdma_devices = _topology(
            {rank: (one.rdma_device, one.host_ip) for rank, one in enumerate(gathered)}
        )
        self._device_uuids = {rank: one.device_uuid for rank, one in enumerate(gathered)}
        self._gathered_name = checkpoint_name if known else None
        self._gathered_in_vain = None if known else checkpoint_name
        self._metas_were_loaded = False
        self._gather_seconds = sum(operation.seconds.values())
        self._gathered_digest = digest
        self._gathered_layout = self._layout_of(checkpoint_name).digest
        buffers = [
            buffer
            for owned in self._current_global_parameter_metas.values()
            for buffer in owned.memory_buffer_metas_list
        ]
        self._log.log(
            _level(self._rank == 0),
            "gathered {}: {} tensors, {:.3f} GB, of {} of {} ranks",
            checkpoint_name,
            sum(len(buffer.metas) for buffer in buffers),
            sum(buffer.size for buffer in buffers) / 1e9,
            len(self._current_global_parameter_metas),
            self._world_size,
        )

    def get_metas(self) -> Metas:
        """What was gathered or loaded last, by owner rank. This rank alone."""
        return dict(self._current_global_parameter_metas)

    def load_metas(self, metas: Metas) -> None:
        """Take over the metas of another world, to read its ranks' memory by P2P. This rank alone.

        Raises:
            ValueError: an owner has no P2P address.
        """
        owners = {rank: owned for rank, owned in metas.items() if owned.memory_buffer_metas_list}
        without = [rank for rank, owned in owners.items() if not owned.p2p_store_addr]
        if without:
            raise ValueError(
                f"owner ranks {without} have no P2P address: they run without P2P, or could not "
                "register this checkpoint for it (see their logs)"
            )
        unleased = [rank for rank, owned in owners.items() if owned.lease is None]
        if unleased:
            self._log.warning(
                "owner ranks {} gave no lease, as releases of the original do: if they change or "
                "drop the checkpoint while it is read, nobody notices",
                unleased,
            )
        self._set_global_metas(owners)
        self._gathered_name = None
        self._gathered_in_vain = None
        self._metas_were_loaded = True
        self._gather_seconds = 0.0
        self._gathered_digest = hashlib.sha256(
            json.dumps(
                {rank: owned.model_dump(mode="json") for rank, owned in owners.items()}
            ).encode()
        ).hexdigest()

    # ------------------------------------------------------------------ process groups

    def init_process_group(
        self,
        *,
        master_addr: str | None = None,
        master_port: int | None = None,
        timeout: timedelta = _TEN_MINUTES,
    ) -> None:
        """Create the default process group of the world, for the caller's use. All ranks.

        Updates do not need it. Does nothing if there is one.
        """
        self._init_default_group(list(range(self._world_size)), master_addr, master_port, timeout)

    def init_process_group_for_ranks(
        self,
        ranks: Sequence[int],
        *,
        master_port: int | None = None,
        timeout: timedelta = _TEN_MINUTES,
    ) -> None:
        """Create a default process group of exactly ``ranks``; other ranks return at once."""
        if self._rank in ranks:
            self._init_default_group(list(ranks), None, master_port, timeout)

    def store_based_barrier(self, timeout: timedelta = timedelta(minutes=5)) -> None:
        """Return once every rank has called it, without any process group. All ranks."""
        with self._collective("store_based_barrier", "", timeout) as operation:
            operation.all_gather("barrier", b"")

    # ------------------------------------------------------------------ update

    def update(
        self,
        checkpoint_name: str,
        req_func: RequestFunction,
        *,
        ranks: Sequence[int] | None = None,
        timeout: timedelta = _TEN_MINUTES,
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
            ranks: P2P: send to the workers of these ranks only.
            timeout: of the whole call.
            version: an id for what the workers hold then; default: a random one. Those of this
                library say it on ``weight_version()``.
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
                rank; the first that has it writes, and says the file in its report, or in its
                error.

        Raises:
            UpdateError: on every rank, naming the rank that failed first, its phase and the cause.
                Everything is released, and the next update works.
            BusyError: this server is in another collective call.
        """
        members = self._members(ranks)
        if members is not None and self._rank not in members:
            waited = self._control.await_others("update", timeout, members)
            return self._report(checkpoint_name, TransferPlan((), 0, False), {"waiting": waited})
        with (
            self._collective("update", checkpoint_name, timeout, members) as operation,
            ExitStack() as stack,
        ):
            operation.watch()
            self._log_phases(operation, checkpoint_name)
            stack.callback(self._leave_default_group)
            operation.state = lambda: "untouched"
            link = self._listen(stack)
            neighbours = self._await_neighbours(operation, stack)
            options = self._options(req_func, version, on_instance_failure, trace)
            options["neighbour"] = "" if neighbours is None else neighbours.address
            hellos, planned = self._agree(operation, checkpoint_name, link.url, members, options)
            transfer = planned.transfer
            version = _agreed_version(hellos)
            self._observe(operation, transfer, on_progress, stack)
            traced = any(one["trace"] for one in hellos)
            tracer = RankTracer(self._rank, transfer, self.device_manager, exact=traced)
            if traced:
                self._trace_failure(operation, tracer, hellos, checkpoint_name)
            self._log.debug(
                "updating {}: {} tensors, {:.3f} GB in {} buckets of up to {:.1f} MB, by {}",
                checkpoint_name,
                transfer.tensor_count,
                transfer.total_bytes / 1e9,
                len(transfer.steps),
                transfer.bucket_bytes / 1e6,
                "broadcast" if members is None else "P2P",
            )
            operation.begin("buffers")
            buffer = stack.enter_context(self._share_buffer(transfer))
            if neighbours is not None and not self._meet(operation, neighbours, hellos, buffer):
                neighbours = None
            streams = make_streams(self.device_manager, order_broadcasts=neighbours is not None)
            stack.callback(streams.close)
            staging = self._make_staging(transfer, operation, remote=members is not None)
            moving = stack.enter_context(ExitStack())
            loader = self._make_loader(
                checkpoint_name, members, streams, moving, buffer, staging, tracer
            )
            group: WeightsGroup | None
            if neighbours is not None:
                group = self._share_memory(operation, neighbours, buffer, streams, moving)
            else:
                group = self._join_weights_group(operation, members, stack)
            pipeline = Pipeline(
                transfer,
                planned.messages,
                self._rank,
                buffer.tensor,
                staging,
                group,
                loader,
                streams,
                self._known_checksums(),
                tracer,
            )
            operation.begin("handshake")
            request = stack.enter_context(
                contextlib.closing(Request(req_func, self._socket_paths(hellos)))
            )
            stack.push(_give_up(operation, link))
            session: Session
            if on_instance_failure == "continue":
                instances = [one["instance"] for one in hellos]
                session = Instance(link, request, operation, instances, version)
            else:
                session = WorkerSession(link, _both(operation.check, request.check), version)
            operation.state = lambda: session.state
            served = Served(
                checkpoint=checkpoint_name, version=version, engine=options["instance"], since=0.0
            )
            stack.callback(self._note_served, session, served)
            pipeline.begin(session.check)
            stack.callback(self._learn_of_worker, session)
            session.hand_over(buffer, operation.deadline.remaining(), transfer.cuts_tensors)
            buffer.unlink()
            pipeline.run(operation, session)
            operation.begin("release")
            session.release()
            moving.close()  # NICs and neighbours let go of the memory before it is given back
            del pipeline, staging, loader
            buffer.close()
            operation.begin("post hook")
            session.finish(request)
            by_rank = self._compare(operation) if compare_ranks else {}
            stages = tracer.stages()
            trace_file = None
            if traced:
                trace_file = self._collect_trace(operation, tracer, hellos, checkpoint_name)
        report = self._report(
            checkpoint_name,
            transfer,
            operation.seconds,
            version=version,
            failed_instances=list(session.failed),
            gather_seconds=self._gather_seconds,
            waited_for=operation.waited_for,
            stages=stages,
            by_rank={rank: spent.phases for rank, spent in by_rank.items()},
            waited_for_by_rank={rank: spent.waited_for for rank, spent in by_rank.items()},
            trace=trace_file,
        )
        self._log.log(_level(self._rank == operation.members[0]), "updated {}", report)
        return report

    def _options(
        self,
        req_func: RequestFunction,
        version: str | None,
        on_instance_failure: str,
        trace: str | os.PathLike[str] | None,
    ) -> dict[str, Any]:
        """What all ranks must agree on, or learn of each other, before an update."""
        if on_instance_failure not in ("abort", "continue"):
            raise ValueError(
                f'on_instance_failure is "abort" or "continue", not {on_instance_failure!r}'
            )
        return {
            "version": version,
            "new version": uuid.uuid4().hex,
            "instance": str(getattr(req_func, "instance", f"rank {self._rank}")),
            "on instance failure": on_instance_failure,
            "trace": trace_folder() if trace is None else os.fspath(trace),
            "joins parts": self._known_worker.joins_parts,
        }

    def _collect_trace(
        self,
        operation: Operation,
        tracer: RankTracer,
        hellos: list[dict[str, Any]],
        checkpoint_name: str,
    ) -> str | None:
        """The trace's file, on the rank that writes it. Failing to write it fails nothing else."""
        operation.begin("trace")
        writer = next(one["rank"] for one in hellos if one["trace"])
        parts = operation.gather_at(writer, "trace", tracer.encode(operation.history))
        if self._rank != writer:
            return None
        return self._write_trace(hellos, checkpoint_name, parts)

    def _trace_failure(
        self,
        operation: Operation,
        tracer: RankTracer,
        hellos: list[dict[str, Any]],
        checkpoint_name: str,
    ) -> None:
        """If the update fails from now on, let a trace say what the ranks did until then."""

        def write(parts: Sequence[bytes], failure: UpdateError) -> str | None:
            return self._write_trace(hellos, checkpoint_name, parts, failure)

        operation.trace_failure(
            part=lambda: tracer.encode_failure(operation.history),
            writers=[one["rank"] for one in hellos if one["trace"]],
            write=write,
        )

    def _write_trace(
        self,
        hellos: list[dict[str, Any]],
        checkpoint_name: str,
        parts: Sequence[bytes],
        failure: UpdateError | None = None,
    ) -> str | None:
        folder = Path(next(one["trace"] for one in hellos if one["rank"] == self._rank))
        version = _agreed_version(hellos)
        try:
            return str(write_trace(folder, checkpoint_name, version, parts, failure))
        except (OSError, ValueError) as error:  # the latter: no name for a file
            self._log.warning("the trace cannot be written into {}: {}", folder, error)
            return None

    def _learn_of_worker(self, session: Session) -> None:
        """However the update ends."""
        if session.worker_joins_parts is not None:
            self._known_worker.joins_parts = session.worker_joins_parts

    def _note_served(self, session: Session, served: Served) -> None:
        """However the update ends."""
        failed = any(self._rank in one.ranks for one in session.failed)
        if session.state.startswith("holds") and not failed:
            self._served = served.model_copy(update={"since": time.time()})
        elif session.state != "untouched":
            self._served = None

    @property
    def served(self) -> Served | None:
        """What this rank's engine holds; ``None`` before the first update, and while the weights
        are partly written. Any thread."""
        return self._served

    def _known_checksums(self) -> Checksums:
        if self._checksums is None:
            self._checksums = Checksums(self._current_global_parameter_metas)
        return self._checksums

    @property
    def progress(self) -> Progress | None:
        """How far the call that is running on this rank has come: a collective one, else the
        registering of a checkpoint. Any thread."""
        operation = self._operation
        if operation is None:
            return self._filling
        return Progress(
            call=operation.name,
            checkpoint=self._running,
            phase=operation.phase,
            done_bytes=operation.done_bytes,
            total_bytes=operation.total_bytes,
            seconds=dict(operation.seconds),
        )

    def _observe(
        self,
        operation: Operation,
        transfer: TransferPlan,
        on_progress: Callable[[Progress], None] | None,
        stack: ExitStack,
    ) -> None:
        operation.total_bytes = transfer.total_bytes
        if on_progress is None and self._draws_bars():
            on_progress = stack.enter_context(drawn_bar("update", transfer.total_bytes))
        if on_progress is not None:
            report = on_progress
            operation.on_advance = lambda: report(self.progress) if self.progress else None

    def _log_phases(self, operation: Operation, checkpoint_name: str) -> None:
        level = _level(self._rank == operation.members[0])

        def log_phase(phase: str) -> None:
            self._log.log(level, "updating {}: {}", checkpoint_name, phase)

        operation.on_phase = log_phase

    def _compare(self, operation: Operation) -> dict[int, _Spent]:
        """What every rank spent its time with so far."""
        operation.begin("comparison")
        mine = _Spent(operation.seconds, operation.waited_for)
        blobs = operation.all_gather("phases", mine.encode())
        return dict(zip(operation.members, map(_Spent.decode, blobs), strict=True))

    def _members(self, ranks: Sequence[int] | None) -> list[int] | None:
        """The ranks of a P2P update, sorted; ``None`` for a broadcast to all."""
        if not ranks:
            return None
        strangers = [rank for rank in ranks if not 0 <= rank < self._world_size]
        if strangers:
            raise ValueError(f"ranks {strangers} are not in a world of {self._world_size}")
        if self._p2p_store is None:
            raise RuntimeError(
                f"update(ranks={list(ranks)}) needs P2P, which this rank does not have: "
                f"{self._p2p_missing or 'it was switched off'}"
            )
        return sorted(set(ranks))

    def _listen(self, stack: ExitStack) -> WorkerLink:
        context = stack.enter_context(open_context())
        return stack.enter_context(contextlib.closing(WorkerLink(context, Address())))

    def _agree(
        self,
        operation: Operation,
        checkpoint_name: str,
        address: str,
        members: list[int] | None,
        options: dict[str, Any],
    ) -> tuple[list[dict[str, Any]], _Planned]:
        """Exchange what planning needs, and plan. The plan is the same on every rank."""
        operation.begin("plan")
        self._check_gathered(checkpoint_name, remote=members is not None)
        mine = {
            "rank": self._rank,
            "uuid": self._device_uuid,
            "address": address,
            "free": self._spare_memory(),
            "cap": Settings.from_env().max_bucket_bytes,
            "digest": self._gathered_digest,
            "nic": (self._rdma_device or "", self._host_ip),
            **options,
        }
        hellos = [
            json.loads(blob) for blob in operation.all_gather("hello", json.dumps(mine).encode())
        ]
        different = [one["rank"] for one in hellos if one["digest"] != mine["digest"]]
        if different:
            raise RuntimeError(
                f"ranks {different} gathered other metas than rank {self._rank}: call "
                f"gather_metas({checkpoint_name!r}), or load_metas(), on all ranks"
            )
        return hellos, self._plan_for(hellos, members)

    def _plan_for(self, hellos: list[dict[str, Any]], members: list[int] | None) -> _Planned:
        """The plan of the last update, if nothing that it depends on has changed."""
        # By P2P the parts of several owners' tensors would arrive at once.
        may_cut = members is None and all(one["joins parts"] for one in hellos)
        size = self._bucket_size(hellos, may_cut)
        topology = _topology({one["rank"]: one["nic"] for one in hellos})
        basis = (self._gathered_digest, size, topology, members, may_cut)
        if self._planned is None or self._planned.basis != basis:
            transfer = plan.plan_transfer(
                self._current_global_parameter_metas,
                size,
                topology,
                self._remote_rdma_devices,
                members,
                self._pace(remote=members is not None),
                may_cut,
            )
            self._planned = _Planned(basis, transfer, Messages(transfer))
        return self._planned

    def _pace(self, remote: bool) -> plan.Pace:
        if remote:
            return plan.READ_PACE
        return plan.DEVICE_PACE if self.device_manager.is_accelerator else plan.HOST_PACE

    def _socket_paths(self, hellos: list[dict[str, Any]]) -> SocketPaths:
        """Of every rank of the world, in order; a rank that takes no part has no address."""
        paths = [(self._device_uuids.get(rank, ""), "") for rank in range(self._world_size)]
        for one in hellos:
            paths[one["rank"]] = (one["uuid"], one["address"])
        return paths

    def _bucket_size(self, all_ranks: list[dict[str, Any]], may_cut: bool) -> BucketSize:
        return plan.bucket_size(
            min(one["free"] for one in all_ranks),
            plan.largest_tensor(self._current_global_parameter_metas),
            min(one["cap"] for one in all_ranks),
            may_cut,
        )

    def _spare_memory(self) -> int:
        """Bytes that this rank's buffers may take; the cpu device's ranks share their host's."""
        sharers = 1 if self.device_manager.is_accelerator else self._gpu_count
        return int(self.device_manager.free_memory() // sharers * self._mem_fraction)

    def _share_buffer(self, transfer: TransferPlan) -> SharedBuffer:
        if self._p2p_store is not None:
            self._p2p_store.release_finished()  # buffers of earlier updates
        halves = min(2, max(1, len(transfer.steps)))
        return SharedBuffer(self.device_manager, self._local_rank, halves * transfer.bucket_bytes)

    def _make_staging(
        self, transfer: TransferPlan, operation: Operation, remote: bool
    ) -> torch.Tensor | None:
        """Where this rank's next bucket arrives while others' are broadcast.

        It pays where that goes on beside the broadcast: copies to an accelerator, P2P reads.
        """
        overlaps = remote or self.device_manager.is_accelerator
        loads = transfer.loads_of(self._rank)
        if not (transfer.staging and overlaps and len(operation.members) > 1 and loads):
            return None
        nbytes = max(step.bucket.size for step in loads)
        device = self.device_manager.device(self._local_rank)
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def _make_loader(
        self,
        checkpoint_name: str,
        members: list[int] | None,
        streams: Streams,
        stack: ExitStack,
        buffer: SharedBuffer,
        staging: torch.Tensor | None,
        tracer: Tracer,
    ) -> Loader:
        def copy(bucket: H2DBucket, target: torch.Tensor) -> None:
            self._copy_to_buffer(checkpoint_name, bucket, target)

        def lying(bucket: H2DBucket) -> torch.Tensor | None:
            if streams.are_queues:  # nobody reads it there
                return None
            return lying_on_host(self._memory_pool[checkpoint_name], bucket)

        own = HostLoader(copy, lying, streams, tracer)
        if members is None:
            return own
        store = self._require_p2p()
        targets = {"__buffer__": buffer.tensor}
        if staging is not None:
            targets["__staging__"] = staging
        if store.needs_registered_targets:
            store.register_named_tensors(targets)
            stack.callback(store.unregister_named_tensors, list(targets))
        remote = self._remote_loader(tracer, only_queues=members == [self._rank])
        stack.callback(remote.close)
        return MixedLoader(self._own_owner_rank(checkpoint_name), own, remote)

    def _remote_loader(self, tracer: Tracer = UNTRACED, only_queues: bool = False) -> RemoteLoader:
        return RemoteLoader(
            self._require_p2p(),
            self._current_global_parameter_metas,
            self.device_manager,
            self.device_manager.device(self._local_rank),
            tracer,
            only_queues,
        )

    def _require_p2p(self) -> P2PStore:
        if self._p2p_store is None:
            raise RuntimeError(f"this needs P2P: {self._p2p_missing or 'it was switched off'}")
        return self._p2p_store

    def _own_owner_rank(self, checkpoint_name: str) -> int | None:
        """This rank's number among the owners, unless the metas are of another world."""
        return self._rank if self._gathered_name == checkpoint_name else None

    def _report(
        self, checkpoint_name: str, transfer: TransferPlan, phases: dict[str, float], **more: Any
    ) -> UpdateReport:
        memory = self._host_memory.usage
        return UpdateReport(
            checkpoint_name=checkpoint_name,
            rank=self._rank,
            world_size=self._world_size,
            tensors=transfer.tensor_count,
            buckets=len(transfer.steps),
            bucket_bytes=transfer.bucket_bytes,
            bytes=transfer.total_bytes,
            seconds=sum(phases.values()),
            phases=phases,
            checkpoint_memory=memory.in_use,
            retained_memory=memory.retained,
            **more,
        )

    # ------------------------------------------------------------------ parts of the above

    @contextlib.contextmanager
    def _collective(
        self,
        call: str,
        checkpoint_name: str,
        timeout: timedelta,
        members: list[int] | None = None,
    ) -> Iterator[Operation]:
        """One collective call at a time; ends with the same outcome on every rank."""
        if not self._collective_lock.acquire(blocking=False):
            raise BusyError(f"{call} refused: this rank is in a collective call already")
        if self.device_manager.is_accelerator:  # each thread has a current device of its own
            self.device_manager.device_module.set_device(self._local_rank)
        try:
            self._running = checkpoint_name
            with self._control.operation(call, timeout, members) as operation:
                self._operation = operation
                yield operation
        finally:
            self._operation = None
            self._running = ""
            self._collective_lock.release()

    def _check_can_register(self, checkpoint_name: str, use_shared_memory_pool: bool) -> None:
        if checkpoint_name == self.shared_memory_pool_name:
            raise ValueError(f"{checkpoint_name!r} is the name of the shared memory pool itself")
        if checkpoint_name in self._memory_pool:
            raise ValueError(
                f"checkpoint {checkpoint_name!r} is registered already: "
                "unregister_checkpoint() it first"
            )
        if use_shared_memory_pool and self._pool_user is not None:
            raise ValueError(
                f"checkpoint {self._pool_user!r} occupies the shared memory pool: "
                "unregister it first"
            )

    def _pin_in_place(
        self,
        files: list[str],
        taken: Set[str],
        overridden: Set[str],
        before_deleting: Callable[[list[MemoryBuffer]], None],
    ) -> list[MemoryBuffer]:
        """Pin files where they are, but for the tensors that are ``overridden``."""
        clashes = sorted(set(open_files(files, self.allowed_folders)) & taken)
        if clashes:
            raise ValueError(f"tensors {clashes[:3]} are in files of both kinds")

        def wanted(buffers: list[MemoryBuffer]) -> list[MemoryBuffer]:
            return [buffer for buffer in buffers if buffer.metas[0].name not in overridden]

        pinned = self._host_memory.pin_in_place(
            files, self.allowed_folders, lambda pinned: before_deleting(wanted(pinned))
        )
        self._host_memory.release([b for b in pinned if b.metas[0].name in overridden])
        return wanted(pinned)

    def _gather(self, operation: Operation, checkpoint_name: str) -> tuple[list[DataToGather], str]:
        """Every rank's part, and a digest of it all. Layouts that all ranks know are not sent."""
        mine, layout = self._what_i_own(checkpoint_name), self._layout_of(checkpoint_name)
        sent = operation.all_gather(
            "places", encode_place(mine, layout.digest, self._known_layouts.digest)
        )
        places = [decode_place(place) for place in sent]
        missing = self._known_layouts.missing(places)
        blobs = operation.gather_from(missing, "layouts", layout.blob)
        layouts = self._known_layouts.update(places, dict(zip(missing, blobs, strict=True)))
        gathered = [join_place(place, known) for place, known in zip(places, layouts, strict=True)]
        return gathered, hashlib.sha256(b"".join(sent)).hexdigest()

    def _layout_of(self, checkpoint_name: str) -> EncodedLayout:
        if checkpoint_name not in self._encoded_layouts:
            buffers = self._memory_pool.get(checkpoint_name, [])
            self._encoded_layouts[checkpoint_name] = encode_layout(
                [buffer.metas for buffer in buffers if buffer.metas]
            )
        return self._encoded_layouts[checkpoint_name]

    def _what_i_own(self, checkpoint_name: str) -> DataToGather:
        buffers = [b for b in self._memory_pool.get(checkpoint_name, []) if b.metas]
        owned = [
            MemoryBufferMetas(
                metas=b.metas, ptr=b.buffer.data_ptr(), size=b.size, checksums=b.checksums
            )
            for b in buffers
        ]
        lease = self._leases.get(checkpoint_name)
        unreadable = self._p2p_store is None or (owned and lease is None)
        return DataToGather(
            memory_buffer_metas_list=owned,
            p2p_store_addr=None if unreadable else self._require_p2p().addr,
            rdma_device="" if self._rdma_device is None else self._rdma_device,
            host_ip=self._host_ip,
            device_uuid=self._device_uuid,
            lease=lease,
        )

    def _offer(self, checkpoint_name: str, new_memory: bool) -> None:
        """Let other ranks read a checkpoint by P2P. What cannot be offered is still broadcast."""
        if self._p2p_store is None or not self._memory_pool[checkpoint_name]:
            return
        place = self.shared_memory_pool_name
        place = place if checkpoint_name == self._pool_user else checkpoint_name
        buffers = self._memory_pool[place]
        try:
            if new_memory:
                self._p2p_store.register_named_tensors(
                    {f"{place}/{index}": b.buffer for index, b in enumerate(buffers)}
                )
            self._leases[checkpoint_name] = self._p2p_store.grant()
        except RuntimeError as error:
            self._log.warning("{} cannot be read by P2P: {}", checkpoint_name, error)

    def _revoke(self, checkpoint_name: str) -> None:
        lease = self._leases.pop(checkpoint_name, None)
        if lease is not None and self._p2p_store is not None:
            self._p2p_store.revoke(lease)

    def _is_registered_somewhere(
        self, operation: Operation, checkpoint_name: str, gathered: list[DataToGather]
    ) -> bool:
        """A checkpoint that nobody registered is a mistake, unless this world joins another."""
        mine = b"1" if checkpoint_name in self._memory_pool else b""
        if any(operation.all_gather("registered", mine)):
            return True
        advice = "call register_checkpoint() before gather_metas()"
        if not any(one.p2p_store_addr for one in gathered):
            raise ValueError(f"no rank has registered checkpoint {checkpoint_name!r}: {advice}")
        self._log.warning("no rank has registered checkpoint {}: {}", checkpoint_name, advice)
        return False

    def _set_global_metas(self, metas: Mapping[int, MemoryBufferMetaList]) -> None:
        self._planned = None
        owners = {rank: owned for rank, owned in metas.items() if owned.memory_buffer_metas_list}
        self._checksums = None
        self._current_global_parameter_metas = {
            rank: MemoryBufferMetaList.model_construct(
                p2p_store_addr=owned.p2p_store_addr,
                memory_buffer_metas_list=owned.memory_buffer_metas_list,
                rdma_device=owned.rdma_device,
                lease=owned.lease,
            )
            for rank, owned in owners.items()
        }
        self._remote_rdma_devices = _topology(
            {rank: (owned.rdma_device, _host_of(owned)) for rank, owned in owners.items()}
        )

    def _check_gathered(self, checkpoint_name: str, remote: bool) -> None:
        """What was gathered must be of this checkpoint, and still be what is registered here."""
        if remote and self._metas_were_loaded:
            if not self._current_global_parameter_metas:
                raise RuntimeError(
                    "the metas that were loaded name no owner of weights: gather the checkpoint in "
                    "the world that registered it, and load its metas again"
                )
            return  # the leases of the other world tell whether they still hold
        if self._gathered_in_vain == checkpoint_name:
            raise RuntimeError(
                f"no rank has registered {checkpoint_name!r}: call register_checkpoint() and "
                "gather_metas() again on all ranks"
            )
        if self._gathered_name != checkpoint_name:
            raise RuntimeError(
                f"the metas of {checkpoint_name!r} have not been gathered (last: "
                f"{self._gathered_name!r}): call gather_metas({checkpoint_name!r}) on all ranks"
            )
        if self._layout_of(checkpoint_name).digest != self._gathered_layout:
            raise RuntimeError(
                f"checkpoint {checkpoint_name!r} changed on this rank since its metas were "
                "gathered: call gather_metas() again on all ranks"
            )
        metas = self._current_global_parameter_metas
        unreadable = [rank for rank, owned in metas.items() if not owned.p2p_store_addr]
        if remote and unreadable:
            raise RuntimeError(
                f"ranks {unreadable} own parts of {checkpoint_name!r} that cannot be read by P2P: "
                "they run without it, or could not register the memory (see their logs)"
            )

    def _init_default_group(
        self, ranks: list[int], addr: str | None, port: int | None, timeout: timedelta
    ) -> None:
        if distributed.is_initialized():
            self._log.debug("the default process group exists already")
            return
        self._groups_made += 1
        distributed.init_process_group(
            rank=ranks.index(self._rank),
            world_size=len(ranks),
            store=dist.PrefixStore(
                f"default-group/{self._groups_made}", self._group_store(addr, port)
            ),
            backend=self.device_manager.backend,
            timeout=timeout,
        )
        self._made_default_group = True

    def _group_store(self, addr: str | None, port: int | None) -> Any:
        if self._world_size == 1 or (addr is None and port is None):
            return self._control.store()
        addr, port = control.master_addr(addr), control.master_port(port)
        return connect_store(self._rank, self._world_size, addr, port)

    def _await_neighbours(self, operation: Operation, stack: ExitStack) -> Neighbours | None:
        """The other ranks, where they may turn out to be on this host; ``None`` where that would
        be of no use."""
        wanted = Settings.from_env().cpu_transport == SHARED_MEMORY
        if self.device_manager.is_accelerator or len(operation.members) == 1 or not wanted:
            return None
        neighbours = Neighbours(self._rank, operation.members)
        stack.callback(neighbours.close)
        return neighbours

    def _meet(
        self,
        operation: Operation,
        neighbours: Neighbours,
        hellos: list[dict[str, Any]],
        buffer: SharedBuffer,
    ) -> bool:
        """Whether every rank has reached every other one on this host. The same on all ranks that
        await neighbours; where one does not, nobody has."""
        operation.begin("process group")
        addresses = {one["rank"]: one["neighbour"] for one in hellos}
        if not all(addresses.values()):
            return False
        reached = neighbours.reach(addresses, buffer)
        if not all(operation.all_gather("neighbours", b"1" if reached else b"")):
            return False
        neighbours.accept()
        return True

    def _share_memory(
        self,
        operation: Operation,
        neighbours: Neighbours,
        buffer: SharedBuffer,
        streams: Streams,
        stack: ExitStack,
    ) -> WeightsGroup:
        """A group of neighbours that have met."""
        group = SharedMemoryGroup(neighbours, buffer, streams)
        stack.push(lambda exc_type, *_: group.abort() if exc_type else group.close())
        group.expect_end(operation.deadline.remaining())
        return group

    def _join_weights_group(
        self, operation: Operation, members: list[int] | None, stack: ExitStack
    ) -> WeightsGroup | None:
        """The group to broadcast in: the one kept from the last broadcast, or a new one."""
        if len(operation.members) == 1:
            return None
        operation.begin("process group")
        if members is not None:
            group = self._make_group(operation)
            stack.push(lambda exc_type, *_: group.abort() if exc_type else group.close())
        else:
            group = self._weights_group = self._weights_group or self._make_group(operation)
            stack.push(self._leave_weights_group)
        group.expect_end(operation.deadline.remaining())
        return group

    def _make_group(self, operation: Operation) -> TorchGroup:
        with operation.store_to_block() as store:
            return create_weights_group(
                self.device_manager.backend,
                dist.PrefixStore("weights", store),
                list(operation.members),
                self._rank,
                self._control.local_ip(),
                self.device_manager.device(self._local_rank),
                operation.check,
            )

    def _leave_weights_group(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        """After a failure nothing in flight survives; otherwise ``auto_pg`` decides."""
        if self._weights_group is not None and exc_type is not None:
            self._weights_group.abort()
            self._weights_group = None
        elif self._weights_group is not None and not self._keeps_groups():
            self._weights_group.close()
            self._weights_group = None

    def _leave_default_group(self) -> None:
        if self._auto_pg and self._made_default_group:
            distributed.destroy_process_group()
            self._made_default_group = False

    def _keeps_groups(self) -> bool:
        if self._auto_pg is None:
            return distributed.is_initialized()
        return not self._auto_pg

    def _start_p2p(self) -> None:
        """Without P2P everything but ``update(ranks=...)`` works."""
        try:
            device = "" if self.device_manager.device_type == "npu" else self._choose_nic()
            self._p2p_store = P2PStore(self.device_manager, device=device, host=self._host_ip)
            self._rdma_device = self._p2p_store.device or None
            self._host_memory.keep_addresses(_LONGEST_READ)
        except (RuntimeError, AssertionError) as error:
            self._p2p_missing = str(error)
            level = "WARNING" if self._local_rank == 0 else "DEBUG"
            self._log.log(level, "no P2P: {}", error)

    def _choose_nic(self) -> str:
        """This rank's RDMA NIC; empty where the machine has none that can be used."""
        devices = _get_rdma_devices()
        usable, findings = rdma.usable_devices(devices)
        for finding in findings:
            self._log.warning(finding)
        if not usable:
            return ""
        choice = rdma.with_stand_ins(devices, usable, self._gpu_count)
        return _get_my_rdma_device(self._local_rank, self._gpu_count, choice)

    # ------------------------------------------------------------------ what clients reach into

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
        if owner_rank is None or owner_rank == self._own_owner_rank(checkpoint_name):
            copy_from_host(self._memory_pool[checkpoint_name], bucket, buffer)
        else:
            self._remote_loader().read(owner_rank, bucket, buffer)

    def _bind_zmq_socket(self) -> tuple[zmq.Socket[bytes], SocketPaths]:
        """A bound REQ socket for this rank's worker, and all ranks' addresses. All ranks.

        For programs that drive the worker's protocol themselves; the caller closes the socket.
        """
        address = Address().url  # its file goes with this process, not before
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.REQ)
        socket.bind(address)
        with self._collective("_bind_zmq_socket", "", _TEN_MINUTES) as operation:
            mine = json.dumps([self._device_uuid, address]).encode()
            paths = [json.loads(blob) for blob in operation.all_gather("address", mine)]
        return socket, [(uuid, path) for uuid, path in paths]

    def _detect_bucket_size(
        self, ranks_group: Any = None, *, disable_h2d_buffer: bool = False
    ) -> tuple[int, bool]:
        """Bytes of a bucket and whether staging is off, for what was gathered. All ranks."""
        mine = {"free": self._spare_memory(), "cap": Settings.from_env().max_bucket_bytes}
        with self._collective("_detect_bucket_size", "", _TEN_MINUTES) as operation:
            blobs = operation.all_gather("memory", json.dumps(mine).encode())
            size = self._bucket_size([json.loads(blob) for blob in blobs], may_cut=False)
        return size.bytes, disable_h2d_buffer or not size.staging


class _Spent(NamedTuple):
    """A rank's time in an update: by phase, and by the rank that it waited for."""

    phases: dict[str, float]
    waited_for: dict[int, float]

    def encode(self) -> bytes:
        return json.dumps(self).encode()

    @staticmethod
    def decode(blob: bytes) -> _Spent:
        phases, waited_for = json.loads(blob)
        return _Spent(phases, {int(rank): seconds for rank, seconds in waited_for.items()})


class _Planned(NamedTuple):
    """A plan, kept for the next update; ``basis`` is what it was made from."""

    basis: tuple[Any, ...]
    transfer: TransferPlan
    messages: Messages


def _level(leads: bool) -> str:
    """Of what all ranks log alike: that of the first one is enough."""
    return "INFO" if leads else "DEBUG"


def _agreed_version(hellos: list[dict[str, Any]]) -> str:
    """The id of an update; the same on every rank.

    Raises:
        ValueError: the ranks want different things.
    """
    for what in ("version", "on instance failure"):
        given = {one[what] for one in hellos if one[what] is not None}
        if len(given) > 1:
            raise ValueError(f"the ranks gave different values for {what!r}: {sorted(given)}")
    versions = [one["version"] for one in hellos if one["version"] is not None]
    return str(versions[0] if versions else hellos[0]["new version"])


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def check() -> None:
        first()
        second()

    return check


def _give_up(operation: Operation, link: WorkerLink) -> Callable[[Any, Any, Any], None]:
    """An exit callback: on failure, tell the other ranks and this rank's worker before cleaning
    up."""

    def on_exit(exc_type: Any, exc: Any, traceback: Any) -> None:
        if exc is not None:
            operation.publish(exc)
            link.abort(str(exc) or type(exc).__name__)

    return on_exit


def _split_in_place(files: Sequence[str] | None, in_place: bool) -> tuple[list[str], list[str]]:
    """Files to pin where they are, and files to copy."""
    paths = [os.fspath(path) for path in files or ()]
    chosen = [
        path
        for path in paths
        if in_place
        and path.endswith(".safetensors")
        and os.path.realpath(path).startswith("/dev/shm/")
    ]
    return chosen, [path for path in paths if path not in chosen]


def _topology(nics: Mapping[int, Sequence[str]]) -> dict[str, set[int]]:
    """The ranks on each NIC, from every rank's (NIC, host). Without NICs each rank reads for
    itself."""
    topology: dict[str, set[int]] = defaultdict(set)
    for rank, (nic, host) in nics.items():
        topology[f"{nic or f'rank-{rank}'}@{host}"].add(rank)
    return dict(topology)


def _host_of(owned: MemoryBufferMetaList) -> str:
    return (owned.p2p_store_addr or "").rpartition(":")[0]


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


def _ibv_get_device_list() -> list[str]:
    """The RDMA devices of this machine."""
    devices, findings = rdma.list_devices()
    for finding in findings:
        logger.debug(finding)
    return devices


def _get_rdma_devices() -> list[str]:
    """The RDMA devices that P2P may use."""
    devices, findings = rdma.select_devices(os.environ, _ibv_get_device_list())
    for finding in findings:
        logger.warning(finding)
    return devices


def _parse_NCCL_IB_HCA(value: str, available_devices: list[str]) -> list[str]:
    devices, findings = rdma.parse_hca(value, available_devices)
    for finding in findings:
        logger.warning(finding)
    return devices


def _get_my_rdma_device(local_rank: int, gpu_count: int, devices: list[str]) -> str:
    return rdma.device_for_rank(local_rank, gpu_count, devices)


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
