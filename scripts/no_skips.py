"""A pytest plugin: a skipped test is a failure, unless it needs a GPU.

Used in CI as ``-p scripts.no_skips``: a test that silently does not run hides a broken set-up.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    # An expected failure (xfail) is reported as skipped too.
    if report.skipped and not hasattr(report, "wasxfail") and not item.get_closest_marker("gpu"):
        _fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    report = yield
    if report.skipped:
        _fail(report)
    return report


def _fail(report: Any) -> None:
    reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"skipped, which is a failure in CI: {reason}"
