"""P2P over real Mooncake on TCP: some ranks of a world, and worlds that join another."""

from __future__ import annotations

from pathlib import Path

import pytest

from test_update import SMALL_BUCKETS
from torchrun import MOONCAKE_ADVICE, Run, mooncake_works, torchrun

pytestmark = pytest.mark.skipif(not mooncake_works(), reason=MOONCAKE_ADVICE)
CPU = {"PS_DEVICE": "cpu"} | SMALL_BUCKETS


def test_chosen_ranks_pull_from_all_owners(tmp_path: Path) -> None:
    steps = [
        {"ranks": [0, 1], "env": SMALL_BUCKETS},
        {"ranks": [1, 3]},
        {"ranks": [2], "all_call": False},
        {"ranks": [2, 1, 0, 3]},
        {"ranks": [3, 0], "all_call": False, "env": {"PS_MAX_BUCKET_SIZE_GB": "1"}},
    ]
    results = torchrun(tmp_path, 4, "p2p", env={"PS_DEVICE": "cpu"}, steps=steps)
    for result in results:
        assert result["sockets"] == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("unregister", "has unregistered or replaced the checkpoint"),
        ("replace", "has unregistered or replaced the checkpoint"),
        ("reuse pool", "has unregistered or replaced the checkpoint"),
        ("die", "cannot read"),
    ],
)
def test_a_world_joins_and_never_takes_stale_weights(
    tmp_path: Path, change: str, says: str
) -> None:
    """Two worlds: three owners that go on with their own updates, and two ranks that join."""
    owners = Run(tmp_path / "a", 3, "source", CPU, folder=str(tmp_path), changes=[change])
    try:
        joined = torchrun(
            tmp_path / "b", 2, "joiner", 55, CPU, folder=str(tmp_path), sources=3, changes=[change]
        )
        if change != "die":
            assert min(result["updates"] for result in owners.wait()) > 0
    except AssertionError as error:
        raise AssertionError(f"{error}\nthe owners: {owners.output()}") from None
    finally:
        owners.kill()
    for result in joined:
        assert min(result["buckets"]) >= 0
        assert result["sockets"] == 0
        for seen in result["seen"]:
            assert says in seen["error"]
            assert seen["seconds"] < 15
