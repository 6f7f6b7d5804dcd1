"""Blocks of host memory: mapping, pinning, freeing.

An arena is one anonymous mapping of huge pages. Threads fill it straight from files and tensors,
bringing its pages into being as they go; then it is registered with CUDA in one piece. That costs
a fraction of ``torch.empty(pin_memory=True)``. On the cpu device the memory stays unregistered.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import numpy as np
import torch
from loguru import logger

from checkpoint_engine.data_types import align_up
from checkpoint_engine.ground.limits import describe_limits
from checkpoint_engine.memory.folder import Inode, reopen

_HUGE_PAGE = 2 << 20
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_MADV_POPULATE_WRITE = 23
_MAP_FAILED = ctypes.c_void_p(-1).value
_lingering: deque[tuple[float, int, int]] = deque()
"""Address ranges to unmap: from when on, address, bytes."""

_address, _size, _int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _address
_libc.mmap.argtypes = (_address, _size, _int, _int, _int, ctypes.c_long)
_libc.munmap.argtypes = (_address, _size)
_libc.madvise.argtypes = (_address, _size, _int)


@dataclass(eq=False)
class Arena:
    """One block of memory. Freed by ``free``, or when neither it nor a view of it is left."""

    memory: torch.Tensor
    device_type: str
    undo: ExitStack
    free: Callable[[], object]
    reusable: bool = True
    fresh: bool = True
    """Its pages have not been populated yet."""
    pinned: bool = False
    lent: int = 0
    """Buffers that are lent out of it."""

    @property
    def nbytes(self) -> int:
        return self.memory.numel()

    def pin(self) -> None:
        """On cuda, registers the memory, which must not be freed while a copy from it runs."""
        if self.device_type == "cuda" and not self.pinned:
            address = self.memory.data_ptr()
            # A fork would copy pinned pages on the spot.
            _libc.madvise(address, self.nbytes, mmap.MADV_DONTFORK)
            _cuda_register(address, self.nbytes)
            self.undo.callback(_cuda_unregister, address)
            self.pinned = True


class _Block:
    """Memory at an address, as NumPy takes it. To ctypes every size is a type, which stays in
    memory until the collector runs, and in programs that have it off for good."""

    def __init__(self, address: int, nbytes: int) -> None:
        data = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}
        self.__array_interface__ = data


class Arenas:
    """Makes the arenas of a device type: "cuda", "npu" or "cpu".

    ``keep_seconds``: how long the addresses of freed arenas stay readable.
    """

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self.keep_seconds = 0.0

    def new(self, nbytes: int) -> Arena:
        if self._device_type == "npu":  # CANN pins only memory of its own
            memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            undo = ExitStack()
            return Arena(memory, "npu", undo, undo.close, fresh=False, pinned=True)
        nbytes = align_up(nbytes, mmap.PAGESIZE)
        slack = _HUGE_PAGE if nbytes >= _HUGE_PAGE else 0
        start = _map(nbytes + slack, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = align_up(start, _HUGE_PAGE) if slack else start
        _unmap(start, address - start)
        _unmap(address + nbytes, start + slack - address)
        _libc.madvise(address, nbytes, mmap.MADV_HUGEPAGE)  # only an advice: may be refused
        return self._at(address, nbytes)

    def of_file(self, path: str, inode: Inode | None) -> Arena:
        """The file's own pages."""
        try:
            fd = reopen(path, inode, os.O_RDWR)
        except OSError as error:
            raise RuntimeError(f"{path} cannot be pinned in place: {error}") from error
        try:
            nbytes = align_up(os.fstat(fd).st_size, mmap.PAGESIZE)
            return self._at(_map(nbytes, mmap.MAP_SHARED, fd), nbytes, reusable=False)
        finally:
            os.close(fd)

    def _at(self, address: int, nbytes: int, reusable: bool = True) -> Arena:
        undo = ExitStack()
        undo.callback(self._free_pages, address, nbytes)
        block = _Block(address, nbytes)
        free = weakref.finalize(block, undo.close)  # every view of the memory keeps the block alive
        free.atexit = False
        memory = torch.from_numpy(np.asarray(block))
        return Arena(memory, self._device_type, undo, free, reusable)

    def _free_pages(self, address: int, nbytes: int) -> None:
        """Frees the memory at once, and its addresses once nobody can be reading there any more.

        A transfer engine may be sending from this memory to a reader on another host, and would
        take this process along if the addresses were gone. Until then they hold an empty page.
        """
        now = time.monotonic()
        while _lingering and _lingering[0][0] < now:
            _unmap(*_lingering.popleft()[1:])
        if nbytes == 0 or self.keep_seconds == 0:
            return _unmap(address, nbytes)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
        _libc.mmap(address, nbytes, mmap.PROT_READ, flags, -1, 0)
        _lingering.append((now + self.keep_seconds, address, nbytes))


def populate(address: int, nbytes: int) -> None:
    """Brings the pages of a range into being. Kernels that cannot do it do so on first use.

    Raises:
        MemoryError: there is no memory for them.
    """
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    length = align_up(address + nbytes - start, mmap.PAGESIZE)
    if _libc.madvise(start, length, _MADV_POPULATE_WRITE) and ctypes.get_errno() != errno.EINVAL:
        raise _memory_error(f"populate {nbytes}")


def _map(nbytes: int, flags: int, fd: int = -1) -> int:
    address = _libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    if address == _MAP_FAILED:
        raise _memory_error(f"map {nbytes}")
    return int(address)


def _memory_error(failed: str) -> MemoryError:
    why = os.strerror(ctypes.get_errno())
    return MemoryError(f"cannot {failed} bytes of host memory: {why}; {describe_limits()}")


def _unmap(address: int, nbytes: int) -> None:
    if nbytes > 0:
        _libc.munmap(address, nbytes)


def _cuda_register(address: int, nbytes: int) -> None:
    cudart = torch.cuda.cudart()
    code = cudart.cudaHostRegister(address, nbytes, 0)
    if int(code) != 0:
        _clear_cuda_error()
        raise RuntimeError(
            f"cudaHostRegister of {nbytes} bytes failed with error {int(code)} "
            f"({cudart.cudaGetErrorString(code)}); {describe_limits()}"
        )


def _cuda_unregister(address: int) -> None:
    code = int(torch.cuda.cudart().cudaHostUnregister(address))
    if code != 0:
        _clear_cuda_error()
        logger.warning("cudaHostUnregister failed with error {}", code)


def _clear_cuda_error() -> None:
    """CUDA reports an error once more, to the next kernel launch: let that be this one."""
    with suppress(Exception):
        torch.zeros(1, device="cuda")
