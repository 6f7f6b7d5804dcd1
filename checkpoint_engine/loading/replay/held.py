"""Which tensors of a checkpoint a model holds already, by content: an update may leave those out.

What is processed together is held together: a group is the tensors that modules of the model
connect, each with all modules that it is copied into. A group is held from when an update has
loaded all of it until another begins to write it, or the model's memory is not as it was then.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import numpy as np
import torch

from checkpoint_engine.ground.needs import HASH_BYTES, UNKNOWN_HASH, tensors_digest
from checkpoint_engine.loading.replay.adapter import ModelAdapter, every_tensor
from checkpoint_engine.loading.replay.digests import digests
from checkpoint_engine.loading.replay.memory import Columns, Slot, columns_of

if TYPE_CHECKING:
    from checkpoint_engine.loading.replay.recording import Recording


class Groups(NamedTuple):
    """The tensors of a checkpoint, parted by what is processed together.

    Attributes:
        tensors: ``tensors_digest`` of them.
        names: of all tensors, in order.
        number_of: by name, its group.
        members: of each group, the places of its tensors among ``names``.
        modules: of each group, those that its tensors are copied into; none: nobody reads it.
    """

    tensors: str
    names: list[str]
    number_of: dict[str, int]
    members: list[list[int]]
    modules: list[list[str]]

    @staticmethod
    def of(recording: Recording) -> Groups:
        sources = sorted(recording.entries, key=attrgetter("name"))
        modules_of = [
            list({entry.route.slot.module for entry in recording.entries[one]})
            + list(recording.counts.get(one, ()))
            for one in sources
        ]
        root_of = _connected(modules_of)
        numbers: dict[Any, int] = {}
        number_of: dict[str, int] = {}
        members: dict[int, list[int]] = defaultdict(list)
        modules: dict[int, set[str]] = defaultdict(set)
        for place, (source, some) in enumerate(zip(sources, modules_of, strict=True)):
            group = root_of(some[0]) if some else place
            number = number_of[source.name] = numbers.setdefault(group, len(numbers))
            members[number].append(place)
            modules[number].update(some)
        every = range(len(numbers))
        return Groups(
            tensors_digest(sources),
            [source.name for source in sources],
            number_of,
            [members[number] for number in every],
            [sorted(modules[number]) for number in every],
        )


def _connected(links: Iterable[Sequence[str]]) -> Callable[[str], str]:
    """What finds the same module for all that are connected."""
    parents: dict[str, str] = {}

    def find(module: str) -> str:
        while (parent := parents.setdefault(module, module)) != module:
            parents[module] = parents[parent]
            module = parent
        return module

    for modules in links:
        for one in modules[1:]:
            parents[find(one)] = find(modules[0])
    return find


class _Memory(NamedTuple):
    """What the modules of one group hold: tensors, and other objects, as the handle of a kernel
    that has packed a weight."""

    slots: list[Slot]
    places: Columns
    sums: list[int]
    objects: list[weakref.ref[Any]]

    def is_still(self, now: _Memory) -> bool:
        return self[:3] == now[:3] and _are_same(self.objects, now.objects)


class _Held(NamedTuple):
    """A group that is held: the hashes of its tensors, and its memory when they were loaded."""

    hashes: bytes
    memory: _Memory


class HeldTensors:
    """What one model holds; kept from update to update.

    Attributes:
        left_out: the tensors that this update does not bring.
    """

    def __init__(self) -> None:
        self._recording: Recording | None = None
        self._groups: Groups | None = None
        self._held: dict[int, _Held] = {}
        self._new_update()

    def _new_update(self) -> None:
        self.left_out: frozenset[str] = frozenset()
        self._offered: tuple[str, bytes] | None = None
        self._left: set[int] = set()  # the groups that may be left out
        self._arrived: set[str] = set()

    def forget(self) -> None:
        """It holds nothing that is known."""
        self._held.clear()
        self._recording = self._groups = None

    def look(self, model: ModelAdapter) -> None:
        """A new update begins, and the engine has not made itself ready yet: forget what the
        model's memory does not hold any more, whoever has changed it."""
        self._new_update()
        found = self._memory_of(model, self._held) if self._held else {}
        self._held = {
            number: held
            for number, held in self._held.items()
            if number in found and held.memory.is_still(found[number])
        }

    # ------------------------------------------------------------------ what is left out

    def offer(
        self, recording: Recording | None, tensors: str, hashes: bytes, may_leave_out: bool
    ) -> bytes:
        """The update is of a checkpoint with these hashes. Returns a bit for each tensor that is
        held; none if this update ``may_leave_out`` nothing.

        Args:
            recording: what is known of the loader.
            tensors: ``tensors_digest`` of the checkpoint.
            hashes: of each of its tensors, in the order of the names.
        """
        self._offered = tensors, hashes
        groups = self._know(recording)
        if may_leave_out and self._is_of(groups):
            self._left = {
                number
                for number, held in self._held.items()
                if held.hashes == _hashes_of(groups.members[number], hashes)
            }
        return self._bits()

    def narrow(self, bits: bytes) -> bytes:
        """Which of these may be left out: whole groups that are held."""
        if self._offered is None or len(bits) != len(self._bits()):
            raise RuntimeError("the server leaves out tensors of another checkpoint")
        wanted = np.unpackbits(np.frombuffer(bits, np.uint8))
        if self._groups is not None:
            members = self._groups.members
            self._left = {one for one in self._left if wanted[members[one]].all()}
        return self._bits()

    def leave_out(self, bits: bytes) -> set[str]:
        """That is settled. Returns the modules that get nothing.

        Raises:
            RuntimeError: some of it is not held, or a part of a group.
        """
        if self.narrow(bits) != bits:
            raise RuntimeError("the server leaves out tensors that this worker does not hold")
        if self._groups is None:
            return set()
        names, members = self._groups.names, self._groups.members
        self.left_out = frozenset(names[at] for one in self._left for at in members[one])
        return {module for one in self._left for module in self._groups.modules[one]}

    def _bits(self) -> bytes:
        count = 0 if self._offered is None else len(self._offered[1]) // HASH_BYTES
        bits = np.zeros(count, bool)
        if self._groups is not None:
            for one in self._left:
                bits[self._groups.members[one]] = True
        return np.packbits(bits).tobytes()

    # ------------------------------------------------------------------ what an update writes

    def begin_writing(self, names: Collection[str] | None) -> None:
        """These tensors are about to be loaded; ``None``: anything may be written.

        Raises:
            RuntimeError: the server had said that it leaves them out.
        """
        if self.left_out and (names is None or not self.left_out.isdisjoint(names)):
            self.forget()
            raise RuntimeError("the server sends what it had said that it leaves out: update again")
        for name in () if names is None or not self._held else names:
            number = None if self._groups is None else self._groups.number_of.get(name)
            if number is None:
                names = None
                break
            self._held.pop(number, None)
        if names is None:
            self._held.clear()

    def note_loaded(self, names: Collection[str]) -> None:
        """These tensors are loaded."""
        if self._offered is not None:
            self._arrived.update(names)

    def finish(self, model: ModelAdapter, recording: Recording) -> None:
        """All of the update is loaded and processed: from now on what it brought is held.

        Raises:
            RuntimeError: what it left out is not in the model's memory any more, or more than that
                did not come.
        """
        if self.left_out and len(self._arrived) + len(self.left_out) < len(recording.entries):
            raise RuntimeError("tensors did not come that this worker does not hold: update again")
        self._check_left_out(model)
        self._hold(model, self._loaded_groups(recording, lambda _: True))

    @contextlib.contextmanager
    def keeping(self, model: ModelAdapter, recording: Recording | None) -> Iterator[None]:
        """Around what ends a failed update: what was loaded whole, and is processed, is held. An
        update that repairs the model need not send it again.

        Args:
            recording: ``None`` if it is not known what was loaded.
        """
        groups = self._loaded_groups(recording, model.is_done) if recording is not None else []
        yield
        self._hold(model, groups)

    # ------------------------------------------------------------------ parts of the above

    def _loaded_groups(self, recording: Recording, is_done: Callable[[str], bool]) -> list[int]:
        """The groups that this update has loaded whole. ``is_done``: whether a module is processed,
        so that the engine computes with what was loaded into it."""
        groups = None if self._offered is None else self._know(recording)
        if self._offered is None or not self._is_of(groups):
            return []
        hashes, names = self._offered[1], groups.names
        return [
            number
            for number, members in enumerate(groups.members)
            if self._arrived.issuperset(names[at] for at in members)
            and self.left_out.isdisjoint(names[at] for at in members)
            and all(_hashes_of([at], hashes) != UNKNOWN_HASH for at in members)
            and all(map(is_done, groups.modules[number]))
        ]

    def _hold(self, model: ModelAdapter, groups: Collection[int]) -> None:
        """From now on these groups are held, with the memory that they have now."""
        if not groups or self._groups is None or self._offered is None or not model.keeps_others:
            return
        for number, memory in self._memory_of(model, groups).items():
            hashes = _hashes_of(self._groups.members[number], self._offered[1])
            self._held[number] = _Held(hashes, memory)

    def _check_left_out(self, model: ModelAdapter) -> None:
        found = self._memory_of(model, self._left) if self.left_out else {}
        for number in self._left if self.left_out else ():
            held = self._held.get(number)
            if held is None or number not in found or not held.memory.is_still(found[number]):
                self.forget()
                raise RuntimeError(
                    "the model's memory was changed while it was updated, where nothing was sent: "
                    "update again, and everything will be"
                )

    def _know(self, recording: Recording | None) -> Groups | None:
        if recording is not self._recording:
            self.forget()
            self._recording = recording
            self._groups = None if recording is None else Groups.of(recording)
        return self._groups

    def _is_of(self, groups: Groups | None) -> TypeGuard[Groups]:
        """Whether the checkpoint of this update has just the tensors that are known."""
        if groups is None or self._offered is None:
            return False
        tensors, hashes = self._offered
        return tensors == groups.tensors and len(hashes) == HASH_BYTES * len(groups.names)

    def _memory_of(self, model: ModelAdapter, groups: Iterable[int]) -> dict[int, _Memory]:
        """Nothing if it cannot be looked at."""
        if self._groups is None:
            return {}
        try:
            modules = {number: self._groups.modules[number] for number in groups}
            return _memory_of(model.modules, modules)
        except Exception:  # whatever it is: such a model is sent everything
            return {}


def _hashes_of(members: Sequence[int], hashes: bytes) -> bytes:
    return b"".join([hashes[HASH_BYTES * at : HASH_BYTES * (at + 1)] for at in members])


def _memory_of(
    modules: Mapping[str, torch.nn.Module], groups: Mapping[int, Sequence[str]]
) -> dict[int, _Memory]:
    """Of each group; the device is waited for once."""
    with torch.no_grad():
        own = {
            number: list(every_tensor({name: modules[name] for name in names}))
            for number, names in groups.items()
        }
        tensors = [one for some in own.values() for _, one in some if one.numel()]
        sums = iter(digests(tensors).tolist())
    found = {}
    for number, some in own.items():
        tensors = [tensor for _, tensor in some]
        objects = [ref for name in groups[number] for ref in _objects_of(modules[name])]
        places = columns_of(tensors)
        slots = [slot for slot, _ in some]
        own_sums = [next(sums) if one.numel() else 0 for one in tensors]
        found[number] = _Memory(slots, places, own_sums, objects)
    return found


def _objects_of(module: torch.nn.Module) -> Iterator[weakref.ref[Any]]:
    """What a module, or what processes its weights, keeps beside tensors and numbers."""
    for value in vars(module).values():
        if isinstance(value, (torch.Tensor, torch.nn.Module)):
            continue
        inner = {} if isinstance(value, (type, ModuleType)) else getattr(value, "__dict__", {})
        for one in (value, *inner.values()):
            try:
                yield weakref.ref(one)
            except TypeError:
                continue


def _are_same(before: list[weakref.ref[Any]], now: list[weakref.ref[Any]]) -> bool:
    pairs = zip(before, now, strict=False)
    return len(before) == len(now) and all(a() is b() is not None for a, b in pairs)
