"""A year of updates in an hour: random faults, sizes, joins and restarts on the same processes.

    python tests/faults/soak_long.py --updates 2000 --seed 7

After each step nothing is left behind that was not there before, as after a case of the table. Over
all of them the memory, descriptors and threads of the processes that live long stay as they were.
Prints the seed of each step that did not end as it must; ``--seed SEED --updates 1`` repeats one.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

from fault_fleet import RANKS, Fleet, Fleets  # noqa: E402  (found by the line above)
from run_case import run_case  # noqa: E402
from soak import chosen_by  # noqa: E402

WARM = 10  # updates until a process has allocated what it keeps
GROWTH = 16 << 20  # bytes by which its memory may differ over its life: allocators are not exact
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""For the processes. Left alone, glibc keeps tensors of ever other sizes in arenas of its threads,
with holes between them: 100 MB in 100 updates that keep nothing."""
MOST_TENSORS = 48  # of each rank; a quarter of a megabyte each


class Size(NamedTuple):
    """What a process takes. A descriptor to a peer that died is kept, so those are not compared
    here: each step compares them by kind."""

    bytes: int
    threads: int


def fault(fleet: Fleet, chance: random.Random) -> list[str]:
    return run_case(fleet, chosen_by(chance.randrange(1 << 30))).faults


def other_size(fleet: Fleet, chance: random.Random) -> list[str]:
    """An update of another size than the last, all of it checked."""
    fleet.good_update(tensors=chance.randint(1, MOST_TENSORS))
    return fleet.leaks()


def join(fleet: Fleet, chance: random.Random) -> list[str]:
    """Some ranks read everything out of the memory of all by P2P."""
    members = sorted(chance.sample(range(RANKS), chance.randint(1, RANKS)))
    fleet.good_update(members=members)
    return fleet.leaks()


def restart(fleet: Fleet, chance: random.Random) -> list[str]:
    """A server rank or a worker ends between two updates, and is started again."""
    rank = chance.randrange(RANKS)
    if chance.random() < 0.5:
        fleet.kill_server(rank)
    else:
        fleet.workers[rank].kill()
        fleet.workers[rank].join()
    started = fleet.repair()
    fleet.warm_up()
    fleet.good_update()
    fleet.settle_baseline(started)
    return fleet.leaks()


STEPS: dict[Callable[[Fleet, random.Random], list[str]], int] = {
    fault: 4,
    other_size: 9,
    join: 6,
    restart: 1,
}
"""With how often each comes. Most faults end a process, and what lives is to be watched."""


def take_step(fleet: Fleet, seed: int) -> tuple[str, list[str]]:
    """Its name, and what was wrong."""
    chance = random.Random(seed)
    (step,) = chance.choices(list(STEPS), list(STEPS.values()))
    try:
        return step.__name__, step(fleet, chance)
    except (AssertionError, OSError, RuntimeError) as error:
        return step.__name__, [f"{type(error).__name__}: {error}"[:2000]]


class Watch:
    """The sizes of all processes after every step, from their first to their last."""

    def __init__(self) -> None:
        self._seen: defaultdict[tuple[str, int], list[Size]] = defaultdict(list)

    def look(self, fleet: Fleet) -> None:
        processes = [(f"server {rank}", one.pid) for rank, one in enumerate(fleet.servers)]
        processes += [(f"worker {n}", int(one.pid or 0)) for n, one in enumerate(fleet.workers)]
        for process in processes:
            self._seen[process].append(size_of(process[1]))

    def judge(self) -> tuple[list[str], str]:
        """Which processes have grown, and a sentence about the one that grew most."""
        grown: list[str] = []
        most = "no process lived long enough to be watched"
        largest = -1 << 60
        for (name, pid), seen in self._seen.items():
            warm = seen[WARM:]
            if len(warm) < 2 * WARM:
                continue
            before, after = (
                Size(*(int(statistics.median(one)) for one in zip(*part, strict=True)))
                for part in (warm[:WARM], warm[-WARM:])
            )
            text = (
                f"{name} (process {pid}) in {len(seen)} steps: {before.bytes / 1e6:.1f} MB before, "
                f"{after.bytes / 1e6:.1f} MB after, {before.threads} and {after.threads} threads"
            )
            if after.bytes - before.bytes > GROWTH or after.threads > before.threads:
                grown.append(text)
            if after.bytes - before.bytes > largest:
                largest, most = after.bytes - before.bytes, f"grew most: {text}"
        return grown, most


def size_of(pid: int) -> Size:
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return Size(int(fields["RssAnon"].split()[0]) << 10, int(fields["Threads"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    print(f"soak-long: {arguments.updates} steps, seeds from {arguments.seed}", flush=True)
    bad, began, watch = 0, time.monotonic(), Watch()
    taken: Counter[str] = Counter()
    os.environ.update(ALLOCATOR)
    fleets = Fleets()
    try:
        for seed in range(arguments.seed, arguments.seed + arguments.updates):
            name, faults = take_step(fleets.get(), seed)
            taken[name] += 1
            if faults:
                bad += 1
                print(f"seed {seed}: {name}: {faults}", flush=True)
                fleets.drop()
            else:
                watch.look(fleets.get())
    finally:
        fleets.drop()
    grown, most = watch.judge()
    for text in grown:
        print(f"grown: {text}")
    steps = ", ".join(f"{count} of {name}" for name, count in sorted(taken.items()))
    seconds = time.monotonic() - began
    print(f"soak-long: {steps}; {bad} bad, {len(grown)} grown, {seconds:.0f} s in all; {most}")
    return 1 if bad or grown else 0


if __name__ == "__main__":
    sys.exit(main())
