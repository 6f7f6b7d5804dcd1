"""What this rank's service was asked to do, and how it ended: jobs, history and figures.

Calls run in the caller's thread, or in one of their own that the caller does not wait for.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from checkpoint_engine.ground.report import UpdateReport
from checkpoint_engine.service.problems import Described, Problem, describe

_KEPT = 100
"""Calls that are remembered once they have ended."""

CALLS = ("register", "unregister", "gather", "load metas", "update")
"""What the service is asked to do."""


class Job(Described):
    """One call of this rank's service."""

    id: str
    """For GET /v1/jobs/{id}."""
    call: str = Field(examples=["update"])
    checkpoint: str
    state: Literal["running", "done", "failed"]
    began: float
    """Unix time."""
    seconds: float
    """Until it ended, or until now."""
    error: Problem | None = None
    report: UpdateReport | None = None
    """Of an update that succeeded."""


class Journal:
    """The calls of one rank. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._listeners: list[Callable[[Job], None]] = []

    def listen(self, listener: Callable[[Job], None]) -> None:
        """Have ``listener`` called with every job that ends, in the thread that ran it."""
        self._listeners.append(listener)

    def run(self, call: str, checkpoint: str, action: Callable[[], Any]) -> Any:
        """Do it in this thread; returns or raises what ``action`` does."""
        return self._perform(self._open(call, checkpoint), action)

    def start(self, call: str, checkpoint: str, action: Callable[[], Any]) -> Job:
        """Do it in a thread of its own; returns at once."""
        job = self._open(call, checkpoint)

        def perform() -> None:
            with contextlib.suppress(Exception):  # the job says so
                self._perform(job, action)

        threading.Thread(target=perform, name=f"checkpoint-engine-{call}", daemon=True).start()
        return job

    def find(self, job_id: str) -> Job | None:
        return next((job for job in self.jobs() if job.id == job_id), None)

    def jobs(self) -> list[Job]:
        """The latest first."""
        with self._lock:
            jobs = list(self._jobs.values())
        return [_until_now(job) for job in reversed(jobs)]

    def _open(self, call: str, checkpoint: str) -> Job:
        now, job_id = time.time(), uuid.uuid4().hex
        job = Job(
            id=job_id, call=call, checkpoint=checkpoint, state="running", began=now, seconds=0.0
        )
        with self._lock:
            self._jobs[job_id] = job
            ended = [job.id for job in self._jobs.values() if job.state != "running"]
            for forgotten in ended[: max(0, len(ended) - _KEPT)]:
                del self._jobs[forgotten]
        return job

    def _perform(self, job: Job, action: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        outcome: dict[str, Any] = {"state": "done"}
        try:
            result = action()
            outcome["report"] = result if isinstance(result, UpdateReport) else None
            return result
        except BaseException as error:
            outcome = {"state": "failed", "error": describe(error)}
            raise
        finally:
            outcome["seconds"] = time.perf_counter() - began
            ended = job.model_copy(update=outcome)
            with self._lock:
                self._jobs[job.id] = ended
            for listener in self._listeners:
                listener(ended)


def _until_now(job: Job) -> Job:
    if job.state != "running":
        return job
    return job.model_copy(update={"seconds": max(0.0, time.time() - job.began)})
