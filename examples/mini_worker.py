"""One tensor-parallel worker of the mini engine: a process that holds its shards of the model.

Started by ``mini_engine.py``, which sends calls through a pipe and owns this process's life.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from checkpoint_engine.certify.worker import CertifiedWorker
from checkpoint_engine.memory.files import open_files, view_tensors
from parallel_layers import TensorParallel
from tiny_transformer import CausalLM, ModelConfig, new_model

COLLECTIVE_TIMEOUT = timedelta(seconds=60)
"""How long a worker waits for the others before it gives the call up."""


class Worker(CertifiedWorker):
    """The methods are those of ``/collective_rpc``; every worker runs each call at the same time.

    ``CertifiedWorker`` is ``worker.VllmColocateWorkerExtension`` with what ``checkpoint-engine
    certify`` asks besides. ``update_weights_from_ipc`` needs ``device``, ``local_rank`` and
    ``model_runner.model.load_weights``, as a worker of vLLM has them.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.local_rank = self.rank = args.rank
        self.device = _device(args.device, args.rank, args.tp)
        tp = _tensor_parallel(args)
        model = new_model(ModelConfig.from_folder(args.model), tp, self.device)
        self.model_runner = SimpleNamespace(model=model)
        _fill_with_dummies(model)
        if args.load_format == "safetensors":
            self.load_checkpoint(str(args.model))

    def load_checkpoint(self, folder: str) -> None:
        """Load the whole checkpoint in ``folder``.

        Raises:
            ValueError: the files lack a tensor of the model, or hold one that is not of it.
        """
        model: CausalLM = self.model_runner.model
        missing = model.checkpoint_names()
        for name, tensor in view_tensors(open_files([folder]).values()).items():
            model.load_weights([(name, tensor)])
            missing.discard(name)
        if missing:
            raise ValueError(f"{folder} lacks {len(missing)} tensors: {sorted(missing)}")

    def generate(self, prompt_token_ids: list[int], max_tokens: int) -> list[int]:
        """Greedy decoding; the same tokens on every worker."""
        tokens: list[int] = self.model_runner.model.generate(prompt_token_ids, max_tokens)
        return tokens

    def weights_digest(self) -> dict[str, str]:
        """SHA-256 of every parameter's bytes on this worker, by the parameter's name."""
        return {
            name: hashlib.sha256(param.data.flatten().view(torch.uint8).cpu().numpy()).hexdigest()
            for name, param in self.model_runner.model.named_parameters()
        }

    def describe(self) -> dict[str, Any]:
        """What this worker is and holds."""
        sizes = [param.nbytes for param in self.model_runner.model.parameters()]
        return {
            "pid": os.getpid(),
            "rank": self.rank,
            "device": self.device.type,
            "parameters": len(sizes),
            "bytes": sum(sizes),
        }


def _device(kind: str, rank: int, workers: int) -> torch.device:
    gpus = torch.cuda.device_count()
    if kind == "auto":
        kind = "cuda" if gpus >= workers else "cpu"
    if kind == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
        return torch.device("cpu")
    if gpus < workers:
        raise ValueError(f"{workers} workers need as many GPUs, this machine has {gpus}")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _tensor_parallel(args: argparse.Namespace) -> TensorParallel:
    """Meet the other workers, at the store whose socket the engine opened for rank 0."""
    if args.tp == 1:
        return TensorParallel()
    store = dist.TCPStore(
        "127.0.0.1",
        args.store_port,
        is_master=args.rank == 0,
        master_listen_fd=args.store_fd,
        timeout=COLLECTIVE_TIMEOUT,
    )
    dist.init_process_group(
        "gloo", store=store, rank=args.rank, world_size=args.tp, timeout=COLLECTIVE_TIMEOUT
    )
    return TensorParallel(args.rank, args.tp, dist.all_reduce)


def _fill_with_dummies(model: CausalLM) -> None:
    """Small random numbers, as ``--load-format dummy`` of vLLM: one pattern, repeated."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.empty(1 << 16).uniform_(-1e-3, 1e-3, generator=generator)
    for param in model.parameters():
        flat = param.data.flatten()  # a view: parameters are contiguous
        whole = len(flat) // len(pattern) * len(pattern)
        flat[:whole].view(-1, len(pattern)).copy_(pattern)
        flat[whole:].copy_(pattern[: len(flat) - whole])


def _exit_with_engine() -> None:
    """The engine holds the other end of stdin and never writes: its end is the engine's end."""
    os.read(0, 1)
    os._exit(0)  # also out of a call that still runs


def _attempt(function: Callable[..., Any], *args: Any) -> tuple[bool, Any]:
    try:
        return True, function(*args)
    except Exception:
        return False, traceback.format_exc()


def _call(worker: Worker, method: str, args: list[Any]) -> Any:
    if method.startswith("_") or not callable(getattr(worker, method, None)):
        raise ValueError(f"a worker has no method {method!r}")
    result = getattr(worker, method)(*args)
    return result if result is None or isinstance(result, (dict, list)) else str(result)


def serve(connection: Connection, args: argparse.Namespace) -> None:
    """Answer ``(call id, method, args)`` with ``(call id, succeeded, result or traceback)``.

    Call 0 is the start itself. A call that fails leaves the worker ready for the next one.
    """
    started, worker = _attempt(Worker, args)
    connection.send((0, started, None if started else worker))
    while started:
        call_id, method, arguments = connection.recv()
        connection.send((call_id, *_attempt(_call, worker, method, arguments)))


def main() -> None:
    """The command line that ``mini_engine.py`` builds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--tp", type=int, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--load-format", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--connection-fd", type=int, required=True)
    parser.add_argument("--store-port", type=int, required=True)
    parser.add_argument("--store-fd", type=int)
    args = parser.parse_args()
    threading.Thread(target=_exit_with_engine, daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):  # the engine is gone
        serve(Connection(args.connection_fd), args)


if __name__ == "__main__":
    main()
