"""Real vLLM engines. ``make test-vllm`` installs vLLM's CPU build into an environment of its own
and runs these; anywhere else there is nothing to collect."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

ENGINE_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # small helpers of vLLM, which each worker would compile anew
    "PS_DEVICE": "cpu",
    "PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), str(HERE)]),
}


class EngineHost:
    """The process that the engines of the matrix run in, one at a time."""

    def __init__(self, folder: Path, popen: Callable[..., Any] = subprocess.Popen) -> None:
        """``popen``: where it is to run on another host; only that one reaches ``url`` then."""
        port_file = folder / "port"
        self._output = folder / "engines"
        with self._output.open("wb") as output:
            self._process = popen(
                [sys.executable, str(HERE / "engine_host.py"), str(port_file)],
                env={**os.environ, **ENGINE_ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        ends = time.monotonic() + 100
        while not port_file.exists():
            assert self._process.poll() is None, self.output()
            assert time.monotonic() < ends, self.output()
            time.sleep(0.05)
        self.url = f"http://127.0.0.1:{port_file.read_text()}"

    def tokens_of_a_fresh_start(self, model: Path, tp: int) -> list[list[int]]:
        self.start(model, tp)
        return self.generate()

    def generate(self) -> list[list[int]]:
        return self._post("generate")

    def start(self, model: Path, tp: int, **options: Any) -> None:
        self._post("start", model=str(model), tensor_parallel_size=tp, **options)

    def output(self) -> str:
        return self._output.read_text(errors="replace")[-6000:]

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _post(self, route: str, **body: Any) -> Any:
        answer = httpx.post(f"{self.url}/{route}", json=body, timeout=120, trust_env=False)
        assert answer.is_success, f"{answer.text}\n{self.output()}"
        return answer.json()


@pytest.fixture(scope="session", autouse=True)
def what_vllm_leaves() -> Iterator[None]:
    """Sockets, and files in which its workers meet: let them be in a folder that goes."""
    with (
        tempfile.TemporaryDirectory(prefix="vllm-") as folder,
        pytest.MonkeyPatch.context() as set_,
    ):
        set_.setenv("TMPDIR", folder)
        yield


@pytest.fixture(scope="session")
def engine_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineHost]:
    host = EngineHost(tmp_path_factory.mktemp("engine"))
    yield host
    host.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two checkpoints of one model: ``dense-1`` and ``dense-2``."""
    from models import write_model

    folder = tmp_path_factory.mktemp("models")
    return {f"dense-{seed}": write_model(folder / f"dense-{seed}", seed) for seed in (1, 2)}


@pytest.fixture(scope="session")
def sources(
    tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]
) -> Iterator[dict[tuple[str, int], Path]]:
    """Metas files of worlds of 1, 2 and 3 ranks that own every checkpoint, by (name, ranks)."""
    from torchrun import MOONCAKE_ADVICE, Run, mooncake_works

    if not mooncake_works():
        pytest.skip(MOONCAKE_ADVICE)
    folder = tmp_path_factory.mktemp("sources")
    paths = {name: str(path) for name, path in models.items()}
    worlds = [
        Run(
            folder / str(ranks),
            ranks,
            "source",
            {"PS_DEVICE": "cpu"},
            script="with_vllm/vllm_programs.py",
            folder=str(folder),
            models=paths,
        )
        for ranks in (1, 2, 3)
    ]
    metas = {(n, ranks): folder / f"{n}-{ranks}.json" for n in models for ranks in (1, 2, 3)}
    ends = time.monotonic() + 100
    while not all(path.exists() for path in metas.values()):
        assert time.monotonic() < ends, [world.output() for world in worlds]
        time.sleep(0.1)
    yield metas
    (folder / "finished").touch()
    for world in worlds:
        world.kill()
