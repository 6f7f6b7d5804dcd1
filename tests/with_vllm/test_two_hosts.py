"""Sharded updates over two hosts, of which one serves a real vLLM engine at TP 2: namespaces with
networks of their own, and Mooncake over TCP. What enters a host is counted by its network
interface."""

from __future__ import annotations

import itertools
import json
import math
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))

from conftest import HERE, EngineHost
from hosts import World
from random_checkpoint import model_config, tensor_shapes, write_checkpoint
from test_hosts import MakeHosts, check_clean, make_hosts  # noqa: F401
from torchrun import MOONCAKE_ADVICE, mooncake_works

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(not mooncake_works(), reason=MOONCAKE_ADVICE),
]
CPU = {"PS_DEVICE": "cpu", "PS_MAX_BUCKET_SIZE_GB": str(16 / 1024)}
EACH = 2  # ranks of a host, and the engines' tensor-parallel size
SIZES = {"hidden_size": 512, "intermediate_size": 6144, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 16384}
CONFIG = model_config("small") | SIZES | HEADS
NEEDED = 2 * sum(math.prod(shape) for shape in tensor_shapes(CONFIG).values())
"""By the workers of an engine together."""
UNUSED = 16 << 20
"""Bytes of a tensor that is no part of the model."""


@pytest.mark.timeout(300)
def test_vllm_gets_what_it_needs_once(tmp_path: Path, make_hosts: MakeHosts) -> None:  # noqa: F811
    """The first host's ranks own the checkpoints. The second host's workers hold a tensor each in
    halves, so together they need the model, and none of what is unused."""
    first, second = make_hosts(2)
    memory = ["mount", "-t", "tmpfs", "none", "/dev/shm"]  # vLLM's workers leave some of theirs
    assert second.popen(memory).wait(20) == 0
    models = {name: str(tmp_path / name) for name in ("step-1", "step-2")}
    for seed, model in enumerate(models.values()):
        write_checkpoint(Path(model), CONFIG, seed)
    transports = [*["auto"] * 5, "group"]
    names = itertools.cycle(models)
    steps = [{"name": next(names), "transport": transport} for transport in transports]
    with closing(EngineHost(tmp_path, second.popen)) as engine:
        options: dict[str, Any] = {"url": engine.url, "models": models, "steps": steps}
        options |= {"unused_bytes": UNUSED, "folder": str(tmp_path)}
        command = [str(HERE / "vllm_host_programs.py"), json.dumps(options)]
        results = World([first, second], tmp_path / "w", command, EACH, CPU).wait(280)
    check_clean(results)
    *minis, leader, other = (result["seen"] for result in results)
    for number, seen in enumerate(leader):
        way = "shard" if number in (2, 3, 4) else "broadcast"
        assert [one["way"] for one in (*(mini[number] for mini in minis), seen)] == [way] * 3
        assert all(one["right"] for one in (*(mini[number] for mini in minis), seen))
        read = seen["read"] + other[number]["read"]
        print(f"{way}: {seen['received']:,} bytes in, {read:,} read, {seen['seconds']:.2f} s")
        assert set(seen["loaded"]) == {"recorded" if number < 2 else "replayed"}
        if way == "shard":
            assert read == NEEDED
            assert NEEDED <= seen["received"] <= 1.05 * NEEDED
        else:
            assert seen["received"] >= NEEDED + UNUSED
