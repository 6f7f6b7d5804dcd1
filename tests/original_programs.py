"""A server of one release and a worker of another, in processes of their own.

``original_programs.py serve WORKER_PATH`` updates a worker process twice, whose
``checkpoint_engine`` is found in WORKER_PATH; ``original_programs.py work ADDRESS SEED`` is that
worker. Only what every release has is used.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch
import zmq

DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.int32, torch.uint8, torch.int64]


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """A few hundred tensors, of which some are larger than the buckets of these tests."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for number in range(300):
        dtype = DTYPES[number % len(DTYPES)]
        rows = 1 + number * 37 % 700
        nbytes = rows * 64 * dtype.itemsize
        data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)
        made[f"layers.{number}.weight"] = data.view(dtype).view(rows, 64)
    return made


def serve(worker_path: str) -> None:
    from checkpoint_engine.ps import ParameterServer

    print("server from", sys.modules["checkpoint_engine"].__file__)
    ps = ParameterServer(auto_pg=True)
    for seed in (1, 2):
        name = f"step-{seed}"
        ps.register_checkpoint(name, named_tensors=tensors(seed))
        ps.gather_metas(name)
        seen: list[int] = []

        def ask(
            socket_paths: list[tuple[str, str]], seed: int = seed, seen: list[int] = seen
        ) -> None:
            command = [sys.executable, __file__, "work", socket_paths[0][1], str(seed)]
            environment = {**os.environ, "PYTHONPATH": worker_path}
            seen.append(subprocess.run(command, env=environment, timeout=100).returncode)

        ps.update(name, ask)
        if seen != [0]:
            raise SystemExit(f"the worker of update {seed} ended with {seen}")
        ps.unregister_checkpoint(name)


def work(address: str, seed: int) -> None:
    from checkpoint_engine.worker import update_weights_from_ipc

    print("worker from", sys.modules["checkpoint_engine"].__file__)
    torch.cuda.set_device(0)
    received: dict[str, torch.Tensor] = {}
    hooks: list[int] = []

    def load(weights: list[tuple[str, torch.Tensor]]) -> None:
        received.update({name: tensor.cpu() for name, tensor in weights})

    with zmq.Context() as context:
        update_weights_from_ipc(
            context, address, 0, run=load, post_hook=lambda: hooks.append(len(received))
        )
    expected = tensors(seed)
    assert received.keys() == expected.keys()
    for name, tensor in expected.items():
        assert received[name].dtype == tensor.dtype
        assert torch.equal(received[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert hooks == [len(expected)]


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        work(sys.argv[2], int(sys.argv[3]))
