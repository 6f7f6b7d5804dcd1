"""SGLang's own files, from PyPI, with the plug-in: see ``sglang_programs.py``."""

from __future__ import annotations

import os
from typing import Any

import pytest

from packages import installed, our_entry_points, unpacked
from torchrun import torchrun

RELEASE = os.environ.get("SGLANG_RELEASE", "0.5.23")
NEEDS = ["dill", "hf-xet", "httpcore2", "httpx2", "huggingface_hub", "msgspec", "orjson", "pillow"]
NEEDS += ["psutil", "pybase64", "regex", "sentencepiece", "tokenizers==0.23.2", "tqdm"]
NEEDS += ["transformers==5.19.0"]
SECONDS = 170
WHOLE = {"embed": True, "layer": True, "mtp": True}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks of an engine saw."""
    folder = tmp_path_factory.mktemp("sglang")
    theirs = unpacked(f"sglang=={RELEASE}", folder)
    parts = [our_entry_points(folder / "ours"), theirs, installed(NEEDS, folder / "needs")]
    options = {"script": "sglang_programs.py", "folders": list(map(str, parts))}
    env = {"PS_DEVICE": "cpu", "SGLANG_PLUGINS": "checkpoint_engine"}
    return torchrun(folder, 2, "all_cases", SECONDS, env, **options)


pytestmark = pytest.mark.timeout(400)


def test_target_and_draft_are_updated_by_one_update(results: list[dict[str, Any]]) -> None:
    for result in results:
        result = result["together"]
        assert result["version"] == RELEASE
        assert result["first"] == ["", WHOLE, ["step-1"]]
        assert result["repaired"] == ["", WHOLE, ["step-1", "step-4"]]
        assert result["later"] == [["", "", ""], WHOLE]
        assert result["flushed"] == 2  # what failed is called no version, and flushes nothing


def test_a_post_hook_that_fails_is_an_error_on_all_ranks(results: list[dict[str, Any]]) -> None:
    for result in results:
        error, versions = result["together"]["hook"]
        assert "update failed on rank 0" in error
        assert "ValueError: a planted fault" in error
        assert versions == ["step-1"]


def test_a_rank_without_an_address_ends_it_for_all(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert "this worker is CPU-" in result["together"]["lost"]
        assert "but the parameter server serves" in result["together"]["lost"]


def test_a_draft_with_a_checkpoint_of_its_own_keeps_it(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["apart"] == {"error": "", "holds": WHOLE | {"mtp": False}}


def test_another_interface_is_refused_with_the_reason(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["refused"].startswith(f"SGLang {RELEASE} has no ['_select_runners']")
        assert "0.5.21 to 0.5.23" in result["refused"]
