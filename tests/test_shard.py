"""Ranks of several hosts, each of which reads what its workers need by P2P, once.

The hosts are processes of one machine that take each other for strangers; ``test_shard_hosts.py``
has hosts with networks of their own.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from checkpoint_engine.ground.deadline import Deadline, poll
from checkpoint_engine.replay import replayed
from checkpoint_engine.transfer import host_peers
from checkpoint_engine.transfer.p2p_store import P2PError
from checkpoint_engine.update.session import WorkerSession
from checkpoint_engine.update.ways.shard import Shard
from fleet import digests
from test_control import Rank, run_world
from test_owners import error_of
from test_peers import BUCKET, COUNT, Model, Server, key, tensors_of
from torchrun import mooncake_works

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(not mooncake_works(), reason="P2P tests need Mooncake"),
]


@pytest.fixture(autouse=True)
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PS_MAX_BUCKET_SIZE_GB", str(BUCKET / 2**30))
    monkeypatch.setenv("PS_TRANSPORT", "shard")
    monkeypatch.setenv("PS_P2P_HOST", "127.0.0.1")
    with tempfile.TemporaryDirectory(prefix="shard-") as folder:
        monkeypatch.setenv("PS_IPC_DIR", folder)
        yield


def server_on(me: Rank, each: int) -> Server:
    """``each``: ranks of a host."""
    host_peers._this_host = lambda: f"host-{me.rank // each}"  # type: ignore[assignment]
    return Server(me)


def learn(server: Server) -> Model:
    """Its worker is a model's loader from now on, which reads half of every tensor."""
    model = Model(server.me.rank, server.me.size)
    server.run = replayed(model.load_weights)
    return model


def is_right(model: Model, seed: int, size: int) -> bool:
    half = BUCKET // 16
    begin = model.rank % 2 * half
    return all(
        torch.equal(model.params[key(owner, i)][part], tensor[begin : begin + half])
        for owner in range(size)
        for i, tensor in enumerate(tensors_of(owner, seed).values())
        for part in (slice(0, half), slice(half, None))
    )


def read_bytes(report: Any) -> int:
    return report.stages["P2P read"].bytes if "P2P read" in report.stages else 0


@pytest.mark.parametrize(("size", "each"), [(2, 1), (4, 2), (3, 1)])
def test_everything_enters_each_host_once(size: int, each: int) -> None:
    def program(me: Rank) -> list[Any]:
        server = server_on(me, each)
        reports = [server.publish(seed) for seed in (1, 2)]
        return [(r.way, server.has(2), read_bytes(r)) for r in reports]

    found = run_world(size, program)
    total = COUNT * BUCKET // 2 * size
    for host in range(size // each):
        seen = found[host * each : (host + 1) * each]
        assert all(way == "shard" and right for rank in seen for way, right, _ in rank)
        for update in (0, 1):
            reads = [rank[update][2] for rank in seen]
            assert sum(reads) == total - COUNT * BUCKET // 2 * each
            assert max(reads) <= 1.1 * sum(reads) / each


def test_a_learned_worker_gets_what_it_reads() -> None:
    def program(me: Rank) -> list[Any]:
        server = server_on(me, 1)
        model = learn(server)
        seen = []
        for seed in range(1, 6):
            report = server.publish(seed)
            seen.append((report.way, is_right(model, seed, me.size), read_bytes(report)))
        return [
            seen,
            server.run.report,
        ]

    for seen, replay in run_world(2, program):
        whole = COUNT * BUCKET // 2
        assert [right for _, right, _ in seen] == [True] * 5
        assert [nbytes for _, _, nbytes in seen] == [whole, whole, *[whole // 2] * 3]
        assert replay["loaded"] == "replayed"


# ---------------------------------------------------------------------- who needs everything again


def after_learning(server: Server, change: Any) -> list[Any]:
    """Three updates that end in one by needs, then ``change``, then three more."""
    model = learn(server)
    seen = []
    for seed in range(1, 7):
        if seed == 4:
            model = change(server, model) or model
        report = server.publish(seed)
        seen.append((is_right(model, seed, server.me.size), read_bytes(report)))
    return seen


WHOLE = COUNT * BUCKET // 2


def test_a_worker_that_is_started_again_gets_everything() -> None:
    """Before its server knows: no byte is read until it has said so, and nothing fails."""

    def program(me: Rank) -> list[Any]:
        return after_learning(server_on(me, 1), lambda s, m: learn(s) if me.rank == 1 else None)

    undisturbed, restarted = run_world(2, program)
    half = (True, WHOLE // 2)
    assert undisturbed == [(True, WHOLE)] * 2 + [half] * 4
    assert restarted == [(True, WHOLE)] * 2 + [half] + [(True, WHOLE)] * 2 + [half]


def test_one_worker_of_a_host_that_needs_everything_is_enough() -> None:
    def program(me: Rank) -> list[Any]:
        return after_learning(server_on(me, 2), lambda s, m: learn(s) if me.rank == 3 else None)

    found = run_world(4, program)
    reads = [
        [sum(found[rank][update][1] for rank in host) for update in range(6)]
        for host in ((0, 1), (2, 3))
    ]
    assert all(right for rank in found for right, _ in rank)
    # Both halves of every tensor are on each host, and so is a host's union.
    assert reads == [[2 * WHOLE] * 6] * 2


def test_a_foreign_worker_gets_everything() -> None:
    def program(me: Rank) -> list[Any]:
        server = server_on(me, 1)
        if me.rank == 0:
            return after_learning(server, lambda s, m: None)
        server.ask = server.as_foreigner
        seen = []
        for seed in range(1, 7):
            report = server.publish(seed)
            expected = digests({n: t for r in range(2) for n, t in tensors_of(r, seed).items()})
            seen.append((server.digests == expected, read_bytes(report)))
        return seen

    ours, theirs = run_world(2, program)
    assert ours == [(True, WHOLE)] * 2 + [(True, WHOLE // 2)] * 4
    assert theirs == [(True, WHOLE)] * 6


def test_the_nth_update_is_checked_with_everything() -> None:
    def program(me: Rank) -> list[Any]:
        os.environ["PS_REPLAY_CHECK"] = "2"
        return after_learning(server_on(me, 1), lambda s, m: None)

    for seen in run_world(2, program):
        assert [right for right, _ in seen] == [True] * 6
        assert [nbytes for _, nbytes in seen] == [
            WHOLE, WHOLE, WHOLE // 2, WHOLE, WHOLE // 2, WHOLE
        ]  # fmt: skip


def test_other_halves_are_not_read_from_the_old_ones() -> None:
    """A worker that becomes another tensor-parallel rank's."""

    def program(me: Rank) -> list[Any]:
        def change(server: Server, model: Model) -> Model:
            model = learn(server)
            model.rank = 1 - me.rank
            return model

        return after_learning(server_on(me, 1), change)

    for seen in run_world(2, program):
        assert [right for right, _ in seen] == [True] * 6
        assert [nbytes for _, nbytes in seen] == [WHOLE, WHOLE, WHOLE // 2] * 2


class FirstHalf(torch.nn.Module):
    """Filled with the first half of the one tensor that there is, as often as it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1 << 15), requires_grad=False)

    def load_weights(self, weights: Any) -> set[str]:
        for _, tensor in weights:
            half = tensor[: len(tensor) // 2]
            for begin in range(0, len(self.w), len(half)):
                self.w[begin : begin + len(half)].copy_(half)
        return {"w"}


def test_another_checkpoint_is_read_in_full() -> None:
    """Of the same name and another shape: a bucket by the old needs would lack bytes."""

    def program(me: Rank) -> list[Any]:
        server = server_on(me, 1)
        model = FirstHalf()
        server.run = replayed(model.load_weights)
        seen = []
        for seed, size in enumerate([*[1 << 15] * 3, *[1 << 14] * 4], 1):
            full = torch.arange(size, dtype=torch.float32) + seed
            report = server.send(f"step-{seed}", {"t": full} if me.rank == 0 else {})
            right = torch.equal(model.w[: size // 2], full[: size // 2])
            seen.append((right, read_bytes(report)))
        return seen

    large, small = 1 << 17, 1 << 16
    owner, reader = run_world(2, program)
    assert owner == [(True, 0)] * 7
    read = [large, large, large // 2, small, small, small, small // 2]
    assert reader == [(True, nbytes) for nbytes in read]


def test_a_tensor_that_moves_to_another_owner_is_found_there() -> None:
    def program(me: Rank) -> list[Any]:
        server = server_on(me, 1)
        model = learn(server)
        every = lambda seed: {n: t for r in range(3) for n, t in tensors_of(r, seed).items()}  # noqa: E731
        seen = []
        for seed in range(1, 7):
            named = every(seed)
            mine = {n: t for i, (n, t) in enumerate(named.items()) if (i * seed) % 3 == me.rank}
            report = server.send(f"step-{seed}", mine)
            seen.append((is_right(model, seed, 3), read_bytes(report)))
        return seen

    for seen in run_world(3, program):
        assert [right for right, _ in seen] == [True] * 6
        for (_, read), seed in zip(seen[2:], range(3, 7), strict=True):
            assert read <= 3 * WHOLE / 2, seed


@pytest.mark.parametrize("copies", [2, 3])
def test_bytes_that_a_host_has_already_are_not_read(copies: int) -> None:
    """Ranks that own the same tensors: those of this host, else one after the other is asked."""

    def program(me: Rank) -> list[Any]:
        server = server_on(me, 1)
        owned: dict[str, torch.Tensor] = {}
        for owner in range(3):
            if (me.rank - owner) % 3 < copies:
                owned |= tensors_of(owner, 1)
        report = server.send("step-1", owned)
        return [report.way, server.has(1), read_bytes(report)]

    assert run_world(3, program) == [["shard", True, (3 - copies) * WHOLE]] * 3


def test_new_values_of_tensors_of_several_owners_need_a_gather() -> None:
    """Some ranks cannot compare what all owners have."""

    def program(me: Rank) -> list[Any]:
        server, name, everyone = server_on(me, 1), "step-1", [0, 1]
        server.send(name, tensors_of(0, 1))
        errors = []
        for seed, ranks in ((2, everyone), (2, None), (3, everyone)):
            server.ps.unregister_checkpoint(name)
            server.ps.register_checkpoint(name, named_tensors=tensors_of(0, seed))
            if seed == 3:
                server.ps.gather_metas(name)
            request = lambda paths: server.ask(paths[me.rank][1])  # noqa: E731
            errors.append(error_of(lambda: server.ps.update(name, request, ranks=ranks)))  # noqa: B023
        return errors

    for refused, *others in run_world(2, program):
        assert "of which several ranks own the same tensors: call gather_metas() again" in refused
        assert others == ["", ""]


# ---------------------------------------------------------------------- some ranks, other worlds


def joined(server: Server, seed: int) -> Any:
    """The report of an update out of another world's memory. Its ranks are this world's, but they
    say nothing of it: their numbers mean others here."""
    rank, name = server.me.rank, f"step-{seed}"
    server.got.clear()
    server.ps.register_checkpoint(name, named_tensors=tensors_of(rank, seed))
    server.ps.gather_metas(name)
    server.ps.load_metas(server.ps.get_metas())
    everyone = list(range(server.me.size))
    try:
        return server.ps.update(name, lambda paths: server.ask(paths[rank][1]), ranks=everyone)
    finally:
        server.ps.unregister_checkpoint(name)


@pytest.mark.parametrize(("size", "each"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_another_worlds_memory_is_read_once_by_each_host(size: int, each: int) -> None:
    """Whole buckets, until the workers have stated what they need."""

    def program(me: Rank) -> list[Any]:
        server = server_on(me, each)
        first = joined(server, 1)
        seen = [(first.way, server.has(1), read_bytes(first))]
        model = learn(server)
        for seed in range(2, 6):
            report = joined(server, seed)
            seen.append((report.way, is_right(model, seed, me.size), read_bytes(report)))
        return seen

    found = run_world(size, program)
    assert all(way == "shard" and right for rank in found for way, right, _ in rank)
    for host in range(size // each):
        ranks = found[host * each : (host + 1) * each]
        read = [sum(rank[update][2] for rank in ranks) for update in range(5)]
        whole = size * WHOLE
        by_needs = whole if each > 1 else whole // 2
        assert read == [whole] * 3 + [by_needs] * 2


def test_some_ranks_read_from_owners_that_take_no_part() -> None:
    def program(me: Rank) -> list[Any]:
        server = server_on(me, 1)
        model = learn(server)
        seen = []
        for seed in range(1, 5):
            report = server.publish(seed, ranks=[0, 2])
            is_member = me.rank != 1
            assert is_member or report.bytes == 0
            right = not is_member or is_right(model, seed, me.size)
            seen.append((report.way if is_member else "", right, read_bytes(report)))
        report = server.publish(5)
        return [seen, (report.way, is_right(model, 5, me.size))]

    members = [("shard", True, 2 * WHOLE)] * 2 + [("shard", True, WHOLE)] * 2
    for rank, (seen, after) in enumerate(run_world(3, program)):
        assert seen == ([("", True, 0)] * 4 if rank == 1 else members)
        assert after == ("shard", True)


class Part(Model):
    """A model that has no use for what rank 2 owns."""

    def load_weights(self, weights: Any) -> set[str]:
        useless = tensors_of(2, 1).keys()
        return super().load_weights((n, t) for n, t in weights if n not in useless)


def test_a_rank_that_is_gone_and_owned_what_nobody_needs_is_not_missed() -> None:
    def program(me: Rank) -> list[Any]:
        server, name = server_on(me, 1), "step-4"
        model = Part(me.rank, 2)
        server.run = replayed(model.load_weights)
        for seed in (1, 2, 3):
            server.publish(seed)
        server.ps.register_checkpoint(name, named_tensors=tensors_of(me.rank, 4))
        server.ps.gather_metas(name)
        liveness = server.ps._control._world.liveness  # type: ignore[union-attr]
        if me.rank == 2:
            liveness.close()
            return []
        poll(lambda: 2 in liveness.gone, partial(Deadline(20).check, "the end of rank 2"))
        request = lambda paths: server.ask(paths[me.rank][1])  # noqa: E731
        report = server.ps.update(name, request, ranks=[0, 1])
        return [report.way, is_right(model, 4, 2), read_bytes(report)]

    *rest, _ = run_world(3, program)
    assert rest == [["shard", True, WHOLE // 2]] * 2


def hellos_of(hosts: int, **said: Any) -> list[Any]:
    """What ranks say that is looked at before a way is taken, one on each host."""
    common = {"ranks": (0, 1), "transport": "auto", "reads": "tcp", "needs": ""} | said
    named = ({"rank": rank, "neighbour": f"host-{rank}/socket"} for rank in range(hosts))
    return [SimpleNamespace(**{**name, **common}) for name in named]


OWNER = SimpleNamespace(metas={0: SimpleNamespace(p2p_store_addr="10.0.0.1:700")})


@pytest.mark.parametrize(
    ("hellos", "says"),
    [
        (hellos_of(2), "all 2 hosts would read everything from 1, as no worker has stated"),
        (hellos_of(2, needs="digest"), None),
        (hellos_of(2, transport="shard"), None),
        (hellos_of(1), None),
        (hellos_of(2, transport="group"), "PS_TRANSPORT=group"),
        (hellos_of(2, reads=""), r"ranks \[0, 1\] have no P2P"),
        (
            hellos_of(2, neighbour=""),
            r"ranks \[0, 1\] share no memory, by their device or settings",
        ),
    ],
)
def test_what_ranks_that_cannot_go_this_way_say(hellos: list[Any], says: str | None) -> None:
    inside: Any = SimpleNamespace(cannot_stage=lambda *_: None)
    way = Shard(SimpleNamespace(rank=0), SimpleNamespace(store=None), inside)  # type: ignore[arg-type]
    refused = way.refusal(OWNER, hellos)  # type: ignore[arg-type]
    assert refused is None if says is None else re.match(says, str(refused))


# ---------------------------------------------------------------------- bytes that are not there


def test_a_loader_that_reads_anew_refuses_what_was_read_by_its_old_needs() -> None:
    """Its parameters move after the handshake: an error, and the next update is whole."""

    def program(me: Rank) -> list[Any]:
        server = server_on(me, 1)
        model = learn(server)
        seen = []
        for seed in range(1, 7):
            if seed == 4 and me.rank == 1:
                promise = type(server.run).reads_next

                def late(run: Any, promise: Any = promise) -> Any:
                    said = promise.fget(run)
                    run.abandon()
                    run._learned.forget()
                    type(run).reads_next = promise
                    return said

                type(server.run).reads_next = property(late)
            error = error_of(lambda seed=seed: server.publish(seed))
            seen.append((error, error != "" or is_right(model, seed, me.size)))
        return seen

    for seen in run_world(2, program):
        assert [right for _, right in seen] == [True] * 6
        errors = [error for error, _ in seen]
        assert errors[:3] + errors[4:] == [""] * 5
        assert "sent only the bytes that this loader read before" in errors[3]


def test_a_bucket_by_needs_that_were_never_promised_is_refused() -> None:
    """A server that goes on by what it knows, whatever the worker says."""

    def program(me: Rank) -> list[Any]:
        server = server_on(me, 1)
        learn(server)
        for seed in (1, 2, 3):
            server.publish(seed)
        if me.rank == 1:
            learn(server)
        WorkerSession.reads_needs = property(lambda session: session.needs != "")  # type: ignore[method-assign,assignment]
        return [error_of(lambda: server.publish(4))]

    for (error,) in run_world(2, program):
        assert "holds less than this worker said that it reads" in error


@pytest.mark.timeout(120)
def test_a_bucket_waits_for_the_last_rank_of_the_host_to_say_what_its_worker_reads() -> None:
    """One rank hears it late, when the others have read and offered their buckets already."""

    def program(me: Rank) -> list[Any]:
        server = server_on(me, 3)
        model = learn(server)
        if me.rank == 1:

            def tell_all(peers: host_peers.HostPeers, word: bytes) -> None:
                for owner in sorted(peers.incoming):  # rank 2 last
                    if owner == 2 and word == host_peers.MAPPED:
                        time.sleep(0.5)
                    peers.tell(owner, word)

            host_peers.HostPeers.tell_all = tell_all  # type: ignore[method-assign]
        errors = []
        for seed in range(1, 5):
            named = {n: t for r in range(me.size) for n, t in tensors_of(r, seed).items()}
            owned = named if me.rank == 3 else {}
            errors.append(error_of(lambda: server.send(f"step-{seed}", owned)))  # noqa: B023
        return [errors, is_right(model, 4, me.size)]

    assert run_world(4, program) == [[[""] * 4, True]] * 4


def test_a_host_whose_memory_cannot_be_read_is_served_by_the_group() -> None:
    """As where a firewall lets the ranks meet, and lets nobody read."""

    def program(me: Rank) -> list[Any]:
        server = server_on(me, 1)
        if me.rank == 1:

            def closed(*_: Any, **__: Any) -> None:
                raise P2PError("nobody answers")

            server.ps._p2p_store.check_lease = closed  # type: ignore[union-attr,method-assign]
        report = server.publish(1)
        return [report.way, report.way_reason, server.has(1)]

    for way, reason, right in run_world(2, program):
        assert (way, right) == ("broadcast", True)
        assert "not by shard: rank 1 cannot read the memory of host 127.0.0.1" in reason


def test_the_group_is_taken_where_it_is_asked_for() -> None:
    def program(me: Rank) -> list[Any]:
        os.environ["PS_TRANSPORT"] = "group" if me.rank == 0 else "auto"
        server = server_on(me, 1)
        reports = [server.publish(seed) for seed in (1, 2)]
        return [(r.way, r.way_reason.rpartition("; ")[2], server.has(2)) for r in reports]

    for seen in run_world(2, program):
        assert seen == [("broadcast", "not by shard: PS_TRANSPORT=group", True)] * 2


def test_two_hosts_over_tcp_wait_until_a_worker_has_stated_its_needs() -> None:
    def program(me: Rank) -> list[Any]:
        os.environ["PS_TRANSPORT"] = "auto"
        server = server_on(me, 1)
        learn(server)
        return [server.publish(seed).way for seed in range(1, 5)]

    assert run_world(2, program) == [["broadcast", "broadcast", "shard", "shard"]] * 2
