"""What this machine can do at best: the rates that a benchmark's figures are compared with."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

GB = 1e9
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23


def best_rate(nbytes: int, action: Callable[[], Any], repeats: int = 5) -> float:
    """GB/s of the fastest of several calls, after one that warms up."""
    action()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return nbytes / GB / min(seconds)


def together(*rates: float) -> float:
    """GB/s of steps that the same bytes take one after the other."""
    return 1 / sum(1 / rate for rate in rates)


def host_to_device(nbytes: int = 2 << 30) -> float:
    """Pinned host memory to the device in one copy; on the cpu device, plain memory to plain."""
    cuda = torch.cuda.is_available()
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=cuda).fill_(7)
    target = torch.empty(nbytes, dtype=torch.uint8, device="cuda" if cuda else "cpu")

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        if cuda:
            torch.cuda.synchronize()

    return best_rate(nbytes, copy)


def host_memcpy(nbytes: int = 2 << 30) -> float:
    """Host to host with one thread per core."""
    source = torch.full((nbytes,), 7, dtype=torch.uint8)
    target = torch.zeros(nbytes, dtype=torch.uint8)
    pieces = list(zip(target.chunk(_threads() * 4), source.chunk(_threads() * 4), strict=True))
    with ThreadPoolExecutor(_threads()) as pool:
        return best_rate(
            nbytes, lambda: list(pool.map(lambda pair: pair[0].copy_(pair[1]), pieces))
        )


def new_host_memory(nbytes: int = 2 << 30) -> float:
    """Huge pages brought into being by several threads and, with CUDA, registered."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    size = nbytes // 64

    def make() -> None:
        memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block = (ctypes.c_ubyte * nbytes).from_buffer(memory)
        address = ctypes.addressof(block)
        libc.madvise(address, nbytes, _MADV_HUGEPAGE)
        with ThreadPoolExecutor(min(8, _threads())) as pool:
            starts = range(address, address + nbytes, size)
            list(pool.map(lambda start: libc.madvise(start, size, _MADV_POPULATE_WRITE), starts))
        if torch.cuda.is_available():
            torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)
            torch.cuda.cudart().cudaHostUnregister(address)

    return best_rate(nbytes, make, repeats=3)


def page_cache(nbytes: int = 2 << 30) -> float:
    """A file in the page cache into host memory, by several threads."""
    target = torch.zeros(nbytes, dtype=torch.uint8).numpy().data
    piece = 16 << 20
    with tempfile.TemporaryFile() as file, ThreadPoolExecutor(_threads()) as pool:
        file.write(target)
        file.flush()

        def read(at: int) -> None:
            os.preadv(file.fileno(), [target[at : at + piece]], at)

        return best_rate(nbytes, lambda: list(pool.map(read, range(0, nbytes, piece))))


def broadcast(nbytes: int = 1 << 30) -> float:
    """A bare broadcast from rank 0 in the default process group. Called by all ranks."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.ones(nbytes, dtype=torch.uint8, device=device)

    def send() -> None:
        dist.broadcast(tensor, 0)
        if device == "cuda":
            torch.cuda.synchronize()
        dist.barrier()

    return best_rate(nbytes, send, repeats=3)


def one_copy(nbytes: int = 1 << 30) -> float:
    """One thread, memory to memory."""
    source, target = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return best_rate(nbytes, lambda: target.copy_(source), repeats=3)
    finally:
        torch.set_num_threads(threads)


def _threads() -> int:
    return min(16, len(os.sched_getaffinity(0)))


def measure(nbytes: int = 2 << 30) -> dict[str, float]:
    """What one process reaches, in GB/s."""
    return {
        "host_to_device": host_to_device(nbytes),
        "host_memcpy": host_memcpy(nbytes),
        "new_host_memory": new_host_memory(nbytes),
        "page_cache": page_cache(nbytes),
    }


if __name__ == "__main__":
    for name, rate in measure().items():
        print(f"{name:16} {rate:7.2f} GB/s")
