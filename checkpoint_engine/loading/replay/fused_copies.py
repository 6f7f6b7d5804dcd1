"""Many small copies out of one memory into many others in one launch, on NVIDIA's GPUs.

Copies at equal distances have been merged before. What is left is irregular, as experts in the
order of their names' letters, and launches of its own would cost more than the bytes. Strided ones
are faster here as well: torch reads a peer's memory at two thirds of its rate where rows are short.

NVRTC, which needs no compiler of the machine's, compiles the kernel in about 0.1 s, and lets other
Python threads run meanwhile. It is reached by cuda-bindings, on which torch depends from 2.10 on.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from loguru import logger

from checkpoint_engine.loading.replay.digests import digests
from checkpoint_engine.loading.replay.geometry import Copy, Dims

FEWEST_COPIES = 32
"""Below, a launch for each copy of bytes in a row costs less than a table."""

_DIMS = 4  # of a copy at most: each but the first takes a division for every element
_THREADS = 256  # of a block
_AT_ONCE = 4  # elements that a thread reads before it writes: so many reads are on their way
_BLOCK = _THREADS * _AT_ONCE * 4  # elements that a block moves
_MOST = 1 << 30  # elements of a copy: they are counted in 32 bits
_PATIENCE = 10.0  # seconds for the compiler

SOURCE = """
extern "C" __global__ void copy_blocks(
    const UNIT* source, const long long* targets, const long long* copies, const int* blocks
) {
  const int* block = blocks + 2 * blockIdx.x;
  const long long* copy = copies + (5 + 3 * DIMS) * block[0];
  const UNIT* from = source + copy[1];
  UNIT* to = reinterpret_cast<UNIT*>(targets[copy[0]]) + copy[2];
  const unsigned numel = copy[3], last = copy[4] - 1;
  const long long *sizes = copy + 5, *from_strides = sizes + DIMS, *to_strides = sizes + 2 * DIMS;
  const unsigned begin = block[1] + threadIdx.x;
#pragma unroll 1
  for (unsigned first = begin; first < begin + BLOCK; first += THREADS * AT_ONCE) {
    UNIT read[AT_ONCE];
    long long place[AT_ONCE];
#pragma unroll
    for (int one = 0; one < AT_ONCE; ++one) {
      const unsigned element = first + one * THREADS;
      unsigned rest = element;
      long long at = 0;
      place[one] = 0;
#pragma unroll 1
      for (unsigned dim = 0; dim < last; ++dim) {
        const unsigned size = sizes[dim], index = rest % size;
        rest /= size;
        at += index * from_strides[dim];
        place[one] += index * to_strides[dim];
      }
      place[one] += rest * to_strides[last];
      if (element < numel) read[one] = from[at + rest * from_strides[last]];
    }
#pragma unroll
    for (int one = 0; one < AT_ONCE; ++one)
      if (first + one * THREADS < numel) to[place[one]] = read[one];
  }
}
"""
"""The kernel, for units of any size. ``targets``: addresses; ``copies``, ``blocks``: a table's.
Loops over dimensions are not unrolled, as that makes them ten times slower to compile."""

_UNITS = {1: "unsigned char", 2: "unsigned short", 4: "unsigned int", 8: "unsigned long long"}


class Table(NamedTuple):
    """Copies as the kernel reads them, on the device.

    ``copies``: the number of the target, the first element of source and target, how many there
    are, how many dimensions have to be told apart, then sizes, source strides and target strides,
    the last dimension first. ``blocks``: of each block of threads, the copy and the first element
    that it moves.
    """

    copies: torch.Tensor
    blocks: torch.Tensor


def fits(copies: Sequence[Copy], unit: torch.dtype, device: torch.device) -> bool:
    """Whether these copies, counted in elements of ``unit``, are worth a table."""
    is_worth_it = (
        device.type == "cuda"
        and (len(copies) >= FEWEST_COPIES or any(len(copy.sizes) > 1 for copy in copies))
        and all(len(copy.sizes) <= _DIMS and copy.numel <= _MOST for copy in copies)
    )
    return is_worth_it and _is_warm(device) and _works(unit, device)


def build_table(copies: Sequence[tuple[int, Copy]], device: torch.device) -> Table:
    """Of copies into targets, which are told by number. Valid as long as the copies are."""
    kinds: dict[Any, int] = {}  # models repeat a few thousands of times
    kind_of = [kinds.setdefault(copy[2:], len(kinds)) for _, copy in copies]
    places = np.array([(number, *copy[:2]) for number, copy in copies], dtype=np.int64)
    forms = np.array([_form_of(*kind) for kind in kinds], dtype=np.int64)
    table = np.concatenate([places, forms[kind_of]], axis=1)
    counts = (table[:, 3] + _BLOCK - 1) // _BLOCK
    begins = np.repeat(counts.cumsum() - counts, counts)
    of_copy = np.repeat(np.arange(len(table)), counts)
    first = (np.arange(len(begins)) - begins) * _BLOCK
    blocks = torch.from_numpy(np.stack([of_copy, first], 1).astype(np.int32))
    there = torch.from_numpy(table).to(device, non_blocking=True)
    return Table(there, blocks.to(device, non_blocking=True))


def _form_of(sizes: Dims, source_strides: Dims, target_strides: Dims) -> list[int]:
    """What a table has of a copy beside its places."""
    row = [math.prod(sizes), max(1, len(sizes))]
    for values in (sizes, source_strides, target_strides):
        row += [*reversed(values), *[0] * (_DIMS - len(values))]
    return row


def places_of(targets: Sequence[torch.Tensor], unit: torch.dtype) -> torch.Tensor:
    """The addresses of the targets' storages, for the kernel; by number. Valid as long as the
    targets are where they are."""
    device = targets[0].device
    places = [target.untyped_storage().data_ptr() for target in targets]
    if any(place % unit.itemsize for place in places) or {t.device for t in targets} != {device}:
        text = f"targets that are not aligned to {unit.itemsize} bytes, or on several devices"
        raise ValueError(text)
    return torch.tensor(places, device="cpu").to(device, non_blocking=True)


def gather_scatter(places: torch.Tensor, source: torch.Tensor, table: Table) -> None:
    """Execute a table's copies.

    Args:
        places: of the targets, as of ``places_of``.
        source: one-dimensional, of the size of the dtype that the copies count in.

    Raises:
        ValueError: targets and source are on different devices.
        RuntimeError: the device refuses.
    """
    if places.device != source.device:
        raise ValueError(f"from {source.device} nothing can be copied to {places.device} at once")
    if len(table.blocks):
        with torch.cuda.device_of(source):
            kernel = _kernel(source.itemsize, source.device)
            _launch(kernel, len(table.blocks), [source, places, table.copies, table.blocks])


def warm_up(device: torch.device) -> None:
    """Have what later updates execute loaded and compiled aside."""
    if device.type != "cuda" or device in _warming:
        return
    # No daemon: where the program ends meanwhile, Python would kill it inside the compiler.
    thread = threading.Thread(target=_load_and_compile, args=(device,), name="warm-up")
    with contextlib.suppress(RuntimeError):  # no more threads here: done where it is needed
        thread.start()
        _warming[device] = thread


def _load_and_compile(device: torch.device) -> None:
    with contextlib.suppress(torch.OutOfMemoryError):
        words = torch.zeros(1 << 18, dtype=torch.int64, device=device)
        digests([words[:8], words[8:16], words, words.view(-1, 8)[:, :4]])
        for unit in (torch.int64, torch.int32):  # what most bits are moved as
            _works(unit, device)


_warming: dict[torch.device, threading.Thread] = {}


@cache
def _is_warm(device: torch.device) -> bool:
    """Waits for that once."""
    thread = _warming.get(device)
    if thread is not None:
        thread.join(_PATIENCE)
    return thread is None or not thread.is_alive()


@cache
def _works(unit: torch.dtype, device: torch.device) -> bool:
    """Tried out once: NVRTC may be missing, or too old for the device."""
    copies = [(0, Copy(1, 2, (5,), (1,), (1,))), (1, Copy(2, 1, (2, 3), (3, 1), (3, 1)))]
    copies.append((1, Copy(3, 9, (2, 2, 2), (1, 2, 4), (4, 2, 1))))
    try:
        source = torch.arange(32, dtype=unit, device=device)
        targets = [torch.zeros_like(source) for _ in range(2)]
        gather_scatter(places_of(targets, unit), source, build_table(copies, device))
        found = [target.tolist() for target in targets]
    except Exception as error:  # of any kind: updates do without
        logger.warning(
            "weights are copied one by one, which takes longer: NVRTC, by cuda-bindings of torch's "
            "CUDA version, does not work here: {}",
            error,
        )
        return False
    expected = [[0, 0, 1, 2, 3, 4, 5], [0, 2, 3, 4, 5, 6, 7, 0, 0, 3, 7, 5, 9, 4, 8, 6, 10]]
    return all(one == [*e, *[0] * (32 - len(e))] for one, e in zip(found, expected, strict=True))


class _Kernel(NamedTuple):
    """``context``: the device's, which a thread that has done nothing there has not entered."""

    function: Any
    context: Any


@cache
def _kernel(size: int, device: torch.device) -> _Kernel:
    """For units of ``size`` bytes. Called where the device is the current one, and in use."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    (context,) = _checked(driver.cuCtxGetCurrent())
    (module,) = _checked(driver.cuModuleLoadData(compiled(size, f"sm_{major}{minor}")))
    (function,) = _checked(driver.cuModuleGetFunction(module, b"copy_blocks"))
    return _Kernel(function, context)


def compiled(size: int, architecture: str) -> bytes:
    """The kernel's code for units of ``size`` bytes and a GPU's architecture, as ``sm_90``.

    Raises:
        RuntimeError: NVRTC does not know the architecture.
    """
    from cuda.bindings import nvrtc

    (program,) = _checked(nvrtc.nvrtcCreateProgram(source_for(size).encode(), b"", 0, [], []))
    try:
        options = [f"--gpu-architecture={architecture}".encode()]
        _checked(nvrtc.nvrtcCompileProgram(program, len(options), options))
        code = bytes(*_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def source_for(size: int) -> str:
    constants = {"UNIT": _UNITS[size], "DIMS": _DIMS, "BLOCK": _BLOCK}
    constants |= {"THREADS": _THREADS, "AT_ONCE": _AT_ONCE}
    return "".join(f"#define {name} {value}\n" for name, value in constants.items()) + SOURCE


def _launch(kernel: _Kernel, blocks: int, tensors: Sequence[torch.Tensor]) -> None:
    """In torch's stream. ``tensors``: the kernel's arguments, of which it gets the addresses."""
    from cuda.bindings import driver

    values = tuple(tensor.data_ptr() for tensor in tensors)
    arguments = values, (ctypes.c_void_p,) * len(values)
    _checked(driver.cuCtxSetCurrent(kernel.context))
    stream = torch.cuda.current_stream().cuda_stream
    grid, block = (blocks, 1, 1), (_THREADS, 1, 1)
    _checked(driver.cuLaunchKernel(kernel.function, *grid, *block, 0, stream, arguments, 0))


def _checked(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """What CUDA returns beside its error.

    Raises:
        RuntimeError: there is one.
    """
    error, *values = answer
    if error.value:
        raise RuntimeError(f"CUDA refuses: {error.name}")
    return tuple(values)
