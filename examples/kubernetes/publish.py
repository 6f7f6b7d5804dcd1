"""Send a checkpoint into this pod's engine. Run in every pod's parameter-server at the same time.

    python publish.py step-7 /models/step-7

The container's environment says which ranks are this pod's: ``NODES``, ``NODE_RANK``, ``GPUS`` and
the folder ``SERVERS`` with their sockets. ``--check`` only asks whether they are up.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from checkpoint_engine.memory.folder import checkpoint_of, split_over_ranks

TIMEOUT = 600.0
"""Seconds that one step may take."""


class Pod:
    """The servers of one pod; its ranks are consecutive, and its engine has a worker for each."""

    def __init__(self) -> None:
        gpus = int(os.environ["GPUS"])
        first = int(os.environ["NODE_RANK"]) * gpus
        self.ranks = list(range(first, first + gpus))
        self.world_size = int(os.environ["NODES"]) * gpus

    def request(self, rank: int, engine: str) -> dict[str, Any]:
        """Of the pod's first rank: ask the engine to receive from all of them."""
        if rank != self.ranks[0]:
            return {"timeout": TIMEOUT}
        url = f"{engine}/collective_rpc"
        return {"update_url": url, "inference_group_ranks": self.ranks, "timeout": TIMEOUT}


def call(method: str, rank: int, route: str, body: Any = None) -> None:
    """Raises ``RuntimeError`` with the server's whole answer if it refuses or fails."""
    transport = httpx.HTTPTransport(uds=f"{os.environ['SERVERS']}/{rank}.sock")
    with httpx.Client(transport=transport, timeout=TIMEOUT + 10, trust_env=False) as client:
        answer = client.request(method, f"http://localhost/v1/{route}", json=body)
    if not answer.is_success:
        raise RuntimeError(f"rank {rank}: {method} {route}: {answer.status_code} {answer.text}")


def publish(pod: Pod, name: str, files: list[str], engine: str) -> None:
    """Register, gather, update, unregister, each on all ranks at the same time."""
    route = f"checkpoints/{name}"
    shares = split_over_ranks(files, pod.world_size)
    with ThreadPoolExecutor(len(pod.ranks)) as pool:

        def everywhere(method: str, step: str, bodies: list[Any]) -> None:
            steps = [f"{route}{step}"] * len(bodies)
            list(pool.map(call, [method] * len(bodies), pod.ranks, steps, bodies))

        nothing = [None] * len(pod.ranks)
        try:
            everywhere("POST", "/files", [{"files": shares[rank]} for rank in pod.ranks])
            everywhere("POST", "/gather-metas", nothing)
            everywhere("POST", "/update", [pod.request(rank, engine) for rank in pod.ranks])
        finally:
            everywhere("DELETE", "", nothing)


def main() -> int:
    parser = argparse.ArgumentParser(description="Send a checkpoint into this pod's engine.")
    parser.add_argument("name", nargs="?")
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--engine", default="http://localhost:8000")
    parser.add_argument("--check", action="store_true", help="only ask whether the servers are up")
    args = parser.parse_args()
    pod = Pod()
    if args.check:
        for rank in pod.ranks:
            call("GET", rank, "healthz")
        return 0
    if args.folder is None:
        parser.error("give a name and a folder")
    try:
        files = checkpoint_of(args.folder)
    except ValueError as error:
        parser.error(str(error))
    publish(pod, args.name, files, args.engine)
    print(f"sent {args.name}: {len(files)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
