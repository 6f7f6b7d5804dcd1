"""What the tests of several hosts start under torchrun, beside ``programs.py``."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from checkpoint_engine.metas_file import decode_metas
from fleet import request_of
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


if __name__ == "__main__":
    name, arguments, results = sys.argv[1:]
    result = {**PROGRAMS, "cut_off": cut_off}[name](**json.loads(arguments))
    (Path(results) / f"{RANK}.json").write_text(json.dumps(result))
