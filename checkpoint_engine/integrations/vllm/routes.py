"""vLLM's own routes of weight transfer with a token, and without ``VLLM_SERVER_DEV_MODE``: an entry
point of the group ``vllm.endpoint_plugins``.

vLLM loads it only where ``VLLM_PLUGINS`` names ``checkpoint_engine``. Requests need the bearer
token in ``PS_ENGINE_TOKEN`` of the engine's environment.
"""

from __future__ import annotations

import importlib
import secrets
from typing import Any

import vllm
from fastapi import Depends, FastAPI, HTTPException, Request

from checkpoint_engine import settings
from checkpoint_engine.client import BACKEND

_TRANSFER = ("rl.online.api_router", "serve.dev.rlhf.api_router")  # from 0.32 on, and before
_OTHERS = ("serve.dev.cache.api_router", "serve.dev.server_info.api_router")


class TransferRoutes:
    """``/pause``, ``/start_weight_update``, ``/update_weights`` and those beside them,
    ``/reset_prefix_cache`` and its like, ``/server_info``. Made by vLLM's API server."""

    name = BACKEND
    required_tasks = None

    def __init__(self) -> None:
        """Raises ``RuntimeError`` without a token, or if vLLM's routes are not where they were."""
        self._token = settings.engine_token()
        if not self._token:
            raise RuntimeError("set PS_ENGINE_TOKEN: without it these routes are open to everybody")
        self._routers = [_router(*_TRANSFER), *map(_router, _OTHERS)]

    def attach_router(self, app: FastAPI) -> None:
        for router in self._routers:
            app.include_router(router, dependencies=[Depends(self._check_token)])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Nothing to do: the routes find the engine where vLLM's find it."""

    async def _check_token(self, request: Request) -> None:
        sent = request.headers.get("authorization", "")
        if not secrets.compare_digest(sent.encode(), f"Bearer {self._token}".encode()):
            raise HTTPException(401, "this route wants the bearer token of PS_ENGINE_TOKEN")


def _router(*modules: str) -> Any:
    for module in modules:
        try:
            return importlib.import_module(f"vllm.entrypoints.{module}").router
        except (ImportError, AttributeError):
            continue
    raise RuntimeError(
        f"vLLM {vllm.__version__} has no {modules[0]}: the plug-in knows 0.26 to 0.33; set "
        "VLLM_SERVER_DEV_MODE=1 for vLLM's routes without a token"
    )
