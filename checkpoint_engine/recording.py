"""Watch a loader once: which bytes of which tensor it copies where.

The loader runs as ever, on real tensors; nothing it does is changed. What it does is seen: views by
the storage that they share, copies by the operation itself. Whatever is no copy at constant strides
is noted with its reason, and what it touched stays with the loader.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checkpoint_engine.data_types import tensor_nbytes
from checkpoint_engine.operations import ESCAPES, FACTORIES, LOOK_AT_NO_VALUES, RULES
from checkpoint_engine.strided import Canvas, Constant, Fragment, InexpressibleError, Origin, View

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
        entries: by source, the copies that make up for the loader; only of what can be replayed.
        fills: by owner.
        counts: by source and owner, how many elements the engine counted as loaded.
        plain: the sources that stay with the loader, and why.
        modules: the modules that stay with the loader, and why.
        unused: the sources that nothing was done with.
        together: whether what happens to a tensor may depend on which others there are.
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


@dataclass(eq=False)
class _Target:
    """The memory of one or more slots (weights may be tied) and what was copied into it.

    ``wrote``: the sources that did, even if another wrote over all of it. ``was_changed_alone``:
    something was done to it that no other tensor had a part in.
    """

    canvas: Canvas
    slots: list[int]
    owners: set[str]
    is_meta: bool
    before: int | None
    tensor: torch.Tensor
    wrote: set[int] = field(default_factory=set)
    was_changed_alone: bool = False
    broken: str = ""

    @property
    def was_written_unseen(self) -> bool:
        return self.before is not None and _content(self.tensor) != self.before


@dataclass
class _Seen:
    """A source while its tensor is in the loader's hands."""

    number: int
    source: Source
    call: int
    broken: str = ""


class Recorder:
    """Watches one update of one model.

    For each bucket ``offer`` its tensors, load them ``watching``, and ``settle``; then ``finish``.
    """

    def __init__(self, tensors: Iterable[tuple[Slot, torch.Tensor]]) -> None:
        """``tensors``: what the loader may write into, as it is when loading begins."""
        self._slots: list[Slot] = []
        self._targets: dict[int, list[_Target]] = defaultdict(list)
        self._seen: list[_Seen] = []
        self._by_storage: dict[int, _Seen] = {}
        self._made: dict[int, Canvas] = {}
        self._target_of: dict[int, _Target] = {}
        self._weak: dict[int, StorageWeakRef] = {}
        self._counts: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._written: set[tuple[int, str]] = set()
        self._call = 0
        self._together = False
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._failure = ""
        everything = [(slot, t) for slot, t in tensors if _key(t) is not None]
        for slot, tensor in sorted(everything, key=lambda one: -_extent(one[1])):
            self._add_slot(slot, tensor)

    # ------------------------------------------------------------------ the update as it goes

    def offer(self, weights: NamedTensors) -> NamedTensors:
        """The same tensors, each with a storage of its own over the same memory."""
        self._call += 1
        offered = []
        for name, tensor in weights:
            if tensor.numel():
                flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
                alias = torch.from_dlpack(flat).view(tensor.dtype).view(tensor.shape)
            else:
                alias = torch.empty_like(tensor)
            source = Source(name, tensor.dtype, tuple(tensor.shape))
            seen = _Seen(len(self._seen), source, self._call)
            self._seen.append(seen)
            self._by_storage[self._remember(alias)] = seen
            offered.append((name, alias))
        return offered

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around the loader. What it hands to a pool of threads is watched there."""
        with self._here(), _pools_call(lambda function: self._watched(function)):
            yield

    @contextlib.contextmanager
    def _here(self) -> Iterator[None]:
        with _Functions(self), _Operations(self):
            yield

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self._here():
                return function(*args, **kwargs)

        return watched

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For what the engine does with weights once they are loaded."""
        paused = self._is_paused
        self._thread.paused = True
        try:
            yield
        finally:
            self._thread.paused = paused

    @property
    def _is_paused(self) -> bool:
        return getattr(self._thread, "paused", False)

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
            key = _key(tensor)
            if target is None or key is None or target in self._targets.get(key, ()):
                continue
            if View.of(tensor) != View.of(target.tensor):
                target.broken = target.broken or "it was made anew in another form"
            self._targets[self._remember(tensor)].append(target)

    def settle(self) -> list[str]:
        """A bucket is loaded. Returns the names of the tensors that the loader keeps."""
        for key in [key for key in self._by_storage if self._weak[key].expired()]:
            del self._by_storage[key], self._weak[key]
        for key in [key for key in self._made if self._weak[key].expired()]:
            del self._made[key], self._weak[key]
        return [seen.source.name for seen in self._by_storage.values()]

    def finish(self, refused: Callable[[Slot], str | None] = lambda _: None) -> Recording:
        """What was seen. ``refused``: why a slot needs the engine's own loader, where it does.

        Raises:
            UnaccountableError: the model changed where nothing was seen to write.
        """
        if self._failure:
            raise UnaccountableError(self._failure)
        self.settle()
        if self._made or self._by_storage:
            gc.collect()
            self.settle()
        for seen in self._by_storage.values():
            self._break(seen, "the loader keeps it")
        for made in self._made.values():
            for source in _sources_of(made):
                self._break(self._seen[source], "the loader keeps a copy")
        targets = list(self._target_of.values())
        fed = {owner for target in targets if target.wrote for owner in target.owners}
        for target in targets:
            self._judge(target, refused, fed)
        return _Outcome(self._slots, self._seen, targets, self._counts, self._together).recording()

    # ------------------------------------------------------------------ operations

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation and note what it did to tensors of the checkpoint and the model."""
        result = func(*args, **kwargs)
        if not (self._is_paused or func.is_view or func in LOOK_AT_NO_VALUES):
            with self._noting():
                rule = RULES.get(func)
                if rule is None:
                    self._cannot_express(func, args, kwargs, result)
                else:
                    self._apply(rule, func, result, args, kwargs)
        return result

    def escapes(self, func: Any, args: tuple[Any, ...]) -> None:
        """What leaves the sight of operations: addresses, NumPy arrays, replaced memory."""
        if not self._is_paused:
            with self._noting():
                name = getattr(func, "__qualname__", func)
                self._taint(_tensors_in(args), f"{name} was used on it")

    def give_up(self, reason: str) -> None:
        """Nothing will be learned; ``finish`` says why."""
        self._failure = self._failure or reason

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """The loader goes on whatever happens in here; then nothing is learned."""
        with self._lock, self.paused():
            try:
                yield
            except Exception as error:
                self.give_up(f"{type(error).__name__}: {error}")

    def _apply(
        self, rule: Any, func: Any, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        tensors = _tensors_in((args, kwargs))
        if rule not in FACTORIES and not any(self._is_known(t) for t in tensors):
            return
        try:
            rule(self, result, *args, **kwargs)
        except InexpressibleError as error:
            self._taint([*tensors, *_tensors_in(result)], f"{func}: {error}")

    def _cannot_express(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        tensors = _tensors_in((args, kwargs))
        outputs = _tensors_in(result)
        storages = {_key(t) for t in tensors}
        if outputs and not func._schema.is_mutable and all(_key(t) in storages for t in outputs):
            return  # a view by another name
        self._taint(tensors, f"{func} depends on its values")
        if func._schema.is_mutable and len(storages) == 1:
            for target in self._targets.get(next(iter(storages)) or 0, ()):
                target.was_changed_alone = True

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """``target`` was filled from ``source``, broadcast and converted."""
        self.copy_region(target, View.of(target), source, View.of(source))

    def copy_region(
        self, target: torch.Tensor, into: View, source: torch.Tensor, out_of: View
    ) -> None:
        """A view of the memory of one tensor was filled from a view of another's."""
        canvas = self._canvas(target, into)
        if canvas is None:
            if self._is_known(source) or _key(target) in self._by_storage:
                raise InexpressibleError("into memory that is no parameter or buffer")
            return
        for fragment in self._read(source, out_of.expand(into.sizes)):
            self._write(canvas, fragment.within(into), fragment.origin)

    def fill(self, target: torch.Tensor, value: Any) -> None:
        """``target`` was filled with a number."""
        canvas = self._canvas(target, View.of(target))
        if canvas is not None:
            self._write(canvas, View.of(target), Constant.of(value, target.dtype))
            if id(canvas) in self._target_of:
                self._target_of[id(canvas)].was_changed_alone = True
        elif _key(target) in self._by_storage:
            raise InexpressibleError("into the checkpoint's own memory")

    def make(self, result: torch.Tensor) -> None:
        """``result`` is new memory."""
        key = self._remember(result)
        self._by_storage.pop(key, None)
        self._made[key] = Canvas.like(View.of(result))

    def is_constant(self, tensor: torch.Tensor) -> bool:
        """Whether its values have nothing to do with the checkpoint or the model."""
        return not self._is_known(tensor)

    def _read(self, tensor: torch.Tensor, view: View) -> list[Fragment]:
        key = _key(tensor)
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
        if isinstance(origin, Origin):
            seen = self._seen[origin.source]
            self._together |= seen.call != self._call
            if target is not None:
                target.wrote.add(origin.source)
                self._written.update((origin.source, owner) for owner in target.owners)
        if target is not None:
            mine = origin.source if isinstance(origin, Origin) else None
            others = {o.source for o in replaced if isinstance(o, Origin)} - {mine}
            if others:
                names = [self._seen[n].source.name for n in sorted(others)]
                target.broken = target.broken or f"what {names[0]} wrote was written over"

    # ------------------------------------------------------------------ whose memory it is

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
            if _overlap(target.tensor, tensor):
                target.slots.append(number)
                target.owners.add(slot.owner)
                if not _contains(target.tensor, tensor):
                    target.broken = f"its memory overlaps that of {slot.qualified}"
                return
        before = None if tensor.is_meta else _content(tensor)
        target = _Target(canvas, [number], {slot.owner}, tensor.is_meta, before, tensor)
        self._targets[key].append(target)
        self._target_of[id(canvas)] = target

    def _canvas(self, tensor: torch.Tensor, view: View) -> Canvas | None:
        """What keeps the origins of a view of ``tensor``'s memory; ``None`` for unknown memory."""
        key = _key(tensor)
        if key in self._made:
            return self._made[key]
        begin = view.offset * view.dtype.itemsize
        for target in self._targets.get(key, ()) if key is not None else ():
            canvas = target.canvas
            if canvas.holds(begin // canvas.dtype.itemsize):
                return canvas
        return None

    def _is_known(self, tensor: torch.Tensor) -> bool:
        key = _key(tensor)
        return key is not None and (
            key in self._by_storage or key in self._made or key in self._targets
        )

    def _remember(self, tensor: torch.Tensor) -> int:
        """The key of a tensor's memory, which no other memory gets as long as it is remembered."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._weak or self._weak[key].expired():
            self._weak[key] = StorageWeakRef(storage)
        return key

    def _taint(self, tensors: Iterable[torch.Tensor], reason: str) -> None:
        """What these tensors hold or get stays with the loader; one operation had them all."""
        sources: set[int] = set()
        targets: list[_Target] = []
        for tensor in tensors:
            key = _key(tensor)
            if key in self._by_storage:
                sources.add(self._by_storage[key].number)
            if key in self._made:
                sources |= _sources_of(self._made.pop(key))
            if key is not None and key in self._targets:
                canvas = self._canvas(tensor, View.of(tensor))
                group = self._targets[key]
                targets += [one for one in group if canvas is None or one.canvas is canvas]
        for source in sources:
            self._break(self._seen[source], reason)
        for target in targets:
            target.broken = target.broken or reason
            target.wrote |= sources

    def _break(self, seen: _Seen, reason: str) -> None:
        seen.broken = seen.broken or reason

    def _judge(self, target: _Target, refused: Callable[[Slot], str | None], fed: set[str]) -> None:
        """Whether what was seen of a target is all that happened to it.

        ``fed``: the owners that get anything of the checkpoint, and are seen to in later updates.
        """
        covered = target.canvas.covered
        if covered:
            reasons = (refused(self._slots[number]) for number in target.slots)
            target.broken = target.broken or next(filter(None, reasons), "")
        if target.is_meta:  # nothing can be written there unseen
            return
        by_itself = not any(seen.broken for seen in self._seen) or target.was_changed_alone
        if by_itself and target.owners.isdisjoint(fed) and target.was_written_unseen:
            name = self._slots[target.slots[0]].qualified
            raise UnaccountableError(f"{name} was written, but from no tensor of the checkpoint")
        if target.broken:
            return
        if 0 < covered < target.canvas.numel:
            target.broken = (
                f"only {covered} of its {target.canvas.numel} elements were seen written"
            )
        elif not covered and target.was_written_unseen:
            raise UnaccountableError(f"{self._slots[target.slots[0]].qualified} was written unseen")


class UnaccountableError(Exception):
    """What was recorded is not all that happened: nothing of it can be relied on."""


@dataclass
class _Outcome:
    """Decides what can be replayed, and puts it into entries."""

    slots: list[Slot]
    seen: list[_Seen]
    targets: list[_Target]
    counts: dict[int, dict[str, int]]
    together: bool
    plain: dict[int, str] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)

    def recording(self) -> Recording:
        self._spread_reasons()
        entries: dict[int, list[Entry]] = defaultdict(list)
        fills: dict[str, list[Fill]] = defaultdict(list)
        for target in self.targets:
            if target.owners.isdisjoint(self.modules):
                self._add_entries(target, entries, fills)
        wrote = {source for target in self.targets for source in target.wrote}
        unused = {seen.number for seen in self.seen} - wrote - self.plain.keys()
        return Recording(
            self.slots,
            [seen.source for seen in self.seen],
            dict(entries),
            dict(fills),
            {number: dict(counts) for number, counts in self.counts.items()},
            self.plain,
            self.modules,
            unused,
            self.together,
        )

    def _spread_reasons(self) -> None:
        """A module that needs the loader needs all its tensors; a tensor that goes to the loader
        takes along every module that it reaches."""
        self.plain = {seen.number: seen.broken for seen in self.seen if seen.broken}
        for target in self.targets:
            if target.broken:
                self.modules.update(dict.fromkeys(target.owners, self._named(target)))
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

    def _named(self, target: _Target) -> str:
        return f"{self.slots[target.slots[0]].name}: {target.broken}"

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
        if func in ESCAPES:
            self._recorder.escapes(func, args)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _pools_call(watched: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Have ``watched(function)`` called for the functions that this thread submits to pools."""
    submit, me = ThreadPoolExecutor.submit, threading.get_ident()

    def submit_watched(pool: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        mine = threading.get_ident() == me
        return submit(pool, watched(function) if mine else function, *args, **kwargs)

    ThreadPoolExecutor.submit = submit_watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        ThreadPoolExecutor.submit = submit  # type: ignore[method-assign]


# ---------------------------------------------------------------------- memory


def _key(tensor: torch.Tensor) -> int | None:
    """Tells storages apart."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError, ValueError):  # sparse, not yet made, ...
        return None


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


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    (a, b), (c, d) = _span(one), _span(other)
    return a < d and c < b


def _contains(one: torch.Tensor, other: torch.Tensor) -> bool:
    (a, b), (c, d) = _span(one), _span(other)
    return a <= c and d <= b


def _content(tensor: torch.Tensor) -> int:
    """Changes when the tensor's bytes do, most likely."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if flat.storage_offset() % 4:
        flat = flat.clone()
    words = flat[: flat.numel() // 4 * 4].view(torch.int32)
    return int(words.sum(dtype=torch.int64)) * 31 + int(flat[words.nbytes :].sum())
