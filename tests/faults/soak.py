"""Updates with random faults, one after the other on the same processes.

    python tests/faults/soak.py --updates 200 --seed 7

Every update is hit by a case of the table that its seed chooses, where it strikes too; between them
everything healthy keeps running. Prints the seed of each update that did not end as it must.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

from fault_fleet import Fleets  # noqa: E402  (found by the line above)
from run_case import run_case  # noqa: E402
from table import LAST, TABLE, Case  # noqa: E402


def chosen_by(seed: int) -> Case:
    """A case, at any bucket where it strikes at one."""
    generator = random.Random(seed)
    case = generator.choice([one for one in TABLE if one.call == "update"])
    if case.inject is None or case.inject.step != "bucket" or case.call != "update":
        return case
    latest = LAST if case.each.get("ranks") is None else 5
    inject = dataclasses.replace(case.inject, nth=generator.randint(1, latest))
    return dataclasses.replace(case, inject=inject, step=f"bucket {inject.nth}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    print(f"soak: {arguments.updates} updates, seeds from {arguments.seed}", flush=True)
    bad, longest, began = 0, 0.0, time.monotonic()
    fleets = Fleets()
    try:
        for seed in range(arguments.seed, arguments.seed + arguments.updates):
            case = chosen_by(seed)
            verdict = run_case(fleets.get(), case)
            longest = max(longest, verdict.seconds)
            if verdict.faults:
                bad += 1
                print(f"seed {seed}: {case.name}: {verdict.faults}", flush=True)
                fleets.drop()
    finally:
        fleets.drop()
    print(
        f"soak: {arguments.updates} updates from seed {arguments.seed}, {bad} bad, longest time "
        f"to an error {longest:.2f} s, {time.monotonic() - began:.0f} s in all"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
