"""The fused kernel: its source as C++, where each thread is a turn of a loop; and by NVRTC, which
needs no GPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from loguru import logger

from checkpoint_engine.loading.replay import fused_copies
from checkpoint_engine.loading.replay.fused_copies import build_table, gather_scatter, places_of
from checkpoint_engine.loading.replay.geometry import UNITS, Copy
from checkpoint_engine.replay import replayed

HOST = """
#define __global__
static struct { unsigned x; } blockIdx, threadIdx;
%s
extern "C" void run(unsigned blocks, const void* source, const void* targets,
                    const void* copies, const void* table) {
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < THREADS; ++threadIdx.x)
      copy_blocks((const UNIT*)source, (const long long*)targets, (const long long*)copies,
                  (const int*)table);
}
"""
COPIES = [
    (0, Copy(5, 7, (3, 4, 5), (40, 1, 4), (20, 5, 1))),  # transposed
    (1, Copy(700, 900, (5000,), (1,), (1,))),  # more than a block moves
    (0, Copy(9, 0, (1,), (1,), (1,))),
    (2, Copy(8, 5, (90, 50), (51, 1), (50, 1))),
    (1, Copy(300, 30, (2, 2, 2, 2), (16, 8, 2, 1), (8, 4, 2, 1))),
    (0, Copy(11, 3, (), (), ())),
    (2, Copy(0, 0, (0, 3), (3, 1), (3, 1))),
]


@pytest.fixture(scope="module")
def on_the_host(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Any]:
    """The kernel for units of a size, as a function of this machine's."""
    compiler = shutil.which("c++")
    if compiler is None:
        assert not os.environ.get("CI"), "no C++ compiler"
        pytest.skip("no C++ compiler")
    folder: Path = tmp_path_factory.mktemp("kernel")

    def build(size: int) -> Any:
        source, library = folder / f"{size}.cc", folder / f"{size}.so"
        if not library.exists():
            source.write_text(HOST % fused_copies.source_for(size))
            flags = ["-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
            subprocess.run([compiler, *flags, source, "-o", library], check=True, timeout=50)
        return ctypes.CDLL(str(library)).run

    return build


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, on_the_host: Callable[[int], Any]) -> list[int]:
    """Of the kernel, by blocks."""
    launched: list[int] = []

    def launch(run: Any, blocks: int, tensors: Sequence[torch.Tensor]) -> None:
        launched.append(blocks)
        run(ctypes.c_uint(blocks), *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors))

    monkeypatch.setattr(fused_copies, "_kernel", lambda size, device: on_the_host(size))
    monkeypatch.setattr(fused_copies, "_launch", launch)
    return launched


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64])
def test_the_kernel_moves_what_single_copies_move(dtype: torch.dtype, launches: list[int]) -> None:
    unit = UNITS[dtype.itemsize]
    source = torch.randint(0, 255, (8192 * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    targets = [torch.zeros(8192, dtype=dtype) for _ in range(3)]
    expected = [torch.zeros(8192, dtype=dtype) for _ in range(3)]
    for number, copy in COPIES:
        part = source.as_strided(copy.sizes, copy.source_strides, copy.source)
        expected[number].as_strided(copy.sizes, copy.target_strides, copy.target).copy_(part)
    gather_scatter(places_of(targets, unit), source, build_table(COPIES, source.device))
    for target, one in zip(targets, expected, strict=True):
        assert torch.equal(target.view(unit), one.view(unit))
    assert launches == [8]  # two for the 5,000 and the 4,500 elements


def test_places_beyond_32_bits(launches: list[int], tmp_path: Path) -> None:
    """In files of which the system keeps what is written alone."""
    size, far = 5 << 30, 1 << 31
    memory = []
    for name in ("source", "target", "expected"):
        path = tmp_path / name
        path.touch()
        os.truncate(path, size)
        whole = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        memory.append(whole)
    source, target, expected = memory
    copies = [Copy(3, 5, (3, 4), (far, 1), (far + 7, 2)), Copy(far + 99, 2 * far, (6,), (2,), (1,))]
    for copy in copies:
        part = source.as_strided(copy.sizes, copy.source_strides, copy.source)
        part.copy_(torch.randint(1, 255, copy.sizes, dtype=torch.uint8))
        expected.as_strided(copy.sizes, copy.target_strides, copy.target).copy_(part)
    table = build_table([(0, copy) for copy in copies], source.device)
    gather_scatter(places_of([target], torch.uint8), source, table)
    for copy in copies:
        parts = [one.as_strided(copy.sizes, copy.target_strides, copy.target) for one in memory[1:]]
        assert torch.equal(*parts)
        assert parts[0].all()


def test_nothing_to_copy_is_no_launch(launches: list[int]) -> None:
    nothing = build_table([(0, Copy(0, 0, (0,), (1,), (1,)))], torch.device("cpu"))
    target = torch.ones(4, dtype=torch.int64)
    gather_scatter(places_of([target], torch.int64), target, nothing)
    assert launches == []


@pytest.mark.parametrize("size", UNITS)
def test_nvrtc_compiles_it(size: int) -> None:
    assert fused_copies.compiled(size, "sm_90")[:4] == b"\x7fELF"


def test_an_architecture_that_nvrtc_does_not_know_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="CUDA refuses: NVRTC_ERROR_INVALID_OPTION"):
        fused_copies.compiled(8, "sm_1")


def test_targets_must_be_aligned_and_on_one_device_that_of_the_source(launches: list[int]) -> None:
    target = torch.zeros(9, dtype=torch.uint8)
    file = torch.frombuffer(bytearray(9), dtype=torch.uint8, offset=1)
    with pytest.raises(ValueError, match="not aligned to 8 bytes"):
        places_of([target, file], torch.int64)
    elsewhere = torch.zeros(9, dtype=torch.uint8, device="meta")
    with pytest.raises(ValueError, match="several devices"):
        places_of([target, elsewhere], torch.uint8)
    table = build_table([(0, Copy(0, 0, (8,), (1,), (1,)))], torch.device("cpu"))
    with pytest.raises(ValueError, match="from meta nothing can be copied to cpu"):
        gather_scatter(places_of([target], torch.uint8), elsewhere, table)
    assert launches == []


GPU = torch.device("cuda", 0)
ONE = Copy(0, 0, (8,), (1,), (1,))
MANY = [ONE] * fused_copies.FEWEST_COPIES
COLUMNS = Copy(0, 0, (4, 8), (16, 1), (8, 1))


@pytest.fixture
def no_gpu_used(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """What the thread that warms up is given."""
    warmed: list[torch.device] = []
    monkeypatch.setattr(fused_copies, "_warming", {})
    monkeypatch.setattr(fused_copies, "_load_and_compile", warmed.append)
    for cached in (fused_copies._works, fused_copies._is_warm):
        cached.cache_clear()
    yield warmed
    for cached in (fused_copies._works, fused_copies._is_warm):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("copies", "device", "worth_it"),
    [
        (MANY, GPU, True),
        ([COLUMNS], GPU, True),
        (MANY[1:], GPU, False),
        (MANY, torch.device("cpu"), False),
        ([*MANY, Copy(0, 0, (2,) * 5, (16, 8, 4, 2, 1), (16, 8, 4, 2, 1))], GPU, False),
        ([*MANY, Copy(0, 0, ((1 << 30) + 1,), (1,), (1,))], GPU, False),
    ],
)
def test_what_is_worth_a_table(
    copies: list[Copy],
    device: torch.device,
    worth_it: bool,
    no_gpu_used: list[torch.device],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    works = mock.Mock(return_value=True)
    works.cache_clear = lambda: None
    monkeypatch.setattr(fused_copies, "_works", works)
    assert fused_copies.fits(copies, torch.int64, device) == worth_it
    works.return_value = False
    assert not fused_copies.fits(copies, torch.int64, device)


def test_without_cuda_bindings_copies_are_made_one_by_one(
    no_gpu_used: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    said: list[str] = []
    sink = logger.add(lambda message: said.append(message.record["message"]))
    try:
        assert not fused_copies._works(torch.int64, torch.device("cpu"))
    finally:
        logger.remove(sink)
    assert "cuda.bindings" in said[0]
    assert "one by one" in said[0]


@pytest.mark.parametrize("found", [list(range(32)), [0] * 32])
def test_a_kernel_that_copies_something_else_is_not_used(
    found: list[int],
    no_gpu_used: list[torch.device],
    launches: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert fused_copies._works(torch.int64, torch.device("cpu"))
    fused_copies._works.cache_clear()

    def other(run: Any, blocks: int, tensors: Sequence[torch.Tensor]) -> None:
        places = tensors[1].tolist()
        ctypes.memmove(places[0], torch.tensor(found).data_ptr(), 8 * 32)

    monkeypatch.setattr(fused_copies, "_launch", other)
    assert not fused_copies._works(torch.int64, torch.device("cpu"))


def test_it_is_compiled_aside_once(no_gpu_used: list[torch.device]) -> None:
    for _ in range(3):
        fused_copies.warm_up(GPU)
        fused_copies.warm_up(torch.device("cpu"))
    assert fused_copies._is_warm(GPU)
    assert no_gpu_used == [GPU]


def test_a_thread_that_cannot_start_is_done_without(
    no_gpu_used: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("no more")))
        fused_copies.warm_up(GPU)
    assert fused_copies._is_warm(GPU)
    assert no_gpu_used == []


def test_a_compiler_that_hangs_is_waited_for_once(
    no_gpu_used: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()
    monkeypatch.setattr(fused_copies, "_load_and_compile", lambda device: hangs.wait(50))
    monkeypatch.setattr(fused_copies, "_PATIENCE", 0.1)
    try:
        fused_copies.warm_up(GPU)
        with mock.patch.object(threading.Thread, "join", autospec=True) as joined:
            assert [fused_copies.fits(MANY, torch.int64, GPU) for _ in range(5)] == [False] * 5
        assert joined.call_args_list == [mock.call(fused_copies._warming[GPU], 0.1)]
    finally:
        hangs.set()


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for number in range(40):
            self.register_buffer(f"b{number}", torch.zeros(3, 8 + number))

    def load_weights(self, weights: Any) -> None:
        for name, tensor in weights:
            target = self.get_buffer(name)
            target.copy_(tensor if tensor.dtype == target.dtype else tensor.float())


def test_a_bucket_into_many_parameters_is_a_launch_for_each_unit(
    launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units of 8 bytes and of 4; the one that is converted is copied by itself."""
    monkeypatch.setattr(fused_copies, "fits", lambda copies, unit, device: True)
    model = Model()
    for seed in range(5):
        launches.clear()
        torch.manual_seed(seed)
        buffers = list(model.named_buffers())
        whole = {name: torch.randn(3, 16 + 2 * n) for n, (name, _) in enumerate(buffers)}
        weights = [
            (name, t[:, : t.shape[1] // 2].to(torch.bfloat16 if name == "b7" else t.dtype))
            for name, t in whole.items()
        ]
        # in one storage, at another place every time
        flat = torch.empty(seed * 64 + sum(4096 for _ in weights), dtype=torch.uint8)
        placed = []
        for number, (name, t) in enumerate(weights):
            at = flat[seed * 64 + number * 4096 :][: t.nbytes].view(t.dtype).view(t.shape)
            placed.append((name, at.copy_(t)))
        load = replayed(model.load_weights)
        buffer, message = flat[seed * 64 :], b"the same bucket"
        if load.knows(message):
            load.replay(message, buffer)
        else:
            load.load_bucket(placed, message, buffer)
        load.finish()
        for name, t in weights:
            assert torch.equal(model.get_buffer(name), t.float()), name
        assert len(launches) == (0, 0, 2, 2, 2)[seed], launches
    assert load.report["loaded"] == "replayed"
