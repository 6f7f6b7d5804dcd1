"""``python -m checkpoint_engine`` as its users run it: real processes, sockets and updates."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any, NamedTuple

import httpx
import pytest
import torch
import zmq
from safetensors.torch import save_file

from checkpoint_engine.client import wait_until_ready
from checkpoint_engine.worker import update_weights_from_ipc
from torchrun import free_port_pair

ROOT = Path(__file__).parent.parent
RANKS = 2
WEIGHTS = {f"layers.{i}.w": torch.randn(i + 1, 300, dtype=torch.bfloat16) for i in range(8)}


class Engine:
    """Answers ``/collective_rpc`` as vLLM does, with one worker thread for each address it gets."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.on_bucket: Callable[[], None] = lambda: None
        self.refusal = ""

    def receive(self, address: str) -> dict[str, torch.Tensor]:
        loaded: dict[str, torch.Tensor] = {}

        def load(weights: list[tuple[str, torch.Tensor]]) -> None:
            self.on_bucket()
            loaded.update({name: tensor.clone() for name, tensor in weights})

        with zmq.Context() as context:
            update_weights_from_ipc(context, address, None, run=load)
        return loaded

    def collective_rpc(self, body: dict[str, Any]) -> None:
        if self.refusal:
            raise RuntimeError(self.refusal)
        addresses = list(body["args"][0].values())
        with ThreadPoolExecutor(len(addresses)) as workers:
            self.weights = list(workers.map(self.receive, addresses))


@contextlib.contextmanager
def listening(engine: Engine) -> Iterator[str]:
    """The engine's URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            try:
                engine.collective_rpc(body)
                status, answer = 200, ""
            except Exception:
                status, answer = 500, traceback.format_exc()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/collective_rpc"
        server.shutdown()
        thread.join()


class Running(NamedTuple):
    process: subprocess.Popen[str]
    errors: IO[str]
    """A file: a pipe that nobody reads would stop a server that logs much."""

    def await_end(self) -> tuple[int, str]:
        """Its exit code, and what it wrote to stderr."""
        code = self.process.wait(timeout=30)
        self.errors.seek(0)
        return code, self.errors.read()


@contextlib.contextmanager
def running(command: list[str], sockets: Path) -> Iterator[Running]:
    environment = {
        **os.environ,
        "PS_DEVICE": "cpu",
        "PS_IPC_DIR": str(sockets),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    for variable in ("RANK", "WORLD_SIZE"):
        environment.pop(variable, None)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], env=environment, stderr=errors, text=True
        )
        try:
            yield Running(process, errors)
        finally:
            process.terminate()  # torchrun ends its ranks, which are in sessions of their own
            process.wait(timeout=45)


def client_of(path: Path) -> httpx.Client:
    """A client of the server at ``path``, once it answers."""
    wait_until_ready("http://server/v1/healthz", timeout=50, uds=str(path))
    transport = httpx.HTTPTransport(uds=str(path))
    return httpx.Client(transport=transport, base_url="http://server", timeout=50)


class World:
    """The ranks of a running service; every call goes to all of them at once."""

    def __init__(self, clients: list[httpx.Client]) -> None:
        self.clients = clients

    def post(self, route: str, *bodies: Any) -> list[httpx.Response]:
        """One body for all ranks, or one for each."""
        each = bodies * RANKS if len(bodies) < RANKS else bodies
        with ThreadPoolExecutor(RANKS) as pool:
            return list(pool.map(lambda c, body: c.post(route, json=body), self.clients, each))

    def update(self, url: str) -> list[httpx.Response]:
        """Rank 0 asks the engine, whose workers are all ranks'."""
        bodies = (
            {"update_url": url, "inference_group_ranks": [0, 1], "timeout": 40},
            {"timeout": 40},
        )
        return self.post("/v1/checkpoints/c/update", *bodies)


def assert_good(responses: list[httpx.Response]) -> None:
    assert [(response.status_code, response.text) for response in responses] == [(200, "")] * RANKS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("service")
    command = ["torch.distributed.run", f"--nproc-per-node={RANKS}"]
    command += [f"--master-port={free_port_pair()}"]
    command += ["-m", "checkpoint_engine", "--uds", str(folder / "{rank}.sock")]
    with running(command, folder), contextlib.ExitStack() as stack:
        paths = [folder / f"{rank}.sock" for rank in range(RANKS)]
        yield World([stack.enter_context(client_of(path)) for path in paths])


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def url(engine: Engine) -> Iterator[str]:
    with listening(engine) as address:
        yield address


@pytest.fixture
def registered(world: World, tmp_path: Path) -> Iterator[None]:
    """The first half of the weights on rank 0, the rest on rank 1, and gathered."""
    names = list(WEIGHTS)
    files = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    for file, held in zip(files, [names[:4], names[4:]], strict=True):
        save_file({name: WEIGHTS[name] for name in held}, file)
    assert_good(world.post("/v1/checkpoints/c/files", *({"files": [str(f)]} for f in files)))
    assert_good(world.post("/v1/checkpoints/c/gather-metas", None))
    yield
    assert_good([client.delete("/v1/checkpoints/c") for client in world.clients])


def assert_holds_the_weights(engine: Engine) -> None:
    assert len(engine.weights) == RANKS
    for loaded in engine.weights:
        assert loaded.keys() == WEIGHTS.keys()
        assert all(torch.equal(loaded[name], WEIGHTS[name]) for name in WEIGHTS)


@pytest.mark.usefixtures("registered")
def test_update_over_http_twice(world: World, engine: Engine, url: str) -> None:
    for _ in range(2):
        engine.weights = []
        assert_good(world.update(url))
        assert_holds_the_weights(engine)


@pytest.mark.usefixtures("registered")
def test_metas_are_the_same_on_all_ranks(world: World) -> None:
    metas = [client.get("/v1/metas").json() for client in world.clients]
    assert metas[0] == metas[1]
    assert sorted(metas[0]) == ["0", "1"]


@pytest.mark.usefixtures("registered")
def test_while_an_update_runs(world: World, engine: Engine, url: str) -> None:
    """healthz answers; a call that conflicts is refused; the update is not disturbed."""
    inside, go_on = threading.Event(), threading.Event()

    def on_bucket() -> None:
        inside.set()
        go_on.wait(30)

    engine.on_bucket = on_bucket
    with ThreadPoolExecutor(1) as pool:
        update = pool.submit(world.update, url)
        try:
            assert inside.wait(30)
            client = world.clients[0]
            assert client.get("/v1/healthz", timeout=5).status_code == 200
            for answer in (
                client.post("/v1/checkpoints/c/update", json={}),
                client.post("/v1/checkpoints/c/gather-metas"),
                client.delete("/v1/checkpoints/c"),
            ):
                assert answer.status_code == 409
                assert isinstance(answer.json(), str)
        finally:
            go_on.set()
        assert_good(update.result())
    assert_holds_the_weights(engine)


@pytest.mark.usefixtures("registered")
def test_an_engine_that_answers_500_fails_the_update_on_all_ranks(
    world: World, engine: Engine, url: str
) -> None:
    engine.refusal = "layer 7 does not fit"
    for response in world.update(url):
        assert response.status_code == 500
        assert "layer 7 does not fit" in response.json()
    engine.refusal = ""
    assert_good(world.update(url))
    assert_holds_the_weights(engine)


def test_a_missing_file_is_named_and_nothing_is_kept(world: World, tmp_path: Path) -> None:
    missing = str(tmp_path / "none.safetensors")
    for response in world.post("/v1/checkpoints/d/files", {"files": [missing]}):
        assert response.status_code == 500
        assert missing in response.json()


@pytest.fixture
def no_nohup() -> Iterator[None]:
    """Programs that are started ignore what this process ignores."""
    kept = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, kept)


@pytest.mark.parametrize(
    ("module", "how", "code"),
    [
        ("checkpoint_engine", signal.SIGTERM, 128 + signal.SIGTERM),
        ("checkpoint_engine.ps", signal.SIGINT, 128 + signal.SIGINT),
        ("checkpoint_engine", signal.SIGHUP, 128 + signal.SIGTERM),
    ],
)
@pytest.mark.usefixtures("no_nohup")
def test_one_server_alone_until_a_signal(
    tmp_path: Path, module: str, how: signal.Signals, code: int
) -> None:
    path = tmp_path / "server.sock"
    with running([module, "--uds", str(path)], tmp_path) as server:
        with client_of(path) as client:
            assert client.get("/v1/metas").json() == {}
        with running([module, "--uds", str(path)], tmp_path) as second:
            ended, errors = second.await_end()
            assert ended == 1
            assert f"cannot serve on {path}: another server listens there" in errors
        server.process.send_signal(how)
        ended, errors = server.await_end()
        assert ended == code
        assert f"rank 0 of 1 serves on {path}\n" in errors
        for noise in ("Traceback", "Local segment descriptor", "DEBUG"):
            assert noise not in errors
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_ends_during_an_update_leaves_no_traceback(tmp_path: Path) -> None:
    """No engine is asked, so the update waits for a worker, and longer than uvicorn for it."""
    file, path = tmp_path / "m.safetensors", tmp_path / "server.sock"
    save_file({"w": torch.zeros(4)}, file)
    with running(["checkpoint_engine", "--uds", str(path)], tmp_path) as server:
        with client_of(path) as client, ThreadPoolExecutor() as pool:
            route = "/v1/checkpoints/c"
            assert client.post(f"{route}/files", json={"files": [str(file)]}).is_success
            assert client.post(f"{route}/gather-metas").is_success
            update = pool.submit(client.post, f"{route}/update", json={"timeout": 8})
            while (client.get("/v1/status").json()["progress"] or {}).get("phase") != "handshake":
                assert not update.done()
            server.process.send_signal(signal.SIGINT)
            assert update.result().status_code == 503
        _, errors = server.await_end()
    assert "Traceback" not in errors
