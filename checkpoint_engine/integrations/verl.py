"""A backend for verl: ``checkpoint_engine.backend=checkpoint_engine`` and
``checkpoint_engine.custom_backend_module=checkpoint_engine.integrations.verl``.

The trainer's ranks and the rollout's are one world. Each trainer rank registers its share of the
weights in pinned host memory; each rollout reads all of them from there by P2P, and compares every
bucket with the checksums of its owner. A step ends on every rank as on the one that fails first.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ray
import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
from verl.utils.net_utils import get_free_port
from verl.workers.rollout.utils import ensure_async_iterator

from checkpoint_engine.client import BACKEND
from checkpoint_engine.errors import UpdateError
from checkpoint_engine.ground.devices import DeviceManager
from checkpoint_engine.ground.local_rank import find_local_rank
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.transfer.remote_tensors import read_tensors

SUPPORTED = "0.9.1"
_METHODS = {
    "prepare": ["self"],
    "build_topology": ["actor_wg_world_size", "rollout_world_size", "metadata"],
    "init_process_group": ["self", "kwargs"],
    "finalize": ["self"],
    "send_weights": ["self", "weights", "global_steps"],
    "receive_weights": ["self", "global_steps"],
}


def check_interface() -> None:
    """Raise ``RuntimeError`` unless this verl calls its backends as this one expects."""
    found = {
        name: list(inspect.signature(getattr(CheckpointEngine, name)).parameters)
        for name in sorted(CheckpointEngine.__abstractmethods__)
    }
    if found == dict(sorted(_METHODS.items())):
        return
    try:
        release = version("verl")
    except PackageNotFoundError:
        release = "of an unknown version"
    raise RuntimeError(
        f"verl {release} calls its backends otherwise ({found}); checkpoint_engine knows the "
        f"interface of {SUPPORTED}. verl's own backend kimi_ckpt_engine uses this library, too"
    )


@dataclass(frozen=True)
class Place:
    """One rank of a world, which meets at ``address``; the first ``owners`` ranks are the
    trainer's."""

    address: str
    port: int
    owners: int
    size: int
    rank: int


@dataclass(frozen=True)
class Offer:
    """What a worker says before a step: its place, if any, and an address for a new world."""

    place: Place | None
    address: str
    port: int


@CheckpointEngineRegistry.register(BACKEND)
class CheckpointEngineBackend(CheckpointEngine):  # type: ignore[misc]
    """Made by verl in each worker of the trainer and of the rollout."""

    def __init__(self, bucket_size: int, is_master: bool = False, timeout: float = 600.0) -> None:
        """
        Args:
            bucket_size: bytes that a rollout reads at once.
            is_master: whether this is the trainer's first rank. Not needed: the order of
                ``metadata`` says so, too.
            timeout: seconds that each part of a step may take.
        """
        self._bucket_bytes = bucket_size
        self._timeout = timedelta(seconds=timeout)
        self._place: Place | None = None
        self._server: ParameterServer | None = None
        self._reading: Generator[tuple[str, torch.Tensor], None, None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-engine-verl")

    def prepare(self) -> Offer:
        """Before each step. An engine that failed in the one before has left it open."""
        if self._reading is not None:
            with suppress(UpdateError):
                self._thread.submit(self._reading.close).result(self._timeout.total_seconds())
            self._reading = None
        address = str(ray.util.get_node_ip_address()).strip("[]")  # type: ignore[no-untyped-call]
        return Offer(self._place, address, get_free_port(address)[0])

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Offer]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Every worker's place: the one that it has, if all are in one world of these workers."""
        size = actor_wg_world_size + rollout_world_size

        def places(address: str, port: int) -> list[Place]:
            return [Place(address, port, actor_wg_world_size, size, rank) for rank in range(size)]

        first = metadata[0]
        kept = [] if first.place is None else places(first.place.address, first.place.port)
        if [offer.place for offer in metadata] != kept:
            kept = places(first.address, first.port)
        return {"place": kept[:actor_wg_world_size]}, {"place": kept[actor_wg_world_size:]}

    def init_process_group(self, place: Place) -> None:
        """Take ``place``. Raises ``RuntimeError`` where P2P does not work."""
        if place == self._place:
            return
        self._server = self._place = None
        gpu_count = None if DeviceManager().is_accelerator else place.size
        server = ParameterServer(
            rank=place.rank,
            world_size=place.size,
            auto_pg=False,
            gpu_count=gpu_count,
            master_addr=place.address,
            master_port=place.port,
        )
        if server._p2p_store is None:
            raise RuntimeError("rollouts read by P2P: pip install 'checkpoint-engine[p2p]'")
        self._here = find_local_rank(place.rank, place.size, gpu_count, None)
        self._server, self._place = server, place

    def finalize(self) -> None:
        """Nothing to do: the world is kept, and its memory, for the next step."""

    @torch.no_grad()
    async def send_weights(self, weights: Any, global_steps: int | None = None) -> dict[str, Any]:
        """On every trainer rank; returns when all rollouts have read."""
        _, place = self._world()
        own, number = {}, 0
        async for name, tensor in ensure_async_iterator(weights):
            if number % place.owners == place.rank:
                own[name] = tensor.detach().to("cpu", copy=True)
            number += 1
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._send, own, _name_of(global_steps))

    async def receive_weights(
        self, global_steps: int | None = None
    ) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """On every rollout rank: each tensor, once its bucket is checked."""
        self._reading = self._receive(_name_of(global_steps))
        loop = asyncio.get_running_loop()
        while one := await loop.run_in_executor(self._thread, next, self._reading, None):
            yield one

    def _send(self, own: dict[str, torch.Tensor], name: str) -> dict[str, Any]:
        server, _ = self._world()
        started = time.perf_counter()
        server.register_checkpoint(name, named_tensors=own)
        try:
            server.gather_metas(name, timeout=self._timeout)
            gathered = time.perf_counter()
            with server.in_step("read the weights", name, self._timeout):
                pass  # the rollouts read
        finally:
            server.unregister_checkpoint(name)
        ended = time.perf_counter()
        seconds = {"register": gathered - started, "read": ended - gathered}
        return {f"checkpoint_engine/{part}_seconds": spent for part, spent in seconds.items()}

    def _receive(self, name: str) -> Generator[tuple[str, torch.Tensor], None, None]:
        server, _ = self._world()
        server.gather_metas(name, timeout=self._timeout)
        with server.in_step("read the weights", name, self._timeout) as call:
            call.watch()
            store, metas = server._p2p_store, server.get_metas()
            assert store is not None
            try:
                yield from read_tensors(store, self._here, metas, self._bucket_bytes, call.check)
            except GeneratorExit:
                raise RuntimeError("the engine failed before it had all weights") from None

    def _world(self) -> tuple[ParameterServer, Place]:
        if self._server is None or self._place is None:
            raise RuntimeError("init_process_group has not been called")
        return self._server, self._place


def _name_of(step: int | None) -> str:
    return "weights" if step is None else f"step-{step}"


check_interface()
