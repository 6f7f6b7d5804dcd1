"""Calls that wait: they are cancelled, their client goes away, and they hold up nobody else."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import zmq
from click.testing import CliRunner

from checkpoint_engine.cli import commands, servers, service
from checkpoint_engine.cli.servers import RankService
from checkpoint_engine.errors import UpdateError
from checkpoint_engine.handover.link import open_context
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.service import jobs
from checkpoint_engine.update import update
from checkpoint_engine.worker import update_weights_from_ipc
from engines import serve_http
from test_api import METAS, Server, serving
from torchrun import free_port_pair

SOON = 10.0


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "server.sock")


@pytest.fixture
def lonely(path: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    """Rank 0 of two, whose other rank never comes."""
    monkeypatch.setenv("PS_DEVICE", "cpu")
    monkeypatch.setenv("PS_P2P", "off")
    addr = {"master_addr": "127.0.0.1", "master_port": free_port_pair()}
    server = ParameterServer(rank=0, world_size=2, gpu_count=2, **addr)
    server.register_checkpoint("c", named_tensors={"w": torch.ones(4)})
    with serving(server, path) as client:
        yield client


def job_that(client: httpx.Client, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    ends = time.monotonic() + SOON
    while time.monotonic() < ends:
        for job in client.get("/v1/jobs").json():
            if is_so(job):
                return dict(job)
        time.sleep(0.02)
    raise AssertionError(client.get("/v1/jobs").text)


@pytest.mark.parametrize("route", ["gather-metas?wait=false&timeout=600", "update?wait=false"])
def test_a_call_that_waits_for_a_rank_is_cancelled(lonely: httpx.Client, route: str) -> None:
    answer = lonely.post(f"/v1/checkpoints/c/{route}", json={"timeout": 600, "ranks": [1]})
    job = job_that(lonely, lambda one: one["id"] == answer.json()["id"])
    assert job["state"] == "running"
    time.sleep(0.3)
    assert lonely.delete(f"/v1/jobs/{job['id']}").json()["id"] == job["id"]
    ended = job_that(lonely, lambda one: one["id"] == job["id"] and one["state"] == "failed")
    assert ended["error"]["cause"] == "interrupted"
    assert "it was cancelled" in ended["error"]["message"]
    assert lonely.delete("/v1/jobs/none").status_code == 404


def test_the_command_line_cancels(lonely: httpx.Client, path: str) -> None:
    def run() -> Any:
        found = CliRunner().invoke(commands, ["cancel", "--server", path, "--json"])
        assert found.exit_code == 0, found.output
        return json.loads(found.stdout)["cancelled"]

    assert run() == []
    lonely.post("/v1/checkpoints/c/gather-metas?wait=false")
    assert [one["call"] for one in run()] == ["gather"]
    job_that(lonely, lambda one: one["state"] == "failed")


def test_ctrl_c_says_what_goes_on_and_how_to_end_it(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(service, "ask", interrupt)
    monkeypatch.setattr(servers, "ask", interrupt)
    for command in (["update", "c", "--engine", "http://127.0.0.1:9"], ["register", "c", __file__]):
        found = CliRunner().invoke(commands, [*command, "--server", path, "--json"])
        error = json.loads(found.stdout)["error"]
        assert (found.exit_code, error["code"]) == (130, "interrupted")
        assert "an update that ranks have begun" in error["message"]
        assert "checkpoint-engine cancel" in error["hint"]


def goes_on_without_its_client(
    server: Server, go_on: threading.Event, path: str, route: str, body: bytes
) -> None:
    """``go_on``: what the call waits for."""
    with serving(server, path) as api:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            head = f"POST /v1/checkpoints/c/{route} HTTP/1.1\r\nHost: localhost\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            job_that(api, lambda one: one["state"] == "running")
        time.sleep(0.3)
        assert api.get("/v1/jobs").json()[0]["state"] == "running"
        go_on.set()
        job_that(api, lambda one: one["state"] == "done")


def test_a_client_that_goes_away_lets_a_registration_go_on(path: str) -> None:
    """Nobody waits for it."""
    server, go_on = Server(), threading.Event()
    server.register_checkpoint = lambda *_, **__: go_on.wait(30)  # type: ignore[method-assign]
    server.progress = None  # type: ignore[attr-defined]
    goes_on_without_its_client(server, go_on, path, "files", b'{"files":[]}')


def test_a_client_that_goes_away_ends_what_waits_for_other_ranks(
    lonely: httpx.Client, path: str
) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.sendall(b"POST /v1/checkpoints/c/gather-metas HTTP/1.1\r\nHost: localhost\r\n\r\n")
        job_that(lonely, lambda one: one["state"] == "running")
    ended = job_that(lonely, lambda one: one["state"] == "failed")
    assert "has gone away" in ended["error"]["message"]


def test_an_update_whose_ranks_have_met_goes_on_without_its_client(path: str) -> None:
    server, go_on = Server(), threading.Event()

    def update(*_: Any, **__: Any) -> None:
        go_on.wait(30)

    progress = type("Progress", (), {"call": "update", "phase": "reload"})
    server.update, server.progress = update, progress  # type: ignore[method-assign,attr-defined]
    goes_on_without_its_client(server, go_on, path, "update", b"{}")


def test_status_answers_while_as_many_calls_wait_as_may(path: str) -> None:
    server, go_on = Server(), threading.Event()

    def register(name: str, *, files: list[str], on_progress: Any) -> None:
        go_on.wait(30)

    server.register_checkpoint = register  # type: ignore[method-assign]
    most = jobs._MOST_AT_ONCE
    with serving(server, path) as api, ThreadPoolExecutor(most) as pool:
        try:
            place = RankService(path)
            route, body = "/v1/checkpoints/c/files", {"files": []}
            asked = [pool.submit(place.ask, "POST", route, 40, body) for _ in range(most)]
            ends = time.monotonic() + 30
            while len(api.get("/v1/jobs").json()) < most:
                assert time.monotonic() < ends
            refused = api.post(route, json=body)
            assert (refused.status_code, refused.headers["x-error-cause"]) == (409, "busy")
        finally:
            go_on.set()
        assert [one.result() for one in asked] == [None] * most


@pytest.mark.parametrize(
    "body",
    [
        b'{"0":{"p2p_store_addr":null,"rdma_device":"","memory_buffer_metas_list":[%s1]}}',
        b'{"0":[%s1]}',
        b"[%s1]",
        b"{%s}",
        b"[" * 1000 + b"%s",
    ],
)
def test_a_wrong_body_costs_what_it_is_large(path: str, body: bytes) -> None:
    with serving(Server(), path) as api:
        head = {"content-type": "application/json"}
        answer = api.post("/v1/metas", content=body % (b"1," * 200_000), headers=head)
    assert answer.status_code == 422
    assert len(answer.json()["detail"]) == 1
    assert len(answer.content) < 2000


def test_a_body_that_says_it_is_text_is_refused(path: str) -> None:
    with serving(Server(), path) as api:
        head = {"content-type": "text/plain"}
        answer = api.post("/v1/metas", content=json.dumps(METAS).encode(), headers=head)
    assert answer.status_code == 422


def test_an_engine_that_answers_while_no_worker_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is waited for until the end of the timeout."""
    monkeypatch.setenv("PS_DEVICE", "cpu")
    monkeypatch.setenv("PS_P2P", "off")
    monkeypatch.setattr(update, "_COMES_WITHIN", 0.5)
    server = ParameterServer(rank=0, world_size=1)
    server.register_checkpoint("c", named_tensors={"w": torch.ones(4)})
    server.gather_metas("c")
    began = time.monotonic()
    says = (
        "rank 0 during handshake: req_func has returned on every rank, and within .* no inference"
    )
    with pytest.raises(UpdateError, match=says) as failed:
        server.update("c", lambda paths: None, timeout=timedelta(seconds=6))
    assert (failed.value.kind, time.monotonic() - began < 30) == ("worker_lost", True)


def test_without_descriptors_an_update_fails_and_the_process_lives() -> None:
    """libzmq aborts where it gets none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        for left in range(3):  # with which libzmq aborts
            says = r"only \d+ file descriptors left.*ulimit"
            with pytest.raises(RuntimeError, match=says), open_context():
                raise AssertionError(left)
            os.close(held.pop())
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with open_context():
        pass


def test_a_timeout_that_no_wait_can_have_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PS_DEVICE", "cpu")
    monkeypatch.setenv("PS_P2P", "off")
    server = ParameterServer(rank=0, world_size=1)
    longest = {"timeout": timedelta.max}
    for call in (
        lambda: server.gather_metas("c", **longest),
        lambda: server.update("c", print, **longest),
        lambda: server.store_based_barrier(**longest),
        lambda: server.init_process_group(**longest),
        lambda: server.init_process_group_for_ranks([0], **longest),
    ):
        with pytest.raises(ValueError, match="at most 30 days"):
            call()


def test_the_rank_without_a_worker_is_named_before_the_others_give_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its engine has not answered, so that its worker may still come until then."""
    monkeypatch.setenv("PS_DEVICE", "cpu")
    monkeypatch.setenv("PS_P2P", "off")
    server = ParameterServer(rank=0, world_size=1)
    server.register_checkpoint("c", named_tensors={"w": torch.ones(4)})
    server.gather_metas("c")
    go_on = threading.Event()
    says = (
        "during handshake: gave up after 2 s .*no inference worker has connected to rank 0.*not ret"
    )
    try:
        with pytest.raises(UpdateError, match=says) as failed:
            server.update("c", lambda paths: go_on.wait(30), timeout=timedelta(seconds=2))
    finally:
        go_on.set()
    assert failed.value.kind == "timeout"


@pytest.mark.parametrize("other", ["gone", "hanging"])
def test_cancel_ends_what_it_can_and_names_the_server_that_does_not_answer(
    lonely: httpx.Client, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    monkeypatch.setattr(RankService.ask, "__defaults__", (1.0, None))
    lonely.post("/v1/checkpoints/c/gather-metas?wait=false")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "hanging"))
        silent.listen()
        places = ["--server", str(tmp_path / other), "--server", path]
        found = CliRunner().invoke(commands, ["cancel", *places, "--json"])
    told = json.loads(found.stdout)
    assert found.exit_code == 3
    assert [one["call"] for one in told["cancelled"]] == ["gather"]
    assert [one["server"] for one in told["failed"]] == [str(tmp_path / other)]
    job_that(lonely, lambda one: one["state"] == "failed")


def test_cancel_goes_on_after_a_refusal_and_says_what_had_ended() -> None:
    job = {"call": "gather", "checkpoint": "c", "state": "running"}
    routes: dict[str, Any] = {
        "GET /v1/jobs": lambda _: (200, [{**job, "id": one} for one in "abc"]),
        "DELETE /v1/jobs/a": lambda _: (500, "no"),
        "DELETE /v1/jobs/b": lambda _: (200, {**job, "id": "b"}),
        "DELETE /v1/jobs/c": lambda _: (200, {**job, "id": "c", "state": "done"}),
    }
    with serve_http(routes) as url:
        found = CliRunner().invoke(commands, ["cancel", "--server", url])
    assert found.exit_code == 1
    says = ("cancelled gather c", "gather c had ended already", "no")
    lines = found.stdout.splitlines()
    assert [line.partition(": ")[2] for line in lines if line] == list(says)


@pytest.mark.parametrize("comes", [True, False])
def test_a_worker_has_half_of_the_timeout_to_come(
    monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    """An engine that is asked in the background loads for longer than the shortest wait."""
    monkeypatch.setenv("PS_DEVICE", "cpu")
    monkeypatch.setenv("PS_P2P", "off")
    monkeypatch.setattr(update, "_COMES_WITHIN", 0.2)
    warnings: list[str] = []
    monkeypatch.setattr(
        update.logger, "warning", lambda *text: warnings.append(text[0].format(*text[1:]))
    )
    server = ParameterServer(rank=0, world_size=1)
    server.register_checkpoint("c", named_tensors={"w": torch.ones(4)})
    server.gather_metas("c")

    def receive(address: str) -> None:
        with zmq.Context() as context:
            update_weights_from_ipc(context, address, None, run=lambda _: None)

    def ask(paths: list[tuple[str, str]]) -> None:
        if comes:
            threading.Timer(1.0, receive, [paths[0][1]]).start()

    fails = pytest.raises(UpdateError, match="and within 4 s no inference worker has connected")
    with contextlib.nullcontext() if comes else fails:
        server.update("c", ask, timeout=timedelta(seconds=8))
    (told,) = [text for text in warnings if "no inference worker" in text]
    assert told.startswith("handshake: ")
    assert "connected to rank 0" in told


@pytest.mark.parametrize(
    "wrong",
    [
        {"update_url": "http://user:SECRET@127.0.0.1:9/collective_rpc"},
        {"update_url": "http://127.0.0.1:9/?key=SECRET"},
        {"update_url": "ftp://127.0.0.1:9/?key=SECRET"},
        {"update_url": "http://127.0.0.1:9", "engine_headers": {"x": "SECRET"}},
        {"engine_kind": "sglang", "engine_headers": {"SECRET": 7}},
        {"engine_kind": "sglang", "engine_headers": ["SECRET"]},
    ],
)
def test_a_wrong_update_is_refused_and_shows_no_key(path: str, wrong: dict[str, Any]) -> None:
    with serving(Server(), path) as api:
        answer = api.post("/v1/checkpoints/c/update", json={"timeout": 2, **wrong})
        jobs = api.get("/v1/jobs").json()
    assert (answer.status_code, jobs) == (422, [])
    assert "SECRET" not in answer.text
    (loc,) = {tuple(one["loc"]) for one in answer.json()["detail"]}
    assert loc in {("body",), ("body", "update_url"), ("body", "engine_headers")}
