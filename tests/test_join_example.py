"""The README's example of joining, command for command: ``examples/update.py`` in two worlds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from checkpoint_engine.cli import commands
from hosts import Host, HostsUnavailableError, Network
from torchrun import HERE, MOONCAKE_ADVICE, free_port_pair, mooncake_works

EXAMPLES = HERE.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from demo import Engine, stop  # noqa: E402
from random_checkpoint import expected_digests, model_config, write_checkpoint  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not mooncake_works(), reason=MOONCAKE_ADVICE),
    pytest.mark.alone,
    pytest.mark.timeout(150),  # a dozen processes start, each with torch
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("checkpoints") / "small"
    write_checkpoint(folder, model_config("small"), seed=7)
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    sockets = tmp_path / "sockets"
    sockets.mkdir(mode=0o700)
    return {
        **os.environ,
        "PS_DEVICE": "cpu",
        "PS_IPC_DIR": str(sockets),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE.parent),
    }


def world(ranks: int, *arguments: str) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    return [*command, *arguments]


def await_(happened: Callable[[], bool], *processes: subprocess.Popen[str]) -> None:
    ends = time.monotonic() + 60
    while not happened():
        for process in processes:
            assert process.poll() is None, process.args
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_an_engine_of_another_size_joins(
    checkpoint: Path, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine that runs has two workers, the new one has one."""
    for name in ("PS_DEVICE", "PS_IPC_DIR", "PYTHONPATH"):
        monkeypatch.setenv(name, environment[name])
    metas, update = tmp_path / "metas.json", str(EXAMPLES / "update.py")
    with ExitStack() as stack:
        running = stack.enter_context(Engine(checkpoint, "dummy"))
        new = stack.enter_context(Engine(checkpoint, "dummy", tp=1))
        running.wait_until_healthy()
        new.wait_until_healthy()
        source = subprocess.Popen(
            world(
                2,
                f"--master-port={free_port_pair()}",
                update,
                f"--checkpoint-path={checkpoint}",
                f"--save-metas-file={metas}",
                "--sleep-time=3600",
                f"--endpoint={running.url}",
                "--inference-parallel-size=2",
            ),
            env=environment,
            text=True,
        )
        stack.callback(stop, source)
        await_(metas.exists, source)
        subprocess.run(
            world(
                1,
                f"--master-port={free_port_pair()}",
                update,
                f"--load-metas-file={metas}",
                f"--endpoint={new.url}",
                "--inference-parallel-size=1",
            ),
            env=environment,
            check=True,
            timeout=60,
        )
        assert new.call_workers("weights_digest") == expected_digests(checkpoint, 1)
        assert source.poll() is None
        expected = expected_digests(checkpoint, 2)
        await_(lambda: running.call_workers("weights_digest") == expected, source)
        assert running.generate() == new.generate()


def test_an_engine_joins_from_a_running_service(
    checkpoint: Path, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service listens on TCP and wants its token."""
    for name in ("PS_DEVICE", "PS_IPC_DIR", "PYTHONPATH"):
        monkeypatch.setenv(name, environment[name])
    environment |= {"PS_HTTP_TOKEN": "a-token-of-this-test-alone"}
    port = free_port_pair()
    address = f"http://127.0.0.1:{port}"
    with ExitStack() as stack:
        new = stack.enter_context(Engine(checkpoint, "dummy", tp=1))
        serve = world(1, f"--master-port={free_port_pair()}", "-m", "checkpoint_engine")
        service = subprocess.Popen([*serve, f"--port={port}"], env=environment, text=True)
        stack.callback(stop, service)
        await_(lambda: answers(address), service)
        register = ["register", "my-checkpoint-iter-0", str(checkpoint), f"--server={address}"]
        result = CliRunner().invoke(commands, register, env=environment)
        assert result.exit_code == 0, result.output
        gather = ["metas", "my-checkpoint-iter-0", f"--server={address}"]
        result = CliRunner().invoke(commands, gather, env=environment)
        assert result.exit_code == 0, result.output
        new.wait_until_healthy()
        join = world(
            1,
            f"--master-port={free_port_pair()}",
            str(EXAMPLES / "update.py"),
            f"--metas-url={address}/v1/metas",
            f"--endpoint={new.url}",
            "--inference-parallel-size=1",
        )
        subprocess.run(join, env=environment, check=True, timeout=60)
        assert new.call_workers("weights_digest") == expected_digests(checkpoint, 1)
        assert service.poll() is None


def answers(address: str) -> bool:
    """Whether a server is up, be it to refuse."""
    try:
        return httpx.get(f"{address}/v1/healthz", timeout=5).status_code in (200, 401)
    except httpx.TransportError:
        return False


def test_every_engine_of_the_new_world_joins(
    checkpoint: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """Two hosts with an engine each, at the same port, and a third that owns the weights."""
    update, metas = str(EXAMPLES / "update.py"), tmp_path / "metas.json"
    with ExitStack() as stack:
        try:
            far, *near = stack.enter_context(Network(3))
        except HostsUnavailableError as error:
            pytest.skip(str(error))
        source = far.popen(
            world(
                1,
                f"--local-addr={far.address}",
                update,
                f"--checkpoint-path={checkpoint}",
                f"--save-metas-file={metas}",
                "--sleep-time=3600",
                "--inference-parallel-size=1",
            ),
            env=environment,
        )
        engines = [start_engine(host, checkpoint, environment) for host in (far, *near)]
        await_(metas.exists, source, *engines)
        joining = [
            host.popen(
                world(
                    1,
                    "--nnodes=2",
                    f"--node-rank={place}",
                    f"--local-addr={host.address}",
                    f"--master-addr={near[0].address}",
                    "--master-port=29500",
                    update,
                    f"--load-metas-file={metas}",
                    "--inference-parallel-size=1",
                ),
                env=environment,
            )
            for place, host in enumerate(near)
        ]
        assert [process.wait(60) for process in joining] == [0, 0]
        assert source.poll() is None
        expected = expected_digests(checkpoint, 1)
        for host in near:
            assert digests_at(host, environment) == expected


def start_engine(
    host: Host, checkpoint: Path, environment: dict[str, str]
) -> subprocess.Popen[str]:
    command = [sys.executable, str(EXAMPLES / "mini_engine.py"), f"--model={checkpoint}"]
    return host.popen([*command, "--port=19730", "--load-format=dummy"], env=environment)


def digests_at(host: Host, environment: dict[str, str]) -> object:
    """What the workers of the engine on a host hold."""
    asked = host.popen([sys.executable, "-c", ASK], env=environment, stdout=subprocess.PIPE)
    answer, _ = asked.communicate(timeout=20)
    return json.loads(answer)["results"]


ASK = """
import httpx
body = {"method": "weights_digest", "args": []}
answer = httpx.post("http://localhost:19730/collective_rpc", json=body, timeout=15)
print(answer.text)
"""
