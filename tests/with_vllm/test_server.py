"""Updates of a real vLLM API server at work: requests that go on, workers that die."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))

from conftest import ENGINE_ENV
from test_models import CPU, PROGRAMS

from demo_vllm import TP, VllmServer
from torchrun import Run, torchrun


@contextmanager
def running(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmServer]:
    for name, value in ENGINE_ENV.items():
        monkeypatch.setenv(name, value)
    with VllmServer(model) as server:
        server.wait_until_healthy()
        yield server


class Clients:
    """Two clients that ask again and again for the same tokens."""

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


@pytest.mark.timeout(240)
def test_requests_go_on_and_never_mix_weights(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["dense-2", "dense-1", "dense-2"]
    steps = [{"name": name, "model": str(models[name])} for name in names]
    with running(models["dense-1"], monkeypatch) as server:
        before = server.generate()
        with Clients(server) as clients:
            ranks = torchrun(
                tmp_path,
                TP,
                "served",
                100,
                CPU,
                script=PROGRAMS,
                url=server.url,
                steps=steps,
                pause="wait",
                started=str(tmp_path / "started"),
            )
        after = server.generate()
    assert [seen["error"] for seen in ranks[0]] == ["", "", ""]
    assert clients.failures == []
    assert {tuple(tokens) for tokens in clients.answers} == {tuple(before), tuple(after)}
    assert before != after


@pytest.mark.timeout(300)
def test_a_killed_worker_fails_the_update_and_a_new_engine_is_updated(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [{"name": "dense-2", "model": str(models["dense-2"])}]
    options = {"steps": steps, "pause": None, "script": PROGRAMS}
    started = tmp_path / "a" / "started"
    with running(models["dense-1"], monkeypatch) as server:
        victim = _workers_of(server.process.pid)[-1]
        os.kill(victim, signal.SIGSTOP)  # so that the update is under way when it dies
        update = Run(
            tmp_path / "a", TP, "served", CPU, url=server.url, started=str(started), **options
        )
        while not started.exists():
            assert update.is_running(), update.output()
            time.sleep(0.01)
        time.sleep(1)
        os.kill(victim, signal.SIGKILL)
        killed = time.time()
        failed = update.wait(60)
    for (seen,) in failed:
        assert "update failed on rank" in seen["error"]
        assert seen["ended"] - killed < 10
    with running(models["dense-1"], monkeypatch) as server:
        before = server.generate()
        ended = torchrun(
            tmp_path / "b", TP, "served", 60, CPU, url=server.url, started=str(started), **options
        )
        assert [seen["error"] for (seen,) in ended] == ["", ""]
        assert server.generate() != before


def _workers_of(pid: int) -> list[int]:
    """vLLM's worker processes below ``pid``, by their titles."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            content = path.read_text()
        except OSError:
            continue
        number, _, rest = content.partition(" (")
        title, _, fields = rest.rpartition(") ")
        parents[int(number)] = (int(fields.split()[1]), title)
    below = {pid}
    while more := {child for child, (parent, _) in parents.items() if parent in below} - below:
        below |= more
    return sorted(child for child in below if "Worker_TP" in parents[child][1])
