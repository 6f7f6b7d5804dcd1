"""The trace of an update: Chrome's format, which Perfetto opens.

If the update succeeds, one rank writes what all ranks did into one file; if it fails, each rank
writes its own part. The ranks of a host share a clock; those of several hosts are as close as the
hosts' clocks are.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from checkpoint_engine.errors import UpdateError
from checkpoint_engine.transfer.tracer import FAILED, LANES


def write_trace(
    folder: Path,
    title: str,
    version: str,
    parts: Sequence[bytes],
    failure: UpdateError | None = None,
) -> Path:
    """Join the ranks' parts into a file in ``folder``, which is made if need be.

    Returns its path: ``<title>-<version>.json``, or with a number where that is there already.
    ``failure``: of the update; it is marked, and the name ends in ``-failed-rank<rank>``, with the
    rank that writes its own part.

    Raises:
        OSError: it cannot be written.
    """
    ranks = [json.loads(zlib.decompress(part)) for part in parts]
    began = min(span[2] for rank in ranks for span in rank["spans"])
    about = {"checkpoint": title, "version": version, "ranks": len(ranks), "began_ns": began}
    events = [event for rank in ranks for event in _events(rank, began)]
    name = f"{title}-{version}"
    if failure is not None:
        about["failure"] = str(failure)
        events += [_mark(failure, event) for event in events if _is_failure(failure, event)]
        name += f"-failed-rank{ranks[0]['rank']}"
    trace = {"displayTimeUnit": "ms", "otherData": about, "traceEvents": events}
    folder.mkdir(parents=True, exist_ok=True)
    return _write_new(folder, re.sub(r"[^\w.-]+", "_", name), json.dumps(trace))


def _write_new(folder: Path, name: str, text: str) -> Path:
    """Into a file that was not there: updates may have the same version."""
    for number in itertools.count(1):
        path = folder / (f"{name}.json" if number == 1 else f"{name}-{number}.json")
        with contextlib.suppress(FileExistsError), path.open("x") as file:
            try:
                file.write(text)
            except BaseException:
                path.unlink()
                raise
            return path
    raise AssertionError


def _is_failure(failure: UpdateError, event: dict[str, Any]) -> bool:
    """Where the rank that failed first gave up."""
    return (event["ph"], event["pid"], event["name"]) == ("X", failure.rank, FAILED)


def _mark(failure: UpdateError, event: dict[str, Any]) -> dict[str, Any]:
    """A mark in its phases."""
    what = f"rank {failure.rank} failed during {failure.phase}"
    place = {key: event[key] for key in ("pid", "tid", "ts")}
    return {**place, "ph": "i", "s": "t", "name": what, "args": {"cause": failure.cause}}


def _events(part: dict[str, Any], zero: int) -> Iterator[dict[str, Any]]:
    """One rank's part in Chrome's format: a process for the rank, a thread for each lane."""
    rank = part["rank"]
    spans = part["spans"]
    label = {"name": f"rank {rank} on {part['host']}"}
    yield {"ph": "M", "pid": rank, "name": "process_name", "args": label}
    yield {"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": rank}}
    for number, lane in enumerate(LANES):
        if any(span[0] == lane for span in spans):
            place = {"ph": "M", "pid": rank, "tid": _thread(rank, number)}
            yield {**place, "name": "thread_name", "args": {"name": lane}}
            yield {**place, "name": "thread_sort_index", "args": {"sort_index": number}}
    for lane, name, began, ended, details in spans:
        yield {
            "ph": "X",
            "pid": rank,
            "tid": _thread(rank, LANES.index(lane)),
            "name": name,
            "cat": lane,
            "ts": (began - zero) / 1e3,  # microseconds
            # A nanosecond short: viewers add fractions, and nest what seems to overlap.
            "dur": max(0, ended - began - 1) / 1e3,
            "args": details,
        }


def _thread(rank: int, lane: int) -> int:
    """A number that no other thread and no process has: Perfetto takes both for those of one
    Linux, where 0 is the idle task, and drops what overlaps then."""
    return 10_000 * (lane + 1) + rank
