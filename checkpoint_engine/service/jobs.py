"""What this rank's service was asked to do, and how it ended: jobs, errors and history.

Every call has a thread of its own, so that callers that wait hold none of the service's.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal

from pydantic import Field

from checkpoint_engine import __version__
from checkpoint_engine.errors import BusyError, UpdateError, kind_of
from checkpoint_engine.ground.deadline import begin, cancellable
from checkpoint_engine.ground.report import UpdateReport
from checkpoint_engine.update.snapshot import Described, Snapshot

_KEPT = 100
"""Calls that are remembered once they have ended."""
_MOST_AT_ONCE = 64
"""Calls, most of which wait for another one. Above all, connections must be left for status."""

CALLS = ("register", "unregister", "gather", "load metas", "update")
"""What the service is asked to do."""

_HINTS = {
    "busy": "wait for the call that is running: GET /v1/status shows it",
    "update_failed": "everything is released; mend the cause that the message names and update "
    "again, healthy ranks and engines need no restart",
    "forbidden": "this service was started with --allow-path or --allow-update-url",
    "not_found": "see that the path is the same on the server's host and readable by its user",
    "out_of_memory": "free host memory, or unregister a checkpoint first",
    "timeout": "look at the rank or engine that the message names, or raise the timeout",
    "invalid": "mend the request: the message names the value",
    "failed": "",
}
_OF_UPDATES = ("rank", "phase", "engines", "seconds", "trace")


class CallError(Described):
    """Why a call failed, for programs."""

    code: str = Field(examples=["busy"])
    """One of a few words that do not change."""
    message: str
    """The error's text, a worker's traceback included."""
    cause: str = Field(default="failed", examples=["worker_failed"])
    """What failed, of a few words: of an update, on the rank that failed first."""
    hint: str = ""
    """What to do about it."""
    rank: int | None = None
    """That failed first, of several."""
    phase: str = Field(default="", examples=["reload"])
    """In which it failed."""
    engines: dict[int, str] = Field(default_factory=dict)
    """What the engine of each rank held then, of an update."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """That this rank had spent in each phase until then."""
    trace: str | None = None
    """A file with what the ranks did until then."""

    @staticmethod
    def of(error: BaseException) -> CallError:
        of_update = isinstance(error, UpdateError)
        known = {name: getattr(error, name) for name in _OF_UPDATES} if of_update else {}
        cause = kind_of(error)
        code = "update_failed" if of_update else cause if cause in _HINTS else "failed"
        message = str(error) or repr(error)
        return CallError(code=code, message=message, cause=cause, hint=_HINTS[code], **known)


class Job(Described):
    """One call of this rank's service."""

    id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    """For GET /v1/jobs/{id}."""
    call: str = Field(examples=["update"])
    checkpoint: str
    state: Literal["running", "done", "failed"] = "running"
    began: float = Field(default_factory=time.time)
    """Unix time."""
    seconds: float = 0.0
    """Until it ended, or until now."""
    error: CallError | None = None
    report: UpdateReport | None = None
    """Of an update that succeeded."""


class Jobs:
    """The calls of one rank. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._cancelled: dict[str, str] = {}
        self.on_end: Callable[[Job], None] = lambda job: None
        """Called with every job that ends, in the thread that ran it."""

    def start(
        self, call: str, checkpoint: str, action: Callable[[], Any]
    ) -> tuple[Job, Future[Any]]:
        """Begin it; the future is what ``action`` will have returned or raised.

        Raises:
            BusyError: too many are under way.
        """
        job = self._open(call, checkpoint)
        return job, begin(partial(self._perform, job, action), f"checkpoint-engine-{call}")

    def cancel(self, job_id: str, reason: str) -> Job | None:
        """Have a call end with ``reason``, a collective one on all ranks, at its next wait. The job
        as it is then; ``None``: there is none of that id."""
        with self._lock:
            if job_id in self._jobs and self._jobs[job_id].state == "running":
                self._cancelled.setdefault(job_id, reason)
        return self.find(job_id)

    def find(self, job_id: str) -> Job | None:
        return next((job for job in self.all() if job.id == job_id), None)

    def all(self) -> list[Job]:
        """The latest first."""
        with self._lock:
            jobs = [*reversed(self._jobs.values())]
        now = time.time()
        for place, job in enumerate(jobs):
            if job.state == "running":
                jobs[place] = job.model_copy(update={"seconds": max(0.0, now - job.began)})
        return jobs

    def _open(self, call: str, checkpoint: str) -> Job:
        job = Job(call=call, checkpoint=checkpoint)
        with self._lock:
            running = [one for one in self._jobs.values() if one.state == "running"]
            if len(running) >= _MOST_AT_ONCE:
                raise BusyError(f"{call} refused: {len(running)} calls are under way on this rank")
            self._jobs[job.id] = job
            ended = [job.id for job in self._jobs.values() if job.state != "running"]
            for forgotten in ended[:-_KEPT]:
                del self._jobs[forgotten]
        return job

    def _perform(self, job: Job, action: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        outcome: dict[str, Any] = {"state": "done"}
        try:
            with cancellable(lambda: self._cancelled.get(job.id, "")):
                result = action()
            outcome["report"] = result if isinstance(result, UpdateReport) else None
            return result
        except BaseException as error:
            outcome = {"state": "failed", "error": CallError.of(error)}
            raise
        finally:
            outcome["seconds"] = time.perf_counter() - began
            ended = job.model_copy(update=outcome)
            with self._lock:
                self._jobs[job.id] = ended
                self._cancelled.pop(job.id, None)
            self.on_end(ended)


class Status(Snapshot):
    """One rank's service."""

    version: str = __version__
    """Of the library."""
    jobs: list[Job]
    """Calls of this rank, the latest first."""
