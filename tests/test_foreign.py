"""Both ends of the wire against programs that know it only from its description: ``foreign.py``."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from checkpoint_engine import ps
from checkpoint_engine.errors import UpdateError
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.worker import update_weights_from_ipc
from fleet import digests, mixed_tensors
from foreign import child, receive, result_of, send

HALF = 288 << 10
RELEASES = ["0.4", "0.2"]


def weights() -> dict[str, torch.Tensor]:
    return mixed_tensors(seed=1, owner=0, largest=100_000)


# ---------------------------------------------------------------------- senders of our worker


class Engine:
    """Loads by copying; ``fails_at``: a number of a bucket, or ``hook``."""

    def __init__(self, fails_at: int | str = "") -> None:
        self.fails_at = fails_at
        self.loaded: dict[str, torch.Tensor] = {}
        self.buckets = 0
        self.hooks = 0

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.buckets += 1
        if self.buckets == self.fails_at:
            raise ValueError(f"no parameter for bucket {self.buckets}")
        self.loaded |= {name: tensor.clone() for name, tensor in weights}

    def post_hook(self) -> None:
        self.hooks += 1
        if self.fails_at == "hook":
            raise ValueError("cannot repack")


def update(
    tmp_path: Path, engine: Engine, release: str, stops_at: str = ""
) -> tuple[list[str], Exception | None]:
    """The replies that the sender got, and what our worker raised."""
    address, raised = f"ipc://{tmp_path}/s", None
    with child(send, address, weights(), HALF, release, stops_at) as sender:
        try:
            with zmq.Context() as context:
                update_weights_from_ipc(
                    context, address, 0, run=engine.load_weights, post_hook=engine.post_hook
                )
        except Exception as error:
            raised = error
        return result_of(sender), raised


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("stops_at", ["", "first None"])
def test_our_worker_loads(tmp_path: Path, release: str, stops_at: str) -> None:
    """Also from a sender that dies once it has said that there is no more."""
    engine = Engine()
    replies, raised = update(tmp_path, engine, release, stops_at)
    assert raised is None
    assert set(replies) == {""}
    assert engine.hooks == 1
    assert engine.buckets > 3
    assert digests(engine.loaded) == digests(weights())


@pytest.mark.parametrize("release", RELEASES)
def test_our_worker_answers_what_it_cannot_load(tmp_path: Path, release: str) -> None:
    engine = Engine(fails_at=2)
    replies, raised = update(tmp_path, engine, release)
    assert replies[:2] == ["", ""]
    assert "Traceback" in replies[2]
    assert "ValueError: no parameter for bucket 2" in replies[2]
    assert replies[3:] == ["silent: True"]
    assert "rank 3 failed" in str(raised)
    assert "no parameter for bucket 2" in str(raised.__cause__)
    assert engine.hooks == 0


@pytest.mark.parametrize("release", RELEASES)
def test_our_worker_cannot_finish(tmp_path: Path, release: str) -> None:
    """A sender of 0.2 is gone by then; the worker fails all the same."""
    replies, raised = update(tmp_path, Engine(fails_at="hook"), release)
    assert "cannot repack" in str(raised)
    if release == "0.4":
        assert "ValueError: cannot repack" in replies.pop()
    assert set(replies) == {""}


@pytest.mark.parametrize("release", RELEASES)
def test_our_worker_gives_up_when_told(tmp_path: Path, release: str) -> None:
    engine = Engine()
    replies, raised = update(tmp_path, engine, release, stops_at="bucket")
    assert replies == ["", "", "silent: True"]
    assert isinstance(raised, RuntimeError)
    assert "rank 3 failed" in str(raised)
    assert engine.hooks == 0


@pytest.mark.parametrize("release", RELEASES)
def test_our_worker_cannot_open_the_buffer(tmp_path: Path, release: str) -> None:
    replies, raised = update(tmp_path, Engine(), release, stops_at="handle")
    assert "FileNotFoundError" in replies[0]
    assert replies[1:] == ["silent: True"]
    assert isinstance(raised, FileNotFoundError)


# ---------------------------------------------------------------------- workers of our server


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ParameterServer]:
    def no_p2p(*args: Any, **options: Any) -> None:
        raise RuntimeError("not in this test")

    monkeypatch.setenv("PS_DEVICE", "cpu")
    monkeypatch.setenv("PS_IPC_DIR", str(tmp_path / "sockets"))
    monkeypatch.setenv("PS_MAX_BUCKET_SIZE_GB", str(2**-13))  # 128 KiB
    monkeypatch.setattr(ps, "P2PStore", no_p2p)
    made = ParameterServer(rank=0, world_size=1)
    made.register_checkpoint("c", named_tensors=weights())
    made.gather_metas("c")
    yield made
    made.unregister_checkpoint("c")
    assert list((tmp_path / "sockets").iterdir()) == []


class Request:
    """A ``req_func`` that lets a foreign worker receive."""

    def __init__(self, release: str = "0.4", fault: str = "") -> None:
        self._arguments = release, fault
        self.result: dict[str, Any] = {}

    def __call__(self, socket_paths: list[tuple[str, str]]) -> None:
        with child(receive, socket_paths[0][1], *self._arguments) as worker:
            self.result = result_of(worker)

    def update(self, server: ParameterServer) -> dict[str, Any]:
        server.update("c", self, timeout=timedelta(seconds=30))
        return self.result


WORKERS = ["0.4", "0.2"]


@pytest.mark.parametrize("release", WORKERS)
def test_our_server_sends(server: ParameterServer, release: str) -> None:
    result = Request(release).update(server)
    assert result["digests"] == digests(weights())
    assert result["hooks"] == 1


FAULTS = {
    "handle": ("handshake", "cannot open the buffer"),
    "bucket": ("reload", "cannot load the bucket"),
    "hook": ("post hook", "cannot repack"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_our_server_notices_what_fails(server: ParameterServer, fault: str) -> None:
    phase, cause = FAULTS[fault]
    request = Request(fault=fault)
    with pytest.raises(UpdateError, match=cause) as caught:
        request.update(server)
    assert caught.value.phase == phase
    if fault != "hook":
        assert cause in request.result["told"]  # why the server gave up
    assert Request().update(server)["digests"] == digests(weights())
