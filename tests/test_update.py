"""Whole updates: real processes under torchrun, a worker beside every rank, weights compared bit
for bit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_engine.ground.devices import DeviceManager
from torchrun import torchrun

pytestmark = pytest.mark.alone
WELL_BEFORE_THE_DEADLINE = 15  # seconds; the programs give updates 40
MIB = 1 << 20
LARGEST = 3 * MIB  # of the programs' tensors
SMALL_BUCKETS = {"PS_MAX_BUCKET_SIZE_GB": str(2**-10)}  # 1 MiB
TINY_BUCKETS = {"PS_MAX_BUCKET_SIZE_GB": "1e-7"}  # as small as it gets
LARGE_BUCKETS = {"PS_MAX_BUCKET_SIZE_GB": "1"}  # one bucket for each owner

ON_EVERY_DEVICE = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]


def environment(device: str, ranks: int) -> dict[str, str]:
    if device == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices, one for each rank")
    return {"PS_DEVICE": device}


@pytest.mark.parametrize("device", ON_EVERY_DEVICE)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_updates_are_bit_exact_again_and_again(tmp_path: Path, ranks: int, device: str) -> None:
    steps: list[dict[str, Any]] = [
        {"seed": 1, "env": SMALL_BUCKETS},
        {"seed": 2, "compare": True},
        {"seed": 3},
        {"seed": 4, "env": TINY_BUCKETS},
        {"seed": 5, "env": LARGE_BUCKETS},
        {"seed": 6, "owners": [ranks - 1]},
    ]
    results = torchrun(tmp_path, ranks, "updates", env=environment(device, ranks), steps=steps)
    for result in results:
        buckets = [report["buckets"] for report in result["reports"]]
        assert ranks < buckets[0] < buckets[1] == buckets[2]  # large tensors are cut, once
        sizes = [report["bucket_bytes"] for report in result["reports"]]  # the rank knows how
        assert sizes[0] >= LARGEST > sizes[1] == sizes[2] == sizes[3] == MIB
        assert buckets[4] == ranks
        assert buckets[5] == 1
        assert_tells_whom_it_waited_for(result["reports"][1], ranks)
        assert result["hooks"] == len(steps)
        assert result["sockets"] == 0
        assert result["shared"] == []


def assert_tells_whom_it_waited_for(report: dict[str, Any], ranks: int) -> None:
    everyone = [str(rank) for rank in range(ranks)]
    assert sorted(report["by_rank"]) == sorted(report["waited_for_by_rank"]) == everyone
    for rank in everyone:
        waited = report["waited_for_by_rank"][rank]
        assert sorted(waited) == everyone
        assert 0 < sum(waited.values()) <= report["by_rank"][rank]["transfer"]
    assert report["waited_for_by_rank"][str(report["rank"])] == report["waited_for"]
    assert report["checkpoint_memory"] > 0
    own_bytes = {"host to device": report["bytes"] // ranks, "reload": report["bytes"]}
    own_bytes |= {"broadcast": report["bytes"]} if ranks > 1 else {}
    stages = report["stages"]
    assert stages.keys() == own_bytes.keys()
    for stage, nbytes in own_bytes.items():
        assert stages[stage]["bytes"] == pytest.approx(nbytes, rel=0.2)
        assert 0 < stages[stage]["seconds"] < report["seconds"]


FAULTS = [
    {"fault": "bucket:1", "rank": 0, "says": "no parameter for bucket 1"},
    {"fault": "bucket:3", "rank": 1, "says": "no parameter for bucket 3"},
    {"fault": "bucket:last", "rank": 1, "says": "no parameter for bucket"},
    {"fault": "hook", "rank": 0, "says": "cannot repack the weights"},
    {"fault": "die:2", "rank": 1, "says": "closed its connection|the worker process died"},
]


@pytest.mark.parametrize("device", ON_EVERY_DEVICE)
def test_a_failing_worker_fails_the_update_on_every_rank(tmp_path: Path, device: str) -> None:
    env = environment(device, 2) | SMALL_BUCKETS
    results = torchrun(tmp_path, 2, "faults", env=env, cases=FAULTS)
    for place, case in enumerate(FAULTS):
        texts = {result["seen"][place]["error"] for result in results}
        assert len(texts) == 1, texts
        text = texts.pop()
        assert f"failed on rank {case['rank']}" in text
        assert re.search(case["says"], text), text
        for result in results:
            seen = result["seen"][place]
            assert seen["type"] == "UpdateError"
            assert seen["seconds"] < WELL_BEFORE_THE_DEADLINE
            assert seen["leaked"] == [], (case, seen)


@pytest.mark.parametrize("device", ON_EVERY_DEVICE)
def test_mistakes_of_the_caller_are_explained_on_every_rank(tmp_path: Path, device: str) -> None:
    results = torchrun(tmp_path, 2, "bad_calls", env=environment(device, 2) | SMALL_BUCKETS)
    expected = {
        "gather before register": "no rank has registered checkpoint 'nothing'",
        "update before gather": "have not been gathered",
        "ranks without P2P": "needs P2P",
        "unknown checkpoint": "the metas of 'other' have not been gathered",
        "req_func raises": "engine at http://nowhere is not up",
        "nobody connects": "gave up after 2 s",
        "memory too small": f"free {DeviceManager(device).scarcest_memory} or raise mem_fraction",
        "changed since gather": "call gather_metas() again",
    }
    for result in results:
        for mistake, text in expected.items():
            seen = result["seen"][mistake]
            assert text in seen["error"], (mistake, seen)
            assert seen["seconds"] < WELL_BEFORE_THE_DEADLINE, (mistake, seen)
        assert result["sockets"] == 0
        assert result["shared"] == []
    assert "ranks [0] did not join" in results[1]["seen"]["one rank stays away"]["error"]


@pytest.mark.parametrize("device", ON_EVERY_DEVICE)
@pytest.mark.parametrize("ranks", [1, 2])
def test_process_groups_belong_to_who_made_them(tmp_path: Path, ranks: int, device: str) -> None:
    env = environment(device, ranks)
    for seen in torchrun(tmp_path, ranks, "process_groups", env=env, with_torchrun=ranks > 1):
        assert seen == {
            "True gathered": True,
            "None gathered": False,
            "False gathered": False,
            "True False": False,
            "True True": False,
            "None False": False,
            "None True": True,
            "False False": False,
            "False True": True,
            "True callers": True,
            "None callers": True,
            "False callers": True,
        }


def test_gloo_is_for_ranks_that_share_no_memory(tmp_path: Path) -> None:
    for used in torchrun(tmp_path, 2, "transports", env=environment("cpu", 2)):
        assert used == [False, True, True]
