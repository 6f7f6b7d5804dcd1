"""What this rank's service was asked to do, and how it ended: jobs, history and figures.

Calls run in the caller's thread, or in one of their own that the caller does not wait for.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from checkpoint_engine.report import UpdateReport
from checkpoint_engine.service.problems import Problem, describe

_KEPT = 100
"""Calls that are remembered once they have ended."""

CALLS = ("register", "unregister", "gather", "load metas", "update")
"""What the service is asked to do."""

State = Literal["running", "done", "failed"]


class Job(BaseModel):
    """One call of this rank's service."""

    model_config = ConfigDict(frozen=True)

    id: str = Field(description="For GET /v1/jobs/{id}.")
    call: str = Field(examples=["update"])
    checkpoint: str
    state: State
    began: float = Field(description="Unix time.")
    seconds: float = Field(description="Until it ended, or until now.")
    error: Problem | None = None
    report: UpdateReport | None = Field(default=None, description="Of an update that succeeded.")


class Journal:
    """The calls of one rank, the last ones first. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
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
            try:
                self._perform(job, action)
            except Exception:
                return  # the job says so

        threading.Thread(target=perform, name=f"checkpoint-engine-{call}", daemon=True).start()
        return job

    def find(self, job_id: str) -> Job | None:
        with self._lock:
            job = self._jobs.get(job_id)
        return None if job is None else _until_now(job)

    def jobs(self) -> list[Job]:
        """The latest first."""
        with self._lock:
            jobs = list(self._jobs.values())
        return [_until_now(job) for job in reversed(jobs)]

    def _open(self, call: str, checkpoint: str) -> Job:
        job = Job(
            id=uuid.uuid4().hex,
            call=call,
            checkpoint=checkpoint,
            state="running",
            began=time.time(),
            seconds=0.0,
        )
        with self._lock:
            self._jobs[job.id] = job
            self._forget()
        return job

    def _forget(self) -> None:
        ended = [job.id for job in self._jobs.values() if job.state != "running"]
        for job_id in ended[: max(0, len(ended) - _KEPT)]:
            del self._jobs[job_id]

    def _perform(self, job: Job, action: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        try:
            result = action()
        except BaseException as error:
            self._close(job, began, state="failed", error=describe(error))
            raise
        report = result if isinstance(result, UpdateReport) else None
        self._close(job, began, state="done", report=report)
        return result

    def _close(self, job: Job, began: float, **outcome: Any) -> None:
        ended = job.model_copy(update={"seconds": time.perf_counter() - began, **outcome})
        with self._lock:
            self._jobs[job.id] = ended
        for listener in self._listeners:
            listener(ended)


def _until_now(job: Job) -> Job:
    if job.state != "running":
        return job
    return job.model_copy(update={"seconds": max(0.0, time.time() - job.began)})
