"""Whether a loader left what a recording would have written, bucket by bucket."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch

from checkpoint_engine.loading.replay.adapter import ModelAdapter, every_tensor
from checkpoint_engine.loading.replay.geometry import UNITS, View, whole_storage
from checkpoint_engine.loading.replay.memory import Slot, key_of
from checkpoint_engine.loading.replay.program import Flat, Move, Program
from checkpoint_engine.loading.replay.recording import Recording

_SHOWN_NAMES = 20


class Comparison:
    """Sums up what a recording would write where it arrives, and what was written where it lies, as
    soon as nothing more will be done to it. Tensors that it does not write must not change."""

    def __init__(
        self, model: ModelAdapter, recording: Recording | None, bucket: list[Program] | None = None
    ) -> None:
        """
        Args:
            recording: none yet, in the first update: then whatever changes must be written by the
                recording that comes of it.
            bucket: the only one that is compared; default: all of an update's.
        """
        self._model = model
        self._recording = recording
        self._bucket = bucket
        self._expected: dict[str, list[tuple[Move, torch.Tensor]]] = defaultdict(list)
        self._differing: set[Slot] = set()
        self._others = {
            slot: (tensor.detach(), digest(tensor))
            for slot, tensor in self._not_written_by(recording)
        }

    def expect(self, program: Program, buffer: torch.Tensor) -> None:
        """What the program would copy is in the buffer, and about to be loaded."""
        flat = Flat(buffer)
        for move in program.moves:
            arrives_as = move.route.arrives_as
            sums = _digests([source.to(arrives_as) for source in move.sources(flat)])
            self._expected[move.route.slot.module].append((move, sums))

    def check(self, module: str) -> None:
        """What has been loaded into a module is there, and nothing has changed it yet."""
        expected = self._expected.pop(module, [])
        for move, sums in expected:
            memory = self._model.memory(move.route.slot)
            if memory.is_meta or not torch.equal(_digests(move.targets(memory)), sums):
                self._differing.add(move.route.slot)
        # A module that is made anew is not complete after one bucket, and its fills may be missing.
        is_filled = expected and (self._bucket is None or self._model.is_persistent)
        if self._recording is not None and is_filled:
            for fill in self._recording.fills.get(module, ()):
                storage = whole_storage(self._model.memory(fill.slot), fill.view.dtype)
                there = fill.view.in_storage(storage)
                wanted = torch.empty_like(there).fill_(fill.value)
                if not torch.equal(_bits(there), _bits(wanted)):
                    self._differing.add(fill.slot)

    def finish(self, recording: Recording) -> str:
        """Everything is loaded. Returns what is not as ``recording`` would have it, in words; empty
        if all is."""
        for module in list(self._expected):
            self.check(module)
        for slot, tensor in self._not_written_by(recording):
            was, sums = self._others.get(slot, (None, None))
            if was is None or sums is None or key_of(was) != key_of(tensor):
                changed = self._recording is not None  # the first update may make some
            else:
                changed = not torch.equal(digest(tensor), sums)
            if changed:
                self._differing.add(slot)
        shown = sorted(slot.qualified for slot in self._differing)[:_SHOWN_NAMES]
        return f"the loader wrote something else than was recorded into {shown}" if shown else ""

    def _not_written_by(self, recording: Recording | None) -> Iterator[tuple[Slot, torch.Tensor]]:
        """Of memory that stays, that is: where an engine makes layers anew, it changes them too."""
        if not self._model.is_persistent:
            return
        written: dict[int | None, list[View]] = defaultdict(list)
        for slot in recording.written(self._bucket) if recording is not None else ():
            tensor = self._model.memory(slot)
            written[key_of(tensor)].append(View.of(tensor))
        for slot, tensor in every_tensor(self._model.modules):
            key = key_of(tensor)
            if key is not None and not tensor.is_meta:
                view = View.of(tensor)
                if not any(view.overlaps(one) for one in written[key]):
                    yield slot, tensor


def _digests(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Of tensors of one dtype, in order. Many small ones are gathered first: they would cost more
    than their bytes."""
    if len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors) > _GATHERED * len(tensors):
        return torch.stack([digest(tensor) for tensor in tensors])
    return digest(torch.cat([_bits(tensor).reshape(-1) for tensor in tensors]))


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """Tells tensors of one shape and dtype apart, by bits and their places, at the speed of memory.

    It is a sum of words of 4 bytes, each times a factor that depends on its place, in 8 bytes: two
    factors differ by so few powers of two that no difference of words is lost. Where there are
    many, words that are a row apart are added up first, in the same way.
    """
    tensor = tensor.detach().squeeze()
    largest = _LARGEST[tensor.device.type == "cpu"]
    if tensor.nbytes > largest and tensor.dim() and len(tensor) > 1:
        each = max(1, len(tensor) * largest // tensor.nbytes)
        sums = torch.stack([digest(part) for part in tensor.split(each)])
        return _weighted(sums)
    flat = _bits(tensor).contiguous().view(-1).view(torch.uint8)
    if flat.numel() % 8 or flat.storage_offset() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    return _digest_of_words(flat.view(torch.int64))


_ROWS, _ROW = 16, 2047  # an odd length: rows of a matrix do not lie at multiples of it
_BLOCK = _ROWS * _ROW
_STEP = 31  # between the factors of two rows
_FEW = _BLOCK - 1
_LARGEST = {True: 4 << 20, False: 256 << 20}
"""Bytes that are summed up at a time, and copied first if they do not lie one behind the other; on
CPUs, so few that they stay in a cache."""
_GATHERED = 64 << 10


def _digest_of_words(words: torch.Tensor) -> torch.Tensor:
    if len(words) <= _FEW:
        return _weighted(words.view(torch.int32).to(torch.int64))
    whole = len(words) // _BLOCK * _BLOCK
    rows = words[:whole].view(torch.int32).view(-1, _ROWS, 2 * _ROW)
    sums = rows[:, 0].to(torch.int64)
    for row in range(1, _ROWS):
        sums = sums * _STEP + rows[:, row]
    return _digest_of_words(sums.view(-1)) + 5 * _digest_of_words(words[whole:])


def _weighted(sums: torch.Tensor) -> torch.Tensor:
    return (sums * _factors(len(sums), sums.device)).sum()


def _factors(count: int, device: torch.device) -> torch.Tensor:
    if device not in _of_devices:
        places = torch.arange(1, 2 * _FEW + 1, device=device)
        _of_devices[device] = (
            places * places * 0x1E3779B97F4A7C15 + places * 0x14D049BB133111EB
        ) * 2 + 1
    return _of_devices[device][:count]


_of_devices: dict[torch.device, torch.Tensor] = {}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor)
    return tensor.view(UNITS[tensor.itemsize])
