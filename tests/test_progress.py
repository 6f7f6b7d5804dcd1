"""How far an update has come, told by a real one of one rank."""

from __future__ import annotations

import asyncio
import contextlib
import io
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import zmq
from loguru import logger
from safetensors.torch import save_file

from checkpoint_engine.errors import UpdateError
from checkpoint_engine.ground.progress import Progress, drawn_bar
from checkpoint_engine.memory.filling import CHUNK_BYTES
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.service import app as service
from checkpoint_engine.worker import update_weights_from_ipc

WEIGHTS = {f"layer.{i}": torch.full((1 << 18,), i, dtype=torch.uint8) for i in range(8)}
NBYTES = sum(weight.nbytes for weight in WEIGHTS.values())


def load(weights: list[tuple[str, torch.Tensor]]) -> None:
    assert all(torch.equal(tensor, WEIGHTS[name]) for name, tensor in weights)


def ask_engine(socket_paths: list[tuple[str, str]]) -> None:
    def receive() -> None:
        # An update that fails raises here, too; the test looks at the server's error.
        with contextlib.suppress(RuntimeError), zmq.Context() as context:
            update_weights_from_ipc(context, socket_paths[0][1], 0, run=load)

    threading.Thread(target=receive, daemon=True).start()


@pytest.fixture
def ps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ParameterServer]:
    monkeypatch.setenv("PS_DEVICE", "cpu")
    monkeypatch.setenv("PS_IPC_DIR", str(tmp_path))
    monkeypatch.setenv("PS_MAX_BUCKET_SIZE_GB", str(WEIGHTS["layer.0"].nbytes / (1 << 30)))
    server = ParameterServer(rank=0, world_size=1)
    server.register_checkpoint("c", named_tensors=WEIGHTS)
    server.gather_metas("c")
    yield server
    server.unregister_checkpoint("c", force=True)


def test_every_bucket_is_told(ps: ParameterServer) -> None:
    seen: list[Progress] = []
    ps.update("c", ask_engine, on_progress=seen.append)
    assert [one.done_bytes for one in seen] == [NBYTES // 8 * (i + 1) for i in range(8)]
    assert {(one.call, one.checkpoint, one.total_bytes) for one in seen} == {
        ("update", "c", NBYTES)
    }
    assert seen[-1].fraction == 1.0
    assert "plan" in seen[0].seconds


def test_the_report_has_a_table(ps: ParameterServer) -> None:
    assert ps.update("c", ask_engine).by_rank == {}
    report = ps.update("c", ask_engine, compare_ranks=True)
    assert report.by_rank.keys() == {0}
    assert report.slowest is None  # nobody to compare it with
    table = report.table().splitlines()
    assert table[0].startswith("c: 0.002 GB in 8 tensors")
    assert any(line.startswith("reload") and "GB/s" in line for line in table)


def test_nothing_is_under_way_before_and_after(ps: ParameterServer) -> None:
    assert ps.progress is None
    ps.update("c", ask_engine, on_progress=lambda progress: None)
    assert ps.progress is None


def test_a_callback_that_raises_fails_the_update_and_the_next_one_works(
    ps: ParameterServer,
) -> None:
    def raise_at_half(progress: Progress) -> None:
        if progress.fraction >= 0.5:
            raise KeyError("my own mistake")

    with pytest.raises(UpdateError, match="my own mistake"):
        ps.update("c", ask_engine, on_progress=raise_at_half)
    assert ps.progress is None
    assert ps.update("c", ask_engine).tensors == len(WEIGHTS)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "draws"), [(Terminal(), True), (io.StringIO(), False)])
def test_a_bar_is_drawn_on_terminals_alone(
    ps: ParameterServer, monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, draws: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    ps.update("c", ask_engine)
    assert ("100%" in stream.getvalue()) == draws
    ps.register_checkpoint("d", named_tensors=WEIGHTS)
    assert ("register: filling 2.1 MB" in stream.getvalue()) == draws
    assert ("register: summing 2.1 MB" in stream.getvalue()) == draws
    assert stream.getvalue().count("100%") == (3 if draws else 0)
    before = stream.getvalue()
    ps.register_checkpoint("nothing")
    assert stream.getvalue() == before


def test_a_service_leaves_the_bar_to_who_asks_it(
    ps: ParameterServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their terminal may be the same."""
    save_file(WEIGHTS, tmp_path / "m.safetensors")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(service, "_ask_engine", lambda order, name, paths: ask_engine(paths))

    async def ask() -> None:
        transport = httpx.ASGITransport(service.make_app(ps))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            files = {"files": [str(tmp_path / "m.safetensors")]}
            (await client.post("/v1/checkpoints/d/files", json=files)).raise_for_status()
            (await client.post("/v1/checkpoints/c/update", json={})).raise_for_status()

    asyncio.run(ask())
    assert "%" not in stream.getvalue()


def test_registering_is_told_too(ps: ParameterServer) -> None:
    seen: list[Progress] = []

    def note(progress: Progress) -> None:
        assert ps.progress == progress
        seen.append(progress)

    large = {f"layer.{i}": torch.zeros(CHUNK_BYTES, dtype=torch.uint8) for i in range(4)}
    ps.register_checkpoint("d", named_tensors=large, on_progress=note)
    phases = [one.phase for one in seen]
    assert phases == sorted(phases)  # all of the filling, then all of the summing
    for phase in ("filling", "summing"):
        shares = [one.fraction for one in seen if one.phase == phase]
        assert len(set(shares)) >= 4
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
    assert {(one.call, one.checkpoint, one.total_bytes) for one in seen} == {
        ("register", "d", 4 * CHUNK_BYTES)
    }
    assert ps.progress is None


def test_a_callback_that_raises_fails_the_registering_and_nothing_is_kept(
    ps: ParameterServer,
) -> None:
    def refuse(progress: Progress) -> None:
        raise KeyError("my own mistake")

    before = ps.update("c", ask_engine).checkpoint_memory
    with pytest.raises(KeyError, match="my own mistake"):
        ps.register_checkpoint("d", named_tensors=WEIGHTS, on_progress=refuse)
    assert ps.progress is None
    assert ps.update("c", ask_engine).checkpoint_memory == before
    ps.register_checkpoint("d", named_tensors=WEIGHTS)


def test_the_bar_moves_to_where_the_call_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    fields: dict[str, Any] = {"call": "update", "checkpoint": "c", "phase": "reload"}
    with drawn_bar("update", 1000) as show:
        show(Progress(done_bytes=250, total_bytes=1000, **fields))
        show(Progress(done_bytes=500, total_bytes=1000, **fields))
    assert "50%" in stream.getvalue()
    assert "75%" not in stream.getvalue()


def logged(ps: ParameterServer, level: str) -> list[Any]:
    """What an update logs."""
    records: list[Any] = []
    sink = logger.add(lambda message: records.append(message.record), level=level)
    try:
        ps.update("c", ask_engine)
    finally:
        logger.remove(sink)
    return records


def test_one_line_for_an_update(ps: ParameterServer) -> None:
    records = logged(ps, "DEBUG")
    assert [record["message"].partition(" GB")[0] for record in records] == [
        "rank 0: updated c: 0.002"
    ]
    assert "0.002 GB in 8 tensors and 8 buckets" in records[0]["message"]
    assert (records[0]["level"].name, records[0]["extra"]) == ("INFO", {"rank": 0})


@pytest.fixture
def details() -> Iterator[None]:
    """As a program asks for them."""
    logger.enable("checkpoint_engine")
    yield
    logger.disable("checkpoint_engine.ground.details")


@pytest.mark.usefixtures("details")
def test_one_more_line_for_each_phase_where_details_are_asked_for(ps: ParameterServer) -> None:
    *details, end = [record["message"] for record in logged(ps, "DEBUG")]
    assert [text for text in details if "buckets of up to" not in text] == [
        f"rank 0: updating c: {phase}"
        for phase in (
            "plan", "buffers", "handshake", "transfer", "reload", "release", "post hook",
            "completion",
        )
    ]  # fmt: skip
    assert end.startswith("rank 0: updated c: ")
    assert [record["level"].name for record in logged(ps, "INFO")] == ["INFO"]


@pytest.mark.usefixtures("details")
def test_nothing_for_each_bucket(ps: ParameterServer, monkeypatch: pytest.MonkeyPatch) -> None:
    many = len(logged(ps, "DEBUG"))
    monkeypatch.setenv("PS_MAX_BUCKET_SIZE_GB", "1")
    assert len(logged(ps, "DEBUG")) == many


def test_the_report_says_what_memory_is_held_and_whose_buckets_were_waited_for(
    ps: ParameterServer,
) -> None:
    report = ps.update("c", ask_engine)
    assert (report.checkpoint_memory, report.retained_memory) == (NBYTES, 0)
    assert report.gather_seconds > 0
    assert report.waited_for.keys() == {0}
    assert 0 < report.waited_for[0] <= report.phases["transfer"]
    ps.register_checkpoint("d", named_tensors=WEIGHTS)
    ps.unregister_checkpoint("d")
    assert ps.update("c", ask_engine).retained_memory == NBYTES
