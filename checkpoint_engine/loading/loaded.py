"""What of an update has arrived and is loaded: buckets, and tensors that travel in parts.

Whether a worker loaded every bucket of the plan once, and no other: the server says with the first
``None`` what was planned, the worker compares it with what it loaded itself. That buckets hold
every tensor once is the plan's property, which its tests show.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from typing import Any

import torch

from checkpoint_engine.data_types import tensor_nbytes
from checkpoint_engine.errors import WireError
from checkpoint_engine.handover import wire
from checkpoint_engine.loading.replay.program import Flat
from checkpoint_engine.loading.replay.recording import NamedTensors

_SHOWN = 3


def digest(message: bytes) -> str:
    """What stands for a bucket: names, dtypes, shapes and places of its tensors are in it."""
    return hashlib.blake2b(message, digest_size=8).hexdigest()


class LoadedBuckets:
    """The buckets that a worker has loaded in one update."""

    def __init__(self) -> None:
        self._loaded: Counter[str] = Counter()

    def note(self, message: bytes) -> None:
        """This bucket is loaded; with tensors in parts: the whole tensor."""
        self._loaded[digest(message)] += 1

    def check(self, planned: Any) -> None:
        """Raise ``WireError`` if other buckets were loaded than those ``planned``.

        Args:
            planned: the digest of each, in the plan's order; ``None`` in place of those that end
                no tensor.
        """
        if not isinstance(planned, list) or {type(one) for one in planned} - {str, type(None)}:
            raise WireError(f"planned buckets are digests, not {planned!r:.100}")
        loaded, wanted = self._loaded, Counter(one for one in planned if one is not None)
        texts = [
            f"bucket {planned.index(one) + 1} of {len(planned)} was loaded {loaded[one]} times, "
            f"not {times}"
            for one, times in wanted.items()
            if loaded[one] != times
        ]
        if len(texts) > _SHOWN:
            texts[_SHOWN:] = [f"{len(texts) - _SHOWN} more were not loaded once"]
        if strange := sum(times for one, times in loaded.items() if one not in wanted):
            texts.append(f"{strange} buckets were loaded that were not planned")
        if texts:
            raise WireError("; ".join(texts))


class Parts:
    """The tensors of one update that travel in parts, because they are larger than a bucket: the
    worker puts them together on the double buffer's device.

    Parts of several tensors may come in any order; each tensor takes its own size in memory until
    it has been loaded.
    """

    def __init__(self) -> None:
        self._tensors: dict[tuple[bytes, int], tuple[torch.Tensor, dict[int, int]]] = {}

    def add(self, message: bytes, part: Any, buffer: torch.Tensor) -> torch.Tensor | None:
        """Take a part out of the double buffer; returns the tensor's bytes when all are there.

        Args:
            message: of the whole tensor; the same with each of its parts.
            part: where the part lies, its bytes, where it belongs, the tensor's bytes, and its
                owner, for two may have a tensor of that name.

        Raises:
            WireError: the part reaches beyond the buffer or the tensor, or came before.
        """
        match part:
            case [int(start), int(nbytes), int(begin), int(total), int(owner)] if (
                0 <= min(part) <= max(part) < 1 << 62
            ):
                tensor = message, owner
            case _:
                raise WireError(f"a part is five numbers, not {part!r:.100}")
        if not (0 < nbytes <= total - begin and start + nbytes <= buffer.numel()):
            raise WireError(f"a part of {nbytes} bytes at {begin} of {total} cannot be at {start}")
        if tensor not in self._tensors:
            whole = torch.empty(total, dtype=torch.uint8, device=buffer.device)
            self._tensors[tensor] = whole, {}
        whole, seen = self._tensors[tensor]
        overlaps = any(at < begin + nbytes and begin < at + size for at, size in seen.items())
        if overlaps or total != whole.numel():
            raise WireError(f"the part at {begin} of {total} bytes came before, or is another's")
        whole[begin : begin + nbytes].copy_(buffer[start : start + nbytes])
        seen[begin] = nbytes
        if sum(seen.values()) < total:
            return None
        del self._tensors[tensor]
        return whole

    def check_complete(self) -> None:
        """Raises ``WireError`` if a part of some tensor never came."""
        if self._tensors:
            raise WireError(f"{len(self._tensors)} tensors ended before all of their parts came")


def _strides_of(shape: torch.Size) -> tuple[int, ...]:
    """Of a tensor whose elements lie one behind the other."""
    counts = [max(1, count) for count in shape]
    return tuple(math.prod(counts[dim + 1 :]) for dim in range(len(counts)))


def extract_weights(tensors: wire.Bucket, buffer: torch.Tensor) -> NamedTensors:
    """The tensors of a bucket as views of the double buffer.

    Raises:
        ValueError: one reaches beyond the buffer, or lies between elements of its dtype.
    """
    weights = []
    flat, begin = Flat(buffer), int(buffer.storage_offset())
    forms: dict[tuple[torch.dtype, torch.Size], tuple[int, tuple[int, ...]]] = {}
    for entry in tensors:
        dtype, shape, start = entry["dtype"], entry["shape"], entry["offset"]
        if (form := forms.get((dtype, shape))) is None:
            form = forms[dtype, shape] = tensor_nbytes(dtype, shape), _strides_of(shape)
        nbytes, strides = form
        if start + nbytes > buffer.nbytes:
            end = start + nbytes
            raise ValueError(f"tensor {entry['name']!r} ends at {end} of {buffer.nbytes} bytes")
        if (start | begin) % dtype.itemsize:
            raise ValueError(f"tensor {entry['name']!r} lies at {start}, between its elements")
        at = (begin + start) // dtype.itemsize
        weights.append((entry["name"], flat[dtype].as_strided(shape, strides, at)))
    return weights
