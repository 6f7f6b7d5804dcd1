"""Send a checkpoint into running inference engines, with Ray instead of torchrun.

    python examples/ray_update.py --checkpoint-path /models/qwen --nodes 2 --servers-per-node 8

Every parameter server is an actor. It learns its rank, the world's size and where rank 0 listens
from arguments alone. Each node gets ``--servers-per-node`` consecutive ranks, one for each
inference worker there. They reserve no GPU, for the engines have those, but see all of the node's.
This folder must be on every node, at the same path.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

EXAMPLES = Path(__file__).resolve().parent
NODES_TIMEOUT = 120  # seconds for Ray to find room for all servers

# Some releases of Ray hide all GPUs from actors that reserve none.
ENVIRONMENT = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "OMP_NUM_THREADS": "1"}


@ray.remote(num_cpus=1, max_restarts=0)
class Server:
    """One rank. The driver calls every method on all ranks at the same time."""

    def address(self) -> tuple[str, int]:
        """Where the ranks can meet if this one is rank 0."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, rank: int, world_size: int, gpu_count: int, meet_at: tuple[str, int]) -> None:
        from checkpoint_engine.ps import ParameterServer

        self._rank, self._world_size = rank, world_size
        self._ps = ParameterServer(
            rank=rank,
            world_size=world_size,
            gpu_count=gpu_count,
            master_addr=meet_at[0],
            master_port=meet_at[1],
        )

    def register(self, name: str, folder: str) -> int:
        """Take this rank's share of a checkpoint; returns its bytes."""
        from update import load_share

        files, tensors, nbytes = load_share(Path(folder), self._rank, self._world_size)
        self._ps.register_checkpoint(name, files=files, named_tensors=tensors)
        return int(nbytes)

    def gather(self, name: str) -> None:
        self._ps.gather_metas(name)

    def update(self, name: str, endpoint: str, inference_parallel_size: int) -> int:
        """Send it to all engines; returns its bytes."""
        from checkpoint_engine.client import vllm_request, wait_until_ready

        if self._rank % inference_parallel_size == 0:
            wait_until_ready(f"{endpoint}/health", timeout=300)
        request = vllm_request(
            endpoint, rank=self._rank, inference_parallel_size=inference_parallel_size
        )
        return self._ps.update(name, request).bytes

    def unregister(self, name: str) -> None:
        self._ps.unregister_checkpoint(name)


class Servers:
    """All of them, on nodes of their own. The rank of a server is its place in the list."""

    def __init__(self, nodes: int, per_node: int) -> None:
        """Raises ``RuntimeError`` if Ray has no room for them."""
        bundles = [{"CPU": float(per_node)}] * nodes
        self._room = placement_group(bundles, strategy="STRICT_SPREAD")
        try:
            if not self._room.wait(NODES_TIMEOUT):
                raise RuntimeError(f"Ray has no {nodes} nodes with {per_node} CPUs free")
            self._actors = [self._make(rank // per_node) for rank in range(nodes * per_node)]
            meet_at = ray.get(self._actors[0].address.remote())
            world_size = len(self._actors)
            starts = [
                actor.start.remote(rank, world_size, per_node, meet_at)
                for rank, actor in enumerate(self._actors)
            ]
            ray.get(starts)
        except BaseException:
            self.stop()
            raise

    def _make(self, bundle: int) -> Any:
        place = PlacementGroupSchedulingStrategy(self._room, placement_group_bundle_index=bundle)
        return Server.options(
            scheduling_strategy=place, runtime_env={"env_vars": actor_environment()}
        ).remote()

    def call(self, method: str, *args: Any) -> list[Any]:
        """On every rank at the same time; returns their results in rank order."""
        clock = time.perf_counter()
        results = ray.get([getattr(actor, method).remote(*args) for actor in self._actors])
        seconds = time.perf_counter() - clock
        print(f"{method:<10} {seconds:8.3f} s", flush=True)
        return results

    def stop(self) -> None:
        """Ends the actors too."""
        remove_placement_group(self._room)


def actor_environment() -> dict[str, str]:
    """What the actors get of this process's environment, and the folder of this example."""
    path = os.pathsep.join([str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])])
    mine = {key: value for key, value in os.environ.items() if key.startswith("PS_")}
    return {**ENVIRONMENT, **mine, "PYTHONPATH": path}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Send a checkpoint into engines, with Ray.")
    add = parser.add_argument
    add("--checkpoint-path", type=Path, required=True, help="folder of the checkpoint")
    add("--checkpoint-name", default="my-checkpoint-iter-0")
    add("--endpoint", default="http://localhost:19730", help="of the engine, on its first node")
    add("--inference-parallel-size", type=int, default=8, help="workers per engine")
    add("--servers-per-node", type=int, default=8)
    add("--nodes", type=int, default=1)
    add("--ray-address", help="of a cluster that runs; default: one of this process's own")
    add("--ray-temp-dir", help="folder of that one's session, with a short path")
    return parser.parse_args()


def connect(args: argparse.Namespace) -> None:
    """Join the cluster, or start one that ends with this process."""
    if args.ray_address is not None:
        ray.init(address=args.ray_address)
        return
    # Ray runs actors at nice 15, where any busy program of the node keeps the weights waiting.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        num_cpus=args.servers_per_node * args.nodes,
        include_dashboard=False,
        object_store_memory=80 << 20,  # no weights pass through it
        _temp_dir=args.ray_temp_dir,
    )


def main() -> int:
    args = parse_args()
    connect(args)
    try:
        servers = Servers(args.nodes, args.servers_per_node)
        name = args.checkpoint_name
        nbytes = sum(servers.call("register", name, str(args.checkpoint_path.resolve())))
        servers.call("gather", name)
        servers.call("update", name, args.endpoint, args.inference_parallel_size)
        servers.call("unregister", name)
        servers.stop()
        print(f"sent {nbytes / 1e9:.3f} GB", flush=True)
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
