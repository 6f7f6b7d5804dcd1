from __future__ import annotations

import contextlib
import gc
import json
import math
import mmap
import os
import pickle
import re
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from checkpoint_engine.data_types import ALIGNMENT, MemoryBuffer, ParameterMeta, align_up
from checkpoint_engine.ground import limits as limits_module
from checkpoint_engine.memory import arena as arena_module
from checkpoint_engine.memory import filling, host_memory
from checkpoint_engine.memory import layout as layout_module
from checkpoint_engine.memory.arena import Arena, Arenas
from checkpoint_engine.memory.files import open_files
from checkpoint_engine.memory.sources import (
    FileParts,
    FileSlice,
    TensorSource,
    natural_key,
    tensor_sources,
)
from checkpoint_engine.pin_memory import (
    HostMemory,
    MemoryUsage,
    available_host_memory,
    pack,
    pack_into,
    packed_size,
)

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]
DTYPES += [getattr(torch, name) for name in ("float8_e8m0fnu",) if hasattr(torch, name)]


def any_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A tensor of random bits, NaNs of all kinds included."""
    nbytes = math.prod(shape) * dtype.itemsize
    high = 2 if dtype is torch.bool else 256
    bits = np.random.default_rng(seed).integers(0, high, nbytes, np.uint8)
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(bits.tobytes()), dtype=dtype).view(shape)


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of the contiguous tensor."""
    contiguous = tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()
    return contiguous.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def contents(buffers: list[MemoryBuffer]) -> dict[str, bytes]:
    found = {}
    for buffer in buffers:
        at = 0
        for meta in buffer.metas:
            nbytes = math.prod(meta.shape) * meta.dtype.itemsize
            found[meta.name] = buffer.buffer[at : at + nbytes].numpy().tobytes()
            at += meta.aligned_size
    return found


def is_mapped(address: int) -> bool:
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = (line.split()[0].split("-") for line in lines)
    return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(layout_module, "MAX_BUFFER_BYTES", 8192)


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    threads, fds = {*threading.enumerate()}, open_fds()
    yield
    assert {*threading.enumerate()} <= threads  # one of a test before this may have ended
    if request.node.get_closest_marker("gpu") is None:  # CUDA keeps files open
        assert open_fds() <= fds


@pytest.fixture
def arenas(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The addresses of all arenas mapped in the test."""
    addresses: list[int] = []
    real = Arenas._at

    def record(self: Arenas, address: int, *args: Any, **kwargs: Any) -> Any:
        addresses.append(address)
        return real(self, address, *args, **kwargs)

    monkeypatch.setattr(Arenas, "_at", record)
    return addresses


def source(name: str, nbytes: int) -> TensorSource:
    parts = FileParts((FileSlice("nowhere", 0, nbytes),))
    return TensorSource(name, torch.uint8, torch.Size([nbytes]), parts)


def fits(sizes: list[int], capacities: list[int]) -> bool:
    """Whether tensors, one after the other, fit into buffers, one after the other."""
    if not sizes or not capacities:
        return not sizes
    size = align_up(sizes[0])
    if size > capacities[0]:
        return fits(sizes, capacities[1:])
    return fits(sizes[1:], [capacities[0] - size, *capacities[1:]])


class TestPack:
    @given(
        st.dictionaries(st.text("abw.0129", min_size=1, max_size=8), st.integers(0, 3000)),
        st.integers(0, 5000),
    )
    @settings(deadline=None, max_examples=150)
    def test_invariants(self, sizes: dict[str, int], limit: int) -> None:
        sources = {name: source(name, size) for name, size in sizes.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout_module, "MAX_BUFFER_BYTES", limit)
            layout = pack(sources)
        names = [meta.name for metas in layout for meta in metas]
        assert names == sorted(sizes, key=natural_key)
        assert all(m.aligned_size == align_up(sizes[m.name]) for metas in layout for m in metas)
        most = max([limit, *(align_up(size) for size in sizes.values())])
        totals = [packed_size(metas) for metas in layout]
        assert all(metas and total <= most for metas, total in zip(layout, totals, strict=True))
        for total, following in zip(totals, layout[1:], strict=False):
            assert total + following[0].aligned_size > most  # no buffer without need
        assert pack_into(sources, [most] * len(layout)) == layout

    @given(st.lists(st.integers(0, 3000), max_size=8), st.lists(st.integers(0, 5000), max_size=5))
    @settings(deadline=None, max_examples=150)
    def test_into_given_capacities(self, sizes: list[int], capacities: list[int]) -> None:
        sources = {f"w{i}": source(f"w{i}", size) for i, size in enumerate(sizes)}
        if not fits(sizes, capacities):
            with pytest.raises(ValueError, match=r"unregister_checkpoint\(name, force=True\)"):
                pack_into(sources, capacities)
            return
        layout = pack_into(sources, capacities)
        assert len(layout) == len(capacities)
        assert [meta.name for metas in layout for meta in metas] == [*sources]
        assert all(packed_size(m) <= size for m, size in zip(layout, capacities, strict=True))

    def test_four_gib(self) -> None:
        gib = 1 << 30
        sources = {f"w{i}": source(f"w{i}", gib) for i in range(5)}
        assert [len(metas) for metas in pack(sources)] == [4, 1]
        sources["v"] = source("v", 6 * gib)
        assert [packed_size(metas) // gib for metas in pack(sources)] == [6, 5]


@pytest.mark.usefixtures("small_chunks")
class TestFillFromMemory:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_dtype_bit_for_bit(self, dtype: torch.dtype) -> None:
        base = any_bits(dtype, (12, 30, 4))
        tensors = {
            "plain": base,
            "scalar": base[0, 0, 0],
            "empty": base[:0],
            "transposed": base[0].t(),
            "permuted": base.permute(2, 0, 1),
            "columns": base[:, :, 1:3],
            "every_other": base.view(-1)[::2],
            "expanded": base[:1, :1].expand(5, 7, 4),
            "offset": base.view(-1)[3:],
        }
        memory = HostMemory("cpu")
        buffers = memory.fill(tensor_sources(tensors))
        assert contents(buffers) == {name: raw(tensor) for name, tensor in tensors.items()}
        memory.release(buffers)

    def test_conjugate_and_negative_views(self) -> None:
        base = any_bits(torch.complex64, (300,)).nan_to_num()
        tensors = {"conj": base.conj(), "neg": base.conj().imag, "strided": base.conj()[::2]}
        assert tensors["neg"].is_neg()
        memory = HostMemory("cpu")
        buffers = memory.fill(tensor_sources(tensors))
        assert contents(buffers) == {name: raw(tensor) for name, tensor in tensors.items()}
        memory.release(buffers)

    def test_parameters(self) -> None:
        model = torch.nn.Linear(20, 30)
        memory = HostMemory("cpu")
        buffers = memory.fill(tensor_sources(dict(model.named_parameters())))
        assert contents(buffers) == {"weight": raw(model.weight), "bias": raw(model.bias)}
        memory.release(buffers)

    @given(data=st.data())
    @settings(deadline=None, max_examples=40)
    def test_any_tensors(self, data: st.DataObject) -> None:
        shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
        count = data.draw(st.integers(0, 12))
        tensors = {}
        for i in range(count):
            tensor = any_bits(data.draw(st.sampled_from(DTYPES)), data.draw(shapes), seed=i)
            dims = data.draw(st.permutations(range(tensor.dim())))
            tensors[f"layers.{i}"] = tensor.permute(dims)
        memory = HostMemory("cpu")
        buffers = memory.fill(tensor_sources(tensors))
        assert contents(buffers) == {name: raw(tensor) for name, tensor in tensors.items()}
        for buffer in buffers:
            assert buffer.buffer.data_ptr() % ALIGNMENT == 0
            assert buffer.size == packed_size(buffer.metas)
            assert not buffer.manually_pinned
        memory.release(buffers)
        assert memory.usage == MemoryUsage(0, 0)

    def test_nothing(self) -> None:
        memory = HostMemory("cpu")
        assert memory.fill({}) == []
        memory.release([])

    def test_only_tensors_without_elements(self) -> None:
        memory = HostMemory("cpu")
        (buffer,) = memory.fill(tensor_sources({"a": torch.empty(0), "b": torch.empty(3, 0)}))
        assert (buffer.size, [meta.name for meta in buffer.metas]) == (0, ["a", "b"])
        memory.release([buffer])


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    codes = {
        torch.bool: "BOOL",
        torch.uint16: "U16",
        torch.float32: "F32",
        torch.bfloat16: "BF16",
        torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
        torch.complex64: "C64",
    }
    header, data = {}, b""
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + tensor.nbytes]
        entry = {"dtype": codes[tensor.dtype], "shape": [*tensor.shape], "data_offsets": offsets}
        header[name] = entry
        data += raw(tensor)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.usefixtures("small_chunks")
class TestFillFromFiles:
    @given(data=st.data())
    @settings(deadline=None, max_examples=40)
    def test_any_safetensors(self, data: st.DataObject) -> None:
        shapes = st.lists(st.integers(0, 12), max_size=3).map(tuple)
        dtypes = [torch.bool, torch.uint16, torch.float32, torch.bfloat16, torch.complex64]
        tensors = {
            f"layers.{i}": any_bits(data.draw(st.sampled_from(dtypes)), data.draw(shapes), seed=i)
            for i in range(data.draw(st.integers(1, 12)))
        }
        names = [*tensors]
        memory = HostMemory("cpu")
        with tempfile.TemporaryDirectory() as folder:
            files = [
                write_safetensors(Path(folder, f"{i}.safetensors"), {n: tensors[n] for n in part})
                for i, part in enumerate((names[::2], names[1::2]))
            ]
            buffers = memory.fill(open_files(files))
        assert contents(buffers) == {name: raw(tensor) for name, tensor in tensors.items()}
        memory.release(buffers)

    @pytest.mark.parametrize("chunk", [7, 1000, 1 << 20])
    @pytest.mark.parametrize("dim", [0, 1, 2])
    def test_tensor_parallel_npy(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dim: int, chunk: int
    ) -> None:
        monkeypatch.setattr(filling, "CHUNK_BYTES", chunk)
        whole = {
            "w": any_bits(torch.float32, (6, 9, 30)),
            "b": any_bits(torch.bfloat16, (30, 30, 3)).contiguous(),
        }
        whole["thin"] = any_bits(torch.float32, (2, 2, 2))  # the last rank's shard is empty
        shards = {name: torch.tensor_split(tensor, 3, dim) for name, tensor in whole.items()}
        files = []
        for rank in range(3):
            mine = {name: parts[rank].contiguous() for name, parts in shards.items()}
            path = tmp_path / f"model.tp.{rank}.npy"
            with path.open("wb") as file:
                for tensor in mine.values():
                    np.save(file, tensor.view(torch.int16).numpy())
            metas = [
                {
                    "key": name,
                    "dtype": tensor.dtype,
                    "shape": tensor.shape,
                    "type": torch.Tensor,
                    "tp_concat_dim": dim,
                }
                for name, tensor in mine.items()
            ]
            Path(f"{path}.meta").write_bytes(pickle.dumps(metas))
            files.append(path)
        memory = HostMemory("cpu")
        buffers = memory.fill(open_files(files))
        assert contents(buffers) == {name: raw(tensor) for name, tensor in whole.items()}
        memory.release(buffers)

    def test_short_reads(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tensor = any_bits(torch.float32, (5000,))
        path = write_safetensors(tmp_path / "a.safetensors", {"w": tensor})
        real = os.preadv

        def short(fd: int, buffers: list[memoryview], offset: int) -> int:
            return real(fd, [buffers[0][:77]], offset)

        monkeypatch.setattr(os, "preadv", short)
        memory = HostMemory("cpu")
        buffers = memory.fill(open_files([path]))
        assert contents(buffers) == {"w": raw(tensor)}
        memory.release(buffers)

    def test_file_and_memory_together(self, tmp_path: Path) -> None:
        files = {f"f{i}": any_bits(torch.bfloat16, (40, i)) for i in range(30)}
        named = {f"m{i}": any_bits(torch.float32, (i, 13)) for i in range(30)}
        path = write_safetensors(tmp_path / "a.safetensors", files)
        memory = HostMemory("cpu")
        buffers = memory.fill({**open_files([path]), **tensor_sources(named)})
        assert len(buffers) > 1
        assert contents(buffers) == {n: raw(t) for n, t in {**files, **named}.items()}
        memory.release(buffers)


@contextlib.contextmanager
def all_freed(arenas: list[int]) -> Iterator[HostMemory]:
    memory = HostMemory("cpu")
    try:
        yield memory
    finally:
        assert arenas
        assert not any(map(is_mapped, arenas))
        assert memory.usage == MemoryUsage(0, 0)


def interrupt(_: Any) -> None:
    raise KeyboardInterrupt


INTERRUPT_PROGRAM = """
import signal, time
from pathlib import Path
import torch
from checkpoint_engine.memory import checksum, filling
from checkpoint_engine.memory.host_memory import HostMemory
from checkpoint_engine.memory.sources import tensor_sources

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

signal.signal(signal.SIGALRM, signal.default_int_handler)
filling.CHUNK_BYTES = 1 << 19
checksum._SMALLEST_PIECE = checksum._LARGEST_PIECE = 1 << 16
sources = tensor_sources({f"w{i}": torch.ones(1 << 17) for i in range(40)})

def fill_and_sum():
    buffers = HostMemory("cpu").fill(sources)
    checksum.add_sums(buffers)

times = []
for i in range(4):
    start = time.perf_counter()
    fill_and_sum()
    times.append(time.perf_counter() - start)
before = resident()
for i in range(80):
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0001 + min(times) * i / 60)
        fill_and_sum()
        time.sleep(1)
    except KeyboardInterrupt:
        pass
assert resident() - before < 60 << 20, resident() - before
print("done")
"""


@pytest.mark.usefixtures("small_chunks")
class TestFailuresLeaveNothing:
    def test_file_that_shrinks(self, tmp_path: Path, arenas: list[int]) -> None:
        path = tmp_path / "a.safetensors"
        save_file({"a": torch.ones(9000), "b": torch.ones(9000)}, path)
        sources = open_files([path])
        os.truncate(path, 40_000)
        match = r"a\.safetensors: truncated .* ends at byte 40000, tensor 'b' needs"
        with pytest.raises(ValueError, match=match), all_freed(arenas) as memory:
            memory.fill(sources)

    def test_file_that_disappears(self, tmp_path: Path, arenas: list[int]) -> None:
        path = tmp_path / "a.safetensors"
        save_file({"a": torch.ones(9000)}, path)
        sources = open_files([path])
        path.unlink()
        match = r"a\.safetensors: tensor 'a': .*No such file"
        with pytest.raises(RuntimeError, match=match), all_freed(arenas) as memory:
            memory.fill(sources)

    def test_interrupt(self, arenas: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Arena, "pin", interrupt)
        sources = tensor_sources({f"w{i}": torch.ones(9000) for i in range(9)})
        with pytest.raises(KeyboardInterrupt), all_freed(arenas) as memory:
            memory.fill(sources)

    def test_signals_at_any_moment(self) -> None:
        program = subprocess.run(
            [sys.executable, "-c", INTERRUPT_PROGRAM],
            capture_output=True,
            text=True,
            check=False,
            timeout=50,
        )
        assert program.returncode == 0, program.stderr
        assert program.stdout == "done\n"

    def test_too_little_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(limits_module, "available_host_memory", lambda: (5000, "a limit"))
        memory = HostMemory("cpu")
        match = r"needs 8192 more bytes of host memory, but only 5000 are available \(a limit\)"
        with pytest.raises(MemoryError, match=match):
            memory.fill(tensor_sources({"w": torch.ones(2048)}))
        memory.release(memory.fill(tensor_sources({"w": torch.ones(100)})))

    def test_mapping_refused(self) -> None:
        with pytest.raises(MemoryError, match=r"cannot map .* bytes .*available are .*MEMLOCK"):
            Arenas("cpu").new(1 << 60)

    def test_populating_refused(self) -> None:
        with pytest.raises(MemoryError, match="cannot populate 4096 bytes"):
            arena_module.populate(mmap_gap(), 4096)


def mmap_gap() -> int:
    """An address at which nothing is mapped."""
    arena = Arenas("cpu").new(4096)
    address = arena.memory.data_ptr()
    arena.free()
    return address


class TestLimits:
    def test_meminfo(self) -> None:
        available, limit = available_host_memory()
        assert 0 < available < 1 << 50
        assert limit

    def test_cgroup(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def write(group: Path, limit: str) -> None:
            group.mkdir(exist_ok=True)
            (group / "memory.max").write_text(f"{limit}\n")
            (group / "memory.current").write_text("900\n")
            (group / "memory.stat").write_text("anon 1\nactive_file 50\ninactive_file 100\n")

        write(tmp_path / "a", "1000")
        write(tmp_path / "a/b", "max")
        monkeypatch.setattr(limits_module, "CGROUP_ROOT", str(tmp_path))
        limits = [*limits_module._cgroup_limits(tmp_path / "a/b/no-controller")]
        assert limits == [(250, f"{tmp_path}/a/memory.max")]


@pytest.mark.usefixtures("small_chunks")
class TestReuse:
    def test_other_shapes_that_fit(self, arenas: list[int]) -> None:
        memory = HostMemory("cpu")
        pool = memory.fill(tensor_sources({f"w{i}": torch.ones(1000) for i in range(5)}))
        mapped = len(arenas)
        for step in range(3):
            tensors = {f"v{i}": any_bits(torch.float64, (i, 20 + step)) for i in range(9)}
            buffers = memory.fill(tensor_sources(tensors), reuse=pool)
            assert contents(buffers) == {name: raw(tensor) for name, tensor in tensors.items()}
            assert {b.buffer.data_ptr() for b in buffers} <= {b.buffer.data_ptr() for b in pool}
        assert len(arenas) == mapped
        memory.release(pool)
        assert not any(map(is_mapped, arenas))

    def test_what_does_not_fit(self) -> None:
        memory = HostMemory("cpu")
        pool = memory.fill(tensor_sources({"w": torch.ones(1000)}))
        with pytest.raises(ValueError, match=r"buffers of \[4096\] bytes; 1 tensors of 4352 bytes"):
            memory.fill(tensor_sources({"w": torch.ones(1025)}), reuse=pool)
        assert memory.usage.in_use == 4096
        memory.release(pool)

    def test_what_holds_no_tensor_is_left_out(self) -> None:
        memory = HostMemory("cpu")
        pool = memory.fill(tensor_sources({"a": torch.ones(100), "b": torch.ones(2048)}))
        (buffer,) = memory.fill(tensor_sources({"c": torch.ones(2000)}), reuse=pool)
        assert buffer.buffer is pool[1].buffer
        assert memory.fill({}, reuse=pool) == []
        memory.release(pool)

    def test_released_buffers(self) -> None:
        memory = HostMemory("cpu")
        pool = memory.fill(tensor_sources({"w": torch.ones(1000)}))
        memory.release(pool)
        with pytest.raises(ValueError, match="1 of 1 buffers to reuse are not lent out"):
            memory.fill(tensor_sources({"w": torch.ones(1000)}), reuse=pool)


@pytest.mark.usefixtures("small_chunks")
class TestRelease:
    def test_unmaps_though_a_view_is_left(self, arenas: list[int]) -> None:
        memory = HostMemory("cpu")
        buffers = memory.fill(tensor_sources({f"w{i}": torch.ones(2000) for i in range(4)}))
        views = [buffer.buffer[10:] for buffer in buffers]
        assert all(map(is_mapped, arenas))
        memory.release(buffers)
        assert not any(map(is_mapped, arenas))
        assert [buffer.buffer.numel() for buffer in buffers] == [0] * len(views)

    def test_twice_is_once(self) -> None:
        memory = HostMemory("cpu")
        buffers = memory.fill(tensor_sources({"w": torch.ones(2000)}))
        stale = [buffer.model_copy() for buffer in buffers]
        memory.release(buffers)
        others = memory.fill(tensor_sources({"w": torch.zeros(2000)}))  # maybe at the same address
        memory.release(buffers)
        memory.release(stale)
        assert contents(others) == {"w": bytes(8000)}
        memory.release(others)

    def test_dropping_everything_frees_everything(self, arenas: list[int]) -> None:
        memory = HostMemory("cpu")
        buffers = memory.fill(tensor_sources({"w": torch.ones(2000)}))
        view = buffers[0].buffer[10:]
        del memory, buffers
        assert all(map(is_mapped, arenas))
        assert view[2:6].view(torch.float32).item() == 1
        del view
        assert not any(map(is_mapped, arenas))


@pytest.mark.usefixtures("small_chunks")
class TestRetaining:
    def test_next_step_allocates_nothing(self, arenas: list[int]) -> None:
        memory = HostMemory("cpu", retain_bytes=1 << 20)
        for step in range(4):
            tensors = {f"w{i}": any_bits(torch.float32, (1900 - step,), i) for i in range(5)}
            buffers = memory.fill(tensor_sources(tensors))
            assert contents(buffers) == {name: raw(tensor) for name, tensor in tensors.items()}
            assert memory.usage == MemoryUsage(5 * 8192, 0)
            memory.release(buffers)
            assert memory.usage == MemoryUsage(0, 5 * 8192)
        assert len(arenas) == 5
        memory.trim()
        assert memory.usage == MemoryUsage(0, 0)
        assert not any(map(is_mapped, arenas))

    def test_as_much_as_the_largest_fill(self) -> None:
        memory = HostMemory("cpu", retain_bytes=None)
        first = memory.fill(tensor_sources({"w": torch.ones(5000)}))
        second = memory.fill(tensor_sources({"w": torch.ones(5000)}))
        memory.release(first + second)
        assert memory.usage == MemoryUsage(0, 5 * 4096)
        memory.trim()

    def test_threads_run_near_the_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cpu = min(os.sched_getaffinity(0))
        where = []
        write = filling._write_batch
        monkeypatch.setattr(
            filling,
            "_write_batch",
            lambda *args: (where.append(os.sched_getaffinity(0)), write(*args)),
        )
        before = os.sched_getaffinity(0)
        memory = HostMemory("cpu", cpus={cpu, 1 << 20})
        memory.release(memory.fill(tensor_sources({"w": torch.ones(5000)})))
        assert where
        assert all(cpus == {cpu} for cpus in where)
        assert os.sched_getaffinity(0) == before

    def test_cap(self) -> None:
        memory = HostMemory("cpu", retain_bytes=2 * 8192)
        memory.release(memory.fill(tensor_sources({f"w{i}": torch.ones(2000) for i in range(5)})))
        assert memory.usage == MemoryUsage(0, 2 * 8192)
        memory.trim()

    def test_what_is_smaller_is_not_taken(self) -> None:
        memory = HostMemory("cpu", retain_bytes=1 << 20)
        memory.release(memory.fill(tensor_sources({"w": torch.ones(100)})))
        tensors = {"w": any_bits(torch.float32, (1900,))}
        buffers = memory.fill(tensor_sources(tensors))
        assert contents(buffers) == {"w": raw(tensors["w"])}
        assert memory.usage == MemoryUsage(8192, 0)
        memory.release(buffers)
        memory.trim()

    def test_what_does_not_fit_is_freed_first(self, arenas: list[int]) -> None:
        memory = HostMemory("cpu", retain_bytes=1 << 20)
        memory.release(memory.fill(tensor_sources({"w": torch.ones(2048)})))
        buffers = memory.fill(tensor_sources({"w": torch.ones(100)}))
        assert memory.usage == MemoryUsage(4096, 0)
        assert not is_mapped(arenas[0]) or arenas[0] == arenas[1]
        memory.release(buffers)
        memory.trim()


@pytest.fixture
def shm() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=host_memory.SHM_DIR) as folder:
        yield Path(folder)


def truncated_file(shm: Path, _: Path) -> Path:
    path = write_safetensors(shm / "bad.safetensors", {"v": torch.ones(9)})
    os.truncate(path, path.stat().st_size - 1)
    return path


def link_to_elsewhere(shm: Path, elsewhere: Path) -> Path:
    path = write_safetensors(elsewhere / "a.safetensors", {"v": torch.ones(9)})
    (shm / "link.safetensors").symlink_to(path)
    return shm / "link.safetensors"


def npy_file(shm: Path, _: Path) -> Path:
    np.save(shm / "a.npy", np.ones(1, np.float32))
    meta = {"key": "v", "dtype": torch.float32, "shape": (1,)}
    metas = [{**meta, "type": torch.Tensor, "tp_concat_dim": 0}]
    (shm / "a.npy.meta").write_bytes(pickle.dumps(metas))
    return shm / "a.npy"


class TestPinInPlace:
    def test_maps_and_deletes(self, shm: Path, arenas: list[int]) -> None:
        tensors = {f"w{i}": any_bits(torch.bfloat16, (i, 333)) for i in range(20)}
        tensors["scalar"] = any_bits(torch.float32, ())
        names = [*tensors]
        files = []
        for i in range(2):
            part = {name: tensors[name] for name in names[i::2]}
            files.append(write_safetensors(shm / f"{i}.safetensors", part))
        memory = HostMemory("cpu")
        buffers = memory.pin_in_place(open_files(files))
        assert list(shm.iterdir()) == []
        assert contents(buffers) == {name: raw(tensor) for name, tensor in tensors.items()}
        for buffer in buffers:
            (meta,) = buffer.metas
            assert buffer.size == buffer.buffer.numel()
            buffer.buffer.sum()  # all of it is mapped
            if buffer.size != meta.aligned_size:
                assert buffer.size < meta.aligned_size
                assert (buffer.buffer.data_ptr() + buffer.size) % mmap.PAGESIZE == 0
        for file, address in enumerate(arenas):
            mine = [b for b in buffers if b.metas[0].name in names[file::2]]
            memory.release(mine[:-1])
            assert is_mapped(address)
            memory.release(mine[-1:])
            assert not is_mapped(address)
        assert memory.usage == MemoryUsage(0, 0)

    def test_pages_of_a_file_are_not_used_again(self, shm: Path, arenas: list[int]) -> None:
        """Who else has the file open would see what is written into them."""
        memory = HostMemory("cpu", retain_bytes=1 << 20)
        path = write_safetensors(shm / "a.safetensors", {"w": torch.ones(2000)})
        memory.release(memory.pin_in_place(open_files([path])))
        assert memory.usage == MemoryUsage(0, 0)
        assert not any(map(is_mapped, arenas))

    def test_without_tensors(self, shm: Path, arenas: list[int]) -> None:
        memory = HostMemory("cpu")
        assert memory.pin_in_place({}) == []
        assert memory.pin_in_place(open_files([write_safetensors(shm / "a.safetensors", {})])) == []
        (buffer,) = memory.pin_in_place(
            open_files([write_safetensors(shm / "b.safetensors", {"w": torch.empty(0)})])
        )
        assert (buffer.size, buffer.metas[0].name) == (0, "w")
        memory.release([buffer])
        assert not any(map(is_mapped, arenas))

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (truncated_file, "truncated"),
            (link_to_elsewhere, "only .safetensors files in /dev/shm can be pinned"),
            (npy_file, "only .safetensors files in /dev/shm can be pinned"),
        ],
    )
    def test_failure_deletes_nothing(
        self,
        shm: Path,
        tmp_path: Path,
        arenas: list[int],
        make: Callable[[Path, Path], Path],
        says: str,
    ) -> None:
        good = write_safetensors(shm / "good.safetensors", {"w": torch.ones(9)})
        other = make(shm, tmp_path)
        before = sorted(shm.iterdir())
        memory = HostMemory("cpu")
        with pytest.raises(ValueError, match=says):
            memory.pin_in_place(open_files([good, other]))
        assert sorted(shm.iterdir()) == before
        assert other.resolve().exists()
        assert not any(map(is_mapped, arenas))
        assert memory.usage == MemoryUsage(0, 0)

    def test_interrupt_deletes_nothing(
        self, shm: Path, arenas: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Arena, "pin", interrupt)
        path = write_safetensors(shm / "a.safetensors", {"w": torch.ones(9)})
        with pytest.raises(KeyboardInterrupt):
            HostMemory("cpu").pin_in_place(open_files([path]))
        assert path.exists()
        assert arenas
        assert not any(map(is_mapped, arenas))


class FakeCudart:
    """Stands in for ``torch.cuda.cudart()``: remembers what is registered."""

    def __init__(self, fails_at: int = -1) -> None:
        self.registered: dict[int, int] = {}
        self._left = fails_at

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        assert is_mapped(address)
        assert is_mapped(address + nbytes - 1)
        assert flags == 0
        self._left -= 1
        if self._left == -1:
            return 712
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        assert is_mapped(address)
        return 0 if self.registered.pop(address, None) else 713

    def cudaGetErrorString(self, code: int) -> str:  # noqa: N802
        return f"error {code}"


@pytest.mark.usefixtures("small_chunks")
class TestPinning:
    def test_registers_and_unregisters(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cudart = FakeCudart()
        monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
        memory = HostMemory("cuda", retain_bytes=8192)
        buffers = memory.fill(tensor_sources({f"w{i}": torch.ones(2000) for i in range(3)}))
        assert cudart.registered == {b.buffer.data_ptr(): 8192 for b in buffers}
        assert all(buffer.manually_pinned for buffer in buffers)
        memory.release(buffers)
        assert len(cudart.registered) == 1  # the retained one
        buffers = memory.fill(tensor_sources({"w": torch.ones(2000)}))
        memory.release(buffers)
        memory.trim()
        assert cudart.registered == {}

    def test_in_place(self, monkeypatch: pytest.MonkeyPatch, shm: Path) -> None:
        cudart = FakeCudart()
        monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
        path = write_safetensors(shm / "a.safetensors", {"a": torch.ones(9), "b": torch.ones(9)})
        memory = HostMemory("cuda")
        buffers = memory.pin_in_place(open_files([path]))
        assert list(cudart.registered.values()) == [4096]
        memory.release(buffers)
        assert cudart.registered == {}

    def test_refused(self, monkeypatch: pytest.MonkeyPatch, arenas: list[int], shm: Path) -> None:
        sources = tensor_sources({f"w{i}": torch.ones(2000) for i in range(3)})
        path = write_safetensors(shm / "a.safetensors", {"a": torch.ones(9)})
        match = r"cudaHostRegister of \d+ bytes failed with error 712 \(error 712\).*RLIMIT_MEMLOCK"
        memory = HostMemory("cuda")
        for attempt, fails_at in ((memory.fill, 2), (memory.pin_in_place, 0)):
            cudart = FakeCudart(fails_at)
            monkeypatch.setattr(torch.cuda, "cudart", lambda cudart=cudart: cudart)
            with pytest.raises(RuntimeError, match=match):
                attempt(sources if attempt == memory.fill else open_files([path]))
            assert cudart.registered == {}
            assert not any(map(is_mapped, arenas))
        assert path.exists()
        assert memory.usage == MemoryUsage(0, 0)

    def test_npu_pins_through_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def empty(nbytes: int, *, dtype: torch.dtype, pin_memory: bool = False) -> torch.Tensor:
            asked.append((nbytes, pin_memory))
            return torch.zeros(nbytes, dtype=dtype)

        monkeypatch.setattr(torch, "empty", empty)
        memory = HostMemory("npu")
        buffers = memory.fill(tensor_sources({"w": torch.ones(100)}))
        assert asked == [(512, True)]
        assert contents(buffers) == {"w": raw(torch.ones(100))}
        memory.release(buffers)
        assert memory.usage == MemoryUsage(0, 0)


PEAK_PROGRAM = """
import sys
from checkpoint_engine.memory.files import open_files
from checkpoint_engine.memory.host_memory import HostMemory

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

memory, sources = HostMemory("cpu"), open_files(sys.argv[1:])
before = status("VmRSS:")
buffers = memory.fill(sources)
held = status("VmRSS:")
memory.release(buffers)
print(before, status("VmHWM:"), held, status("VmRSS:"))
"""


def test_memory_peak_is_the_checkpoint(tmp_path: Path) -> None:
    """Files are not read through memory of their own, and nothing stays behind."""
    nbytes = 96 << 20
    path = tmp_path / "a.safetensors"
    save_file({f"w{i}": torch.zeros(nbytes // 12, dtype=torch.uint8) for i in range(12)}, path)
    program = subprocess.run(
        [sys.executable, "-c", PEAK_PROGRAM, str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=50,
    )
    before, peak, held, after = map(int, program.stdout.split())
    slack = 16 << 20
    assert nbytes <= held - before <= nbytes + slack
    assert peak - before <= nbytes + slack
    assert after - before <= slack


def test_memory_of_many_sizes_leaves_nothing_to_the_collector() -> None:
    """Trainers have it off for long, and checkpoints change their size."""
    arenas = Arenas("cpu")
    arenas.new(mmap.PAGESIZE)
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(one, type) for one in gc.get_objects())
        for pages in range(2, 50):
            arenas.new(pages * mmap.PAGESIZE).memory.fill_(1)
        assert sum(isinstance(one, type) for one in gc.get_objects()) == before
    finally:
        gc.enable()


def test_metas_round_trip_through_json() -> None:
    (metas,) = pack(tensor_sources({"w": torch.ones(2, 3, dtype=torch.bfloat16)}))
    assert ParameterMeta.model_validate_json(metas[0].model_dump_json()) == metas[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnGpu:
    def test_fill_from_device_and_host(self) -> None:
        base = any_bits(torch.int32, (64, 1024, 33)).cuda()
        tensors = {
            "plain": base,
            "transposed": base[0].t(),
            "bf16": base.view(torch.bfloat16)[:, :, ::2],
            "conj": base[:, :, :2].contiguous().view(torch.complex64).nan_to_num().conj(),
            "scalar": base[0, 0, 0],
            "empty": base[:0],
            "host": any_bits(torch.float32, (1000, 77)),
        }
        memory = HostMemory("cuda", retain_bytes=1 << 30)
        for _ in range(2):  # fresh, then retained
            buffers = memory.fill(tensor_sources(tensors))
            assert contents(buffers) == {name: raw(tensor) for name, tensor in tensors.items()}
            assert all(buffer.buffer.is_pinned() for buffer in buffers)
            memory.release(buffers)
        memory.trim()

    def test_waits_for_the_work_that_makes_the_source(self) -> None:
        value = torch.zeros(1 << 26, device="cuda")
        for _ in range(200):
            value += 1
        memory = HostMemory("cuda")
        (buffer,) = memory.fill(tensor_sources({"w": value}))
        assert buffer.buffer.view(torch.float32).unique().tolist() == [200]
        memory.release([buffer])

    def test_many_times(self, arenas: list[int]) -> None:
        memory = HostMemory("cuda")
        tensors = {f"w{i}": torch.full((1 << 20,), float(i)) for i in range(20)}
        for _ in range(5):
            buffers = memory.fill(tensor_sources(tensors))
            there = torch.cat([b.buffer.cuda(non_blocking=True) for b in buffers])
            assert there.view(torch.float32)[:: 1 << 20].tolist() == [float(i) for i in range(20)]
            memory.release(buffers)
        assert not any(map(is_mapped, arenas))

    def test_in_place(self, shm: Path) -> None:
        tensor = any_bits(torch.float32, (1 << 20,))
        path = write_safetensors(shm / "a.safetensors", {"w": tensor})
        memory = HostMemory("cuda")
        (buffer,) = memory.pin_in_place(open_files([path]))
        assert not path.exists()
        assert buffer.buffer.is_pinned()
        assert raw(buffer.buffer.cuda()[: tensor.nbytes]) == raw(tensor)
        memory.release([buffer])

    def test_a_refused_registration_leaves_cuda_usable(self) -> None:
        arena = Arenas("cuda").new(1 << 20)
        arena.pin()
        with pytest.raises(RuntimeError, match="cudaHostRegister of 1048576 bytes failed with"):
            arena_module._cuda_register(arena.memory.data_ptr(), arena.nbytes)
        assert (torch.ones(3, device="cuda") + 1).sum().item() == 6
        arena.free()

    def test_under_a_limit_of_locked_memory(self) -> None:
        """Whether it is for what CUDA registers depends on the driver: pinned, or an error that
        says it."""
        program = """
import os, resource, torch
from checkpoint_engine.memory.sources import tensor_sources
from checkpoint_engine.memory.host_memory import HostMemory
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 16))
if os.getuid() == 0:
    os.setuid(65534)  # root may lock all memory
memory = HostMemory("cuda")
try:
    (buffer,) = memory.fill(tensor_sources({"w": torch.ones(1 << 24)}))
    print("pinned" if buffer.buffer.is_pinned() else "not pinned")
except RuntimeError as error:
    print("error", error)
    print("left", memory.usage)
"""
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
        )
        print(done.stdout)
        assert re.fullmatch(
            r"pinned|error cudaHostRegister .*RLIMIT_MEMLOCK is 65536 bytes.*"
            r"left MemoryUsage\(in_use=0, retained=0\)",
            done.stdout.strip(),
            re.DOTALL,
        ), done.stdout + done.stderr
