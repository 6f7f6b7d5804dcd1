"""A checkpoint's tensors over the same memory in storages of their own, for a watched loader.

So whatever the loader makes of them is told from everything else by its storage.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

import torch

from checkpoint_engine.loading.replay.geometry import whole_storage
from checkpoint_engine.loading.replay.recording import NamedTensors


def aliases_of(weights: NamedTensors) -> list[torch.Tensor]:
    """The same tensors over the same memory, in new storages: one for those of one storage, unless
    they overlap."""
    places: dict[int, list[int]] = defaultdict(list)
    for place, (_, tensor) in enumerate(weights):
        is_plain = tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
        places[tensor.untyped_storage()._cdata if is_plain else -place].append(place)
    found: dict[int, torch.Tensor] = {}
    for key, some in places.items():
        tensors = [weights[place][1] for place in some]
        if key > 0 and len(some) > 1 and not _overlap(tensors):
            found.update(zip(some, _in_one_storage(tensors), strict=True))
        else:
            found.update(zip(some, map(_alias, tensors), strict=True))
    return [found[place] for place in range(len(weights))]


def _overlap(tensors: list[torch.Tensor]) -> bool:
    begins = sorted((one.storage_offset() * one.itemsize, one.nbytes) for one in tensors)
    return any(begin + nbytes > after for (begin, nbytes), (after, _) in pairwise(begins))


def _in_one_storage(tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    whole = _alias(whole_storage(tensors[0], torch.uint8))
    flat = {one.dtype: whole for one in tensors}
    for dtype in flat:
        flat[dtype] = whole[: len(whole) // dtype.itemsize * dtype.itemsize].view(dtype)
    for one in tensors:
        yield flat[one.dtype].as_strided(one.shape, one.stride(), one.storage_offset())


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, with a storage of its own."""
    if not tensor.numel():
        return torch.empty_like(tensor)
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)  # DLPack lacks many dtypes
    return torch.from_dlpack(flat).view(tensor.dtype).view(tensor.shape)
