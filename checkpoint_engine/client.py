"""Ask an inference engine to start receiving: the calls that a ``req_func`` of ``update`` makes.

``vllm_request``, ``sglang_request`` and ``lmdeploy_request`` make such a ``req_func``, for the
engine that this rank serves: ranks 0 to n-1 serve the first engine of n workers, the next n the
second. All ranks pass theirs to ``update``; the first one of each engine asks.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

from loguru import logger

from checkpoint_engine.ground.deadline import Deadline, holding
from checkpoint_engine.settings import engine_token, from_launcher

if TYPE_CHECKING:
    import httpx

    from checkpoint_engine.world.metas_file import Metas

RequestFunction = Callable[[list[tuple[str, str]]], None]
Headers = Mapping[str, str]

BACKEND = "checkpoint_engine"
"""Our name in vLLM's ``--weight-transfer-config``."""
_RESUME_SECONDS = 30.0  # also when the time for the update is used up


def vllm_request(
    url: str,
    *,
    inference_parallel_size: int = 1,
    rank: int | None = None,
    pause: Literal["abort", "wait", "keep"] | None = None,
    resume_after_failure: bool = False,
    reset_prefix_cache: bool | None = None,
    weight_version: str | None = None,
    plugin: bool | None = None,
    timeout: float = 300.0,
    uds: str | None = None,
    headers: Headers | None = None,
) -> RequestFunction:
    """A ``req_func`` for vLLM, started with ``--weight-transfer-config`` and the backend
    ``checkpoint_engine``, or with the worker extension. Either needs ``VLLM_SERVER_DEV_MODE=1``.

    Args:
        url: the engine, as ``http://localhost:8000``.
        inference_parallel_size: its workers, each with a rank of its own.
        rank: of the server that calls ``update``. Default: ``RANK``.
        pause: stop generation before the update and resume it after. Requests in flight are
            aborted, waited for, or kept and continued with the new weights. If the update fails,
            the engine stays paused, for its weights may be partly written, until the next one.
        resume_after_failure: let it serve all the same.
        reset_prefix_cache: after the update, forget what was computed with the old weights, or new
            requests that begin as earlier ones are answered with it. Requests in flight are not
            lost, but computed anew. Default: so, unless the engine has no route for it.
        weight_version: what ``/weight_info`` of the engine shall answer afterwards. Only vLLM's own
            weight transfer tells its engine.
        plugin: whether the backend receives, not the extension. Default: what the engine's
            ``/server_info`` says, whose first answer takes vLLM seconds.
        timeout: seconds for all of it.
        uds: path of the Unix socket that the engine listens on, where it is not TCP.
        headers: of every request, as an API key. Default: the bearer token in ``PS_ENGINE_TOKEN``.

    Raises:
        ValueError: a number is out of range. What the function raises is the engine's error, whole.
    """

    def ask(handles: dict[str, str]) -> None:
        deadline = Deadline(timeout)

        def post(path: str, body: Any = None) -> httpx.Response:
            remaining = max(deadline.remaining(), _RESUME_SECONDS if path == "/resume" else 0.1)
            return send("POST", f"{url}{path}", remaining, uds, body, headers=_sent(headers))

        with nullcontext() if pause is None else _paused(post, pause, resume_after_failure):
            seconds = max(deadline.remaining(), 0.1)
            if _has_backend(url, seconds, uds, headers) if plugin is None else plugin:
                late = f"{uds or url} has not answered an earlier update of this process"
                with holding(_sessions[uds or url], seconds, late):
                    _VllmTransfer(post, weight_version).update(handles)
            elif headers is None:
                request_inference_to_update(f"{url}/collective_rpc", handles, seconds, uds)
            else:
                _ask_extension(f"{url}/collective_rpc", handles, seconds, uds, headers)
            if reset_prefix_cache is not False:
                _reset_prefix_cache(post, needed=bool(reset_prefix_cache))

    return _for_engine(ask, rank, inference_parallel_size)


def _reset_prefix_cache(post: Callable[..., httpx.Response], needed: bool) -> None:
    """``needed``: an engine without such a route is an error."""
    import httpx

    try:
        _check_success(post("/reset_prefix_cache?reset_running_requests=true"))
    except httpx.HTTPStatusError as error:
        if needed or error.response.status_code != httpx.codes.NOT_FOUND:
            raise


class _VllmTransfer:
    """An update by vLLM's own weight transfer routes.

    No request may fail on one worker alone, or on all: vLLM would take what the others answered for
    answers to its next request. So nothing is tried out here, and the plug-in raises on the last
    worker only; an update that failed is open on the others, which ``finish`` ends.
    """

    def __init__(self, post: Callable[..., Any], weight_version: str | None) -> None:
        self._post = post
        self._version = {} if weight_version is None else {"weight_version": weight_version}

    def update(self, handles: dict[str, str]) -> None:
        self._start()
        try:
            self._post("/update_weights", {"update_info": {"zmq_handles": handles}})
        except BaseException:
            self._finish_failed()
            raise
        self._post("/finish_weight_update", self._version)
        self._post("/reset_encoder_cache")

    def _start(self) -> None:
        import httpx

        try:
            self._post("/start_weight_update")
            return
        except httpx.HTTPStatusError as error:
            self._finish_failed()
            if "start_draft_weight_update" not in str(error):
                raise
        self._post("/start_draft_weight_update")
        self._post("/finish_weight_update", {})
        self._post("/start_weight_update")

    def _finish_failed(self) -> None:
        with suppress(Exception):  # of the worker that failed; there it is over
            self._post("/finish_weight_update", {})


_sessions: defaultdict[str, Lock] = defaultdict(Lock)
"""By engine. An update may have failed elsewhere before its engine answers: what ends that one's
session on the engine must not end the next one's."""


def _sent(headers: Headers | None) -> Headers:
    """With every request to an engine."""
    if headers is None and (token := engine_token()):
        return {"authorization": f"Bearer {token}"}
    return headers or {}


def _has_backend(url: str, timeout: float, uds: str | None, headers: Headers | None) -> bool:
    """Whether a vLLM engine was started with our backend for its weight transfer."""
    import httpx

    try:
        route = f"{url}/server_info?config_format=json"
        answer = send("GET", route, timeout, uds, headers=_sent(headers)).json()
        return bool(answer["vllm_config"]["weight_transfer_config"]["backend"] == BACKEND)
    except httpx.ConnectError:
        return False  # the next request says so
    except (httpx.HTTPStatusError, ValueError, LookupError, TypeError):
        return False  # a release without that route, or another backend, or none


def sglang_request(
    url: str,
    *,
    inference_parallel_size: int = 1,
    rank: int | None = None,
    flush_cache: bool = True,
    weight_version: str | None = None,
    timeout: float = 300.0,
    uds: str | None = None,
    headers: Headers | None = None,
) -> RequestFunction:
    """A ``req_func`` for SGLang, which receives by ``/update_weights_from_ipc``; the other
    arguments are as of ``vllm_request``.

    Args:
        flush_cache: forget what was computed with the old weights.
        weight_version: what the engine shall call the new ones.

    Raises:
        ValueError: a number is out of range. What the function raises is the engine's error, whole.
    """

    options = {"flush_cache": flush_cache, "weight_version": weight_version}
    return _by_ipc_route(url, options, rank, inference_parallel_size, timeout, uds, headers)


def lmdeploy_request(
    url: str,
    *,
    inference_parallel_size: int = 1,
    rank: int | None = None,
    timeout: float = 300.0,
    uds: str | None = None,
    headers: Headers | None = None,
) -> RequestFunction:
    """A ``req_func`` for lmdeploy; arguments and errors as of ``sglang_request``."""
    return _by_ipc_route(url, {}, rank, inference_parallel_size, timeout, uds, headers)


REQUESTS: dict[str, Callable[..., RequestFunction]] = {
    "vllm": vllm_request,
    "sglang": sglang_request,
    "lmdeploy": lmdeploy_request,
}
"""By the kind of engine, what makes its ``req_func``."""


def _by_ipc_route(
    url: str,
    body: dict[str, Any],
    rank: int | None,
    workers: int,
    timeout: float,
    uds: str | None,
    headers: Headers | None,
) -> RequestFunction:
    route = f"{url}/update_weights_from_ipc"

    def ask(handles: dict[str, str]) -> None:
        content = {"zmq_handles": handles, **body}
        _check_success(send("POST", route, timeout, uds, content, headers=_sent(headers)))

    return _for_engine(ask, rank, workers)


def _for_engine(
    ask: Callable[[dict[str, str]], None], rank: int | None, workers: int
) -> RequestFunction:
    """Call ``ask`` on one rank of each engine, with the addresses of that engine's workers.

    ``update`` reads the attribute ``instance``: the ranks of one engine succeed or fail together.

    A rank that takes no part in a P2P update has no address, and does not ask.
    """
    me = from_launcher(rank, "RANK")
    if me < 0 or workers < 1:
        raise ValueError(f"rank {me} of engines with {workers} workers: neither can be so small")
    first = me - me % workers

    def request(socket_paths: list[tuple[str, str]]) -> None:
        engine = list(enumerate(socket_paths))[first : first + workers]
        members = [place for place, (_, address) in engine if address]
        if members and members[0] == me:
            ask(dict(socket_paths[place] for place in members))

    request.instance = f"engine {first // workers}"  # type: ignore[attr-defined]
    return request


@contextmanager
def _paused(post: Callable[[str], Any], mode: str, resumes_always: bool) -> Iterator[None]:
    """Generation stands still, also after a failure, unless it ``resumes_always``."""
    may_resume = True  # a pause without an answer may still happen
    try:
        post(f"/pause?mode={mode}")
        may_resume = resumes_always
        yield
    except BaseException as error:
        if may_resume:
            _try_to_resume(post)
            raise
        advice = "the next update resumes it, or POST /resume"
        text = f"{error}\nThe engine stays paused, perhaps half updated: {advice}"
        error.args = (text,)
        if str(error) != text and isinstance(error, Exception):  # made of something else
            raise RuntimeError(text) from error
        raise
    post("/resume")


def _try_to_resume(post: Callable[[str], Any]) -> None:
    try:
        post("/resume")
    except Exception as error:
        logger.error("the engine may stay paused, it could not be resumed: {}", error)


def _check_success(response: httpx.Response) -> None:
    """An engine may say in its answer that it failed; some answers are empty.

    Raises:
        RuntimeError: it did; the text holds its whole answer.
    """
    with suppress(ValueError):
        answer = response.json()
        if isinstance(answer, dict) and answer.get("success") is False:
            raise RuntimeError(f"{response.url} did not succeed: {response.text}")


_NO_EXTENSION = (
    "the engine was not started with --worker-extension-cls; where it was with "
    "--weight-transfer-config, ask it by client.vllm_request, or --engine-kind vllm"
)


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
    _ask_extension(url, socket_paths, timeout, uds, None)


def _ask_extension(
    url: str, socket_paths: Any, timeout: float, uds: str | None, headers: Headers | None
) -> None:
    import httpx

    body = {"method": "update_weights_from_ipc", "args": [socket_paths], "timeout": timeout}
    try:
        send("POST", url, timeout, uds, body, headers=_sent(headers))
    except httpx.HTTPStatusError as error:
        if "no attribute 'update_weights_from_ipc'" not in str(error):
            raise
        text = f"{error}\n{_NO_EXTENSION}"
        raise httpx.HTTPStatusError(text, request=error.request, response=error.response) from None


def wait_until_ready(url: str, timeout: float, uds: str | None = None) -> None:
    """Poll an engine's ``/health`` until it answers with success.

    Raises:
        TimeoutError: it did not within ``timeout`` seconds; the text holds the last failure.
    """
    import httpx

    end = time.monotonic() + timeout
    while True:
        try:
            send("GET", url, max(0.1, min(5.0, end - time.monotonic())), uds)
            return
        except (httpx.HTTPStatusError, httpx.TransportError) as error:
            if time.monotonic() >= end:
                raise TimeoutError(f"engine not ready after {timeout:g} s: {error}") from error
        time.sleep(0.1)


def fetch_metas(
    url: str, timeout: float = 60.0, uds: str | None = None, token: str | None = None
) -> Metas:
    """What a running server owns, from its ``/v1/metas`` or from a file that is served somewhere.

    Args:
        timeout: seconds.
        uds: path of the Unix socket that the server listens on, where it is not TCP.
        token: the bearer token that a server on TCP asks for.

    Raises:
        httpx.HTTPError: no answer within ``timeout`` seconds, or a refusal.
        ValueError: the answer is something else.
    """
    from checkpoint_engine.world.metas_file import decode_metas

    content = send("GET", url, timeout, uds, token=token).content
    try:
        return decode_metas(content)
    except ValueError as error:
        raise ValueError(f"{url}: {error}; is it a server's /v1/metas?") from error


def parse_url(text: str) -> httpx.URL:
    """The URL of one server, parsed by the client that will ask it. Raises ``ValueError`` if it is
    no plain http URL; that text shows no password."""
    import httpx

    shown = repr(text.rpartition("@")[2])[:200]
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise ValueError(f"{shown} is not a URL: {error}") from None
    if url.userinfo:
        raise ValueError("user names and passwords do not belong into URLs; a token goes apart")
    one_host = url.host and not set(url.host) & set(",{}") and (url.port or 0) < 1 << 16
    if url.scheme not in ("http", "https") or not one_host:
        raise ValueError(f"{shown} is not a URL of one server, as http://host:8000")
    return url


def send(
    verb: str,
    url: str,
    timeout: float,
    uds: str | None,
    body: Any = None,
    token: str | None = None,
    headers: Headers | None = None,
) -> httpx.Response:
    """One request, and the answer to it.

    Raises:
        httpx.HTTPStatusError: the answer is no success; the text holds all of it.
        httpx.RequestError: none that can be read, within ``timeout`` seconds for each step.
        ValueError: the request cannot be sent. The text does not show the token.
    """
    import httpx

    headers = dict(headers or {})
    if token is not None:
        headers["authorization"] = f"Bearer {token}"
    # Reading the certificates takes longer than most requests.
    transport = httpx.HTTPTransport(uds=uds, verify=url.startswith("https:"))
    # No proxy, netrc or certificates from the environment: who is asked are neighbours.
    with httpx.Client(transport=transport, timeout=timeout, trust_env=False) as client:
        try:
            response = client.request(verb, url, json=body, headers=headers)
        except httpx.LocalProtocolError:  # its text has the header, and so the token
            raise ValueError(f"{url}: a token or address that HTTP does not allow") from None
        except httpx.TransportError as error:
            where = url if uds is None else f"{url} through {uds}"
            text = f"no answer from {where}: {error or type(error).__name__}; is it up?"
            raise type(error)(text, request=error.request) from error
    if response.is_success:
        return response
    text = f"{response.status_code} {response.reason_phrase} from {response.url}: {response.text}"
    raise httpx.HTTPStatusError(text, request=response.request, response=response)
