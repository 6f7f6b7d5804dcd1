# ruff: noqa: F811  (fixtures that test_service.py has, too)
"""Jobs, status, metrics and the page of a real service of two ranks."""

from __future__ import annotations

import asyncio
import builtins
import json
import pickle
import re
import threading
import time
from collections.abc import Callable
from importlib import resources
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from checkpoint_engine.errors import KINDS, AccessError, BusyError, UpdateError
from checkpoint_engine.ground.deadline import Deadline
from checkpoint_engine.ground.report import PHASES, UpdateReport
from checkpoint_engine.service.app import make_app
from checkpoint_engine.service.jobs import CallError, Jobs
from test_service import (  # noqa: F401
    RANKS,
    ROOT,
    WEIGHTS,
    Engine,
    World,
    assert_good,
    engine,
    registered,
    url,
    world,
)

REPORT = UpdateReport(
    checkpoint_name="c",
    rank=0,
    world_size=1,
    tensors=3,
    buckets=1,
    bucket_bytes=256,
    bytes=2_000_000_000,
    seconds=0.5,
    phases={"plan": 0.1, "reload": 0.4},
)


# ---------------------------------------------------------------------- jobs


def test_a_job_that_is_waited_for() -> None:
    jobs = Jobs()
    assert jobs.start("update", "c", lambda: REPORT)[1].result() is REPORT
    (job,) = jobs.all()
    assert (job.call, job.checkpoint, job.state, job.report) == ("update", "c", "done", REPORT)


def test_a_job_that_fails_raises_and_is_remembered() -> None:
    jobs = Jobs()
    with pytest.raises(BusyError):
        jobs.start("update", "c", lambda: raising(BusyError("another one runs")))[1].result()
    (job,) = jobs.all()
    assert job.state == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.message) == ("busy", "another one runs")


def test_a_job_that_is_not_waited_for() -> None:
    jobs, go_on = Jobs(), threading.Event()
    job, _ = jobs.start("gather", "c", lambda: go_on.wait(20))
    assert job.state == "running"
    assert until(lambda: jobs.find(job.id), lambda found: found.seconds > 0).state == "running"
    go_on.set()
    assert until(lambda: jobs.find(job.id), lambda found: found.state == "done")


def test_only_the_last_jobs_are_remembered_and_none_that_runs_is_forgotten() -> None:
    jobs, go_on = Jobs(), threading.Event()
    running, _ = jobs.start("update", "slow", lambda: go_on.wait(20))
    for number in range(150):
        jobs.start("gather", str(number), lambda: None)[1].result()
    listed = jobs.all()
    assert listed[0].checkpoint == "149"
    assert len(listed) <= 102
    assert jobs.find(running.id) is not None
    go_on.set()


def raising(error: Exception) -> Any:
    raise error


def until(look: Callable[[], Any], condition: Callable[[Any], bool], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not condition(found := look()):
        assert time.monotonic() < deadline, found
        time.sleep(0.005)
    return found


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BusyError("x"), "busy"),
        (UpdateError("update", 1, "reload", "x"), "update_failed"),
        (AccessError("x"), "forbidden"),
        (FileNotFoundError("x"), "not_found"),
        (MemoryError("x"), "out_of_memory"),
        (TimeoutError("x"), "timeout"),
        (ValueError("x"), "invalid"),
        (KeyError("x"), "failed"),
    ],
)
def test_codes_of_errors(error: Exception, code: str) -> None:
    failure = CallError.of(error)
    assert failure.code == code
    assert failure.hint or code == "failed"
    assert failure.cause in KINDS


def test_an_exception_of_others_with_a_kind_of_its_own_is_no_new_kind() -> None:
    error = RuntimeError("x")
    error.kind = ["of theirs"]  # type: ignore[attr-defined]
    assert CallError.of(error).cause == "failed"


def test_an_update_error_reaches_another_process_whole() -> None:
    error = UpdateError("update", 1, "reload", "no room", "out_of_memory")
    error.engines = {0: "untouched"}
    other = pickle.loads(pickle.dumps(error))
    assert str(other) == str(error)
    assert vars(other) == vars(error)


# ---------------------------------------------------------------------- a real service


def poll_jobs(world: World, ids: list[str]) -> list[dict[str, Any]]:
    return [
        until(
            lambda client=client, id=id: client.get(f"/v1/jobs/{id}").json(),
            lambda job: job["state"] != "running",
        )
        for client, id in zip(world.clients, ids, strict=True)
    ]


@pytest.mark.usefixtures("registered")
def test_an_update_as_a_job(world: World, engine: Engine, url: str) -> None:
    bodies = ({"update_url": url, "timeout": 40}, {"timeout": 40})
    answers = world.post("/v1/checkpoints/c/update?wait=false", *bodies)
    assert [answer.status_code for answer in answers] == [202] * RANKS
    jobs = poll_jobs(world, [answer.json()["id"] for answer in answers])
    assert [job["state"] for job in jobs] == ["done"] * RANKS
    assert jobs[0]["report"]["tensors"] == len(WEIGHTS)
    assert len(engine.weights) == RANKS


@pytest.mark.usefixtures("registered")
def test_a_failed_job_has_code_and_hint(world: World, engine: Engine, url: str) -> None:
    engine.refusal = "layer 7 does not fit"
    bodies = ({"update_url": url, "timeout": 40}, {"timeout": 40})
    answers = world.post("/v1/checkpoints/c/update?wait=false", *bodies)
    for job in poll_jobs(world, [answer.json()["id"] for answer in answers]):
        assert job["state"] == "failed"
        assert job["error"]["code"] == "update_failed"
        assert job["error"]["cause"] == "request_failed"
        assert "layer 7 does not fit" in job["error"]["message"]
        assert job["error"]["hint"]


@pytest.mark.usefixtures("registered")
def test_the_report_when_asked_for(world: World, url: str) -> None:
    bodies = ({"update_url": url, "timeout": 40}, {"timeout": 40})
    for rank, answer in enumerate(world.post("/v1/checkpoints/c/update?report=true", *bodies)):
        report = UpdateReport.model_validate_json(answer.content)
        assert (report.rank, report.tensors) == (rank, len(WEIGHTS))


def test_an_unknown_job(world: World) -> None:
    answer = world.clients[0].get("/v1/jobs/none")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


@pytest.mark.usefixtures("registered")
def test_status_tells_what_each_rank_holds(world: World) -> None:
    for rank, client in enumerate(world.clients):
        status = client.get("/v1/status").json()
        assert (status["rank"], status["world_size"], status["device"]) == (rank, RANKS, "cpu")
        assert [one["tensors"] for one in status["checkpoints"]] == [4]
        assert status["pinned_bytes"] == status["checkpoints"][0]["bytes"]
        assert [one["tensors"] for one in status["ranks"]] == [4, 4]
        assert status["jobs"][0]["call"] == "gather"


def figures(world: World) -> dict[tuple[str, ...], float]:
    answer = world.clients[0].get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


@pytest.mark.usefixtures("registered")
def test_metrics_count_what_happened(world: World, engine: Engine, url: str) -> None:
    before = figures(world)
    assert_good(world.update(url))
    engine.refusal = "no"
    world.update(url)
    after = figures(world)

    def rise(*key: str) -> float:
        return after[key] - before[key]

    assert rise("checkpoint_engine_calls_total", "update", "done") == 1
    assert rise("checkpoint_engine_failures_total", "request_failed") == 1
    moved = sum(weight.nbytes for weight in WEIGHTS.values())
    assert moved <= rise("checkpoint_engine_updated_bytes_total") <= moved + 256 * len(WEIGHTS)
    assert rise("checkpoint_engine_phase_seconds_total", "reload") > 0
    assert after["checkpoint_engine_checkpoints",] == 1
    assert after["checkpoint_engine_pinned_bytes",] > 0
    assert rise("checkpoint_engine_stage_seconds_total", "reload") > 0
    assert rise("checkpoint_engine_stage_bytes_total", "reload") == rise(
        "checkpoint_engine_updated_bytes_total"
    )


def served(world: World) -> dict[str, float]:
    """By engine, a number of what it serves."""
    found = figures(world)
    engines = [key[1] for key in found if key[0] == "checkpoint_engine_served"]
    return {one: found["checkpoint_engine_served_version", one] for one in engines}


@pytest.mark.usefixtures("registered")
def test_metrics_say_which_version_each_engine_serves(
    world: World, engine: Engine, url: str
) -> None:
    assert_good(world.update(url))
    ((name, number),) = served(world).items()
    status = world.clients[0].get("/v1/status").json()
    assert status["jobs"][0]["report"]["version"] == status["served"]["version"]
    assert status["served"]["engine"] == name
    engine.refusal = "no"
    world.update(url)
    assert served(world) == {name: number}  # nothing has been written
    engine.refusal = ""
    both_load = threading.Barrier(2, lambda: raising(RuntimeError("no room")), timeout=30)
    engine.on_bucket = both_load.wait  # a worker that got no bucket holds what it held
    world.update(url)
    assert served(world) == {}
    engine.on_bucket = lambda: None
    assert_good(world.update(url))
    assert served(world)[name] not in (number, 0)  # another version


@pytest.mark.usefixtures("registered")
def test_a_rank_has_few_series_and_no_more_with_every_update(
    world: World, engine: Engine, url: str
) -> None:
    idle = figures(world).keys()
    assert len(idle) <= 78  # and two of what its engine serves
    assert_good(world.update(url))
    first = figures(world).keys()
    assert len(first) <= 80
    assert_good(world.update(url))
    engine.refusal = "no"
    world.update(url)
    assert figures(world).keys() == first
    assert not [key for key in first if "_created" in key[0]]


def while_reloading(world: World) -> dict[str, Any]:
    """The status of rank 0 once its own handshake is over: the other's bucket may be what waits."""
    ends = Deadline(30)
    while True:
        status: dict[str, Any] = world.clients[0].get("/v1/status").json()
        if "handshake" in status["progress"]["seconds"]:
            return status
        ends.check("the handshake of rank 0")
        time.sleep(0.01)


@pytest.mark.usefixtures("registered")
def test_status_while_an_update_runs(world: World, engine: Engine, url: str) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def on_bucket() -> None:
        inside.set()
        go_on.wait(30)

    engine.on_bucket = on_bucket
    bodies = ({"update_url": url, "timeout": 40}, {"timeout": 40})
    try:
        answers = world.post("/v1/checkpoints/c/update?wait=false", *bodies)
        assert inside.wait(30)
        status = while_reloading(world)
        assert [status["jobs"][0][key] for key in ("call", "checkpoint", "state")] == [
            "update", "c", "running",
        ]  # fmt: skip
        progress = status["progress"]
        assert (progress["call"], progress["checkpoint"]) == ("update", "c")
        assert progress["total_bytes"] >= sum(weight.nbytes for weight in WEIGHTS.values())
        assert progress["seconds"].keys() >= {"plan", "handshake"}
    finally:
        go_on.set()
    poll_jobs(world, [answer.json()["id"] for answer in answers])
    status = world.clients[0].get("/v1/status").json()
    assert status["progress"] is None
    assert status["jobs"][0]["state"] == "done"


# ---------------------------------------------------------------------- the page

PAGE = resources.files("checkpoint_engine.service").joinpath("page.html").read_text()


def test_the_page_is_served_as_it_is_in_the_package(world: World) -> None:
    answer = world.clients[0].get("/")
    assert answer.text == PAGE
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"


def test_nothing_of_others_becomes_markup() -> None:
    """Names and errors come from callers and engines: the page makes text nodes of them."""
    for way in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "srcdoc", "eval("):
        assert way not in PAGE


def test_the_page_asks_no_other_host(world: World) -> None:
    policy = world.clients[0].get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", PAGE)


def test_every_phase_has_a_colour_of_its_own() -> None:
    listed = re.search(r"const PHASES = (\[.*?\]);", PAGE, re.DOTALL)
    assert listed is not None
    assert tuple(json.loads(listed.group(1))) == PHASES
    colours = dict(re.findall(r"\.p(\d+) \{ background: (#\w+)", PAGE))
    assert len({colours[str(place)] for place in range(len(PHASES))}) == len(PHASES)


def test_what_is_known_of_a_failure_is_told() -> None:
    error = UpdateError("update", 1, "reload", "no room")
    error.engines = {0: "untouched", 1: "partly written"}
    error.seconds = {"plan": 0.25, "reload": 0.125}
    error.trace = "/traces/c-1-failed.json"
    jobs = Jobs()
    with pytest.raises(UpdateError):
        jobs.start("update", "c", lambda: raising(error))[1].result()
    told = json.loads(jobs.all()[0].model_dump_json())["error"]
    assert (told["rank"], told["phase"]) == (1, "reload")
    assert told["engines"] == {"0": "untouched", "1": "partly written"}
    assert told["seconds"] == error.seconds
    assert told["trace"] == error.trace


# ---------------------------------------------------------------------- the dashboard


@pytest.mark.usefixtures("registered")
def test_the_dashboard_asks_for_figures_that_there_are(world: World, url: str) -> None:
    assert_good(world.update(url))
    names = {key[0] for key in figures(world)} | {"checkpoint_engine_failures_total"}
    dashboard = ROOT / "examples" / "grafana" / "checkpoint-engine.json"
    asked = set(re.findall(r"checkpoint_engine_\w+", dashboard.read_text()))
    assert asked <= names
    assert len(asked) > 5


# ---------------------------------------------------------------------- without the extra


@pytest.fixture
def no_prometheus(monkeypatch: pytest.MonkeyPatch) -> None:
    importer = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("prometheus_client"):
            raise ImportError(name)
        return importer(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.mark.usefixtures("no_prometheus")
def test_metrics_name_the_extra_that_they_need() -> None:
    transport = httpx.ASGITransport(make_app(SimpleNamespace()))  # type: ignore[arg-type]

    async def scrape() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.get("/metrics")

    answer = asyncio.run(scrape())
    assert answer.status_code == 501
    assert "checkpoint-engine[metrics]" in answer.json()["error"]["hint"]
