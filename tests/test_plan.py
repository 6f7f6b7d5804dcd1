from __future__ import annotations

import itertools
import random
import sys
from collections import Counter
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.data_types import (
    ALIGNMENT,
    H2DBucket,
    MemoryBufferMetaList,
    MemoryBufferMetas,
    ParameterMeta,
    align_up,
)
from checkpoint_engine.planning import plan
from checkpoint_engine.planning.layouts import layouts_of
from checkpoint_engine.planning.plan import BucketSize

A = ALIGNMENT
quick = settings(deadline=None, max_examples=60)

Metas = dict[int, MemoryBufferMetaList]
Owned = list[tuple[list[int], bool]]
"""Of each host buffer: its tensors' bytes, and whether it ends where its last tensor does."""


def meta(name: str, nbytes: int) -> ParameterMeta:
    return ParameterMeta(name=name, dtype=torch.uint8, shape=torch.Size([nbytes]))


def owned(rank: int, buffers: Owned) -> MemoryBufferMetaList:
    listed = []
    for index, (sizes, short) in enumerate(buffers):
        metas = [meta(f"{rank}.{index}.{i}", size) for i, size in enumerate(sizes)]
        size = sum(one.aligned_size for one in metas)
        if short and sizes:
            size -= align_up(sizes[-1]) - sizes[-1]
        listed.append(MemoryBufferMetas(metas=metas, ptr=0, size=size))
    return MemoryBufferMetaList(
        p2p_store_addr=None, memory_buffer_metas_list=listed, rdma_device=""
    )


tensor_bytes = st.one_of(st.just(0), st.integers(1, 300), st.integers(300, 5000))
host_buffers = st.lists(st.tuples(st.lists(tensor_bytes, max_size=8), st.booleans()), max_size=4)
worlds = st.dictionaries(st.integers(0, 7), host_buffers, max_size=5).map(
    lambda parts: {rank: owned(rank, buffers) for rank, buffers in parts.items()}
)


def names_of(owner: MemoryBufferMetaList) -> list[str]:
    return [one.name for buffer in owner.memory_buffer_metas_list for one in buffer.metas]


def fetch(owner: MemoryBufferMetaList, memory: list[bytes], bucket: H2DBucket) -> bytes:
    """What an owner's host memory holds at the bucket's ranges, as the server copies it."""
    held = bytearray()
    for index, offset, size in bucket.ranges:
        assert size > 0
        assert offset + size <= owner.memory_buffer_metas_list[index].size
        held += memory[index][offset : offset + size].ljust(align_up(size), b"\0")
    return bytes(held)


# ---------------------------------------------------------------------- buckets


@quick
@given(worlds, st.integers(20, 200).map(lambda n: n * A))
def test_buckets_hold_every_tensor_once_in_order(metas: Metas, size: int) -> None:
    buckets = plan.gen_h2d_buckets(metas, size, {}, {})
    for receiver, owner, bucket in buckets:
        assert receiver == owner
        assert bucket.items
        assert bucket.size == sum(one.aligned_size for one in bucket.items) <= size
    for rank, owner in metas.items():
        mine = [one.name for _, by, bucket in buckets if by == rank for one in bucket.items]
        assert mine == names_of(owner)


@quick
@given(worlds, st.integers(20, 60).map(lambda n: n * A))
def test_buckets_are_full(metas: Metas, size: int) -> None:
    """The tensor behind a bucket would not have fitted into it."""
    buckets = plan.gen_h2d_buckets(metas, size, {}, {})
    for (_, owner, bucket), (_, next_owner, following) in itertools.pairwise(buckets):
        if owner == next_owner:
            assert bucket.size + following.items[0].aligned_size > size


@quick
@given(host_buffers, st.integers(20, 60).map(lambda n: n * A), st.randoms(use_true_random=False))
def test_ranges_cover_exactly_the_bytes_of_the_items(
    buffers: Owned, size: int, rng: random.Random
) -> None:
    owner = owned(0, buffers)
    memory = [rng.randbytes(buffer.size) for buffer in owner.memory_buffer_metas_list]
    content = {}
    for buffer, held in zip(owner.memory_buffer_metas_list, memory, strict=True):
        start = 0
        for one in buffer.metas:
            content[one.name] = held[start : start + one.shape[0]]
            start += one.aligned_size
    for _, _, bucket in plan.gen_h2d_buckets({0: owner}, size, {}, {}):
        flat = fetch(owner, memory, bucket)
        assert len(flat) == bucket.size
        for entry in plan.to_named_tensor(bucket.items, 0):
            end = entry["offset"] + entry["shape"].numel()
            assert flat[entry["offset"] : end] == content[entry["name"]]


def test_a_bucket_spans_host_buffers() -> None:
    owner = owned(0, [([256, 300], False), ([], False), ([0], False), ([100, 256], True)])
    ((_, _, bucket),) = plan.gen_h2d_buckets({0: owner}, 4096, {}, {})
    assert bucket.ranges == [(0, 0, 768), (3, 0, 512)]


def test_a_buffer_that_ends_inside_its_last_tensors_padding() -> None:
    owner = owned(0, [([256, 300], True), ([10], True)])
    ((_, _, bucket),) = plan.gen_h2d_buckets({0: owner}, 4096, {}, {})
    assert bucket.ranges == [(0, 0, 556), (1, 0, 10)]
    assert bucket.size == 1024


def test_tensors_without_elements_and_owners_with_nothing() -> None:
    metas = {0: owned(0, []), 1: owned(1, [([0, 0], False)]), 2: owned(2, [([], False)])}
    ((receiver, owner, bucket),) = plan.gen_h2d_buckets(metas, A, {}, {})
    assert (receiver, owner, bucket.size, bucket.ranges) == (1, 1, 0, [])
    assert [one.name for one in bucket.items] == ["1.0.0", "1.0.1"]
    transfer = plan.plan_transfer({}, BucketSize(A, True), {}, {})
    assert (transfer.steps, transfer.total_bytes, transfer.tensor_count) == ((), 0, 0)
    assert transfer.bucket_bytes > 0


def test_a_tensor_larger_than_the_bucket_is_named() -> None:
    with pytest.raises(ValueError, match=r"'3\.0\.1' of rank 3 takes 1024 bytes.*bucket of 512"):
        plan.gen_h2d_buckets({3: owned(3, [([5, 1000], False)])}, 512, {}, {})


def test_a_tensor_of_exactly_the_bucket() -> None:
    buckets = plan.gen_h2d_buckets({0: owned(0, [([1, 1024, 1], False)])}, 1024, {}, {})
    assert [bucket.size for _, _, bucket in buckets] == [256, 1024, 256]


# ---------------------------------------------------------------------- bucket size

sizes = st.one_of(st.integers(0, 64), st.integers(0, 1 << 20), st.integers(0, 1 << 38))


@settings(deadline=None, max_examples=300)
@given(
    free=sizes,
    largest=st.one_of(st.integers(0, 300), st.integers(0, 1 << 30)).map(lambda n: n * A),
    cap=sizes,
)
def test_bucket_size_follows_the_specification(free: int, largest: int, cap: int) -> None:
    staging = largest <= free // (3 * A) * A
    limit = free // (3 * A) * A if staging else free // (2 * A) * A
    if largest > limit:
        with pytest.raises(ValueError, match=rf"{largest} bytes.*{free} bytes.*{limit}"):
            plan.bucket_size(free, largest, cap)
        return
    size = plan.bucket_size(free, largest, cap)
    assert size.staging == staging
    assert size.bytes % A == 0
    assert largest <= size.bytes <= limit
    assert size.bytes == min(max(cap // A * A, largest, A), limit)
    assert size.bytes * (3 if staging else 2) <= free


FREE = 3 * A * 1000 + 77


@pytest.mark.parametrize(
    ("free", "largest", "cap", "expected"),
    [
        (FREE, 1000 * A, 1 << 40, BucketSize(1000 * A, True)),
        (FREE, 1000 * A, 10, BucketSize(1000 * A, True)),
        (FREE, 1001 * A, 1 << 40, BucketSize(1500 * A, False)),
        (FREE, 1500 * A, 0, BucketSize(1500 * A, False)),
        (FREE, A, 10 * A + 255, BucketSize(10 * A, True)),
        (FREE, 20 * A, 10 * A + 255, BucketSize(20 * A, True)),
        (3 * A - 1, 0, 1 << 30, BucketSize(0, True)),
        (2 * A, A, 1 << 30, BucketSize(A, False)),
    ],
)
def test_bucket_size_at_its_boundaries(
    free: int, largest: int, cap: int, expected: BucketSize
) -> None:
    assert plan.bucket_size(free, largest, cap) == expected


def test_too_little_memory_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="free device memory or raise mem_fraction"):
        plan.bucket_size(FREE, 1501 * A, 1 << 30)


@quick
@given(worlds)
def test_largest_tensor(metas: Metas) -> None:
    every = [
        one.aligned_size
        for owner in metas.values()
        for buffer in owner.memory_buffer_metas_list
        for one in buffer.metas
    ]
    assert plan.largest_tensor(metas) == max(every, default=0)
    assert plan.extent(metas) == (sum(every), max(every, default=0))
    each = [layout.extent for layout in layouts_of(metas).values()]
    assert sum(total for total, _ in each) == sum(every)
    assert max((largest for _, largest in each), default=0) == max(every, default=0)


# ---------------------------------------------------------------------- rounds


@quick
@given(worlds, st.integers(20, 60).map(lambda n: n * A), st.booleans())
def test_steps_come_in_rounds(metas: Metas, size: int, staging: bool) -> None:
    transfer = plan.plan_transfer(metas, BucketSize(size, staging), {}, {})
    cut = plan.gen_h2d_buckets(metas, size, {}, {})
    assert transfer.staging == staging
    assert [step.slot for step in transfer.steps] == [i % 2 for i in range(len(cut))]
    assert transfer.bucket_bytes % A == 0
    assert all(step.bucket.size <= transfer.bucket_bytes <= size for step in transfer.steps)
    for rank in metas:
        mine = [bucket for receiver, _, bucket in cut if receiver == rank]
        assert [step.bucket for step in transfer.loads_of(rank)] == mine
    assert transfer.tensor_count == sum(len(bucket.items) for _, _, bucket in cut)
    assert transfer.total_bytes == sum(bucket.size for _, _, bucket in cut)
    left = Counter(receiver for receiver, _, _ in cut)
    steps = iter(transfer.steps)
    while left:
        this_round = [next(steps).receiver for _ in range(len(left))]
        assert set(this_round) == set(left)
        left = +(left - Counter(this_round))


def test_the_plan_is_the_same_on_every_rank() -> None:
    def made() -> plan.TransferPlan:
        metas = {rank: owned(rank, [([1, 500, 70], False)] * 3) for rank in range(4)}
        return plan.plan_transfer(metas, BucketSize(1024, False), {}, {})

    assert made() == made()


# ---------------------------------------------------------------------- receivers


@quick
@given(data=st.data())
def test_receivers(data: st.DataObject) -> None:
    nics = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    ranks = iter(range(100))
    remote = {f"r{i}": {next(ranks) for _ in range(n)} for i, n in enumerate(nics)}
    owners = [rank for group in remote.values() for rank in group]
    local = {f"l{i}": {2 * i, 2 * i + 1} for i in range(data.draw(st.integers(1, 6)))}
    buckets = [(data.draw(st.sampled_from(owners)), f"b{i}") for i in range(20)]
    assigned = plan.assign_receiver_ranks(buckets, local, remote)
    assert Counter((owner, bucket) for _, owner, bucket in assigned) == Counter(buckets)
    allowed = [min(group) for group in local.values()][: len(remote)]
    assert {receiver for receiver, _, _ in assigned} <= set(allowed)
    nic_of = {rank: nic for nic, group in remote.items() for rank in group}
    busy: set[str] = set()
    for receiver, owner, _ in assigned:
        if receiver == allowed[0]:
            busy.clear()
        assert nic_of[owner] not in busy
        busy.add(nic_of[owner])
        assert receiver == allowed[len(busy) - 1]


@pytest.mark.parametrize("receivers", [1, 2, 4, 8])
def test_receivers_are_balanced(receivers: int) -> None:
    metas = {rank: owned(rank, [([256] * 16, False)]) for rank in range(8)}
    local = {f"l{i}": {i} for i in range(receivers)}
    remote = {f"r{i}": {i} for i in range(8)}
    buckets = plan.gen_h2d_buckets(metas, 256, local, remote, ranks=list(range(receivers)))
    loads = Counter(receiver for receiver, _, _ in buckets)
    assert set(loads.values()) == {8 * 16 // receivers}
    transfer = plan.plan_transfer(
        metas, BucketSize(256, True), local, remote, ranks=list(range(receivers))
    )
    for start in range(0, len(transfer.steps), receivers):
        this_round = transfer.steps[start : start + receivers]
        assert len({step.receiver for step in this_round}) == receivers


def test_only_the_given_ranks_receive() -> None:
    metas = {0: owned(0, [([256] * 6, False)]), 1: owned(1, [([256] * 6, False)])}
    local = {"a": {4, 5}, "b": {6, 7}, "c": {8}}
    remote = {"x": {0}, "y": {1}}
    buckets = plan.gen_h2d_buckets(metas, 256, local, remote, ranks=[5, 7])
    assert {receiver for receiver, _, _ in buckets} == {5, 7}
    assert plan.gen_h2d_buckets(metas, 256, local, remote, ranks=[]) == (
        plan.gen_h2d_buckets(metas, 256, local, remote)
    )


def test_nobody_to_receive() -> None:
    metas = {0: owned(0, [([1], False)])}
    with pytest.raises(ValueError, match="no rank to receive"):
        plan.gen_h2d_buckets(metas, 256, {"a": {1}}, {"x": {0}}, ranks=[9])
    with pytest.raises(ValueError, match="no rank to receive"):
        plan.assign_receiver_ranks([(0, "b")], {"a": set()}, {"x": {0}})
    assert plan.assign_receiver_ranks([], {}, {}) == []


def test_an_owner_on_no_nic() -> None:
    with pytest.raises(ValueError, match="rank 5 owns a bucket but is on no NIC"):
        plan.assign_receiver_ranks([(5, "b")], {"a": {0}}, {"x": {0}})


# ---------------------------------------------------------------------- scale


def test_planning_kimi_k2_is_linear_in_tensors() -> None:
    """138,000 tensors over 256 owners. Counts calls: a clock would test the machine."""
    per_owner = 138_000 // 256
    shapes = [torch.Size([1]), torch.Size([7168]), torch.Size([7168, 2048])]
    metas = {}
    for rank in range(256):
        listed = [
            ParameterMeta(name=f"{rank}.{i}", dtype=torch.int8, shape=shapes[i % 3])
            for i in range(per_owner)
        ]
        total = sum(one.aligned_size for one in listed)
        buffer = MemoryBufferMetas.model_construct(metas=listed, ptr=0, size=total)
        metas[rank] = MemoryBufferMetaList.model_construct(
            p2p_store_addr=None, memory_buffer_metas_list=[buffer], rdma_device=""
        )
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        transfer = plan.plan_transfer(metas, BucketSize(2 << 30, True), {}, {})
    finally:
        sys.setprofile(None)
    assert transfer.tensor_count == 256 * per_owner
    assert {step.receiver for step in transfer.steps} == set(range(256))
    assert calls < 5 * transfer.tensor_count
