"""Figures of one rank's service for Prometheus. Needs the extra ``metrics``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from checkpoint_engine.errors import KINDS
from checkpoint_engine.report import PHASES
from checkpoint_engine.service.journal import CALLS, Job, Journal
from checkpoint_engine.service.status import status_of
from checkpoint_engine.transfer.tracer import BROADCAST, COPY, READ, RELOAD

if TYPE_CHECKING:
    from checkpoint_engine.ps import ParameterServer

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts the jobs of a journal, and reads the rest off the server when asked."""

    def __init__(self, ps: ParameterServer, journal: Journal) -> None:
        """Raises ``ImportError`` without prometheus-client."""
        from prometheus_client import CollectorRegistry, Counter, Histogram

        # One of its own: several servers in a process do not mix.
        self._registry = CollectorRegistry()
        common: dict[str, Any] = {"namespace": "checkpoint_engine", "registry": self._registry}
        self._calls = Counter("calls", "Calls that ended.", ["call", "outcome"], **common)
        self._failures = Counter("failures", "Calls that failed.", ["call", "cause"], **common)
        self._bytes = Counter("updated_bytes", "Bytes of successful updates.", **common)
        self._tensors = Counter("updated_tensors", "Tensors of successful updates.", **common)
        self._phases = Counter(
            "phase_seconds", "Seconds of successful updates by phase.", ["phase"], **common
        )
        self._stage_seconds = Counter(
            "stage_seconds",
            "Seconds of successful updates in which there was a bucket in a stage.",
            ["stage"],
            **common,
        )
        self._stage_bytes = Counter(
            "stage_bytes", "Bytes that successful updates moved, by stage.", ["stage"], **common
        )
        self._seconds = Histogram(
            "call_seconds", "Seconds of calls.", ["call"], buckets=_SECONDS, **common
        )
        # Prometheus sees no rise in a series that begins with its first event.
        for call in CALLS:
            for outcome in ("done", "failed"):
                self._calls.labels(call, outcome)
            for cause in KINDS:
                self._failures.labels(call, cause)
            self._seconds.labels(call)
        for phase in PHASES:
            self._phases.labels(phase)
        for stage in (COPY, READ, BROADCAST, RELOAD):
            self._stage_seconds.labels(stage)
            self._stage_bytes.labels(stage)
        self._registry.register(_Holdings(ps, journal))
        journal.listen(self._count)

    def _count(self, job: Job) -> None:
        self._calls.labels(job.call, job.state).inc()
        self._seconds.labels(job.call).observe(job.seconds)
        if job.error is not None:
            self._failures.labels(job.call, job.error.cause).inc()
        if job.report is not None:
            self._bytes.inc(job.report.bytes)
            self._tensors.inc(job.report.tensors)
            for phase, seconds in job.report.phases.items():
                self._phases.labels(phase).inc(seconds)
            for name, stage in job.report.stages.items():
                self._stage_seconds.labels(name).inc(stage.seconds)
                self._stage_bytes.labels(name).inc(stage.bytes)

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self._registry)


class _Holdings:
    """What the server holds at the moment of a scrape."""

    def __init__(self, ps: ParameterServer, journal: Journal) -> None:
        self._ps = ps
        self._journal = journal

    def describe(self) -> list[Any]:
        return []  # or registering would collect once

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

        status = status_of(self._ps, self._journal)
        place = {"rank": str(status.rank), "device": status.device, "version": status.version}
        yield InfoMetricFamily("checkpoint_engine", "This rank's server.", value=place)
        gauges = {
            "pinned_bytes": ("Host memory that checkpoints take.", status.pinned_bytes),
            "retained_bytes": (
                "Host memory that is kept for later checkpoints.",
                status.retained_bytes,
            ),
            "checkpoints": ("Checkpoints registered.", len(status.checkpoints)),
            "p2p": ("Whether this rank can read and be read by P2P.", int(status.p2p)),
            "running_calls": (
                "Calls that have not ended.",
                sum(job.state == "running" for job in status.jobs),
            ),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"checkpoint_engine_{name}", text, value=value)
        served = GaugeMetricFamily(
            "checkpoint_engine_served",
            "When this rank's engine got the weights that it serves, as Unix time.",
            labels=["checkpoint", "version", "engine"],
        )
        if status.served is not None:
            held = status.served
            served.add_metric([held.checkpoint, held.version, held.engine], held.since)
        yield served
