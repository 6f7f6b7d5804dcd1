"""Sharded updates over hosts with networks of their own: namespaces, and Mooncake over TCP. What
enters a host is counted by its network interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hosts import Host, World
from test_hosts import MakeHosts, check_clean, make_hosts  # noqa: F401
from torchrun import HERE, mooncake_works

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(not mooncake_works(), reason="P2P tests need Mooncake"),
]
CPU = {"PS_DEVICE": "cpu", "PS_MAX_BUCKET_SIZE_GB": str(5 / 1024)}


def start(
    hosts: list[Host],
    place: Path,
    program: str,
    ranks_each: int = 1,
    env: dict[str, str] | None = None,
    **arguments: Any,
) -> World:
    command = [str(HERE / "shard_programs.py"), program, json.dumps(arguments)]
    return World(hosts, place, command, ranks_each, CPU | (env or {}))


@pytest.mark.parametrize(
    ("count", "each", "tp"),
    [
        pytest.param(2, 1, 2, id="TP over two hosts"),
        pytest.param(2, 2, 4, id="TP over two hosts of two ranks"),
        pytest.param(2, 2, 2, id="TP inside each of two hosts"),
        pytest.param(3, 1, 1, id="three hosts"),
    ],
)
@pytest.mark.timeout(120)
def test_each_host_gets_what_its_workers_need_once(
    tmp_path: Path,
    make_hosts: MakeHosts,  # noqa: F811
    count: int,
    each: int,
    tp: int,
) -> None:
    hosts = make_hosts(count)
    results = start(hosts, tmp_path / "w", "sharded", each, tp=tp, updates=4).wait(100)
    check_clean(results)
    total = results[0]["total"]
    for host in range(count):
        here = results[host * each : (host + 1) * each]
        assert all(one["right"] for rank in here for one in rank["seen"])
        for number in (0, 1):  # the workers have stated nothing yet
            assert here[0]["seen"][number]["way"] == ("shard" if count > 2 else "broadcast")
        for number in (2, 3):
            seen = [rank["seen"][number] for rank in here]
            assert {one["way"] for one in seen} == {"shard"}
            read = sum(one["read"] for one in seen)
            assert read <= 1.05 * here[0]["needed"] < 1.05 * total + 1
            assert seen[0]["received"] <= 1.05 * here[0]["needed"]
            assert seen[0]["received"] >= read
