"""Sums that tell tensors apart, of many at a time, so that a GPU is not kept waiting."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from checkpoint_engine.loading.replay.geometry import UNITS

_AT_ONCE = {True: 1 << 20, False: 64 << 20}
_GATHERED = {True: 128 << 10, False: 64 << 20}
"""Bytes that are summed up at a time, of one tensor and of several. On CPUs (``True``) so few that
they, and twice as many for products, stay in a cache; on GPUs so many that a launch takes less time
than they do."""
_ROW = 1 << 14  # words


def digests(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of each tensor, a number that tells it from others of its shape and dtype, in order.

    A sum of words of at most 4 bytes, each times an odd factor of 8 bytes, as good as random, of
    its place in the tensor: no change of one word is lost.
    """
    rows: dict[torch.device, _Places] = defaultdict(lambda: defaultdict(list))
    alike: _Places = defaultdict(list)
    flat: dict[int, torch.Tensor] = {}
    for place, tensor in enumerate(tensors):
        device, nbytes = tensor.device, tensor.nbytes
        if nbytes % (4 * _ROW) == 0 and 0 < nbytes <= _AT_ONCE[device.type == "cpu"]:
            bits = _bits(tensor)
            flat[place] = bits.view(-1) if bits.dim() > 1 and bits.is_contiguous() else bits
            rows[device][flat[place].shape[1:], bits.dtype].append(place)
        else:
            alike[tensor.shape, tensor.dtype, device].append(place)
    sums, order = [], []
    for groups in rows.values():
        sums.append(_of_rows([[flat[place] for place in places] for places in groups.values()]))
        order += [place for places in groups.values() for place in places]
    for places in alike.values():
        sums.append(_of_alike([tensors[place] for place in places]))
        order += places
    if not sums:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    here = sums[0].device
    together = torch.cat([one.to(here) for one in sums]) if len(sums) > 1 else sums[0]
    if order == sorted(order):
        return together
    index = torch.tensor(order, device="cpu").to(here, non_blocking=True)
    return torch.empty_like(together).index_copy_(0, index, together)


_Places = dict[tuple[Any, ...], list[int]]
"""Of tensors that are summed up together, by what they have in common."""


def _of_rows(groups: list[list[torch.Tensor]]) -> torch.Tensor:
    """Of bits of whole rows, as ``_of_group`` sums them up, but of all lengths at once. The tensors
    of a group can be put behind one another."""
    tensors = [one for group in groups for one in group]
    device = tensors[0].device
    counts = np.array([one.nbytes // (4 * _ROW) for one in tensors])
    whose = np.arange(len(counts)).repeat(counts)
    within = np.arange(len(whose)) - (counts.cumsum() - counts).repeat(counts)
    places = torch.from_numpy(np.stack([whose, within])).to(device, non_blocking=True)
    chunks = [chunk for group in groups for chunk in _chunks(group)]
    sums = torch.cat([_row_sums(chunk) for chunk in chunks])
    weighed = sums * _factors(int(counts.max()), device, 1)[places[1]]
    found = torch.zeros(len(counts), dtype=torch.int64, device=device)
    return found.index_add_(0, places[0], weighed)


def _chunks(group: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """As many neighbours as are summed up at a time, or one."""
    most = _GATHERED[group[0].device.type == "cpu"]
    some: list[torch.Tensor] = []
    nbytes = 0
    for one in group:
        if some and nbytes + one.nbytes > most:
            yield some
            some, nbytes = [], 0
        some.append(one)
        nbytes += one.nbytes
    yield some


def _row_sums(tensors: list[torch.Tensor]) -> torch.Tensor:
    whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return weighted(_words(whole.reshape(-1).contiguous()).view(-1, _ROW), 0)


def _of_alike(tensors: list[torch.Tensor]) -> torch.Tensor:
    nbytes, is_on_cpu = tensors[0].nbytes, tensors[0].device.type == "cpu"
    if nbytes > _AT_ONCE[is_on_cpu]:
        return torch.stack([_of_large(tensor, _AT_ONCE[is_on_cpu]) for tensor in tensors])
    each = max(1, _GATHERED[is_on_cpu] // max(1, nbytes))
    groups = (tensors[begin : begin + each] for begin in range(0, len(tensors), each))
    return torch.cat([_of_group(group) for group in groups])


def _of_large(tensor: torch.Tensor, most: int) -> torch.Tensor:
    return weighted(digests(list(_pieces(tensor.squeeze(), most)))[None], 2)[0]


def _pieces(tensor: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """Parts of at most so many bytes. One list of all: with sums of sums, pieces of two rows could
    change places and none of it would show."""
    if tensor.nbytes <= most:
        yield tensor
        return
    for rows in tensor.split(max(1, len(tensor) * most // tensor.nbytes)):
        yield from _pieces(rows.squeeze(0), most)


def _of_group(tensors: list[torch.Tensor]) -> torch.Tensor:
    bits = [_bits(tensor) for tensor in tensors]
    stacked = bits[0][None] if len(bits) == 1 else torch.stack(bits)
    words = stacked.reshape(len(bits), bits[0].numel()).contiguous()
    nbytes = words.shape[1] * words.itemsize
    return _sum_words(_words(words) if nbytes and nbytes % 4 == 0 else words)


def _words(bits: torch.Tensor) -> torch.Tensor:
    """Contiguous bits as words of 4 bytes, into which each row can be cut."""
    if bits.storage_offset() * bits.itemsize % 4:
        bits = bits.clone()
    return bits.view(torch.int32)


def _sum_words(words: torch.Tensor) -> torch.Tensor:
    count, length = words.shape
    if length <= _ROW:
        return weighted(words, 0)
    whole = length // _ROW * _ROW
    rows = words[:, :whole].reshape(count, -1, _ROW)
    sums = weighted(weighted(rows, 0), 1)
    return sums if whole == length else sums + 5 * _sum_words(words[:, whole:])


def weighted(words: torch.Tensor, seed: int) -> torch.Tensor:
    return (words * _factors(words.shape[-1], words.device, seed)).sum(-1)


def _factors(count: int, device: torch.device, seed: int) -> torch.Tensor:
    """Odd numbers, as random as those of SplitMix64."""
    if count > _ROW:
        return _mixed(count, device, seed)
    return _kept(device, seed)[:count]


@cache
def _kept(device: torch.device, seed: int) -> torch.Tensor:
    return _mixed(_ROW, device, seed)


def _mixed(count: int, device: torch.device, seed: int) -> torch.Tensor:
    # On CPUs: a GPU would load a kernel for each operation, which takes longer than all of this.
    x = (torch.arange(count, device="cpu") + (seed << 32) + 1) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (x >> shift)) * factor
    return ((x ^ (x >> 31)) | 1).to(device)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype in _INTEGERS:
        return tensor
    tensor = tensor.detach()
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor)
    return tensor.view(UNITS[tensor.itemsize])


_INTEGERS = set(UNITS.values())
