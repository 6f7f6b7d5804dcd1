"""The commands as a user types them; those for a service, on a real one of two ranks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from checkpoint_engine.cli import commands, main, servers
from checkpoint_engine.cli.servers import RankService, ServiceError, ask, find_servers, refusal
from checkpoint_engine.cli.service import parse_ranks
from checkpoint_engine.client import wait_until_ready
from checkpoint_engine.service.app import UpdateRequest, _ask_engine
from engines import serve_http
from test_service import Engine, listening, running
from torchrun import free_port_pair

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


def test_plan_knows_peers_and_shards(checkpoint: Path) -> None:
    one = json_of("plan", checkpoint, "--world-size", "4")
    several = ("plan", checkpoint, "--world-size", "4", "--gpus-per-node", "2")
    all_of_it, a_half = (
        json_of(*several, "--tensor-parallel", parallel)["shard"] for parallel in ("1", "4")
    )
    assert (one["peers"]["bytes_into_a_host"], "shard" in one) == (0, False)
    assert 0 < a_half["bytes_into_a_host"] < all_of_it["bytes_into_a_host"] < one["bytes"]


def test_plan_counts_nodes(checkpoint: Path) -> None:
    found = json_of("plan", checkpoint, "--world-size", "20", "--gpus-per-node", "8")
    assert found["cluster"]["nodes"] == 3


@pytest.fixture
def indexed(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy with an index, one tensor left behind in another file, and a file of no index."""
    folder = tmp_path / "indexed"
    shutil.copytree(checkpoint, folder)
    weight_map = {name: f"model-{i % RANKS}.safetensors" for i, name in enumerate(WEIGHTS)}
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    first = folder / "model-0.safetensors"
    save_file(load_file(first) | {"layers.1.w": torch.zeros(3)}, first)
    save_file({"stray": torch.ones(9)}, folder / "consolidated.safetensors")
    return folder


def test_plan_follows_the_index(checkpoint: Path, indexed: Path) -> None:
    plain, found = (json_of("plan", path, "--world-size", "4") for path in (checkpoint, indexed))
    assert (found["tensors"], found["bytes"]) == (plain["tensors"], plain["bytes"])


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
    torchrun = ["torch.distributed.run", "--nproc-per-node", str(RANKS)]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(free_port_pair())]
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


def test_only_what_the_index_names_is_registered(server: list[str], indexed: Path) -> None:
    json_of("register", "step-2", indexed, *server)
    engine = Engine()
    with listening(engine) as url:
        base = url.removesuffix("/collective_rpc")
        json_of("update", "step-2", *server, "--engine", base, "--timeout", "40")
    assert run("unregister", "step-2", *server).exit_code == 0
    for weights in engine.weights:
        assert weights.keys() == WEIGHTS.keys()
        assert all(torch.equal(weights[name], WEIGHTS[name]) for name in WEIGHTS)


def test_a_folder_that_is_no_checkpoint_is_named(
    server: list[str], indexed: Path, tmp_path: Path
) -> None:
    (indexed / "model-1.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    for folder, says in {
        indexed: "model-1.safetensors, which does not exist",
        tmp_path / "empty": "holds no *.safetensors files",
        tmp_path / "none": "there is no such folder",
    }.items():
        error = json_of("register", "step-2", folder, *server, code=1)["error"]
        assert says in error["message"]
        assert str(folder) in error["message"]


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
    assert error["error"]["cause"] == "not_found"
    assert error["error"]["hint"].startswith("see that the path is the same on the server's")
    json_of("register", "step-4", checkpoint, *server)
    json_of("unregister", "step-4", *server)


@pytest.mark.parametrize("command", [["update", "--engine", "http://127.0.0.1:9"], ["unregister"]])
def test_a_name_that_no_rank_knows(server: list[str], registered: str, command: list[str]) -> None:
    error = json_of(*command, "step-9", *server, code=1)["error"]
    assert "no rank has registered 'step-9'; registered: step-1" in error["message"]
    assert len(json_of("metas", registered, *server)) == RANKS


def test_an_update_that_asks_nobody_is_wrong_usage(server: list[str], registered: str) -> None:
    error = json_of("update", registered, *server, code=2)["error"]
    assert "nobody is asked to receive" in error["message"]


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
        (["--timeout", "inf"], "inf is not in the range"),
        (["--timeout", "nan"], "no number"),
        (["--engine", "localhost:9"], "not a URL of one server, as http"),
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
    assert "[0] are missing" in error["hint"]
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
        update = ["update", "theirs", *server, "--engine", url.removesuffix("/collective_rpc")]
        error = json_of(*update, code=1)["error"]
        assert "no rank has registered 'theirs'" in error["message"]
        update += ["--ranks", "0-1", "--timeout", "1000000"]
        error = json_of(*update, code=1)["error"]  # it may be a slip of the pen: there are others
        assert "--no-gather" in error["message"]
        json_of(*update, "--no-gather")
    assert [weights.keys() for weights in engine.weights] == [WEIGHTS.keys()] * RANKS


@pytest.mark.parametrize("kind", ["sglang", "lmdeploy"])
def test_an_engine_of_another_kind_is_asked_with_its_key(
    server: list[str], registered: str, kind: str
) -> None:
    keys: list[Any] = []
    refusal = {"POST /update_weights_from_ipc": lambda _: (500, "no room")}
    with serve_http(refusal, lambda headers: keys.append(headers["x-key"])) as url:
        of_kind = ["--engine-kind", kind, "--engine-header", "x-key: 7", "--engine", url]
        error = json_of("update", registered, *server, *of_kind, code=1)["error"]
    assert "no room" in error["message"]
    assert keys == ["7"]


def test_a_vllm_with_the_plug_in_is_told_the_checkpoints_name() -> None:
    """So that its /weight_info does not go on to tell of the checkpoint before."""
    told: list[Any] = []
    backend = {"vllm_config": {"weight_transfer_config": {"backend": "checkpoint_engine"}}}
    steps = ["start_weight_update", "update_weights", "reset_encoder_cache"]
    routes: dict[str, Any] = {f"POST /{step}": lambda _: (200, None) for step in steps}
    routes["GET /server_info"] = lambda _: (200, backend)
    routes["POST /finish_weight_update"] = lambda body: (200, told.append(body))
    with serve_http(routes) as url:
        request = UpdateRequest(update_url=url, engine_kind="vllm")
        _ask_engine(request, "step-1", [("GPU-0", "ipc:///nobody")])
    assert told == [{"weight_version": "step-1"}]


@pytest.mark.parametrize("wrong", [["--engine-header", "x-key:7"], ["--engine-header", "sesame"]])
def test_a_header_needs_a_kind_and_a_name(server: list[str], wrong: list[str]) -> None:
    outcome = run("update", "any", *server, "--engine", "http://localhost:1", *wrong)
    assert outcome.exit_code == 2
    assert "sesame" not in outcome.output


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


def test_a_failure_does_not_wait_long_for_the_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_FAREWELL", 0.1)
    go_on, answered = threading.Event(), threading.Event()

    def answer(_: Any) -> tuple[int, Any]:
        go_on.wait(30)
        answered.set()
        return 200, None

    routes = [{"GET /x": answer}, {"GET /x": lambda _: (409, "an update is running")}]
    with serve_http(routes[0]) as slow, serve_http(routes[1]) as busy:
        try:
            with pytest.raises(ServiceError, match="an update is running"):
                ask([RankService(slow), RankService(busy)], "GET", "/x", 20, collective=True)
            assert not answered.is_set()
        finally:
            go_on.set()


def test_the_first_failure_counts_also_if_others_follow() -> None:
    first = threading.Event()

    def late(_: Any) -> tuple[int, Any]:
        first.wait(30)
        return 500, "because of the other"

    def early(_: Any) -> tuple[int, Any]:
        first.set()
        return 500, "no room"

    with serve_http({"GET /x": late}) as one, serve_http({"GET /x": early}) as other:
        with pytest.raises(ServiceError, match=r"no room|because of") as failure:
            ask([RankService(one), RankService(other)], "GET", "/x", 20, collective=True)
        assert failure.value.status == 500


@contextlib.contextmanager
def ranks(
    *names: str, refusing: int | None = None, of: int = 2, **known: Any
) -> Iterator[list[str]]:
    """Servers that say that they are ranks and hold checkpoints; one refuses to free ``c``."""
    held = [{"name": name} for name in names]
    with contextlib.ExitStack() as stack:
        places = []
        for rank in range(of):
            state = {"rank": rank, "world_size": of, "checkpoints": held, "jobs": []}
            state |= {"pinned_bytes": 0, **known}
            freed = (409, "an update is running") if rank == refusing else (200, None)
            routes: dict[str, Any] = {
                "GET /v1/status": lambda _, state=state: (200, state),
                "DELETE /v1/checkpoints/c": lambda _, freed=freed: freed,
                "POST /v1/checkpoints/c/update": lambda _: (200, None),
            }
            places += ["--server", stack.enter_context(serve_http(routes))]
        yield places


def test_an_unregister_that_one_rank_refuses_says_who_has_done_it() -> None:
    """They are of a release whose status has less."""
    with ranks("c", refusing=0) as places:
        error = json_of("unregister", "c", *places, code=4)["error"]
    assert "an update is running" in error["message"]
    assert error["hint"].endswith("ranks [0] failed, the others have done it")
    with ranks("c") as places:
        json_of("unregister", "c", *places)


def test_status_says_how_far_a_call_is_and_what_is_served() -> None:
    served = {"checkpoint": "step-1", "version": "a51c", "engine": "engine 0", "since": 0.0}
    about = {"call": "update", "checkpoint": "step-2", "phase": "reload"}
    progress = {**about, "done_bytes": 2_000_000, "total_bytes": 8_000_000}
    known: dict[str, Any] = {"device": "cpu", "pinned_bytes": 8_000_000}
    with ranks("step-1", of=1, served=served, progress=progress, **known) as places:
        (line,) = run("status", *places).stdout.splitlines()
        assert line.endswith(
            "1 checkpoint, 8.0 MB, serves step-1 version a51c, idle (reload 25% of 8.0 MB)"
        )
    with ranks("step-1", of=1, served=None, progress=None, **known) as places:
        assert run("status", *places).stdout.endswith("1 checkpoint, 8.0 MB, idle\n")


def test_metas_that_were_loaded_are_read_where_nothing_is_registered() -> None:
    """These servers have no route to gather."""
    engines = ["--engine", "http://127.0.0.1:9", "--engine", "http://127.0.0.1:10"]
    with ranks(metas_loaded=True) as servers:
        places = [*servers, *engines]
        assert json_of("update", "c", *places, "--ranks", "0-1")["ranks"] == [0, 1]
        error = json_of("update", "c", *places, code=1)["error"]
        assert "no rank has registered 'c'; registered: nothing" in error["message"]
        error = json_of("update", "c", *places, "--ranks", "0", "--gather", code=1)["error"]
        assert "no rank has registered 'c'" in error["message"]
    with ranks() as servers:
        error = json_of("update", "c", *servers, *engines, "--ranks", "0", code=1)["error"]
        assert "no-gather" not in error["message"]


@pytest.mark.parametrize(
    ("answer", "message", "hint"),
    [
        ('"no room"', "no room", ""),
        ("<html>", "<html>", ""),
        ("", "HTTP 500", ""),
        ("null", "None", ""),
        ('{"detail": "Not Found"}', "Not Found", ""),
        ('{"detail": [{"loc": ["body", "ranks"], "msg": "too long"}]}', "body.ranks: too long", ""),
        ('{"detail": [1]}', "[1]", ""),
        ('{"error": {"message": "no such job", "hint": "look"}}', "no such job", "look"),
        ('{"other": 1}', '{"other": 1}', ""),
    ],
)
def test_an_error_of_any_form_is_readable(answer: str, message: str, hint: str) -> None:
    failure = refusal("a.sock", 500, answer)
    assert (failure.message, failure.hint) == (f"a.sock: {message}", hint)


@pytest.mark.parametrize("answer", [None, [], "x", {}, {"rank": "0", "world_size": 1}])
def test_a_status_that_is_none(answer: Any) -> None:
    with serve_http({"GET /v1/status": lambda _: (200, answer)}) as url:
        error = json_of("unregister", "c", "--server", url, code=1)["error"]
        assert "not that of a rank's server" in error["message"]
        (found,) = json_of("status", "--server", url, code=1)["servers"]
        assert found["up"]


def test_a_token_is_sent_and_never_shown(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a-token-that-is-long\n")
    seen = []
    with serve_http({}, on_request=lambda headers: seen.append(headers["authorization"])) as url:
        run("status", "--server", url, "--token-file", token)
        run("status", "--server", url, "--token", "another-that-is-long\r\n")
        strange = run("status", "--server", url, "--token", "a-secret\nthat-is-long", "--json")
    assert seen == ["Bearer a-token-that-is-long", "Bearer another-that-is-long"]
    assert strange.exit_code == 1
    assert "a-secret" not in strange.output
    for place in ("http://me:a-secret@localhost:9", "http://me:a-secret@localhost:bad"):
        wrong = run("status", "--server", place)
        assert wrong.exit_code == 2
        assert "a-secret" not in wrong.output


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
    for rank in ("3", "11"):
        (tmp_path / rank).mkdir()
        (tmp_path / rank / f"{rank}.s").touch()
        (tmp_path / rank / "2.s").touch()
    found = find_servers([str(tmp_path / "{rank}" / "{rank}.s")], None)
    assert [server.place[-5:] for server in found] == ["3/3.s", "11/11.s"[-5:]]
    with pytest.raises(ServiceError, match="no socket is there") as gone:
        find_servers([str(tmp_path / "none-{rank}.sock")], None)
    assert gone.value.status is None


@pytest.mark.parametrize(
    "place",
    [
        "localhost:9",
        "http://localhost:bad",
        "http://localhost:99999",
        "http://a:1,http://b:1",
        "http://h:{rank}",
    ],
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
        ["serve", "--uds", ""],
        ["serve", "--uds="],
        ["status", "--server", ""],
        ["update", "c", "--server", "x", "--engine="],
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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--help"], "--uds PATH"),
        (["--port", "0"], "--no-token"),
        (["--uds", "x"], "RANK 1 of WORLD_SIZE 1"),
    ],
)
def test_wrong_options_of_serve(
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", "1" if "x" in arguments else "0")
    with pytest.raises(SystemExit):
        main(arguments)
    assert says in "".join(capsys.readouterr())
