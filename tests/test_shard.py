"""Ranks of several hosts, each of which reads what its workers need by P2P, once.

The hosts are processes of one machine that take each other for strangers; ``test_shard_hosts.py``
has hosts with networks of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch

from checkpoint_engine.replay import replayed
from checkpoint_engine.transfer import host_peers
from test_control import Rank, run_world
from test_owners import error_of
from test_peers import BUCKET, COUNT, Model, Server, key, tensors_of
from torchrun import mooncake_works
import tempfile

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
            server.run.report["replay"] if "replay" in server.run.report else server.run.report,
        ]

    for seen, replay in run_world(2, program):
        whole = COUNT * BUCKET // 2
        assert [right for _, right, _ in seen] == [True] * 5
        assert [nbytes for _, _, nbytes in seen] == [whole, whole, *[whole // 2] * 3]
        assert replay["loaded"] == "replayed"
