"""Figures of one rank's service for Prometheus. Needs the extra ``metrics``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

from checkpoint_engine.errors import KINDS
from checkpoint_engine.ground.report import PHASES
from checkpoint_engine.service.jobs import CALLS, Job, Jobs, Status
from checkpoint_engine.transfer.tracer import BROADCAST, COPY, READ, RELOAD

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_STAGES: dict[str, tuple[str, ...]] = {"stage": (COPY, READ, BROADCAST, RELOAD)}
_STATED: dict[str, tuple[str, ...]] = {"state": ("left_over", "missing", "partial")}
_COUNTERS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "calls": ("Calls that ended.", {"call": CALLS, "outcome": ("done", "failed")}),
    "failures": ("Calls that failed.", {"call": CALLS, "cause": KINDS}),
    "updated_bytes": ("Bytes of successful updates.", {}),
    "updated_tensors": ("Tensors of successful updates.", {}),
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
    """Counts the jobs that end, and reads the rest at the moment of a scrape."""

    def __init__(self, read: Callable[[], Status], jobs: Jobs) -> None:
        """Raises ``ImportError`` without prometheus-client."""
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._read = read
        # One of its own: several servers in a process do not mix.
        self._registry = CollectorRegistry()
        common: dict[str, Any] = {"namespace": "checkpoint_engine", "registry": self._registry}
        self._counters: dict[str, Any] = {}
        # Prometheus sees no rise in a series that begins with its first event.
        for name, (text, labels) in _COUNTERS.items():
            self._counters[name] = Counter(name, text, labels.keys(), **common)
            for values in product(*labels.values()):
                self._rise(name, 0, *values)
        common["buckets"] = _SECONDS
        self._seconds = Histogram("call_seconds", "Seconds of calls.", ["call"], **common)
        for call in CALLS:
            self._seconds.labels(call)
        self._registry.register(self)
        jobs.on_end = self._count

    def _rise(self, name: str, amount: float, *labels: str) -> None:
        counter = self._counters[name]
        (counter.labels(*labels) if labels else counter).inc(amount)

    def _count(self, job: Job) -> None:
        self._rise("calls", 1, job.call, job.state)
        self._seconds.labels(job.call).observe(job.seconds)
        if job.error is not None:
            self._rise("failures", 1, job.call, job.error.cause)
        if (report := job.report) is not None:
            self._rise("updated_bytes", report.bytes)
            self._rise("updated_tensors", report.tensors)
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
        """What the server holds, for the registry."""
        from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

        now = self._read()
        place = {"rank": str(now.rank), "device": now.device, "version": now.version}
        yield InfoMetricFamily("checkpoint_engine", "This rank's server.", value=place)
        running = sum(job.state == "running" for job in now.jobs)
        for name, text, value in (
            ("pinned_bytes", "Host memory that checkpoints take.", now.pinned_bytes),
            ("retained_bytes", "Host memory that is kept for later ones.", now.retained_bytes),
            ("checkpoints", "Checkpoints registered.", len(now.checkpoints)),
            ("p2p", "Whether this rank can read and be read by P2P.", int(now.p2p)),
            ("running_calls", "Calls that have not ended.", running),
        ):
            yield GaugeMetricFamily(f"checkpoint_engine_{name}", text, value=value)
        text = "When this rank's engine got the weights that it serves, as Unix time."
        labels = ["checkpoint", "version", "engine"]
        served = GaugeMetricFamily("checkpoint_engine_served", text, labels=labels)
        if (held := now.served) is not None:
            served.add_metric([held.checkpoint, held.version, held.engine], held.since)
        yield served
