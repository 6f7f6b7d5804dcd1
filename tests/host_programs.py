"""What the tests of several hosts start under torchrun, beside ``programs.py``."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from checkpoint_engine.metas_file import decode_metas
from checkpoint_engine.p2p_store import P2PStore
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


def offer(folder: str, pieces: int, size: int) -> dict[str, Any]:
    """A process with memory that others may read."""
    store, here = P2PStore(), Path(folder)
    memory = torch.full((pieces * size,), 7, dtype=torch.uint8)
    store.register_named_tensors({"memory": memory})
    place = {"address": store.addr, "ptr": memory.data_ptr()}
    (here / "place.new").write_text(json.dumps(place))
    (here / "place.new").rename(here / "metas.json")
    _await_file(here / "finished")
    return {}


def take(folder: str, pieces: int, size: int) -> dict[str, Any]:
    """Read that memory in pieces while it is cut off; see what arrives after the error."""
    store, here = P2PStore(), Path(folder)
    place = json.loads((here / "metas.json").read_text())
    offsets = range(0, pieces * size, size)

    def read(target: torch.Tensor) -> None:
        local = [target.data_ptr() + offset for offset in offsets]
        remote = [place["ptr"] + offset for offset in offsets]
        store.batch_transfer_sync_read(place["address"], local, remote, [size] * pieces)

    target = torch.zeros(pieces * size, dtype=torch.uint8)
    (here / "reads-0").touch()
    seen = _error_of(lambda: read(target))
    arrived = int(target.count_nonzero())
    (here / "failed-0").touch()
    _await_file(here / "plugged in")
    again = torch.zeros_like(target)
    read(again)  # over the slow link: time for what was under way to arrive
    (here / "finished").touch()
    return {
        "seen": seen,
        "arrived": arrived,
        "late": int(target.count_nonzero()) - arrived,
        "again": int(again.count_nonzero()),
    }


if __name__ == "__main__":
    name, arguments, results = sys.argv[1:]
    programs = PROGRAMS | {f.__name__: f for f in (cut_off, offer, take)}
    result = programs[name](**json.loads(arguments))
    (Path(results) / f"{RANK}.json").write_text(json.dumps(result))
