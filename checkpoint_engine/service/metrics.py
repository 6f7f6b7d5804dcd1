"""Figures of one rank's service for Prometheus. Needs the extra ``metrics``."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

from checkpoint_engine.errors import KINDS
from checkpoint_engine.ground.report import PHASES, UpdateReport
from checkpoint_engine.service.jobs import CALLS, Job, Jobs, Status
from checkpoint_engine.transfer.tracer import BROADCAST, COPY, READ, RELOAD

_PREFIX = "checkpoint_engine"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_STAGES: dict[str, tuple[str, ...]] = {"stage": (COPY, READ, BROADCAST, RELOAD)}
_STATED: dict[str, tuple[str, ...]] = {"state": ("left_over", "missing", "partial")}
_COUNTERS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "calls": ("Calls that ended.", {"call": CALLS, "outcome": ("done", "failed")}),
    "failures": ("Calls that failed.", {"cause": KINDS}),
    "updated_bytes": ("Bytes of successful updates.", {}),
    "updated_tensors": ("Tensors of successful updates.", {}),
    "skipped_bytes": ("Bytes that successful updates did not send, as workers held them.", {}),
    "skipped_tensors": ("Tensors of which that is true.", {}),
    "engine_tensors": ("Tensors that workers state they left over, and parameters that got nothing "
                       "or a part, in successful updates.", _STATED),
    "phase_seconds": ("Seconds of successful updates by phase.", {"phase": PHASES}),
    "stage_seconds": ("Seconds of successful updates in which there was a bucket in a stage.",
                      _STAGES),
    "stage_bytes": ("Bytes that successful updates moved, by stage.", _STAGES),
}  # fmt: skip
"""Of each its text, and its labels with the values that they can have."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts the jobs that end, and reads the rest at the moment of a scrape.

    A rank gives at most 80 samples, whatever happens to it: no label holds what callers choose or
    what differs from update to update. ``prometheus_client``'s own counters would add a sample of
    their time of creation to each.
    """

    def __init__(self, read: Callable[[], Status], jobs: Jobs) -> None:
        """Raises ``ImportError`` without prometheus-client."""
        from prometheus_client import CollectorRegistry

        self._read = read
        self._lock = threading.Lock()
        # Prometheus sees no rise in a series that begins with its first event.
        self._counts = {
            name: dict.fromkeys(product(*labels.values()), 0.0)
            for name, (_, labels) in _COUNTERS.items()
        }
        self._within = dict.fromkeys((*_SECONDS, math.inf), 0)
        self._seconds = 0.0
        # One of its own: several servers in a process do not mix.
        self._registry = CollectorRegistry()
        self._registry.register(self)
        jobs.on_end = self._count

    def _rise(self, name: str, amount: float, *labels: str) -> None:
        self._counts[name][labels] = self._counts[name].get(labels, 0.0) + amount

    def _count(self, job: Job) -> None:
        with self._lock:
            self._rise("calls", 1, job.call, job.state)
            if job.error is not None:
                self._rise("failures", 1, job.error.cause)
            if job.call == "update":
                self._seconds += job.seconds
                for limit in self._within:
                    self._within[limit] += job.seconds <= limit
            if job.report is not None:
                self._count_report(job.report)

    def _count_report(self, report: UpdateReport) -> None:
        self._rise("updated_bytes", report.bytes)
        self._rise("updated_tensors", report.tensors)
        self._rise("skipped_bytes", report.skipped_bytes)
        self._rise("skipped_tensors", report.skipped_tensors)
        stated = report.engines.get(report.rank, {}).values()
        for state, said in product(_STATED["state"], stated):
            self._rise("engine_tensors", said.get(state, 0), state)
        for phase, seconds in report.phases.items():
            self._rise("phase_seconds", seconds, phase)
        for name, stage in report.stages.items():
            self._rise("stage_seconds", stage.seconds, name)
            self._rise("stage_bytes", stage.bytes, name)

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self._registry)

    def collect(self) -> Iterator[Any]:
        """For the registry."""
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        with self._lock:
            for name, (text, labels) in _COUNTERS.items():
                counter = CounterMetricFamily(f"{_PREFIX}_{name}", text, labels=[*labels])
                for values, count in self._counts[name].items():
                    counter.add_metric(values, count)
                yield counter
            text = "Seconds of updates, also of those that failed."
            times = HistogramMetricFamily(f"{_PREFIX}_call_seconds", text, labels=["call"])
            limits = [
                ("+Inf" if le == math.inf else f"{le:g}", n) for le, n in self._within.items()
            ]
            times.add_metric(["update"], limits, self._seconds)
            yield times
        yield from self._held()

    def _held(self) -> Iterator[Any]:
        """What the server holds now."""
        from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

        now = self._read()
        place = {"rank": str(now.rank), "device": now.device, "version": now.version}
        yield InfoMetricFamily(_PREFIX, "This rank's server.", value=place)
        running = sum(job.state == "running" for job in now.jobs)
        for name, text, value in (
            ("pinned_bytes", "Host memory that checkpoints take.", now.pinned_bytes),
            ("retained_bytes", "Host memory that is kept for later ones.", now.retained_bytes),
            ("checkpoints", "Checkpoints registered.", len(now.checkpoints)),
            ("p2p", "Whether this rank can read and be read by P2P.", int(now.p2p)),
            ("running_calls", "Calls that have not ended.", running),
        ):
            yield GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=value)
        since = "When this rank's engine got the weights that it serves, as Unix time."
        which = "A number made of their version: equal where engines serve the same."
        for name, text in (("served", since), ("served_version", which)):
            served = GaugeMetricFamily(f"{_PREFIX}_{name}", text, labels=["engine"])
            if (held := now.served) is not None:
                number = held.since if name == "served" else _number_of(held.version)
                served.add_metric([held.engine], number)
            yield served


def _number_of(version: str) -> int:
    """48 bits, which Prometheus's floating-point numbers hold."""
    return int.from_bytes(hashlib.sha256(version.encode()).digest()[:6], "big")
