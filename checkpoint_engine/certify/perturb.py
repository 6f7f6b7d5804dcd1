"""Another checkpoint of the same model, made by changing every value of the first a little."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path

import torch

from checkpoint_engine.certify.engine import OrderError
from checkpoint_engine.memory.folder import INDEX, checkpoint_of

_SHARE = 0.2
"""How far a value may move, as a share of it."""
_OF_NOTHING = 0.01
"""How far a value may move in a tensor of zeros, as biases often are."""


def perturb_checkpoint(model: Path, folder: Path) -> Path:
    """Write the changed checkpoint of ``model`` into ``folder``, which it makes.

    The model still computes sensible numbers. What is not a floating-point number, as packed
    weights, keeps its values and changes their places.

    Raises:
        OrderError: the checkpoint is not in safetensors files, or there is no room for another.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    files = [Path(file) for file in checkpoint_of(model)]
    if any(file.suffix == ".npy" for file in files):
        raise OrderError(f"{model} is not in safetensors files: give --other-checkpoint")
    needed, free = sum(file.stat().st_size for file in files), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise OrderError(
            f"another checkpoint needs {needed:,} bytes in {folder.parent}, which has {free:,}: "
            "give --other-checkpoint, or set TMPDIR"
        )
    link_the_rest(model, folder)
    for file in files:
        if file.name.endswith(INDEX):
            shutil.copy(file, folder)
            continue
        with safe_open(file, "pt") as stored:
            names = list(stored.keys())
            changed = {name: _changed(name, stored.get_tensor(name)) for name in names}
            save_file(changed, folder / file.name, metadata=stored.metadata() or {"format": "pt"})
    return folder


def link_the_rest(model: Path, folder: Path) -> None:
    """Make ``folder`` and links in it to the files of ``model`` that are no weights: its
    configuration, its tokenizer."""
    folder.mkdir()
    for file in model.iterdir():
        if not file.name.endswith((INDEX, ".safetensors", ".bin", ".pt", ".pth")):
            os.symlink(file.resolve(), folder / file.name)


def reverse_files(model: Path, folder: Path) -> Path:
    """Make ``folder`` with links to all of ``model``, whose files are read in the opposite order:
    they have each other's names."""
    link_the_rest(model, folder)
    files = [Path(file) for file in checkpoint_of(model)]
    shards = [file for file in files if not file.name.endswith(INDEX)]
    names = dict(zip((one.name for one in shards), (one.name for one in shards[::-1]), strict=True))
    for file in files:
        if file.name in names:
            os.symlink(file.resolve(), folder / names[file.name])
            continue
        index = json.loads(file.read_text())
        places = {tensor: names[place] for tensor, place in index["weight_map"].items()}
        (folder / file.name).write_text(json.dumps({**index, "weight_map": places}))
    return folder


def _changed(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        # The first rows become the last. One dimension: a shape, a permutation, a map.
        return tensor.roll(1, 0).contiguous() if tensor.dim() > 1 else tensor
    random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.rand(tensor.shape, generator=random) * 2 - 1
    values = tensor.float()
    moved = values * (1 + _SHARE * noise) + (_OF_NOTHING * noise if not values.any() else 0)
    return moved.to(tensor.dtype)
