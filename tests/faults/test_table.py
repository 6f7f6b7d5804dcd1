"""Every case of the table, on one fleet of processes that outlives them all."""

from __future__ import annotations

import pytest
from fault_fleet import Fleets
from run_case import run_case
from table import TABLE, Case

from conftest import VERDICTS


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_fault(fleets: Fleets, case: Case) -> None:
    verdict = VERDICTS[case.name] = run_case(fleets.get(), case)
    if verdict.faults:
        fleets.drop()
        pytest.fail("\n".join(verdict.faults), pytrace=False)
