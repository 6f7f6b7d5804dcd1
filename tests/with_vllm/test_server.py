"""Updates of a real vLLM API server at work: requests that go on, workers that die."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))

import dying_worker
from test_models import CPU, PROGRAMS

import demo_vllm
from conftest import ENGINE_ENV
from demo_vllm import TP, VllmServer
from torchrun import Forked, RankStarter, Run


class ForkedServer(Forked):
    """vLLM's API server, forked from a process that has imported it. What ``VllmServer`` does with
    a ``subprocess.Popen``."""

    stdout = None

    def poll(self) -> int | None:
        return None if self.is_running() else int(self._code.read_text())

    def send_signal(self, number: int) -> None:
        children = Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text().split()
        for child in children:  # none, where the server has just ended by itself
            with suppress(ProcessLookupError):
                os.kill(int(child), number)

    def wait(self, timeout: float = 10) -> None:
        if self.is_running(timeout):
            raise subprocess.TimeoutExpired("vLLM", timeout)


@functools.cache
def starter() -> RankStarter:
    """Importing vLLM takes longer than all that the tests do with a server."""
    return RankStarter("frozen_imports", "vllm.entrypoints.openai.api_server", **ENGINE_ENV)


@contextmanager
def running(
    model: Path, monkeypatch: pytest.MonkeyPatch, *how: Any, **options: Any
) -> Iterator[VllmServer]:
    def start(command: list[str], env: dict[str, str], **_: Any) -> ForkedServer:
        folder = model.parent / f"server-{uuid.uuid4().hex}"
        return ForkedServer(folder, command[1:], [env], starter=starter())

    for name, value in ENGINE_ENV.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(demo_vllm, "PROGRAM", [str(Path(__file__).parent / "forking_server.py")])
    monkeypatch.setattr(demo_vllm, "start", start)
    with VllmServer(model, *how, **options) as server:
        server.wait_until_healthy()
        yield server


THINKING = 0.1  # seconds of a client between two requests


class Clients:
    """Two clients that ask again and again for the same tokens.

    They think in between: on two cores, vLLM's processes, which spin while there are requests,
    leave the ranks next to no time otherwise (0.1 s of 25 were seen).
    """

    def __init__(self, server: VllmServer) -> None:
        self.answers: list[list[int]] = []
        self.failures: list[Exception] = []
        self._server = server
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(2)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        while not self._stop.is_set():
            try:
                self.answers.append(self._server.generate())
            except Exception as error:
                self.failures.append(error)
                return
            self._stop.wait(THINKING)


class Servers:
    """Parameter-server ranks that have started and wait to be told to go on."""

    def __init__(self, folder: Path, server: VllmServer, **options: Any) -> None:
        folder.mkdir()
        self._folder = folder
        self._run = Run(
            folder / "run",
            TP,
            "served",
            CPU,
            PROGRAMS,
            url=server.url,
            folder=str(folder),
            **options,
        )
        ends = time.monotonic() + 60
        while len(list(folder.glob("ready-*"))) < TP:
            assert self._run.is_running(), self._run.output()
            assert time.monotonic() < ends, self._run.output()
            time.sleep(0.05)

    def go(self) -> list[Any]:
        """What each rank saw, when all is done."""
        (self._folder / "go").touch()
        return self._run.wait(100)


@pytest.mark.timeout(240)
def test_requests_go_on_and_never_mix_weights(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["dense-2", "dense-1", "dense-2"]
    steps = [{"name": name, "model": str(models[name])} for name in names]
    with running(models["dense-1"], monkeypatch) as server:
        before = server.generate()
        servers = Servers(tmp_path / "servers", server, steps=steps, pause="wait")
        with Clients(server) as clients:
            ranks = servers.go()
        after = server.generate()
    assert [seen["error"] for seen in ranks[0]] == ["", "", ""]
    assert clients.failures == []
    assert {tuple(tokens) for tokens in clients.answers} == {tuple(before), tuple(after)}
    assert before != after


@pytest.mark.timeout(300)
def test_a_worker_killed_in_the_middle_fails_the_update_and_a_new_engine_is_updated(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"steps": [{"name": "dense-2", "model": str(models["dense-2"])}], "pause": None}
    killed_at = tmp_path / "killed"
    monkeypatch.setattr(demo_vllm, "EXTENSION", "dying_worker.DyingWorker")
    monkeypatch.setenv(dying_worker.KILLED_AT, str(killed_at))
    with running(models["dense-1"], monkeypatch) as server:
        failed = Servers(tmp_path / "a", server, **options).go()
    for (seen,) in failed:
        assert "update failed on rank 1 during reload" in seen["error"]
        assert seen["ended"] - float(killed_at.read_text()) < 10
    with running(models["dense-1"], monkeypatch) as server:
        before = server.generate()
        ended = Servers(tmp_path / "b", server, **options).go()
        assert [seen["error"] for (seen,) in ended] == ["", ""]
        assert server.generate() != before
