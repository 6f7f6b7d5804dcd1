"""What the update tests run in every rank: an inference worker, tensors to send, faults to
inject."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import zmq

from checkpoint_engine.device_utils import DeviceManager
from checkpoint_engine.loading.version import WeightVersion
from checkpoint_engine.worker import update_weights_from_ipc

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.complex64,
]


MOONCAKE_PORTS = range(15_000, 17_001)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator):
    """Any bit pattern but for bool, which only has two."""
    count = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    if dtype is torch.bool:
        data &= 1
    return data.view(dtype).view(shape)


def mixed_tensors(seed: int, owner: int, largest: int = 3 << 20) -> dict[str, torch.Tensor]:
    """A rank's part: every dtype, scalars, empty tensors, tiny and larger than any small bucket."""
    generator = torch.Generator().manual_seed(1000 * seed + owner)
    shapes = [(), (0,), (3, 0, 2), (1,), (7,), (33, 5), (128, 257), (2, 3, 4, 5)]
    tensors = {
        f"layers.{i}.{str(dtype).removeprefix('torch.')}.{j}.{owner}": random_tensor(
            dtype, shapes[(i + j) % len(shapes)], generator
        )
        for i, dtype in enumerate(DTYPES)
        for j in range(3)
    }
    tensors[f"large.{owner}"] = random_tensor(torch.bfloat16, (largest // 2,), generator)
    tensors[f"strided.{owner}"] = random_tensor(torch.float32, (64, 48), generator).t()
    return tensors


def digest(tensor: torch.Tensor) -> str:
    """Of dtype, shape and every bit."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + flat).hexdigest()


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in tensors.items()}


def left_segments() -> list[str]:
    """Shared memory with a name that nobody holds any more, or that this process maps.

    Whoever uses a segment holds a lock on it. Those of tests that run beside this one go soon.
    """
    ends = time.monotonic() + 2
    while (left := _abandoned_segments()) and time.monotonic() < ends:
        time.sleep(0.02)
    maps = Path("/proc/self/maps").read_text().splitlines()
    mine = [line for line in maps if "/dev/shm/checkpoint-engine-" in line]
    return left + [line for line in mine if not line.endswith("(deleted)")]


def _abandoned_segments() -> list[str]:
    abandoned = []
    for path in Path("/dev/shm").glob(f"checkpoint-engine-{os.getuid()}-*"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as segment:
            fcntl.flock(segment, fcntl.LOCK_SH | fcntl.LOCK_NB)
            abandoned.append(str(path))
    return abandoned


def sockets_of_mooncake() -> set[str]:
    """What its connections are called in ``/proc/self/fd``. It keeps them, also to dead peers."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            ports = [int(address.rpartition(":")[2], 16) for address in fields[1:3]]
            if any(port in MOONCAKE_PORTS for port in ports):
                found.add(f"socket:[{fields[9]}]")
    return found


class Worker:
    """An inference worker: a process of its own that loads by copying every tensor."""

    def __init__(self, device_index: int) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")  # before the parent has a thread or a GPU
        self._process = context.Process(target=_serve, args=(theirs, device_index), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        return int(self._process.pid or 0)

    def call(self, method: str, *args: object) -> object:
        self._pipe.send((method, args))
        try:
            succeeded, result = self._pipe.recv()
        except EOFError:
            raise RuntimeError("the worker process died") from None
        if not succeeded:
            raise RuntimeError(f"the engine answered: {result}")
        return result

    def stop(self) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.join(10)


class _Engine:
    def __init__(self, device_index: int) -> None:
        self._device_index = device_index
        self._weights: dict[str, torch.Tensor] = {}
        self._buckets = 0
        self.post_hooks = 0
        self._version = WeightVersion()

    def update(self, address: str, fault: str = "") -> None:
        """``fault``: ``bucket:N`` and ``hook`` raise there, ``die:N`` kills the process, and
        ``meet:N:FOLDER:NUMBER`` has another world change something there.

        ``bucket:last`` is the last one of the update before.
        """
        fault = fault.replace("last", str(self._buckets))
        self._buckets = 0
        device = DeviceManager()
        with zmq.Context() as context:
            update_weights_from_ipc(
                context,
                address,
                self._device_index if device.is_accelerator else None,
                run=lambda weights: self._load(weights, fault),
                post_hook=lambda: self._post_hook(fault),
                version=self._version,
            )

    def version(self) -> dict[str, str | None]:
        return self._version.describe()

    def digests(self) -> dict[str, str]:
        return digests(self._weights)

    def forget(self) -> None:
        self._weights.clear()

    def buckets(self) -> int:
        return self._buckets

    def hooks(self) -> int:
        return self.post_hooks

    def _load(self, weights: list[tuple[str, torch.Tensor]], fault: str) -> None:
        self._buckets += 1
        if fault == f"bucket:{self._buckets}":
            raise ValueError(f"no parameter for bucket {self._buckets}")
        if fault == f"die:{self._buckets}":
            os._exit(1)
        if fault.startswith(f"meet:{self._buckets}:"):
            _meet(*fault.split(":")[2:])
        for name, tensor in weights:
            self._weights[name] = tensor.clone()

    def _post_hook(self, fault: str) -> None:
        if fault == "hook":
            raise ValueError("cannot repack the weights")
        self.post_hooks += 1


def _serve(pipe: Connection, device_index: int) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: do not outlive the rank
    torch.set_num_threads(1)
    engine = _Engine(device_index)
    while True:
        try:
            method, args = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            pipe.send((True, getattr(engine, method)(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _meet(folder: str, number: str) -> None:
    """Ask for a change, and wait until it has been made."""
    Path(folder, f"want-{number}").touch()
    ends = time.monotonic() + 40
    while not Path(folder, f"done-{number}").exists():
        if time.monotonic() > ends:
            raise TimeoutError("nothing has changed")
        time.sleep(0.01)


def request_of(
    worker: Worker, rank: int, fault: str = ""
) -> Callable[[list[tuple[str, str]]], None]:
    """A ``req_func`` that has this rank's worker receive."""
    return lambda socket_paths: worker.call("update", socket_paths[rank][1], fault)
