"""Tensors that are larger than a bucket: cut by the plan, put together by the worker."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.data_types import TensorPart, align_up
from checkpoint_engine.errors import UpdateError, WireError
from checkpoint_engine.ground import devices
from checkpoint_engine.loading.loaded import Parts
from checkpoint_engine.planning import plan
from checkpoint_engine.planning.plan import BucketSize
from checkpoint_engine.replay import replayed
from checkpoint_engine.worker import update_weights_from_ipc
from fleet import digests
from test_plan import A, Metas, fetch, owned, worlds
from test_replay import Bytes, Model
from test_worker import OtherWorker, server, tensors  # noqa: F401  # one is a fixture
from torchrun import torchrun

quick = settings(deadline=None, max_examples=60)
SMALL = {"PS_DEVICE": "cpu", "PS_MAX_BUCKET_SIZE_GB": str(2**-10)}  # 1 MiB: a third of a tensor


# ---------------------------------------------------------------------- the plan


@quick
@given(worlds, st.integers(1, 30).map(lambda n: n * A), st.randoms(use_true_random=False))
def test_what_fits_travels_whole_and_the_rest_in_parts(metas: Metas, size: int, rng: Any) -> None:
    transfer = plan.plan_transfer(metas, BucketSize(size, True), {}, {}, may_cut=True)
    assert transfer.bucket_bytes <= size
    memory = {
        rank: [rng.randbytes(buffer.size) for buffer in owner.memory_buffer_metas_list]
        for rank, owner in metas.items()
    }
    for rank, owner in metas.items():
        sent = b"".join(
            fetch(owner, memory[rank], step.bucket) for step in transfer.steps if step.owner == rank
        )
        held = b"".join(content.ljust(align_up(len(content)), b"\0") for content in memory[rank])
        assert sent == held
        arrived: list[str] = []
        expected_begin = 0
        for step in transfer.steps:
            if step.owner != rank:
                continue
            if isinstance(step.bucket, TensorPart):
                assert step.bucket.total > size
                assert step.bucket.begin == expected_begin
                expected_begin += step.bucket.size
                if not step.bucket.is_last:
                    continue
                assert expected_begin == step.bucket.total
                expected_begin = 0
            arrived += [one.name for one in step.bucket.items]
        names = [one.name for buffer in owner.memory_buffer_metas_list for one in buffer.metas]
        assert arrived == names
    tensors = sum(len(b.metas) for o in metas.values() for b in o.memory_buffer_metas_list)
    assert transfer.tensor_count == tensors


@quick
@given(worlds, st.integers(1, 60).map(lambda n: n * A))
def test_ranks_that_begin_with_their_own_buckets_never_wait_in_a_circle(
    metas: Metas, size: int
) -> None:
    plans = {
        rank: plan.plan_transfer(metas, BucketSize(size, True), {}, {}, may_cut=True, first=rank)
        for rank in metas
    }
    buckets = [{step.number: step.bucket for step in one.steps} for one in plans.values()]
    assert all(one == buckets[0] for one in buckets)
    assert all(sorted(one) == list(range(1, len(one) + 1)) for one in buckets)
    for rank, one in plans.items():
        first = next(iter(one.steps), None)
        cut = [step for step in one.steps[: len(metas)] if isinstance(step.bucket, TensorPart)]
        if one.loads_of(rank) and not cut:
            assert first is not None
            assert first.receiver == rank
    read = {rank: 0 for rank in plans}  # how many of its steps
    slots = 2  # of each owner's staging, which all ranks have read before it is filled again
    moved = True
    while moved:
        moved = False
        done = {rank: plans[rank].steps[: read[rank]] for rank in plans}
        for rank, one in plans.items():
            if read[rank] == len(one.steps):
                continue
            owner = one.steps[read[rank]].owner
            counts = [sum(step.owner == owner for step in steps) for steps in done.values()]
            if sum(step.owner == owner for step in done[rank]) < min(counts) + slots:
                read[rank] += 1
                moved = True
    assert all(read[rank] == len(one.steps) for rank, one in plans.items())


def test_a_worker_puts_together_one_tensor_at_a_time() -> None:
    metas = {rank: owned(rank, [([9 * A, A, 5 * A], False)]) for rank in range(3)}
    transfer = plan.plan_transfer(metas, BucketSize(2 * A, True), {}, {}, may_cut=True)
    open_one = None
    for step in transfer.steps:
        if isinstance(step.bucket, TensorPart):
            name = step.bucket.items[0].name
            assert open_one in (None, name)
            open_one = None if step.bucket.is_last else name


def test_memory_for_a_tensor_that_is_put_together_is_left() -> None:
    gib = 1 << 30
    size = plan.bucket_size(60 * gib, 30 * gib, 8 * gib, may_cut=True)
    assert size == BucketSize(8 * gib, True)
    assert plan.bucket_size(42 * gib, 30 * gib, 8 * gib, may_cut=True) == BucketSize(4 * gib, True)
    with pytest.raises(ValueError, match="largest tensor"):
        plan.bucket_size(20 * gib, 30 * gib, 8 * gib, may_cut=True)
    assert plan.bucket_size(60 * gib, gib, 8 * gib, may_cut=True) == plan.bucket_size(
        60 * gib, gib, 8 * gib
    )


def test_a_huge_tensor_does_not_decide_how_large_buckets_are() -> None:
    huge, rest = 3 << 30, 5 << 30
    metas = {0: owned(0, [([huge, rest // 4, rest // 4, rest // 2], False)])}
    allowed = BucketSize(8 << 30, True)
    whole, cut = (
        plan.plan_transfer(metas, size, {}, {}, may_cut=may_cut)
        for may_cut in (False, True)
        for size in [plan.paced(allowed, plan.DEVICE_PACE, plan.extent(metas), may_cut)]
    )
    assert whole.bucket_bytes == huge
    assert cut.bucket_bytes == plan.LARGEST_WHOLE
    assert whole.total_bytes == cut.total_bytes
    assert not whole.cuts_tensors
    assert cut.cuts_tensors


# ---------------------------------------------------------------------- the worker's end


@quick
@given(
    st.lists(st.lists(st.integers(1, 900), min_size=2, max_size=6), min_size=1, max_size=3),
    st.randoms(use_true_random=False),
)
def test_parts_make_a_tensor_in_any_order(sizes: list[list[int]], rng: Any) -> None:
    content = [torch.tensor(list(rng.randbytes(sum(one))), dtype=torch.uint8) for one in sizes]
    arrivals = []
    for number, one in enumerate(sizes):
        begin = 0
        for nbytes in one:
            arrivals.append((number, begin, nbytes))
            begin += nbytes
    rng.shuffle(arrivals)
    parts, buffer, made = Parts(), torch.zeros(2000, dtype=torch.uint8), {}
    for number, begin, nbytes in arrivals:
        start = rng.randrange(0, 2000 - nbytes + 1)
        buffer[start : start + nbytes] = content[number][begin : begin + nbytes]
        part = [start, nbytes, begin, sum(sizes[number]), number]
        whole = parts.add(b"of one name", part, buffer)
        if whole is not None:
            made[number] = whole
    parts.check_complete()
    assert all(torch.equal(made[number], one) for number, one in enumerate(content))


@pytest.mark.parametrize(
    "part",
    [
        [0, 40, 0, 30, 0],
        [90, 20, 0, 30, 0],
        [0, 20, 20, 30, 0],
        [0, 0, 0, 30, 0],
        [0, -1, 0, 30, 0],
        [0, 10, 0, 30],
        "part",
        None,
        [0, 10.0, 0, 30, 0],
        [0, True, 0, "30", 0],
        [0, 10, 0, 1 << 70, 0],
    ],
)
def test_a_part_that_cannot_be(part: Any) -> None:
    with pytest.raises(WireError):
        Parts().add(b"", part, torch.zeros(100, dtype=torch.uint8))


@pytest.mark.parametrize("second", [[0, 6, 2, 8, 0], [0, 2, 0, 8, 0], [0, 1, 3, 8, 0]])
def test_parts_that_overlap_are_refused(second: list[int]) -> None:
    """Their sizes would add up to the tensor's, and leave a hole in it."""
    parts, buffer = Parts(), torch.zeros(16, dtype=torch.uint8)
    assert parts.add(b"t", [0, 4, 0, 8, 0], buffer) is None
    with pytest.raises(WireError, match="came before"):
        parts.add(b"t", second, buffer)


def test_a_part_that_comes_twice_or_never() -> None:
    parts, buffer = Parts(), torch.zeros(100, dtype=torch.uint8)
    assert parts.add(b"a", [0, 10, 0, 30, 0], buffer) is None
    with pytest.raises(WireError, match="before"):
        parts.add(b"a", [0, 10, 0, 30, 0], buffer)
    with pytest.raises(WireError, match="another's"):
        parts.add(b"a", [0, 10, 10, 31, 0], buffer)
    with pytest.raises(WireError, match="ended before"):
        parts.check_complete()


# ---------------------------------------------------------------------- whole updates


@pytest.mark.parametrize("ranks", [1, 3])
def test_updates_in_parts_with_checksums(tmp_path: Path, ranks: int) -> None:
    """The programs compare every bit."""
    results = torchrun(
        tmp_path,
        ranks,
        "updates",
        env={**SMALL, "PS_CHECKSUM": "on"},
        steps=[{"seed": 1}, {"seed": 2}],
    )
    for result in results:
        first, second = result["reports"]
        assert first["bucket_bytes"] > second["bucket_bytes"] == 1 << 20
        assert first["tensors"] == second["tensors"]


def test_a_worker_that_cannot_join_parts_is_said_so_and_gets_whole_tensors_next(
    server: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It follows one that could."""
    monkeypatch.setattr(plan, "SMALLEST_CUT", 1 << 10)
    monkeypatch.setenv("PS_MAX_BUCKET_SIZE_GB", str(2**-16))  # 16 KiB
    server._server.joins_parts = True
    seconds = timedelta(seconds=20)

    def refuse(paths: list[tuple[str, str]]) -> None:
        raise ConnectionError("no engine")

    with pytest.raises(UpdateError, match="no engine"):
        server.update("c", refuse, timeout=seconds)
    assert server._server.joins_parts
    with pytest.raises(UpdateError, match="update again"):
        server.update("c", OtherWorker(), timeout=seconds)
    other = OtherWorker()
    report = server.update("c", other, timeout=seconds)
    assert digests(other.weights) == digests(tensors())
    assert report.bucket_bytes >= 100_000


def test_what_came_in_parts_is_learned_and_replayed(
    server: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "SMALLEST_CUT", 1 << 10)
    monkeypatch.setenv("PS_MAX_BUCKET_SIZE_GB", str(2**-14))  # 64 KiB
    layout = {"small": (torch.float32, (50,)), "large": (torch.bfloat16, (300, 256))}
    model = Model(layout, lambda model, name, tensor: getattr(model, name).copy_(tensor))
    how = []
    for seed in range(4):
        checkpoint = dict(Bytes(layout, seed).weights())
        server.register_checkpoint("m", named_tensors=checkpoint)
        server.gather_metas("m")
        run = replayed(model.load_weights)

        def receive(paths: list[tuple[str, str]], run: Any = run) -> None:
            with zmq.Context() as context:
                update_weights_from_ipc(context, paths[0][1], None, run=run)

        report = server.update("m", receive, timeout=timedelta(seconds=20))
        assert all(torch.equal(getattr(model, name), checkpoint[name]) for name in layout)
        assert (report.bucket_bytes == 1 << 16) == (seed > 0)
        how.append(run.report["loaded"])
        server.unregister_checkpoint("m")
    assert how[0] == "recorded"
    assert how[-2:] == ["replayed", "replayed"]


def test_the_first_update_sends_in_parts_what_shared_memory_has_no_room_for(
    server: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worker is asked in the handshake, and no earlier one needs to have said that it can."""
    monkeypatch.setattr(plan, "SMALLEST_CUT", 1 << 10)
    room = SimpleNamespace(free=60_000)
    monkeypatch.setattr(devices.shutil, "disk_usage", lambda folder: room)
    assert server._server.joins_parts is None
    with pytest.raises(UpdateError, match="update again"):
        server.update("c", OtherWorker())
    with pytest.raises(UpdateError, match=r"can spare 54000 bytes.*: free room in /dev/shm or"):
        server.update("c", OtherWorker())
    server._server.joins_parts = None
    loaded: dict[str, torch.Tensor] = {}

    def load(weights: Any) -> None:
        loaded.update({name: tensor.clone() for name, tensor in weights})

    def receive(paths: list[tuple[str, str]]) -> None:
        with zmq.Context() as context:
            update_weights_from_ipc(context, paths[0][1], None, run=load)

    report = server.update("c", receive)
    assert report.bucket_bytes < 30_000
    assert digests(loaded) == digests(tensors())
