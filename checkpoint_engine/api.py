"""One rank's ``ParameterServer`` over HTTP.

Every rank serves its own; a collective call (gather, update) is posted to all of them at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

from fastapi import FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from loguru import logger
from pydantic import BaseModel, Field

from checkpoint_engine.access import Access
from checkpoint_engine.client import request_inference_to_update
from checkpoint_engine.errors import AccessError, BusyError
from checkpoint_engine.metas_file import Metas, encode_metas

if TYPE_CHECKING:
    from checkpoint_engine.ps import ParameterServer

__all__ = ["_init_api", "request_inference_to_update"]

SocketPaths = list[tuple[str, str]]
Ranks = Annotated[list[int], Field(max_length=65_536)]
ShortText = Annotated[str, Field(max_length=4096)]
Name = Annotated[str, Path(max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")]

_LONGEST_UPDATE = 30 * 86_400.0
_SHOWN_ERRORS = 10


class RegisterRequest(BaseModel):
    """The files whose tensors this rank shall own."""

    files: Annotated[list[ShortText], Field(max_length=65_536)]


class UpdateRequest(BaseModel):
    """Which ranks take part, and which engine this rank asks to receive, if any."""

    ranks: Ranks = []
    """Empty: broadcast to all. Otherwise P2P to these."""
    update_url: ShortText | None = None
    """The engine's ``/collective_rpc``; null on ranks that are not the first of their engine."""
    inference_group_ranks: Ranks = []
    """The global ranks of that engine's workers. Empty: all."""
    timeout: float = Field(default=300.0, gt=0, le=_LONGEST_UPDATE)
    """Seconds that the whole update may take."""
    uds: ShortText | None = None
    """Path of the Unix socket that the engine listens on, where it is not TCP."""


def _init_api(ps: ParameterServer, access: Access | None = None) -> FastAPI:
    """The HTTP service of one rank's server.

    A call that fails answers 500, one that conflicts with a running call 409, one that names files
    that ``access`` does not allow 403, each with the error's text as a JSON string. The handlers
    run in threads, so that a long call does not hold up others.
    """
    rules = Access() if access is None else access
    ps.allowed_folders = rules.folders
    app = FastAPI(title="checkpoint-engine")
    app.add_exception_handler(RequestValidationError, _explain)

    @app.get("/v1/healthz")
    async def healthz() -> Response:
        return Response()

    @app.post("/v1/checkpoints/{name}/files")
    def register_files(name: Name, request: RegisterRequest) -> Response:
        return _answer(lambda: ps.register_checkpoint(name, files=request.files))

    @app.delete("/v1/checkpoints/{name}")
    def unregister_checkpoint(name: Name) -> Response:
        return _answer(lambda: ps.unregister_checkpoint(name))

    @app.post("/v1/checkpoints/{name}/gather-metas")
    def gather_metas(name: Name) -> Response:
        return _answer(lambda: ps.gather_metas(name))

    @app.post("/v1/checkpoints/{name}/update")
    def update(name: Name, request: UpdateRequest) -> Response:
        timeout = timedelta(seconds=request.timeout)
        ask_engine = _requester(request, rules)
        return _answer(lambda: ps.update(name, ask_engine, ranks=request.ranks, timeout=timeout))

    @app.get("/v1/metas", response_model=Metas)
    def get_metas() -> Response:
        return _answer(lambda: encode_metas(ps.get_metas()))

    @app.post("/v1/metas")
    def load_metas(metas: Metas) -> Response:
        return _answer(lambda: ps.load_metas(metas))

    return app


def _answer(call: Callable[[], object]) -> Response:
    """200 with the JSON bytes that ``call`` returns, if any, or the error that it raises."""
    try:
        result = call()
    except BusyError as error:
        return _failed(409, error)
    except AccessError as error:
        logger.warning("refused: {}", error)
        return _failed(403, error)
    except Exception as error:
        logger.exception("a request failed")
        return _failed(500, error)
    if isinstance(result, bytes):
        return Response(result, media_type="application/json")
    return Response()


def _failed(status: int, error: Exception) -> Response:
    text = str(error) or repr(error)
    return JSONResponse(text.encode(errors="replace").decode(), status_code=status)


def _explain(request: Request, error: Exception) -> Response:
    """What is wrong with a body, without sending it back."""
    assert isinstance(error, RequestValidationError)
    shown = [
        {key: problem[key] for key in ("loc", "msg", "type")}
        for problem in error.errors()[:_SHOWN_ERRORS]
    ]
    text = json.dumps({"detail": shown}, default=repr)  # ASCII: nothing in it fails to encode
    return Response(text, status_code=422, media_type="application/json")


def _requester(request: UpdateRequest, rules: Access) -> Callable[[SocketPaths], None]:
    """The ``req_func`` that asks the engine named in the request; without one it asks nobody.

    An engine that may not be asked fails the update, on all ranks, rather than this request alone:
    the other ranks would wait for this one.
    """

    def ask_engine(socket_paths: SocketPaths) -> None:
        if request.update_url is None:
            return
        rules.check_engine(request.update_url, request.uds)
        sockets = dict(_choose(socket_paths, request.inference_group_ranks))
        request_inference_to_update(request.update_url, sockets, request.timeout, request.uds)

    return ask_engine


def _choose(socket_paths: SocketPaths, ranks: list[int]) -> SocketPaths:
    unknown = [rank for rank in ranks if not 0 <= rank < len(socket_paths)]
    if unknown:
        raise ValueError(
            f"inference_group_ranks {unknown} are not ranks of a world of {len(socket_paths)}"
        )
    return [socket_paths[rank] for rank in ranks] if ranks else socket_paths
