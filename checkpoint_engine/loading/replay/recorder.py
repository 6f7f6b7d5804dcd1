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
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class Recorder(KnownMemory):
    """Watches one update of one model.

    For each bucket ``offer`` its tensors, load them ``watching``, and ``settle``; then ``finish``.
    ``failure`` says why there will be no recording, as soon as that is known. ``is_paused``: what
    happens is the engine's or the recorder's own.
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
        self.is_paused = False

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

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around the loader, in its thread; other threads are not watched, but noticed."""
        if sys.getprofile() is not None:
            self.give_up("this thread has a profiler, whose place the recorder needs")
            yield
            return
        with _Functions(self) as functions, _Operations(self):
            with self.paused():
                torch.empty(0)  # under a mode, the first operation of a process imports a lot
            with self._noticing(functions):
                yield

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For what the engine does with weights once they are loaded."""
        if self.failure:
            yield  # another profiler may have the hook's place
            return
        paused, self.is_paused = self.is_paused, True
        try:
            with _unnoticed():
                yield
        finally:
            self.is_paused = paused

    def count(self, load: Callable[[], tuple[int, Any]]) -> tuple[int, Any]:
        """Call what loads a tensor into a layer and returns how many elements the engine counts."""
        self._last_write = []
        numel, result = load()
        for source, module in self._last_write:
            self._counts[source][module] += numel
        return numel, result

    @contextlib.contextmanager
    def _noticing(self, functions: _Functions) -> Iterator[None]:
        """Give up when this thread works with another one, or without torch's modes, where nobody
        sees what is read."""
        held: set[int] = set()

        def notice(frame: Any, event: Any, function: Any) -> None:
            if event != "c_call":
                return
            owner = getattr(function, "__self__", None)
            if type(owner) in _HARMLESS:
                return
            name = function.__name__
            if (
                function in _GOES_ELSEWHERE
                or (isinstance(owner, torch.Tensor) and not _modes_see())
                or (type(owner) is SimpleQueue and name == "put")
                or (type(owner) is _Lock and _meets_others(id(owner), name, held))
            ):
                reason = f"calls {function.__qualname__} where nobody sees what it does"
                self.give_up(f"the loader {reason}")

        # The profile hook is this thread's alone. To patch threads or ThreadPoolExecutor would
        # change them for the whole program.
        functions.hook = notice
        sys.setprofile(notice)
        try:
            yield
            if sys.getprofile() is not notice:
                self.give_up("the loader has a profiler, whose place the recorder needs")
        finally:
            functions.hook = None
            sys.setprofile(None)

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
        is_seen_later = isinstance(func, (OpOverload, OpOverloadPacket))  # by ``observe``
        if not (self.is_paused or is_seen_later or func in operations.FUNCTIONS):
            with self.paused():
                name = getattr(func, "__qualname__", func)
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
        self.hook: Any = None  # of the profile, while the loader is at work
        self._is_within = False
        # What a mode around the loading does in the place of a call has to be seen as well.
        around = _get_current_function_mode_stack()
        self._is_alone = all(isinstance(mode, DeviceContext) for mode in around)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The hook need not see what torch does, and would be called a dozen times for each of the
        # loader's calls.
        within, self._is_within = self._is_within, True
        hook = None if within or self._recorder.is_paused else self.hook
        if hook is not None and sys.getprofile() is not hook:
            self._recorder.give_up("the loader has a profiler, whose place the recorder needs")
        _set_hook(None)
        try:
            return self._call(func, args, kwargs)
        finally:
            self._is_within = within
            _set_hook(None if within or self._recorder.is_paused else self.hook)

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        # Most calls make views or ask for shapes, and whatever this costs is paid by each of them,
        # twice for a function of Python's. So they stay in here, and nobody else looks at them.
        if kwargs or not args or type(args[0]) not in _TENSORS:
            return self._recorder.call(func, args, kwargs or {})
        if func in operations.SHAPES:
            return func(*args)
        if _count_modes() != 1 or not self._is_alone:  # others have modes, which see everything
            return self._recorder.call(func, args, {})
        if func is torch.Tensor.copy_ and len(args) == 2 and type(args[1]) in _TENSORS:
            return self._copy(*args)
        if func in operations.QUICK and _are_plain(args[1:]):
            return self._unseen(func, args)
        return self._recorder.call(func, args, {})

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        self._unseen(torch.Tensor.copy_, (target, source))  # the engine's own, if it has one
        self._recorder.note_copy(target, source)
        return target

    def _unseen(self, func: Any, args: Any) -> Any:
        """Call it without the mode of operations."""
        was_hidden = _is_hidden(_MODES)
        _hide(_MODES, True)
        try:
            return func(*args)
        finally:
            _hide(_MODES, was_hidden)


class _unnoticed:  # noqa: N801
    """Around what torch, the engine or the recorder do: the profile hook need not see that."""

    def __enter__(self) -> None:
        self._hook: Any = sys.getprofile()
        sys.setprofile(None)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._hook)


_Lock = type(threading.Lock())
_set_hook = sys.setprofile
_modes_see = torch._C._is_torch_function_mode_enabled
_hide = torch._C._dispatch_tls_set_dispatch_key_excluded
_is_hidden = torch._C._dispatch_tls_is_dispatch_key_excluded
_count_modes = torch._C._len_torch_dispatch_stack
_MODES = torch._C.DispatchKey.Python
_HARMLESS = {str, dict, list, tuple, set, int}
"""Whose methods meet no other thread."""
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_PLAIN = {int, type(None), type(Ellipsis), torch.Size, torch.dtype}  # no bool, nor list
_GOES_ELSEWHERE = (_thread.start_new_thread, torch._C._to_dlpack)


def _are_plain(args: tuple[Any, ...]) -> bool:
    for one in args:
        if type(one) not in _PLAIN:
            for part in one if type(one) is tuple else (one,):
                if type(part) not in _PLAIN and not _is_plain_slice(part):
                    return False
    return True


def _is_plain_slice(one: Any) -> bool:
    return type(one) is slice and {type(one.start), type(one.stop), type(one.step)} <= _PLAIN


def _meets_others(lock: int, name: str, held: set[int]) -> bool:
    """Whether a thread waits for another one, or wakes it: takes a lock that it has, or releases
    one that it has not."""
    has_it = lock in held  # the hook does not see a ``with``: such a lock is never in here
    if name == "acquire":
        held.add(lock)
        return has_it
    held.discard(lock)
    return name == "release" and not has_it


def _begin(given: tuple[Any, ...]) -> Any:
    return given[0]


def _tensors_in(result: Any) -> list[torch.Tensor]:
    return [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
