from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any

import httpx
import pytest

from checkpoint_engine.client import fetch_metas, request_inference_to_update, wait_until_ready
from checkpoint_engine.data_types import MemoryBufferMetaList
from checkpoint_engine.metas_file import encode_metas

SOCKETS = {"GPU-1": "ipc:///tmp/one", "GPU-2": "ipc:///tmp/two"}


class Engine:
    """What the requests of one test met: the answers to give, the bodies that came."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.text = ""
        self.bodies: list[Any] = []
        self.hold = threading.Event()
        self.hold.set()

    def handler(engine) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                engine.hold.wait(10)
                self.send_response(engine.statuses.pop(0) if engine.statuses else 200)
                self.end_headers()
                self.wfile.write(engine.text.encode())

            do_GET = answer  # noqa: N815

            def do_POST(self) -> None:
                length = int(self.headers["content-length"])
                engine.bodies.append((self.path, json.loads(self.rfile.read(length))))
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


def test_a_url_that_serves_something_else_is_an_error(engine: Engine, url: str) -> None:
    engine.text = "<html>"
    with pytest.raises(ValueError, match="not the metas of a checkpoint"):
        fetch_metas(url)
