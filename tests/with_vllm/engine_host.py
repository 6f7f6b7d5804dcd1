"""A process that runs vLLM engines one after the other: ``engine_host.py PORT_FILE``.

Engines start in a second or two here, because vLLM is imported once, and once more in the process
that workers of several are forked from. Routes: ``/start``, ``/join``, ``/stop``,
``/generate`` and vLLM's own ``/collective_rpc``; bodies and answers are JSON.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import traceback
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import frozen_imports  # noqa: F401

PROMPTS = [[3, 5, 7, 9], [11, 22, 33, 44, 55, 66]]
OPTIONS: dict[str, Any] = {
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "num_gpu_blocks_override": 16,  # not a gigabyte to fill with zeros
    "worker_extension_cls": "engine_worker.TestedWorker",
    "disable_log_stats": True,
}


def fork_workers() -> None:
    """On CPUs vLLM spawns them: each imports it anew."""
    from vllm.v1.executor import multiproc_executor

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["frozen_imports"])
    multiproc_executor.get_mp_context = lambda: context


def _replace(module: Any, name: str, function: Any) -> None:
    """In this process, from which workers of one are not apart."""
    assert callable(getattr(module, name))
    setattr(module, name, function)


class Host:
    """The engine of the moment."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._workers: Any = None

    def start(self, loads_early: bool = True, has_graphs: bool = False, **options: Any) -> None:
        """
        Args:
            loads_early: false as with releases that cannot.
            has_graphs: as on a GPU, whose tensors those of CPUs stand for.
        """
        from vllm import LLM

        from checkpoint_engine.loading import layerwise
        from checkpoint_engine.loading.vllm import captured, kernel_memory

        self.stop()
        _replace(layerwise, "_keeps_what_is_there", lambda _: loads_early)
        _replace(kernel_memory, "has_graphs", lambda *_: has_graphs)
        _replace(captured, "_may_be_captured", lambda tensor: not tensor.is_meta)
        self._engine = LLM(**OPTIONS, **options)

    def join(self, **options: Any) -> None:
        """Run this host's workers of an engine that starts on another one."""
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.executor.multiproc_executor import MultiprocExecutor

        self.stop()
        config = EngineArgs(**OPTIONS, **options).create_engine_config(headless=True)
        self._workers = MultiprocExecutor(config, monitor_workers=False)

    def stop(self) -> None:
        if self._engine is not None:
            self._engine.llm_engine.engine_core.shutdown()
        if self._workers is not None:
            self._workers.shutdown()
        self._engine = self._workers = None
        gc.collect()

    def generate(self) -> list[list[int]]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        outputs = self._engine.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in PROMPTS],
            SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False),
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def collective_rpc(self, method: str, args: list[Any], timeout: float) -> dict[str, Any]:
        return {"results": self._engine.collective_rpc(method, timeout, tuple(args))}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        try:
            status, answer = 200, getattr(host, self.path.strip("/"))(**body)
        except Exception:
            status, answer = 500, traceback.format_exc()
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""


if __name__ == "__main__":
    fork_workers()
    host = Host()
    server = HTTPServer(("127.0.0.1", 0), Handler)
    ready = Path(sys.argv[1])
    ready.with_suffix(".new").write_text(str(server.server_port))
    os.replace(ready.with_suffix(".new"), ready)
    server.serve_forever()
