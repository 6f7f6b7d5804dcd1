"""The ranks of a running service, asked together: a collective call goes to all of them at once."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

RANK = "{rank}"


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

        is_url = "://" in self.place
        transport = httpx.HTTPTransport(
            uds=None if is_url else self.place, verify=self.place.startswith("https:")
        )
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        base = self.place if is_url else "http://server"
        # The servers are neighbours: no proxy or credentials from the environment.
        with httpx.Client(
            transport=transport, base_url=base, timeout=timeout, trust_env=False, headers=headers
        ) as client:
            try:
                response = client.request(method, route, json=body)
            except httpx.TransportError as error:
                text = f"no answer: {str(error) or type(error).__name__}"
                raise ServiceError(
                    self.place, None, text, "is the server up? see `checkpoint-engine serve`"
                ) from error
        if response.is_success:
            return response.json() if response.content else None
        raise _refusal(self.place, response.status_code, response.text)


def _refusal(place: str, status: int, text: str) -> ServiceError:
    """The error in an answer: a JSON string, or an object with message and hint."""
    try:
        content = json.loads(text)
    except ValueError:
        content = text
    if isinstance(content, dict):
        detail = content.get("error", content)
        message = detail.get("message", text) if isinstance(detail, dict) else detail
        hint = detail.get("hint", "") if isinstance(detail, dict) else ""
        return ServiceError(place, status, str(message), str(hint or ""))
    return ServiceError(place, status, str(content) or f"HTTP {status}")


def find_servers(places: Sequence[str], token: str | None) -> list[Server]:
    """The servers, in rank order. ``{rank}`` in the path of a Unix socket stands for every rank
    whose socket is there.

    Raises:
        ValueError: there is none.
    """
    found = [place for pattern in places for place in _expand(pattern)]
    if not found:
        raise ValueError(f"no socket matches {', '.join(places)}")
    return [Server(place, token) for place in found]


def _expand(pattern: str) -> list[str]:
    if RANK not in pattern or "://" in pattern:
        return [pattern]
    found: list[str] = []
    while os.path.exists(path := pattern.replace(RANK, str(len(found)))):
        found.append(path)
    return found


def ask_all(
    servers: Sequence[Server], method: str, route: str, timeout: float, bodies: Sequence[Any]
) -> list[Any]:
    """The answers of all ranks, asked at once, each with its own body.

    Raises:
        ServiceError: of the first rank that failed, once all have answered.
    """
    with ThreadPoolExecutor(len(servers)) as pool:
        calls = [
            pool.submit(server.ask, method, route, timeout, body)
            for server, body in zip(servers, bodies, strict=True)
        ]
    return [call.result() for call in calls]
