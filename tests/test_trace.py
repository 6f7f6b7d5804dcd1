"""Traces of whole updates, read as Perfetto reads them."""

from __future__ import annotations

import itertools
import json
import re
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from checkpoint_engine.errors import UpdateError
from checkpoint_engine.update.trace import write_trace
from torchrun import torchrun

pytestmark = pytest.mark.alone
SOON = 2.0  # seconds in which an error is on every rank, with a trace or without
SMALL_BUCKETS = {"PS_DEVICE": "cpu", "PS_MAX_BUCKET_SIZE_GB": "1e-4"}


def lanes_of(path: Path) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """The complete events of a trace, by rank and lane."""
    events = json.loads(path.read_text())["traceEvents"]
    threads = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"
    }
    numbers = [tid for _, tid in threads]
    assert len(set(numbers)) == len(numbers)  # Perfetto knows one thread of a number
    assert not {0, *(pid for pid, _ in threads)}.intersection(numbers)
    lanes = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            lanes[event["pid"], threads[event["pid"], event["tid"]]].append(event)
    return lanes


def end_of(event: dict[str, Any]) -> float:
    return float(event["ts"] + event["dur"])


def test_a_trace_follows_no_link_that_others_have_prepared(tmp_path: Path) -> None:
    spans = [("phases", "start", 10, 20, {})]
    part = zlib.compress(json.dumps({"rank": 0, "host": "h", "spans": spans}).encode())
    folder, elsewhere = tmp_path / "traces", tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "c-v.json").symlink_to(elsewhere)
    assert write_trace(folder, "c", "v", [part]) == folder / "c-v-2.json"
    assert not elsewhere.exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_bucket_is_in_every_lane_in_order(tmp_path: Path, ranks: int) -> None:
    folder = tmp_path / "traces"
    results = torchrun(
        tmp_path,
        ranks,
        "updates",
        env={**SMALL_BUCKETS, "PS_TRACE": str(folder)},
        steps=[{"seed": 1}, {"seed": 2}],
    )
    reports = [result["reports"] for result in results]
    assert [report["trace"] for report in reports[-1]] == [None] * 2 or ranks == 1
    written = [Path(report["trace"]) for report in reports[0]]
    assert sorted(folder.iterdir()) == sorted(written)
    for path, report in zip(written, reports[0], strict=True):
        lanes = lanes_of(path)
        broadcasts = {"broadcast"} if ranks > 1 else set()
        expected = {"phases", "host to device", "reload"} | broadcasts
        assert set(lanes) == {(rank, lane) for rank in range(ranks) for lane in expected}
        everything = {f"bucket {number}" for number in range(1, report["buckets"] + 1)}
        copied = [lane for (_, name), lane in lanes.items() if name == "host to device"]
        assert {event["name"] for lane in copied for event in lane} == everything
        assert sum(event["args"]["bytes"] for lane in copied for event in lane) == report["bytes"]
        for rank in range(ranks):
            for name in broadcasts | {"reload"}:
                assert {event["name"] for event in lanes[rank, name]} == everything
            phases = [event["name"] for event in lanes[rank, "phases"]]
            assert phases[0] == "start"
            assert phases[-1] == "post hook"
        first = min(event["ts"] for lane in lanes.values() for event in lane)
        last = max(end_of(event) for lane in lanes.values() for event in lane)
        assert last - first <= 1.05e6 * report["seconds"]
        for lane in lanes.values():
            for before, after in itertools.pairwise(lane):
                assert end_of(before) <= after["ts"]  # viewers nest what overlaps
        for rank in range(ranks):
            reloads = {event["name"]: event["ts"] for event in lanes[rank, "reload"]}
            for stage in expected - {"phases", "reload"}:
                for event in lanes[rank, stage]:
                    assert end_of(event) <= reloads[event["name"]] + 500  # us between threads


def test_one_rank_that_asks_is_enough_and_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    results = torchrun(
        tmp_path, 2, "traced", env=SMALL_BUCKETS, folder=str(folder), version="a/b c"
    )
    assert [result["traces"] for result in results] == [
        [None, None],
        [str(folder / "step-1-a_b_c.json"), str(folder / "step-1-a_b_c-2.json")],
    ]
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(("fault", "phase"), [("bucket:2", "reload"), ("hook", "post hook")])
def test_each_rank_writes_its_part_of_a_failed_update(
    tmp_path: Path, fault: str, phase: str
) -> None:
    folder = tmp_path / "traces"
    env = {**SMALL_BUCKETS, "PS_TRACE": str(folder)}
    results = torchrun(tmp_path, 2, "faults", env=env, cases=[{"fault": fault, "rank": 1}])
    seen = [result["seen"][0] for result in results]
    assert all(one["seconds"] < SOON and one["leaked"] == [] for one in seen)
    paths = [Path(one["trace"]) for one in seen]
    assert sorted(paths) == sorted(folder.glob("*-failed-rank[01].json"))
    traces = [json.loads(path.read_text()) for path in paths]
    for trace in traces:
        assert trace["otherData"]["failure"] == seen[0]["error"] == seen[1]["error"]
    marks = [[one for one in trace["traceEvents"] if one["ph"] == "i"] for trace in traces]
    assert marks[0] == []
    (mark,) = marks[1]
    assert mark["name"] == f"rank 1 failed during {phase}"
    lanes = lanes_of(paths[0]) | lanes_of(paths[1])
    for rank in range(2):
        phases = [event["name"] for event in lanes[rank, "phases"]]
        assert (phases[0], phases[-1]) == ("start", "failed")
    names = [event["name"] for event in lanes[1, "reload"]]
    assert names[0] == "bucket 1"
    broken = re.findall(r"failed in (bucket \d+) of", seen[0]["error"])
    assert len(broken) == (phase == "reload")
    assert [name for name in names if name.endswith("broken off")] == [
        f"{name} broken off" for name in broken
    ]
    assert mark["ts"] == lanes[1, "phases"][-1]["ts"]
    assert end_of(lanes[1, "reload"][-1]) <= mark["ts"]


def test_a_rank_that_is_gone_has_no_lanes_and_nothing_is_overwritten(tmp_path: Path) -> None:
    spans = [("phases", "start", 10, 20, {}), ("phases", "failed", 20, 30, {})]
    part = zlib.compress(json.dumps({"rank": 1, "host": "h", "spans": spans}).encode())
    failure = UpdateError("update", 0, "reload", "rank 0 is gone")
    paths = [write_trace(tmp_path, "c", "1", [part], failure) for _ in range(2)]
    assert [path.name for path in paths] == ["c-1-failed-rank1.json", "c-1-failed-rank1-2.json"]
    for path in paths:
        assert list(lanes_of(path)) == [(1, "phases")]
        assert "rank 0 is gone" in json.loads(path.read_text())["otherData"]["failure"]


def test_a_folder_that_cannot_be_written_fails_nothing(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    results = torchrun(
        tmp_path, 1, "updates", env={**SMALL_BUCKETS, "PS_TRACE": str(taken)}, steps=[{"seed": 1}]
    )
    assert results[0]["reports"][0]["trace"] is None


def test_of_a_failure_neither(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    env = {**SMALL_BUCKETS, "PS_TRACE": str(taken)}
    (result,) = torchrun(tmp_path, 1, "faults", env=env, cases=[{"fault": "hook", "rank": 0}])
    (seen,) = result["seen"]
    assert "cannot repack the weights" in seen["error"]
    assert seen["trace"] is None
