"""Whether a loader left what a recording would have written, in every parameter and buffer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from checkpoint_engine.loading.replay.adapter import ModelAdapter, every_tensor
from checkpoint_engine.loading.replay.digests import digests
from checkpoint_engine.loading.replay.geometry import View, whole_storage
from checkpoint_engine.loading.replay.memory import Slot, key_of
from checkpoint_engine.loading.replay.program import Flat, Move, Program
from checkpoint_engine.loading.replay.recording import Recording

_SHOWN_NAMES = 20


class _Expected(NamedTuple):
    """The digests of all that some moves would copy, in order."""

    moves: list[Move]
    sums: torch.Tensor


class Comparison:
    """Sums up what a recording would write where it arrives, and what was written where it lies, as
    soon as nothing more will be done to it. Tensors that it does not write must not change.

    Sums stay where they are made, and are compared at the end: a device is waited for once.
    """

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
        self._expected: dict[str, list[_Expected]] = defaultdict(list)
        self._differing: set[Slot] = set()
        self._pairs: list[tuple[list[Slot], torch.Tensor, torch.Tensor]] = []
        others = list(self._not_written_by(recording))
        self._others = {slot: (n, tensor.detach()) for n, (slot, tensor) in enumerate(others)}
        self._sums = digests([tensor for _, tensor in others])

    def expect(self, program: Program, buffer: torch.Tensor) -> None:
        """What the program would copy is in the buffer, and about to be loaded."""
        flat = Flat(buffer)
        moves = list(program.moves)
        if not moves:
            return
        sums = digests([source for move in moves for source in _arriving(move, flat)])
        if self._model.is_persistent:  # it is compared at the end, and all at once
            self._expected[""].append(_Expected(moves, sums))
            return
        lengths = [sum(len(move.copies) for move in part.moves) for part in program.parts]
        for part, own in zip(program.parts, sums.split(lengths), strict=True):
            if part.moves:
                self._expected[part.module].append(_Expected(part.moves, own))

    def check(self, module: str) -> None:
        """What has been loaded into a module is there, and nothing has changed it yet."""
        expected = self._expected.pop(module, [])
        moves = [move for some, _ in expected for move in some]
        there = [(move, self._model.memory(move.route.slot)) for move in moves]
        lost = {move.route.slot for move, memory in there if memory.is_meta}
        self._differing |= lost
        if moves and not lost:
            found = digests([one for move, memory in there for one in move.targets(memory)])
            sums = torch.cat([sums.to(found.device) for _, sums in expected])
            slots = [move.route.slot for move in moves for _ in move.copies]
            self._pairs.append((slots, sums, found))
        # A module that is made anew is not complete after one bucket, and its fills may be missing.
        if self._bucket is None or self._model.is_persistent:
            for one in {move.route.slot.module for move in moves}:
                self._check_fills(one)

    def _check_fills(self, module: str) -> None:
        for fill in self._recording.fills.get(module, ()) if self._recording is not None else ():
            storage = whole_storage(self._model.memory(fill.slot), fill.view.dtype)
            there = fill.view.in_storage(storage)
            wanted = torch.empty_like(there).fill_(fill.value)
            self._pairs.append(([fill.slot], digests([wanted]), digests([there])))

    def finish(self, recording: Recording) -> str:
        """Everything is loaded. Returns what is not as ``recording`` would have it, in words; empty
        if all is."""
        for module in list(self._expected):
            self.check(module)
        self._check_others(recording)
        self._compare()
        shown = sorted(slot.qualified for slot in self._differing)[:_SHOWN_NAMES]
        return f"the loader wrote something else than was recorded into {shown}" if shown else ""

    def _check_others(self, recording: Recording) -> None:
        same: list[tuple[Slot, int, torch.Tensor]] = []
        for slot, tensor in self._not_written_by(recording):
            place, was = self._others.get(slot, (0, None))
            if was is not None and _is_where(tensor, was):
                same.append((slot, place, tensor))
            elif self._recording is not None:  # the first update may make some
                self._differing.add(slot)
        places = torch.tensor([place for _, place, _ in same], device=self._sums.device)
        sums = self._sums[places] if same else self._sums[:0]
        found = digests([tensor for _, _, tensor in same])
        self._pairs.append(([slot for slot, _, _ in same], sums, found))

    def _compare(self) -> None:
        """The digests, for which the device is waited for."""
        pairs, self._pairs = self._pairs, []
        slots = [slot for some, _, _ in pairs for slot in some]
        if slots:
            differs = [one != other.to(one.device) for _, one, other in pairs if len(one)]
            here = differs[0].device
            for place in torch.cat([one.to(here) for one in differs]).nonzero().flatten().tolist():
                self._differing.add(slots[place])

    def _not_written_by(self, recording: Recording | None) -> Iterator[tuple[Slot, torch.Tensor]]:
        """Of memory that stays, that is: where an engine makes layers anew, it changes them too."""
        if not self._model.is_persistent:
            return
        slots = recording.written(self._bucket) if recording is not None else set[Slot]()
        own = {slot: self._model.memory(slot) for slot in slots}
        others = [
            (slot, tensor, key)
            for slot, tensor in every_tensor(self._model.modules)
            if own.get(slot) is not tensor
            and (key := key_of(tensor)) is not None
            and not tensor.is_meta
        ]
        written = _views_by_storage(own.values(), {key for _, _, key in others})
        for slot, tensor, key in others:
            near = written.get(key, ())
            if not near or not any(View.of(tensor).overlaps(one) for one in near):
                yield slot, tensor


def _views_by_storage(
    tensors: Iterable[torch.Tensor], keys: set[int]
) -> dict[int | None, list[View]]:
    """Of the tensors in these storages."""
    views: dict[int | None, list[View]] = defaultdict(list)
    for tensor in tensors if keys else ():
        if (key := key_of(tensor)) in keys:
            views[key].append(View.of(tensor))
    return views


def _arriving(move: Move, flat: Flat) -> list[torch.Tensor]:
    sources = move.sources(flat)
    return [one.to(move.route.arrives_as) for one in sources] if move.route.casts else sources


def _is_where(tensor: torch.Tensor, was: torch.Tensor) -> bool:
    """Whether both are the same elements of the same memory."""
    return key_of(tensor) == key_of(was) and View.of(tensor) == View.of(was)
