"""The ranks of a running service, asked together: a collective call goes to all of them at once."""

from __future__ import annotations

import contextlib
import json
import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import escape, glob
from queue import Empty, SimpleQueue
from typing import Any

import click

RANK = "{rank}"
SHORT = 10.0
"""Seconds for what a server answers out of its memory."""

_HINTS = {
    401: "give its token: PS_HTTP_TOKEN, --token-file or --token",
    404: "is this a rank's server, as `checkpoint-engine serve` starts it?",
    409: "wait for the call that is running: `checkpoint-engine status` shows it",
}
_STRANGE = "its answer is not that of a rank's server"
_NEEDED = {"rank": int, "world_size": int, "checkpoints": list, "jobs": list, "pinned_bytes": int}
_FAREWELL = 3.0
"""Seconds that the other ranks have, once one has failed, to notice it."""
_START = "is the server up? see `checkpoint-engine serve`"


class ServiceError(Exception):
    """A rank refused or failed. ``status``: of its answer; ``None``: there was none."""

    def __init__(self, place: str, status: int | None, text: str, hint: str = "") -> None:
        super().__init__(f"{place}: {text}")
        self.status = status
        self.hint = hint


@dataclass(frozen=True)
class Server:
    """One rank's service: a Unix socket's path, or a URL."""

    place: str
    token: str | None = None

    def ask(self, method: str, route: str, timeout: float, body: Any = None) -> Any:
        """The answer's JSON, ``None`` where it is empty.

        Raises:
            ServiceError: no answer in time, or an error.
        """
        import httpx

        from checkpoint_engine.client import exchange

        is_url = "://" in self.place
        url = f"{self.place.rstrip('/') if is_url else 'http://server'}{route}"
        uds = None if is_url else self.place
        try:
            response = exchange(method, url, timeout, uds, body, token=self.token)
        except ValueError as error:
            raise ServiceError(self.place, 400, str(error)) from None
        except httpx.TimeoutException as error:
            text, hint = f"no answer within {timeout:g} s", "`checkpoint-engine status`"
            raise ServiceError(self.place, None, text, hint) from error
        except httpx.RequestError as error:
            text = f"no answer: {str(error) or type(error).__name__}"
            raise ServiceError(self.place, None, text, _START) from error
        if not response.is_success:
            raise _refusal(self.place, response.status_code, response.text)
        try:
            return response.json() if response.content else None
        except ValueError:
            raise ServiceError(self.place, response.status_code, _STRANGE, _HINTS[404]) from None

    def status(self) -> dict[str, Any]:
        """What it holds and does. Raises ``ServiceError``."""
        found = self.ask("GET", "/v1/status", SHORT)
        if not isinstance(found, dict) or not all(
            isinstance(found.get(key), kind) for key, kind in _NEEDED.items()
        ):
            raise ServiceError(self.place, 200, _STRANGE, _HINTS[404])
        return found


def _refusal(place: str, status: int, text: str) -> ServiceError:
    """The error in an answer: a JSON string, an object with message and hint, or FastAPI's own."""
    try:
        content = json.loads(text)
    except ValueError:
        content = text
    hint = _HINTS.get(status, "")
    if isinstance(content, dict):
        detail = content.get("error", content.get("detail", text))
        if isinstance(detail, dict):
            hint = detail.get("hint") or hint
            detail = detail.get("message", text)
        elif isinstance(detail, list):
            detail = "; ".join(map(_describe_value, detail))
        content = detail
    return ServiceError(place, status, str(content) or f"HTTP {status}", hint)


def _describe_value(problem: Any) -> str:
    """One entry of FastAPI's answer to a request with values that are wrong."""
    try:
        return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    except (TypeError, KeyError):
        return str(problem)


# ---------------------------------------------------------------------- which servers there are


def find_servers(places: Sequence[str], token: str | None) -> list[Server]:
    """The servers that these stand for. ``{rank}`` in the path of a Unix socket stands for every
    rank whose socket is there.

    Raises:
        click.UsageError: an address makes no sense.
        ServiceError: no socket is there.
    """
    found = [place for pattern in places for place in _expand(pattern)]
    if not found:
        raise ServiceError(", ".join(places), None, "no socket is there", _START)
    return [Server(place, token) for place in found]


def _expand(pattern: str) -> list[str]:
    if "://" in pattern:
        _check_url(pattern)
        return [pattern]
    if "/" not in pattern and ":" in pattern:
        raise click.UsageError(f"{pattern!r} is neither a path nor a URL as http://{pattern}")
    if RANK not in pattern:
        return [pattern]
    first, second, *others = map(re.escape, pattern.split(RANK))
    number = re.compile(r"\1".join([f"{first}([0-9]+){second}", *others]))
    matches = map(number.fullmatch, glob("*".join(map(escape, pattern.split(RANK)))))
    return [match[0] for match in sorted(filter(None, matches), key=lambda found: int(found[1]))]


def _check_url(text: str) -> None:
    import httpx

    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise click.UsageError(f"{text!r} is no URL: {error}") from error
    if url.userinfo:
        raise click.UsageError("give no user or password in a URL: a token is its own option")
    if (url.port or 0) >= 1 << 16:
        raise click.UsageError(f"{text!r} has no port of TCP")
    if url.scheme not in ("http", "https") or not url.host or set(url.host) & set(",{}"):
        raise click.UsageError(f"{text!r} is no URL of one server, as http://host:8000")


class World:
    """All ranks of a service, in their order."""

    def __init__(self, servers: Sequence[Server]) -> None:
        """Learns from the servers which ranks they are.

        Raises:
            ServiceError: one does not answer, or a rank of theirs is not among them.
        """
        states = ask_status(servers).all()
        by_rank = {
            state["rank"]: (server, state) for server, state in zip(servers, states, strict=True)
        }
        size = max(state["world_size"] for state in states)
        missing = sorted(set(range(size)) - by_rank.keys())
        if missing or len(by_rank) < len(servers):
            raise ServiceError(
                ", ".join(server.place for server in servers),
                None,
                f"these are ranks {sorted(state['rank'] for state in states)} of {size}",
                f"every rank takes part, but {missing} are missing: name them, and start those "
                "that are not up"
                if missing
                else "name every rank once",
            )
        self.servers = [by_rank[rank][0] for rank in range(size)]
        self._states = [by_rank[rank][1] for rank in range(size)]

    def holders(self, name: str) -> list[int]:
        """The ranks that have registered a checkpoint of this name."""
        return [rank for rank, names in enumerate(self._registered()) if name in names]

    @property
    def registered(self) -> list[str]:
        """The names of all checkpoints."""
        return sorted(set().union(*self._registered()))

    @property
    def has_loaded_metas(self) -> bool:
        """Whether all ranks know owners of another world."""
        return all(state.get("metas_loaded", False) for state in self._states)

    def _registered(self) -> list[set[str]]:
        return [{one["name"] for one in state["checkpoints"]} for state in self._states]


# ---------------------------------------------------------------------- asking them together


class Answers:
    """What servers answer that are asked at once, each by a thread of its own."""

    def __init__(self, servers: Sequence[Server], ask: Callable[[int, Server], Any]) -> None:
        """``ask``: gets a server's place among them, too."""
        self._count = len(servers)
        self._queue: SimpleQueue[tuple[int, Any]] = SimpleQueue()

        def answer(place: int, server: Server) -> None:
            try:
                self._queue.put((place, ask(place, server)))
            except Exception as error:
                self._queue.put((place, error))

        for place, server in enumerate(servers):
            # The command may end before all have answered.
            threading.Thread(target=answer, args=(place, server), daemon=True).start()

    def each(self) -> list[Any]:
        """For what each rank does by itself: all are waited for, failures are among them."""
        found = dict(self._queue.get() for _ in range(self._count))
        return [found[place] for place in range(self._count)]

    def all(self) -> list[Any]:
        """For a collective call.

        Raises:
            ServiceError: of the first that fails. The others may be waiting for that one, and are
                not waited for long.
        """
        found: dict[int, Any] = {}
        failure: Exception | None = None
        ends = math.inf
        with contextlib.suppress(Empty):
            while len(found) < self._count:
                left = None if failure is None else max(0.0, ends - time.monotonic())
                place, answer = self._queue.get(timeout=left)
                found[place] = answer
                if failure is None and isinstance(answer, Exception):
                    failure, ends = answer, time.monotonic() + _FAREWELL
        if failure is not None:
            raise failure
        return [found[place] for place in range(self._count)]


def ask(
    servers: Sequence[Server],
    method: str,
    route: str,
    timeout: float,
    bodies: Sequence[Any] | None = None,
) -> Answers:
    """Ask all of them at once, each with its own body."""
    return Answers(
        servers,
        lambda place, server: server.ask(
            method, route, timeout, None if bodies is None else bodies[place]
        ),
    )


def ask_status(servers: Sequence[Server]) -> Answers:
    """As ``Server.status``."""
    return Answers(servers, lambda _, server: server.status())
