"""Stands before the HTTP service: who may call it, how much a caller may send, and how slowly."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
"""How long a connection may take for the head of a request, from when it may begin."""
BODY_SECONDS = 60.0
MAX_CONNECTIONS = 256
"""Of one rank's service; the ones beyond are closed at once."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class _Refusal(Exception):  # noqa: N818  # an answer, not an error of ours
    def __init__(self, status: int, text: str, browser: bool = False) -> None:
        """``browser``: one may ask its user for the token."""
        super().__init__(text)
        self.status = status
        self.browser = browser


class Guard:
    """An ASGI application before ``app``, which sees only complete requests that may be made."""

    def __init__(self, app: App, token: str | None, max_body_bytes: int) -> None:
        """``token``: what a caller has to present as its bearer token; ``None``: nothing."""
        self._app = app
        self._token = token
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_token(scope)
            self._check_length(scope)
            body = await self._read(receive)
        except _Refusal as refusal:
            await _answer(send, refusal)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    def _check_token(self, scope: MutableMapping[str, Any]) -> None:
        if self._token is None:
            return
        given = _headers(scope, b"authorization")
        may_be_browser = scope["method"] == "GET" and _SHOWN.fullmatch(scope["path"]) is not None
        token = _token_in(given[0], may_be_browser) if len(given) == 1 else b""
        if not hmac.compare_digest(token, self._token.encode()):
            text = "this service wants its bearer token, which clients take from PS_HTTP_TOKEN"
            raise _Refusal(401, text, may_be_browser)

    def _check_length(self, scope: MutableMapping[str, Any]) -> None:
        for length in _headers(scope, b"content-length"):
            if not length.isdigit() or len(length) > 18 or int(length) > self._max_body_bytes:
                raise self._too_large()

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; ``None`` if the caller went away."""
        try:
            return await asyncio.wait_for(self._collect(receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            text = f"the body did not arrive within {BODY_SECONDS:g} s"
            raise _Refusal(408, text) from None

    async def _collect(self, receive: Receive) -> bytes | None:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> _Refusal:
        return _Refusal(413, f"a body may have {self._max_body_bytes} bytes here")


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


def _headers(scope: MutableMapping[str, Any], name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message; after it, what else the server has to say."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


async def _answer(send: Send, refusal: _Refusal) -> None:
    """Nothing more is read from the connection: it may be a body without end."""
    body = json.dumps(str(refusal)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refusal.browser:
        headers.append((b"www-authenticate", b'Basic realm="the token, as password"'))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which by itself waits for ever for the head of a request."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_answering():
            self._stop_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and not self._is_answering():
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_head(self) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
