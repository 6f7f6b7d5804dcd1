"""The commands as a user types them; those for a service, on a real one of two ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import click
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from checkpoint_engine.cli import commands
from checkpoint_engine.cli.servers import Server, ServiceError, ask_all, find_servers
from checkpoint_engine.cli.service import parse_ranks
from checkpoint_engine.client import wait_until_ready
from engines import serve_http
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
    assert "no rank has registered 'step-9'" in error["message"]
    output.write_text("nothing of that kind")
    error = json_of("metas", *server, "--load", output, code=1)["error"]
    assert str(output) in error["message"]


def test_files_are_shared_among_the_ranks(server: list[str], checkpoint: Path) -> None:
    found = json_of("register", "step-2", checkpoint, *server)
    assert [len(files) for files in found["files"].values()] == [1, 1]
    assert run("unregister", "step-2", *server).exit_code == 0


@pytest.mark.usefixtures("registered")
def test_a_failure_is_the_servers_text(server: list[str], checkpoint: Path) -> None:
    error = json_of("register", "step-1", checkpoint, *server, code=1)["error"]
    assert "registered already" in error["message"]
    assert "unregister step-1" in error["hint"]
    plain = run("register", "step-1", checkpoint, *server)
    assert plain.exit_code == 1
    assert "registered already" in plain.stderr


def test_an_engine_that_is_not_up_fails_the_update(server: list[str], registered: str) -> None:
    engine = ["--engine", "http://127.0.0.1:9", "--timeout", "20"]
    error = json_of("update", registered, *server, *engine, code=1)["error"]
    assert "127.0.0.1:9" in error["message"]


def test_more_engine_workers_than_ranks(server: list[str], registered: str) -> None:
    engine = ["--engine", "http://127.0.0.1:9", "--inference-parallel-size", "8"]
    error = json_of("update", registered, *server, *engine, code=2)["error"]
    assert "more ranks than 2" in error["message"]


def test_a_checkpoint_that_one_rank_cannot_register_is_on_none(
    server: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    good = sorted(checkpoint.iterdir())[0]
    error = json_of("register", "step-4", good, tmp_path / "none.safetensors", *server, code=1)
    assert "none.safetensors" in error["error"]["message"]
    assert error["error"]["hint"] == ""
    json_of("register", "step-4", checkpoint, *server)
    json_of("unregister", "step-4", *server)


@pytest.mark.parametrize("command", ["update", "unregister"])
def test_a_name_that_no_rank_knows(server: list[str], registered: str, command: str) -> None:
    error = json_of(command, "step-9", *server, code=1)["error"]
    assert "no rank has registered 'step-9'; registered: step-1" in error["message"]
    assert len(json_of("metas", registered, *server)) == RANKS


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--ranks", "1"], r"ranks \[0, 1\] serve one engine"),
        (["--ranks", "1", "--inference-parallel-size", "1"], r"ranks \[1\] have none"),
        (["--inference-parallel-size", "1"], r"ranks \[1\] have none"),
        (["--ranks", "2"], "the last one is 1"),
        (["--ranks", "1-0"], "a list as"),
        (["--ranks", ","], "a list as"),
        (["--inference-parallel-size", "-1"], "-1 is not in the range"),
        (["--timeout", "-1"], "-1.0 is not in the range"),
        (["--engine", "localhost:9"], "no URL as http"),
    ],
)
def test_an_update_that_would_wait_for_an_engine_is_refused_at_once(
    server: list[str], registered: str, options: list[str], says: str
) -> None:
    engine = ["--engine", "http://127.0.0.1:9"]
    error = json_of("update", registered, *server, *engine, *options, code=2)["error"]
    assert error["code"] == "usage"
    assert re.search(says, error["message"])


def test_a_command_for_all_ranks_names_the_one_that_is_missing(
    sockets: Path, checkpoint: Path
) -> None:
    one = ["--server", sockets / "1.sock"]
    error = json_of("register", "step-5", checkpoint, *one, code=3)["error"]
    assert "these are ranks [1] of 2" in error["message"]
    assert "missing: [0]" in error["hint"]
    found = json_of("status", *one, code=3)
    assert found["missing_ranks"] == [0]
    twice = ["--server", sockets / "1.sock", *one]
    assert "ranks [1, 1] of 2" in json_of("unregister", "x", *twice, code=3)["error"]["message"]


def test_servers_may_be_named_in_any_order(
    sockets: Path, checkpoint: Path, registered: str
) -> None:
    places = ["--server", sockets / "1.sock", "--server", sockets / "0.sock"]
    found = json_of("metas", registered, *places)
    assert [len(owned["memory_buffer_metas_list"][0]["metas"]) for owned in found.values()] == [
        4,
        4,
    ]


def test_another_worlds_metas_are_not_gathered_away(
    server: list[str], registered: str, tmp_path: Path
) -> None:
    """Here they are this world's own, of a checkpoint that has another name."""
    output = tmp_path / "metas.json"
    json_of("metas", registered, *server, "--output", output)
    json_of("metas", *server, "--load", output)
    engine = Engine()
    with listening(engine) as url:
        base = url.removesuffix("/collective_rpc")
        error = json_of("update", "theirs", *server, "--engine", base, code=1)["error"]
        assert "no rank has registered 'theirs'" in error["message"]
        ranks = ["--ranks", "0-1", "--timeout", "40"]
        json_of("update", "theirs", *server, "--engine", base, *ranks)
    assert [weights.keys() for weights in engine.weights] == [WEIGHTS.keys()] * RANKS


def test_what_runs_is_what_status_shows(server: list[str], registered: str) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def answer(_: Any) -> tuple[int, Any]:
        asked.set()
        go_on.wait(30)
        return 500, "no"

    with serve_http({"POST /collective_rpc": answer}) as url:
        update = threading.Thread(target=run, args=("update", registered, *server, "--engine", url))
        update.start()
        try:
            assert asked.wait(30)
            refused = json_of("unregister", registered, *server, code=4)["error"]
            assert refused["code"] == "busy"
            assert "checkpoint-engine status" in refused["hint"]
            assert run("status", *server).stdout.count(f"update {registered} running") == RANKS
        finally:
            go_on.set()
            update.join(60)


def test_a_server_that_wants_its_token_is_not_down(tmp_path: Path) -> None:
    refusal = {"error": {"code": "unauthorized", "message": "it wants its token", "hint": ""}}
    with serve_http({"GET /v1/status": lambda _: (401, refusal)}) as url:
        found = json_of("status", "--server", url, code=1)
        error = json_of("metas", "x", "--server", url, code=1)["error"]
    assert found["servers"][0]["up"]
    assert "it wants its token" in error["message"]
    assert "PS_HTTP_TOKEN, --token-file" in error["hint"]


def test_another_kind_of_server_is_named_so() -> None:
    with serve_http({"GET /v1/status": lambda _: (404, {"detail": "Not Found"})}) as url:
        error = json_of("register", "x", "/tmp", "--server", url, code=1)["error"]
    assert error["message"].endswith(": Not Found")
    assert "is this a rank's server" in error["hint"]


def test_a_failure_does_not_wait_for_the_other_ranks() -> None:
    go_on = threading.Event()
    routes = [
        {"GET /x": lambda _: (go_on.wait(30), (200, None))[1]},
        {"GET /x": lambda _: (409, "an update is running")},
    ]
    with serve_http(routes[0]) as slow, serve_http(routes[1]) as busy:
        try:
            with pytest.raises(ServiceError, match="an update is running"):
                ask_all([Server(slow), Server(busy)], "GET", "/x", 20)
            assert not go_on.is_set()
        finally:
            go_on.set()


def test_the_token_of_a_file_is_sent(tmp_path: Path) -> None:
    given = tmp_path / "token"
    given.write_text("a-token-that-is-long\n")
    (server,) = find_servers(["http://host:80"], "a-token-that-is-long")
    sent = []
    with mock.patch("checkpoint_engine.cli.service.find_servers") as find:
        find.side_effect = lambda _, token: sent.append(token) or [server]
        run("status", "--server", "http://host.invalid", "--token-file", given)
    assert sent == ["a-token-that-is-long"]


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
    (tmp_path / "0.sock").unlink()
    (tmp_path / "x.sock").touch()
    found = find_servers([str(tmp_path / "{rank}.sock")], None)
    assert [server.place for server in found] == expected[1:]
    with pytest.raises(ServiceError, match="no socket is there") as gone:
        find_servers([str(tmp_path / "none-{rank}.sock")], None)
    assert gone.value.status is None


@pytest.mark.parametrize(
    "place", ["localhost:9", "http://localhost:bad", "http://a:1,http://b:1", "http://h:{rank}"]
)
def test_an_address_that_makes_no_sense_is_wrong_usage(place: str) -> None:
    error = json_of("status", "--server", place, code=2)["error"]
    assert place.partition(":")[0] in error["message"]


def test_ranks_as_a_list() -> None:
    assert parse_ranks("0, 2,4-6") == [0, 2, 4, 5, 6]
    assert parse_ranks("") == []
    with pytest.raises(click.UsageError, match="0,1,4-7"):
        parse_ranks("all")


@pytest.mark.parametrize(
    "arguments",
    [
        ["update"],
        ["status"],
        ["plan", "/", "--world-size", "0"],
        ["plan", "/nope", "--world-size", "1"],
        ["plan", "/", "--world-size", "1", "--free-gb", "inf"],
        ["plan", "/", "--world-size", "1", "--bucket-gb", "nan"],
        ["plan", "/", "--world-size", "1", "--bucket-gb", "0"],
        ["metas", "step", "--load", __file__, "--server", "x"],
        ["register", "a/b", "/", "--server", "x"],
        ["doctor", "--bogus"],
        ["dance"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2
    error = json_of(*arguments, code=2)["error"]
    assert error["code"] == "usage"
    assert error["message"]


@pytest.mark.parametrize("rates", [["--per-tensor", "-1"], ["--nic", "nan"], ["--check", "0"]])
def test_a_cluster_that_cannot_be(checkpoint: Path, rates: list[str]) -> None:
    error = json_of("plan", checkpoint, "--world-size", "2", *rates, code=1)["error"]
    assert rates[0].removeprefix("--").replace("-", "_") in error["message"]


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
    assert "--no-token" in program("--port", "0").stderr
    assert "RANK 1 of WORLD_SIZE 1" in program("--uds", str(blocked), RANK="1").stderr
