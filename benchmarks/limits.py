"""What this machine can do at best: the rates that a benchmark's figures are compared with."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import torch

GB = 1e9


def best_rate(nbytes: int, action, repeats: int = 5) -> float:
    """GB/s of the fastest of several calls, after one that warms up."""
    action()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return nbytes / GB / min(seconds)


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
    threads = os.cpu_count() or 1
    source = torch.full((nbytes,), 7, dtype=torch.uint8)
    target = torch.zeros(nbytes, dtype=torch.uint8)
    pieces = list(zip(target.chunk(threads * 4), source.chunk(threads * 4), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        return best_rate(
            nbytes, lambda: list(pool.map(lambda pair: pair[0].copy_(pair[1]), pieces))
        )


def measure(nbytes: int = 2 << 30) -> dict[str, float]:
    """All of them, in GB/s."""
    return {"host_to_device": host_to_device(nbytes), "host_memcpy": host_memcpy(nbytes)}


if __name__ == "__main__":
    for name, rate in measure().items():
        print(f"{name:16} {rate:7.2f} GB/s")
