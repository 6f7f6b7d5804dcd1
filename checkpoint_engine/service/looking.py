"""The routes that only look: status, jobs, metrics, and the page at ``/``."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Path
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel

from checkpoint_engine.service.journal import Job, Journal
from checkpoint_engine.service.metrics import CONTENT_TYPE, Metrics
from checkpoint_engine.service.problems import Problem
from checkpoint_engine.service.status import Status, status_of

if TYPE_CHECKING:
    from checkpoint_engine.ps import ParameterServer

_OWN_HOST_ONLY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


class ErrorAnswer(BaseModel):
    """What the routes of this library answer when they fail; the original's answer a string."""

    error: Problem


def make_router(ps: ParameterServer, journal: Journal) -> APIRouter:
    """Routes over what ``ps`` holds and ``journal`` remembers."""
    router = APIRouter()
    metrics = _make_metrics(ps, journal)
    unknown: dict[int | str, dict[str, Any]] = {
        404: {"model": ErrorAnswer, "description": "There is no such job."}
    }

    @router.get("/v1/status", summary="What this rank holds, does and did")
    def status() -> Status:
        return status_of(ps, journal)

    @router.get("/v1/jobs", summary="The calls of this rank, the latest first")
    def jobs() -> list[Job]:
        return journal.jobs()

    @router.get("/v1/jobs/{id}", summary="One call", response_model=Job, responses=unknown)
    def job(id: Annotated[str, Path(description="As the call was answered.")]) -> object:
        found = journal.find(id)
        return found if found is not None else failed(404, _unknown_job(id))

    @router.get("/metrics", summary="Figures for Prometheus", response_class=Response)
    def prometheus() -> Response:
        if metrics is None:
            return failed(501, _NO_CLIENT)
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @router.get("/", include_in_schema=False)
    def page() -> Response:
        content = resources.files(__package__).joinpath("page.html").read_bytes()
        headers = {"Content-Security-Policy": _OWN_HOST_ONLY, "Cache-Control": "no-store"}
        return HTMLResponse(content, headers=headers)

    return router


def failed(status: int, problem: Problem) -> Response:
    """An error as JSON with a code and a hint."""
    return JSONResponse(ErrorAnswer(error=problem).model_dump(), status_code=status)


def _make_metrics(ps: ParameterServer, journal: Journal) -> Metrics | None:
    try:
        return Metrics(ps, journal)
    except ImportError:
        return None


def _unknown_job(job_id: str) -> Problem:
    return Problem(
        code="not_found",
        message=f"there is no job {job_id!r:.100}",
        hint="only the last 100 that have ended are remembered, and none of before a restart",
    )


_NO_CLIENT = Problem(
    code="not_installed",
    message="prometheus-client is not installed",
    hint="pip install 'checkpoint-engine[metrics]'",
)
