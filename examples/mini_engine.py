"""A small but real tensor-parallel inference engine, with the HTTP interface of vLLM.

    python examples/mini_engine.py --model DIR --tp 2 --port 0

It prints its address at once and answers ``GET /health`` with 200 when the model is up. Then
``POST /generate`` runs the model and ``POST /collective_rpc`` calls a method of every worker, such
as ``update_weights_from_ipc``. This process holds no weights and never imports torch.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field

START_TIMEOUT = 300.0
STOP_TIMEOUT = 5.0
DEFAULT_TIMEOUT = 300.0
"""Seconds for the workers to come up, to go away, and for a call that sets no timeout."""


class WorkerError(RuntimeError):
    """A worker failed, died or did not answer in time; the text says which and how."""


class WorkerProcess:
    """One worker as the engine sees it: a process and the pipe to it."""

    def __init__(self, rank: int, arguments: list[str], store: socket.socket | None) -> None:
        """Start ``mini_worker.py``; ``store`` is the listening socket that rank 0 takes over."""
        self.rank = rank
        self.connection, theirs = Pipe()
        fds = [theirs.fileno()] if store is None else [theirs.fileno(), store.fileno()]
        command = [sys.executable, str(Path(__file__).with_name("mini_worker.py")), *arguments]
        command += [f"--rank={rank}", f"--connection-fd={fds[0]}"]
        command += [f"--store-fd={fd}" for fd in fds[1:]]
        # A session of its own, so that Ctrl-C in a terminal reaches the engine alone.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=2, pass_fds=fds, start_new_session=True
        )
        theirs.close()

    def send(self, call: tuple[int, str, list[Any]]) -> None:
        """Raises WorkerError if the worker is dead."""
        try:
            self.connection.send(call)
        except OSError as error:
            raise self.death() from error

    def receive(self) -> tuple[int, bool, Any]:
        """Raises WorkerError if the worker is dead."""
        try:
            reply: tuple[int, bool, Any] = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self.death() from error
        return reply

    def death(self) -> WorkerError:
        """How this worker ended; called when its pipe is broken, so it has or is about to."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_TIMEOUT)
        code = self.process.poll()
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return WorkerError(f"worker {self.rank} (pid {self.process.pid}) died: {how}")

    def wait_for_end(self) -> None:
        """Kill the worker if it does not go by itself: it owns nothing that outlives it."""
        try:
            self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class WorkerPool:
    """All workers of the engine. One call at a time, each with a deadline."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._exclusive = threading.Lock()
        self._call_ids = itertools.count(1)
        self._ready = False
        self._workers: list[WorkerProcess] = []
        with socket.create_server(("127.0.0.1", 0)) as store:
            arguments = [f"--{name}={getattr(args, name)}" for name in ("tp", "model", "device")]
            arguments += [f"--load-format={args.load_format}"]
            arguments += [f"--store-port={store.getsockname()[1]}"]
            for rank in range(args.tp):
                self._workers.append(WorkerProcess(rank, arguments, None if rank else store))

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all workers; a call that still runs fails."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.wait_for_end()

    def wait_until_ready(self) -> None:
        """Raises WorkerError if a worker does not come up."""
        self._collect(0, "start", START_TIMEOUT)
        self._ready = True

    def problem(self) -> str | None:
        """Why the engine cannot serve just now; None if it can."""
        for worker in self._workers:
            if worker.process.poll() is not None:
                return str(worker.death())
        return None if self._ready else "the workers are starting"

    def call(self, method: str, args: list[Any], timeout: float) -> list[Any]:
        """Call a method of every worker at the same time; returns their results in rank order.

        Raises:
            WorkerError: with the whole traceback of each worker that raised, or with the name of
                one that died or did not answer within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        if not self._exclusive.acquire(timeout=timeout):
            raise WorkerError(f"the workers were busy for {timeout} s, {method} was not called")
        try:
            call_id = next(self._call_ids)
            for worker in self._workers:
                worker.send((call_id, method, args))
            return self._collect(call_id, method, deadline - time.monotonic())
        finally:
            self._exclusive.release()

    def _collect(self, call_id: int, method: str, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        replies: dict[int, tuple[bool, Any]] = {}
        while len(replies) < len(self._workers):
            missing = [worker for worker in self._workers if worker.rank not in replies]
            remaining = max(0.0, deadline - time.monotonic())
            ready = wait([worker.connection for worker in missing], remaining)
            if not ready:
                ranks = [worker.rank for worker in missing]
                raise WorkerError(f"{method}: no answer from workers {ranks} in {timeout:.1f} s")
            for worker in (worker for worker in missing if worker.connection in ready):
                answered, succeeded, result = worker.receive()
                if answered == call_id:  # not the late answer to a call that was given up
                    replies[worker.rank] = succeeded, result
        failures = [(rank, text) for rank, (ok, text) in sorted(replies.items()) if not ok]
        if failures:
            raise WorkerError("\n".join(f"{method}: worker {r}: {text}" for r, text in failures))
        return [replies[worker.rank][1] for worker in self._workers]


class RpcRequest(BaseModel):
    """The body of ``POST /collective_rpc``."""

    method: str
    args: list[Any] = []
    timeout: float = Field(default=DEFAULT_TIMEOUT, gt=0)


class GenerateRequest(BaseModel):
    """The body of ``POST /generate``."""

    prompt_token_ids: list[int] = Field(min_length=1)
    max_tokens: int = Field(default=16, ge=1)


def build_app(pool: WorkerPool) -> FastAPI:
    """The HTTP interface. Calls run in threads, so ``/health`` answers at any time."""
    app = FastAPI(title="mini engine")

    @app.get("/health")
    async def health() -> None:
        if problem := pool.problem():
            raise HTTPException(503, problem)

    @app.post("/collective_rpc")
    def collective_rpc(request: RpcRequest) -> dict[str, list[Any]]:
        return {"results": _call(pool, request.method, request.args, request.timeout)}

    @app.post("/generate")
    def generate(request: GenerateRequest) -> dict[str, list[int]]:
        arguments = [request.prompt_token_ids, request.max_tokens]
        return {"token_ids": _call(pool, "generate", arguments, DEFAULT_TIMEOUT)[0]}

    return app


def _call(pool: WorkerPool, method: str, args: list[Any], timeout: float) -> list[Any]:
    if problem := pool.problem():
        raise HTTPException(500, f"{method}: {problem}")
    try:
        return pool.call(method, args, timeout)
    except WorkerError as error:
        raise HTTPException(500, str(error)) from error


class Server(uvicorn.Server):
    """Ends the workers first, so that no request in flight delays the end of the server."""

    def __init__(self, pool: WorkerPool) -> None:
        super().__init__(uvicorn.Config(build_app(pool), log_level="warning"))
        self._pool = pool

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn on a signal or when ``should_exit`` is set."""
        self._pool.stop()
        await super().shutdown(sockets)


def serve(args: argparse.Namespace) -> int:
    """Run until a signal comes or the workers fail to start; returns the exit code."""
    failures: list[WorkerError] = []
    with socket.create_server(("127.0.0.1", args.port)) as listener, WorkerPool(args) as pool:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        server = Server(pool)

        def start() -> None:
            try:
                pool.wait_until_ready()
            except WorkerError as error:
                failures.append(error)
                server.should_exit = True

        threading.Thread(target=start, daemon=True).start()
        server.run(sockets=[listener])
    for failure in failures:
        print(f"mini_engine: {failure}", file=sys.stderr)
    return 1 if failures else 0


def main() -> int:
    """Parse the command line and serve. SIGINT and SIGTERM end it with exit code 0."""
    parser = argparse.ArgumentParser(description="A small tensor-parallel inference engine.")
    parser.add_argument("--model", type=Path, required=True, help="folder with config.json")
    parser.add_argument("--tp", type=int, default=1, help="number of workers")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--load-format", choices=["safetensors", "dummy"], default="safetensors")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return serve(parser.parse_args())
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
