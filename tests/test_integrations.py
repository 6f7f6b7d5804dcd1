"""The plug-ins' parts that need none of the programs they are for."""

from __future__ import annotations

import subprocess
import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from checkpoint_engine.integrations import vllm as plugin

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
