"""Sums of registered bytes: what they notice, and that they add up."""

from __future__ import annotations

import base64
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.data_types import (
    BucketRange,
    H2DBucket,
    MemoryBuffer,
    MemoryBufferMetaList,
    MemoryBufferMetas,
    ParameterMeta,
)
from checkpoint_engine.ground.checksum import check_bytes, checksum
from checkpoint_engine.memory import checksum as module
from checkpoint_engine.memory import layout
from checkpoint_engine.memory.checkpoints import Checkpoint
from checkpoint_engine.memory.checksum import add_sums, sum_of, sums_of
from checkpoint_engine.memory.host_memory import HostMemory
from checkpoint_engine.memory.sources import tensor_sources
from checkpoint_engine.planning.plan import gen_h2d_buckets


def random_bytes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


@given(st.integers(0, 700), st.integers(0, 2**40), st.integers(0, 20))
def test_a_sum_is_that_of_its_parts(count: int, first: int, cut: int) -> None:
    memory = random_bytes(8 * count)
    count = len(memory)
    cut = min(cut * 256, count)
    parts = checksum(memory[:cut], first) + checksum(memory[cut:], first + cut // 256)
    assert checksum(memory, first) == parts % 2**64


@given(st.integers(0, 4095), st.integers(0, 7))
def test_every_single_bit_counts(place: int, bit: int) -> None:
    memory = random_bytes(4096)
    before = checksum(memory, 3)
    memory[place] ^= 1 << bit
    assert checksum(memory, 3) != before


@pytest.mark.parametrize("value", [None, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_that_are_zeroed_doubled_or_exchanged(dtype: torch.dtype, value: float) -> None:
    memory = random_bytes(4096)
    if value is not None:
        memory.view(dtype)[: 256 // dtype.itemsize] = value
    before = checksum(memory, 0)
    first, second = memory[:256].clone(), memory[256:512].clone()
    for one, other in ((torch.zeros_like(first), second), (second, second), (second, first)):
        changed = torch.cat([one, other, memory[512:]])
        assert checksum(changed, 0) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [128, 1024])
def test_rows_that_are_exchanged(dtype: torch.dtype, size: int) -> None:
    """Of an identity matrix, whose rows differ in where their only one is."""
    matrix = torch.eye(size, dtype=dtype)
    before = checksum(matrix.view(-1).view(torch.uint8), 7)
    rows = torch.randperm(size, generator=torch.Generator().manual_seed(size))[:60]
    for one, other in rows.view(-1, 2).tolist():
        changed = matrix.clone()
        changed[[one, other]] = matrix[[other, one]]
        assert checksum(changed.view(-1).view(torch.uint8), 7) != before


def test_a_block_in_reverse_and_changes_that_cancel_each_other() -> None:
    memory = random_bytes(8192)
    words = memory.view(torch.int64)
    before = checksum(memory, 0)
    words[:32] = words[:32].flip(0)
    assert checksum(memory, 0) != before
    before = checksum(memory, 0)
    words[100:106:2] += torch.tensor([1, -2, 1])
    assert checksum(memory, 0) != before


def test_a_place_counts() -> None:
    memory = random_bytes(512)
    assert checksum(memory, 0) != checksum(memory, 1)


def test_memory_may_begin_anywhere() -> None:
    memory = random_bytes(4099)
    assert checksum(memory[3:], 1) == checksum(memory[3:].clone(), 1)
    assert checksum(memory[3:-256], 1) == checksum(memory[3:-256].clone(), 1)


@pytest.mark.gpu
def test_a_sum_on_a_gpu_is_that_on_the_host() -> None:
    memory = random_bytes(256 * 1000 + 24)
    assert checksum(memory.cuda(), 5) == checksum(memory, 5)


@given(st.lists(st.integers(0, 700), max_size=12), st.integers(4, 30))
def test_buckets_of_a_checkpoint_add_up(sizes: list[int], bucket: int) -> None:
    tensors = {f"t{i:02}": random_bytes(size, i) for i, size in enumerate(sizes)}
    buffers = HostMemory("cpu").fill(tensor_sources(tensors))
    add_sums(buffers)
    owned = [
        MemoryBufferMetas(
            metas=b.metas, ptr=b.buffer.data_ptr(), size=b.size, checksums=b.checksums
        )
        for b in buffers
        if b.metas
    ]
    metas = {
        0: MemoryBufferMetaList(p2p_store_addr="", memory_buffer_metas_list=owned, rdma_device="")
    }
    sums = sums_of(0, metas[0])
    for _, _, one in gen_h2d_buckets(metas, bucket * 256, {"": {0}}, {"": {0}}):
        expected = sum_of(sums, one)
        memory = torch.cat(
            [buffers[index].buffer[at : at + count] for index, at, count in one.ranges]
            or [torch.empty(0, dtype=torch.uint8)]
        )
        if expected is None:
            assert one.size == 0
            continue
        check_bytes(memory, *expected, "it")
        memory[-1] ^= 1
        with pytest.raises(ValueError, match="not those that were registered"):
            check_bytes(memory, *expected, "it")


META = ParameterMeta(name="w", dtype=torch.uint8, shape=torch.Size([200]))


def test_gaps_between_ranges_are_zero_in_a_bucket() -> None:
    """The sums count padding, and a file that is pinned in place may have no room for it."""
    memory = torch.full((300,), 7, dtype=torch.uint8)
    buffers = [MemoryBuffer(buffer=memory[:n], size=n, metas=[META]) for n in (200, 300)]
    ranges = [BucketRange(0, 0, 200), BucketRange(1, 0, 300)]
    target = torch.full((768,), 255, dtype=torch.uint8)
    checkpoint = Checkpoint("c", buffers, describe=Mock())
    checkpoint.copy(H2DBucket(size=768, ranges=ranges, items=[META, META]), target)
    assert torch.equal(target, torch.tensor([7] * 200 + [0] * 56 + [7] * 300 + [0] * 212).byte())


def test_sums_of_fewer_tensors_than_there_are_is_an_error() -> None:
    buffers = HostMemory("cpu").fill(tensor_sources({"a": torch.ones(9), "b": torch.ones(9)}))
    add_sums(buffers)
    (whole,) = buffers
    assert whole.checksums is not None
    formula, _, sums = whole.checksums.partition(":")
    half = base64.b64encode(base64.b64decode(sums)[:8]).decode()
    metas = MemoryBufferMetas(metas=whole.metas, ptr=0, size=512, checksums=f"{formula}:{half}")
    owner = MemoryBufferMetaList(
        p2p_store_addr="", memory_buffer_metas_list=[metas], rdma_device=""
    )
    with pytest.raises(ValueError, match="owner 0 has 1 sums of 2 tensors"):
        sums_of(0, owner)


def splitmix(place: int) -> int:
    z = (place + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return (z ^ z >> 31) | 1


FACTORS = [splitmix(place) for place in range(2047)]


def by_definition(memory: torch.Tensor, first_block: int) -> int:
    raw = memory.numpy().tobytes()
    words = [int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw), 8)]
    first = 32 * first_block
    return sum(FACTORS[(first + i) % 2047] * word for i, word in enumerate(words)) % 2**64


@given(st.integers(0, 6000), st.integers(0, 2**40))
def test_a_sum_is_that_of_its_words(count: int, first: int) -> None:
    memory = random_bytes(8 * count)
    assert checksum(memory, first) == by_definition(memory, first)


SIZES = [70_000, 5, 0, 300_000, 256, 16, 500_000, 3, 8192, 2047 * 256, 0]


@pytest.mark.parametrize("piece", [32, 512, 2047, 1 << 14, 1 << 22])
@pytest.mark.parametrize("block", [32, 4000, 1 << 19])
@pytest.mark.parametrize("large", [1, 1 << 15])
def test_tensors_of_any_size_in_pieces_of_any_size(
    monkeypatch: pytest.MonkeyPatch, piece: int, block: int, large: int
) -> None:
    """``large``: summed one by one, or all at once."""
    monkeypatch.setattr(module, "_LARGE", large)
    monkeypatch.setattr(module, "_BLOCK", block)
    monkeypatch.setattr(module, "_SMALLEST_PIECE", piece)
    monkeypatch.setattr(module, "_LARGEST_PIECE", piece)
    monkeypatch.setattr(layout, "MAX_BUFFER_BYTES", 600_000)
    tensors = {f"t{i:02}": random_bytes(size, i) for i, size in enumerate(SIZES)}
    buffers = HostMemory("cpu").fill(tensor_sources(tensors))
    assert len(buffers) > 1
    add_sums(buffers)
    place = 0
    for buffer in buffers:
        assert buffer.checksums is not None
        formula, _, text = buffer.checksums.partition(":")
        assert formula == module.FORMULA
        sums = np.frombuffer(base64.b64decode(text), dtype="<u8").tolist()
        at = 0
        for meta, found in zip(buffer.metas, sums, strict=True):
            memory = buffer.buffer[at : at + meta.aligned_size]
            assert found == by_definition(memory, place), meta.name
            at += meta.aligned_size
            place += meta.aligned_size // 256
