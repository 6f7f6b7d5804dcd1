"""Sharded updates against those of the group, between two hosts on a link of 1 Gbit/s.

    python benchmarks/shard.py --layers 16

The hosts are network namespaces of this machine, made as the tests make theirs (root, iproute2).
Each has one rank, whose worker holds one half of the mini engine's model (TP 2). Every update is
compared with a plain load. The first two updates are left out: the workers learn meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from hosts import Network, World  # noqa: E402

LEARNING = 2


def measure(transport: str, layers: int, updates: int, megabits: int) -> list[dict[str, Any]]:
    """The results of both ranks."""
    arguments = json.dumps({"tp": 2, "updates": updates, "layers": layers})
    command = [str(TESTS / "shard_programs.py"), "sharded", arguments]
    with Network(2) as hosts, tempfile.TemporaryDirectory() as folder:
        for host in hosts:
            host.slow_down(megabits)
        env = {"PS_DEVICE": "cpu", "PS_TRANSPORT": transport}
        return World(hosts, Path(folder), command, 1, env).wait(600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=16, help="of 13.6 MB each")
    parser.add_argument("--updates", type=int, default=7)
    parser.add_argument("--megabits", type=int, default=1000)
    args = parser.parse_args()
    for transport in ("group", "auto"):
        results = measure(transport, args.layers, args.updates, args.megabits)
        for rank, result in enumerate(results):
            seen = result["seen"][LEARNING:]
            assert all(one["right"] for one in result["seen"])
            seconds, way = [one["seconds"] for one in seen], seen[-1]["way"]
            received = statistics.median(one["received"] for one in seen)
            print(
                f"{transport:6} rank {rank}: {way:9} {statistics.median(seconds):.3f} s "
                f"({min(seconds):.3f} to {max(seconds):.3f}), {received / 1e6:.1f} MB received, "
                f"{result['elsewhere'] / 1e6:.1f} MB owned elsewhere"
            )


if __name__ == "__main__":
    main()
