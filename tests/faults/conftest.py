"""Faults at every step of real updates. ``make test-faults`` runs these; they need root, for a
/dev/shm of their own that is small."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from fault_fleet import Fleets  # noqa: E402  (found by the line above)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """They take minutes, and need root: only where they are asked for."""
    asked_for = any("faults" in argument for argument in config.args)
    return None if asked_for or collection_path.suffix != ".py" else True


@pytest.fixture(scope="session")
def fleets() -> Iterator[Fleets]:
    fleets = Fleets()
    yield fleets
    fleets.drop()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Of reports, which come from other processes too where cases run side by side."""
    reports = [one for of in terminalreporter.stats.values() for one in of]
    cases = [dict(one.user_properties) for one in reports if getattr(one, "when", "") == "call"]
    cases = [case for case in cases if "case" in case]
    if not cases:
        return
    slowest = max(cases, key=lambda case: case["seconds"])
    terminalreporter.write_line(
        f"fault table: {len(cases)} cases, {sum(case['hangs'] for case in cases)} hangs, "
        f"{sum(case['leaks'] for case in cases)} leaks, "
        f"{sum(case['wrong'] for case in cases)} wrong answers; "
        f"longest time to an error {slowest['seconds']:.2f} s ({slowest['case']})"
    )
