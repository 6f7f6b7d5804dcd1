"""What a caller of the HTTP service may name: pure rules, made from the command line's options."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from checkpoint_engine.errors import AccessError

_UNIX = "unix:"
_PORTS = {"http": 80, "https": 443}

Place = tuple[tuple[str, str, int], str]
"""Of an engine: scheme, host and port; and the path. Of a Unix socket: ``unix:``, its path, 0."""


def _unix_place(path: str) -> Place:
    return (_UNIX, path, 0), "/"


def _place_of(text: str) -> Place:
    """Raises ``ValueError`` on what is no plain http URL, or hides where it leads."""
    import httpx  # the parser of the client that will make the request: no second opinion

    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, TypeError, ValueError) as error:
        raise ValueError(f"{text!r:.200} is not a URL: {error}") from error
    if url.scheme not in _PORTS or not url.host:
        raise ValueError(f"{text!r:.200} is not an http:// or https:// URL with a host")
    if url.userinfo:
        raise ValueError(f"{text!r:.200}: user names and passwords do not belong into URLs")
    path = unquote(url.path)
    hides = "\\" in path or "//" in path or posixpath.normpath(path) != (path.rstrip("/") or "/")
    if hides or not path.isprintable():
        raise ValueError(f"{text!r:.200}: its path is not in its plain form")
    return (url.scheme, url.host.rstrip("."), url.port or _PORTS[url.scheme]), path


def _covers(allowed: Place, asked: Place) -> bool:
    """Whether the path is the one that is allowed or below it, segment by segment."""
    folder = allowed[1].rstrip("/")
    return allowed[0] == asked[0] and f"{asked[1]}/".startswith(f"{folder}/")


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
        missing = [path for path in allow_paths if not os.path.isdir(path)]
        if missing:
            raise ValueError(f"--allow-path {missing[0]}: there is no such folder")
        folders = tuple(os.path.realpath(path) for path in allow_paths) or None
        engines = tuple(
            _unix_place(url.removeprefix(_UNIX)) if url.startswith(_UNIX) else _place_of(url)
            for url in allow_update_urls
        )
        return Access(folders, engines or None)

    def check_engine(self, url: str, uds: str | None) -> None:
        """Raises ``AccessError`` if that engine may not be asked. Of an engine on a Unix socket
        the URL says no more than the path."""
        if self.engines is None:
            return
        try:
            asked = _place_of(url) if uds is None else _unix_place(uds)
        except ValueError as error:
            raise AccessError(str(error)) from error
        if not any(_covers(allowed, asked) for allowed in self.engines):
            where = url if uds is None else uds
            raise AccessError(f"no engine may be asked at {where!r:.200} here")
