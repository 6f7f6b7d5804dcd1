"""Whole updates: real processes under torchrun, a worker beside every rank, weights compared bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchrun import torchrun

SMALL_BUCKETS = {"PS_MAX_BUCKET_SIZE_GB": str(2**-10)}  # 1 MiB
TINY_BUCKETS = {"PS_MAX_BUCKET_SIZE_GB": "1e-7"}  # the largest tensor decides
LARGE_BUCKETS = {"PS_MAX_BUCKET_SIZE_GB": "1"}  # one bucket for each owner

ON_EVERY_DEVICE = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]


def environment(device: str, ranks: int) -> dict[str, str]:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return {"PS_DEVICE": device}


@pytest.mark.parametrize("device", ON_EVERY_DEVICE)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_updates_are_bit_exact_again_and_again(tmp_path: Path, ranks: int, device: str) -> None:
    steps: list[dict[str, Any]] = [
        {"seed": 1, "env": SMALL_BUCKETS},
        {"seed": 2},
        {"seed": 3},
        {"seed": 4, "env": TINY_BUCKETS},
        {"seed": 5, "env": LARGE_BUCKETS},
        {"seed": 6, "owners": [ranks - 1]},
        {"seed": 7, "owners": []},
    ]
    results = torchrun(tmp_path, ranks, "updates", env=environment(device, ranks), steps=steps)
    for result in results:
        buckets = [report["buckets"] for report in result["reports"]]
        assert buckets[0] == buckets[1] > ranks
        assert buckets[4] == ranks
        assert buckets[5] == 1
        assert buckets[6] == 0
        assert result["hooks"] == len(steps)
        assert result["sockets"] == 0
        assert result["shared"] == []
