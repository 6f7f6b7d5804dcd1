"""One rank's ``ParameterServer`` over HTTP.

Every rank serves its own; a collective call (gather, update) is posted to all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from loguru import logger
from pydantic import BaseModel, Field

from checkpoint_engine.client import request_inference_to_update
from checkpoint_engine.errors import BusyError
from checkpoint_engine.metas_file import Metas, encode_metas

if TYPE_CHECKING:
    from checkpoint_engine.ps import ParameterServer

__all__ = ["_init_api", "request_inference_to_update"]

SocketPaths = list[tuple[str, str]]


class RegisterRequest(BaseModel):
    """The files whose tensors this rank shall own."""

    files: list[str]


class UpdateRequest(BaseModel):
    """Which ranks take part, and which engine this rank asks to receive, if any."""

    ranks: list[int] = []
    """Empty: broadcast to all. Otherwise P2P to these."""
    update_url: str | None = None
    """The engine's ``/collective_rpc``; null on ranks that are not the first of their engine."""
    inference_group_ranks: list[int] = []
    """The global ranks of that engine's workers. Empty: all."""
    timeout: float = Field(default=300.0, gt=0)
    """Seconds that the whole update may take."""
    uds: str | None = None
    """Path of the Unix socket that the engine listens on, where it is not TCP."""


def _init_api(ps: ParameterServer) -> FastAPI:
    """The HTTP service of one rank's server.

    A call that fails answers 500, one that conflicts with a running call 409, both with the error's
    text as a JSON string. The handlers run in threads, so that a long call does not hold up others.
    """
    app = FastAPI(title="checkpoint-engine")

    @app.get("/v1/healthz")
    async def healthz() -> Response:
        return Response()

    @app.post("/v1/checkpoints/{name}/files")
    def register_files(name: str, request: RegisterRequest) -> Response:
        return _answer(lambda: ps.register_checkpoint(name, files=request.files))

    @app.delete("/v1/checkpoints/{name}")
    def unregister_checkpoint(name: str) -> Response:
        return _answer(lambda: ps.unregister_checkpoint(name))

    @app.post("/v1/checkpoints/{name}/gather-metas")
    def gather_metas(name: str) -> Response:
        return _answer(lambda: ps.gather_metas(name))

    @app.post("/v1/checkpoints/{name}/update")
    def update(name: str, request: UpdateRequest) -> Response:
        timeout = timedelta(seconds=request.timeout)
        return _answer(
            lambda: ps.update(name, _requester(request), ranks=request.ranks, timeout=timeout)
        )

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
        return JSONResponse(str(error), status_code=409)
    except Exception as error:
        logger.exception("a request failed")
        return JSONResponse(str(error) or repr(error), status_code=500)
    if isinstance(result, bytes):
        return Response(result, media_type="application/json")
    return Response()


def _requester(request: UpdateRequest) -> Callable[[SocketPaths], None]:
    """The ``req_func`` that asks the engine named in the request; without one it asks nobody."""

    def ask_engine(socket_paths: SocketPaths) -> None:
        if request.update_url is None:
            return
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
