"""The plug-ins' parts that need none of the programs they are for."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from checkpoint_engine.integrations import sglang
from checkpoint_engine.integrations import vllm as plugin
from checkpoint_engine.loading import vllm_ranks

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def test_entry_points_lead_to_what_is_there() -> None:
    text = PYPROJECT.read_text()
    assert '[project.entry-points."sglang.srt.plugins"]' in text
    value = "checkpoint_engine.integrations.sglang:register"
    assert f'checkpoint_engine = "{value}"' in text
    assert EntryPoint("checkpoint_engine", value, "sglang.srt.plugins").load() is sglang.register
    assert '[project.entry-points."vllm.general_plugins"]' in text
    value = "checkpoint_engine.integrations.vllm:register"
    assert f'checkpoint_engine = "{value}"' in text
    assert EntryPoint("checkpoint_engine", value, "vllm.general_plugins").load() is plugin.register


@pytest.mark.timeout(120)
def test_nothing_of_a_program_is_imported_with_the_package() -> None:
    names = "checkpoint_engine.worker, checkpoint_engine.integrations.vllm"
    names += ", checkpoint_engine.integrations.sglang"
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


EXTERNAL = types.SimpleNamespace(
    parallel_config=types.SimpleNamespace(distributed_executor_backend="external_launcher")
)


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes this one of two ranks; ``theirs``: what the other one tells, step by step."""

    def make(rank: int, *theirs: list[str]) -> None:
        steps = iter(theirs)

        def gather(told: list[object], ours: list[str], group: Group) -> None:
            told[rank], told[1 - rank] = ours, next(steps)

        monkeypatch.setattr(vllm_ranks.dist, "all_gather_object", gather)
        monkeypatch.setattr(vllm_ranks, "_groups", lambda: [Group(rank, [])])

    return make


@pytest.mark.parametrize("mine", ["ours", ""])
def test_where_each_process_answers_for_itself_every_rank_raises(
    two_ranks: Callable[..., None], mine: str
) -> None:
    two_ranks(0, ["KeyError: theirs"])
    raised = "^ours$" if mine else "^another worker of this engine failed: KeyError: theirs$"
    with pytest.raises(RuntimeError, match=raised):
        vllm_ranks.raise_on_last_rank(RuntimeError(mine) if mine else None, EXTERNAL)


def test_no_rank_receives_unless_all_can_begin(two_ranks: Callable[..., None]) -> None:
    done = []

    def reception() -> vllm_ranks.Reception:
        try:
            yield {}
            done.append("received")
            yield {"tensors": 7}
        finally:
            done.append("closed")

    two_ranks(0, ["KeyError: theirs"])
    assert vllm_ranks.in_step(reception(), None) == {}
    two_ranks(1, ["KeyError: theirs"])
    with pytest.raises(RuntimeError, match="KeyError: theirs"):
        vllm_ranks.in_step(reception(), None)
    assert done == ["closed"] * 2
    two_ranks(0, [], [])
    assert vllm_ranks.in_step(reception(), None) == {"tensors": 7}
    assert done[2:] == ["received", "closed"]


@pytest.mark.parametrize("names", [("tp", "pp"), ("tp", "pcp", "pp")])
def test_the_groups_are_those_of_one_executor(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    state = types.ModuleType("vllm.distributed.parallel_state")
    state.__dict__["model_parallel_is_initialized"] = lambda: True
    for name in (*names, "world", "dp"):
        state.__dict__[f"get_{name}_group"] = lambda name=name: name
    monkeypatch.setitem(sys.modules, state.__name__, state)
    assert vllm_ranks._groups() == list(names)
