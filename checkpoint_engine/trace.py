"""What every rank did when, in one update: a Chrome trace, which Perfetto opens.

Each rank notes spans: of its host by the monotonic clock, of its device by events on the streams.
One rank writes those of all into one file, also if the update fails. A host's ranks share a clock;
those of several hosts are as close as the hosts' clocks are.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from checkpoint_engine.device_utils import DeviceManager
from checkpoint_engine.errors import UpdateError
from checkpoint_engine.plan import Step, TransferPlan
from checkpoint_engine.report import Stage

PHASES = "phases"
COPY = "host to device"
READ = "P2P read"
BROADCAST = "broadcast"
RELOAD = "reload"
LANES = (PHASES, COPY, READ, BROADCAST, RELOAD)
"""A row of each rank, from top to bottom. Phases are what its update waited for."""
FAILED = "failed"
"""The phase of a rank whose update is over by an error, until the ranks have told each other."""


class Span(NamedTuple):
    """``began``, ``ended``: by the monotonic clock."""

    lane: str
    name: str
    began: float
    ended: float
    details: dict[str, int]


class Tracer(Protocol):
    """Where an update's steps note when they begin and end. Any thread."""

    def copying(self, step: Step) -> contextlib.AbstractContextManager[None]:
        """While the current stream, or this thread, copies a bucket from host memory."""
        ...

    def reading(self, step: Step) -> contextlib.AbstractContextManager[None]:
        """While this thread reads a bucket by P2P."""
        ...

    def broadcasting(self, step: Step) -> TracedBroadcast:
        """Called before a broadcast; its ``follow`` right after it has begun."""
        ...

    def reloading(self, step: Step) -> contextlib.AbstractContextManager[None]:
        """While the worker has a bucket."""
        ...


class TracedBroadcast(Protocol):
    def follow(self, work: Any) -> None:
        """It has begun."""
        ...

    def seen(self) -> None:
        """The update has seen that it is over."""
        ...


class _Untraced:
    """Notes nothing."""

    def copying(self, step: Step) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    reading = reloading = copying

    def broadcasting(self, step: Step) -> _Untraced:
        return self

    def follow(self, work: Any) -> None:
        """Nothing to note."""

    def seen(self) -> None:
        """Nothing to note."""


UNTRACED = _Untraced()


class RankTracer:
    """One rank's spans of one update."""

    def __init__(
        self, rank: int, plan: TransferPlan, device_manager: DeviceManager, exact: bool
    ) -> None:
        """
        Args:
            exact: note the end of a broadcast between hosts when it ends, by a call from gloo's
                own thread, not when the update sees it.
        """
        self.exact = exact
        self._rank = rank
        self._steps = {id(step): number for number, step in enumerate(plan.steps, 1)}
        self._spans: list[Span] = []
        self._on_device: list[tuple[str, Step, Any, Any]] = []
        self._unfinished: dict[int, tuple[str, Step, float]] = {}
        self._numbers = itertools.count()
        self._clock: _DeviceClock | None = None
        if device_manager.is_accelerator:
            self._clock = _DeviceClock(device_manager.device_module)

    @contextlib.contextmanager
    def copying(self, step: Step) -> Iterator[None]:
        if self._clock is None:
            with self._on_host(COPY, step):
                yield
            return
        began = self._clock.mark()
        yield
        self.note_on_device(COPY, step, began, self._clock.mark())

    def reading(self, step: Step) -> contextlib.AbstractContextManager[None]:
        return self._on_host(READ, step)

    def reloading(self, step: Step) -> contextlib.AbstractContextManager[None]:
        return self._on_host(RELOAD, step)

    def broadcasting(self, step: Step) -> TracedBroadcast:
        if self._clock is None:
            return _HostBroadcast(self, step)
        return _DeviceBroadcast(self, step, self._clock)

    def begin(self, lane: str, step: Step) -> int:
        """A span of the host; returns a number for ``end``. Without that it was broken off."""
        number = next(self._numbers)
        self._unfinished[number] = (lane, step, time.monotonic())
        return number

    def end(self, number: int, ended: float) -> None:
        self.note(*self._unfinished.pop(number), ended)

    def note(self, lane: str, step: Step, began: float, ended: float, what: str = "") -> None:
        details = {"bytes": step.bucket.size, "owner": step.owner, "receiver": step.receiver}
        name = f"bucket {self._steps[id(step)]}{what}"
        self._spans.append(Span(lane, name, began, ended, details))

    def note_on_device(self, lane: str, step: Step, began: Any, ended: Any) -> None:
        """``began``, ``ended``: marks of the clock."""
        self._on_device.append((lane, step, began, ended))

    def stages(self) -> dict[str, Stage]:
        """What each stage has moved, and how long buckets were in it. Called when all are
        through."""
        self._read_marks()
        found: dict[str, Stage] = {}
        for lane in LANES:
            spans = sorted(
                (span for span in self._spans if span.lane == lane), key=lambda span: span.began
            )
            moved = sum(span.details["bytes"] for span in spans)
            if spans:
                found[lane] = Stage(bytes=moved, seconds=_covered(spans))
        return found

    def encode_failure(self, phases: Sequence[tuple[str, float]]) -> bytes:
        """The same of a failed update, whose last phase is the failure; does not wait for what the
        device has not done yet."""
        failed = phases[-1][1]
        with contextlib.suppress(RuntimeError):  # of a device that does not answer any more
            self._on_device = [span for span in self._on_device if span[3].query()]
            self._read_marks()
        self._on_device.clear()
        for lane, step, began in list(self._unfinished.values()):
            self.note(lane, step, began, failed, " broken off")
        self._unfinished.clear()
        return self.encode([*phases, ("", time.monotonic())])

    def encode(self, phases: Sequence[tuple[str, float]]) -> bytes:
        """This rank's part of the trace. ``phases``: what it began when, in order."""
        self._read_marks()
        for (phase, began), (_, ended) in itertools.pairwise(phases):
            self._spans.append(Span(PHASES, phase, began, ended, {}))
        since_epoch = time.time_ns() - time.monotonic_ns()
        part = {
            "rank": self._rank,
            "host": socket.gethostname(),
            "spans": [
                (
                    span.lane,
                    span.name,
                    round(1e9 * span.began) + since_epoch,
                    round(1e9 * span.ended) + since_epoch,
                    span.details,
                )
                for span in _one_at_a_time(self._spans)
            ],
        }
        return zlib.compress(json.dumps(part).encode(), 1)

    def _read_marks(self) -> None:
        for lane, step, began, ended in self._on_device:
            assert self._clock is not None
            self.note(lane, step, self._clock.seconds(began), self._clock.seconds(ended))
        self._on_device.clear()

    @contextlib.contextmanager
    def _on_host(self, lane: str, step: Step) -> Iterator[None]:
        number = self.begin(lane, step)
        yield
        self.end(number, time.monotonic())


def _covered(spans: Sequence[Span]) -> float:
    """Seconds in which there was at least one of them; in the order in which they began."""
    covered, until = 0.0, 0.0
    for span in spans:
        covered += max(0.0, span.ended - max(span.began, until))
        until = max(until, span.ended)
    return covered


def _one_at_a_time(spans: list[Span]) -> Iterator[Span]:
    """In order. What was queued while another bucket had the link began once that was through; a
    broadcast whose end was seen only after that of the next had ended by then."""
    free = dict.fromkeys(LANES, 0.0)
    ordered = sorted(spans, key=lambda span: (span.began, span.ended))
    latest = float("inf")
    for index in reversed(range(len(ordered))):
        if ordered[index].lane == BROADCAST:
            latest = max(min(latest, ordered[index].ended), ordered[index].began)
            ordered[index] = ordered[index]._replace(ended=latest)
    for span in ordered:
        began = min(max(span.began, free[span.lane]), span.ended)
        free[span.lane] = span.ended
        yield span._replace(began=began)


class _HostBroadcast:
    """Ends for the tracer once: when gloo says so, or the update sees it."""

    def __init__(self, tracer: RankTracer, step: Step) -> None:
        self._tracer = tracer
        self._number = tracer.begin(BROADCAST, step)

    def follow(self, work: Any) -> None:
        if self._tracer.exact:
            work.get_future().then(lambda _: self._end(time.monotonic()))

    def seen(self) -> None:
        if not self._tracer.exact:
            self._end(time.monotonic())

    def _end(self, ended: float) -> None:
        self._tracer.end(self._number, ended)


class _DeviceBroadcast:
    """It runs on a stream of the communicator; another one, of the clock, waits for it."""

    def __init__(self, tracer: RankTracer, step: Step, clock: _DeviceClock) -> None:
        self._tracer = tracer
        self._step = step
        self._clock = clock
        self._began = clock.mark()

    def follow(self, work: Any) -> None:
        with self._clock.aside():
            with contextlib.suppress(RuntimeError):  # the update will see what is wrong with it
                work.wait()
            ended = self._clock.mark()
        self._tracer.note_on_device(BROADCAST, self._step, self._began, ended)

    def seen(self) -> None:
        """The device noted when."""


class _DeviceClock:
    """Times of the device's streams as times of the host."""

    def __init__(self, device_module: Any) -> None:
        self._module = device_module
        self._aside = device_module.Stream()
        with self.aside():  # the caller's stream may be waiting for something
            self._zero = self.mark()
        self._zero.synchronize()
        self._zero_on_host = time.monotonic()

    def mark(self) -> Any:
        """The point that the current stream has reached."""
        event = self._module.Event(enable_timing=True)
        event.record()
        return event

    def aside(self) -> contextlib.AbstractContextManager[Any]:
        """A stream that nothing else waits for."""
        return self._module.stream(self._aside)

    def seconds(self, mark: Any) -> float:
        mark.synchronize()
        return self._zero_on_host + 1e-3 * float(self._zero.elapsed_time(mark))


def write_trace(
    folder: Path,
    title: str,
    version: str,
    parts: Sequence[bytes],
    failure: UpdateError | None = None,
) -> Path:
    """Join the ranks' parts into a file in ``folder``, which is made if need be.

    Returns its path: ``<title>-<version>.json``, or with a number where that is there already.
    ``failure``: of the update; it is marked, and the name ends in ``-failed``.

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
        name += "-failed"
    trace = {"displayTimeUnit": "ms", "otherData": about, "traceEvents": events}
    folder.mkdir(parents=True, exist_ok=True)
    path = _reserve(folder, re.sub(r"[^\w.-]+", "_", name))
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(trace))
        beside.rename(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        beside.unlink(missing_ok=True)
    return path


def _reserve(folder: Path, name: str) -> Path:
    """A file that was not there: several ranks may write about the same update."""
    for number in itertools.count(1):
        path = folder / (f"{name}.json" if number == 1 else f"{name}-{number}.json")
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)
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
