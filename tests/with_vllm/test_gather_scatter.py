"""The fused kernel in Triton's interpreter, which vLLM brings along."""

from __future__ import annotations

import subprocess
import sys

from conftest import ENGINE_ENV

PROGRAM = """

import torch
from checkpoint_engine.loading.replay.fused_copies import build_tables, gather_scatter, places_of
from checkpoint_engine.loading.replay.geometry import Copy

COPIES = [
    (0, Copy(5, 7, (3, 4, 5), (40, 1, 4), (20, 5, 1))),  # transposed
    (1, Copy(700, 900, (5000,), (1,), (1,))),  # more than a program moves
    (0, Copy(9, 0, (1,), (1,), (1,))),
    (2, Copy(8, 5, (90, 50), (51, 1), (50, 1))),
    (1, Copy(300, 30, (2, 2, 2, 2), (16, 8, 2, 1), (8, 4, 2, 1))),
    (0, Copy(11, 3, (), (), ())),
]
for dtype, bits in (
    (torch.uint8, torch.uint8),
    (torch.bfloat16, torch.int16),
    (torch.float32, torch.int32),
    (torch.int64, torch.int64),
):
    source = torch.randint(0, 255, (8192 * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    targets = [torch.zeros(8192, dtype=dtype) for _ in range(3)]
    expected = [torch.zeros(8192, dtype=dtype) for _ in range(3)]
    for number, copy in COPIES:
        part = source.as_strided(copy.sizes, copy.source_strides, copy.source)
        expected[number].as_strided(copy.sizes, copy.target_strides, copy.target).copy_(part)
    tables = build_tables(COPIES, source.device)
    assert sorted(table.dims for table in tables) == [1, 2, 4]
    for table in tables:
        gather_scatter(places_of(targets, bits), source, table)
    for target, one in zip(targets, expected):
        assert torch.equal(target.view(bits), one.view(bits)), dtype
print("same bits")
"""

REPLAYED = """

import torch
from checkpoint_engine.loading.replay import fused_copies
from checkpoint_engine.replay import replayed

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for number in range(40):
            self.register_buffer(f"b{number}", torch.zeros(3, 8 + number))
    def load_weights(self, weights):
        for name, tensor in weights:
            target = self.get_buffer(name)
            target.copy_(tensor if tensor.dtype == target.dtype else tensor.float())

launches = []
real = fused_copies.gather_scatter
fused_copies.fits = lambda copies, device: True
fused_copies.gather_scatter = lambda *args: launches.append(args) or real(*args)
model = Model()
for seed in range(5):
    launches.clear()
    torch.manual_seed(seed)
    whole = {name: torch.randn(3, 16 + 2 * n) for n, (name, _) in enumerate(model.named_buffers())}
    weights = [(name, t[:, : t.shape[1] // 2].to(torch.bfloat16 if name == "b7" else t.dtype))
               for name, t in whole.items()]
    # in one storage, at another place every time
    flat = torch.empty(seed * 64 + sum(4096 for _ in weights), dtype=torch.uint8)
    placed = []
    for number, (name, t) in enumerate(weights):
        at = flat[seed * 64 + number * 4096 :][: t.nbytes].view(t.dtype).view(t.shape)
        placed.append((name, at.copy_(t)))
    load = replayed(model.load_weights)
    buffer, message = flat[seed * 64 :], b"the same bucket"
    if load.knows(message):
        load.replay(message, buffer)
    else:
        load.load_bucket(placed, message, buffer)
    load.finish()
    for name, t in weights:
        assert torch.equal(model.get_buffer(name), t.float()), name
    assert len(launches) == (0, 0, 2, 2, 2)[seed], launches
print(load.report["loaded"])
"""


def _run(program: str) -> str:
    environment = {**ENGINE_ENV, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_the_kernel_moves_what_single_copies_move() -> None:
    assert _run(PROGRAM) == "same bits"


def test_a_bucket_into_many_parameters_is_a_launch_for_each_unit() -> None:
    """Units of 8 bytes and of 4; the one that is converted is copied by itself."""
    assert _run(REPLAYED) == "replayed"
