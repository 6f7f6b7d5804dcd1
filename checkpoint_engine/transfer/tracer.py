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
from dataclasses import dataclass
from typing import Any

from checkpoint_engine.ground.devices import DeviceManager
from checkpoint_engine.ground.report import Stage
from checkpoint_engine.planning.plan import Step

PHASES = "phases"
COPY = "host to device"
READ = "P2P read"
BROADCAST = "broadcast"
RELOAD = "reload"
LANES = (PHASES, COPY, READ, BROADCAST, RELOAD)
"""A row of each rank, from top to bottom. Phases are what its update waited for."""
FAILED = "failed"
"""The phase of a rank whose update is over by an error, until the ranks have told each other."""


@dataclass(eq=False)
class TracedSpan:
    """``began``, ``ended``: by the monotonic clock, or marks of the device; ``None``: not yet."""

    lane: str
    step: Step | None
    began: Any
    ended: Any = None
    name: str = ""
    nbytes: int = 0


class RankTracer:
    """One rank's spans of one update."""

    def __init__(self, rank: int, device_manager: DeviceManager, exact: bool) -> None:
        """
        Args:
            exact: note the end of a broadcast between hosts when it ends, by a call from gloo's
                own thread, not when the update sees it.
        """
        self.exact = exact
        self._rank = rank
        self._spans: list[TracedSpan] = []
        self._device = device_manager.device_module if device_manager.is_accelerator else None
        if self._device is not None:
            self._aside = self._device.Stream()  # that nothing else waits for
            with self._device.stream(self._aside):  # the caller's may be waiting for something
                self._zero = self._mark()
            self._zero.synchronize()
            self._zero_on_host = time.monotonic()

    def begin(self, lane: str, step: Step) -> TracedSpan:
        """A span of the host. Without ``end`` it was broken off."""
        name = f"bucket {step.number}"
        span = TracedSpan(lane, step, time.monotonic(), name=name, nbytes=step.bucket.size)
        self._spans.append(span)
        return span

    def end(self, span: TracedSpan, ended: float) -> None:
        span.ended = ended

    @contextlib.contextmanager
    def on_host(self, lane: str, step: Step) -> Iterator[TracedSpan]:
        span = self.begin(lane, step)
        yield span
        self.end(span, time.monotonic())

    @contextlib.contextmanager
    def copying(self, step: Step, lane: str = COPY) -> Iterator[None]:
        span = self._begin_in_order(lane, step)
        yield
        span.ended = self._mark()

    def broadcasting(self, step: Step) -> TracedSpan:
        """Called right before a broadcast begins; returns what ``broadcast`` wants."""
        return self._begin_in_order(BROADCAST, step)

    def broadcast(self, span: TracedSpan, work: Any) -> None:
        """The broadcast has begun. A device runs it on a stream of the communicator; another
        stream waits for it and notes its end."""
        if self._device is None:
            if self.exact:
                work.get_future().then(lambda _: self.end(span, time.monotonic()))
            return
        with self._device.stream(self._aside):
            with contextlib.suppress(RuntimeError):  # the update will see what is wrong with it
                work.wait()
            span.ended = self._mark()

    def broadcast_seen(self, span: TracedSpan) -> None:
        """The update has seen that the broadcast is over."""
        if self._device is None and not self.exact:
            self.end(span, time.monotonic())

    def stages(self) -> dict[str, Stage]:
        """What each stage has moved, and how long buckets were in it. Called when all are
        through."""
        self._read_marks()
        found: dict[str, Stage] = {}
        for lane in LANES:
            if spans := [span for span in self._spans if span.lane == lane]:
                moved = sum(span.nbytes for span in spans)
                found[lane] = Stage(bytes=moved, seconds=_covered(spans))
        return found

    def encode_failure(self, phases: Sequence[tuple[str, float]]) -> bytes:
        """As ``encode``, of a failed update, whose last phase is the failure; does not wait for
        what the device has not done yet."""
        for span in self._spans:
            span.began, span.ended = _if_happened(span.began), _if_happened(span.ended)
            if span.ended is None:
                span.name, span.ended = f"{span.name} broken off", phases[-1][1]
        self._spans = [span for span in self._spans if span.began is not None]
        return self.encode([*phases, ("", time.monotonic())])

    def encode(self, phases: Sequence[tuple[str, float]]) -> bytes:
        """This rank's part of the trace. ``phases``: what it began when, in order."""
        for (phase, began), (_, ended) in itertools.pairwise(phases):
            self._spans.append(TracedSpan(PHASES, None, began, ended, phase))
        self._read_marks()
        since_epoch = time.time_ns() - time.monotonic_ns()
        spans = []
        for span in _one_at_a_time(self._spans):
            began, ended = (round(1e9 * at) + since_epoch for at in (span.began, span.ended))
            step, details = span.step, {}
            if step is not None:
                details = {"bytes": span.nbytes, "owner": step.owner, "receiver": step.receiver}
            spans.append((span.lane, span.name, began, ended, details))
        part = {"rank": self._rank, "host": socket.gethostname(), "spans": spans}
        return zlib.compress(json.dumps(part).encode(), 1)

    def _begin_in_order(self, lane: str, step: Step) -> TracedSpan:
        """A span of what the device does in order, where there is a device."""
        span = self.begin(lane, step)
        span.began = self._mark()
        return span

    def _mark(self) -> Any:
        """The point that the device's current stream has reached; without a device, the time."""
        if self._device is None:
            return time.monotonic()
        event = self._device.Event(enable_timing=True)
        event.record()
        return event

    def _read_marks(self) -> None:
        """Make times of the host of the device's marks."""
        for span in self._spans:
            span.began, span.ended = self._seconds(span.began), self._seconds(span.ended)

    def _seconds(self, mark: Any) -> float:
        if isinstance(mark, float):
            return mark
        mark.synchronize()
        return self._zero_on_host + 1e-3 * float(self._zero.elapsed_time(mark))


def _if_happened(mark: Any) -> Any:
    """``mark``, or ``None`` if its time cannot be read without waiting."""
    if mark is None or isinstance(mark, float):
        return mark
    with contextlib.suppress(RuntimeError):  # of a device that does not answer any more
        return mark if mark.query() else None
    return None


def _covered(spans: Sequence[TracedSpan]) -> float:
    """Seconds in which there was at least one of them."""
    covered, until = 0.0, 0.0
    for span in sorted(spans, key=lambda span: span.began):
        covered += max(0.0, span.ended - max(span.began, until))
        until = max(until, span.ended)
    return covered


def _one_at_a_time(spans: list[TracedSpan]) -> list[TracedSpan]:
    """In order. What was queued while another bucket had the link began once that was through; a
    broadcast whose end was seen only after that of the next had ended by then."""
    free = dict.fromkeys(LANES, 0.0)
    ordered = sorted(spans, key=lambda span: (span.began, span.ended))
    latest = float("inf")
    for span in reversed(ordered):
        if span.lane == BROADCAST:
            latest = span.ended = max(min(latest, span.ended), span.began)
    for span in ordered:
        span.began = min(max(span.began, free[span.lane]), span.ended)
        free[span.lane] = span.ended
    return ordered
