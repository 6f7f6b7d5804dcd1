"""The ranks of a running service, asked together: a collective call goes to all of them at once."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_EXCEPTION, wait
from dataclasses import dataclass
from functools import partial
from glob import escape, glob
from typing import Any

import click

from checkpoint_engine.cli.output import BUSY, FAILED, UNREACHABLE, Failure
from checkpoint_engine.ground.deadline import begin

RANK = "{rank}"
SHORT = 10.0
"""Seconds for what a server answers out of its memory."""

_FAREWELL = 3.0
"""Seconds that the other ranks have, once one has failed, to notice it."""
_HINTS = {
    401: "give its token: PS_HTTP_TOKEN, --token-file or --token",
    404: "is this a rank's server, as `checkpoint-engine serve` starts it?",
    409: "wait for the call that is running: `checkpoint-engine status` shows it",
}
_START = "`checkpoint-engine status` tells if it is up, `checkpoint-engine serve` starts one"
STATUS = "/v1/status"
_NEEDED = {"rank": int, "world_size": int, "checkpoints": list, "jobs": list, "pinned_bytes": int}
"""What a status has at least."""


class ServiceError(Failure):
    """A rank refused or failed. ``status``: of its answer; ``None``: there was none."""

    def __init__(self, place: str, status: int | None, text: str, hint: str = "") -> None:
        code = {None: UNREACHABLE, 409: BUSY}.get(status, FAILED)
        super().__init__(f"{place}: {text}", hint, code)
        self.status = status


@dataclass(frozen=True)
class RankService:
    """One rank's service: a Unix socket's path, or a URL."""

    place: str
    token: str | None = None

    def ask(self, method: str, route: str, timeout: float = SHORT, body: Any = None) -> Any:
        """The answer's JSON, ``None`` where it is empty.

        Raises:
            ServiceError: no answer in time, or an error.
        """
        import httpx

        from checkpoint_engine.client import send

        is_url = "://" in self.place
        url = f"{self.place if is_url else 'http://server'}{route}"
        uds = None if is_url else self.place
        try:
            response = send(method, url, timeout, uds, body, self.token)
        except ValueError as error:
            raise ServiceError(self.place, 400, str(error)) from None
        except httpx.HTTPStatusError as error:
            response = error.response
            failure = refusal(self.place, response.status_code, response.text)
            failure.cause = response.headers.get("x-error-cause", failure.cause)
            failure.hint = failure.hint or response.headers.get("x-error-hint", "")
            raise failure from None
        except httpx.RequestError as error:
            raise ServiceError(self.place, None, str(error), _START) from error
        with contextlib.suppress(ValueError):
            answer = response.json() if response.content else None
            if route != STATUS or _is_status(answer):
                return answer
        strange = "its answer is not that of a rank's server"
        raise ServiceError(self.place, response.status_code, strange, _HINTS[404])


def _is_status(answer: Any) -> bool:
    return isinstance(answer, dict) and all(
        isinstance(answer.get(key), kind) for key, kind in _NEEDED.items()
    )


def refusal(place: str, status: int, text: str) -> ServiceError:
    """The error in an answer: a JSON string, an object with message and hint, or FastAPI's own."""
    hint = _HINTS.get(status, "")
    content: Any = text
    with contextlib.suppress(ValueError):
        content = json.loads(text)
    if isinstance(content, dict):
        content = content.get("error", content.get("detail", text))
    if isinstance(content, dict):
        hint, content = content.get("hint") or hint, content.get("message", text)
    with contextlib.suppress(TypeError, KeyError):  # wrong values, as FastAPI lists them
        content = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in content)
    return ServiceError(place, status, str(content) or f"HTTP {status}", hint)


# ---------------------------------------------------------------------- which servers there are


def find_servers(places: Sequence[str], token: str | None) -> list[RankService]:
    """The servers that these stand for. ``{rank}`` in the path of a Unix socket stands for every
    rank whose socket is there.

    Raises:
        click.UsageError: an address makes no sense.
        ServiceError: no socket is there.
    """
    found = [RankService(place, token) for pattern in places for place in _expand(pattern)]
    if not found:
        raise ServiceError(", ".join(places), None, "no socket is there", _START)
    return found


def _expand(pattern: str) -> list[str]:
    if "://" in pattern:
        return [plain_url(pattern)]
    if "/" not in pattern and ":" in pattern:
        raise click.UsageError(f"{pattern!r} is neither a path nor a URL as http://{pattern}")
    if RANK not in pattern:
        return [pattern]
    first, second, *others = map(re.escape, pattern.split(RANK))
    number = re.compile(r"\1".join([f"{first}([0-9]+){second}", *others]))
    matches = map(number.fullmatch, glob("*".join(map(escape, pattern.split(RANK)))))
    return [match[0] for match in sorted(filter(None, matches), key=lambda found: int(found[1]))]


def plain_url(text: str) -> str:
    """A URL from the command line, without the slash at its end.

    Raises:
        click.UsageError: ``client.parse_url`` refuses it.
    """
    from checkpoint_engine.client import parse_url

    try:
        parse_url(text)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    return text.rstrip("/")


class WorldService:
    """All ranks of a service, in their order.

    Attributes:
        held: of each rank, the names of the checkpoints that it has registered.
        registered: the names of all checkpoints.
        has_loaded_metas: whether all ranks know owners of another world.
    """

    def __init__(self, servers: Sequence[RankService]) -> None:
        """Learns from the servers which ranks they are.

        Raises:
            ServiceError: one does not answer, or a rank of theirs is not among them.
        """
        states = ask(servers, "GET", STATUS, collective=True)
        in_order = sorted(zip(states, servers, strict=True), key=lambda one: one[0]["rank"])
        ranks = [state["rank"] for state, _ in in_order]
        size = max(state["world_size"] for state in states)
        if ranks != list(range(size)):
            places = ", ".join(server.place for server in servers)
            missing = sorted(set(range(size)) - set(ranks))
            absent = f"ranks {missing} are missing: name them, and start those that are not up"
            hint = absent if missing else "name every rank once"
            raise ServiceError(places, None, f"these are ranks {ranks} of {size}", hint)
        self.servers = [server for _, server in in_order]
        self.held = [{one["name"] for one in state["checkpoints"]} for state, _ in in_order]
        self.registered = sorted(set().union(*self.held))
        self.has_loaded_metas = all(state.get("metas_loaded", False) for state in states)


# ---------------------------------------------------------------------- asking them together


def ask(
    servers: Sequence[RankService],
    method: str,
    route: str,
    timeout: float = SHORT,
    bodies: Sequence[Any] | None = None,
    *,
    collective: bool = False,
) -> list[Any]:
    """Ask all of them at once, each with its own body; the answers, in the servers' order.

    A server that fails has its ``ServiceError`` among the answers, unless the call is collective.

    Raises:
        ServiceError: of the first that fails in a collective call. The others may be waiting for
            that one, and are not waited for long.
    """
    each = bodies or [None] * len(servers)
    asks = [partial(s.ask, method, route, timeout, b) for s, b in zip(servers, each, strict=True)]
    futures = [
        begin(partial(_answer_of, s, one), f"ask-{s.place}")
        for s, one in zip(servers, asks, strict=True)
    ]
    # A rank that waits for one that failed learns of it late: the first failure decides.
    done, _ = wait(futures, return_when=FIRST_EXCEPTION if collective else ALL_COMPLETED)
    failure = next(filter(None, (one.exception() for one in done)), None)
    if collective and failure is not None:
        wait(futures, _FAREWELL)
        raise failure
    return [one.exception() or one.result() for one in futures]


def on_each(servers: Sequence[RankService], does: Callable[[RankService], Any]) -> list[Any]:
    """What ``does`` returns for each server, or the ``ServiceError`` that it raises. None of them
    waits for another one."""
    futures = [begin(partial(_answer_of, s, partial(does, s)), f"ask-{s.place}") for s in servers]
    wait(futures)
    return [one.exception() or one.result() for one in futures]


def _answer_of(server: RankService, question: Callable[[], Any]) -> Any:
    try:
        return question()
    except ServiceError:
        raise
    except Exception as error:
        raise ServiceError(server.place, None, repr(error)) from error
