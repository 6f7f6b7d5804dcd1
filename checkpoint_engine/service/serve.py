"""Serve one rank's ``ParameterServer`` over HTTP: on a Unix socket, or on TCP with a token."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loguru import logger

from checkpoint_engine import settings
from checkpoint_engine.ground.deadline import Deadline
from checkpoint_engine.service.access import Access

_SHUTDOWN_SECONDS = 5
_LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class ServeOptions:
    """Where to serve, and to whom. Either ``uds`` or ``port``.

    Attributes:
        uds: path of a Unix socket that only this user can reach.
        host, port: TCP. 0: any free port.
        token: what callers have to present as their bearer token; see ``read_token``. Over TCP it
            is needed, unless ``allow_anyone``.
        allow_anyone: serve TCP without a token.
        access: which files may be registered, and which engines asked.
        max_body_bytes: of a request. The default has room for the metas of half a million tensors.
    """

    uds: str | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    token: str | None = field(default=None, repr=False)
    allow_anyone: bool = False
    access: Access = field(default_factory=Access)
    max_body_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if (self.uds is None) == (self.port is None):
            raise ValueError("serve either on a Unix socket (--uds) or on a TCP port (--port)")
        # The kernel takes an empty path for a name of its choice that every user can reach.
        if not self.host or (self.uds is not None and not self.uds.strip("\0")):
            raise ValueError("the socket's path and the host to serve at must not be empty")
        if self.port is not None and not 0 <= self.port < 1 << 16:
            raise ValueError(f"{self.port} is no TCP port")
        if self.port is not None and self.token is None and not self.allow_anyone:
            raise ValueError(
                "TCP is open to others: give a token (or PS_HTTP_TOKEN), or --no-token"
            )
        if self.token is not None and not re.fullmatch("[!-~]{16,}", self.token):
            raise ValueError(
                "a token has at least 16 ASCII characters and no space: `openssl rand -hex 32`"
            )


def read_token(token_file: str | os.PathLike[str] | None = None) -> str | None:
    """The bearer token from ``token_file``, or else from ``PS_HTTP_TOKEN``; ``None`` without both.

    Raises:
        ValueError: the file cannot be read.
    """
    if token_file is None:
        return settings.http_token() or None
    path = Path(token_file)
    try:
        if path.stat().st_mode & stat.S_IROTH:
            logger.warning("every user of this machine can read the token in {}", path)
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        raise ValueError(f"the token file cannot be read: {error}") from error


def serve(options: ServeOptions, rank: int, world_size: int) -> None:
    """Make this rank's server and answer requests until SIGINT, SIGTERM or SIGHUP, which exit.

    Called in the main thread of its own process, by every rank, or alone as a world of one.

    Raises:
        OSError: the socket or port cannot be had.
    """
    import uvicorn

    # uvicorn shuts down on either, then raises it again: without this the process would end there,
    # or asyncio would miss it.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # its terminal is closed, without nohup
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    uds = options.uds
    with listen_tcp(options.host, options.port or 0) if uds is None else listen(uds) as listener:
        from checkpoint_engine.ps import ParameterServer
        from checkpoint_engine.service.app import make_app

        server = ParameterServer(rank=rank, world_size=world_size)
        app = make_app(server, options.access)
        place = uds or "http://{}:{}".format(*listener.getsockname()[:2])
        logger.info("rank {} of {} serves on {}", rank, world_size, place)
        uvicorn.Server(uvicorn_config(app, options)).run(sockets=[listener])


def uvicorn_config(app: Any, options: ServeOptions) -> Any:
    """uvicorn's configuration for ``app`` behind the limits of ``options``."""
    import uvicorn

    from checkpoint_engine.service.access import CLOSE, MAX_CONNECTIONS, Guard, ImpatientProtocol

    return uvicorn.Config(
        Guard(app, options.token, options.max_body_bytes, "" if options.uds else options.host),
        http=ImpatientProtocol,
        headers=CLOSE,
        limit_concurrency=MAX_CONNECTIONS,
        ws="none",
        loop="asyncio",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        log_level="warning",
    )


def listen_tcp(host: str, port: int) -> socket.socket:
    """A listening TCP socket, IPv4 or IPv6 as ``host`` says."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    return socket.create_server(address, family=family, dualstack_ipv6=dual)


@contextlib.contextmanager
def listen(path: str) -> Iterator[socket.socket]:
    """A listening socket at ``path`` that only this user can reach, until the block ends.

    A socket that a dead server left there is replaced.

    Raises:
        OSError: a live server or another kind of file is there, or the path cannot be used.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        # The file that bind makes inherits this mode, so it is never open to others.
        os.fchmod(listener.fileno(), 0o600)
        with _folder_locked(path):
            _remove_stale(path)
            listener.bind(path)
            listener.listen()
        try:
            yield listener
        finally:
            # Before it is closed: another server may replace it then, and keep its own.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


@contextlib.contextmanager
def _folder_locked(path: str) -> Iterator[None]:
    """Keep other servers from testing and replacing the socket at the same time.

    Anybody who can read the folder can hold this lock: nobody is waited for long.
    """
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    deadline = Deadline(_LOCK_SECONDS)
    try:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            deadline.check("whoever holds a lock on the socket's folder")
            time.sleep(0.01)
        yield
    finally:
        os.close(folder)


def _remove_stale(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError("a file that is not a socket is there")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(_LOCK_SECONDS)
            if probe.connect_ex(path) != errno.ECONNREFUSED:
                text = "another server listens there; give each rank its own path: put {rank} in it"
                raise FileExistsError(text)
        os.unlink(path)
