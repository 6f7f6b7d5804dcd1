"""What a host reads from where, as data: needs, their union, and who stages which bucket."""

from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.data_types import (
    MemoryBufferMetaList,
    MemoryBufferMetas,
    TensorPart,
    align_up,
    make_metas,
    placed,
    tensor_nbytes,
)
from checkpoint_engine.errors import CollectiveError
from checkpoint_engine.ground import needs as needs_module
from checkpoint_engine.ground.needs import Needs, Region, runs_of, tensors_digest
from checkpoint_engine.planning import shards
from checkpoint_engine.planning.layouts import layouts_of
from checkpoint_engine.planning.plan import BucketSize, TransferPlan, plan_transfer
from checkpoint_engine.planning.shards import HostNeeds, Tensors, as_held_by, places_in, share
from test_plan import owned

quick = settings(deadline=None, max_examples=60)
NBYTES = 1 << 12


def tensor(name: str, nbytes: int) -> tuple[str, torch.dtype, tuple[int, ...]]:
    return name, torch.uint8, (nbytes,)


@st.composite
def regions(draw: Any, nbytes: int = NBYTES) -> Region:
    """Within a tensor, of up to two repeats; they may overlap each other."""
    length = draw(st.integers(0, nbytes // 8))
    counts, strides, left = [], [], nbytes - length
    for _ in range(draw(st.integers(0, 2))):
        count = draw(st.integers(1, 5))
        stride = draw(st.integers(1, max(1, left // max(1, count))))
        if (count - 1) * stride > left:
            continue
        left -= (count - 1) * stride
        counts.append(count)
        strides.append(stride)
    return Region(draw(st.integers(0, left)), length, tuple(counts), tuple(strides))


def bytes_of(region: Region) -> set[int]:
    starts = {
        region.offset + sum(i * s for i, s in zip(index, region.strides, strict=True))
        for index in itertools.product(*map(range, region.counts))
    }
    return {start + i for start in starts for i in range(region.length)}


def covered(runs: tuple[np.ndarray, np.ndarray]) -> set[int]:
    return {i for begin, end in zip(*runs, strict=True) for i in range(begin, end)}


@quick
@given(st.lists(regions(), max_size=4), st.sampled_from([0, 1, 64]))
def test_runs_are_the_bytes_of_all_regions(some: list[Region], gap: int) -> None:
    runs = runs_of(some, NBYTES, gap)
    wanted = set().union(*map(bytes_of, some)) if some else set()
    begins, ends = runs
    assert (begins < ends).all()
    assert (begins[1:] > ends[:-1] + gap).all()
    if gap == 0:
        assert covered(runs) == wanted
    assert wanted <= covered(runs)
    extra = sorted(covered(runs) - wanted)
    longest = max(
        (len(list(g)) for _, g in itertools.groupby(enumerate(extra), lambda p: p[1] - p[0])),
        default=0,
    )
    assert longest <= gap


def test_a_region_beyond_its_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="reaches beyond"):
        runs_of([Region(NBYTES - 1, 2, (), ())], NBYTES, 0)
    with pytest.raises(ValueError, match="reaches beyond"):
        runs_of([Region(0, 1, (2, 1 << 40), (1, 0))], NBYTES, 0)


def test_every_second_element_of_a_large_tensor_takes_no_memory() -> None:
    """As a loader reads that parts gates from ups: runs of two bytes, half a million of each."""
    nbytes = 1 << 21
    halves = [Region(offset, 2, (nbytes // 4,), (4,)) for offset in (0, 2)]
    tracemalloc.start()
    try:
        begins, ends = runs_of(halves, nbytes, shards.SHORTEST_GAP)
        assert (begins.tolist(), ends.tolist()) == ([0], [nbytes])
        with pytest.raises(ValueError, match="reaches beyond"):
            runs_of([Region(0, 1, (1000, 1000), (1, 0))], 999, 0)
        with pytest.raises(ValueError, match="reaches beyond"):  # the same bytes again and again
            runs_of([Region(0, 1, (10, 10, 10, 10), (10_000,) * 4)], nbytes, shards.SHORTEST_GAP)
        assert tracemalloc.get_traced_memory()[1] < nbytes // 4
    finally:
        tracemalloc.stop()


def test_what_is_too_much_to_be_told_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server would refuse it, and every update with it."""
    read = {tensor(f"t{i}", NBYTES): [Region(i, 1, (), ())] for i in range(200)}
    needs = Needs.of(read)
    assert needs is not None
    monkeypatch.setattr(needs_module, "_LARGEST", 2_000)
    with pytest.raises(ValueError, match="not what a worker needs"):
        Needs.decode(needs.text)
    assert Needs.of(read) is None


@quick
@given(st.lists(st.lists(regions(), max_size=3), min_size=1, max_size=6))
def test_needs_survive_the_wire(some: list[list[Region]]) -> None:
    read = {tensor(f"t{i}", NBYTES): one for i, one in enumerate(some)}
    needs = Needs.of(read)
    again = Needs.of(dict(reversed([(key, one[::-1]) for key, one in read.items()])))
    assert needs is not None
    assert again is not None
    found = Needs.decode(needs.text)
    assert found == needs == again
    assert found.digest == again.digest
    changed = {**read, tensor("t0", NBYTES): [*some[0], Region(3, 5, (), ())]}
    other = Needs.of(changed)
    assert other is not None
    assert other.digest != needs.digest


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "eNo=",
        Needs("t", ((Region(0, 1, (), ()),),), b"\1\0\0\0").text,
        Needs("t", (), b"abc").text,
        Needs("t", ((Region(-1, 1, (), ()),),), b"\0\0\0\0").text,
        Needs("t", ((Region(0, 1, (1,), ()),),), b"\0\0\0\0").text,
    ],
)
def test_what_is_no_statement_of_needs_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not what a worker needs"):
        Needs.decode(text)


# ---------------------------------------------------------------------- who stages what


@st.composite
def worlds(draw: Any) -> tuple[Any, list[list[int]], TransferPlan, set[str]]:
    hosts: list[list[int]] = []
    for _ in range(draw(st.integers(1, 4))):
        first = sum(map(len, hosts))
        hosts.append(list(range(first, first + draw(st.integers(1, 3)))))
    ranks = [rank for host in hosts for rank in host]
    sizes = st.lists(
        st.tuples(st.lists(st.integers(0, 3000), min_size=1, max_size=6), st.booleans()), max_size=2
    )
    metas = {rank: owned(rank, draw(sizes)) for rank in ranks}
    metas = {rank: one for rank, one in metas.items() if one.memory_buffer_metas_list}
    duplicates: set[str] = set()
    for rank in list(metas):  # a copy of all that another rank owns
        if draw(st.booleans()) and draw(st.booleans()):
            to = draw(st.sampled_from(ranks))
            if to != rank and to not in duplicates and to not in metas:
                metas[to] = metas[rank]
                duplicates |= {
                    m.name for b in metas[rank].memory_buffer_metas_list for m in b.metas
                }
    metas = {rank: metas[rank] for rank in sorted(metas)}
    cut = draw(st.booleans())
    size = BucketSize(draw(st.sampled_from([1024, 2048])) if cut else 4096, True)
    nics = {f"rank-{rank}": {rank} for rank in ranks}
    plan = plan_transfer(metas, size, nics, nics, may_cut=cut, duplicates=duplicates)
    return metas, hosts, plan, duplicates


@quick
@given(worlds(), st.integers(0, 3))
def test_every_bucket_is_staged_once_on_each_host(world: Any, number: int) -> None:
    metas, hosts, plan, duplicates = world
    here = number % len(hosts)
    found = share(plan, hosts, here, metas, duplicates)
    assert found == share(plan, hosts, here, metas, duplicates)
    assert Counter(id(s.bucket) for s in found.steps) == Counter(id(s.bucket) for s in plan.steps)
    for index, step in enumerate(found.steps):
        assert step.slot == index % 2
        assert step.receiver in hosts[here]
        sources = step.sources
        names = {m.name for m in step.bucket.items}
        for rank in sources:
            assert names <= {m.name for b in metas[rank].memory_buffer_metas_list for m in b.metas}
        inside = set(sources) & set(hosts[here])
        assert inside in (set(), {step.receiver})
        if step.owner in hosts[here]:
            assert sources == (step.receiver,)
    parts = [s for s in found.steps if isinstance(s.bucket, TensorPart)]
    tensors: dict[tuple[str, int], list[Any]] = defaultdict(list)
    for step in parts:
        tensors[step.bucket.items[0].name, step.owner].append(step)
    for some in tensors.values():
        assert len({s.receiver for s in some}) == 1
        assert [s.bucket.begin for s in some] == sorted(s.bucket.begin for s in some)


@quick
@given(worlds())
def test_another_owner_is_read_where_it_has_the_bytes(world: Any) -> None:
    """By copying them out of memory where each owner's bytes tell name and place."""
    metas, hosts, plan, duplicates = world
    found = share(plan, hosts, 0, metas, duplicates)
    for step in found.steps:
        for rank in step.sources:
            bucket = as_held_by(metas[rank], places_in(metas[rank]), step.bucket)
            wanted = [one.name for one in step.bucket.items]
            for part, name in zip(bucket.ranges, wanted, strict=True):
                buffer = metas[rank].memory_buffer_metas_list[part.idx]
                at = {m.name: s for s, m in placed(buffer.metas)}[name]
                begin = step.bucket.begin if isinstance(step.bucket, TensorPart) else 0
                assert part.offset == at + begin
                assert part.offset + part.size <= buffer.size


@quick
@given(worlds(), st.data())
def test_owners_that_take_no_part_are_only_read(world: Any, data: Any) -> None:
    """Some ranks, of some hosts; or ranks of another world, whose numbers say nothing."""
    metas, hosts, plan, duplicates = world
    is_loaded = data.draw(st.booleans())
    members = [data.draw(st.lists(st.sampled_from(host), unique=True)) for host in hosts]
    outside = [
        [rank for rank in host if rank in metas and (is_loaded or rank not in some)]
        for host, some in zip(hosts, members, strict=True)
    ]
    members = [some for some in members if some] or [[hosts[0][0]]]
    here = data.draw(st.integers(0, len(members) - 1))
    if not is_loaded:
        outside = [[rank for rank in host if [rank] != members[0]] for host in outside]
    outside = [host for host in outside if host]
    gone = data.draw(st.sets(st.sampled_from([rank for host in hosts for rank in host])))
    options = metas, duplicates, None, outside
    owners_alone = metas, duplicates, None, [list(metas)]
    found = share(plan, members, here, *options)
    assert Counter(id(s.bucket) for s in found.steps) == Counter(id(s.bucket) for s in plan.steps)
    for step in found.steps:
        assert step.receiver in members[here]
        names = {m.name for m in step.bucket.items}
        for rank in step.sources:
            assert names <= {m.name for b in metas[rank].memory_buffer_metas_list for m in b.metas}
        assert is_loaded or {*step.sources} & {*members[here]} in (set(), {step.receiver})
        if is_loaded:
            assert step.owner in step.sources
    if any({*step.sources} <= gone for step in share(plan, [[99]], 0, *owners_alone).steps):
        with pytest.raises(CollectiveError) as caught:
            share(plan, members, here, *options, gone)
        assert (caught.value.kind, caught.value.missing) == ("rank_gone", [])
        assert caught.value.rank in gone
    else:
        without = share(plan, members, here, *options, gone)
        assert not any({*step.sources} & gone for step in without.steps)


def test_what_nobody_needs_may_be_gone() -> None:
    metas = {rank: owned(rank, [([1024], False)]) for rank in (0, 1)}
    nics = {"rank-0": {0}}
    plan = plan_transfer(metas, BucketSize(1024, True), nics, nics)
    everything = [Region(0, 1024, (), ())]
    names = [step.bucket.items[0].name for step in plan.steps]
    one = Needs.of({tensor(names[0], 1024): everything, tensor(names[1], 1024): []})
    assert one is not None
    union = HostNeeds(Tensors(plan.steps, layouts_of(metas)), [one])
    gone = [step.owner for step in plan.steps]
    share(plan, [[2]], 0, metas, needs=union, outside=[[0], [1]], gone={gone[1]})
    with pytest.raises(CollectiveError, match=rf"rank {gone[0]} is gone, and no other rank owns"):
        share(plan, [[2]], 0, metas, needs=union, outside=[[0], [1]], gone={gone[0]})


def test_hosts_that_join_begin_with_other_owners() -> None:
    metas = {rank: owned(rank, [([1024] * 4, False)]) for rank in range(4)}
    nics = {"rank-0": {0}}
    plan = plan_transfer(metas, BucketSize(1024, True), nics, nics)
    hosts = [[0], [1], [2], [3]]
    orders = [
        [step.sources[0] for step in share(plan, hosts, here, metas, outside=hosts).steps]
        for here in range(4)
    ]
    assert all(len({*asked}) == 4 for asked in zip(*orders, strict=True))


@quick
@given(st.integers(2, 6), st.integers(1, 4), st.integers(8, 24), st.integers(0, 5))
def test_reads_are_shared_evenly_and_hosts_take_turns(
    count: int, each: int, tensors: int, number: int
) -> None:
    """Up to one bucket; at any time no host is asked by two others."""
    hosts = [list(range(first, first + each)) for first in range(0, count * each, each)]
    metas = {rank: owned(rank, [([1024] * tensors, False)]) for host in hosts for rank in host}
    nics = {f"rank-{rank}": {rank} for rank in metas}
    plan = plan_transfer(metas, BucketSize(1024, True), nics, nics)
    asked = []
    for here in range(count):
        found = share(plan, hosts, here, metas)
        loads: Counter[int] = Counter()
        order = []
        for step in found.steps:
            (source,) = step.sources
            if source not in hosts[here]:
                loads[step.receiver] += step.bucket.size
                if step.receiver == hosts[here][0]:
                    order.append(source // each)
        mean = sum(loads.values()) / each
        assert max(loads.values()) <= max(1.1 * mean, mean + 1024)
        asked.append(order)
    for at in range(min(map(len, asked))):
        assert len({order[at] for order in asked}) == count


def test_a_hosts_needs_are_those_of_all_its_workers() -> None:
    sizes = [1 << 15, 1 << 15, 1 << 15]
    metas = {0: owned(0, [(sizes, False)])}
    names = [m.name for b in metas[0].memory_buffer_metas_list for m in b.metas]
    half = 1 << 14
    first = {tensor(n, 1 << 15): [Region(0, half, (), ())] for n in names}
    second = {tensor(n, 1 << 15): [Region(half, half, (), ())] for n in names[:1]}
    second |= {tensor(n, 1 << 15): [] for n in names[1:]}
    nics = {"rank-0": {0}}
    plan = plan_transfer(metas, BucketSize(1 << 15, True), nics, nics)
    one, two = Needs.of(first), Needs.of(second)
    assert one is not None
    assert two is not None
    needs = HostNeeds(Tensors(plan.steps, layouts_of(metas)), [one, two])
    by_name = {step.bucket.items[0].name: needs.runs_in(step.bucket) for step in plan.steps}
    assert by_name[names[0]] is None  # both halves: the whole tensor
    for name in names[1:]:
        begins, ends = by_name[name]  # type: ignore[misc]
        assert (begins.tolist(), ends.tolist()) == ([0], [half])
    assert needs.nbytes == 2 * half + 2 * half
    other = Needs.of({tensor(n, 1 << 15): [] for n in names[:2]})
    assert other is not None
    with pytest.raises(ValueError, match="of other tensors"):
        HostNeeds(Tensors(plan.steps, layouts_of(metas)), [other])


@st.composite
def kinds(draw: Any) -> tuple[torch.dtype, torch.Size, int]:
    dtype = draw(st.sampled_from([torch.uint8, torch.float32, torch.bfloat16]))
    shape = torch.Size(draw(st.lists(st.integers(0, 12), max_size=2)))
    return dtype, shape, align_up(tensor_nbytes(dtype, shape))


@st.composite
def listings(draw: Any) -> tuple[dict[int, MemoryBufferMetaList], set[str]]:
    """Owners of tensors of a few kinds, names in any order; some have several owners."""
    some = draw(st.lists(kinds(), min_size=1, max_size=4))
    names = draw(st.lists(st.text(max_size=3), min_size=1, max_size=12, unique=True))
    kind_of = {name: draw(st.sampled_from(some)) for name in names}
    metas, owners = {}, Counter(names[:0])
    for rank in range(draw(st.integers(1, 3))):
        mine = draw(st.lists(st.sampled_from(names), unique=True, max_size=6))
        items = make_metas(mine, [kind_of[name] for name in mine], range(len(mine)))
        buffer = MemoryBufferMetas(metas=items, ptr=0, size=sum(m.aligned_size for m in items))
        metas[rank] = MemoryBufferMetaList(
            p2p_store_addr=None, memory_buffer_metas_list=[buffer], rdma_device=""
        )
        owners.update(mine)
    return metas, {name for name, count in owners.items() if count > 1}


@quick
@given(listings(), st.booleans(), st.data())
def test_tensors_are_listed_as_a_plain_loop_lists_them(
    listing: Any, may_cut: bool, data: Any
) -> None:
    """Digest, sizes and places, and the bytes that are needed of each bucket."""
    metas, duplicates = listing
    nics = {f"rank-{rank}": {rank} for rank in metas}
    size = BucketSize(256 if may_cut else 1024, True)
    plan = plan_transfer(metas, size, nics, nics, may_cut=may_cut, duplicates=duplicates)
    found = Tensors(plan.steps, layouts_of(metas))
    by_name = {
        m.name: (m.name, m.dtype, m.shape)
        for one in metas.values() for b in one.memory_buffer_metas_list for m in b.metas
    }  # fmt: skip
    listed = [by_name[name] for name in sorted(by_name)]
    assert found.digest == tensors_digest(listed)
    assert found.sizes.tolist() == [tensor_nbytes(dtype, shape) for _, dtype, shape in listed]
    assert len(found) == len(listed)
    read = {one: [Region(0, data.draw(st.integers(0, int(nbytes))), (), ())]
            for one, nbytes in zip(listed, found.sizes, strict=True)}  # fmt: skip
    needs = Needs.of(read)
    assert needs is not None
    union = HostNeeds(found, [needs])
    for step in plan.steps:
        names = [m.name for m in step.bucket.items]
        places = found.places_of(step.bucket).tolist()
        assert [listed[place][0] for place in places] == names
        needed = sum(read[by_name[name]][0].length for name in names)
        nbytes = sum(int(found.sizes[place]) for place in places)
        assert union.share_of(step.bucket) == needed / max(1, nbytes)


def test_names_of_tensors_are_told_apart() -> None:
    def digest(*names: str) -> str:
        return tensors_digest([tensor(name, 1) for name in names])

    every = [("ab", "c"), ("a", "bc"), ("abc",), ("ab\0c",), ("ab", "\ud800"), ("", "abc")]
    assert len({digest(*names) for names in every}) == len(every)


def test_short_gaps_are_read_along() -> None:
    row = shards.SHORTEST_GAP
    rows = Region(0, row, (4,), (2 * row,))
    begins, ends = runs_of([rows], 8 * row, shards.SHORTEST_GAP)
    assert (begins.tolist(), ends.tolist()) == ([0], [7 * row])
    rows = Region(0, row, (4,), (2 * row + 1,))
    begins, _ = runs_of([rows], 9 * row, shards.SHORTEST_GAP)
    assert len(begins) == 4


def test_needs_of_a_large_model_are_small() -> None:
    """138,000 tensors, as of Kimi-K2, of a rank with tensor and expert parallelism."""
    read = {}
    for layer in range(61):
        for expert in range(384):
            mine = [Region(0, 1 << 20, (), ())] if expert % 16 == 3 else []
            for part in ("gate_proj", "up_proj", "down_proj"):
                for kind in ("weight", "weight_scale_inv"):
                    name = f"model.layers.{layer}.mlp.experts.{expert}.{part}.{kind}"
                    read[tensor(name, 1 << 24)] = mine
    needs = Needs.of(read)
    assert needs is not None
    assert len(read) > 138_000
    assert len(needs.text) <= 16 << 10
