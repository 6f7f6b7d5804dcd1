"""Sharded updates of real vLLM engines over two hosts: namespaces with networks of their own, and
Mooncake over TCP. What enters a host is counted by its network interface."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))

from conftest import HERE, EngineHost
from hosts import Host, World
from random_checkpoint import model_config, tensor_shapes, write_checkpoint
from test_hosts import MakeHosts, check_clean, make_hosts  # noqa: F401
from torchrun import MOONCAKE_ADVICE, mooncake_works

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(not mooncake_works(), reason=MOONCAKE_ADVICE),
]
CPU = {"PS_DEVICE": "cpu", "PS_MAX_BUCKET_SIZE_GB": str(16 / 1024)}
TP = 2
TRANSPORTS = [*["auto"] * 5, "group"]
TAUGHT = 2
"""The workers have stated their needs after as many updates."""

CONFIG = model_config("small") | {
    "hidden_size": 128,
    "intermediate_size": 32768,  # so a row of a worker's slice is long enough to be read alone
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BYTES = {name: 2 * math.prod(shape) for name, shape in tensor_shapes(CONFIG).items()}
UNUSED = 16 << 20
"""Bytes of a tensor that is no part of the model."""


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    paths = {name: str(tmp_path / name) for name in ("step-1", "step-2")}
    for seed, path in enumerate(paths.values()):
        write_checkpoint(Path(path), CONFIG, seed)
    return paths


@contextmanager
def engines_on(hosts: Sequence[Host], folder: Path) -> Iterator[list[EngineHost]]:
    memory = ["mount", "-t", "tmpfs", "none", "/dev/shm"]  # vLLM's workers leave some of theirs
    with ExitStack() as stack, ThreadPoolExecutor(len(hosts)) as pool:
        for place, host in enumerate(hosts):
            assert host.popen(memory).wait(20) == 0
            (folder / f"engine-{place}").mkdir()
        folders = [folder / f"engine-{place}" for place in range(len(hosts))]
        engines = list(pool.map(EngineHost, folders, [host.popen for host in hosts]))
        for engine in engines:
            stack.callback(engine.close)
        yield engines


def updated(
    hosts: Sequence[Host], folder: Path, each: int, program: str, **options: Any
) -> list[list[dict[str, Any]]]:
    """What each rank saw of every update; the models take turns."""
    names = itertools.cycle(options["models"])
    options["steps"] = [{"name": next(names), "transport": one} for one in TRANSPORTS]
    command = [str(HERE / "vllm_host_programs.py"), program, json.dumps(options)]
    results = World(hosts, folder / "world", command, each, CPU).wait(250)
    check_clean(results)
    seen = [result["seen"] for result in results]
    for number in range(len(TRANSPORTS)):
        for one in (rank[number] for rank in seen):
            assert one["way"] == ("shard" if is_sharded(number) else "broadcast")
            assert one.get("right", True)
            assert set(one.get("loaded", [])) <= {"recorded" if number < TAUGHT else "replayed"}
    return seen


def is_sharded(number: int) -> bool:
    return number >= TAUGHT and TRANSPORTS[number] == "auto"


def check_bytes(ranks: Sequence[list[dict[str, Any]]], needed: int, owned_elsewhere: int) -> None:
    """``ranks``: those of one host."""
    for number, seen in enumerate(zip(*ranks, strict=True)):
        received, read = seen[0]["received"], sum(one["read"] for one in seen)
        print(f"{seen[0]['way']}: {received:,} in, {read:,} read, {seen[0]['seconds']:.2f} s")
        if is_sharded(number):
            assert needed <= read <= received <= 1.05 * needed
        else:
            assert received >= owned_elsewhere


@pytest.mark.timeout(300)
def test_an_engine_on_one_of_the_hosts(
    tmp_path: Path,
    make_hosts: MakeHosts,  # noqa: F811
    models: dict[str, str],
) -> None:
    """Its workers hold halves of each tensor, so its host needs the model, and nothing else."""
    first, second = make_hosts(2)
    with engines_on([second], tmp_path) as (engine,):
        options: dict[str, Any] = {"url": engine.url, "models": models, "unused_bytes": UNUSED}
        seen = updated([first, second], tmp_path, TP, "beside", **options)
    for ranks in seen[:TP]:
        assert all(one["right"] for one in ranks)
    assert all(one["right"] and one["loaded"] for one in seen[TP])
    needed = sum(BYTES.values())
    check_bytes(seen[TP:], needed, needed + UNUSED)


@pytest.mark.timeout(300)
def test_an_engine_over_both_hosts(
    tmp_path: Path,
    make_hosts: MakeHosts,  # noqa: F811
    models: dict[str, str],
) -> None:
    """Each host has one of its workers, which needs half of each tensor, and norms in full."""
    hosts = make_hosts(2)
    with engines_on(hosts, tmp_path) as engines:
        options: dict[str, Any] = {"urls": [engine.url for engine in engines], "models": models}
        seen = updated(hosts, tmp_path, 1, "across", ports=[29700, 29800], **options)
    assert all(one["right"] and one["loaded"] for one in seen[0])
    for rank, ranks in enumerate(seen):
        elsewhere = [name for place, name in enumerate(BYTES) if place % TP != rank]
        needed = sum(BYTES[n] // (1 if n.endswith("norm.weight") else TP) for n in elsewhere)
        check_bytes([ranks], needed, sum(BYTES[name] for name in elsewhere))
