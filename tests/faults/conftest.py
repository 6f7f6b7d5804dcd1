"""Faults at every step of real updates. ``make test-faults`` runs these; they need root, for a
network of their own and a /dev/shm of their own that is small."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from fault_fleet import Fleets  # noqa: E402  (found by the line above)


def _asked_for(config: pytest.Config) -> bool:
    """They take minutes, and root."""
    return any("faults" in argument for argument in config.args)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.is_relative_to(HERE) and not _asked_for(config) else None


@pytest.fixture(scope="session")
def fleets() -> Iterator[Fleets]:
    fleets = Fleets()
    yield fleets
    fleets.drop()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [one for kind in ("passed", "failed") for one in terminalreporter.getreports(kind)]
    found: dict[str, Any] = {}
    for report in reports:
        found.update(report.user_properties)
    if not found:
        return
    slowest = max(found, key=lambda name: found[name]["seconds"])
    terminalreporter.write_line(
        f"fault table: {len(found)} cases, "
        f"{sum(bool(one['hangs']) for one in found.values())} hangs, "
        f"{sum(bool(one['leaks']) for one in found.values())} leaks, "
        f"{sum(bool(one['wrong']) for one in found.values())} wrong answers; "
        f"longest time to an error {found[slowest]['seconds']:.2f} s ({slowest})"
    )
