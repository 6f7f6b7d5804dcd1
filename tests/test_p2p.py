"""P2P over real Mooncake on TCP: some ranks of a world, and worlds that join another."""

from __future__ import annotations

from pathlib import Path

from test_update import SMALL_BUCKETS
from torchrun import torchrun


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
        assert result["shared"] == []
