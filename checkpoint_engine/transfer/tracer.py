"""What one rank did when, in one update: spans of its host by the monotonic clock, and of its
device by events on the streams. ``update.trace`` writes them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from checkpoint_engine.ground.devices import DeviceManager
from checkpoint_engine.ground.report import Stage
from checkpoint_engine.planning.plan import Step, TransferPlan

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
            with self.on_host(COPY, step):
                yield
            return
        began = self._clock.mark()
        yield
        self.note_on_device(COPY, step, began, self._clock.mark())

    def reading(self, step: Step) -> contextlib.AbstractContextManager[None]:
        return self.on_host(READ, step)

    def reloading(self, step: Step) -> contextlib.AbstractContextManager[None]:
        return self.on_host(RELOAD, step)

    def broadcasting(self, step: Step) -> Any:
        """Called right before a broadcast begins; returns what ``broadcast`` wants."""
        return self.begin(BROADCAST, step) if self._clock is None else self._clock.mark()

    def broadcast(self, step: Step, began: Any, work: Any) -> None:
        """The broadcast has begun. A device runs it on a stream of the communicator; another
        stream, of the clock, waits for it and notes its end."""
        if self._clock is None:
            if self.exact:
                work.get_future().then(lambda _: self.end(began, time.monotonic()))
            return
        with self._clock.aside():
            with contextlib.suppress(RuntimeError):  # the update will see what is wrong with it
                work.wait()
            ended = self._clock.mark()
        self.note_on_device(BROADCAST, step, began, ended)

    def broadcast_seen(self, began: Any) -> None:
        """The update has seen that the broadcast is over."""
        if self._clock is None and not self.exact:
            self.end(began, time.monotonic())

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
        """As ``encode``, of a failed update, whose last phase is the failure; does not wait for
        what the device has not done yet."""
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
    def on_host(self, lane: str, step: Step) -> Iterator[None]:
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
