"""Every case of the table, on one fleet of processes that outlives them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import pytest
from fault_fleet import Fleets
from run_case import run_case
from table import TABLE, Case


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_fault(fleets: Fleets, case: Case, record_property: Callable[[str, object], None]) -> None:
    verdict = run_case(fleets.get(), case)
    record_property(case.name, asdict(verdict))
    if verdict.faults:
        fleets.drop()
        pytest.fail("\n".join(verdict.faults), pytrace=False)
