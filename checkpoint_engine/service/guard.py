"""Stands before the HTTP service: who may call it, how much a caller may send, and how slowly."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import re
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
"""How long a connection may take for the head of its request."""
BODY_SECONDS = 60.0
MAX_CONNECTIONS = 256
"""Of one rank's service; while there are more, requests are answered with 503."""
CLOSE = [("connection", "close")]
"""Headers of every answer: a connection is for one request."""


class Guard:
    """An ASGI application before ``app``, which sees only complete requests that may be made."""

    def __init__(self, app: ASGIApp, token: str | None, max_body_bytes: int) -> None:
        """``token``: what a caller has to present as its bearer token; ``None``: nothing."""
        self._app = app
        self._token = token
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = self._app
        try:
            self._check_token(scope)
            body = await asyncio.wait_for(self._read(receive), BODY_SECONDS)
            receive = _replay(body, receive)
        except asyncio.TimeoutError:
            answer = JSONResponse(f"the body did not arrive within {BODY_SECONDS:g} s", 408)
        except HTTPException as refusal:
            answer = JSONResponse(refusal.detail, refusal.status_code, refusal.headers)
        await answer(scope, receive, send)

    def _check_token(self, scope: Scope) -> None:
        if self._token is None:
            return
        given = [value for key, value in scope["headers"] if key == b"authorization"]
        may_be_browser = scope["method"] == "GET" and _SHOWN.fullmatch(scope["path"]) is not None
        token = _token_in(given[0], may_be_browser) if len(given) == 1 else b""
        if not hmac.compare_digest(token, self._token.encode()):
            text = "this service wants its bearer token, which clients take from PS_HTTP_TOKEN"
            challenge = 'Basic realm="the token, as password"' if may_be_browser else "Bearer"
            raise HTTPException(401, text, {"www-authenticate": challenge})

    async def _read(self, receive: Receive) -> bytes:
        """The whole body."""
        body = bytearray()
        while (message := await receive())["type"] != "http.disconnect":
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise HTTPException(413, f"a body may have {self._max_body_bytes} bytes here")
            if not message.get("more_body", False):
                return bytes(body)
        raise HTTPException(400, "the caller went away")  # nobody will read it


_SHOWN = re.compile(r"/|/metrics|/openapi\.json|/v1/(status|jobs(/[^/]*)?)")
"""What browsers may ask for: the page, and what it links to."""


def _token_in(authorization: bytes, may_be_browser: bool) -> bytes:
    """The token that a caller presents. Browsers send one as a password, which is good for looking
    only: they would send it with another site's requests, too."""
    scheme, _, given = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return given.strip()
    if scheme.lower() == b"basic" and may_be_browser:
        with contextlib.suppress(ValueError):
            return base64.b64decode(given, validate=True).partition(b":")[2]
    return b""


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message; after it, what else the server has to say."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which by itself waits for ever for the head of a request.

    Answers have the headers ``CLOSE``, so that a connection has one head to wait for.
    """

    scope: Any  # None until the head is complete

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        asyncio.get_running_loop().call_later(HEAD_SECONDS, self._close_without_head)

    def _close_without_head(self) -> None:
        if self.scope is None:
            self.transport.abort()
