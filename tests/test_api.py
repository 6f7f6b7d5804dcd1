from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from checkpoint_engine.api import _init_api
from checkpoint_engine.data_types import MemoryBufferMetaList
from checkpoint_engine.errors import BusyError
from checkpoint_engine.service import serve
from checkpoint_engine.service.serve import ServeOptions, listen, uvicorn_config

METAS = {
    "3": {
        "p2p_store_addr": "192.0.2.1:4444",
        "memory_buffer_metas_list": [
            {
                "metas": [
                    {"name": "a", "dtype": "torch.bfloat16", "shape": [2, 3], "aligned_size": 256}
                ],
                "ptr": 4096,
                "size": 256,
                "checksums": None,
            }
        ],
        "rdma_device": "mlx5_0",
        "lease": None,
    }
}


class Server:
    """Stands in for ``ParameterServer``: notes each call and fails where it is told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error: Exception | None = None
        self.sockets = [("GPU-0", "ipc://zero"), ("GPU-1", "ipc://one"), ("GPU-2", "ipc://two")]

    def _note(self, *call: Any) -> None:
        self.calls.append(call)
        if self.error is not None:
            raise self.error

    def register_checkpoint(self, name: str, *, files: list[str], on_progress: Any) -> None:
        self._note("register", name, files)

    def unregister_checkpoint(self, name: str) -> None:
        self._note("unregister", name)

    def gather_metas(self, name: str) -> None:
        self._note("gather", name)

    def update(
        self, name: str, req_func: Any, *, ranks: list[int], timeout: timedelta, on_progress: Any
    ) -> None:
        self._note("update", name, ranks, timeout)
        req_func(self.sockets)

    def get_metas(self) -> dict[int, MemoryBufferMetaList]:
        self._note("get_metas")
        return {int(rank): MemoryBufferMetaList(**metas) for rank, metas in METAS.items()}

    def load_metas(self, metas: dict[int, MemoryBufferMetaList]) -> None:
        self._note("load_metas", metas)


@pytest.fixture
def server() -> Server:
    return Server()


@contextlib.contextmanager
def serving(ps: Any, path: str) -> Iterator[httpx.Client]:
    """A real HTTP server on a Unix socket, and a client of it."""
    config = uvicorn_config(_init_api(ps), ServeOptions(uds=path))
    server = uvicorn.Server(config)
    with listen(path) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            transport = httpx.HTTPTransport(uds=path)
            with httpx.Client(transport=transport, base_url="http://server", timeout=30) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def api(server: Server, tmp_path: Path) -> Iterator[httpx.Client]:
    with serving(server, str(tmp_path / "server.sock")) as client:
        yield client


def call_everything(api: httpx.Client) -> list[httpx.Response]:
    return [
        api.post("/v1/checkpoints/c/files", json={"files": ["/a", "/b"]}),
        api.delete("/v1/checkpoints/c"),
        api.post("/v1/checkpoints/c/gather-metas"),
        api.post("/v1/checkpoints/c/update", json={}),
        api.get("/v1/metas"),
        api.post("/v1/metas", json=METAS),
    ]


def test_every_route_calls_its_method(api: httpx.Client, server: Server) -> None:
    responses = call_everything(api)
    assert [response.status_code for response in responses] == [200] * 6
    metas = {rank: MemoryBufferMetaList(**value) for rank, value in ((3, METAS["3"]),)}
    assert server.calls == [
        ("register", "c", ["/a", "/b"]),
        ("unregister", "c"),
        ("gather", "c"),
        ("update", "c", [], timedelta(seconds=300)),
        ("get_metas",),
        ("load_metas", metas),
    ]


def test_healthz(api: httpx.Client) -> None:
    assert api.get("/v1/healthz").status_code == 200


def test_metas_are_json_with_readable_dtypes_and_shapes(api: httpx.Client) -> None:
    response = api.get("/v1/metas")
    assert response.headers["content-type"] == "application/json"
    assert response.json() == METAS


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("rank 1: no such file"), 500), (ValueError("x"), 500), (BusyError("busy"), 409)],
)
def test_errors_are_json_strings(
    api: httpx.Client, server: Server, error: Exception, status: int
) -> None:
    server.error = error
    answers = [(response.status_code, response.json()) for response in call_everything(api)]
    assert answers == [(status, str(error))] * 6


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/checkpoints/c/files", {}),
        ("/v1/checkpoints/c/files", {"files": "/a"}),
        ("/v1/checkpoints/c/update", {"ranks": ["x"]}),
        ("/v1/checkpoints/c/update", {"timeout": 0}),
        ("/v1/metas", {"0": {"ptr": 1}}),
        ("/v1/metas", {"x": METAS["3"]}),
    ],
)
def test_malformed_bodies_never_reach_the_server(
    api: httpx.Client, server: Server, path: str, body: Any
) -> None:
    assert api.post(path, json=body).status_code == 422
    assert server.calls == []


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        "checkpoint_engine.service.app.request_inference_to_update", lambda *args: made.append(args)
    )
    return made


@pytest.mark.parametrize(
    ("ranks", "sockets"),
    [
        ([], {"GPU-0": "ipc://zero", "GPU-1": "ipc://one", "GPU-2": "ipc://two"}),
        ([2, 1], {"GPU-2": "ipc://two", "GPU-1": "ipc://one"}),
        ([0], {"GPU-0": "ipc://zero"}),
    ],
)
def test_update_asks_the_engine_with_the_sockets_of_its_group(
    api: httpx.Client, requests: list[Any], ranks: list[int], sockets: dict[str, str]
) -> None:
    body = {
        "ranks": [0, 1],
        "update_url": "http://engine/collective_rpc",
        "inference_group_ranks": ranks,
        "timeout": 7.5,
        "uds": "/run/engine.sock",
    }
    assert api.post("/v1/checkpoints/c/update", json=body).status_code == 200
    assert requests == [("http://engine/collective_rpc", sockets, 7.5, "/run/engine.sock")]


def test_update_without_url_asks_nobody(
    api: httpx.Client, server: Server, requests: list[Any]
) -> None:
    assert api.post("/v1/checkpoints/c/update", json={"ranks": [1]}).status_code == 200
    assert server.calls == [("update", "c", [1], timedelta(seconds=300))]
    assert requests == []


@pytest.mark.parametrize("rank", [3, -1])
def test_a_group_rank_outside_the_world_is_an_error(
    api: httpx.Client, requests: list[Any], rank: int
) -> None:
    body = {"update_url": "http://engine", "inference_group_ranks": [0, rank]}
    response = api.post("/v1/checkpoints/c/update", json=body)
    assert response.status_code == 500
    assert response.json() == f"inference_group_ranks [{rank}] are not ranks of a world of 3"
    assert requests == []


def test_healthz_answers_while_an_update_runs(api: httpx.Client, server: Server) -> None:
    started, finish = threading.Event(), threading.Event()

    def long_update(*args: Any, **kwargs: Any) -> None:
        started.set()
        finish.wait(30)

    server.update = long_update  # type: ignore[method-assign]
    post = {"url": "/v1/checkpoints/c/update", "json": {}}
    update = threading.Thread(target=api.post, kwargs=post)
    update.start()
    assert started.wait(30)
    assert api.get("/v1/healthz").status_code == 200
    assert update.is_alive()
    finish.set()
    update.join()


def test_openapi_describes_every_route(api: httpx.Client) -> None:
    paths = api.get("/openapi.json").json()["paths"]
    assert {path: sorted(methods) for path, methods in paths.items()} == {
        "/v1/healthz": ["get"],
        "/v1/checkpoints/{name}/files": ["post"],
        "/v1/checkpoints/{name}": ["delete"],
        "/v1/checkpoints/{name}/gather-metas": ["post"],
        "/v1/checkpoints/{name}/update": ["post"],
        "/v1/metas": ["get", "post"],
        "/v1/status": ["get"],
        "/v1/jobs": ["get"],
        "/v1/jobs/{id}": ["delete", "get"],
        "/metrics": ["get"],
    }


def test_socket_is_for_this_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with listen(str(path)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_dead_servers_socket_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "server.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with listen(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def test_a_socket_is_removed_while_it_still_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it does not, the next server may have put its own in its place."""
    path = str(tmp_path / "server.sock")
    remove = os.unlink

    def connect_and_remove(path: str) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
        remove(path)

    with listen(path):
        monkeypatch.setattr(serve.os, "unlink", connect_and_remove)
    assert not os.path.exists(path)


def test_a_live_servers_socket_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "server.sock")
    with listen(path), socket.socket(socket.AF_UNIX) as client:
        with (
            pytest.raises(FileExistsError, match=r"another server listens there.*\{rank\}"),
            listen(path),
        ):
            pass
        client.connect(path)


def test_a_file_is_never_replaced_by_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="not a socket"), listen(str(path)):
        pass
    assert path.read_text() == "precious"
