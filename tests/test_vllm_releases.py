"""Both halves of the vLLM plug-in with some of each release's own files, read out of its wheel: see
``vllm_release_programs.py``."""

from __future__ import annotations

import re
from typing import Any

import pytest

from packages import some_files
from torchrun import torchrun

pytestmark = pytest.mark.timeout(180)

RELEASES = ["0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0"]
TRANSFER = "vllm/distributed/weight_transfer"
FILES = [f"{TRANSFER}/{name}.py" for name in ("__init__", "base", "clients", "factory")]
FILES += ["vllm/config/weight_transfer.py", "vllm/v1/worker/gpu_worker.py"]
FILES += ["vllm/model_executor/layers/quantization/online/lm_head.py"]  # since 0.33

FAILING = ["fails", "nobody", "source fails", "all sources fail", "unnamed"]


@pytest.fixture(scope="module", params=RELEASES)
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What both ranks saw with one release."""
    folder = tmp_path_factory.mktemp("vllm")
    files = some_files("vllm", request.param, FILES, folder / "files")
    options = {"script": "vllm_release_programs.py", "folder": str(files)}
    env = {"PS_DEVICE": "cpu"}
    ranks = torchrun(folder, 2, "all_cases", 60, env, release=request.param, **options)
    return [rank | {"release": request.param} for rank in ranks]


def test_every_update_arrives_or_is_an_error_on_every_rank(results: list[dict[str, Any]]) -> None:
    for number, result in enumerate(results):
        updates = result["updates"]
        assert updates["rank"] == number
        for name in ("first", "works again", "split", "last"):
            assert updates[name] == ["", True]
        failures = {name: updates[name][0] for name in FAILING}
        for failure in failures.values():
            assert failure.startswith("UpdateError: update failed on rank ")
        assert "a planted fault at third.weight" in failures["fails"]
        assert "1 of 5 tensors that the source's metadata names" in failures["nobody"]
        assert "such as 'second.weight'" in failures["nobody"]
        assert updates["nobody"][1]  # no byte of it was sent
        assert re.search("on rank 1|which rank 1 was to send", failures["source fails"])
        assert ("caused by IndexError" in failures["source fails"]) == (number == 1)
        assert "caused by IndexError" in failures["all sources fail"]
        assert "the source yields 'sixth', which its metadata does" in failures["unnamed"]


def test_a_trainer_without_full_tensors_is_refused(results: list[dict[str, Any]]) -> None:
    for result in results:
        why = result["refused"]
        assert why[0].endswith("give source=")
        assert [one for one in why[1:] if "Local does not implement iter_full()" in one] == why[1:]
        assert len(why) == (2 if result["heads"] else 1)


def test_a_session_that_was_left_open_costs_a_drafter_no_head(
    results: list[dict[str, Any]],
) -> None:
    for result in results:
        assert all(result["heads"].values()), result["heads"]
        assert bool(result["heads"]) == (result["release"] >= "0.33")
