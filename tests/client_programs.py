"""What the programs in the field do with this library, call for call: ``client_programs.py NAME
ARGUMENTS OUTPUT_FOLDER``, run by ``torchrun.py`` on every rank.

Each makes the imports of its client, and its calls in its order.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import torch
import torch.distributed
from safetensors.torch import save_file

from engines import (
    SGLangWorker,
    Workers,
    serve_http,
    sglang_routes,
    vllm_routes,
    vllm_worker,
)
from fleet import digests, mixed_tensors

RANK = int(os.environ["RANK"])
WORLD_SIZE = int(os.environ["WORLD_SIZE"])
SHORT = timedelta(seconds=40)
LINGERS = 0.3  # seconds
SocketPaths = list[tuple[str, str]]


def expected(seed: int, owners: range) -> dict[str, str]:
    return {k: v for owner in owners for k, v in digests(mixed_tensors(seed, owner)).items()}


def check(workers: Workers, seed: int, owners: range | None = None) -> None:
    """Every worker holds exactly what the owners sent, all of it loaded anew."""
    want = expected(seed, range(WORLD_SIZE) if owners is None else owners)
    for found in workers.call("digests"):
        wrong = sorted(name for name in want.keys() | found if found.get(name) != want.get(name))
        if wrong:
            raise AssertionError(f"{len(wrong)} tensors are wrong: {wrong[:5]}")


class Engine:
    """The engine of ``size`` workers that this rank serves; its first rank starts it."""

    def __init__(self, make: Callable[[int], Any], routes: Any, size: int, stack: ExitStack):
        self.first = RANK - RANK % size
        self.leads = self.first == RANK
        self.bodies: list[Any] = []
        if self.leads:
            self.workers = Workers(make, size, self.first)
            stack.callback(self.workers.stop)
            self._routes = routes(self.workers, self.bodies)

    @contextmanager
    def listening(self) -> Iterator[str]:
        """Its address: on the first rank its own, on the others none that answers."""
        if not self.leads:
            yield "http://not.asked"
            return
        with serve_http(self._routes) as url:
            yield url

    def check(self, seed: int, owners: range | None = None) -> None:
        if self.leads:
            check(self.workers, seed, owners)

    def forget(self, *how: Any) -> None:
        """As of the workers."""
        if self.leads:
            self.workers.call("forget", *how)


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# ---------------------------------------------------------------------- SGLang


def sglang(folder: str, p2p: bool) -> dict[str, Any]:
    """Its ``update`` launcher, in front of its own server side."""
    from checkpoint_engine.ps import ParameterServer

    def wait_for_ping(url: str) -> None:
        if engine.leads:
            ends = time.monotonic() + 30
            while httpx.get(f"{url}/ping", trust_env=False).status_code != 200:
                if time.monotonic() > ends:
                    raise TimeoutError(url)

    def split(seed: int) -> tuple[list[str], dict[str, torch.Tensor]]:
        """Some tensors in files, the others given by name."""
        tensors = mixed_tensors(seed, RANK)
        in_file = {n: t.contiguous() for n, t in tensors.items() if n.startswith("layers.1")}
        path = f"{folder}/{seed}-{RANK}.safetensors"
        save_file(in_file, path)
        return [path], {n: t for n, t in tensors.items() if n not in in_file}

    def request(socket_paths: SocketPaths) -> None:
        if not engine.leads:
            return
        handles = dict(socket_paths[engine.first : engine.first + WORLD_SIZE])
        with httpx.Client(transport=httpx.HTTPTransport(), trust_env=False) as client:
            answer = client.post(
                f"{url}/update_weights_from_ipc",
                json={"zmq_handles": handles, "flush_cache": True, "weight_version": "step-1"},
                timeout=30,
            )
            answer.raise_for_status()

    with ExitStack() as stack:
        engine = Engine(SGLangWorker, sglang_routes, WORLD_SIZE, stack)
        ps = ParameterServer(auto_pg=True)
        if not p2p:
            ps._p2p_store = None
        url = stack.enter_context(engine.listening())
        files, named_tensors = split(1)
        ps.register_checkpoint("step-1", files=files, named_tensors=named_tensors)
        ps.init_process_group()
        wait_for_ping(url)
        torch.distributed.barrier()
        ps.gather_metas("step-1")
        metas = pickle.dumps(ps.get_metas())
        ps.update("step-1", request)
        engine.check(1)
        if p2p:  # as a world does that joins
            engine.forget()
            ps.init_process_group()
            torch.distributed.barrier()
            ps.gather_metas("step-1")
            ps.load_metas(pickle.loads(metas))
            ps.update("step-1", request, ranks=list(range(WORLD_SIZE)))
            engine.check(1)
            ps.gather_metas("step-1")
        engine.forget("large.1")
        failure = error_of(lambda: ps.update("step-1", request))
        engine.forget()
        ps.update("step-1", request)
        engine.check(1)
        return {
            "bodies": engine.bodies,
            "failure": failure,
            "metas": sorted(pickle.loads(metas)),
            "group": torch.distributed.is_initialized(),
        }


# ---------------------------------------------------------------------- verl


def verl(trainers: int) -> dict[str, Any]:
    """Its checkpoint engine: trainers own weights, the other ranks pull them and broadcast them
    among themselves. It never calls ``update``."""
    import checkpoint_engine.distributed as dist
    from checkpoint_engine.ps import (
        H2DBucket,
        ParameterMeta,
        ParameterServer,
        _gen_h2d_buckets,
        _to_named_tensor,
    )

    assert H2DBucket is not None
    assert ParameterMeta is not None

    def receive_tensor(
        self: ParameterServer, name: str, group: Any, ranks: list[int], bucket_size: int
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Put on the instance."""
        assert dist.is_initialized()
        dist.barrier(group=group)
        buckets = _gen_h2d_buckets(
            self._current_global_parameter_metas,
            bucket_size,
            self._local_rdma_devices,
            self._remote_rdma_devices,
            ranks,
        )
        device = self.device_manager.device_type
        h2d_buffer = torch.empty(bucket_size, dtype=torch.uint8, device=device)
        self._p2p_store.register_named_tensors({"__h2d_buffer__": h2d_buffer})
        buffer = torch.empty(2 * bucket_size, dtype=torch.uint8, device=device)
        by_receiver: dict[int, list[tuple[int, Any]]] = {}
        for receiver, owner, bucket in buckets:
            by_receiver.setdefault(receiver, []).append((owner, bucket))
        turn = 0
        for i in range(max(map(len, by_receiver.values()))):
            mine = by_receiver.get(self._rank, [])
            if i < len(mine):
                owner, bucket = mine[i]
                self._copy_to_buffer(name, bucket, h2d_buffer, owner)
            for receiver, received in by_receiver.items():
                if i >= len(received):
                    continue
                bucket = received[i][1]
                start = turn % 2 * bucket_size
                half = buffer[start : start + bucket.size]
                if receiver == self._rank:
                    half.copy_(h2d_buffer[: bucket.size])
                dist.broadcast(half, src=receiver, group=group)
                for entry in _to_named_tensor(bucket.items, start):
                    nbytes = entry["dtype"].itemsize * entry["shape"].numel()
                    flat = buffer[entry["offset"] : entry["offset"] + nbytes]
                    yield entry["name"], flat.view(entry["dtype"]).view(entry["shape"])
                turn += 1
        self.device_manager.device_module.synchronize()
        self._p2p_store.unregister_named_tensors(["__h2d_buffer__"])

    torch.distributed.init_process_group("gloo")  # the trainer's own, which stays as it is
    dist.use_backend("vllm_nccl")
    ps = ParameterServer(
        rank=RANK,
        world_size=WORLD_SIZE,
        auto_pg=False,
        master_addr=os.environ["MASTER_ADDR"],
        master_port=int(os.environ["MASTER_PORT"]) + 1,
    )
    ps.receive_tensor = types.MethodType(receive_tensor, ps)
    ps.init_process_group()
    rollout = list(range(trainers, WORLD_SIZE))
    group = dist.new_group(rollout)
    received: list[dict[str, str]] = []
    for seed in (1, 2):
        name = f"step-{seed}"
        if trainers > RANK:
            ps.register_checkpoint(name, named_tensors=mixed_tensors(seed, RANK))
        dist.barrier()
        ps.gather_metas(name)
        dist.barrier()
        if RANK in rollout:
            tensors = ps.receive_tensor(name, group, rollout, 4 << 20)
            received.append({n: digests({n: t.clone()})[n] for n, t in tensors})
            assert received[-1] == expected(seed, range(trainers))
        dist.barrier()
        if trainers > RANK:
            ps.unregister_checkpoint(name)
    gathered: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(gathered, RANK)
    total = torch.ones(1)
    dist.all_reduce(total)
    dist.destroy_process_group()
    return {
        "updates": len(received),
        "gathered": gathered,
        "sum": int(total),
        "group": dist.is_initialized(),
        "trainers": torch.distributed.is_initialized(),
    }


# ---------------------------------------------------------------------- xtuner


def xtuner() -> dict[str, Any]:
    """On the trainer's own process group, in memory that successive checkpoints share."""
    from checkpoint_engine.ps import ParameterServer

    with ExitStack() as stack:
        workers = Workers(SGLangWorker, 1, RANK)  # each rank talks to its own worker
        stack.callback(workers.stop)
        torch.distributed.init_process_group("gloo")
        ps = ParameterServer(auto_pg=False, rank=RANK, world_size=WORLD_SIZE)

        def request(socket_paths: SocketPaths) -> None:
            ((success, message),) = workers.call(
                "update_weights_from_ipc", dict([socket_paths[RANK]])
            )
            if not success:
                raise RuntimeError(message)

        for seed, ranks in enumerate([None, [WORLD_SIZE - 1]], 1):
            name = f"step-{seed}"
            ps.register_checkpoint(
                name,
                files=[],
                named_tensors=mixed_tensors(seed, RANK),
                use_shared_memory_pool=True,
            )
            torch.distributed.barrier()
            ps.gather_metas(name)
            workers.call("forget")
            ps.update(name, request, ranks=ranks)
            if ranks is None or RANK in ranks:
                check(workers, seed)
            kept = bool(ps._memory_pool[ps.shared_memory_pool_name])
            torch.distributed.barrier()
            ps.unregister_checkpoint(name, **({"force": True} if seed == 2 else {}))
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        torch.distributed.destroy_process_group()
        return {"sum": int(total), "pool": [kept, sorted(ps._memory_pool)]}


# ---------------------------------------------------------------------- lmdeploy


def lmdeploy() -> dict[str, Any]:
    """A broadcast, then the chosen ranks from metas that travelled as JSON."""
    from checkpoint_engine.ps import ParameterServer
    from checkpoint_engine.world.metas_file import decode_metas, encode_metas

    def request(socket_paths: SocketPaths) -> None:
        if engine.leads:
            handles = dict(socket_paths[engine.first : engine.first + WORLD_SIZE])
            answer = httpx.post(
                f"{url}/update_weights_from_ipc",
                json={"zmq_handles": handles},
                timeout=30,
                trust_env=False,
            )
            answer.raise_for_status()

    with ExitStack() as stack:
        engine = Engine(SGLangWorker, sglang_routes, WORLD_SIZE, stack)
        ps = ParameterServer()
        url = stack.enter_context(engine.listening())
        ps.register_checkpoint("c", named_tensors=mixed_tensors(1, RANK))
        ps.gather_metas("c")
        ps.update("c", request, ranks=None)
        engine.check(1)
        engine.forget()
        ps.load_metas(decode_metas(encode_metas(ps.get_metas())))
        ps.update("c", request, ranks=list(range(WORLD_SIZE)))
        engine.check(1)
        return {"bodies": engine.bodies}


# ---------------------------------------------------------------------- vLLM


def older_recipe(port: int) -> dict[str, Any]:
    """As recipes for release 0.2 do, in front of vLLM with the worker extension."""
    from checkpoint_engine.ps import ParameterServer, request_inference_to_update

    def request(socket_paths: SocketPaths) -> None:
        if engine.leads:
            mine = socket_paths[engine.first : engine.first + WORLD_SIZE]
            request_inference_to_update(url=f"{url}/collective_rpc", socket_paths=dict(mine))

    with ExitStack() as stack:
        engine = Engine(vllm_worker, vllm_routes, WORLD_SIZE, stack)
        ps = ParameterServer()
        url = stack.enter_context(engine.listening())
        ps.init_process_group(master_port=port)
        ps.register_checkpoint("c", named_tensors=mixed_tensors(1, RANK))
        torch.distributed.barrier()
        ps.gather_metas("c")
        ps.update("c", request)
        engine.check(1)
        engine.forget("large.0")
        failure = error_of(lambda: ps.update("c", request))
        engine.forget()
        ps.update("c", request)
        engine.check(1)
        kept = torch.distributed.is_initialized()
        return {"bodies": engine.bodies, "failure": failure, "group": kept}


# ---------------------------------------------------------------------- ready req_funcs


def ready(kind: str) -> dict[str, Any]:
    """Two engines of two workers each, asked by what ``checkpoint_engine.client`` offers."""
    from checkpoint_engine import client
    from checkpoint_engine.ps import ParameterServer

    size = WORLD_SIZE // 2
    worker, routes = (vllm_worker, vllm_routes) if kind == "vllm" else (SGLangWorker, sglang_routes)
    options = {"pause": "keep", "reset_prefix_cache": True} if kind == "vllm" else {}
    with ExitStack() as stack:
        engine = Engine(worker, routes, size, stack)
        ps = ParameterServer()
        url = stack.enter_context(engine.listening())
        make = getattr(client, f"{kind}_request")
        request = make(url, inference_parallel_size=size, timeout=30, **options)
        ps.register_checkpoint("c", named_tensors=mixed_tensors(1, RANK))
        ps.gather_metas("c")
        ps.update("c", request, timeout=SHORT)
        engine.check(1)
        # The other engine could have loaded everything before the first one fails.
        engine.forget(*((f"large.{WORLD_SIZE - 1}",) if engine.first == 0 else ("", LINGERS)))
        failure = error_of(lambda: ps.update("c", request, timeout=SHORT))
        engine.forget()
        ps.update("c", request, timeout=SHORT)
        engine.check(1)
        asked = [body if isinstance(body, str) else "update" for body in engine.bodies]
        return {"failure": failure, "asked": asked}


PROGRAMS = {f.__name__: f for f in (sglang, verl, xtuner, lmdeploy, older_recipe, ready)}

if __name__ == "__main__":
    name, arguments, output = sys.argv[1:]
    result = PROGRAMS[name](**json.loads(arguments))
    (Path(output) / f"{RANK}.json").write_text(json.dumps(result))
