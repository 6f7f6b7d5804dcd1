"""What a server rank and a worker do when they are told to. Each is a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import zmq
from loguru import logger
from odd_engines import OddEngine
from steps import Fault, armed, fill_shared_memory

from checkpoint_engine.client import vllm_request
from checkpoint_engine.loading.version import WeightVersion
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.worker import update_weights_from_ipc
from fleet import digests, sockets_of_mooncake

RANKS = 3
TENSORS = 12
BUCKETS_PER_RANK = 6
BUCKET_BYTES = 1 << 19
NAME = "good"


def part_of(rank: int, seed: int, tensors: int = TENSORS) -> dict[str, torch.Tensor]:
    """A rank's tensors: two of them fill a bucket."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return {
        f"layers.{i}.rank.{rank}": torch.randint(
            0, 2**16, (BUCKET_BYTES // 4,), dtype=torch.int32, generator=generator
        ).to(torch.int16)
        for i in range(tensors)
    }


def prepare(folder: Path) -> None:
    """Common to all processes."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: do not outlive the fleet
    torch.set_num_threads(1)
    logger.remove()
    os.environ["PS_IPC_DIR"] = str(folder / "sockets")
    os.environ["PS_DEVICE"] = "cpu"
    os.environ["PS_CHECKSUM"] = "on"
    os.environ["PS_MAX_BUCKET_SIZE_GB"] = str(BUCKET_BYTES / 2**30)
    os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"


# ---------------------------------------------------------------------- worker


class Engine:
    """An inference worker: copies what it gets, and answers one question at a time."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._note = folder / "fault"
        self._rank = rank
        self._weights: dict[str, torch.Tensor] = {}
        self._odd: OddEngine | None = None
        self._version = WeightVersion()

    def update(self, address: str, fault: Fault | None, corruption: str, odd: str) -> None:
        mine = fault if fault is not None and fault.of_worker and fault.rank == self._rank else None
        extra = corrupting(corruption) if corruption else None
        with armed(mine, self._note, extra), zmq.Context() as context:
            update_weights_from_ipc(
                context,
                address,
                None,
                run=self._loader(odd),
                post_hook=lambda: None,
                version=self._version,
            )
        if self._odd is not None:
            self._weights = self._odd.tensors()

    def _loader(self, odd: str) -> Any:
        if not odd:
            return self._load
        if self._odd is None:
            self._odd = OddEngine(odd, self._note, RANKS, TENSORS, BUCKET_BYTES // 4)
        return self._odd.loader()

    def wake(self) -> None:
        assert self._odd is not None
        self._odd.wake()

    def _load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self._weights[name] = tensor.clone()

    def forget(self) -> None:
        self._weights = {}
        self._odd = None

    def digests(self) -> dict[str, str]:
        return digests(self._weights)

    def version(self) -> dict[str, str | None]:
        return self._version.describe()

    def resources(self) -> dict[str, Any]:
        return resources_of_process()


def corrupting(how: str) -> Callable[..., None]:
    """Spoils the bucket that the worker is about to load, in the shared buffer itself."""

    def spoil(expected: Any, buffer: torch.Tensor, *_: object) -> None:
        spoil_bytes(buffer, expected[0], how)

    return spoil


def spoil_bytes(memory: torch.Tensor, start: int, how: str) -> None:
    """``bit``: one bit; ``zero``: a block; ``swap``: two neighbouring blocks; ``double``: one block
    over the next."""
    first, second = (memory[start + i * 256 : start + (i + 1) * 256] for i in (3, 4))
    if how == "bit":
        first[100] ^= 4
    elif how == "zero":
        first.zero_()
    elif how == "double":
        second.copy_(first)
    else:
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)


def run_worker(folder: str, rank: int) -> None:
    here = Path(folder)
    prepare(here)
    gc.disable()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    engine = Engine(here, rank)
    path = str(here / f"engine-{rank}")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    with Listener(path, "AF_UNIX") as listener:
        while True:
            try:
                with listener.accept() as caller:
                    answer(caller, engine)
            except (OSError, EOFError):  # who asked did not wait for the answer
                continue


def answer(caller: Connection, engine: Engine) -> None:
    method, args = caller.recv()
    try:
        result = (True, getattr(engine, method)(*args))
    except BaseException:
        result = (False, traceback.format_exc())
    caller.send(result)


def ask_worker(folder: Path, rank: int, method: str, *args: object) -> Any:
    with Client(str(folder / f"engine-{rank}"), "AF_UNIX") as caller:
        caller.send((method, args))
        try:
            succeeded, result = caller.recv()
        except (EOFError, ConnectionResetError):
            raise RuntimeError("the engine hung up") from None
    if not succeeded:
        raise RuntimeError(f"the engine answered: {result}")
    return result


# ---------------------------------------------------------------------- server rank


_FREE_DESCRIPTORS = 1  # for a rank that is out of them


class ServerRank:
    """A server rank, told what to do by the test."""

    def __init__(self, folder: Path, rank: int, size: int, port: int) -> None:
        self._folder = folder
        self._rank = rank
        self._size = size
        self._taken: list[int] = []
        self.ps = ParameterServer(
            rank=rank, world_size=size, master_addr="127.0.0.1", master_port=port
        )

    # what is called, one at a time

    def register(self, seed: int, name: str = NAME, tensors: int = TENSORS, **options: Any) -> None:
        part = part_of(self._rank, seed, tensors)
        self.ps.register_checkpoint(name, named_tensors=part, **options)

    def register_files(self, files: list[str], name: str) -> None:
        self.ps.register_checkpoint(name, files=files)

    def register_large(self, nbytes: int) -> None:
        """More than this rank has memory for; the tensor itself takes a byte."""
        tensor = torch.zeros(1, dtype=torch.uint8).expand(nbytes)
        self.ps.register_checkpoint(NAME, named_tensors={"large": tensor})

    def replace(self, seed: int) -> None:
        """The checkpoint changes, and nobody is told."""
        self.ps.unregister_checkpoint(NAME)
        self.ps.register_checkpoint(
            NAME, named_tensors={"other": part_of(0, seed)["layers.0.rank.0"]}
        )

    def unregister(self, name: str = NAME, force: bool = False) -> None:
        self.ps.unregister_checkpoint(name, force)

    def gather(self, name: str = NAME, timeout: float = 20.0) -> None:
        self.ps.gather_metas(name, timeout=timedelta(seconds=timeout))

    def register_and_gather(self, seed: int, timeout: float = 20.0) -> None:
        self.register(seed)
        self.gather(timeout=timeout)

    def barrier(self, timeout: float = 20.0) -> None:
        self.ps.store_based_barrier(timedelta(seconds=timeout))

    def update(
        self,
        timeout: float = 20.0,
        version: str | None = None,
        worker_fault: Fault | None = None,
        ranks: list[int] | None = None,
        request: str = "",
        corruption: str = "",
        odd: str = "",
        continue_: bool = False,
        meanwhile: tuple[str, tuple[Any, ...]] | None = None,
        name: str = NAME,
    ) -> dict[str, Any]:
        """An update. ``request``: how this rank's ``req_func`` behaves; ``odd``: what kind of odd
        engine loads; ``meanwhile``: a call that another thread of this rank makes while the update
        runs."""
        errors: list[str] = []

        def ask(paths: list[tuple[str, str]]) -> None:
            if meanwhile is not None:
                errors.append(self._error_of(*meanwhile))
            if request and self._misbehave(request, timeout, paths):
                return
            address = paths[self._rank][1]
            ask_worker(self._folder, self._rank, "update", address, worker_fault, corruption, odd)
            if request == "raises at the end":
                raise ConnectionError("the engine answered nonsense")

        report = self.ps.update(
            name,
            ask,
            ranks=ranks,
            timeout=timedelta(seconds=timeout),
            version=version,
            on_instance_failure="continue" if continue_ else "abort",
        )
        return {**report.model_dump(), "meanwhile": "".join(errors)}

    def _misbehave(self, request: str, timeout: float, paths: list[tuple[str, str]]) -> bool:
        """Whether the request ends here."""
        (self._folder / "fault").write_text(str(time.monotonic()))
        if request == "raises":
            raise ConnectionError("no such engine")
        if request == "hangs":
            time.sleep(timeout + 3.0)
        if request == "http":
            url = (self._folder / "url").read_text()
            vllm_request(url, rank=self._rank, timeout=timeout)(paths)
        return request != "raises at the end"

    def _error_of(self, method: str, args: tuple[Any, ...]) -> str:
        try:
            getattr(self, method)(*args)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def spoil(self, how: str, name: str = NAME) -> None:
        """Change the registered host memory behind the server's back."""
        (self._folder / "fault").write_text(str(time.monotonic()))
        spoil_bytes(self.ps._memory_pool[name][0].buffer, 1 << 18, how)

    def gone(self) -> list[int]:
        world = self.ps._control._world
        return [] if world is None else sorted(world.liveness.gone)

    def limit(self, what: str, value: int) -> None:
        """Lower a resource limit of this process; 0: what it was."""
        kind = getattr(resource, what)
        hard = resource.getrlimit(kind)[1]
        used = used_of(what)
        resource.setrlimit(kind, (hard if value == 0 else used + value, hard))
        if what == "RLIMIT_NOFILE":
            self._take_descriptors(leave=_FREE_DESCRIPTORS if value else None)

    def _take_descriptors(self, leave: int | None) -> None:
        """All that are free, also between those in use, but ``leave``; ``None``: give all back."""
        while self._taken:
            os.close(self._taken.pop())
        with contextlib.suppress(OSError):
            while leave is not None:
                self._taken.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(min(leave or 0, len(self._taken))):
            os.close(self._taken.pop())

    def scarce(self, fraction: float) -> None:
        """Let this rank have little device memory to spare."""
        server = self.ps._server
        self.ps._server = replace(server, here=replace(server.here, mem_fraction=fraction))

    def pretend_device(self, device: str) -> None:
        """Let this rank say that it is on another device; empty: on its own."""
        server, own = self.ps._server, self.ps._device_uuid
        self.ps._server = replace(server, here=replace(server.here, device_uuid=device or own))

    def fill_shared_memory(self, leave: int) -> None:
        fill_shared_memory(leave)

    def empty_shared_memory(self) -> None:
        os.unlink("/dev/shm/filler")

    def clear(self) -> None:
        """Unregister everything, so that what a call left behind is seen."""
        for name in [*self.ps._memory_pool]:
            if name != self.ps.shared_memory_pool_name:
                self.ps.unregister_checkpoint(name, force=True)

    def resources(self) -> dict[str, Any]:
        """Everything that a call must give back."""
        ps = self.ps
        store = ps._p2p_store
        return {
            **resources_of_process(),
            "registered": sorted(ps._memory_pool),
            "host memory": tuple(ps._checkpoints.memory.usage),
            "P2P": [] if store is None else sorted(store._registered),
            "P2P reads": 0 if store is None else len(store._unfinished),
            "leases": sorted(one.name for one in ps._checkpoints.all() if one.lease),
            "weights group": ps._server.ways[-1]._group is None,
            "process group": dist.is_initialized(),
            "running": ps._control.running is None,
            "in use": [one.name for one in ps._checkpoints.all() if one.uses],
        }


def used_of(what: str) -> int:
    if what == "RLIMIT_NOFILE":
        return max(map(int, os.listdir("/proc/self/fd")))
    if what == "RLIMIT_AS":
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return 0


def resources_of_process() -> dict[str, Any]:
    """Descriptors by kind, threads, mappings and files that others could find."""
    kinds: Counter[str] = Counter()
    targets: list[str] = []
    mooncakes = sockets_of_mooncake()  # before and after: a connection may come or go meanwhile
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            targets.append(os.readlink(f"/proc/self/fd/{fd}"))
    mooncakes |= sockets_of_mooncake()
    for target in targets:
        kinds["P2P" if target in mooncakes else target.split(":")[0]] += 1
    maps = Path("/proc/self/maps").read_text()
    return {
        "descriptors": dict(kinds),
        "threads": len(os.listdir("/proc/self/task")),
        "python threads": sorted(t.name for t in threading.enumerate()),
        "mappings": maps.count("/dev/shm/"),
        "sockets": sorted(os.listdir(os.environ["PS_IPC_DIR"])),
        "shared memory": sorted(os.listdir("/dev/shm")),
    }


def run_server(pipe: Connection, folder: str, rank: int, size: int, port: int) -> None:
    """Does what the pipe says, until it closes. An answer: (kind, value, when)."""
    here = Path(folder)
    prepare(here)
    gc.disable()  # what a call holds must not wait for the next collection
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    os.environ["LOCAL_WORLD_SIZE"] = str(size)  # each rank has a device of its own
    server = ServerRank(here, rank, size, port)
    pipe.send(("ready", None, time.monotonic()))
    while True:
        try:
            method, options, fault = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            mine = fault if fault is not None and fault.rank == rank else None
            with armed(None if mine is None or mine.of_worker else mine, here / "fault"):
                answer_ = ("result", getattr(server, method)(**options))
        except BaseException as error:
            answer_ = ("error", (type(error).__name__, str(error), engines_of(error)))
            del error
        pipe.send((*answer_, time.monotonic()))


def engines_of(error: BaseException) -> dict[int, str]:
    return dict(getattr(error, "engines", {}))
