"""The routes that only look: status, jobs, metrics, and the page at ``/``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from importlib import resources
from typing import Annotated

from fastapi import APIRouter, Path
from fastapi.responses import HTMLResponse, JSONResponse, Response

from checkpoint_engine.service.journal import Job, Journal
from checkpoint_engine.service.metrics import CONTENT_TYPE, Metrics
from checkpoint_engine.service.problems import Described, Problem
from checkpoint_engine.service.status import Status

_OWN_HOST_ONLY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


class ErrorAnswer(Described):
    """What the routes of this library answer when they fail; the original's answer a string."""

    error: Problem


def make_router(look: Callable[[], Status], journal: Journal) -> APIRouter:
    """Routes over what ``look`` finds and ``journal`` remembers."""
    router = APIRouter()
    metrics: Metrics | None = None
    with contextlib.suppress(ImportError):
        metrics = Metrics(look, journal)

    @router.get("/v1/status", summary="What this rank holds, does and did")
    def status() -> Status:
        return look()

    @router.get("/v1/jobs", summary="The calls of this rank, the latest first")
    def jobs() -> list[Job]:
        return journal.jobs()

    @router.get(
        "/v1/jobs/{id}",
        summary="One call",
        response_model=Job,
        responses={404: {"model": ErrorAnswer, "description": "There is no such job."}},
    )
    def job(id: Annotated[str, Path(description="As the call was answered.")]) -> object:
        hint = "only the last 100 that have ended are remembered, and none of before a restart"
        return journal.find(id) or _failed(404, "not_found", f"there is no job {id!r:.100}", hint)

    @router.get("/metrics", summary="Figures for Prometheus", response_class=Response)
    def prometheus() -> Response:
        if metrics is None:
            hint = "pip install 'checkpoint-engine[metrics]'"
            return _failed(501, "not_installed", "prometheus-client is not installed", hint)
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @router.get("/", include_in_schema=False)
    def page() -> Response:
        content = resources.files(__package__).joinpath("page.html").read_bytes()
        headers = {"Content-Security-Policy": _OWN_HOST_ONLY, "Cache-Control": "no-store"}
        return HTMLResponse(content, headers=headers)

    return router


def _failed(status: int, code: str, message: str, hint: str) -> Response:
    answer = ErrorAnswer(error=Problem(code=code, message=message, hint=hint))
    return JSONResponse(answer.model_dump(), status_code=status)
