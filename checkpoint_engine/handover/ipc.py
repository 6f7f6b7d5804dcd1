"""One buffer shared between a server rank and its inference worker: exported here, opened there.

On an accelerator it is device memory behind an IPC handle; on the cpu device, shared memory.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loguru import logger

from checkpoint_engine.ground.deadline import Deadline, poll
from checkpoint_engine.ground.devices import SHARED_MEMORY_FOLDER, DeviceManager
from checkpoint_engine.handover.stale_files import create_locked, stale_files

_PREFIX = "checkpoint-engine-"
_CUDA_DEVICE_ARGUMENT = 6  # of rebuild_cuda_tensor: the exporter's device index
_CUDA_REFERENCE = slice(11, 13)  # the file and the place in it of torch's count of readers
_COUNTS_BEGIN = 64  # bytes at the head of such a file, of its own
_CLOSED_WITHIN = 0.25  # seconds for readers to close what they have opened, when an update fails
_CUDA_WAITS = 14  # whether opening waits for an event of the exporter


class SharedBuffer(contextlib.AbstractContextManager["SharedBuffer"]):
    """A uint8 tensor of one update that the worker maps too. The server rank owns and closes it.

    On the cpu device it is a file that this rank holds a lock on: the next server that makes one
    removes an unlocked file, which a killed server left behind.
    """

    def __init__(self, device_manager: DeviceManager, index: int, nbytes: int) -> None:
        """Raises ``RuntimeError`` naming the sizes if the memory cannot be had."""
        self._device_manager = device_manager
        self._file: tuple[Path, int] | None = None
        self._counts: list[np.ndarray] = []
        if device_manager.is_accelerator:
            device = device_manager.device(index)
            self.tensor = torch.empty(nbytes, dtype=torch.uint8, device=device)
            return
        folder, prefix = Path(SHARED_MEMORY_FOLDER), f"{_PREFIX}{os.getuid()}-"
        for path in stale_files(folder, f"{prefix}*"):
            path.unlink(missing_ok=True)
        self._file = create_locked(folder, prefix)
        try:
            os.posix_fallocate(self.descriptor, 0, nbytes)  # now, not as a SIGBUS at a write
            self.tensor = _map(self.descriptor, nbytes)
        except BaseException as error:
            self.unlink()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise RuntimeError(
                    f"{folder} has no room for a buffer of {nbytes} bytes: enlarge it or lower "
                    "PS_MAX_BUCKET_SIZE_GB"
                ) from error
            raise

    def handle(self) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
        """What one process calls, and with what, to get the same memory as a tensor."""
        if self._file is not None:
            return map_shared_memory, (str(self._file[0]), self.tensor.nbytes)
        from torch.multiprocessing.reductions import reduce_tensor

        rebuild, args = reduce_tensor(self.tensor)
        if self.tensor.is_cuda:
            self._counts += readers_of(*args[_CUDA_REFERENCE])
        return rebuild, args

    @property
    def is_named(self) -> bool:
        """Whether others can open it by its name."""
        return self._file is not None

    @property
    def descriptor(self) -> int:
        """Of the shared memory of a cpu device, as long as that has a name."""
        if self._file is None:
            raise RuntimeError("this buffer has no name any more, or never had one")
        return self._file[1]

    def unlink(self) -> None:
        """Remove its name, once the worker has it: nothing is left even if this process is
        killed."""
        if self._file is not None:
            path, fd = self._file
            self._file = None
            path.unlink(missing_ok=True)
            os.close(fd)

    def close(self, have_all_left: bool = False) -> None:
        """Give the memory back; what the worker still maps lives on until it drops it.

        ``have_all_left``: every process that got a handle has said that it maps it no more.
        """
        if self.tensor.nbytes:
            self.unlink()
            if not have_all_left:
                self._await_readers()
            self._forget_readers()
            self.tensor = torch.empty(0, dtype=torch.uint8)
            self._device_manager.release_cached_memory()

    def _await_readers(self) -> None:
        """Give those that still map it a moment to close it."""
        soon = Deadline(_CLOSED_WITHIN)
        with contextlib.suppress(TimeoutError):
            poll(
                lambda: all(count[0] <= 0 for count in self._counts),
                lambda: soon.check("readers of the buffer"),
            )

    def _forget_readers(self) -> None:
        """torch frees device memory once as many processes have closed a handle as were given it:
        not if nobody opened it, nor if one was killed, which never closes. What a process maps
        longer the driver keeps for it."""
        for count in self._counts:
            count[0] = 0  # below, torch would take it for a very high one, and free nothing ever
        self._counts.clear()

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def readers_of(file: bytes, place: int) -> list[np.ndarray]:
    """torch's count of a handle's readers, in memory that it shares with them: 1 until the one
    process that it is for has closed it. Empty if it is not where torch has it today, for then
    nothing may be written there."""
    path = Path(SHARED_MEMORY_FOLDER) / os.fsdecode(file).lstrip("/")
    try:
        with path.open("r+b") as opened:
            mapping = mmap.mmap(opened.fileno(), 0)
        count = np.frombuffer(mapping, np.int64, 1, _COUNTS_BEGIN + 8 * place)
    except (OSError, ValueError) as error:
        logger.debug("no count of readers in {}: {}", path, error)
        return []
    return [count] if count[0] == 1 else []


def _map(fd: int, nbytes: int) -> torch.Tensor:
    """A tensor over the file; the mapping lives as long as the tensor and its views do."""
    mapping = mmap.mmap(fd, nbytes)
    with contextlib.suppress(OSError, AttributeError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)


def map_shared_memory(path: str, nbytes: int) -> torch.Tensor:
    """The worker's view of a cpu server's buffer. Part of the wire: servers send it by name.

    Raises:
        ValueError: ``path`` is no segment of this library, or is shorter than ``nbytes``.
    """
    folder, name = os.path.split(path)
    if folder != SHARED_MEMORY_FOLDER or not name.startswith(_PREFIX):
        raise ValueError(f"{path!r} is not a shared buffer of checkpoint-engine")
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return map_descriptor(fd, nbytes)
    finally:
        os.close(fd)


def map_descriptor(fd: int, nbytes: int) -> torch.Tensor:
    """The memory of a cpu server's buffer. ``fd`` stays the caller's.

    Raises:
        ValueError: it is shorter than ``nbytes``.
    """
    if os.fstat(fd).st_size < nbytes:
        raise ValueError(f"a buffer is shorter than the {nbytes} bytes its server announced")
    return _map(fd, nbytes)


def open_buffer(
    rebuild: Callable[..., torch.Tensor],
    args: tuple[Any, ...],
    device_id: int | None,
    of_peer: bool = False,
) -> torch.Tensor:
    """Open the server's buffer in this worker, on its own device number ``device_id``.

    The exporter counts devices as its own process sees them, so its index is replaced; ``None``:
    by the current device of this process.

    Args:
        of_peer: whether it may be memory of another device. Number ``device_id`` reads it over
            NVLink or PCIe; the other device need not be visible to this process.
    """
    arguments = list(args)
    if rebuild is not map_shared_memory:
        manager = DeviceManager()
        if device_id is None and manager.is_accelerator:
            device_id = manager.device_module.current_device()
        if device_id is not None:
            arguments[_CUDA_DEVICE_ARGUMENT] = device_id
        if of_peer:  # whose events this device cannot open; what is in there is told later
            arguments[_CUDA_WAITS] = False
    buffer = rebuild(*arguments)
    if buffer.dtype != torch.uint8 or buffer.dim() != 1:
        raise ValueError(f"expected a flat uint8 buffer, got {buffer.dtype} {tuple(buffer.shape)}")
    return buffer
