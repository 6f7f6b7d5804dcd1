"""The commands as a user types them; those for a service, on a real one of two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from checkpoint_engine.cli import commands
from checkpoint_engine.cli.servers import find_servers
from checkpoint_engine.cli.service import parse_ranks
from checkpoint_engine.client import wait_until_ready
from test_service import Engine, listening, running

RANKS = 2
WEIGHTS = {f"layers.{i}.w": torch.randn(i + 1, 300, dtype=torch.bfloat16) for i in range(8)}


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(commands, [str(word) for word in arguments])


def json_of(*arguments: str | Path, code: int = 0) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    for rank in range(RANKS):
        part = {name: w for i, (name, w) in enumerate(WEIGHTS.items()) if i % RANKS == rank}
        save_file(part, folder / f"model-{rank}.safetensors")
    return folder


# ---------------------------------------------------------------------- plan


def test_plan_tells_memory_and_times_of_both_ways(checkpoint: Path) -> None:
    found = json_of("plan", checkpoint, "--world-size", "4")
    assert found["tensors"] == len(WEIGHTS)
    assert found["bytes"] >= sum(w.nbytes for w in WEIGHTS.values())
    for method in ("broadcast", "p2p"):
        assert found[method]["seconds"] > 0
        assert found[method]["bound_by"] in found[method]["waiting_for"]
    text = run("plan", checkpoint, "--world-size", "4").stdout
    assert "broadcast" in text
    assert "p2p" in text


def test_plan_believes_the_description(checkpoint: Path) -> None:
    slow, fast = (
        json_of("plan", checkpoint, "--world-size", "4", "--per-tensor", cost)
        for cost in ("0.1", "0")
    )
    waited = slow["broadcast"]["seconds"] - fast["broadcast"]["seconds"]
    assert waited == pytest.approx(0.1 * len(WEIGHTS), rel=0.01)


def test_plan_counts_nodes(checkpoint: Path) -> None:
    found = json_of("plan", checkpoint, "--world-size", "20", "--gpus-per-node", "8")
    assert found["cluster"]["nodes"] == 3


def test_plan_of_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    error = json_of("plan", tmp_path, "--world-size", "2", code=1)["error"]
    assert error["code"] == "failed"
    assert str(tmp_path / "model.safetensors") in error["message"]


# ---------------------------------------------------------------------- a running service


@pytest.fixture(scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder with the sockets of two ranks."""
    folder = tmp_path_factory.mktemp("s")
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    serve = ["-m", "checkpoint_engine", "--uds", str(folder / "{rank}.sock")]
    with running([*torchrun, *serve], folder):
        for rank in range(RANKS):
            path = str(folder / f"{rank}.sock")
            wait_until_ready("http://server/v1/healthz", timeout=50, uds=path)
        yield folder


@pytest.fixture
def server(sockets: Path) -> list[str]:
    return ["--server", str(sockets / "{rank}.sock")]


@pytest.fixture
def registered(server: list[str], checkpoint: Path) -> Iterator[str]:
    json_of("register", "step-1", checkpoint, *server)
    yield "step-1"
    run("unregister", "step-1", *server)


def test_a_checkpoint_on_its_way_through_all_commands(
    server: list[str], checkpoint: Path, registered: str, tmp_path: Path
) -> None:
    engine = Engine()
    with listening(engine) as url:
        base = url.removesuffix("/collective_rpc")
        found = json_of("update", registered, *server, "--engine", base, "--timeout", "40")
    assert found["ranks"] == [0, 1]
    assert len(engine.weights) == RANKS
    for weights in engine.weights:
        assert weights.keys() == WEIGHTS.keys()
        assert all(torch.equal(weights[name], WEIGHTS[name]) for name in WEIGHTS)
    output = tmp_path / "metas.json"
    found = json_of("metas", *server, "--output", output)
    assert found.keys() == {"0", "1"}
    assert json.loads(output.read_text()) == found
    assert "rank 1: 4 tensors" in run("metas", *server).stdout


def test_metas_of_a_checkpoint_that_no_update_has_gathered(
    server: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    json_of("register", "step-3", checkpoint, *server)
    output = tmp_path / "metas.json"
    found = json_of("metas", "step-3", *server, "--output", output)
    assert run("unregister", "step-3", *server).exit_code == 0
    owned = [sum(len(b["metas"]) for b in of["memory_buffer_metas_list"]) for of in found.values()]
    assert sum(owned) == len(WEIGHTS)
    assert json.loads(output.read_text()) == found


def test_no_file_of_metas_is_written_without_any(server: list[str], tmp_path: Path) -> None:
    nothing, output = tmp_path / "nothing.json", tmp_path / "metas.json"
    nothing.write_text("{}")
    assert json_of("metas", *server, "--load", nothing) == {}
    error = json_of("metas", *server, "--output", output, code=1)["error"]
    assert "name a checkpoint" in error["message"]
    assert not output.exists()
    error = json_of("metas", "step-9", *server, "--output", output, code=1)["error"]
    assert "step-9" in error["message"] or "name a checkpoint" in error["message"]
    both = json_of("metas", "step-3", *server, "--load", nothing, code=1)["error"]
    assert "either NAME or --load" in both["message"]


def test_files_are_shared_among_the_ranks(server: list[str], checkpoint: Path) -> None:
    found = json_of("register", "step-2", checkpoint, *server)
    assert [len(files) for files in found["files"].values()] == [1, 1]
    assert run("unregister", "step-2", *server).exit_code == 0


@pytest.mark.usefixtures("registered")
def test_a_failure_is_the_servers_text(server: list[str], checkpoint: Path) -> None:
    error = json_of("register", "step-1", checkpoint, *server, code=1)["error"]
    assert "registered already" in error["message"]
    plain = run("register", "step-1", checkpoint, *server)
    assert plain.exit_code == 1
    assert "registered already" in plain.stderr


def test_an_engine_that_is_not_up_fails_the_update(server: list[str], registered: str) -> None:
    engine = ["--engine", "http://127.0.0.1:9", "--timeout", "20"]
    error = json_of("update", registered, *server, *engine, code=1)["error"]
    assert "127.0.0.1:9" in error["message"]


def test_more_engine_workers_than_ranks(server: list[str], registered: str) -> None:
    engine = ["--engine", "http://127.0.0.1:9", "--inference-parallel-size", "8"]
    error = json_of("update", registered, *server, *engine, code=1)["error"]
    assert "more ranks than 2" in error["message"]


def test_status(server: list[str]) -> None:
    found = json_of("status", *server)
    assert [(one["up"], one["rank"]) for one in found["servers"]] == [(True, 0), (True, 1)]
    assert "rank 1 of 2, cpu" in run("status", *server).stdout


def test_status_of_a_server_that_is_down(sockets: Path, tmp_path: Path) -> None:
    places = ["--server", str(sockets / "0.sock"), "--server", str(tmp_path / "none.sock")]
    result = run("status", *places, "--json")
    assert result.exit_code == 3
    assert [one["up"] for one in json.loads(result.stdout)["servers"]] == [True, False]


def test_no_server_is_no_answer(tmp_path: Path) -> None:
    error = json_of("metas", "--server", tmp_path / "none.sock", code=3)["error"]
    assert error["code"] == "unreachable"
    assert "is the server up" in error["hint"]


# ---------------------------------------------------------------------- small things


def test_sockets_of_all_ranks_are_found_in_order(tmp_path: Path) -> None:
    for rank in range(12):
        (tmp_path / f"{rank}.sock").touch()
    found = find_servers([str(tmp_path / "{rank}.sock"), "http://host:80"], None)
    expected = [str(tmp_path / f"{rank}.sock") for rank in range(12)]
    assert [server.place for server in found] == [*expected, "http://host:80"]
    with pytest.raises(ValueError, match="no socket matches"):
        find_servers([str(tmp_path / "none-{rank}.sock")], None)


def test_ranks_as_a_list() -> None:
    assert parse_ranks("0, 2,4-6") == [0, 2, 4, 5, 6]
    assert parse_ranks("") == []
    with pytest.raises(ValueError, match="0,1,4-7"):
        parse_ranks("all")


@pytest.mark.parametrize("arguments", [["update"], ["plan", "/", "--world-size", "0"], ["dance"]])
def test_wrong_usage(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from checkpoint_engine.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=50,
    )


def test_completion_knows_the_commands_and_does_not_import_torch() -> None:
    words = {"COMP_WORDS": "checkpoint-engine ", "COMP_CWORD": "1"}
    found = program(_CHECKPOINT_ENGINE_COMPLETE="bash_complete", **words)
    assert {"plain,doctor", "plain,plan", "plain,update"} <= set(found.stdout.split())
    heavy = "import sys, checkpoint_engine.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", heavy]).returncode == 0


def test_uds_alone_means_serve(tmp_path: Path) -> None:
    """As in releases that had no commands."""
    blocked = tmp_path / "file"
    blocked.touch()
    found = program("--uds", str(blocked))
    assert found.returncode == 1
    assert "not a socket" in found.stderr
    assert "--uds PATH" in program("serve", "--help").stdout
