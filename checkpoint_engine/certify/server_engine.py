"""An engine that is a program of the user's, with vLLM's HTTP interface."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from typing import Any

from checkpoint_engine import settings
from checkpoint_engine.certify.engine import EXTENSION, OrderError, Output, Start
from checkpoint_engine.client import send
from checkpoint_engine.ground.deadline import Deadline

_STOP_SECONDS = 60.0
_SHOWN = 4000
"""Characters of the end of what a server printed."""


class ServerEngine:
    """A server that listens on a port and has ``/health`` and ``/collective_rpc``.

    ``--engine-args`` is the command that starts it, in which ``{model}``, ``{load_format}``
    (``safetensors`` or ``dummy``), ``{tp}``, ``{port}`` and ``{extension}`` are filled in.
    Subclasses say how it generates.
    """

    name = "server"

    def __init__(self, start: Start) -> None:
        port = _free_port()
        self.url, self._timeout = f"http://127.0.0.1:{port}", start.timeout
        command = _command(start, port)
        settings.set_unless_set("VLLM_SERVER_DEV_MODE", "1")  # for /collective_rpc
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # close() closes it
        try:
            self._process = subprocess.Popen(
                command,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise OrderError(f"{command[0]!r} cannot be started: {error}") from error
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def describe(self) -> dict[str, str]:
        version = send("GET", f"{self.url}/version", self._timeout, None).json()["version"]
        return {"engine": self.name, "version": version}

    def call(self, method: str, *args: Any) -> list[Any]:
        body = {"method": method, "args": list(args), "timeout": self._timeout}
        results: list[Any] = self.post("collective_rpc", body)["results"]
        return results

    def generate(self, prompts: list[list[int]], count: int) -> list[Output]:
        raise NotImplementedError

    def post(self, route: str, body: dict[str, Any]) -> Any:
        """The JSON of the answer."""
        return send("POST", f"{self.url}/{route}", self._timeout, None, body).json()

    def close(self) -> None:
        """End the server and what it started."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()

    def _wait_until_ready(self) -> None:
        deadline = Deadline(self._timeout)
        while True:
            if (code := self._process.poll()) is not None:
                raise RuntimeError(f"the server ended with {code}:\n{self._printed()}")
            try:
                send("GET", f"{self.url}/health", 5.0, None)
                return
            except Exception as error:
                if not deadline.remaining():
                    text = f"the server was not up after {self._timeout:g} s: {error}"
                    raise TimeoutError(f"{text}\n{self._printed()}") from error
            time.sleep(0.1)

    def _printed(self) -> str:
        self._log.seek(0)
        return self._log.read()[-_SHOWN:]


class VllmServer(ServerEngine):
    """vLLM's API server; it generates by ``/v1/completions``."""

    name = "vllm"

    def generate(self, prompts: list[list[int]], count: int) -> list[Output]:
        send("POST", f"{self.url}/reset_prefix_cache", self._timeout, None)
        return [self._complete(prompt, count) for prompt in prompts]

    def _complete(self, prompt: list[int], count: int) -> Output:
        body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        body |= {"logprobs": 0, "return_token_ids": True, "prompt_logprobs": 0}
        answer = self.post("v1/completions", body)["choices"][0]
        of_prompt = zip(prompt[1:], (answer.get("prompt_logprobs") or [])[1:], strict=False)
        told = [at[str(token)]["logprob"] for token, at in of_prompt]
        return Output(answer["token_ids"], told + answer["logprobs"]["token_logprobs"])


def _command(start: Start, port: int) -> list[str]:
    """Raises ``OrderError`` if it does not say which model to serve where."""
    values = {"model": start.model, "load_format": start.load_format, "tp": start.workers}
    values |= {"port": port, "extension": EXTENSION}
    needed = ("{model}", "{load_format}", "{port}")
    if lacking := [name for name in needed if name not in start.arguments]:
        raise OrderError(
            f"--engine-args is the command that starts the server, and lacks {', '.join(lacking)}"
        )
    try:
        return [word.format_map(values) for word in shlex.split(start.arguments)]
    except (KeyError, IndexError, ValueError) as error:
        known = ", ".join(f"{{{name}}}" for name in values)
        raise OrderError(
            f"--engine-args {start.arguments!r}: {error!r}; known are {known}, and {{{{ for a brace"
        ) from error


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
