"""The fused kernel in Triton's interpreter, which vLLM brings along."""

from __future__ import annotations

import subprocess
import sys

from conftest import ENGINE_ENV

PROGRAM = """

import torch
from checkpoint_engine.loading.replay.fused_copies import build_table, gather_scatter
from checkpoint_engine.loading.replay.geometry import Copy

COPIES = [
    Copy(5, 7, (3, 4, 5), (40, 1, 4), (20, 5, 1)),  # transposed
    Copy(700, 900, (1500,), (1,), (1,)),  # more than a block
    Copy(9, 0, (1,), (1,), (1,)),
    Copy(300, 3000, (2, 2, 2, 2), (16, 8, 2, 1), (8, 4, 2, 1)),
]
for dtype, bits in (
    (torch.uint8, torch.uint8),
    (torch.bfloat16, torch.int16),
    (torch.float32, torch.int32),
    (torch.int64, torch.int64),
):
    source = torch.randint(0, 255, (4096 * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    target, expected = torch.zeros(4096, dtype=dtype), torch.zeros(4096, dtype=dtype)
    for copy in COPIES:
        part = source.as_strided(copy.sizes, copy.source_strides, copy.source)
        expected.as_strided(copy.sizes, copy.target_strides, copy.target).copy_(part)
    gather_scatter(target, source, build_table(COPIES, target.device))
    assert torch.equal(target.view(bits), expected.view(bits)), dtype
print("same bits")
"""


def test_the_kernel_moves_what_single_copies_move() -> None:
    environment = {**ENGINE_ENV, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
    assert run.stdout.endswith("same bits\n"), run.stderr
