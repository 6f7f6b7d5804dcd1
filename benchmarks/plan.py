"""Planning and metas at the size of large models, on one core, without a GPU.

    python benchmarks/plan.py
    python benchmarks/plan.py --against original==0.4.2

Prints, from 1,000 tensors of one owner to a million of 1,024: the time of ``_gen_h2d_buckets``, of
all owners' encoding and one rank's decoding of what ``gather_metas`` sends, and its bytes.
``--against`` installs that release of the original from PyPI into a folder of its own, and plans
the same buckets with it in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoint_engine.ps import (
    MemoryBufferMetaList,
    MemoryBufferMetas,
    ParameterMeta,
    _gen_h2d_buckets,
)

BUCKET = 2 << 30
SIZES = [
    (1_000, 1),
    (10_000, 16),
    (138_000, 256),  # Kimi-K2
    (1_000_000, 1024),
]
EXPERTS = 384
KINDS = [
    ("mlp.experts.{}.gate_proj.weight", torch.bfloat16, (2048, 7168)),
    ("mlp.experts.{}.up_proj.weight", torch.bfloat16, (2048, 7168)),
    ("mlp.experts.{}.down_proj.weight", torch.bfloat16, (7168, 2048)),
]


def make_metas(
    tensors: int, owners: int, kinds: Sequence[tuple[str, torch.dtype, tuple[int, ...]]] = KINDS
) -> dict[int, MemoryBufferMetaList]:
    """Experts of these kinds, dealt out to the owners one after the other."""
    per_owner = tensors // owners
    metas = {}
    for owner in range(owners):
        items = []
        for number in range(owner * per_owner, (owner + 1) * per_owner):
            pattern, dtype, shape = kinds[number % len(kinds)]
            layer, expert = divmod(number // len(kinds), EXPERTS)
            name = f"model.layers.{layer}.{pattern.format(expert)}"
            size = torch.Size(shape)
            nbytes = dtype.itemsize * size.numel()
            items.append(ParameterMeta(name=name, dtype=dtype, shape=size, aligned_size=nbytes))
        buffer = MemoryBufferMetas(metas=items, ptr=0, size=sum(i.aligned_size for i in items))
        metas[owner] = MemoryBufferMetaList(
            p2p_store_addr=None, memory_buffer_metas_list=[buffer], rdma_device=""
        )
    return metas


def seconds_of(action: Callable[[], Any], repeats: int) -> float:
    """The median of ``repeats`` runs, of this process's own time: nothing here waits."""
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        action()
        taken.append(time.process_time() - began)
    return statistics.median(taken)


def measure_plan(repeats: int) -> list[float]:
    """Seconds of ``_gen_h2d_buckets`` for each of ``SIZES``."""
    made = (make_metas(tensors, owners) for tensors, owners in SIZES)
    return [
        seconds_of(lambda metas=metas: _gen_h2d_buckets(metas, BUCKET, {}, {}), repeats)
        for metas in made
    ]


def measure_metas(tensors: int, owners: int, repeats: int) -> tuple[float, float, int]:
    """Seconds of all owners' encoding and of one rank's decoding, and the bytes between."""
    from checkpoint_engine.planning.layouts import (
        Layout,
        decode_layouts,
        encode_layout,
        layout_digest,
    )

    owned_buffers = [
        [buffer.metas for buffer in owned.memory_buffer_metas_list]
        for owned in make_metas(tensors, owners).values()
    ]

    def encode_all() -> list[bytes]:
        return [encode_layout(Layout.of(buffers)) for buffers in owned_buffers]

    encoded = encode_all()
    digests = [layout_digest(blob) for blob in encoded]
    received = dict(enumerate(encoded))
    encode = seconds_of(encode_all, repeats)
    decode = seconds_of(lambda: decode_layouts(digests, {}, received), repeats)
    return encode, decode, sum(map(len, received.values()))


def plan_apart(path: str, repeats: int) -> list[float]:
    """``measure_plan`` in a process that finds ``checkpoint_engine`` in ``path``."""
    search = os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, "--json", "--repeats", str(repeats)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": search}, check=True, capture_output=True
    )
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def compare(requirement: str, repeats: int, turns: int) -> None:
    ours = str(Path(__file__).resolve().parent.parent)
    with tempfile.TemporaryDirectory() as theirs:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        package = f"checkpoint-engine=={requirement.partition('==')[2]}"
        subprocess.run([*pip, "--target", theirs, package], check=True)
        runs = {path: [plan_apart(path, repeats) for _ in range(turns)] for path in (ours, theirs)}
    for place, (tensors, owners) in enumerate(SIZES):
        mine, other = (statistics.median(run[place] for run in runs[p]) for p in (ours, theirs))
        print(f"plan {tensors:9,} tensors {owners:5} owners   ours {mine:.3f} s   {requirement} "
              f"{other:.3f} s")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3, help="with --against")
    parser.add_argument("--against", help="original==VERSION")
    parser.add_argument("--json", action="store_true", help="only the plan, for --against")
    arguments = parser.parse_args()
    if arguments.against:
        return compare(arguments.against, arguments.repeats, arguments.turns)
    plans = measure_plan(arguments.repeats)
    if arguments.json:
        print(json.dumps(plans))
        return
    for (tensors, owners), plan in zip(SIZES, plans, strict=True):
        encode, decode, nbytes = measure_metas(tensors, owners, arguments.repeats)
        print(
            f"{tensors:9,} tensors {owners:5} owners   plan {plan:.3f} s   encode {encode:.3f} s   "
            f"decode {decode:.3f} s   {nbytes / 1e6:.2f} MB"
        )


if __name__ == "__main__":
    main()
