"""Ask an inference engine to start receiving: the calls that a ``req_func`` of ``update`` makes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

    from checkpoint_engine.metas_file import Metas


def request_inference_to_update(
    url: str,
    socket_paths: dict[str, str] | list[tuple[str, str]],
    timeout: float = 300.0,
    uds: str | None = None,
) -> None:
    """Make a vLLM engine call ``update_weights_from_ipc(socket_paths)`` on all its workers.

    One rank per engine calls this, from the ``req_func`` that it gives to ``update``; it returns
    when every worker of that engine is done.

    Args:
        url: the engine's ``/collective_rpc``.
        socket_paths: address by device identity, for all workers of that engine.
        timeout: seconds that the engine may take; the engine is told, and the request ends with it.
        uds: path of the Unix socket that the engine listens on, where it is not TCP.

    Raises:
        httpx.HTTPStatusError: the engine refused or failed; the text holds its whole answer.
        httpx.TransportError: the engine is not up, or did not answer in time.
    """
    body = {"method": "update_weights_from_ipc", "args": [socket_paths], "timeout": timeout}
    _send("POST", url, timeout, uds, body)


def wait_until_ready(url: str, timeout: float, uds: str | None = None) -> None:
    """Poll an engine's ``/health`` until it answers with success.

    Raises:
        TimeoutError: it did not within ``timeout`` seconds; the text holds the last failure.
    """
    import httpx

    deadline = time.monotonic() + timeout
    while True:
        remaining = deadline - time.monotonic()
        try:
            _send("GET", url, max(0.1, min(5.0, remaining)), uds)
            return
        except (httpx.HTTPStatusError, httpx.TransportError) as error:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"engine not ready after {timeout:g} s: {error}") from error
        time.sleep(0.1)


def fetch_metas(url: str, timeout: float = 60.0, uds: str | None = None) -> Metas:
    """What a running server owns, from its ``/v1/metas`` or from a file that is served somewhere.

    Raises:
        httpx.HTTPError: no answer within ``timeout`` seconds, or a refusal.
        ValueError: the answer is something else.
    """
    from checkpoint_engine.metas_file import decode_metas

    return decode_metas(_send("GET", url, timeout, uds).content)


def _send(
    method: str, url: str, timeout: float, uds: str | None, body: Any = None
) -> httpx.Response:
    import httpx

    transport = httpx.HTTPTransport(uds=uds)
    # No proxy, netrc or certificates from the environment: engines are neighbours.
    with httpx.Client(transport=transport, timeout=timeout, trust_env=False) as client:
        request = client.build_request(method, url, json=body)
        try:
            response = client.send(request)
        except httpx.TransportError as error:
            where = url if uds is None else f"{url} through {uds}"
            text = f"no answer from {where}: {error or type(error).__name__}; is the engine up?"
            raise type(error)(text, request=request) from error
    if response.is_success:
        return response
    raise httpx.HTTPStatusError(
        f"{response.status_code} {response.reason_phrase} from {response.url}: {response.text}",
        request=response.request,
        response=response,
    )
