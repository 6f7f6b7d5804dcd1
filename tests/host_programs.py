"""What the tests of several hosts start under torchrun, beside ``programs.py``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from checkpoint_engine.world.metas_file import decode_metas
from fleet import request_of, sockets_of_mooncake
from programs import PROGRAMS, RANK, WORLD_SIZE, Rank, _await_file, _error_of


def cut_off(folder: str, sources: int, timeout: float) -> dict[str, Any]:
    """A world that takes its weights from a source that is cut off meanwhile, and then again."""
    rank, here = Rank(), Path(folder)
    _await_file(here / "metas.json")
    rank.ps.gather_metas("good")
    rank.ps.load_metas(decode_metas((here / "metas.json").read_bytes()))
    rank.ps.store_based_barrier()
    (here / f"reads-{RANK}").touch()
    request = request_of(rank.worker, RANK)
    everyone = list(range(WORLD_SIZE))

    def update(seconds: float) -> None:
        rank.ps.update("good", request, ranks=everyone, timeout=timedelta(seconds=seconds))

    seen = _error_of(lambda: update(timeout))
    (here / f"failed-{RANK}").touch()
    _await_file(here / "plugged in")
    rank.worker.call("forget")
    update(30)
    rank.check(1, set(range(sources)))
    rank.ps.store_based_barrier()
    (here / "finished").touch()
    rank.stop()
    return {"seen": seen, **rank.resources()}


def repeat(members: list[int], times: int) -> dict[str, Any]:
    """P2P updates one after the other; what there is after the first few, and after all."""
    rank = Rank()
    rank.publish("good", 1, set(range(WORLD_SIZE)))
    request = request_of(rank.worker, RANK)
    early: list[dict[str, int]] = []
    for _ in range(times):
        rank.worker.call("forget")
        rank.ps.update("good", request, ranks=members)
        if RANK in members:
            rank.check(1, set(range(WORLD_SIZE)))
        rank.ps.store_based_barrier()
        early = [*early, _threads_and_files()][:3]
    most = {what: max(one[what] for one in early) for what in early[0]}
    most["P2P"] += 2  # one to the other rank, one from there
    ends = time.monotonic() + 10
    while any((after := _threads_and_files())[what] > most[what] for what in most):
        if time.monotonic() > ends:
            break
        time.sleep(0.02)
    rank.ps.store_based_barrier()
    rank.stop()
    return {"early": most, "after": after}


def _threads_and_files() -> dict[str, int]:
    """Connections of Mooncake's apart: it opens another one where one is in use."""
    mooncakes = sockets_of_mooncake()
    files = []
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            files.append(os.readlink(file))
    p2p = len(mooncakes.intersection(files))
    threads = len(list(Path("/proc/self/task").iterdir()))
    return {"threads": threads, "files": len(files) - p2p, "P2P": p2p}


def slow(folder: str) -> dict[str, Any]:
    """A joiner that reads over a slow link."""
    rank, here = Rank(), Path(folder)
    _await_file(here / "metas.json")
    rank.ps.gather_metas("good")
    rank.ps.load_metas(decode_metas((here / "metas.json").read_bytes()))
    report = rank.ps.update(
        "good", request_of(rank.worker, RANK), ranks=[RANK], timeout=timedelta(seconds=45)
    )
    rank.check(1, {0})
    (here / "finished").touch()
    rank.stop()
    return {"seconds": report.seconds, "bytes": report.bytes, **rank.resources()}


if __name__ == "__main__":
    name, arguments, results = sys.argv[1:]
    programs = PROGRAMS | {f.__name__: f for f in (cut_off, repeat, slow)}
    result = programs[name](**json.loads(arguments))
    (Path(results) / f"{RANK}.json").write_text(json.dumps(result))
