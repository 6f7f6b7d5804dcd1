"""The plug-ins' parts that need none of the programs they are for."""

from __future__ import annotations

import subprocess
import sys
import types
from contextlib import nullcontext
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from checkpoint_engine.integrations import vllm as plugin
from checkpoint_engine.loading import vllm_ranks

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def test_entry_points_lead_to_what_is_there() -> None:
    text = PYPROJECT.read_text()
    assert '[project.entry-points."vllm.general_plugins"]' in text
    value = "checkpoint_engine.integrations.vllm:register"
    assert f'checkpoint_engine = "{value}"' in text
    assert EntryPoint("checkpoint_engine", value, "vllm.general_plugins").load() is plugin.register


@pytest.mark.timeout(120)
def test_nothing_of_a_program_is_imported_with_the_package() -> None:
    names = "checkpoint_engine.worker, checkpoint_engine.integrations.vllm"
    look = "sorted({'vllm', 'sglang', 'verl'} & set(sys.modules))"
    command = [sys.executable, "-c", f"import sys, {names}; print({look})"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[]\n"


def test_a_vllm_without_such_backends_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    plugin.register()


class Group:
    """One of two ranks; the other one has told ``theirs``."""

    def __init__(self, rank: int, theirs: list[str]) -> None:
        self.world_size, self.is_last_rank, self.cpu_group = 2, rank == 1, self
        self.theirs = theirs


@pytest.mark.parametrize(
    ("rank", "mine", "theirs", "raised"),
    [
        (0, "ours", [], None),
        (0, "", ["RuntimeError: theirs"], None),
        (0, "", [], None),
        (1, "ours", ["RuntimeError: theirs"], "^ours$"),
        (1, "", ["RuntimeError: theirs"], "^another worker of this engine failed: .* theirs$"),
        (1, "", [], None),
    ],
)
def test_only_the_last_rank_raises(
    monkeypatch: pytest.MonkeyPatch, rank: int, mine: str, theirs: list[str], raised: str | None
) -> None:
    def gather(told: list[object], ours: list[str], group: Group) -> None:
        told[rank], told[1 - rank] = ours, group.theirs

    monkeypatch.setattr(vllm_ranks.dist, "all_gather_object", gather)
    monkeypatch.setattr(vllm_ranks, "_groups", lambda: [Group(rank, theirs)])
    failure = RuntimeError(mine) if mine else None
    with nullcontext() if raised is None else pytest.raises(RuntimeError, match=raised):
        vllm_ranks.raise_on_last_rank(failure)


def test_an_engine_that_is_no_vllm_raises_on_every_rank() -> None:
    with pytest.raises(ValueError, match="ours"):
        vllm_ranks.raise_on_last_rank(ValueError("ours"))
    vllm_ranks.raise_on_last_rank(None)
