"""What is left out of a plan, how ranks agree on it, and the hashes that it is decided by."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.data_types import MemoryBuffer, TensorPart, align_up, placed
from checkpoint_engine.errors import WireError
from checkpoint_engine.ground.needs import Needs, Region, tensors_digest
from checkpoint_engine.handover import wire
from checkpoint_engine.loading.replay.adapter import InPlace
from checkpoint_engine.loading.replay.canvas import Source
from checkpoint_engine.loading.replay.geometry import Copy
from checkpoint_engine.loading.replay.held import HeldTensors
from checkpoint_engine.loading.replay.memory import Slot
from checkpoint_engine.loading.replay.program import Route
from checkpoint_engine.loading.replay.recording import Entry, Recording
from checkpoint_engine.memory import content
from checkpoint_engine.memory.content import content_hashes
from checkpoint_engine.planning.layouts import layouts_of
from checkpoint_engine.planning.left_out import without
from checkpoint_engine.planning.plan import BucketSize, TransferPlan, plan_transfer
from checkpoint_engine.planning.shards import HostNeeds, Tensors
from checkpoint_engine.update import skipping
from checkpoint_engine.update.skipping import Contents
from test_plan import Metas, names_of, owned, worlds

quick = settings(deadline=None, max_examples=60)

# ---------------------------------------------------------------------- plans


def sent_by(transfer: TransferPlan, metas: Metas) -> dict[str, Counter[tuple[int, int, int]]]:
    """Of every tensor the places of its bytes among those of its owner: owner, buffer, byte."""
    found: dict[str, Counter[tuple[int, int, int]]] = defaultdict(Counter)
    for step in transfer.steps:
        where: dict[int, tuple[int, int, int]] = {}
        position = 0
        for index, offset, size in step.bucket.ranges:
            room = metas[step.owner].memory_buffer_metas_list[index].size
            assert offset + size <= room
            where |= {position + i: (step.owner, index, offset + i) for i in range(size)}
            position += align_up(size)
        assert position == align_up(step.bucket.size)
        if isinstance(step.bucket, TensorPart):
            found[step.bucket.items[0].name].update(where.values())
            continue
        for start, meta in placed(step.bucket.items):
            found[meta.name].update(where[start + i] for i in range(meta.shape[0]))
    return found


@quick
@given(worlds, st.integers(1, 40), st.booleans(), st.sampled_from([None, 0, 3]), st.data())
def test_the_rest_of_a_plan_is_where_it_was(
    metas: Metas, blocks: int, may_cut: bool, first: int | None, data: Any
) -> None:
    largest = max((one.aligned_size for o in metas.values() for b in o.memory_buffer_metas_list
                   for one in b.metas), default=256)  # fmt: skip
    size = BucketSize(256 * blocks if may_cut else max(256 * blocks, largest), True)
    every = plan_transfer(metas, size, {}, {}, may_cut=may_cut, first=first)
    names = sorted(name for one in metas.values() for name in names_of(one))
    gone = frozenset(data.draw(st.sets(st.sampled_from(names))) if names else ())
    left = without(every, gone)
    before, now = sent_by(every, metas), sent_by(left, metas)
    assert now == {name: places for name, places in before.items() if name not in gone}
    receivers = {meta.name: step.receiver for step in every.steps for meta in step.bucket.items}
    assert all(
        receivers[meta.name] == step.receiver for step in left.steps for meta in step.bucket.items
    )
    assert all(step.bucket.size <= every.bucket_bytes == left.bucket_bytes for step in left.steps)
    assert [step.slot for step in left.steps] == [n % 2 for n in range(len(left.steps))]
    if not gone:
        assert left is every


@quick
@given(worlds, st.sets(st.integers(0, 60)), st.integers(0, 7))
def test_ranks_that_begin_with_another_bucket_number_them_alike(
    metas: Metas, gone: set[int], first: int
) -> None:
    """And take those of each receiver in the same order, one in each round: none waits for a rank
    that waits for it."""
    names = [name for one in metas.values() for name in names_of(one)]
    some = frozenset(name for place, name in enumerate(names) if place in gone)
    plans = [
        without(plan_transfer(metas, BucketSize(1 << 13, True), {}, {}, first=one), some)
        for one in (first, 0)
    ]
    numbered = [
        {step.number: [meta.name for meta in step.bucket.items] for step in plan.steps}
        for plan in plans
    ]
    assert numbered[0] == numbered[1]
    for receiver in metas:
        mine, theirs = (
            [step.number for step in plan.steps if step.receiver == receiver] for plan in plans
        )
        assert mine == theirs == sorted(mine)


def test_what_a_host_needs_of_a_piece_is_what_it_needs_of_the_bucket() -> None:
    metas = {0: owned(0, [([1024, 512, 2048, 300], False)])}
    every = plan_transfer(metas, BucketSize(1 << 20, True), {}, {})
    tensors = [(f"0.0.{i}", torch.uint8, (n,)) for i, n in enumerate((1024, 512, 2048, 300))]
    read = {one: [Region(0, one[2][0] // 2, (), ())] for one in tensors}
    needs = Needs.of(read)
    assert needs is not None
    host = HostNeeds(Tensors(every.steps, layouts_of(metas)), [needs])
    (first, second) = without(every, frozenset({"0.0.1"})).steps
    assert [step.bucket.size for step in (first, second)] == [1024, 2048 + 512]
    for step, ends in ((first, [512]), (second, [1024, 2048 + 150])):
        runs = host.runs_in(step.bucket)
        assert runs is not None
        assert runs[1].tolist() == ends


# ---------------------------------------------------------------------- hashes


def buffer_of(*tensors: torch.Tensor, before: int = 0) -> MemoryBuffer:
    """``before``: tensors of another kind that lie before these."""
    every = [torch.full((before,), 7, dtype=torch.uint8), *tensors]
    metas, memory = [], bytearray()
    for number, one in enumerate(every):
        meta = owned(0, [([one.nbytes], False)]).memory_buffer_metas_list[0].metas[0]
        meta.name, meta.dtype, meta.shape = str(number), one.dtype, one.shape
        metas.append(meta)
        memory += one.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        memory += b"\xaa" * (align_up(len(memory)) - len(memory))
    buffer = torch.from_numpy(np.frombuffer(bytes(memory), np.uint8).copy())
    return MemoryBuffer(buffer=buffer, size=len(memory), metas=metas)


def hash_of(tensor: torch.Tensor, before: int = 0) -> bytes:
    return content_hashes([buffer_of(tensor, before=before)], lambda: None)[16:]


def test_a_hash_is_of_dtype_shape_and_bytes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_PIECE", 64)
    for count in (0, 1, 15, 16, 17, 40):  # one piece, several
        one = torch.arange(count, dtype=torch.int32)
        assert hash_of(one) == hash_of(one.clone(), before=1000)
        others = [one.view(torch.float32), one.view(1, -1)]
        for bit in range(32 if count else 0):
            others.append(one.clone())
            others[-1][-1] ^= 1 << bit if bit < 31 else -(1 << 31)
        hashes = {hash_of(one), *map(hash_of, others)}
        assert len(hashes) == 1 + len(others)


def test_hashes_are_in_the_order_of_the_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_PIECE", 64)
    tensors = [torch.rand(n) for n in (3, 100, 0, 16, 50, 1)]
    expected = b"".join(map(hash_of, tensors))
    buffers = [buffer_of(*tensors[:2]), buffer_of(*tensors[2:])]
    found = content_hashes(buffers, lambda: None)
    assert found[16:48] + found[64:] == expected


def test_pieces_that_change_places_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_PIECE", 64)
    one = torch.arange(48, dtype=torch.int32)
    assert hash_of(one) != hash_of(torch.cat([one[16:32], one[:16], one[32:]]))


def test_an_interrupt_ends_hashing() -> None:
    with pytest.raises(InterruptedError):
        content_hashes([buffer_of(torch.rand(10))], mock.Mock(side_effect=InterruptedError))


# ---------------------------------------------------------------------- groups


Links = list[set[str]]
"""Of each tensor the modules that it is copied into."""


class Worker:
    """One model that has loaded some tensors, of hashes 1; the checkpoint that comes has those."""

    def __init__(self, links: Links, loaded: set[int]) -> None:
        self.links = links
        self.model = torch.nn.Module()
        names = sorted(set[str]().union(*links))
        for name in names:
            layer = torch.nn.Module()
            layer.register_parameter("w", torch.nn.Parameter(torch.zeros(4)))
            self.model.add_module(name, layer)
        entries = {
            Source(f"{place:03}", torch.float32, (4,)): [
                Entry(Route(Slot(name, "w"), torch.float32, ()), Copy(0, 0, (4,), (1,), (1,)))
                for name in sorted(modules)
            ]
            for place, modules in enumerate(links)
        }
        self.recording = Recording(entries, {}, {}, False)  # type: ignore[arg-type]
        self.tensors = tensors_digest(sorted(entries))
        self.adapter = InPlace(self.model, lambda _: None)
        self.held = HeldTensors()
        self.held.look(self.adapter)
        self.offer()
        self.held.note_loaded({f"{place:03}" for place in loaded})
        self.held.finish(self.adapter, self.recording)
        self.held.look(self.adapter)

    def offer(self, hashes: bytes = b"") -> bytes:
        hashes = hashes or b"\1" * 16 * len(self.links)
        return self.held.offer(self.recording, self.tensors, hashes, True)

    def groups(self) -> list[set[int]]:
        """By hand."""
        groups: list[tuple[set[int], set[str]]] = []
        for place, modules in enumerate(self.links):
            near = [one for one in groups if one[1] & modules]
            groups = [one for one in groups if one not in near]
            groups.append(
                ({place}.union(*(a for a, _ in near)), modules.union(*(b for _, b in near)))
            )
        return [places for places, _ in groups]


def places_in(bits: bytes, count: int) -> set[int]:
    return {at for at in range(count) if bits[at // 8] >> (7 - at % 8) & 1}


some_links = st.lists(st.sets(st.sampled_from("abcdefgh"), max_size=2), min_size=1, max_size=12)


@quick
@given(some_links, st.data())
def test_whole_groups_are_held(links: Links, data: Any) -> None:
    loaded = data.draw(st.sets(st.integers(0, len(links) - 1)))
    worker = Worker(links, loaded)
    expected = {at for group in worker.groups() if group <= loaded for at in group}
    assert places_in(worker.offer(), len(links)) == expected
    changed = data.draw(st.integers(0, len(links) - 1))
    hashes = bytearray(b"\1" * 16 * len(links))
    hashes[16 * changed + 3] ^= 4
    assert places_in(worker.offer(bytes(hashes)), len(links)) == {
        at for group in worker.groups() if group <= loaded - {changed} for at in group
    }


class Session:
    """As ``WorkerSession``, without a wire."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.held: bytes | None = None
        self.rounds = 0

    def ask_held(self, tensors: str, hashes: bytes) -> None:
        assert tensors == self.worker.tensors
        self.held = self.worker.offer(hashes)

    def leave_out(self, bits: bytes, is_settled: bool) -> None:
        self.rounds += 1
        self.held = self.worker.held.narrow(bits)
        if is_settled:
            self.worker.held.leave_out(bits)


def agree(workers: Sequence[Worker]) -> list[frozenset[str]]:
    """What all ranks leave out."""
    said: dict[str, dict[int, bytes]] = defaultdict(dict)
    barrier = threading.Barrier(len(workers), timeout=20)
    count = len(workers[0].links)
    contents = Contents(
        [f"{place:03}" for place in range(count)], workers[0].tensors, b"\1" * 16 * count
    )
    found: dict[int, frozenset[str]] = {}

    def run(rank: int) -> None:
        def all_gather(what: str, value: bytes) -> list[bytes]:
            said[what][rank] = value
            barrier.wait()
            return [said[what][one] for one in range(len(workers))]

        call: Any = SimpleNamespace(all_gather=all_gather)
        found[rank] = contents.agree(call, Session(workers[rank]))  # type: ignore[arg-type]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(workers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [found[rank] for rank in range(len(workers))]


@quick
@given(st.integers(1, 12), st.integers(1, 4), st.data())
def test_ranks_leave_out_what_is_whole_for_each(count: int, ranks: int, data: Any) -> None:
    """The largest set of tensors that all hold, and that parts no worker's group."""
    links = st.lists(
        st.sets(st.sampled_from("abcdefgh"), max_size=2), min_size=count, max_size=count
    )
    loaded = st.sets(st.integers(0, count - 1), min_size=max(0, count - 2))
    workers = [Worker(data.draw(links), data.draw(loaded)) for _ in range(ranks)]
    expected = set(range(count))
    for worker in workers:
        expected &= places_in(worker.offer(), count)
    rounds, before = 0, None
    while before != expected:
        before, rounds = set(expected), rounds + 1
        for worker in workers:  # each by itself, as none waits for the others
            expected -= {at for g in worker.groups() if not g <= before for at in g}
    found = agree(workers)
    assert len(set(found)) == 1
    assert {int(name) for name in found[0]} == expected or (not found[0] and rounds > 6)


def test_ranks_that_do_not_agree_in_time_send_everything() -> None:
    """Each round takes away one tensor more: a chain of two workers' groups."""
    count = 2 * skipping._MOST_ROUNDS + 6
    pairs = [{f"m{at // 2}"} for at in range(count)]
    shifted = [{f"m{(at + 1) // 2}"} for at in range(count)]
    short = 6
    first, second = (
        Worker(pairs[:short], {*range(short)} - {0, 1}),
        Worker(shifted[:short], {*range(short)}),
    )
    assert agree([first, second]) == [frozenset()] * 2  # by the closure: all are connected
    first, second = Worker(pairs, {*range(count)} - {0, 1}), Worker(shifted, {*range(count)})
    with mock.patch.object(skipping, "_MOST_ROUNDS", 3):
        assert agree([first, second]) == [frozenset()] * 2
    held = Worker(pairs, {*range(count)}), Worker(pairs, {*range(4, count)})
    assert agree(held) == [frozenset(f"{at:03}" for at in range(4, count))] * 2


def test_a_worker_refuses_what_it_does_not_hold() -> None:
    worker = Worker([{"a"}, {"a"}, {"b"}, {"c"}], {0, 1, 2})
    assert places_in(worker.offer(), 4) == {0, 1, 2}
    for wrong in (b"\x40", b"\x10", b"\xf0", b"\xe1"):  # a part of a group; what it lacks; beyond
        worker.offer()
        with pytest.raises(RuntimeError, match="does not hold"):
            worker.held.leave_out(wrong)
    with pytest.raises(RuntimeError, match="another checkpoint"):
        worker.held.narrow(b"\x00\x00")
    worker.offer()
    assert worker.held.leave_out(b"\x20") == {"b"}
    assert worker.held.left_out == {"002"}


def test_what_is_written_is_not_held_any_more() -> None:
    worker = Worker([{"a"}, {"a"}, {"b"}, {"c"}], {0, 1, 2, 3})
    worker.held.begin_writing({"001"})
    assert places_in(worker.offer(), 4) == {2, 3}
    worker.held.begin_writing(None)
    assert places_in(worker.offer(), 4) == set()


def test_what_is_left_out_must_not_come_and_the_rest_must() -> None:
    worker = Worker([{"a"}, {"a"}, {"b"}, {"c"}], {0, 1, 2, 3})
    worker.offer()
    worker.held.leave_out(b"\xe0")
    with pytest.raises(RuntimeError, match="did not come"):
        worker.held.finish(worker.adapter, worker.recording)
    worker.held.begin_writing({"003"})
    worker.held.note_loaded({"003"})
    worker.held.finish(worker.adapter, worker.recording)
    for names in ({"003", "001"}, None):
        with pytest.raises(RuntimeError, match="leaves out"):
            worker.held.begin_writing(names)
    worker.held.look(worker.adapter)
    assert worker.offer() == b"\0"


def test_a_checkpoint_of_other_tensors_is_not_held() -> None:
    worker = Worker([{"a"}, {"b"}], {0, 1})
    assert worker.held.offer(worker.recording, "another", b"\1" * 32, True) == b"\0"
    assert worker.held.offer(worker.recording, worker.tensors, b"\1" * 48, True) == b"\0"
    assert worker.held.offer(None, worker.tensors, b"\1" * 32, True) == b"\0"
    assert worker.offer() == b"\0"  # it has forgotten what it learned of them


def test_what_has_no_hash_is_not_held() -> None:
    worker = Worker([{"a"}, {"b"}], set())
    worker.held.offer(worker.recording, worker.tensors, b"\1" * 16 + bytes(16), True)
    worker.held.note_loaded({"000", "001"})
    worker.held.finish(worker.adapter, worker.recording)
    worker.held.look(worker.adapter)
    assert worker.offer(b"\1" * 16 + bytes(16)) == b"\x80"


# ---------------------------------------------------------------------- the wire


def test_messages_of_what_is_left_out() -> None:
    hashes = bytes(range(48))
    assert wire.decode_held(wire.encode_contents("digest", hashes)) == (
        wire.HELD,
        "digest",
        hashes,
    )
    for settled in (True, False):
        message = wire.encode_left_out(b"\x05\x00", settled)
        assert wire.decode_held(message) == (wire.LEFT_OUT, settled, b"\x05\x00")
    abort = wire.decode_held(wire.encode_abort("enough"))
    assert isinstance(abort, RuntimeError)
    assert str(abort) == "enough"


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"held": []},
        {"held": ["x", 3]},
        {"held": ["x", "%"]},
        {"left out": ["", True]},
        {"left out": ["AAAA", True]},
        {"left out": [wire.encode_bits(b"\1"), 1]},
        {"left out": [wire.encode_bits(bytes(9 << 20)), True]},
    ],
)
def test_other_messages_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        wire.decode_held(wire.encode_extensions(content))
    with pytest.raises(WireError):
        wire.decode_held(wire.NOTHING_MORE)
