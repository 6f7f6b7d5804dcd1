from __future__ import annotations

import dataclasses
import importlib
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from checkpoint_engine.data_types import ParameterMeta
from checkpoint_engine.ground.needs import Needs, Region
from checkpoint_engine.planning.layouts import layouts_of
from checkpoint_engine.planning.plan import Step, TransferPlan
from checkpoint_engine.planning.shards import HostNeeds, Tensors, share
from checkpoint_engine.tools.simulate.cluster import Cluster, Costs
from checkpoint_engine.tools.simulate.engine import Simulation, Task, critical_path
from checkpoint_engine.tools.simulate.hosts import HostPlan, plan_host, predict_host
from checkpoint_engine.tools.simulate.parallel import Parallel
from checkpoint_engine.tools.simulate.update import (
    Prediction,
    deal_out,
    make_plan,
    predict,
    read_headers,
    share_out,
)

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MB = 1 << 20
FREE = Costs(per_tensor=0.0, per_bucket=0.0, per_update=0.0, load=1e9, check=None)
"""Software that takes no time."""


# ---------------------------------------------------------------------- the engine


def test_a_task_takes_its_fixed_time_and_the_time_of_its_slowest_link() -> None:
    simulation = Simulation()
    simulation.task("copy", fixed=0.5, busy={"fast": 1.0, "slow": 2.0})
    assert simulation.run() == [Task("copy", 0.0, 2.5)]


def test_tasks_that_share_a_link_take_turns() -> None:
    simulation = Simulation()
    simulation.task("short", busy={"link": 1.0})
    simulation.task("long", busy={"link": 3.0})
    assert [task.end for task in simulation.run()] == pytest.approx([1.0, 4.0])


def test_a_task_that_waits_on_one_link_leaves_the_rest_of_another() -> None:
    """Two hold each other up on a narrow link: the third has the rest of the wide one."""
    simulation = Simulation()
    for _ in range(2):
        simulation.task("both", busy={"wide": 0.2, "narrow": 1.0})
    simulation.task("wide", busy={"wide": 1.0})
    ends = [task.end for task in simulation.run()]
    assert ends == pytest.approx([1.0, 2.0, 1.4])


def test_links_are_used_in_the_order_in_which_tasks_begin() -> None:
    simulation = Simulation()
    simulation.task("late", busy={"link": 1.0}, after=[simulation.task("first", fixed=2.0)])
    simulation.task("early", busy={"link": 1.5})
    assert [task.end for task in simulation.run()] == pytest.approx([2.0, 3.0, 1.5])


def test_tasks_on_other_links_are_left_alone() -> None:
    simulation = Simulation()
    for link in "ab":
        simulation.task(link, busy={link: 5.0})
    assert [task.end for task in simulation.run()] == pytest.approx([5.0, 5.0])


def test_a_task_begins_when_the_last_of_its_predecessors_has_ended() -> None:
    simulation = Simulation()
    first = simulation.task("first", fixed=1.0)
    second = simulation.task("second", fixed=3.0)
    simulation.task("third", fixed=1.0, after=[first, second, None])
    tasks = simulation.run()
    assert (tasks[2].begin, tasks[2].after) == (3.0, second)
    assert [task.kind for task in critical_path(tasks)] == ["second", "third"]


@st.composite
def jobs(draw: st.DrawFn) -> list[tuple[float, dict[str, float], set[int]]]:
    busy = st.dictionaries(st.sampled_from("abc"), st.floats(0, 20), max_size=3)
    listed = []
    for number in range(draw(st.integers(1, 12))):
        after = draw(st.sets(st.integers(0, number - 1))) if number else set()
        listed.append((draw(st.floats(0, 2)), draw(busy), after))
    return listed


@settings(deadline=None, max_examples=150)
@given(jobs())
def test_no_link_carries_more_than_it_can(
    listed: list[tuple[float, dict[str, float], set[int]]],
) -> None:
    simulation = Simulation()
    for fixed, busy, after in listed:
        simulation.task("job", fixed=fixed, busy=busy, after=sorted(after))
    tasks = simulation.run()
    for task, (fixed, busy, after) in zip(tasks, listed, strict=True):
        alone = max(busy.values(), default=0.0)
        assert task.end - task.begin >= (fixed + alone) * (1 - 1e-6) - 1e-9
        assert task.begin == pytest.approx(max((tasks[one].end for one in after), default=0.0))
    end = max(task.end for task in tasks)
    for link in "abc":
        assert sum(busy.get(link, 0.0) for _, busy, _ in listed) <= end * (1 + 1e-6)
    path = critical_path(tasks)
    assert sum(task.end - task.begin for task in path) == pytest.approx(end)


# ---------------------------------------------------------------------- updates


def tensors(count: int, nbytes: int = 16 * MB) -> list[ParameterMeta]:
    return [
        ParameterMeta(name=f"layer.{i}", dtype=torch.uint8, shape=torch.Size([nbytes]))
        for i in range(count)
    ]


def update(
    cluster: Cluster,
    costs: Costs = FREE,
    *,
    count: int = 64,
    cap: int = 64 * MB,
    receivers: list[int] | None = None,
    free: int = 1 << 40,
) -> Prediction:
    metas = share_out(tensors(count), range(cluster.gpus))
    plan = make_plan(metas, cluster, free_device_bytes=free, cap=cap, receivers=receivers)
    return predict(plan, cluster, costs, receivers)


ONE = Cluster(gpus_per_node=1, nics_per_node=1, host_to_device=10.0)
EIGHT = Cluster(gpus_per_node=8, host_to_device=10.0, nvlink=40.0, device_memory=1e9)


def test_a_single_rank_runs_at_the_speed_of_its_copies() -> None:
    found = update(ONE)
    assert found.gigabytes_per_second == pytest.approx(10.0, rel=0.01)
    assert found.bound_by == "fetch"
    assert found.device_bytes == 2 * 64 * MB


def test_copies_of_the_owners_overlap_and_the_broadcast_decides() -> None:
    found = update(EIGHT)
    first_copy = 64 * MB / 1e9 / 10.0
    assert found.seconds == pytest.approx(64 * 16 * MB / 1e9 / 40.0 + first_copy, rel=0.01)
    assert found.bound_by == "broadcast"
    assert found.device_bytes == 3 * 64 * MB


def test_a_slow_loader_decides_and_is_paid_for_every_tensor() -> None:
    found = update(EIGHT, Costs(per_tensor=0.01, per_bucket=0.0, per_update=0.5))
    assert found.bound_by == "reload"
    assert 64 * 0.01 + 0.5 < found.seconds < 64 * 0.01 + 0.5 + 0.05


def test_nodes_are_joined_by_their_nics() -> None:
    slow = Cluster(nodes=4, nics_per_node=1, nic=5.0, nvlink=40.0, host_to_device=10.0)
    assert update(slow).gigabytes_per_second == pytest.approx(5.0, rel=0.1)


def test_latency_counts_for_every_bucket_on_many_nodes() -> None:
    cluster = Cluster(nodes=64, hop=1e-3)
    assert update(cluster, count=512).seconds > 512 * 63e-3 * 0.9


def test_owners_share_their_hosts_memory() -> None:
    wide = Cluster(host_memory=1000.0, host_to_device=10.0, nvlink=1000.0, device_memory=1e9)
    narrow = Cluster(host_memory=20.0, host_to_device=10.0, nvlink=1000.0, device_memory=1e9)
    assert update(wide).gigabytes_per_second == pytest.approx(80.0, rel=0.05)
    assert update(narrow).gigabytes_per_second == pytest.approx(20.0, rel=0.05)


def test_memory_that_is_short_leaves_no_staging_and_costs_time() -> None:
    roomy, short = update(EIGHT), update(EIGHT, free=40 * MB)
    assert short.device_bytes < 40 * MB
    assert short.seconds > roomy.seconds * 1.2


def test_p2p_reads_are_bound_by_the_receivers_nics() -> None:
    cluster = Cluster(nodes=4, nics_per_node=1, nic=2.0, nvlink=1000.0, device_memory=1e9)
    found = update(cluster, receivers=list(range(8)))
    # One rank reads for all, through its node's NIC, but for its own part.
    assert found.gigabytes_per_second == pytest.approx(2.0 * 32 / 31, rel=0.02)
    assert found.bound_by == "fetch"


def test_the_originals_rounds_take_longer_than_the_pipeline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    predict_original = importlib.import_module("original").predict_original
    cluster = Cluster(host_to_device=5.0, nvlink=40.0, device_memory=1e9)
    metas = share_out(tensors(256), range(cluster.gpus))
    theirs = predict_original(metas, cluster, FREE, free_device_bytes=1 << 40, cap=64 * MB)
    assert theirs.seconds > 1.5 * update(cluster, count=256).seconds


def test_checksums_take_a_worker_as_long_as_reading_the_bytes() -> None:
    cluster = Cluster(gpus_per_node=1, nics_per_node=1, host_to_device=1e9)
    costs = Costs(per_tensor=0.0, per_bucket=0.0, per_update=0.0, load=10.0, check=None)
    summed = dataclasses.replace(costs, check=5.0)
    ratio = update(cluster, summed).seconds / update(cluster, costs).seconds
    assert ratio == pytest.approx(3.0, rel=0.01)


def test_buckets_arrive_once_each_and_in_order() -> None:
    found = update(EIGHT)
    broadcasts = [task for task in found.tasks if task.kind == "broadcast"]
    assert len(broadcasts) == len(found.plan.steps)
    ends = [task.end for task in broadcasts]
    assert ends == sorted(ends)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 40), st.sampled_from([16, 32, 128]), st.booleans())
def test_a_faster_wire_is_never_slower(nodes: int, count: int, cap: int, p2p: bool) -> None:
    receivers = list(range(8)) if p2p else None
    slow, fast = (
        update(Cluster(nodes=nodes, nic=nic), count=count, cap=cap * MB, receivers=receivers)
        for nic in (10.0, 20.0)
    )
    assert fast.seconds <= slow.seconds * (1 + 1e-6)
    assert slow.plan.total_bytes == count * 16 * MB
    assert sum(slow.critical.values()) == slow.seconds


def test_a_cluster_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'nodes': 0, 'nic': 0\.0"):
        Cluster(nodes=0, nic=0.0)


# ---------------------------------------------------------------------- staged on hosts


def experts(layers: int = 3, count: int = 8) -> list[ParameterMeta]:
    shapes = {"self_attn.q_proj": (512, 256), "self_attn.o_proj": (256, 512), "norm": (256,)}
    for number in range(count):
        shapes[f"mlp.experts.{number}.up_proj"] = (1024, 2048)
        shapes[f"mlp.experts.{number}.down_proj"] = (32, 1 << 16)
    return [
        ParameterMeta(
            name=f"layers.{layer}.{name}.weight", dtype=torch.bfloat16, shape=torch.Size(shape)
        )
        for layer in range(layers)
        for name, shape in shapes.items()
    ]


def on_host(
    cluster: Cluster,
    parallel: Parallel,
    costs: Costs = FREE,
    *,
    here: int = 0,
    every_nth: bool = False,
) -> tuple[HostPlan, Prediction]:
    deal = deal_out if every_nth else share_out
    metas = deal(experts(), range(cluster.gpus))
    needs = parallel.needs(experts(), range(parallel.ranks))
    sizes = {"free_device_bytes": 1 << 40, "cap": 16 * MB}
    host = plan_host(metas, cluster, **sizes, here=here, needs=needs)
    return host, predict_host(host, costs)


clusters = st.builds(
    Cluster,
    nodes=st.integers(1, 4),
    gpus_per_node=st.integers(1, 4),
    nics_per_node=st.integers(1, 4),
    nic=st.sampled_from([1.0, 10.0]),
    host_memory=st.sampled_from([5.0, 300.0]),
    host_to_device=st.sampled_from([2.0, 50.0]),
    peer_read=st.sampled_from([3.0, 370.0]),
)


@settings(deadline=None, max_examples=40)
@given(clusters, st.sampled_from([1, 2, 4]), st.sampled_from([1, 4]), st.booleans(), st.data())
def test_no_update_is_faster_than_its_links(
    cluster: Cluster, tensor: int, expert: int, every_nth: bool, data: Any
) -> None:
    here = data.draw(st.integers(0, cluster.nodes - 1))
    parallel = Parallel(tensor, expert)
    host, found = on_host(cluster, parallel, here=here, every_nth=every_nth)
    gigabytes: defaultdict[str, float] = defaultdict(float)
    for step in host.plan.steps:
        is_read = step.sources not in ((), (step.receiver,))
        nbytes = sum(host.ranges(step)) if is_read else step.bucket.size
        gigabytes[f"pcie {step.receiver}"] += nbytes / 1e9
        gigabytes[cluster.nic_of(step.receiver) if is_read else "memory"] += nbytes / 1e9
    rates = {"memory": cluster.host_memory}
    for link, size in gigabytes.items():
        rate = cluster.host_to_device if link.startswith("pcie") else rates.get(link, cluster.nic)
        assert found.seconds >= size / rate * (1 - 1e-6)
    assert sum(found.critical.values()) == found.seconds


@settings(deadline=None, max_examples=25)
@given(clusters, st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 4, 8]), st.data())
def test_no_more_enters_a_host_than_its_workers_need_of_others(
    cluster: Cluster, tensor: int, expert: int, data: Any
) -> None:
    here = data.draw(st.integers(0, cluster.nodes - 1))
    host, found = on_host(cluster, Parallel(tensor, expert), here=here)
    everyone = host.needs or ()
    named = {one.digest: one for one in (everyone[r % len(everyone)] for r in host.orders)}
    union = HostNeeds(Tensors(host.plan.steps, layouts_of(host.metas)), list(named.values()))
    foreign = [step.bucket for step in host.plan.steps if step.owner not in host.orders]
    nbytes = sum(union.share_of(bucket) * bucket.size for bucket in foreign)
    assert found.bytes_in == pytest.approx(nbytes)
    assert (found.bytes_in > 0) == (cluster.nodes > 1 and bool(foreign) and nbytes > 0)


def test_on_one_host_a_shard_is_what_peers_are() -> None:
    """The plan that is shared out to the only host takes the same time, whatever its order."""
    cluster, parallel = Cluster(gpus_per_node=4), Parallel(4)
    peers, found = on_host(cluster, parallel, Costs())
    every = replace(peers.plan, needs=None)
    alone = share(every, [range(4)], 0, peers.metas)
    shard = predict_host(replace(peers, orders=dict.fromkeys(range(4), alone)), Costs())
    assert (shard.bytes_in, found.bytes_in) == (0, 0)
    assert shard.seconds == pytest.approx(found.seconds, rel=0.05)


def test_experts_on_other_hosts_do_not_enter() -> None:
    cluster = Cluster(nodes=4, gpus_per_node=2, nics_per_node=2)
    _, sliced = on_host(cluster, Parallel(8))
    _, spread = on_host(cluster, Parallel(8, 8))
    _, all_of_them = on_host(cluster, Parallel())
    assert spread.bytes_in < 0.3 * all_of_them.bytes_in
    assert spread.bytes_in == pytest.approx(sliced.bytes_in, rel=0.25)
    assert spread.seconds < all_of_them.seconds


def test_owners_that_all_hosts_ask_decide() -> None:
    """One host owns everything; its NICs send it once for each of the others."""
    metas = deal_out(experts(), range(2))
    for nodes in (3, 9):
        cluster = Cluster(nodes=nodes, gpus_per_node=2, nics_per_node=2, nic=1.0)
        host = plan_host(metas, cluster, free_device_bytes=1 << 40, cap=16 * MB, here=1)
        sent = (nodes - 1) * host.plan.total_bytes / 1e9
        found = predict_host(host, FREE).seconds
        assert sent / 2 <= found * (1 + 1e-6)
        assert found <= sent / 2 * nodes / (nodes - 1) * 1.3


def test_slices_are_those_of_parallel_layers() -> None:
    shapes = {
        "a.up_proj.weight": (8, 4), "b.down_proj.weight": (4, 8), "c.norm.weight": (8,),
        "d.experts.3.up_proj.weight": (8, 4), "d.experts.0.up_proj.weight": (8, 4),
    }  # fmt: skip
    tensors = [
        ParameterMeta(name=name, dtype=torch.uint8, shape=torch.Size(shape))
        for name, shape in shapes.items()
    ]
    (needs,) = Parallel(2, 4).needs(tensors, [3])
    read = dict(zip(sorted(shapes), (needs.kinds[kind] for kind in needs.numbers), strict=True))
    assert list(read.values()) == [
        (Region(16, 16, (), ()),),
        (Region(4, 4, (4,), (8,)),),
        (Region(0, 8, (), ()),),
        (),
        (Region(0, 32, (), ()),),
    ]
    by_tensor = {(meta.name, meta.dtype, tuple(meta.shape)): read[meta.name] for meta in tensors}
    assert Needs.of(by_tensor) == needs


# ---------------------------------------------------------------------- checkpoints


def test_headers_are_read_and_shared_out_by_bytes(tmp_path: Path) -> None:
    half = {f"layer.{i}.weight": torch.zeros(1000, dtype=torch.bfloat16) for i in range(12)}
    save_file(half, tmp_path / "model-1.safetensors")
    save_file({"head": torch.zeros(3000, dtype=torch.float32)}, tmp_path / "model-2.safetensors")
    found = read_headers(tmp_path)
    assert {meta.name for meta in found} == {*half, "head"}
    shares = share_out(found, [4, 5, 6])
    names = {owner: [m.name for b in s.memory_buffer_metas_list for m in b.metas]
             for owner, s in shares.items()}  # fmt: skip
    # An owner's share ends with the tensor that begins in it.
    assert names[4] == ["head", "layer.0.weight"]
    assert names[5] + names[6] == [f"layer.{i}.weight" for i in range(1, 12)]


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} holds no"):
        read_headers(tmp_path)


def test_a_tensor_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="largest tensor"):
        update(EIGHT, free=17 * MB)  # of 16 MB: it cannot even be put together of parts


def test_a_large_tensor_travels_in_parts_and_is_copied_once_more() -> None:
    metas = share_out(tensors(2, 64 * MB), range(1))
    slow_worker = Costs(per_tensor=0.0, per_bucket=0.0, per_update=0.0, load=1.0)
    cluster = replace(ONE, device_memory=2.0)

    def planned(**how: Any) -> TransferPlan:
        return make_plan(metas, cluster, free_device_bytes=400 * MB, cap=32 * MB, **how)

    in_parts, not_cut = planned(), planned(receivers=[0])  # by P2P none is cut
    assert [len(in_parts.steps), len(not_cut.steps)] == [4, 2]
    whole, cut = (predict(plan, cluster, slow_worker) for plan in (not_cut, in_parts))
    assert whole.critical["reload"] == pytest.approx(128 * MB / 1e9, rel=0.01)
    assert cut.critical["reload"] == pytest.approx(128 * MB / 1e9 * 1.5, rel=0.01)
    assert cut.device_bytes == (2 * 32 + 64) * MB


def steps_of(receivers: list[int] | None) -> tuple[Step, ...]:
    metas = share_out(tensors(32), range(16))
    cluster = Cluster(nodes=2)
    return make_plan(
        metas, cluster, free_device_bytes=1 << 40, cap=64 * MB, receivers=receivers
    ).steps


def test_p2p_plans_name_members_as_receivers_on_their_nics() -> None:
    assert {step.receiver for step in steps_of([1, 2, 3])} == {1, 2, 3}
    assert {step.receiver for step in steps_of(None)} == set(range(16))
