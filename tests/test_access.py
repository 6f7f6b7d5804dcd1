"""What callers of the HTTP service may name, and who may call it."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from safetensors.torch import save_file

import second_user
from checkpoint_engine.errors import AccessError
from checkpoint_engine.memory import arena, folder
from checkpoint_engine.memory.files import open_files
from checkpoint_engine.memory.host_memory import HostMemory
from checkpoint_engine.service import access
from checkpoint_engine.service.access import Access, Guard
from checkpoint_engine.service.serve import ServeOptions, listen_tcp, read_token, uvicorn_config
from test_authenticator import needs_root
from torchrun import MOONCAKE_ADVICE, mooncake_works

TOKEN = "0123456789abcdef"


# ---------------------------------------------------------------------- engines


@pytest.mark.parametrize(
    ("allowed", "url"),
    [
        ("http://good.example", "http://good.example/collective_rpc"),
        ("http://good.example:80", "http://GOOD.example/x"),
        ("http://good.example/a", "http://good.example/a"),
        ("http://good.example/a/", "http://good.example/a/b"),
        ("http://[::1]:8000", "http://[::1]:8000/x"),
    ],
)
def test_engines_that_may_be_asked(allowed: str, url: str) -> None:
    Access.of((), (allowed,)).check_engine(url, None)


@pytest.mark.parametrize(
    "url",
    [
        "http://good.example.evil/a",
        "http://good.example@evil/a",
        "http://user@good.example/a",
        "http://evil/a#good.example",
        "http://evil/?http://good.example/a",
        "http://good.example:81/a",
        "https://good.example/a",
        "http://good.example/ab",
        "http://good.example/a/../b",
        "http://good.example/a/%2e%2e/b",
        "http://good.example/a/..%2fb",
        "http://good.example/a\\..\\b",
        "http://good.example//a",
        "ftp://good.example/a",
        "good.example/a",
        "http:good.example/a",
        "",
        "http://good.example/a\nHost: evil",
    ],
)
def test_engines_that_may_not(url: str) -> None:
    with pytest.raises(AccessError):
        Access.of((), ("http://good.example/a",)).check_engine(url, None)


def test_unix_sockets_of_engines() -> None:
    rules = Access.of((), ("unix:/run/engine.sock",))
    rules.check_engine("http://x/y", "/run/engine.sock")
    for url, uds in (("http://x/y", "/run/docker.sock"), ("http://x/y", None)):
        with pytest.raises(AccessError):
            rules.check_engine(url, uds)


# ---------------------------------------------------------------------- files


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    inside, outside = tmp_path / "in", tmp_path / "in-not"
    for one in (inside, outside):
        one.mkdir()
        save_file({"w": torch.ones(4)}, one / "m.safetensors")
    return inside, outside


def test_links_are_resolved(folders: tuple[Path, Path]) -> None:
    inside, outside = folders
    rules = Access.of((str(inside),))
    (inside / "link.safetensors").symlink_to(outside / "m.safetensors")
    (inside / "folder").symlink_to(outside)
    open_files([inside / "m.safetensors"], rules.folders)
    for path in (
        outside / "m.safetensors",
        outside / "missing.safetensors",
        inside / "link.safetensors",
        inside / "folder" / "m.safetensors",
        inside / ".." / "in-not" / "m.safetensors",
    ):
        with pytest.raises(AccessError, match="does not lie in a folder"):
            open_files([path], rules.folders)


def test_a_hard_link_out_of_the_folder_is_refused(folders: tuple[Path, Path]) -> None:
    inside, outside = folders
    os.link(outside / "m.safetensors", inside / "linked.safetensors")
    with pytest.raises(AccessError, match="is a hard link: the file has 2 names"):
        open_files([inside / "linked.safetensors"], (str(inside),))
    open_files([inside / "linked.safetensors"])


def test_a_link_that_changes_after_it_was_looked_at(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, outside = folders
    link = inside / "link.safetensors"
    link.symlink_to(inside / "m.safetensors")
    look = os.path.realpath

    def look_then_change(path: Any) -> str:
        seen = look(path)
        link.unlink()
        link.symlink_to(outside / "m.safetensors")
        return seen

    monkeypatch.setattr(folder.os.path, "realpath", look_then_change)
    with pytest.raises(AccessError):
        open_files([link], (look(inside),))


def test_a_file_that_is_replaced_before_its_bytes_are_read(folders: tuple[Path, Path]) -> None:
    inside, outside = folders
    sources = open_files([inside / "m.safetensors"])
    os.replace(outside / "m.safetensors", inside / "m.safetensors")
    with pytest.raises(ValueError, match="was replaced by another file"):
        HostMemory("cpu").fill(sources)


def test_a_fifo_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no regular file"):
        open_files([tmp_path / "x.safetensors"])


def test_what_took_the_place_of_a_pinned_file_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(f"/dev/shm/pinned-{os.getpid()}.safetensors")
    save_file({"w": torch.ones(4)}, path)
    pin = arena.Arena.pin

    def pin_then_replace(pinned: Any) -> None:
        pin(pinned)
        path.unlink()
        path.write_text("precious")

    monkeypatch.setattr(arena.Arena, "pin", pin_then_replace)
    memory = HostMemory("cpu")
    try:
        buffers = memory.pin_in_place(open_files([path]))
        assert path.read_text() == "precious"
        memory.release(buffers)
    finally:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------- callers


def test_tcp_wants_a_token() -> None:
    with pytest.raises(ValueError, match="give a token"):
        ServeOptions(port=0)
    with pytest.raises(ValueError, match="at least 16"):
        ServeOptions(port=0, token="short")
    ServeOptions(port=0, allow_anyone=True)
    for empty in ({"uds": ""}, {"uds": "\0"}, {"port": 0, "token": TOKEN, "host": ""}):
        with pytest.raises(ValueError, match="must not be empty"):
            ServeOptions(**empty)
    assert TOKEN not in repr(ServeOptions(port=0, token=TOKEN))


def test_a_token_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PS_HTTP_TOKEN", "from-environment")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert read_token() == "from-environment"
    assert read_token(tmp_path / "token") == TOKEN
    with pytest.raises(ValueError, match="cannot be read"):
        read_token(tmp_path / "none")


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(len(body)).encode()})


@pytest.fixture
def url() -> Iterator[str]:
    with serving() as where:
        yield where


@contextlib.contextmanager
def serving(token: str | None = TOKEN, host: str = "127.0.0.1") -> Iterator[str]:
    options = ServeOptions(
        host=host, port=0, token=token, allow_anyone=token is None, max_body_bytes=1000
    )
    config = uvicorn_config(app, options)
    config.lifespan = "off"
    server = uvicorn.Server(config)
    with listen_tcp("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def open_url() -> Iterator[str]:
    with serving(None, "ps.example") as where:
        yield where


OWN = "http://localhost:8000"
LINK = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("POST", {}, 200),
        ("POST", {"host": "localhost:8000", "origin": OWN, "sec-fetch-site": "same-origin"}, 200),
        ("POST", {"host": "server"}, 200),
        ("POST", {"host": "[::1]:80"}, 200),
        ("POST", {"host": "10.0.0.7:80"}, 200),
        ("POST", {"host": "PS.example."}, 200),
        ("POST", {"host": "a.localhost"}, 200),
        ("POST", {"host": socket.gethostname()}, 200),
        ("GET", {"host": "localhost:8000", **LINK}, 200),
        # A name that its owner has made lead here.
        ("GET", {"host": "evil.example"}, 403),
        ("GET", {"host": "localhost.evil.example"}, 403),
        ("GET", {"host": "127.0.0.1.evil.example"}, 403),
        ("GET", {"host": "localhost@evil.example"}, 403),
        ("GET", {"host": "[evil.example"}, 403),
        ("GET", {"host": ""}, 403),
        ("POST", {"host": "evil.example", "origin": "http://evil.example"}, 403),
        # Another site's page.
        ("POST", {"host": "localhost:8000", "origin": "http://evil.example"}, 403),
        ("POST", {"host": "localhost:8000", "origin": "http://localhost:9000"}, 403),
        ("POST", {"host": "localhost:8000", "origin": "null"}, 403),
        ("POST", {"host": "localhost:8000", "origin": f"{OWN}.evil.example"}, 403),
        ("POST", {"host": "localhost:8000", **LINK}, 403),
        ("POST", {"host": "localhost:8000", "sec-fetch-site": "same-site"}, 403),
        ("GET", {"host": "localhost:8000", "sec-fetch-site": "cross-site"}, 403),
    ],
)
def test_who_may_ask_without_a_token(
    open_url: str, method: str, headers: dict[str, str], status: int
) -> None:
    answer = httpx.request(method, open_url, headers=headers)
    assert answer.status_code == status, answer.text


def test_with_a_token_the_name_does_not_matter(url: str) -> None:
    elsewhere = {"host": "ps.behind-a-proxy.example", "origin": "https://ps.example"}
    assert httpx.post(url, headers={**RIGHT, **elsewhere}).status_code == 200


RIGHT = {"authorization": f"Bearer {TOKEN}"}


def test_who_may_call(url: str) -> None:
    assert isinstance(uvicorn_config(app, ServeOptions(uds="/x")).app, Guard)
    assert httpx.post(url, headers=RIGHT, content=b"abc").text == "3"
    near = [TOKEN[:-1], TOKEN[:-1] + "x", "x" + TOKEN[1:], TOKEN + "x"]
    wrong_tokens = [{"authorization": f"Bearer {token}"} for token in ("x", *near)]
    twice = [("authorization", f"Bearer {TOKEN}"), ("authorization", "Bearer x")]
    for wrong in ({}, {"authorization": TOKEN}, *wrong_tokens, twice):
        answer = httpx.post(url, headers=wrong)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


def test_a_browser_may_look_with_the_token_as_password(url: str) -> None:
    assert httpx.get(url, auth=("anybody", TOKEN)).text == "0"
    asked = httpx.get(url)
    assert asked.status_code == 401
    assert "Basic realm=" in asked.headers["www-authenticate"]
    for wrong in ("x", TOKEN[:-1], TOKEN[:-1] + "x"):
        assert httpx.get(url, auth=("anybody", wrong)).status_code == 401
    assert httpx.get(url, headers={"authorization": "Basic ???"}).status_code == 401
    for method in ("POST", "DELETE", "PUT", "HEAD"):
        assert httpx.request(method, url, auth=("anybody", TOKEN)).status_code == 401


def test_bodies_that_are_too_large(url: str) -> None:
    assert httpx.post(url, headers=RIGHT, content=bytes(1001)).status_code == 413
    chunks = (bytes(100) for _ in range(100))
    with contextlib.suppress(httpx.WriteError):
        assert httpx.post(url, headers=RIGHT, content=chunks).status_code == 413


def test_a_head_that_never_ends(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "HEAD_SECONDS", 0.3)
    port = httpx.URL(url).port
    assert port is not None
    with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
        slow.sendall(b"POST / HTTP/1.1\r\n")
        with contextlib.suppress(OSError):
            for _ in range(100):
                slow.sendall(b"a: b\r\n")
                time.sleep(0.05)
            pytest.fail("the connection was kept")


def test_a_connection_is_for_one_request(url: str) -> None:
    """A second head could be as slow as the first."""
    port = httpx.URL(url).port
    assert port is not None
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(
            f"GET / HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\n\r\n".encode()
        )
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 200")


def test_too_many_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "MAX_CONNECTIONS", 2)
    with serving() as url:
        port = httpx.URL(url).port
        assert port is not None
        with socket.create_connection(("127.0.0.1", port), timeout=10):
            assert httpx.get(url, headers=RIGHT).status_code == 503
        until_answered = (httpx.get(url, headers=RIGHT).status_code for _ in range(1000))
        assert 200 in until_answered


def test_a_body_that_never_ends(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "BODY_SECONDS", 0.3)
    port = httpx.URL(url).port
    assert port is not None
    head = f"POST / HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\ncontent-length: 9\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
        slow.sendall(head.encode() + b"\r\nabc")
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


@needs_root
@pytest.mark.timeout(150)
@pytest.mark.skipif(not mooncake_works(), reason=MOONCAKE_ADVICE)
def test_another_user_at_every_port_and_socket() -> None:
    """What SECURITY.md promises of the other users of a machine, and what it says they can do."""
    refused = {
        "unix": r"PermissionError|FileNotFoundError",
        "memory": r"PermissionError|FileNotFoundError",
        "process": "PermissionError",
        "http": r"401|connected, got b'HTTP/1.1 400|connected, (no answer|was dropped)",
        "liveness": r"connected, (no answer|was dropped)",
        "abstract": r"connected, (no answer|was dropped)",
        "store": r"connected, (no answer|was dropped)",
        "P2P": r"connected, (no answer|was dropped)|the kernel dropped it",
    }
    with second_user.held() as world:
        rows = list(second_user.rows_of_strangers(world))
        assert {row.place.kind for row in rows} == refused.keys()
        for row in rows:
            assert re.match(refused[row.place.kind], row.got), row
            if row.place.kind == "P2P" and not row.tried.endswith(world.p2p_host):
                assert row.got == "the kernel dropped it", row
        assert not world.answers.done()
        world.go_on.set()
        assert [answer.text for answer in world.answers.result(60)] == ["", ""]
        assert world.holds_the_weights()
        rows = list(second_user.rows_of_the_trusted(world))
        assert [row for row in rows if re.search("Error|refused", row.got)] == []
        for answer in world.update():  # what was written is found before a worker loads it
            assert answer.status_code == 500
            assert "checksum" in answer.text
