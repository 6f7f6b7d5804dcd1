"""The routes of one rank's ``ParameterServer``.

Every rank serves its own; a collective call (gather, update) is posted to all of them at once.

Handlers never block the event loop: calls run in threads of their own, bodies are parsed in others.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, FastAPI, Path, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from loguru import logger
from pydantic import (
    AfterValidator,
    BaseModel,
    FailFast,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from checkpoint_engine import __version__
from checkpoint_engine.client import REQUESTS, request_inference_to_update
from checkpoint_engine.errors import AccessError, BusyError
from checkpoint_engine.ground.progress import Progress
from checkpoint_engine.service.access import Access, check_url
from checkpoint_engine.service.jobs import CallError, Job, Jobs, Status
from checkpoint_engine.service.metrics import CONTENT_TYPE, Metrics
from checkpoint_engine.settings import LONGEST_UPDATE
from checkpoint_engine.update.snapshot import Described
from checkpoint_engine.world.metas_file import Metas, encode_metas, read_metas

if TYPE_CHECKING:
    from checkpoint_engine.ps import ParameterServer

T = TypeVar("T")
Body = TypeVar("Body", bound=BaseModel)
Ranks = Annotated[list[int], FailFast(), Field(max_length=65_536)]
ShortText = Annotated[str, Field(max_length=4096)]
EngineUrl = Annotated[ShortText, AfterValidator(check_url)]
Name = Annotated[str, Path(max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")]

Wait = Annotated[bool, Query(description="false: answer at once, with a job of GET /v1/jobs.")]
_meeting = Query(gt=0, le=LONGEST_UPDATE, description="Seconds for all ranks to meet; else 600.")
GatherTimeout = Annotated[float | None, _meeting]
WithReport = Annotated[bool, Query(description="true: answer with the report of the update.")]

JobId = Annotated[str, Path(description="As the call was answered.")]
_LONG_CALL: dict[int | str, dict[str, Any]] = {
    200: {"description": "It is done. Empty, unless a report was asked for."},
    202: {"model": Job, "description": "It has begun; only with wait=false."},
    403: {"model": str, "description": "The service was told not to touch that file or engine."},
    409: {"model": str, "description": "It conflicts with a call that is still running."},
    500: {"model": str, "description": "It failed; the error's text."},
}
_DESCRIPTION = """One rank's ParameterServer. Every rank serves its own; collective calls (gather,
update) are posted to all of them at once. Errors of the routes below /v1/checkpoints and /v1/metas
are a JSON string, as the original's; those of the others an object with code, message and hint."""
# FastAPI's pages run scripts of another host, which could do all that a caller can.
_ABOUT: dict[str, Any] = {"description": _DESCRIPTION, "docs_url": None, "redoc_url": None}
_REFUSED = {"busy": 409, "forbidden": 403}
_SHOWN_ERRORS = 10
_JSON_TYPE = re.compile(r"application/([\w.-]+\+)?json\s*(;|$)")
_LONGEST_REASON = 1000
_MEETING = ("start", "plan")
"""The phases of an update in which a rank may wait for others that do not come."""
_OWN_HOST_ONLY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


class RegisterRequest(Described):
    """The files whose tensors this rank shall own."""

    files: Annotated[list[ShortText], FailFast()] = Field(
        max_length=65_536, examples=[["/models/step-1/m.safetensors"]]
    )
    """safetensors files, or .npy files with their .meta, on the server's host. A folder stands for
    all files of its checkpoint; an index among the files selects tensors."""


class UpdateRequest(Described):
    """Which ranks take part, and which engine this rank asks to receive, if any."""

    ranks: Ranks = Field([])
    """Empty: broadcast to all. Otherwise P2P to these."""
    update_url: EngineUrl | None = Field(None, examples=["http://localhost:19730/collective_rpc"])
    """The engine's /collective_rpc, or with engine_kind the engine itself; null on ranks that are
    not the first of their engine."""
    engine_kind: Literal["vllm", "sglang", "lmdeploy"] | None = None
    """vllm: with the plug-in, and /weight_info then tells the checkpoint's name, or with the worker
    extension. null: vLLM with the worker extension."""
    engine_headers: dict[ShortText, ShortText] | None = None
    """With every request to the engine, as an API key; with engine_kind. null: the bearer token in
    the server's PS_ENGINE_TOKEN, if any."""
    inference_group_ranks: Ranks = Field([])
    """The global ranks of that engine's workers. Empty: all."""
    timeout: float = Field(300.0, gt=0, le=LONGEST_UPDATE)
    """Seconds that the whole update may take."""
    uds: ShortText | None = None
    """Path of the Unix socket that the engine listens on, where it is not TCP."""

    @model_validator(mode="after")
    def _check_headers(self) -> UpdateRequest:
        if self.engine_headers and self.engine_kind is None:
            raise ValueError("engine_headers needs engine_kind")
        return self


class ErrorAnswer(Described):
    """What the routes of this library answer when they fail; the original's answer a string."""

    error: CallError


_NO_JOB: dict[int | str, dict[str, Any]] = {404: {"model": ErrorAnswer, "description": "Unknown"}}


def make_app(ps: ParameterServer, access: Access | None = None) -> FastAPI:
    """The HTTP service of one rank's server.

    A call that fails answers 500, one that conflicts with a running call 409, one that names files
    that ``access`` does not allow 403, each with the error's text as a JSON string.
    """
    rules = Access() if access is None else access
    ps.allowed_folders = rules.folders
    app = FastAPI(title="checkpoint-engine", version=__version__, **_ABOUT)
    app.add_exception_handler(RequestValidationError, _explain)
    jobs = Jobs()
    _add_calls(app, ps, rules, jobs)
    app.include_router(_views(lambda: Status(**dict(ps.snapshot()), jobs=jobs.all()), jobs))
    return app


def _add_calls(app: FastAPI, ps: ParameterServer, rules: Access, jobs: Jobs) -> None:
    """The routes that do something."""
    calls = APIRouter(prefix="/v1/checkpoints/{name}", responses=_LONG_CALL)

    async def do(
        request: Request,
        call: str,
        name: str,
        action: Callable[[], object],
        wait: bool = True,
        report: bool = False,
    ) -> Response:
        try:
            job, done = jobs.start(call, name, action)
        except BusyError as error:
            return _refused(error)
        if not wait:
            return _json(job, 202)
        await _until_done(request, done, lambda: _cancel_meeting(ps, jobs, job))
        if report:
            return _answer(lambda: done.result().model_dump_json().encode())
        return _answer(done.result)

    @app.get("/v1/healthz", summary="Whether this rank answers, also during an update")
    async def healthz() -> Response:
        return Response()

    @calls.post("/files", summary="Register files", openapi_extra=_takes(RegisterRequest))
    async def register_files(name: Name, request: Request, wait: Wait = True) -> Response:
        files = (await _body(request, RegisterRequest)).files
        register = partial(ps.register_checkpoint, name, files=files, on_progress=_draw_nothing)
        return await do(request, "register", name, register, wait)

    @calls.delete("", summary="Free this rank's part of a checkpoint")
    async def unregister_checkpoint(name: Name, request: Request) -> Response:
        return await do(request, "unregister", name, partial(ps.unregister_checkpoint, name))

    @calls.post("/gather-metas", summary="Learn who owns what; post it to all ranks")
    async def gather_metas(
        name: Name, request: Request, wait: Wait = True, timeout: GatherTimeout = None
    ) -> Response:
        limit = {} if timeout is None else {"timeout": timedelta(seconds=timeout)}
        return await do(request, "gather", name, partial(ps.gather_metas, name, **limit), wait)

    @calls.post(
        "/update",
        summary="Send a checkpoint to the engines; post it to all ranks",
        openapi_extra=_takes(UpdateRequest),
    )
    async def update(
        name: Name, request: Request, wait: Wait = True, report: WithReport = False
    ) -> Response:
        order = await _body(request, UpdateRequest)
        try:
            if order.update_url is not None:
                rules.check_engine(order.update_url, order.uds)
        except AccessError as error:
            return _refused(error)

        def send() -> object:
            timeout = timedelta(seconds=order.timeout)
            ask = partial(_ask_engine, order, name)
            return ps.update(
                name, ask, ranks=order.ranks, timeout=timeout, on_progress=_draw_nothing
            )

        return await do(request, "update", name, send, wait, report)

    @app.get("/v1/metas", response_model=Metas, summary="Who owns what, as gathered last")
    def get_metas() -> Response:
        return _answer(lambda: encode_metas(ps.get_metas()))

    @app.post(
        "/v1/metas",
        summary="Take over another world's metas, to read its memory by P2P",
        openapi_extra=_takes(Metas),
    )
    async def load_metas(request: Request) -> Response:
        metas = await _parsed(request, read_metas)
        return await do(request, "load metas", "", partial(ps.load_metas, metas))

    app.include_router(calls)


def _views(read: Callable[[], Status], jobs: Jobs) -> APIRouter:
    """The routes that only read: status, jobs, metrics, and the page at ``/``."""
    views = APIRouter(tags=["status"])
    metrics: Metrics | None = None
    with contextlib.suppress(ImportError):
        metrics = Metrics(read, jobs)

    @views.get("/v1/status", summary="What this rank holds, does and did")
    def status() -> Status:
        return read()

    @views.get("/v1/jobs", summary="The calls of this rank, the latest first")
    def list_jobs() -> list[Job]:
        return jobs.all()

    @views.get("/v1/jobs/{id}", summary="One call", response_model=Job, responses=_NO_JOB)
    def job(id: JobId) -> object:
        return jobs.find(id) or _no_job(id)

    @views.delete("/v1/jobs/{id}", summary="Cancel one call", response_model=Job, responses=_NO_JOB)
    def cancel(id: JobId) -> object:
        """A collective call ends on all ranks. The job as it is then: it runs on until its next
        wait."""
        return jobs.cancel(id, "it was cancelled") or _no_job(id)

    @views.get("/metrics", summary="Figures for Prometheus", response_class=Response)
    def prometheus() -> Response:
        if metrics is None:
            hint = "pip install 'checkpoint-engine[metrics]'"
            return _failed(501, "not_installed", "prometheus-client is not installed", hint)
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @views.get("/", include_in_schema=False)
    def page() -> Response:
        content = resources.files(__package__).joinpath("page.html").read_bytes()
        headers = {"Content-Security-Policy": _OWN_HOST_ONLY, "Cache-Control": "no-store"}
        return HTMLResponse(content, headers=headers)

    return views


def _takes(body: Any) -> dict[str, Any]:
    """The description of a body that a handler reads by itself, for openapi.json."""
    schema = TypeAdapter(body).json_schema(ref_template="#/components/schemas/{model}")
    # FastAPI describes types of answers; those of these bodies alone stand where they are used.
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def _body(request: Request, kind: type[Body]) -> Body:
    return await _parsed(request, kind.model_validate_json)


async def _parsed(request: Request, parse: Callable[[bytes], T]) -> T:
    """What ``parse`` makes of the body, in a thread.

    Raises:
        RequestValidationError: it is not what the route takes.
    """
    if not _JSON_TYPE.match(request.headers.get("content-type", "application/json").lower()):
        raise _wrong_body("Content-Type must be application/json")
    data = await request.body()
    try:
        return await run_in_threadpool(parse, data)
    except ValidationError as error:
        wrong_values = error.errors(include_url=False, include_context=False, include_input=False)
        found = [{**one, "loc": ("body", *_public(one["loc"]))} for one in wrong_values]
        raise RequestValidationError(found) from None
    except ValueError as error:
        raise _wrong_body(str(error)) from None


def _public(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Where a wrong value stands, without the names of headers: one may be a key."""
    is_header = loc[:1] == ("engine_headers",)
    return loc[:1] if is_header else loc


def _wrong_body(reason: str) -> RequestValidationError:
    wrong = {"loc": ["body"], "msg": reason[:_LONGEST_REASON], "type": "json_invalid"}
    return RequestValidationError([wrong])


async def _until_done(request: Request, done: Future[Any], leave: Callable[[], object]) -> None:
    """Wait for a call; ``leave`` if the client goes away meanwhile."""
    ended = asyncio.wrap_future(done)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({ended, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            leave()
        await asyncio.wait({ended})
        ended.exception()  # it is looked at where the answer is made
    finally:
        gone.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _cancel_meeting(ps: ParameterServer, jobs: Jobs, job: Job) -> None:
    """The client may have asked this rank alone, and the others never will come. Once the ranks
    have met, an update ends by itself; to end it now would leave engines partly written. A
    registration keeps nobody waiting."""
    now = ps.progress
    have_met = now is not None and now.call == "update" and now.phase not in _MEETING
    if job.call in ("gather", "update") and not have_met:
        jobs.cancel(job.id, "the client that asked for it has gone away")


def _no_job(job_id: str) -> Response:
    hint = "only the last 100 that have ended are remembered, and none of before a restart"
    return _failed(404, "not_found", f"there is no job {job_id!r:.100}", hint)


def _failed(status: int, code: str, message: str, hint: str) -> Response:
    return _json(ErrorAnswer(error=CallError(code=code, message=message, hint=hint)), status)


def _json(content: Described, status: int) -> Response:
    return Response(content.model_dump_json(), status, media_type="application/json")


def _answer(call: Callable[[], object]) -> Response:
    """200 with the JSON bytes that ``call`` returns, if any, or the error that it raises."""
    try:
        result = call()
    except Exception as error:
        return _refused(error)
    if isinstance(result, bytes):
        return Response(result, media_type="application/json")
    return Response()


def _refused(error: Exception) -> Response:
    failure = CallError.of(error)
    status = _REFUSED.get(failure.code, 500)
    if status == 500:
        is_known = failure.code != "failed"  # then its text says what to do about it
        told = logger.opt(exception=None if is_known else error)
        told.error("a request failed: {}", failure.message)
    elif status == 403:
        logger.warning("refused: {}", error)
    # The body has the text alone, as the original's; this library's command line reads the rest.
    about = {"x-error-code": failure.code, "x-error-cause": failure.cause}
    about |= {"x-error-hint": failure.hint} if failure.hint else {}
    return JSONResponse(failure.message.encode(errors="replace").decode(), status, about)


def _explain(request: Request, error: Exception) -> Response:
    """What is wrong with a body, without sending it back."""
    assert isinstance(error, RequestValidationError)
    wrong = error.errors()[:_SHOWN_ERRORS]
    shown = [{key: one[key] for key in ("loc", "msg", "type")} for one in wrong]
    text = json.dumps({"detail": shown}, default=repr)  # ASCII: nothing in it fails to encode
    return Response(text, status_code=422, media_type="application/json")


def _draw_nothing(_: Progress) -> None:
    """The callers draw bars, on what may be the same terminal."""


def _ask_engine(
    request: UpdateRequest, checkpoint: str, socket_paths: list[tuple[str, str]]
) -> None:
    """Ask the engine that the request names, if it names one."""
    if request.update_url is None:
        return
    ranks = request.inference_group_ranks or range(len(socket_paths))
    if unknown := [rank for rank in ranks if not 0 <= rank < len(socket_paths)]:
        text = f"inference_group_ranks {unknown} are not ranks of a world of {len(socket_paths)}"
        raise ValueError(text)
    sockets = dict(socket_paths[rank] for rank in ranks)
    if request.engine_kind is None:
        request_inference_to_update(request.update_url, sockets, request.timeout, request.uds)
        return
    options: dict[str, Any] = {"inference_parallel_size": len(sockets), "rank": 0}
    options |= {"timeout": request.timeout, "uds": request.uds, "headers": request.engine_headers}
    if request.engine_kind == "vllm":
        options["weight_version"] = checkpoint
    REQUESTS[request.engine_kind](request.update_url, **options)(list(sockets.items()))
