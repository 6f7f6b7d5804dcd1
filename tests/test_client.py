from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any

import httpx
import pytest

from checkpoint_engine.client import (
    fetch_metas,
    lmdeploy_request,
    request_inference_to_update,
    sglang_request,
    vllm_request,
    wait_until_ready,
)
from checkpoint_engine.data_types import MemoryBufferMetaList
from checkpoint_engine.ground.deadline import Deadline, begin, poll
from checkpoint_engine.world.metas_file import encode_metas

SOCKETS = {"GPU-1": "ipc:///tmp/one", "GPU-2": "ipc:///tmp/two"}


class Engine:
    """What the requests of one test met: the answers to give, the bodies that came."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.text = ""
        self.bodies: list[Any] = []
        self.authorizations: list[str | None] = []  # of those that only ask
        self.keys: list[str | None] = []  # that came with them
        self.server_info: dict[str, Any] | None = None
        self.hold = threading.Event()
        self.hold.set()

    def handler(engine) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                engine.hold.wait(10)
                self.send_response(engine.statuses.pop(0) if engine.statuses else 200)
                self.end_headers()
                self.wfile.write(engine.text.encode())

            def do_GET(self) -> None:
                if self.path.startswith("/server_info"):  # what vLLM says of itself
                    engine.keys.append(self.headers["authorization"] or self.headers["x-key"])
                    body = json.dumps(engine.server_info).encode()
                    self.send_response(404 if engine.server_info is None else 200)
                    self.end_headers()
                    self.wfile.write(body)
                    return
                engine.authorizations.append(self.headers["authorization"])
                self.answer()

            def do_POST(self) -> None:
                length = int(self.headers["content-length"])
                body = self.rfile.read(length)
                engine.bodies.append((self.path, json.loads(body) if body else None))
                engine.keys.append(self.headers["authorization"] or self.headers["x-key"])
                self.answer()

            def address_string(self) -> str:
                return "engine"

            def log_message(self, *args: object) -> None:
                pass

        return Handler


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def url(engine: Engine) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), engine.handler()) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        engine.hold.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def uds(engine: Engine, tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "engine.sock")
    with ThreadingUnixStreamServer(path, engine.handler()) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield path
        server.shutdown()
        thread.join()


@pytest.fixture
def dead_url() -> Iterator[str]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_request_names_the_method_the_sockets_and_the_timeout(engine: Engine, url: str) -> None:
    request_inference_to_update(f"{url}/collective_rpc", SOCKETS, timeout=12.5)
    body = {"method": "update_weights_from_ipc", "args": [SOCKETS], "timeout": 12.5}
    assert engine.bodies == [("/collective_rpc", body)]


def test_default_timeout_is_five_minutes(engine: Engine, url: str) -> None:
    request_inference_to_update(url=url, socket_paths=SOCKETS)
    assert engine.bodies[0][1]["timeout"] == 300.0


def test_a_list_of_pairs_travels_as_it_is(engine: Engine, url: str) -> None:
    request_inference_to_update(url, [("GPU-1", "ipc:///tmp/one")])
    assert engine.bodies[0][1]["args"] == [[["GPU-1", "ipc:///tmp/one"]]]


def test_an_engine_without_the_extension_says_what_to_ask_it_by(engine: Engine, url: str) -> None:
    engine.text = "AttributeError: 'Worker' object has no attribute 'update_weights_from_ipc'"
    engine.statuses = [500]
    with pytest.raises(httpx.HTTPStatusError, match="--engine-kind vllm") as raised:
        request_inference_to_update(url, SOCKETS)
    assert engine.text in str(raised.value)


@pytest.mark.parametrize("status", [302, 400, 500])
def test_the_engines_error_comes_back_whole(engine: Engine, url: str, status: int) -> None:
    engine.statuses, engine.text = [status], "RuntimeError: layer 3\n" + "x" * 5000
    with pytest.raises(httpx.HTTPStatusError) as raised:
        request_inference_to_update(url, SOCKETS)
    assert str(status) in str(raised.value)
    assert url in str(raised.value)
    assert engine.text in str(raised.value)
    assert raised.value.response.status_code == status


def test_an_engine_that_is_not_up_is_named(dead_url: str) -> None:
    with pytest.raises(httpx.ConnectError, match=f"no answer from {dead_url}/collective_rpc: "):
        request_inference_to_update(f"{dead_url}/collective_rpc", SOCKETS)


def test_an_engine_that_does_not_answer_ends_with_the_timeout(engine: Engine, url: str) -> None:
    engine.hold.clear()
    with pytest.raises(httpx.ReadTimeout, match=f"no answer from {url}: .*timed out"):
        request_inference_to_update(url, SOCKETS, timeout=0.2)


def test_proxies_of_the_environment_are_not_used(
    engine: Engine, url: str, dead_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, dead_url)
    request_inference_to_update(url, SOCKETS)
    assert len(engine.bodies) == 1


def test_an_engine_on_a_unix_socket(engine: Engine, uds: str) -> None:
    request_inference_to_update("http://localhost/collective_rpc", SOCKETS, uds=uds)
    assert engine.bodies[0][0] == "/collective_rpc"


def test_a_unix_socket_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "none.sock")
    with pytest.raises(httpx.ConnectError, match=path):
        request_inference_to_update("http://localhost/collective_rpc", SOCKETS, uds=path)


def test_waiting_ends_when_the_engine_is_healthy(engine: Engine, url: str) -> None:
    engine.statuses = [503, 503, 200]
    wait_until_ready(f"{url}/health", timeout=30)
    assert engine.statuses == []


def test_waiting_ends_at_the_deadline(dead_url: str) -> None:
    with pytest.raises(TimeoutError, match=r"not ready after 0\.2 s: no answer from"):
        wait_until_ready(f"{dead_url}/health", timeout=0.2)


def test_metas_come_from_a_url(engine: Engine, url: str) -> None:
    metas = {
        2: MemoryBufferMetaList(p2p_store_addr="x:1", memory_buffer_metas_list=[], rdma_device="")
    }
    engine.text = encode_metas(metas).decode()
    assert fetch_metas(f"{url}/v1/metas") == metas
    assert fetch_metas(f"{url}/v1/metas", token="of the server") == metas
    assert engine.authorizations == [None, "Bearer of the server"]


def test_a_url_that_serves_something_else_is_an_error(engine: Engine, url: str) -> None:
    engine.text = "<html>"
    with pytest.raises(ValueError, match=f"(?s){url}: not the metas.* is it a server's /v1/metas"):
        fetch_metas(url)


# ---------------------------------------------------------------------- req_funcs, ready made

WORLD = [(f"GPU-{rank}", f"ipc:///tmp/{rank}") for rank in range(4)]
FIRST = dict(WORLD[:2])


def paths_of(engine: Engine) -> list[str]:
    return [path for path, _ in engine.bodies]


def test_vllm_is_asked_once_for_all_its_workers(engine: Engine, url: str) -> None:
    vllm_request(url, rank=0, inference_parallel_size=2, timeout=60)(WORLD)
    (path, body), *rest = engine.bodies
    assert [path for path, _ in rest] == ["/reset_prefix_cache?reset_running_requests=true"]
    assert path == "/collective_rpc"
    assert body.pop("timeout") == pytest.approx(60, abs=5)
    assert body == {"method": "update_weights_from_ipc", "args": [FIRST]}


def test_vllm_pauses_forgets_and_resumes(engine: Engine, url: str) -> None:
    vllm_request(url, rank=0, pause="keep", reset_prefix_cache=True)(WORLD)
    assert paths_of(engine) == [
        "/pause?mode=keep",
        "/collective_rpc",
        "/reset_prefix_cache?reset_running_requests=true",
        "/resume",
    ]


def test_vllm_stays_paused_over_weights_that_may_be_half_written(engine: Engine, url: str) -> None:
    engine.statuses = [200, 500]
    engine.text = "layer 3 is missing"
    says = r"(?s)/collective_rpc: layer 3 is missing.*stays paused.*the next update resumes it"
    with pytest.raises(httpx.HTTPStatusError, match=says):
        vllm_request(url, rank=0, pause="abort", reset_prefix_cache=True)(WORLD)
    assert paths_of(engine) == ["/pause?mode=abort", "/collective_rpc"]
    vllm_request(url, rank=0, pause="abort", reset_prefix_cache=False)(WORLD)
    assert paths_of(engine)[2:] == ["/pause?mode=abort", "/collective_rpc", "/resume"]


@pytest.mark.parametrize(
    "error",
    [OSError(5, "the disk is gone"), KeyError("x"), UnicodeDecodeError("utf8", b"x", 0, 1, "bad")],
)
def test_every_failure_says_that_the_engine_stays_paused(
    engine: Engine, url: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    says = str(error)

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr("checkpoint_engine.client.request_inference_to_update", fail)
    with pytest.raises(Exception, match="stays paused") as caught:
        vllm_request(url, rank=0, pause="abort")(WORLD)
    assert says in str(caught.value)


@pytest.mark.parametrize("resumes", [True, False])
def test_vllm_is_resumed_after_a_failure_where_that_is_wished(
    engine: Engine, url: str, resumes: bool
) -> None:
    engine.statuses = [200, 500, 200 if resumes else 500]
    engine.text = "layer 3 is missing"
    ask = vllm_request(url, rank=0, pause="abort", resume_after_failure=True)
    with pytest.raises(httpx.HTTPStatusError, match=r"/collective_rpc: layer 3 is missing$"):
        ask(WORLD)
    assert paths_of(engine) == ["/pause?mode=abort", "/collective_rpc", "/resume"]


def test_a_pause_that_fails_ends_the_request(engine: Engine, url: str) -> None:
    engine.statuses = [404]
    with pytest.raises(httpx.HTTPStatusError, match="404"):
        vllm_request(url, rank=0, pause="wait")(WORLD)
    assert paths_of(engine) == ["/pause?mode=wait", "/resume"]


def test_a_resume_that_fails_is_an_error(engine: Engine, url: str) -> None:
    engine.statuses = [200, 200, 200, 500]
    with pytest.raises(httpx.HTTPStatusError, match="/resume"):
        vllm_request(url, rank=0, pause="wait")(WORLD)


def test_a_prefix_cache_that_stays_is_an_error(engine: Engine, url: str) -> None:
    engine.text = '{"success": false}'
    with pytest.raises(RuntimeError, match=r"reset_prefix_cache.* did not succeed"):
        vllm_request(url, rank=0, reset_prefix_cache=True)(WORLD)


@pytest.mark.parametrize("wished", [None, True])
@pytest.mark.parametrize("status", [404, 500])
def test_an_engine_may_have_no_prefix_cache_unless_it_is_named(
    engine: Engine, url: str, wished: bool | None, status: int
) -> None:
    engine.statuses = [200, status]
    with (
        nullcontext()
        if (wished, status) == (None, 404)
        else pytest.raises(httpx.HTTPStatusError, match="/reset_prefix_cache")
    ):
        vllm_request(url, rank=0, reset_prefix_cache=wished)(WORLD)
    assert len(engine.bodies) == 2


def test_sglang_gets_what_it_expects(engine: Engine, url: str) -> None:
    engine.text = '{"success": true, "message": "ok"}'
    sglang_request(url, rank=0, inference_parallel_size=2)(WORLD)
    sglang_request(
        url, rank=2, inference_parallel_size=2, flush_cache=False, weight_version="step-7"
    )(WORLD)
    route = "/update_weights_from_ipc"
    assert engine.bodies == [
        (route, {"zmq_handles": FIRST, "flush_cache": True, "weight_version": None}),
        (
            route,
            {"zmq_handles": dict(WORLD[2:]), "flush_cache": False, "weight_version": "step-7"},
        ),
    ]


def test_lmdeploy_gets_what_it_expects(engine: Engine, url: str) -> None:
    lmdeploy_request(url, rank=0, inference_parallel_size=2)(WORLD)
    assert engine.bodies == [("/update_weights_from_ipc", {"zmq_handles": FIRST})]


REQUESTS = [vllm_request, sglang_request, lmdeploy_request]


@pytest.mark.parametrize("make", [sglang_request, lmdeploy_request])
@pytest.mark.parametrize("status", [200, 400])
def test_an_engine_that_says_it_failed(
    engine: Engine, url: str, make: Callable[..., Any], status: int
) -> None:
    engine.statuses, engine.text = [status], '{"success": false, "message": "layer 3 is missing"}'
    with pytest.raises((RuntimeError, httpx.HTTPStatusError), match="layer 3 is missing"):
        make(url, rank=0)(WORLD)


@pytest.mark.parametrize("make", REQUESTS)
def test_only_the_first_rank_of_an_engine_asks(
    engine: Engine, url: str, make: Callable[..., Any]
) -> None:
    for rank in (1, 3):
        make(url, rank=rank, inference_parallel_size=2)(WORLD)
    assert engine.bodies == []


@pytest.mark.parametrize(
    ("members", "asks"), [([2, 3], {2: [2, 3]}), ([3], {3: [3]}), ([1, 2], {1: [1], 2: [2]})]
)
def test_ranks_outside_a_p2p_update_neither_ask_nor_are_asked_for(
    engine: Engine, url: str, members: list[int], asks: dict[int, list[int]]
) -> None:
    partial = [pair if rank in members else (pair[0], "") for rank, pair in enumerate(WORLD)]
    for rank in range(4):
        lmdeploy_request(url, rank=rank, inference_parallel_size=2)(partial)
    expected = [dict(WORLD[place] for place in served) for served in asks.values()]
    assert [body["zmq_handles"] for _, body in engine.bodies] == expected


def test_the_rank_comes_from_the_launcher(
    engine: Engine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    sglang_request(url)(WORLD)
    assert engine.bodies[0][1]["zmq_handles"] == dict(WORLD[1:2])


@pytest.mark.parametrize("make", REQUESTS)
@pytest.mark.parametrize("wrong", [{"inference_parallel_size": 0}, {"rank": -1}])
def test_numbers_out_of_range_are_refused(make: Callable[..., Any], wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="so small"):
        make("http://localhost", **{"rank": 0, **wrong})


@pytest.mark.parametrize("make", REQUESTS)
def test_engines_on_unix_sockets(engine: Engine, uds: str, make: Callable[..., Any]) -> None:
    make("http://localhost", rank=0, uds=uds)(WORLD)
    assert len(engine.bodies) == (2 if make is vllm_request else 1)


WITH_BACKEND = {"vllm_config": {"weight_transfer_config": {"backend": "checkpoint_engine"}}}
HANDLES = [("GPU-0", "ipc:///tmp/0"), ("GPU-1", "ipc:///tmp/1")]
START, FINISH = ("/start_weight_update", None), ("/finish_weight_update", {})
RESET = ("/reset_prefix_cache?reset_running_requests=true", None)
UPDATE = ("/update_weights", {"update_info": {"zmq_handles": dict(HANDLES)}})


def test_vllm_with_our_backend_is_asked_by_its_own_routes(engine: Engine, url: str) -> None:
    engine.server_info = WITH_BACKEND
    vllm_request(url, inference_parallel_size=2, rank=0, weight_version="7")(HANDLES)
    finish = ("/finish_weight_update", {"weight_version": "7"})
    assert engine.bodies == [START, UPDATE, finish, ("/reset_encoder_cache", None), RESET]


def test_vllm_with_another_backend_is_asked_by_its_extension(engine: Engine, url: str) -> None:
    engine.server_info = {"vllm_config": {"weight_transfer_config": {"backend": "nccl"}}}
    vllm_request(url, inference_parallel_size=2, rank=0)(HANDLES)
    assert paths_of(engine) == ["/collective_rpc", RESET[0]]


def test_an_update_that_failed_is_ended_on_vllms_other_workers(engine: Engine, url: str) -> None:
    engine.server_info, engine.statuses, engine.text = WITH_BACKEND, [200, 500, 500], "layer 3"
    with pytest.raises(httpx.HTTPStatusError, match=r"/update_weights: layer 3$"):
        vllm_request(url, inference_parallel_size=2, rank=0)(HANDLES)
    assert engine.bodies == [START, UPDATE, FINISH]


def test_a_late_answer_to_a_failed_update_does_not_end_the_next_one(
    engine: Engine, url: str
) -> None:
    engine.server_info, engine.statuses = WITH_BACKEND, [200, 500, 500]
    request = vllm_request(url, inference_parallel_size=2, rank=0)
    engine.hold.clear()
    late = begin(lambda: request(HANDLES), "late")
    poll(lambda: bool(engine.bodies), partial(Deadline(10).check, "the first request"))
    with pytest.raises(TimeoutError, match="has not answered an earlier update"):
        vllm_request(url, inference_parallel_size=2, rank=0, timeout=0.3)(HANDLES)
    following = begin(lambda: request(HANDLES), "following")
    engine.hold.set()
    assert isinstance(late.exception(10), httpx.HTTPStatusError)
    assert following.exception(10) is None
    assert engine.bodies[:4] == [START, UPDATE, FINISH, START]


def test_vllm_is_made_to_show_its_drafter(engine: Engine, url: str) -> None:
    engine.server_info, engine.statuses = WITH_BACKEND, [500, 500]
    engine.text = "POST /start_draft_weight_update and /finish_weight_update, then start again"
    vllm_request(url, inference_parallel_size=2, rank=0)(HANDLES)
    draft = ("/start_draft_weight_update", None)
    assert engine.bodies[:6] == [START, FINISH, draft, FINISH, START, UPDATE]


@pytest.mark.parametrize("why", ["no memory", "a weight update is already active"])
def test_a_start_that_vllm_refuses_is_an_error(engine: Engine, url: str, why: str) -> None:
    engine.server_info, engine.statuses, engine.text = WITH_BACKEND, [500, 500], why
    with pytest.raises(httpx.HTTPStatusError, match=rf"/start_weight_update: {why}$"):
        vllm_request(url, inference_parallel_size=2, rank=0)(HANDLES)
    assert engine.bodies == [START, FINISH]


MAKERS = [vllm_request, sglang_request, lmdeploy_request]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("info", [None, WITH_BACKEND])
def test_every_request_has_the_headers(engine: Engine, url: str, make: Any, info: Any) -> None:
    engine.server_info = info
    make(url, rank=0, inference_parallel_size=2, headers={"x-key": "7"})(HANDLES)
    assert set(engine.keys) == {"7"}


@pytest.mark.parametrize("make", MAKERS)
def test_the_token_of_the_environment_is_sent(
    engine: Engine, url: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PS_ENGINE_TOKEN", "open-sesame")
    make(url, rank=0, inference_parallel_size=2)(HANDLES)
    assert set(engine.keys) == {"Bearer open-sesame"}
    engine.keys.clear()
    make(url, rank=0, inference_parallel_size=2, headers={})(HANDLES)
    assert set(engine.keys) == {None}


@pytest.mark.parametrize(("plugin", "path"), [(True, START[0]), (False, "/collective_rpc")])
def test_who_says_how_vllm_receives_is_not_asked(
    engine: Engine, url: str, plugin: bool, path: str
) -> None:
    vllm_request(url, rank=0, inference_parallel_size=2, plugin=plugin)(HANDLES)
    assert engine.bodies[0][0] == path
    assert len(engine.keys) == len(engine.bodies)
