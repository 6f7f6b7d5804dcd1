"""Who may call the HTTP service, what callers may name, how much they may send and how slowly."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import ipaddress
import os
import posixpath
import re
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from checkpoint_engine.client import parse_url
from checkpoint_engine.errors import AccessError

HEAD_SECONDS = 10.0
"""How long a connection may take for the head of its request."""
BODY_SECONDS = 60.0
MAX_CONNECTIONS = 256
"""Of one rank's service; while there are more, requests are answered with 503."""
CLOSE = [("connection", "close")]
"""Headers of every answer: a connection is for one request."""

_UNIX = "unix:"
_PORTS = {"http": 80, "https": 443}
_READ_BY_BROWSERS = re.compile(r"/|/metrics|/openapi\.json|/v1/(status|jobs(/[^/]*)?)")
"""What browsers may ask for: the page, and what it links to."""

# ---------------------------------------------------------------------- what callers may name

Place = tuple[tuple[str, str, int], str]
"""Of an engine: scheme, host and port; and the path. Of a Unix socket: ``unix:``, its path, 0."""


def check_url(text: str) -> str:
    """An engine's URL as it is, if errors and logs may show it. Raises ``ValueError``, which does
    not show it, if it has a password or a query, or is no plain http URL."""
    if "?" in text or "#" in text:
        raise ValueError("an engine's URL has no query and no fragment; a key is a header")
    parse_url(text)
    return text


def _place_of(text: str) -> Place:
    """Raises ``ValueError`` on what is no plain http URL, or hides where it leads."""
    if text.startswith(_UNIX):
        return (_UNIX, text.removeprefix(_UNIX), 0), "/"
    url = parse_url(check_url(text))
    path = unquote(url.path)
    hides = "\\" in path or "//" in path or posixpath.normpath(path) != (path.rstrip("/") or "/")
    if hides or not path.isprintable():
        raise ValueError(f"{text!r:.200}: its path is not in its plain form")
    return (url.scheme, url.host.rstrip("."), url.port or _PORTS[url.scheme]), path


@dataclass(frozen=True)
class Access:
    """``None`` allows everything; an empty tuple, nothing.

    Attributes:
        folders: real paths; only files in or below them may be registered.
        engines: only these, and what is below their paths, may be asked to receive.
    """

    folders: tuple[str, ...] | None = None
    engines: tuple[Place, ...] | None = None

    @staticmethod
    def of(allow_paths: Sequence[str] = (), allow_update_urls: Sequence[str] = ()) -> Access:
        """The rules of the options ``--allow-path`` and ``--allow-update-url``.

        Args:
            allow_paths: folders; none: every file.
            allow_update_urls: URLs that an ``update_url`` must be equal to or below, and
                ``unix:PATH`` for an engine on a Unix socket; none: every engine.

        Raises:
            ValueError: one is no folder, or no URL.
        """
        for path in allow_paths:
            if not os.path.isdir(path):
                raise ValueError(f"--allow-path {path}: there is no such folder")
        folders = tuple(map(os.path.realpath, allow_paths))
        return Access(folders or None, tuple(map(_place_of, allow_update_urls)) or None)

    def check_engine(self, url: str, uds: str | None) -> None:
        """Raises ``AccessError`` if that engine may not be asked. Of an engine on a Unix socket
        the URL says no more than the path."""
        if self.engines is None:
            return
        where = url if uds is None else f"{_UNIX}{uds}"
        try:
            server, path = _place_of(where)
        except ValueError as error:
            raise AccessError(str(error)) from error
        allowed = [folder.rstrip("/") for place, folder in self.engines if place == server]
        # Segment by segment: /a allows /a/b, not /ab.
        if not any(f"{path}/".startswith(f"{folder}/") for folder in allowed):
            raise AccessError(f"no engine may be asked at {where!r:.200} here")


# ---------------------------------------------------------------------- who may call


class Guard:
    """An ASGI application before ``app``, which sees only complete requests that may be made."""

    def __init__(
        self, app: ASGIApp, token: str | None, max_body_bytes: int, host: str = ""
    ) -> None:
        """
        Args:
            token: what a caller has to present as its bearer token; ``None``: nothing, but a
                browser may ask only for a page of this service itself.
            host: the name or address that is served at.
        """
        self._app = app
        self._token = token
        self._max_body_bytes = max_body_bytes
        self._names = {host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, answer = Request(scope, receive), self._app
        try:
            self._check_token(request)
            body = await asyncio.wait_for(self._read(request), BODY_SECONDS)
            receive = _replay(body, receive)
        except asyncio.TimeoutError:
            answer = JSONResponse(f"the body did not arrive within {BODY_SECONDS:g} s", 408)
        except ClientDisconnect:
            return
        except HTTPException as refusal:
            answer = JSONResponse(refusal.detail, refusal.status_code, refusal.headers)
        try:
            await answer(scope, receive, send)
        except asyncio.CancelledError:  # else uvicorn logs a traceback for each call that runs
            await JSONResponse("this server is shutting down", 503)(scope, receive, send)

    def _check_token(self, request: Request) -> None:
        if self._token is None:
            _check_site(request, self._names)
            return
        given = request.headers.getlist("authorization")
        # Not request.url.path: some releases of starlette parse that out of the header Host, too.
        is_read = _READ_BY_BROWSERS.fullmatch(request.scope["path"]) is not None
        may_be_browser = request.method == "GET" and is_read
        token = _token_in(given[0], may_be_browser) if len(given) == 1 else b""
        if not hmac.compare_digest(token, self._token.encode()):
            text = "this service wants its bearer token, which clients take from PS_HTTP_TOKEN"
            challenge = 'Basic realm="the token, as password"' if may_be_browser else "Bearer"
            raise HTTPException(401, text, {"www-authenticate": challenge})

    async def _read(self, request: Request) -> bytes:
        """The whole body."""
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_body_bytes:
                raise HTTPException(413, f"a body may have {self._max_body_bytes} bytes here")
        return bytes(body)


def _check_site(request: Request, names: Collection[str]) -> None:
    """Refuse what another site has a browser ask for: under a name that it has made lead here (DNS
    rebinding), or from a page of its own. Other programs send neither header."""
    host = request.headers.get("host", "localhost").lower()
    if not _is_own_name(host, names):
        text = "without a token this service is asked by an address or a name of its own host alone"
        raise HTTPException(403, f"{text}, not as {host!r:.200}")
    origin = request.headers.get("origin")
    site = request.headers.get("sec-fetch-site", "none")
    follows_link = request.method == "GET" and request.headers.get("sec-fetch-mode") == "navigate"
    is_own_page = origin is None or origin.lower().partition("://")[2] == host
    if not is_own_page or not (site in ("none", "same-origin") or follows_link):
        raise HTTPException(403, f"refused: a page of {origin or 'another site'!r:.200} asks")


def _is_own_name(host: str, names: Collection[str]) -> bool:
    """Whether no stranger can have made the name lead here. Addresses are no names, and names
    without a dot are not in the public DNS."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return bool(name) and ("." not in name or name.endswith(".localhost") or name in names)


def _token_in(authorization: str, may_be_browser: bool) -> bytes:
    """The token that a caller presents. Browsers send one as a password, which is good for looking
    only: they would send it with another site's requests, too."""
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return given.strip().encode()
    if scheme.lower() == "basic" and may_be_browser:
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
