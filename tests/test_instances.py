"""Updates that go on without the engine instances that fail, and what workers say they hold."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from checkpoint_engine.errors import CollectiveError, EngineError
from checkpoint_engine.ground.deadline import Deadline
from checkpoint_engine.handover import wire
from checkpoint_engine.loading.version import WeightVersion
from checkpoint_engine.update.instances import Instance
from checkpoint_engine.update.session import WorkerSession
from checkpoint_engine.world.clock import Clock
from test_update import ON_EVERY_DEVICE, SMALL_BUCKETS, environment
from torchrun import torchrun

pytestmark = pytest.mark.alone
CASES = [
    {"fault": "refuse", "rank": 1, "size": 1, "phase": "handshake", "says": "is not up"},
    {"fault": "bucket:1", "rank": 0, "size": 1, "phase": "reload", "says": "bucket 1"},
    {"fault": "bucket:3", "rank": 2, "size": 1, "phase": "reload", "says": "bucket 3"},
    {"fault": "bucket:last", "rank": 3, "size": 1, "phase": "reload", "says": "for bucket"},
    {"fault": "hook", "rank": 0, "size": 1, "phase": "post hook", "says": "cannot repack"},
    {"fault": "bucket:3", "rank": 1, "size": 2, "phase": "reload", "says": "bucket 3"},
    {"fault": "refuse", "rank": 2, "size": 2, "phase": "handshake", "says": "is not up"},
    {"fault": "hook", "rank": 3, "size": 2, "phase": "post hook", "says": "cannot repack"},
]


@pytest.mark.parametrize("device", ON_EVERY_DEVICE)
def test_other_instances_are_updated(tmp_path: Path, device: str) -> None:
    env = environment(device, 4) | SMALL_BUCKETS
    results = torchrun(tmp_path, 4, "instances", env=env, cases=CASES)
    for number, case in enumerate(CASES):
        seen = [result["seen"][number] for result in results]
        instance = case["rank"] // case["size"]
        lost = list(range(instance * case["size"], (instance + 1) * case["size"]))
        for rank, one in enumerate(seen):
            (failure,) = one["failed_instances"]
            assert failure["ranks"] == lost
            assert failure["instance"] == f"engine {instance}"
            assert case["says"] in failure["error"] or "another rank" in failure["error"]
            holds = one["holds"]
            if rank not in lost:
                assert holds == {"version": f"version-{number}", "state": "complete"} | UPDATED
            elif case["fault"] != "hook" or rank == case["rank"]:
                assert holds["version"] != f"version-{number}"
                assert holds["state"] == "failed" or case["fault"] == "refuse"
        failures = [one["failed_instances"] for one in seen]
        assert failures.count(failures[0]) == 4
        assert failures[0][0]["phase"] == case["phase"] or case["size"] > 1
    for result in results:
        assert result["sockets"] == 0
        assert result["shared"] == []


UPDATED: dict[str, Any] = {"updating": None}


@pytest.mark.parametrize("device", ON_EVERY_DEVICE)
def test_an_update_of_no_instance_is_an_error(tmp_path: Path, device: str) -> None:
    """The third bucket reaches a rank only once the first is loaded on all of them."""
    env = environment(device, 2) | SMALL_BUCKETS
    cases = [{"fault": "bucket:3", "rank": 1, "size": 2}]
    for result in torchrun(tmp_path, 2, "instances", env=env, cases=cases):
        (seen,) = result["seen"]
        assert "no engine could be updated" in seen["error"]
        assert seen["holds"] == {"version": None, "state": "failed", "updating": "version-0"}


@pytest.mark.parametrize("device", ON_EVERY_DEVICE)
def test_a_worker_that_was_never_reached_is_not_called_failed(tmp_path: Path, device: str) -> None:
    env = environment(device, 2) | SMALL_BUCKETS
    cases = [{"fault": "bucket:1", "rank": 1, "size": 2, "unreached": 0}]
    untouched, _ = torchrun(tmp_path, 2, "instances", env=env, cases=cases)
    (seen,) = untouched["seen"]
    assert "no engine could be updated" in seen["error"]
    assert seen["holds"] == {"version": None, "state": "initial", "updating": None}


@pytest.mark.parametrize("goes_on", [False, True])
def test_an_engine_fails_in_reload_also_while_the_next_bucket_is_waited_for(goes_on: bool) -> None:
    """Whether its answer tells of the failure, or its request."""
    for answers in (True, False):
        request: Future[Any] = Future()
        call, link = waiting_call(), SimpleNamespace(send=mock.Mock(), abort=mock.Mock())
        link.has_reply, link.check = lambda: True, mock.Mock()
        session = (
            Instance(link, request, call, ["engine"], "v")
            if goes_on
            else WorkerSession(link, call, "v")
        )
        call.clock.begin("transfer")
        assert session.phase == "transfer"
        session.begin_reload(b"bucket 1")
        link.receive = lambda check: wire.ACK
        session.await_reload("bucket 1", lambda: None)
        assert session.phase == "transfer"
        session.begin_reload(b"bucket 2")
        link.receive = lambda check: b"cannot load"
        request.set_exception(RuntimeError("cannot load"))
        if not goes_on:
            with pytest.raises(EngineError, match="bucket 2"):
                session.await_reload("bucket 2", lambda: None)
            assert session.phase == "reload"
            continue
        if answers:
            session.await_reload("bucket 2", lambda: None)
        session.check()
        with pytest.raises(CollectiveError, match="cannot load"):
            session._settle("loaded")
        assert [one.phase for one in session.failed] == ["reload"]


def waiting_call() -> Any:
    """Of one rank, which hears nothing from others."""
    call = SimpleNamespace(members=[0], rank=0, clock=Clock("update", "c"), check=mock.Mock())
    call.deadline, call.tell = Deadline(10.0), mock.Mock()
    call.all_gather = lambda what, mine: [mine]
    return call


def test_a_version_is_held_only_when_it_is_whole() -> None:
    version = WeightVersion()
    assert version.describe() == {"version": None, "state": "initial", "updating": None}
    version.fail()
    assert version.describe()["state"] == "initial"
    version.begin("a")
    assert version.describe() == {"version": None, "state": "updating", "updating": "a"}
    version.fail()
    assert version.describe() == {"version": None, "state": "failed", "updating": "a"}
    version.begin("a")
    version.complete()
    version.begin("b")
    assert version.describe() == {"version": None, "state": "updating", "updating": "b"}
    version.fail()
    assert version.describe() == {"version": None, "state": "failed", "updating": "b"}
    version.begin("a")
    version.complete()
    version.fail()
    assert version.describe() == {"version": "a", "state": "complete", "updating": None}
