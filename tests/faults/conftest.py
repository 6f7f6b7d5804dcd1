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
from run_case import Verdict  # noqa: E402

if not any("faults" in argument for argument in sys.argv):
    collect_ignore_glob = ["test_*.py"]  # minutes, and root: only where they are asked for

VERDICTS: dict[str, Verdict] = {}


@pytest.fixture(scope="session")
def fleets() -> Iterator[Fleets]:
    fleets = Fleets()
    yield fleets
    fleets.drop()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not VERDICTS:
        return
    slowest = max(VERDICTS, key=lambda name: VERDICTS[name].seconds)
    terminalreporter.write_line(
        f"fault table: {len(VERDICTS)} cases, "
        f"{sum(bool(one.hangs) for one in VERDICTS.values())} hangs, "
        f"{sum(bool(one.leaks) for one in VERDICTS.values())} leaks, "
        f"{sum(bool(one.wrong) for one in VERDICTS.values())} wrong answers; "
        f"longest time to an error {VERDICTS[slowest].seconds:.2f} s ({slowest})"
    )
