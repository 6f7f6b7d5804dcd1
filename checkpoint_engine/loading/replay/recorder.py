"""Watch a loader: which bytes of which tensor it copies where.

The loader runs as ever, on real tensors; nothing it does is changed. A recording is all or nothing.
It exists if everything that the loader did to tensors is made of views and copies out of the lists
in ``operations.py``. As soon as the loader looks at a value of a tensor that it was given or wrote,
computes with one, starts a thread or writes anywhere else, there is none: what a loader does after
that may depend on anything, and a loader that gets a part of its tensors may count them.
"""

from __future__ import annotations

import _thread
import contextlib
import gc
import sys
import threading
from _queue import SimpleQueue
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checkpoint_engine.data_types import tensor_nbytes
from checkpoint_engine.loading.replay.geometry import (
    Canvas,
    Constant,
    Fragment,
    InexpressibleError,
    Origin,
    View,
)
from checkpoint_engine.loading.replay.operations import (
    FUNCTIONS,
    LOOK_AT_NO_VALUES,
    LOOKS,
    READ_A_NUMBER,
    RULES,
    VIEWS,
)

NamedTensors = list[tuple[str, torch.Tensor]]


class Slot(NamedTuple):
    """A tensor that a loader may write into: ``name`` of the module ``owner``."""

    owner: str
    name: str

    @property
    def qualified(self) -> str:
        return f"{self.owner}.{self.name}" if self.owner else self.name


class Source(NamedTuple):
    """A tensor of the checkpoint."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.dtype, self.shape)


class Entry(NamedTuple):
    """One copy: a strided region of a source into one of a slot.

    ``region`` counts elements from the start of the source, ``target`` from the start of the slot's
    storage; ``casts`` are the dtypes the values are converted to in order, the target's last.
    """

    region: View
    casts: tuple[torch.dtype, ...]
    slot: int
    target: View


class Fill(NamedTuple):
    """A constant that the loader wrote, as the padding of an embedding."""

    slot: int
    target: View
    value: bool | int | float


@dataclass(frozen=True)
class Recording:
    """What a loader was seen to do with a checkpoint.

    Attributes:
        sources: the tensors it was given, in order.
        entries: by source, the copies that make up for the loader.
        fills: by owner.
        counts: by source and owner, how many elements the engine counted as loaded.
        plain: the sources that go to modules which the engine loads itself, and why.
        modules: those modules, and why.
        unused: the sources that nothing was done with.
        together: whether what happens to a tensor may depend on which others there are.
        constants: tensors of the model that the loader looked at, as they were.
    """

    slots: list[Slot]
    sources: list[Source]
    entries: dict[int, list[Entry]]
    fills: dict[str, list[Fill]]
    counts: dict[int, dict[str, int]]
    plain: dict[int, str]
    modules: dict[str, str]
    unused: set[int]
    together: bool
    constants: dict[Slot, torch.Tensor]

    @cached_property
    def identity(self) -> Hashable:
        """Equal for recordings of the same deeds, whatever order the tensors came in."""
        named = self.sources
        return (
            frozenset(named),
            frozenset(
                (named[number], self.slots[entry.slot], *entry[:2], entry.target)
                for number, entries in self.entries.items()
                for entry in entries
            ),
            frozenset(  # by its text a NaN equals itself, and 0.0 is not -0.0
                (self.slots[fill.slot], fill.target, repr(fill.value))
                for fills in self.fills.values()
                for fill in fills
            ),
            frozenset((named[n], *one) for n, of in self.counts.items() for one in of.items()),
            frozenset(named[number] for number in self.plain),
            frozenset(named[number] for number in self.unused),
            frozenset(self.constants),
        )


class UnaccountableError(Exception):
    """There is no recording; says why."""


@dataclass(eq=False)
class _Target:
    """The memory of one or more slots (weights may be tied) and what was copied into it.

    ``wrote``: the sources that did. ``broken``: why nothing may write into it.
    """

    canvas: Canvas
    slots: list[int]
    owners: set[str]
    tensor: torch.Tensor
    wrote: set[int] = field(default_factory=set)
    broken: str = ""


@dataclass
class _Seen:
    """A source while its tensor is in the loader's hands."""

    number: int
    source: Source
    call: int
    was_copied: bool = False


class _KnownMemory:
    """What the memory is that a loader works on: of the model, of the checkpoint, or of a copy that
    the loader made."""

    def __init__(
        self,
        tensors: Iterable[tuple[Slot, torch.Tensor]],
        model: Iterable[tuple[Slot, torch.Tensor]],
    ) -> None:
        """As of ``Recorder``."""
        self._slots: list[Slot] = []
        self._targets: dict[int, list[_Target]] = defaultdict(list)
        self._seen: list[_Seen] = []
        self._by_storage: dict[int, _Seen] = {}
        self._made: dict[int, Canvas] = {}
        self._target_of: dict[int, _Target] = {}
        self._weak: dict[int, StorageWeakRef] = {}
        self._model: dict[int, list[tuple[Slot, torch.Tensor]]] = defaultdict(list)
        for slot, tensor in model:
            if key_of(tensor) is not None:
                self._model[self._remember(tensor)].append((slot, tensor))
        everything = [(slot, t) for slot, t in tensors if key_of(t) is not None]
        for slot, tensor in sorted(everything, key=lambda one: -_extent(one[1])):
            self._add_slot(slot, tensor)

    def _add_slot(self, slot: Slot, tensor: torch.Tensor) -> None:
        number = len(self._slots)
        self._slots.append(slot)
        key = self._remember(tensor)
        view = View.of(tensor)
        try:
            canvas = Canvas.like(view)
        except InexpressibleError:
            return  # writes into it are then writes into unknown memory
        for target in self._targets[key]:
            if overlap(target.tensor, tensor):
                target.slots.append(number)
                target.owners.add(slot.owner)
                if not _contains(target.tensor, tensor):
                    target.broken = f"its memory overlaps that of {slot.qualified}"
                return
        target = _Target(canvas, [number], {slot.owner}, tensor)
        if self._is_held_elsewhere(key, tensor):
            target.broken = "an array of NumPy's, or another process, has its memory"
        self._targets[key].append(target)
        self._target_of[id(canvas)] = target

    def _is_held_elsewhere(self, key: int, tensor: torch.Tensor) -> bool:
        """Whether memory that torch has shared, and so never resizes, has holders that are no
        tensors of the model."""
        if tensor.is_meta or tensor.untyped_storage().resizable():
            return False
        known = len({id(one) for _, one in self._model[key]})
        return int(torch._C._storage_Use_Count(key)) > known + 1  # Python's object for it

    def _canvas(self, tensor: torch.Tensor, view: View) -> Canvas | None:
        """What keeps the origins of a view of ``tensor``'s memory; ``None`` for unknown memory."""
        key = key_of(tensor)
        if key in self._made:
            return self._made[key]
        begin = view.offset * view.dtype.itemsize
        for target in self._targets.get(key, ()) if key is not None else ():
            canvas = target.canvas
            if canvas.holds(begin // canvas.dtype.itemsize):
                return canvas
        return None

    def _is_known(self, tensor: torch.Tensor) -> bool:
        key = key_of(tensor)
        return any(key in one for one in (self._by_storage, self._made, self._targets, self._model))

    def _called(self, tensor: torch.Tensor) -> str:
        key = key_of(tensor)
        if key in self._by_storage:
            return self._by_storage[key].source.name
        for source in _sources_of(self._made[key]) if key in self._made else ():
            return f"a copy of {self._seen[source].source.name}"
        for target in self._targets.get(key, ()) if key is not None else ():
            return self._slots[target.slots[0]].qualified
        return self._model[key][0][0].qualified if key in self._model else "a tensor"

    def _remember(self, tensor: torch.Tensor) -> int:
        """The key of a tensor's memory, which no other memory gets as long as it is remembered."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._weak or self._weak[key].expired():
            self._weak[key] = StorageWeakRef(storage)
        return key


class Recorder(_KnownMemory):
    """Watches one update of one model.

    For each bucket ``offer`` its tensors, load them ``watching``, and ``settle``; then ``finish``.
    ``failure`` says why there will be no recording, as soon as that is known.
    """

    def __init__(
        self,
        tensors: Iterable[tuple[Slot, torch.Tensor]],
        model: Iterable[tuple[Slot, torch.Tensor]],
    ) -> None:
        """
        Args:
            tensors: what the loader may write into, as it is when loading begins.
            model: every tensor of the model: what the loader may look at as long as it is as it
                was before.
        """
        self.failure = ""
        super().__init__(tensors, model)
        self._fresh: set[int] = set()
        self._counts: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._written: set[tuple[int, str]] = set()
        self._constants: dict[Slot, torch.Tensor] = {}
        self._call = 0
        self._last = -1
        self._together = False
        self._is_paused = False

    # ------------------------------------------------------------------ the update as it goes

    def offer(self, weights: NamedTensors) -> NamedTensors:
        """The same tensors, each with a storage of its own over the same memory."""
        self._call += 1
        offered = []
        for name, tensor in weights:
            alias = _alias(tensor)
            source = Source(name, tensor.dtype, tuple(tensor.shape))
            seen = _Seen(len(self._seen), source, self._call)
            self._seen.append(seen)
            self._by_storage[self._remember(alias)] = seen
            offered.append((name, alias))
        return offered

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around the loader, in its thread; other threads are not watched, but noticed."""
        if sys.getprofile() is not None:
            self.give_up("this thread has a profiler, whose place the recorder needs")
            yield
            return
        with _Functions(self), _Operations(self):
            with self.paused():
                torch.empty(0)  # under a mode, the first operation of a process imports a lot
            with _noticing(self.give_up):
                yield

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For what the engine does with weights once they are loaded."""
        if self.failure:
            yield
            return
        paused, self._is_paused = self._is_paused, True
        try:
            with _unnoticed():
                yield
        finally:
            self._is_paused = paused

    def count(self, load: Callable[[], tuple[int, Any]]) -> tuple[int, Any]:
        """Call what loads a tensor into a layer and returns how many elements the engine counts."""
        self._written.clear()
        numel, result = load()
        for source, owner in sorted(self._written)[-1:]:
            self._counts[source][owner] += numel
        return numel, result

    def rebind(self, tensors: Iterable[tuple[Slot, torch.Tensor]]) -> None:
        """Slots that have other memory now, of the same shape."""
        targets = {
            self._slots[number]: target
            for group in list(self._targets.values())
            for target in group
            for number in target.slots
        }
        for slot, tensor in tensors:
            target = targets.get(slot)
            key = key_of(tensor)
            if target is None or key is None or target in self._targets.get(key, ()):
                continue
            if View.of(tensor) != View.of(target.tensor):
                target.broken = target.broken or "it was made anew in another form"
            self._targets[self._remember(tensor)].append(target)

    def settle(self) -> list[str]:
        """A bucket is loaded. Returns the names of the tensors that the loader keeps."""
        for by_key in (self._by_storage, self._made):
            for key in [key for key in by_key if self._weak[key].expired()]:
                del by_key[key], self._weak[key]
        for key in [key for key in self._fresh if self._weak[key].expired()]:
            self._fresh.discard(key)
            del self._weak[key]
        return [seen.source.name for seen in self._by_storage.values()]

    def finish(self, refused: Callable[[Slot], str | None] = lambda _: None) -> Recording:
        """What was seen. ``refused``: why a slot needs the engine's own loader, where it does.

        Raises:
            UnaccountableError: not everything that happened is known.
        """
        self.settle()
        if self._made or self._by_storage:
            gc.collect()
            self.settle()
        for seen in self._by_storage.values():
            self.give_up(f"the loader keeps {seen.source.name}")
        for made in self._made.values():
            for source in _sources_of(made):
                self.give_up(f"the loader keeps a copy of {self._seen[source].source.name}")
        names = [seen.source.name for seen in self._seen]
        if len(names) > len(set(names)):
            self.give_up("a name came twice")
        targets = list(self._target_of.values())
        fed = {owner for target in targets if target.wrote for owner in target.owners}
        for target in targets:
            self._judge(target, fed)
        if self.failure:
            raise UnaccountableError(self.failure)
        outcome = _Outcome(self._slots, self._seen, targets, refused)
        return outcome.recording(self._counts, self._together, self._constants)

    def give_up(self, reason: str) -> None:
        """There will be no recording; ``finish`` says why."""
        self.failure = self.failure or reason

    # ------------------------------------------------------------------ operations

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The loader is about to call a function of torch's that may do more than copy."""
        if self._is_paused or self.failure:
            return
        if isinstance(func, (OpOverload, OpOverloadPacket)):
            return  # ``observe`` sees it
        name = getattr(func, "__qualname__", func)
        with self.paused():
            self._look(func in LOOKS, name, _tensors_in((args, kwargs)))

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation and note what it did. The loader goes on whatever happens in here."""
        result = func(*args, **kwargs)
        if self._is_paused or self.failure or func in VIEWS:
            return result
        self._is_paused = True
        try:
            self._note(func, args, kwargs, result)
        except Exception as error:
            names = [self._called(tensor) for tensor in _tensors_in((args, kwargs))]
            self.give_up(f"{func} of {', '.join(names)}: {error}")
        finally:
            self._is_paused = False
        return result

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        rule = RULES.get(func)
        if rule is not None:
            rule(self, result, *args, **kwargs)
        elif func.namespace != "aten":
            self.give_up(f"{func} is no operation of torch's")
        elif func not in LOOK_AT_NO_VALUES:
            self._look(func is READ_A_NUMBER, func, _tensors_in((args, kwargs)))
            if torch.Tag.nondeterministic_seeded not in func.tags:
                self._fresh.update(map(self._remember, _tensors_in(result)))

    def _look(self, is_harmless: bool, name: Any, tensors: Iterable[torch.Tensor]) -> None:
        """Something was done that is no copy. What the loader made of numbers may be looked at, and
        numbers out of the model as it was before, which are compared before every replay."""
        for tensor in tensors:
            key = key_of(tensor)
            if key is not None and key in self._fresh:
                continue
            if key is None or not (is_harmless and self._is_as_before(key)):
                return self.give_up(f"{name} was used on {self._called(tensor)}")
            for slot, whole in self._model[key]:
                if slot not in self._constants:
                    self._constants[slot] = whole.detach().clone()

    def _is_as_before(self, key: int) -> bool:
        """Whether it is memory of the model that nothing was written into."""
        targets = self._targets.get(key, ())
        return key in self._model and not any(target.canvas.covered for target in targets)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """``target`` was filled from ``source``, broadcast and converted."""
        self.copy_region(target, View.of(target), source, View.of(source))

    def copy_region(
        self, target: torch.Tensor, into: View, source: torch.Tensor, out_of: View
    ) -> None:
        """A view of the memory of one tensor was filled from a view of another's."""
        if not target.numel():
            return
        canvas = self._canvas(target, into)
        if canvas is None:
            if key_of(target) in self._fresh and key_of(source) in self._fresh:
                return
            raise InexpressibleError("into memory that is no parameter or buffer")
        for fragment in self._read(source, out_of.expand(into.sizes)):
            self._write(canvas, fragment.within(into), fragment.origin)

    def fill(self, target: torch.Tensor, value: Any) -> None:
        """``target`` was filled with a number, or a tensor that holds one."""
        if isinstance(value, torch.Tensor):
            if key_of(value) not in self._fresh or value.dim():
                return self.copy(target, value)
            value = value.item()
        canvas = self._canvas(target, View.of(target))
        if canvas is not None:
            self._write(canvas, View.of(target), Constant.of(value, target.dtype))
        elif target.numel() and key_of(target) not in self._fresh:
            raise InexpressibleError("into memory that is no parameter or buffer")

    def make_of_numbers(self, result: torch.Tensor) -> None:
        """``result`` holds what Python had, unless NumPy has its memory too."""
        if not self._is_known(result) and result.untyped_storage().resizable():
            self._fresh.add(self._remember(result))

    def make(self, result: torch.Tensor) -> None:
        """``result`` is new memory."""
        key = self._remember(result)
        self._by_storage.pop(key, None)
        self._made[key] = Canvas.like(View.of(result))

    def make_copy(self, result: torch.Tensor, source: torch.Tensor) -> None:
        """``result`` is new memory, filled from ``source``."""
        if key_of(source) in self._fresh:
            self._fresh.add(self._remember(result))
        else:
            self.make(result)
            self.copy(result, source)

    def _read(self, tensor: torch.Tensor, view: View) -> list[Fragment]:
        key = key_of(tensor)
        seen = self._by_storage.get(key) if key is not None else None
        if seen is not None:
            dims = tuple((n, d, 1) for d, n in enumerate(view.sizes))
            return [Fragment((), dims, Origin(seen.number, view.dtype, view.offset, view.strides))]
        canvas = self._canvas(tensor, view)
        if canvas is None:
            raise InexpressibleError("its values are neither constant nor from the checkpoint")
        fragments = canvas.read(view)
        self._together |= (
            len({o.source for f in fragments if isinstance(o := f.origin, Origin)}) > 1
        )
        return fragments

    def _write(self, canvas: Canvas, view: View, origin: Origin | Constant) -> None:
        replaced = canvas.write(view, origin)
        target = self._target_of.get(id(canvas))
        mine = None
        if isinstance(origin, Origin):
            mine = origin.source
            seen = self._seen[mine]
            is_back = seen.was_copied and self._last != mine  # after another tensor's turn
            self._together |= is_back or seen.call != self._call
            seen.was_copied, self._last = True, mine
            if target is not None:
                target.wrote.add(mine)
                self._written.update((mine, owner) for owner in target.owners)
        if target is not None:
            others = {o.source for o in replaced if isinstance(o, Origin)} - {mine}
            if others:
                names = [self._seen[n].source.name for n in sorted(others)]
                target.broken = target.broken or f"what {names[0]} wrote was written over"

    # ------------------------------------------------------------------ whose memory it is

    def _judge(self, target: _Target, fed: set[str]) -> None:
        """Whether what was seen of a target can be done again. One without memory was made for this
        update, and is filled as it was.

        ``fed``: the owners that get anything of the checkpoint, and are seen to in later updates.
        """
        covered = target.canvas.covered
        if not covered:
            return
        name = self._slots[target.slots[0]].qualified
        if target.broken:
            self.give_up(f"{name}: {target.broken}")
        if not target.tensor.is_meta and target.owners.isdisjoint(fed):
            self.give_up(f"{name} was written, but from no tensor of the checkpoint")
        if not target.tensor.is_meta and covered < target.canvas.numel:
            total = target.canvas.numel
            self.give_up(f"{name}: only {covered} of its {total} elements were seen written")


@dataclass
class _Outcome:
    """Puts what was seen into entries, but for what the engine loads itself."""

    slots: list[Slot]
    seen: list[_Seen]
    targets: list[_Target]
    refused: Callable[[Slot], str | None]
    plain: dict[int, str] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)

    def recording(
        self,
        counts: dict[int, dict[str, int]],
        together: bool,
        constants: dict[Slot, torch.Tensor],
    ) -> Recording:
        self._spread_refusals()
        entries: dict[int, list[Entry]] = defaultdict(list)
        fills: dict[str, list[Fill]] = defaultdict(list)
        for target in self.targets:
            if target.owners.isdisjoint(self.modules):
                self._add_entries(target, entries, fills)
        wrote = {source for target in self.targets for source in target.wrote}
        return Recording(
            self.slots,
            [seen.source for seen in self.seen],
            dict(entries),
            dict(fills),
            {number: dict(of_source) for number, of_source in counts.items()},
            self.plain,
            self.modules,
            {seen.number for seen in self.seen} - wrote,
            together,
            constants,
        )

    def _spread_refusals(self) -> None:
        """A module that needs the engine's loader needs all its tensors; a tensor that goes to the
        loader takes along every module that it reaches."""
        for target in self.targets:
            reasons = (self.refused(self.slots[n]) for n in target.slots if target.wrote)
            if reason := next(filter(None, reasons), ""):
                self._refuse(target, f"{self.slots[target.slots[0]].name}: {reason}")
        grew = True
        while grew:
            before = len(self.plain) + len(self.modules)
            for target in self.targets:
                self._spread_over(target)
            grew = len(self.plain) + len(self.modules) > before

    def _spread_over(self, target: _Target) -> None:
        owner = next((one for one in target.owners if one in self.modules), None)
        if owner is not None:
            for source in target.wrote - self.plain.keys():
                self.plain[source] = f"goes to {owner or 'the model'}: {self.modules[owner]}"
            self._refuse(target, self.modules[owner])
        elif already := target.wrote & self.plain.keys():
            source = min(already)
            self._refuse(target, f"{self.seen[source].source.name}: {self.plain[source]}")

    def _refuse(self, target: _Target, reason: str) -> None:
        for owner in target.owners:
            self.modules.setdefault(owner, reason)

    def _add_entries(
        self, target: _Target, entries: dict[int, list[Entry]], fills: dict[str, list[Fill]]
    ) -> None:
        slot = target.slots[0]
        for box, origin in target.canvas.pieces():
            region = target.canvas.region(box)
            if isinstance(origin, Constant):
                if len(box.size) == 0 or box.volume:
                    view = region._replace(dtype=origin.dtype)
                    fills[self.slots[slot].owner].append(Fill(slot, view, origin.value))
                continue
            source = View(origin.dtype, origin.offset, box.size, origin.strides)
            into = region._replace(dtype=origin.arrives_as)
            entry = Entry(self._once(source), origin.casts, slot, self._once(into))
            entries[origin.source].append(entry)

    def _once(self, view: View) -> View:
        """Models repeat a few shapes thousands of times: hold each once."""
        sizes = self.shared.setdefault(view.sizes, view.sizes)
        strides = self.shared.setdefault(view.strides, view.strides)
        view = view._replace(sizes=sizes, strides=strides)
        return self.shared.setdefault(view, view)


class _Operations(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Loaders are not compiled. To be skipped costs seconds: torch imports its compiler."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._recorder.observe(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._recorder.failure:
            return func(*args, **(kwargs or {}))
        with _unnoticed():
            if func not in FUNCTIONS:
                self._recorder.call(func, args, kwargs or {})
            return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _noticing(give_up: Callable[[str], None]) -> Iterator[None]:
    """Call ``give_up`` when this thread works with another one, or without torch's modes, where
    nobody sees what is read. The interpreter's own profile hook tells: it is this thread's alone,
    while ``ThreadPoolExecutor`` belongs to the whole program."""
    held: set[int] = set()

    def notice(frame: Any, event: Any, function: Any) -> None:
        if event == "c_call":
            owner = getattr(function, "__self__", None)
            name = function.__name__
            if (
                function in _GOES_ELSEWHERE
                or (isinstance(owner, torch.Tensor) and not _modes_see())
                or (type(owner) is SimpleQueue and name == "put")
                or (type(owner) is _Lock and _meets_others(id(owner), name, held))
            ):
                give_up(f"the loader calls {function.__qualname__} where nobody sees what it does")

    sys.setprofile(notice)
    try:
        yield
    finally:
        sys.setprofile(None)


class _unnoticed:  # noqa: N801
    """Around what torch, the engine or the recorder do: the profile hook need not see that."""

    def __enter__(self) -> None:
        self._hook: Any = sys.getprofile()
        sys.setprofile(None)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._hook)


_Lock = type(threading.Lock())
_modes_see = torch._C._is_torch_function_mode_enabled
_GOES_ELSEWHERE = (_thread.start_new_thread, torch._C._to_dlpack)


def _meets_others(lock: int, name: str, held: set[int]) -> bool:
    """Whether a thread waits for another one, or wakes it: takes a lock that it has, or lets one go
    that it has not. A lock that a ``with`` takes is not told of."""
    has_it = lock in held
    if name == "acquire":
        held.add(lock)
        return has_it
    held.discard(lock)
    return name == "release" and not has_it


# ---------------------------------------------------------------------- memory


def key_of(tensor: torch.Tensor) -> int | None:
    """Tells storages apart."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError, ValueError):  # sparse, not yet made, ...
        return None


_KNOWN_TO_DLPACK = {torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.int8}


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, with a storage of its own."""
    if not tensor.numel():
        return torch.empty_like(tensor)
    flat = (tensor.detach() if tensor.requires_grad else tensor).contiguous().view(-1)
    if tensor.dtype in _KNOWN_TO_DLPACK:
        return torch.from_dlpack(flat).view(tensor.shape)
    return torch.from_dlpack(flat.view(torch.uint8)).view(tensor.dtype).view(tensor.shape)


def _tensors_in(result: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]


def _sources_of(canvas: Canvas) -> set[int]:
    return {origin.source for _, origin in canvas.pieces() if isinstance(origin, Origin)}


def _extent(tensor: torch.Tensor) -> int:
    begin, end = _span(tensor)
    return end - begin


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes of its storage that it begins at and ends before."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    begin = int(tensor.storage_offset()) * tensor.itemsize
    return begin, begin + (last + 1) * tensor.itemsize if tensor.numel() else begin


def overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    (a, b), (c, d) = _span(one), _span(other)
    return a < d and c < b


def _contains(one: torch.Tensor, other: torch.Tensor) -> bool:
    (a, b), (c, d) = _span(one), _span(other)
    return a <= c and d <= b
