"""What more than one test sends."""

from __future__ import annotations

import torch

CUDA_ARGS = (
    torch.Tensor,
    torch.Size([1024]),
    (1,),
    0,
    torch.storage.TypedStorage,
    torch.uint8,
    0,
    b"\x01" * 64,
    1024,
    0,
    False,
    b"\x02" * 32,
    0,
    b"\x03" * 64,
    True,
)
"""Of a handle that CUDA IPC would open."""
