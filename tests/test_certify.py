"""``checkpoint-engine certify``: what it says of engines that are right, and of those that are not.

Engines of ``certified_engine.py`` run in this process; server ranks and their sockets are real.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from certified_engine import EXPERTS, HIDDEN, VOCABULARY
from checkpoint_engine.certify.comparison import Seen, compare, largest_distance
from checkpoint_engine.certify.engine import OrderError, Output, Start, find_adapter
from checkpoint_engine.certify.perturb import perturb_checkpoint
from checkpoint_engine.certify.server_engine import VllmServer
from checkpoint_engine.certify.worker import digest
from checkpoint_engine.cli import commands

UPDATES = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "one", 1)


def write_model(folder: Path, seed: int) -> Path:
    folder.mkdir()
    torch.manual_seed(seed)
    tensors = {f"experts.{i}": torch.randn(HIDDEN, HIDDEN) for i in range(EXPERTS)}
    tensors |= {"embedding": torch.randn(VOCABULARY, HIDDEN), "norm": 1 + torch.rand(HIDDEN)}
    save_file(tensors, folder / "model.safetensors")
    config = {"architectures": ["Tiny"], "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(autouse=True)
def on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_DEVICE", "cpu")
    monkeypatch.setenv("PS_REPLAY", "on")  # an engine in this process sets it


def certify(model: Path, engine: str, *arguments: str, code: int = 0) -> Any:
    """The certificate, or the error, of a run that ends with ``code``."""
    command = ["certify", str(model), f"--engine=certified_engine:{engine}", "--json", *arguments]
    result = CliRunner().invoke(commands, command)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def tensors_of(certificate: Any) -> set[str]:
    differences = [one["difference"] for one in certificate["updates"] if one["difference"]]
    return {name for one in differences for name in one["tensors"]}


def test_a_right_engine_is_certified(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    told = certify(model, "Right", f"--certificate={path}")
    assert told == json.loads(path.read_text())
    assert told["result"] == "right"
    assert told["reason"] == ""
    assert [one["weights"] for one in told["starts"]] == ["first", "other", "dummy"]
    assert [one["to"] for one in told["updates"]] == ["first", "other"] * 3
    loaded = [one["loaded"] for one in told["updates"]]
    assert loaded == [["recorded"]] * 2 + [["replayed"]] * 2 + [["plain"]] * 2
    assert told["updates"][1]["buckets"] == 1
    assert told["compared"] == {
        "tensors": 5, "prompts": 4, "tokens": 64, "log_probabilities": 137, "noise": 0.0
    }  # fmt: skip
    assert told["model"]["architecture"] == "Tiny"
    assert len(told["model"]["config"]) == 64
    assert told["engine"]["engine"] == "tiny"


@pytest.mark.parametrize(
    ("engine", "tensor"),
    [("LeavingOut", "norm"), ("SwappingExperts", "experts"), ("KeepingScales", "scale")],
)
def test_a_fault_in_the_reload_is_found(model: Path, engine: str, tensor: str) -> None:
    told = certify(model, engine, code=1)
    assert told["result"] == "differs"
    assert tensor in tensors_of(told)
    assert tensor in told["reason"]
    assert any(one["difference"]["shown"] for one in told["updates"])


def test_what_no_output_shows_is_named(model: Path) -> None:
    told = certify(model, "KeepingASpareScale", code=1)
    assert told["result"] == "differs"
    assert told["unseen"] == ["spare_scale"]
    assert "no output shows it" in told["reason"]


def test_what_two_fresh_starts_do_not_agree_on_is_no_difference(model: Path) -> None:
    told = certify(model, "LeavingMemory")
    assert told["result"] == "right"
    assert told["undetermined"] == ["spare_scale"]
    assert "two fresh starts do not agree on spare_scale" in told["reason"]


def test_what_two_fresh_starts_compute_differently_is_noise(model: Path) -> None:
    told = certify(model, "TuningItself")
    assert told["result"] == "right"
    assert told["compared"]["noise"] > 0
    assert len(told["starts"]) == 4
    assert any(one["difference"]["log_probability"] for one in told["updates"])


def test_an_engine_that_refuses_is_refused_with_its_words(model: Path) -> None:
    told = certify(model, "Refusing", code=1)
    assert told["result"] == "refused"
    assert len(told["updates"]) == 2  # tried once more
    assert "start the engine with the new weights" in told["reason"]


def test_an_engine_that_does_not_answer_after_an_update_is_refused(model: Path) -> None:
    told = certify(model, "SpoiltByUpdates", code=1)
    assert told["result"] == "refused"
    assert told["updates"][0]["error"].endswith("has no attribute 'norm'\n")
    assert "norm" in told["reason"]


def test_an_update_that_fails_once_is_told(model: Path) -> None:
    told = certify(model, "FailingOnce")
    assert told["result"] == "right"
    assert len(told["updates"]) == UPDATES + 1
    assert "an update failed, and the next one worked" in told["reason"]


def test_an_engine_that_does_not_start_is_refused(model: Path) -> None:
    told = certify(model, "NotStarting", code=1)
    assert told["result"] == "refused"
    assert told["reason"] == "ValueError: one: no such architecture"
    assert told["updates"] == []


def test_another_checkpoint_may_lack_a_configuration(model: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", 2)
    (other / "config.json").unlink()
    told = certify(model, "Right", f"--other-checkpoint={other}")
    assert told["result"] == "right"
    assert told["other_checkpoint"] == str(other)


def write_shards(folder: Path, seed: int, shards: dict[str, list[str]]) -> Path:
    """``shards``: file to the tensors that it holds."""
    file = write_model(folder, seed) / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / shard)
    places = {name: shard for shard, names in shards.items() for name in names}
    index = {"weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


ALL = [*(f"experts.{number}" for number in range(EXPERTS)), "embedding", "norm"]


def test_both_checkpoints_may_have_an_index(tmp_path: Path) -> None:
    one = write_shards(tmp_path / "one", 0, {"a.safetensors": ALL[:3], "b.safetensors": ALL[3:]})
    other = write_shards(tmp_path / "other", 1, {"model-1-of-1.safetensors": ALL})
    told = certify(one, "Right", f"--other-checkpoint={other}")
    assert told["result"] == "right"


def test_what_depends_on_the_order_of_the_files_is_no_difference(tmp_path: Path) -> None:
    """Updates send tensors in an order of their own."""
    shards = {"1.safetensors": ALL[2:], "2.safetensors": ALL[:2]}
    told = certify(write_shards(tmp_path / "one", 0, shards), "KeepingTheLast")
    assert told["result"] == "right"
    assert told["undetermined"] == ["last"]
    assert "two fresh starts do not agree on last" in told["reason"]


def test_the_table_of_an_engine_that_does_not_start(model: Path) -> None:
    command = ["certify", str(model), "--engine=certified_engine:NotStarting", "--tp=2"]
    lines = CliRunner().invoke(commands, command).stdout.splitlines()
    assert lines[1:] == [
        "no engine started, tensor parallel 2",
        "refused: ValueError: one: no such architecture",
    ]


def test_the_table_is_for_readers(model: Path) -> None:
    command = ["certify", str(model), "--engine=certified_engine:LeavingOut"]
    lines = CliRunner().invoke(commands, command).stdout.splitlines()
    assert lines[0] == f"Tiny: {model}"
    assert [line.split(",")[0] for line in lines[2:6]] == ["  start"] * 4  # the last, to be sure
    assert "update to first" in lines[6]
    assert "1 tensors differ, norm" in lines[6]
    assert lines[-1].startswith("differs: 6 of 6 updates")


@pytest.mark.timeout(120)
def test_a_server_is_certified_over_http(model: Path) -> None:
    program = f"{sys.executable} {Path(__file__).with_name('certified_server.py')}"
    arguments = f"--engine-args={program} {{model}} {{load_format}} {{port}}"
    here, server = certify(model, "Right"), certify(model, "Right", "--engine=server", arguments)
    assert server["result"] == "right"
    assert server["engine"]["version"] == "1"
    assert server["compared"] == here["compared"]
    assert [one["loaded"] for one in server["updates"]] == [
        one["loaded"] for one in here["updates"]
    ]


# Wrong usage


def refusal(model: Path, *arguments: str) -> str:
    result = CliRunner().invoke(commands, ["certify", str(model), "--json", *arguments])
    assert result.exit_code == 2, result.output
    error = json.loads(result.stdout)["error"]
    assert error["code"] == "usage"
    return str(error["message"])


def test_equal_checkpoints_show_nothing(model: Path) -> None:
    arguments = ["--engine=certified_engine:Right", f"--other-checkpoint={model}"]
    assert "same tokens and log probabilities" in refusal(model, *arguments)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(tmp_path, "--engine=certified_engine:Right")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "holds no *.safetensors" in refusal(tmp_path, "--engine=certified_engine:Right")


def test_weights_that_are_damaged(model: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not tensors at all")
    arguments = ["--engine=certified_engine:Right", f"--other-checkpoint={tmp_path}"]
    assert "model.safetensors" in refusal(model, *arguments)


def test_a_model_that_is_no_folder(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["sglang", "no.such.module:Engine", "certified_engine:Wrong"])
def test_an_adapter_that_is_not_there(model: Path, name: str) -> None:
    assert f"no adapter {name!r}" in refusal(model, f"--engine={name}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("serve {model}", "lacks {load_format}, {port}"),
        ("serve {model} {load_format} {port} {gpu}", "{gpu}|KeyError"),
        ("/no/such/program {model} {load_format} {port}", "cannot be started"),
    ],
)
def test_a_command_that_starts_no_server(model: Path, arguments: str, said: str) -> None:
    with pytest.raises(OrderError) as raised:
        VllmServer(Start(model, False, 1, arguments, 10))
    assert any(part in str(raised.value) for part in said.split("|"))


def test_a_server_that_ends_says_why(model: Path) -> None:
    arguments = "sh -c 'echo no memory for {model} {load_format} {port}; exit 3'"
    with pytest.raises(RuntimeError, match=r"ended with 3:\nno memory for"):
        VllmServer(Start(model, False, 1, arguments, 10))


def test_an_adapter_in_a_file() -> None:
    path = Path(__file__).with_name("certified_engine.py")
    assert find_adapter(f"{path}:Right").__name__ == "Right"


# Parts


def test_perturbing_changes_every_value_of_a_real_number(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    tensors = {
        "weight": torch.randn(8, 4, dtype=torch.bfloat16),
        "zeros": torch.zeros(16, dtype=torch.float16),
        "packed": torch.arange(12, dtype=torch.int32).view(4, 3),
        "shape": torch.tensor([8, 4]),
        "small": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "scale": torch.tensor(0.5),
    }
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (model / "config.json").write_text("{}")
    (model / "pytorch_model.bin").write_text("the same weights once more")
    other = load_file(perturb_checkpoint(model, tmp_path / "other") / "model.safetensors")
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert other.keys() == tensors.keys()
    for name in ("weight", "zeros", "scale"):
        assert other[name].dtype == tensors[name].dtype
        assert (other[name] != tensors[name]).float().mean() > 0.8, name
    assert torch.allclose(other["weight"].float(), tensors["weight"].float(), rtol=0.25)
    assert torch.equal(other["packed"], tensors["packed"].roll(1, 0))
    assert torch.equal(other["small"].float(), tensors["small"].float().roll(1, 0))
    assert torch.equal(other["shape"], tensors["shape"])


def test_perturbing_keeps_to_the_index(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_file({"a": torch.ones(2)}, model / "1.safetensors")
    save_file({"a": torch.zeros(2)}, model / "left-out.safetensors")
    index = {"weight_map": {"a": "1.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    other = perturb_checkpoint(model, tmp_path / "other")
    assert not (other / "left-out.safetensors").exists()
    assert (other / "model.safetensors.index.json").exists()


SLOW_ENGINE = """
import time

class Slow:
    def __init__(self, start):
        print("starts", flush=True)
        time.sleep(60)
"""


@pytest.mark.timeout(90)
def test_a_run_that_is_terminated_leaves_no_checkpoint(model: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW_ENGINE)
    work = tmp_path / "work"
    work.mkdir()
    program = "from checkpoint_engine.cli import main; main()"
    options = ["certify", str(model), "--engine", f"{tmp_path / 'slow.py'}:Slow"]
    with subprocess.Popen(
        [sys.executable, "-c", program, *options],
        env={**os.environ, "TMPDIR": str(work)},
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stderr is not None
        assert any("starts" in line for line in run.stderr)
        assert len(list(work.glob("certify-*/other/*.safetensors"))) == 1
        run.terminate()
        assert run.wait(30) == 128 + signal.SIGTERM
    assert list(work.glob("certify-*")) == []


def test_a_digest_is_of_bytes_dtype_and_shape() -> None:
    ones = torch.ones(2, 3)
    assert digest(ones) == digest(torch.ones(3, 2).t())
    assert digest(ones) != digest(torch.ones(3, 2))
    assert digest(ones) != digest(ones.view(torch.int32))
    assert digest(torch.tensor(True)) != digest(torch.tensor(False))
    assert digest(torch.ones(2, dtype=torch.complex64)) != digest(torch.ones(2))
    assert digest(torch.empty(2, device="meta")) == "torch.float32 (2,) has no memory"


def seen(tokens: list[int], told: list[float], noise: float = 0.0, **digests: str) -> Seen:
    return Seen([digests], [Output(tokens, told)], noise)


def test_log_probabilities_count_up_to_the_first_other_token() -> None:
    one, other = (
        Output([5, 6, 7], [-1.0, -2.0, -3.0, -4.0]),
        Output([5, 8, 7], [-1.0, -2.0, -3.5, 0]),
    )
    assert largest_distance([one], [other]) == 0.5  # -1.0 is the prompt's
    assert largest_distance([one], [Output([5, 6, 7], [])]) == float("inf")
    nan = float("nan")
    assert largest_distance([one], [Output([5, 6, 7], [nan] * 4)]) == float("inf")


def test_noise_of_the_engine_is_no_difference() -> None:
    fresh = seen([1], [-1.0], noise=0.1)
    assert not compare(seen([1], [-1.15]), fresh).any
    assert compare(seen([1], [-1.3]), fresh).any
    assert not compare(seen([2], [-1.1]), fresh).any  # a near tie
    assert compare(seen([2], [-1.0]), seen([1], [-1.0])).any


def test_tensors_of_one_side_alone_differ() -> None:
    fresh = Seen([{"a": "1", "b": "2"}, {"a": "1"}], [])
    updated = Seen([{"a": "1", "c": "2"}, {"a": "3"}], [])
    difference = compare(updated, fresh, frozenset({"a (worker 1)"}))
    assert difference.tensors == ["b (worker 0)", "c (worker 0)"]
    assert difference.undetermined == ["a (worker 1)"]
    assert not difference.shown
