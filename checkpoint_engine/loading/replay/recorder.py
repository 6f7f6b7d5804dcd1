"""Watch a loader: which bytes of which tensor it copies where.

The loader runs as ever, on real tensors; nothing it does is changed. A recording is all or nothing.
It exists if everything that the loader did to tensors is made of views and copies out of the lists
in ``operations.py``. As soon as the loader looks at a value of a tensor that it was given or wrote,
computes with one, starts a thread or writes anywhere else, there is none: what a loader does after
that may depend on anything, and a loader that gets a part of its tensors may count them.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, cast

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checkpoint_engine.loading.calls import (
    leaves_the_thread,
    noticing_blindness,
    noticing_calls,
)
from checkpoint_engine.loading.replay import operations
from checkpoint_engine.loading.replay.aliases import aliases_of
from checkpoint_engine.loading.replay.canvas import Origin, Source
from checkpoint_engine.loading.replay.geometry import View
from checkpoint_engine.loading.replay.memory import (
    Known,
    KnownMemory,
    Slot,
    SlotTensors,
    Traced,
    key_of,
)
from checkpoint_engine.loading.replay.recording import Entry, NamedTensors, Recording


class Writes(Protocol):
    """A mode that has to see some of a loader's writes, and is told of its copies."""

    def needs(self, target: torch.Tensor) -> bool: ...

    def note_copy(self, target: torch.Tensor) -> None: ...


class Recorder(KnownMemory):
    """Watches one update of one model.

    For each bucket ``offer`` its tensors, load them ``watching``, and ``settle``; then ``finish``.
    ``failure`` says why there will be no recording, as soon as that is known. ``is_paused``: what
    happens is the engine's or the recorder's own. ``is_unnoticed``: that, or torch's own; the hook
    need not see it. ``profile``: Python's, while the loader is at work. ``modes``: how many modes
    of operations there are if nobody but this library has any; ``direct``: the second of them.
    """

    def __init__(self, tensors: SlotTensors, model: SlotTensors) -> None:
        """
        Args:
            tensors: what the loader may write into, as it is when loading begins.
            model: every tensor of the model: what the loader may look at as long as it is as it
                was before.
        """
        super().__init__(tensors, model)
        self.failure = ""
        self._sources: dict[str, Source] = {}
        self._counts: dict[Source, Counter[str]] = defaultdict(Counter)
        self._constants: dict[Slot, torch.Tensor] = {}
        self.is_paused = self.is_unnoticed = False
        self.profile: Any = None
        self.modes = 1
        self.direct: Writes | None = None
        self._counter: Any = None
        self._locks: set[int] = set()

    # ------------------------------------------------------------------ the update as it goes

    def offer(self, weights: NamedTensors) -> NamedTensors:
        """The same tensors over the same memory, in storages that nobody else has."""
        self._bucket = {name for name, _ in weights}
        if len(self._bucket) < len(weights) or not self._bucket.isdisjoint(self._sources):
            self.give_up("a tensor came twice")
        aliases = aliases_of(weights)
        storages: dict[int | None, Known] = {}
        for (name, _), alias in zip(weights, aliases, strict=True):
            source = Source(sys.intern(name), alias.dtype, tuple(alias.shape))
            self._sources[name] = source
            if nbytes := alias.nbytes:
                if (known := storages.get(key := key_of(alias))) is None:
                    known = storages[key] = self._remember(alias)
                begin = int(alias.storage_offset()) * alias.itemsize
                origin = Origin(source, source.dtype)
                known.given.append((begin, begin + nbytes, source, origin))
        for known in self._alive():
            known.given.sort(key=_begin)
        return [(name, alias) for (name, _), alias in zip(weights, aliases, strict=True)]

    def are_for_copies(self, others: int) -> bool:
        """Whether so many modes that are not this library's are the engine's counter alone."""
        counter = self._counter
        return others == 0 or (others == 1 and counter and type(_mode_at(self.modes)) is counter)

    @contextlib.contextmanager
    def beside(self, direct: Writes) -> Iterator[None]:
        """Another mode of this library's is at work, for writes alone."""
        self.modes, self.direct = self.modes + 1, direct
        try:
            yield
        finally:
            self.modes, self.direct = self.modes - 1, None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around the loader, in its thread; other threads are not watched, but noticed."""
        with noticing_blindness(self.give_up), _Functions(self), _Operations(self):
            with self.paused():
                torch.empty(0)  # under a mode, the first operation of a process imports a lot
            self._locks.clear()
            with noticing_calls(self._notice, self.lose_the_hook):
                self.profile = None if self.failure else sys.getprofile()
                try:
                    yield
                finally:
                    self.profile = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For what the engine does with weights once they are loaded."""
        before = self.is_paused, self.is_unnoticed
        profile = None if self.is_unnoticed else self.profile
        self.is_paused = self.is_unnoticed = True
        if profile is not None:
            _set_profile(None)
        try:
            yield
        finally:
            if profile is not None:
                _set_profile(profile)
            self.is_paused, self.is_unnoticed = before

    def count(self, load: Callable[[], tuple[int, Any]], counter: Any = None) -> tuple[int, Any]:
        """Call what loads a tensor into a layer and returns how many elements the engine counts.

        ``counter``: the engine's mode that does so, and is there for copies alone.
        """
        self._last_write = []
        self._counter = counter
        try:
            numel, result = load()
        finally:
            self._counter = None
        for source, module in self._last_write:
            self._counts[source][module] += numel
        return numel, result

    def _notice(self, function: Any, owner: Any) -> None:
        """Give up when this thread works with another one, or without torch's modes, where nobody
        sees what is read."""
        if self.is_unnoticed:
            return
        if isinstance(owner, torch.Tensor):
            is_unseen = not _modes_see()
        else:
            is_unseen = leaves_the_thread(function, owner, self._locks)
        if is_unseen:
            reason = f"calls {function.__qualname__} where nobody sees what it does"
            self.give_up(f"the loader {reason}")

    def lose_the_hook(self) -> None:
        """Another profiler may be at work now, or was."""
        self.profile = None
        self.give_up("this thread has a profiler, whose place the recorder needs")

    def rebind(self, tensors: SlotTensors) -> None:
        """Slots that have other memory now, of the same shape."""
        every = {slot: traced for traced in self._traced for slot in traced.slots}
        for slot, tensor in tensors:
            traced = every.get(slot)
            if traced is None or key_of(tensor) is None or traced in self._find(tensor).traced:
                continue
            if View.of(tensor) != traced.canvas.view:
                traced.broken = traced.broken or "it was made anew in another form"
            self._remember(tensor).traced.append(traced)

    def settle(self) -> list[str]:
        """A bucket is loaded. Returns the names of the tensors that the loader keeps."""
        if any(known.given for known in self._alive()):
            gc.collect()
        return [known.given[0][2].name for known in self._alive() if known.given]

    def finish(self, refused: Callable[[Slot], str | None] = lambda _: None) -> Recording | None:
        """What was seen; ``None`` if not everything that happened is known.

        ``refused``: why a slot that was written needs the engine's own loader, where it does.
        """
        for name in self.settle():
            self.give_up(f"the loader keeps {name}")
        if self._copies_alive():
            gc.collect()
        for source in self._copies_alive():
            self.give_up(f"the loader keeps a copy of {source.name}")
        fed = {module for traced in self._traced if traced.is_fed for module in traced.modules}
        for traced in self._traced:
            self._judge(traced, fed)
            for slot in traced.slots if traced.is_fed else ():
                if reason := refused(slot):
                    self.give_up(f"{slot.qualified}: {reason}")
        if self.failure:
            return None
        entries: dict[Source, list[Entry]] = {source: [] for source in self._sources.values()}
        recording = Recording(entries, self._counts, self._constants, self._together)
        shared: dict[Any, Any] = {}
        for traced in self._traced:
            recording.add(traced, shared)
        return recording

    def _copies_alive(self) -> list[Source]:
        """What the loader has copies of, of its own."""
        made = (one for known in self._alive() for one in known.traced if not one.slots)
        return [source for one in made for source in one.canvas.sources]

    @property
    def written(self) -> set[str] | None:
        """The tensors of the model that something was written into; ``None``: it is not known."""
        written = (
            slot for traced in self._traced if traced.canvas.is_written for slot in traced.slots
        )
        return None if self.failure else {slot.qualified for slot in written}

    def give_up(self, reason: str) -> None:
        """There will be no recording; ``finish`` says why."""
        self.failure = self.failure or reason

    # ------------------------------------------------------------------ operations

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of torch's for the loader; it may do more than copy."""
        if self.failure:
            return func(*args, **kwargs)
        if not self.is_paused and (_count_modes() < self.modes or _is_hidden(_PYTHON)):
            self.give_up("the loader switches off torch's modes of operations")
        if func in operations.CALLS_BACK:
            self.give_up(f"the loader calls {func.__qualname__}, whose function nobody sees")
        is_seen_later = operations.is_seen_by_dispatcher(func)  # by ``observe``
        if not (self.is_paused or is_seen_later or func in operations.FUNCTIONS):
            name = getattr(func, "__qualname__", func)
            with self.paused():
                self._look(func in operations.LOOKS, name, _tensors_in((args, kwargs)))
        return func(*args, **kwargs)

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation and note what it did. The loader goes on whatever happens in here."""
        result = func(*args, **kwargs)
        if not (self.is_paused or self.failure or func in operations.VIEWS):
            self._note(func, args, kwargs, result)
        return result

    def note_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Most of a loader's operations that are no views."""
        if not (self.is_paused or self.failure or self.copy_of_given(target, source)):
            self._note(operations.COPY, (target, source), {}, target)

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self.is_paused = True
        try:
            self._note_what_it_did(func, args, kwargs, result)
        except Exception as error:
            names = [self._called(tensor) for tensor in _tensors_in((args, kwargs))]
            self.give_up(f"{func} of {', '.join(names)}: {error}")
        finally:
            self.is_paused = False

    def _note_what_it_did(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        if func in operations.RULES:
            operations.RULES[func](self, result, *args, **kwargs)
        elif func.namespace != "aten":
            self.give_up(f"{func} is no operation of torch's")
        elif func not in operations.LOOK_AT_NO_VALUES:
            self._look(func is operations.READ_A_NUMBER, func, _tensors_in((args, kwargs)))
            if torch.Tag.nondeterministic_seeded not in func.tags:
                for tensor in _tensors_in(result):
                    self.make_of_numbers(tensor)

    def _look(self, is_harmless: bool, name: Any, tensors: Iterable[torch.Tensor]) -> None:
        """Something was done that is no copy. What the loader made of numbers may be looked at, and
        numbers out of the model as it was before, which are compared before every replay."""
        for tensor in tensors:
            known = self._find(tensor)
            if known.is_numbers:
                continue
            is_as_before = known.model and not any(one.canvas.is_written for one in known.traced)
            if not (is_harmless and is_as_before):
                return self.give_up(f"{name} was used on {self._called(tensor)}")
            for slot, whole in known.model:
                if slot not in self._constants:
                    self._constants[slot] = whole.detach().clone()

    def _judge(self, traced: Traced, fed: set[str]) -> None:
        """Whether what was seen of a tensor of the model can be done again.

        ``fed``: the modules that get anything of the checkpoint, and are seen to in later updates.
        """
        if not traced.canvas.is_written:
            return
        name = traced.slots[0].qualified
        try:
            covered, total = traced.canvas.covered, traced.canvas.numel
        except ValueError as error:
            return self.give_up(f"{name}: {error}")
        if traced.broken:
            self.give_up(f"{name}: {traced.broken}")
        if traced.canvas.overwritten:
            first = min(source.name for source in traced.canvas.overwritten)
            self.give_up(f"{name}: what {first} wrote was written over")
        if not traced.is_meta and traced.modules.isdisjoint(fed):
            self.give_up(f"{name} was written, but from no tensor of the checkpoint")
        if not traced.is_meta and covered < total:
            self.give_up(f"{name}: only {covered} of its {total} elements were seen written")


# ---------------------------------------------------------------------- how it sees what happens


class _Operations(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Loaders are not compiled, and to be skipped costs seconds: torch imports its compiler.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recorder.observe(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        # What a mode around the loading does in the place of a call has to be seen as well.
        around = _get_current_function_mode_stack()
        self._is_alone = all(isinstance(mode, DeviceContext) for mode in around)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Most calls make views or ask for shapes, and whatever this costs is paid by each of them.
        # The hook need not see what torch does, and would be called a dozen times meanwhile.
        if func in _SHAPES and not kwargs and type(args[0]) in _TENSORS:
            return func(*args)
        recorder = self._recorder
        within, recorder.is_unnoticed = recorder.is_unnoticed, True
        if not within and _get_profile() is not recorder.profile:
            recorder.lose_the_hook()
        profile = None if within else recorder.profile
        if profile is not None:
            _set_profile(None)
        try:
            if kwargs or not args or type(args[0]) not in _TENSORS:
                return recorder.call(func, args, kwargs or {})
            others = _count_modes() - recorder.modes if self._is_alone else -1
            if func in _QUICK and recorder.are_for_copies(others):
                if func is not _COPY:
                    if _are_plain(args):
                        return self._unseen(func, args)
                elif len(args) == 2 and type(args[1]) in _TENSORS:
                    counter = _mode_at(recorder.modes) if others else None
                    return self._copy(args[0], args[1], counter)
            return recorder.call(func, args, {})
        finally:
            recorder.is_unnoticed = within
            if profile is not None:
                _set_profile(profile)

    def _copy(self, target: torch.Tensor, source: torch.Tensor, counter: Any) -> torch.Tensor:
        """``counter``: the engine's mode, which does it; ``None``: there is none."""
        recorder, direct = self._recorder, self._recorder.direct
        if direct is not None and direct.needs(target):
            return cast("torch.Tensor", recorder.call(_COPY, (target, source), {}))
        if counter is None:
            self._unseen(_COPY, (target, source))
        else:
            self._unseen(counter.__torch_dispatch__, (operations.COPY, (), (target, source)))
        if direct is not None:
            direct.note_copy(target)
        recorder.note_copy(target, source)
        return target

    def _unseen(self, func: Any, args: Any) -> Any:
        """Call it without the mode of operations."""
        was_hidden = _is_hidden(_PYTHON)
        _hide(_PYTHON, True)
        try:
            return func(*args)
        finally:
            _hide(_PYTHON, was_hidden)


_modes_see = torch._C._is_torch_function_mode_enabled
_count_modes = torch._C._len_torch_dispatch_stack
_mode_at = torch._C._get_dispatch_stack_at
_hide = torch._C._dispatch_tls_set_dispatch_key_excluded
_is_hidden = torch._C._dispatch_tls_is_dispatch_key_excluded
_PYTHON = torch._C.DispatchKey.Python
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_PLAIN = {int, type(None), type(Ellipsis), torch.Size, torch.dtype}  # no bool, nor list
_COPY = torch.Tensor.copy_
_SHAPES = {one for one in operations.SHAPES if not inspect.isfunction(one)}  # written in C
_QUICK = operations.QUICK | {_COPY}
_get_profile, _set_profile = sys.getprofile, sys.setprofile


def _are_plain(args: tuple[Any, ...]) -> bool:
    """Whether nothing but the first is a tensor, or could be."""
    if _PLAIN.issuperset(map(type, args[1:])):
        return True
    for one in args[1:]:
        if type(one) not in _PLAIN:
            for part in one if type(one) is tuple else (one,):
                if type(part) not in _PLAIN and not _is_plain_slice(part):
                    return False
    return True


def _is_plain_slice(one: Any) -> bool:
    return type(one) is slice and {type(one.start), type(one.stop), type(one.step)} <= _PLAIN


def _begin(given: tuple[Any, ...]) -> Any:
    return given[0]


def _tensors_in(result: Any) -> list[torch.Tensor]:
    return [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
