"""Stand-ins for the engines in the field: worker processes that load by copying, and the HTTP
interface that each engine has in front of them."""

from __future__ import annotations

import ctypes
import importlib
import json
import multiprocessing
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import torch
import zmq

from checkpoint_engine.device_utils import DeviceManager
from fleet import digests

Answer = tuple[int, Any]


class Model:
    """What a worker loads into."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.refuses = ""
        self.lingers = 0.0

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> set[str]:
        time.sleep(self.lingers)
        for name, tensor in weights:
            if self.refuses and self.refuses in name:
                raise KeyError(f"no parameter {name}")
            self.weights[name] = tensor.clone()
        return {name for name, _ in weights}


class Inspected:
    """What the tests look at in a worker, beside what its engine calls."""

    model: Model
    hooks = 0

    def digests(self) -> dict[str, str]:
        return digests(self.model.weights)

    def forget(self, refuses: str = "", lingers: float = 0.0) -> None:
        """Start anew.

        Args:
            refuses: a part of the names that cannot be loaded.
            lingers: seconds for each bucket.
        """
        self.model.weights.clear()
        self.model.refuses, self.model.lingers = refuses, lingers

    def post_hook(self) -> None:
        self.hooks += 1


class SGLangWorker(Inspected):
    """Calls our receiver as SGLang's scheduler does: its own context, an int for the device."""

    def __init__(self, tp_rank: int) -> None:
        self.model = Model()
        self.gpu_id = tp_rank
        self._context = zmq.Context()

    def update_weights_from_ipc(self, zmq_handles: dict[str, str]) -> tuple[bool, str]:
        from checkpoint_engine.worker import update_weights_from_ipc

        identity = DeviceManager().identity(self.gpu_id)  # GPU-<uuid> where there is one
        try:
            update_weights_from_ipc(
                self._context,
                zmq_handles[identity],
                device_id=self.gpu_id,
                run=self.model.load_weights,
                post_hook=self.post_hook,
            )
        except Exception:
            return False, traceback.format_exc()
        return True, "weights updated"


class VllmWorkerBase(Inspected):
    """What our extension finds in a vLLM worker."""

    def __init__(self, tp_rank: int) -> None:
        self.device = torch.device("cpu")
        self.local_rank = tp_rank
        self.model = Model()
        self.model_runner = SimpleNamespace(model=self.model, model_config=None)


def vllm_worker(tp_rank: int) -> VllmWorkerBase:
    """Mixes in what ``--worker-extension-cls`` names as vLLM does: late, and only if no name
    clashes."""
    module, _, name = "checkpoint_engine.worker.VllmColocateWorkerExtension".rpartition(".")
    extension = getattr(importlib.import_module(module), name)
    clashes = [n for n in dir(extension) if not n.startswith("__") and hasattr(VllmWorkerBase, n)]
    if clashes:
        raise RuntimeError(f"vLLM's worker has {clashes} already")
    return type("Worker", (VllmWorkerBase, extension), {})(tp_rank)


class Workers:
    """One process for each rank of an engine. Make it before this process has threads."""

    def __init__(self, make: Callable[[int], Any], count: int, first: int = 0) -> None:
        """``first``: the device of the first one."""
        self._exclusive = threading.Lock()
        self._members: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        context = multiprocessing.get_context("fork")
        for tp_rank in range(first, first + count):
            ours, theirs = multiprocessing.Pipe()
            process = context.Process(target=_serve, args=(theirs, make, tp_rank), daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of all of them at once. Raises what they raised, whole."""
        with self._exclusive:
            for _, pipe in self._members:
                pipe.send((method, args))
            answers = [pipe.recv() for _, pipe in self._members]
        failures = [answer for succeeded, answer in answers if not succeeded]
        if failures:
            raise RuntimeError("\n".join(failures))
        return [answer for _, answer in answers]

    def stop(self) -> None:
        for process, pipe in self._members:
            pipe.close()
            process.terminate()
            process.join(10)


def _serve(pipe: Connection, make: Callable[[int], Any], tp_rank: int) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: do not outlive the rank
    torch.set_num_threads(1)
    worker = make(tp_rank)
    while True:
        try:
            method, args = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            pipe.send((True, getattr(worker, method)(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def sglang_routes(workers: Workers, bodies: list[Any]) -> dict[str, Callable[[Any], Answer]]:
    """As SGLang and lmdeploy answer: 200 or 400, and ``{"success", "message"}``."""

    def update(body: Any) -> Answer:
        bodies.append(body)
        results = workers.call("update_weights_from_ipc", body["zmq_handles"])
        success = all(succeeded for succeeded, _ in results)
        message = "\n".join(text for _, text in results)
        return 200 if success else 400, {"success": success, "message": message}

    return {"GET /ping": lambda _: (200, None), "POST /update_weights_from_ipc": update}


def vllm_routes(workers: Workers, bodies: list[Any]) -> dict[str, Callable[[Any], Answer]]:
    """As vLLM answers: 500 with the error's text if a worker raised."""

    def collective_rpc(body: Any) -> Answer:
        bodies.append(body)
        try:
            return 200, {"results": workers.call(body["method"], *body["args"])}
        except RuntimeError as error:
            return 500, {"error": {"message": str(error)}}

    def note(name: str) -> Callable[[Any], Answer]:
        def answer(_: Any) -> Answer:
            bodies.append(name)
            return 200, {"success": True}

        return answer

    return {
        "GET /health": lambda _: (200, None),
        "POST /collective_rpc": collective_rpc,
        "POST /pause": note("pause"),
        "POST /resume": note("resume"),
        "POST /reset_prefix_cache": note("reset_prefix_cache"),
    }


@contextmanager
def serve_http(
    routes: dict[str, Callable[[Any], Answer]], on_request: Callable[[Any], None] = lambda _: None
) -> Iterator[str]:
    """An HTTP server in a thread; gives its address. ``on_request``: gets the headers of each."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("content-length", 0))
            sent = self.rfile.read(length)
            on_request(self.headers)
            route = f"{self.command} {self.path.partition('?')[0]}"
            handle = routes.get(route, lambda _: (404, {"detail": "Not Found"}))
            status, content = handle(json.loads(sent) if sent else None)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"" if content is None else json.dumps(content).encode())

        do_GET = do_POST = do_DELETE = answer  # noqa: N815

        def address_string(self) -> str:
            return "engine"

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()
