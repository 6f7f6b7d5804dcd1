"""The main job with a real vLLM: new weights into a running tensor-parallel server, twice.

    python examples/demo_vllm.py [--keep]

It starts vLLM with dummy weights, has two parameter-server ranks send it one checkpoint and then
another, and compares the tokens that it generates with those of servers that were started from the
files. Needs vLLM; ``make demo-vllm`` installs its CPU build.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import httpx

from demo import (
    SHARED_MEMORY,
    TIMEOUT,
    TP,
    Account,
    Stopwatch,
    abandoned,
    perform,
    push,
    start,
    stop,
)
from random_checkpoint import model_config, tensor_shapes, write_checkpoint

PROMPT = (11, 22, 33, 44)
MAX_TOKENS = 12
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # for /collective_rpc
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}
PROGRAM = ["-m", "vllm.entrypoints.openai.api_server"]
EXTENSION = "checkpoint_engine.worker.VllmColocateWorkerExtension"


class VllmServer:
    """vLLM's own API server, for as long as the ``with`` block lasts."""

    def __init__(
        self, model: Path, load_format: str = "auto", options: Sequence[str] | None = None
    ) -> None:
        """``options``: how it receives weights; by default, by the worker extension."""
        self._segments = set(SHARED_MEMORY.iterdir())
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, *PROGRAM, "--port", str(port)]
        command += ["--host=127.0.0.1", f"--model={model}", f"--tensor-parallel-size={TP}"]
        command += [f"--load-format={load_format}"]
        command += [f"--worker-extension-cls={EXTENSION}"] if options is None else options
        command += ["--enforce-eager", "--skip-tokenizer-init", "--max-model-len=256"]
        command += ["--disable-uvicorn-access-log", *_options_for_tokens()]
        with (model.parent / f"{model.name}-{port}.log").open("wb") as log:
            env = {**ENVIRONMENT, **os.environ, "TMPDIR": str(model.parent)}  # vLLM leaves files
            # Its workers log failures there, and would stand still at a pipe that nobody reads.
            self.process = start(command, env=env, stdout=log, stderr=log)
        self._http = httpx.Client(trust_env=False, timeout=TIMEOUT)

    def __enter__(self) -> VllmServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.close()
        stop(self.process, TIMEOUT)
        for segment in abandoned(self._segments):
            if segment.name.startswith(("vllm_dist_", "psm_")):  # of workers that could not finish
                segment.unlink(missing_ok=True)

    def wait_until_healthy(self) -> None:
        """Raises RuntimeError if it does not come up."""
        ends = time.monotonic() + TIMEOUT
        while self.process.poll() is None and time.monotonic() < ends:
            try:
                if self._http.get(f"{self.url}/health").is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise RuntimeError(f"vLLM did not start, its exit code is {self.process.poll()}")

    def generate(self, prompt: Sequence[int] = PROMPT) -> list[int]:
        """The tokens that follow the prompt."""
        sampling = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
        body = {"token_ids": list(prompt), "sampling_params": sampling}
        answer = self._http.post(f"{self.url}/inference/v1/generate", json=body)
        if not answer.is_success:
            raise RuntimeError(f"vLLM answered {answer.status_code}: {answer.text}")
        tokens: list[int] = answer.json()["choices"][0]["token_ids"]
        return tokens


def _options_for_tokens() -> list[str]:
    """For a route with tokens in and out, which older releases have without an option."""
    (folder,) = find_spec("vllm").submodule_search_locations
    routes = Path(folder) / "entrypoints" / "scale_out" / "factories.py"
    known = routes.exists() and "enable_scale_out" in routes.read_text()
    return ["--enable-scale-out"] if known else []


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run(account: Account, folder: Path) -> None:
    """Update twice; start twice from the same files."""
    config = model_config("small")
    checkpoints = [folder / "step-1", folder / "step-2"]
    for seed, checkpoint in enumerate(checkpoints, 1):
        clock = Stopwatch()
        written = write_checkpoint(checkpoint, config, seed)
        text = f"{checkpoint.name}: {len(tensor_shapes(config))} tensors in 4 files"
        account.line("checkpoint", text, clock(), written)
    clock = Stopwatch()
    with VllmServer(checkpoints[0], "dummy") as server:
        server.wait_until_healthy()
        account.line("vLLM", f"ready with dummy weights, {TP} workers", clock())
        before = server.generate()
        account.line("before", " ".join(map(str, before)))
        updated = []
        for checkpoint in checkpoints:
            clock = Stopwatch()
            push(account, checkpoint, server, "cpu")
            account.line("update", f"{checkpoint.name}, with the start of torchrun", clock())
            updated.append(server.generate())
            account.line("tokens", " ".join(map(str, updated[-1])))
    account.verdict(
        before not in updated and updated[0] != updated[1], "other weights, other tokens"
    )
    for checkpoint, tokens in zip(checkpoints, updated, strict=True):
        clock = Stopwatch()
        with VllmServer(checkpoint) as server:
            server.wait_until_healthy()
            same = server.generate() == tokens
        text = f"the tokens after {checkpoint.name} are those of a vLLM started from its files"
        account.verdict(same, text, clock())


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="Update a running vLLM's weights, and check.")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints on the disk")
    args = parser.parse_args()
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).parent.parent))
    title = f"Checkpoint to running vLLM, {TP} parameter-server ranks to {TP} workers, twice"
    return perform(title, run, args.keep)


if __name__ == "__main__":
    sys.exit(main())
