"""What is known of a model's loader, and one update that makes use of it.

An update is a session: of learning, while the engine's loader is watched; of replaying what was
learned; or plain, where the loader is left alone. Two updates learn. The first records. The second
records again, and must see the same; what the first saw is compared with what the loader leaves in
every parameter and buffer.
"""

from __future__ import annotations

import gc
import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple, Protocol

import torch

from checkpoint_engine.loading.replay import fused_copies as gather_scatter
from checkpoint_engine.loading.replay.geometry import View
from checkpoint_engine.loading.replay.program import Move, Placed, Plan, Program
from checkpoint_engine.loading.replay.recorder import (
    NamedTensors,
    Recorder,
    Slot,
    UnaccountableError,
    key_of,
    overlap,
)
from checkpoint_engine.settings import replay_check, replay_mode

_SHOWN_NAMES = 20
_MOST_SURPRISES = 2
"""Recordings that are not as the one before; then a loader is left alone."""

KEEPS_TENSORS = (
    "the model's loader keeps tensors that it was given, whose memory the next buckets overwrite: "
    "update again, it will be given copies from now on"
)

Plainly = Callable[[NamedTensors], Any]
"""The engine's own loader."""


class Host(Protocol):
    """The model as a plan sees it."""

    @property
    def is_persistent(self) -> bool:
        """Whether the memory of slots stays the same from update to update."""
        ...

    @property
    def modules(self) -> Mapping[str, torch.nn.Module]:
        """The model's, by name."""
        ...

    def cannot(self) -> str:
        """Why this engine cannot be watched; empty where it can."""
        ...

    def tensors(self) -> Iterator[tuple[Slot, torch.Tensor]]:
        """What the loader may write into, as it is now."""
        ...

    def refuses(self, slot: Slot) -> str | None:
        """Why a slot that was written needs the engine's own loader."""
        ...

    def watching(self, recorder: Recorder) -> AbstractContextManager[Any]:
        """Around the loader while it is recorded."""
        ...

    def checking(self, check: Callable[[str], None]) -> AbstractContextManager[Any]:
        """Around the loader while a plan is compared with it: call ``check`` with an owner before
        what was loaded into it is changed."""
        ...

    def open(self, owner: str) -> None:
        """An owner's tensors are about to be written, for the first time or again."""
        ...

    def memory(self, slot: Slot) -> torch.Tensor:
        """What to write into."""
        ...

    def delivered(self, owner: str, numel: int) -> bool:
        """So many elements were loaded. Returns whether the owner is complete and was processed."""
        ...


class InPlace:
    """A model whose parameters stay where they are and as they are."""

    is_persistent = True

    def __init__(self, model: torch.nn.Module) -> None:
        self.modules: Mapping[str, torch.nn.Module] = dict(model.named_modules())

    def cannot(self) -> str:
        return ""

    def tensors(self) -> Iterator[tuple[Slot, torch.Tensor]]:
        for owner, module in self.modules.items():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    yield Slot(owner, name), tensor

    def refuses(self, slot: Slot) -> str | None:
        return None

    def watching(self, recorder: Recorder) -> AbstractContextManager[Any]:
        return nullcontext()

    def checking(self, check: Callable[[str], None]) -> AbstractContextManager[Any]:
        return nullcontext()

    def open(self, owner: str) -> None:
        """They are there."""

    def memory(self, slot: Slot) -> torch.Tensor:
        module = self.modules[slot.owner]
        tensor: torch.Tensor | None = module._parameters.get(slot.name)
        tensor = module._buffers[slot.name] if tensor is None else tensor
        if tensor is None:
            raise RuntimeError(f"{slot.qualified} is gone")
        return tensor

    def delivered(self, owner: str, numel: int) -> bool:
        return False


class Delivery(NamedTuple):
    """A bucket as it came: the server's message, and the buffer that its tensors are in."""

    message: bytes
    buffer: torch.Tensor

    @property
    def digest(self) -> bytes:
        return digest_of(self.message)


def digest_of(message: bytes) -> bytes:
    """Stands for a bucket's message."""
    return hashlib.blake2b(message, digest_size=16).digest()


class LearnedLoader:
    """What is known of one model's loader; kept from update to update.

    ``plan`` is replayed only if ``is_proven``: a second update was recorded alike, and compared.
    """

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.is_proven = False
        self.why_not = ""
        self.keeps_tensors = False
        self._is_verified = False
        self._drops = self._surprises = self._replays = 0

    def begin(self, host: Host, version: str = "") -> Session:
        """A new update; the engine is ready to load.

        Raises:
            ValueError: ``PS_REPLAY`` or ``PS_REPLAY_CHECK`` is not what it may be.
        """
        mode, every = replay_mode(), replay_check()
        reason = "PS_REPLAY=off" if mode == "off" else self.why_not or host.cannot()
        if reason:
            return Session(self, host, reason)
        fingerprint = _fingerprint(host, version)
        if self.plan is not None and not self.plan.holds(fingerprint, host.modules):
            self._drop()
        if self.why_not:
            return Session(self, host, self.why_not)
        must_verify = mode == "verify" and not self._is_verified
        if self.plan is None or not self.is_proven or must_verify:
            return _Learning(self, host, fingerprint)
        self._drops = self._surprises = 0
        self._replays += 1
        checks, rest = divmod(self._replays, every)
        if rest:
            return _Replaying(self, host, self.plan)
        if self.plan.recording.together:  # one bucket says little
            return _Learning(self, host, fingerprint)
        return _Replaying(self, host, self.plan, checks % max(1, self.plan.buckets))

    def recognises(self, message: bytes) -> bool:
        """Whether the plan, if it still holds, has this bucket; nothing is begun to find out."""
        plan = self.plan if self.is_proven else None
        return plan is not None and digest_of(message) in plan.programs

    def learned(self, plan: Plan) -> None:
        """What an update did, which another one must do as well."""
        self._surprises += self.plan is not None
        self.plan, self.is_proven, self._is_verified = plan, False, False
        if self._surprises > _MOST_SURPRISES:
            self.refuse("its loader does something else in every update")

    def proved(self, plan: Plan) -> None:
        """Another update did the same; its plan has the programs of the last buckets."""
        if self.plan is not None:
            plan.combine(self.plan)
        self.plan = plan
        self.is_proven, self._is_verified = True, self.is_proven

    def forget(self) -> None:
        """Learn anew."""
        self.plan, self.is_proven = None, False

    def refuse(self, reason: str) -> None:
        """Never again."""
        self.forget()
        self.why_not = reason

    def _drop(self) -> None:
        self.forget()
        self._drops += 1
        if self._drops > 1:
            self.why_not = "its parameters, or what it looks at, are others in every update"


class Session:
    """One update of one model; this one leaves it to the engine's loader.

    Attributes:
        how: ``plain``, ``recorded``, ``verified`` (recorded again, and found the same) or
            ``replayed``.
        reason: why it is plain, or will be.
        tensors, nbytes: what arrived.
        replayed: tensors that did not go through the loader.
        held_bytes: of those, what went to owners that the bucket left incomplete.
    """

    how = "plain"

    def __init__(self, learned: LearnedLoader, host: Host, reason: str = "") -> None:
        self.reason = reason
        self.tensors = self.nbytes = self.replayed = self.held_bytes = 0
        self._learned = learned
        self._host = host
        self._loaded: set[str] | None = set()

    def load(
        self, weights: NamedTensors, plainly: Plainly, delivery: Delivery | None = None
    ) -> None:
        """Load a bucket; ``delivery`` says where its tensors lie, if they came in one."""
        self._count(len(weights), sum(tensor.nbytes for _, tensor in weights))
        self._load_plainly(weights, plainly)

    def knows(self, message: bytes) -> bool:
        """Whether a bucket's message need not be decoded: ``replay`` it."""
        return False

    def replay(self, delivery: Delivery, plainly: Plainly) -> None:
        """Load a bucket whose message is known."""
        raise RuntimeError("only known messages can be replayed")

    def settle(self) -> list[str]:
        """The bucket's memory is about to be overwritten. Returns the names of tensors that the
        loader was seen to keep."""
        return []

    def loaded(self) -> set[str] | None:
        """The parameters that were loaded, as the loader names them; ``None`` if it does not."""
        return self._loaded

    def unused(self) -> set[str]:
        """The tensors that the loader did nothing with, as far as is known."""
        return set()

    def finish(self) -> None:
        """Every bucket has been loaded."""

    def commit(self) -> None:
        """The update succeeded: keep what was learned."""

    def _count(self, tensors: int, nbytes: int) -> None:
        self.tensors += tensors
        self.nbytes += nbytes

    def _load_plainly(self, weights: NamedTensors, plainly: Plainly) -> None:
        if self._learned.keeps_tensors:
            weights = [(name, tensor.clone()) for name, tensor in weights]
        loaded = plainly(weights)
        if not isinstance(loaded, (set, frozenset)):  # not every engine's loader says
            self._loaded = None
        elif self._loaded is not None:
            self._loaded |= loaded


class _Learning(Session):
    """Goes through the engine's loader, and watches; compares what the loader leaves with the plan
    that the update before has left, where there is one."""

    how = "recorded"

    def __init__(self, learned: LearnedLoader, host: Host, fingerprint: Hashable) -> None:
        super().__init__(learned, host)
        self.how = "verified" if learned.is_proven else "recorded"
        self._fingerprint = fingerprint
        self._recorder = Recorder(host.tensors(), every_tensor(host.modules))
        self._comparison = _Comparison(host, learned.plan)
        self._cuts: dict[Hashable, list[Placed]] = {}
        self._buckets = 0
        self._plan: Plan | None = None

    def load(
        self, weights: NamedTensors, plainly: Plainly, delivery: Delivery | None = None
    ) -> None:
        self._buckets += 1
        for buffer, placed in _by_storage(weights, delivery and delivery.buffer):
            self._cuts[delivery.digest if delivery else tuple(placed)] = placed
            if self._learned.plan is not None:
                self._comparison.expect(self._learned.plan.compile(placed), buffer)
        if not self._host.is_persistent:
            self._recorder.rebind(self._host.tensors())
        super().load(weights, lambda given: self._watched(given, plainly), delivery)

    def _watched(self, weights: NamedTensors, plainly: Plainly) -> Any:
        if self._recorder.failure:
            return plainly(weights)
        try:
            offered = self._recorder.offer(weights)
        except (BufferError, NotImplementedError, RuntimeError, TypeError) as error:
            self._recorder.give_up(f"tensors of this device cannot be told apart: {error}")
            return plainly(weights)
        with ExitStack() as around:
            if self._learned.plan is not None:
                around.enter_context(self._host.checking(self._comparison.check))
            around.enter_context(self._host.watching(self._recorder))
            around.enter_context(self._recorder.watching())
            return plainly(offered)

    def settle(self) -> list[str]:
        if self._recorder.settle():
            gc.collect()
        return self._recorder.settle()

    def unused(self) -> set[str]:
        return set() if self._plan is None else self._plan.unused_of(None)

    def finish(self) -> None:
        try:
            recording = self._recorder.finish(self._host.refuses)
        except UnaccountableError as error:
            self.reason = str(error)
            return
        self._plan = Plan(recording, self._fingerprint, self._loaded, self._buckets)
        for key, placed in self._cuts.items():
            self._plan.programs[key] = self._plan.compile(placed)
        if self._learned.plan is None or self._plan.does_as(self._learned.plan):
            self.reason = self._comparison.finish(self._plan)

    def commit(self) -> None:
        if self._plan is None or self.reason:
            self._learned.refuse(self.reason)
        elif self._plan.does_as(self._learned.plan):
            self._learned.proved(self._plan)
        else:
            self._learned.learned(self._plan)


class _Replaying(Session):
    """Executes the plan; what is not in it goes through the engine's loader."""

    how = "replayed"

    def __init__(
        self, learned: LearnedLoader, host: Host, plan: Plan, checked: int | None = None
    ) -> None:
        """``checked``: the bucket that goes through the loader, and is compared."""
        super().__init__(learned, host)
        self._plan = plan
        self._checked = checked
        self._comparison: _Comparison | None = None
        self._bucket = 0
        self._used: dict[Hashable, Program] = {}
        self._opened: set[str] = set()
        self._bases: dict[str, dict[tuple[int, torch.dtype], torch.Tensor]] = {}
        self._is_stale = False
        self._leaves_it = False

    def knows(self, message: bytes) -> bool:
        if self._leaves_it or self._bucket == self._checked:
            return False
        return digest_of(message) in self._plan.programs

    def replay(self, delivery: Delivery, plainly: Plainly) -> None:
        self._bucket += 1
        digest = delivery.digest
        self._execute(digest, self._plan.programs[digest], delivery.buffer, plainly)

    def load(
        self, weights: NamedTensors, plainly: Plainly, delivery: Delivery | None = None
    ) -> None:
        programs = [
            (buffer, *self._compiled(delivery.digest if delivery else tuple(placed), placed))
            for buffer, placed in _by_storage(weights, delivery and delivery.buffer)
        ]
        if not self._leaves_it and any(program.unknown for _, _, program in programs):
            self._meet_unknown([p for _, _, program in programs for p in program.unknown])
        self._bucket += 1
        if self._leaves_it:
            return super().load(weights, plainly, delivery)
        if self._bucket - 1 == self._checked and not self._is_stale:
            return self._load_compared(weights, plainly, programs)
        for buffer, key, program in programs:
            self._execute(key, program, buffer, plainly)

    def _load_compared(
        self,
        weights: NamedTensors,
        plainly: Plainly,
        programs: list[tuple[torch.Tensor, Hashable, Program]],
    ) -> None:
        self._count(len(weights), sum(tensor.nbytes for _, tensor in weights))
        self._used |= {key: program for _, key, program in programs}
        bucket = [program for _, _, program in programs]
        self._comparison = _Comparison(self._host, self._plan, bucket)
        for buffer, _, program in programs:
            self._comparison.expect(program, buffer)
        with self._host.checking(self._comparison.check):
            self._load_plainly(weights, plainly)

    def settle(self) -> list[str]:
        comparison, self._comparison = self._comparison, None
        if comparison is not None and (differs := comparison.finish(self._plan)):
            self._learned.refuse(differs)
            raise RuntimeError(f"{differs}: update again, it will not be replayed any more")
        return []

    def _compiled(self, key: Hashable, placed: list[Placed]) -> tuple[Hashable, Program]:
        program = self._plan.programs.get(key)
        if program is None:
            program = self._plan.programs[key] = self._plan.compile(placed)
        return key, program

    def finish(self) -> None:
        if self._plan.recording.together and not self._is_stale:
            self._require_all()
        self._plan.buckets = self._bucket
        self._plan.programs = {  # what other cuts need is compiled again
            key: program for key, program in self._used.items() if not program.unknown
        }
        if self._is_stale:
            self._learned.forget()

    def _require_all(self) -> None:
        absent = self._plan.replayable - self._arrived()
        if absent:
            self._learned.forget()
            raise RuntimeError(
                f"the checkpoint lacks {len(absent)} tensors that it had before, and its loader "
                "looks at tensors together: update again, it will be learned anew"
            )

    def loaded(self) -> set[str] | None:
        if self._leaves_it:
            return self._loaded
        if self._loaded is None or self._plan.loaded is None:
            return None
        return self._loaded | self._plan.loaded_from(self._arrived())

    def unused(self) -> set[str]:
        return self._plan.unused_of(self._arrived())

    def _arrived(self) -> frozenset[int]:
        return frozenset().union(*(program.sources for program in self._used.values()))

    def _execute(
        self, key: Hashable, program: Program, buffer: torch.Tensor, plainly: Plainly
    ) -> None:
        self._used[key] = program
        self._count(program.tensors, program.nbytes)
        self.replayed += program.replayed
        try:
            with torch.no_grad():
                self._run(program, buffer)
        except Exception as error:
            self._learned.refuse(f"replaying failed: {type(error).__name__}: {error}")
            raise
        if left := (*program.plain, *program.unknown):
            self._load_plainly(_weights(buffer, left), plainly)

    def _meet_unknown(self, tensors: list[Placed]) -> None:
        """The checkpoint is not the one that was recorded: the next update learns it anew."""
        self._is_stale = True
        if not self._used:
            self._leaves_it = True
        elif self._plan.recording.together:
            self._learned.forget()
            raise RuntimeError(
                f"the checkpoint has {len(tensors)} tensors that it did not have before, as "
                f"{tensors[0].name!r}, and its loader looks at tensors together: update again, it "
                "will be learned anew"
            )

    def _run(self, program: Program, buffer: torch.Tensor) -> None:
        flats: dict[torch.dtype, torch.Tensor] = {}
        for number, step in enumerate(program.steps):
            self._open(step.owner)
            for place, move in enumerate(step.moves):
                if move.dtype not in flats:
                    flats[move.dtype] = _as(buffer, move.dtype)
                self._move(program, (number, place), step.owner, move, flats[move.dtype])
            if self._host.delivered(step.owner, step.numel):
                self._bases.pop(step.owner, None)
            elif not self._host.is_persistent:
                self.held_bytes += step.nbytes

    def _move(
        self,
        program: Program,
        place: tuple[int, int],
        owner: str,
        move: Move,
        flat: torch.Tensor,
    ) -> None:
        if not move.casts and gather_scatter.fits(move.copies, flat.device):
            if place not in program.tables:
                table = gather_scatter.build_table(move.copies, move.dtype, flat.device)
                program.tables[place] = table
            base = self._base(owner, move.slot, move.dtype)
            return gather_scatter.gather_scatter(base, flat, program.tables[place])
        targets = program.targets.get(place) if self._host.is_persistent else None
        if targets is None:
            targets = _targets(self._base(owner, move.slot, _written_as(move)), move)
            if self._host.is_persistent:
                program.targets[place] = targets
        _copy_all(targets, _sources(move, flat))

    def _open(self, owner: str) -> None:
        self._host.open(owner)
        if owner in self._opened:
            return
        self._opened.add(owner)
        for fill in self._plan.recording.fills.get(owner, ()):
            base = self._base(owner, fill.slot, fill.target.dtype)
            _region(base, fill.target).fill_(fill.value)

    def _base(self, owner: str, slot: int, dtype: torch.dtype) -> torch.Tensor:
        bases = self._bases.setdefault(owner, {})
        if (slot, dtype) not in bases:
            memory = self._host.memory(self._plan.recording.slots[slot])
            bases[slot, dtype] = _storage_as(memory, dtype)
        return bases[slot, dtype]


class _Comparison:
    """What a plan would write, and what the loader leaves, bucket by bucket.

    What a plan would write is summed up where it arrives; what was written, where it lies, as soon
    as nothing more will be done to it. Tensors that the plan does not write must not change.
    """

    def __init__(self, host: Host, plan: Plan | None, bucket: list[Program] | None = None) -> None:
        """
        Args:
            plan: none yet, in the first update: then whatever changes must be written by the plan
                that comes of it.
            bucket: the only one that is compared; default: all of an update's.
        """
        self._host = host
        self._plan = plan
        self._bucket = bucket
        self._expected: dict[str, list[tuple[Move, torch.Tensor]]] = defaultdict(list)
        self._differing: set[str] = set()
        self._others = {slot: (t.detach(), _digest(t)) for slot, t in self._not_written_by(plan)}

    def expect(self, program: Program, buffer: torch.Tensor) -> None:
        """What the program would copy is in the buffer, and about to be loaded."""
        for step in program.steps:
            for move in step.moves:
                sources = _sources(move, _as(buffer, move.dtype))
                sums = _digests([source.to(_written_as(move)) for source in sources])
                self._expected[step.owner].append((move, sums))

    def check(self, owner: str) -> None:
        """What has been loaded into an owner is there, and nothing has changed it yet."""
        expected = self._expected.pop(owner, [])
        for move, sums in expected:
            targets = _targets(self._storage(move.slot, _written_as(move)), move)
            if targets[0].is_meta or not torch.equal(_digests(targets), sums):
                self._note(move.slot)
        if self._plan is None or not expected:
            return
        if self._bucket is None or self._host.is_persistent:
            for fill in self._plan.recording.fills.get(owner, ()):
                region = _region(self._storage(fill.slot, fill.target.dtype), fill.target)
                if not _same_bits(region, torch.empty_like(region).fill_(fill.value)):
                    self._note(fill.slot)

    def _note(self, slot: int) -> None:
        assert self._plan is not None
        self._differing.add(self._plan.recording.slots[slot].qualified)

    def _storage(self, slot: int, dtype: torch.dtype) -> torch.Tensor:
        assert self._plan is not None
        return _storage_as(self._host.memory(self._plan.recording.slots[slot]), dtype)

    def finish(self, plan: Plan) -> str:
        """Everything is loaded. Returns what is not as ``plan`` would have it, in words; empty if
        nothing is."""
        for owner in list(self._expected):
            self.check(owner)
        for slot, tensor in self._not_written_by(plan):
            was = self._others.get(slot)
            if was is None or key_of(was[0]) != key_of(tensor):
                changed = self._plan is not None  # the first update may make some
            else:
                changed = not torch.equal(_digest(tensor), was[1])
            if changed:
                self._differing.add(slot.qualified)
        if not self._differing:
            return ""
        shown = sorted(self._differing)[:_SHOWN_NAMES]
        return f"the loader wrote something else than was recorded into {shown}"

    def _not_written_by(self, plan: Plan | None) -> Iterator[tuple[Slot, torch.Tensor]]:
        """Of memory that stays, that is: where an engine makes layers anew, it changes them too."""
        if not self._host.is_persistent:
            return
        memory: dict[int | None, list[torch.Tensor]] = defaultdict(list)
        for slot in plan.written(self._bucket) if plan is not None else ():
            tensor = self._host.memory(slot)
            memory[key_of(tensor)].append(tensor)
        for slot, tensor in every_tensor(self._host.modules):
            key = key_of(tensor)
            if key is None or tensor.is_meta:
                continue
            if not any(overlap(tensor, one) for one in memory[key]):
                yield slot, tensor


def every_tensor(modules: Mapping[str, torch.nn.Module]) -> Iterator[tuple[Slot, torch.Tensor]]:
    """Parameters, buffers, and tensors that are plain attributes."""
    for owner, module in modules.items():
        for named in (module._parameters, module._buffers, vars(module)):
            for name, tensor in named.items():
                if isinstance(tensor, torch.Tensor):
                    yield Slot(owner, name), tensor


def _fingerprint(host: Host, version: str) -> Hashable:
    """Changes when the engine's tensors do."""
    return version, tuple(
        (
            slot,
            None if tensor.is_meta else tensor.data_ptr(),
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
        )
        for slot, tensor in host.tensors()
    )


def _by_storage(
    weights: NamedTensors, buffer: torch.Tensor | None
) -> list[tuple[torch.Tensor, list[Placed]]]:
    """Buffers and what lies in them; views of ``buffer`` lie in it."""
    groups: dict[int, tuple[torch.Tensor, list[Placed]]] = {}
    start = buffer.storage_offset() if buffer is not None else 0
    for name, tensor in weights:
        tensor = tensor.detach()
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        storage = tensor.untyped_storage()
        if storage._cdata not in groups:
            whole = buffer
            if whole is None:
                empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
                whole = empty.set_(storage)
            groups[storage._cdata] = (whole, [])
        offset = int(tensor.storage_offset()) * tensor.itemsize - start
        groups[storage._cdata][1].append(
            Placed(name, tensor.dtype, tuple(tensor.shape), int(offset))
        )
    return list(groups.values())


def _weights(buffer: torch.Tensor, bucket: Iterable[Placed]) -> NamedTensors:
    return [
        (
            placed.name,
            buffer[placed.offset : placed.offset + placed.nbytes]
            .view(placed.dtype)
            .view(placed.shape),
        )
        for placed in bucket
    ]


def _as(buffer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As many elements of ``dtype`` as are in the buffer."""
    if buffer.storage_offset() % dtype.itemsize:  # no buffer of ours
        buffer = buffer.clone()
    return buffer[: buffer.numel() // dtype.itemsize * dtype.itemsize].view(dtype)


def _sources(move: Move, flat: torch.Tensor) -> list[torch.Tensor]:
    start = flat.storage_offset()
    sources = [
        flat.as_strided(copy.sizes, copy.source_strides, start + copy.source)
        for copy in move.copies
    ]
    for dtype in move.casts[:-1]:
        sources = [source.to(dtype) for source in sources]
    return sources


def _written_as(move: Move) -> torch.dtype:
    return move.casts[-1] if move.casts else move.dtype


def _storage_as(memory: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """All of a tensor's storage as elements of ``dtype``."""
    return torch.empty(0, dtype=dtype, device=memory.device).set_(memory.untyped_storage())


def _targets(storage: torch.Tensor, move: Move) -> list[torch.Tensor]:
    return [
        storage.as_strided(copy.sizes, copy.target_strides, copy.target) for copy in move.copies
    ]


def _region(storage: torch.Tensor, view: View) -> torch.Tensor:
    return storage.as_strided(view.sizes, view.strides, view.offset)


def _copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if len(targets) == 1:
        targets[0].copy_(sources[0])
    elif targets:
        torch._foreach_copy_(targets, sources)


def _digests(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([_digest(tensor) for tensor in tensors])


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    """Tells tensors of one shape apart, by bits and their places, at the speed of memory.

    It is the sum of all words, or of the sums of rows and of columns where there are many, times
    factors that are odd and depend on the place.
    """
    words = _bits(tensor.detach())
    if words.numel() <= _FEW:
        words = words.reshape(-1).to(torch.int64)
        return (words * _factors(words)).sum()
    whole = words.shape[-1] // _BLOCK * _BLOCK
    if whole:  # one pass instead of two
        sums = words[..., :whole].unflatten(-1, (-1, _ROWS, _ROW)).sum(dim=-2, dtype=torch.int64)
        return _digest(sums) + 3 * _digest(words[..., whole:])
    columns = words.sum(dim=tuple(range(words.dim() - 1)), dtype=torch.int64)
    rows = words.sum(dim=-1, dtype=torch.int64).flatten()
    return (columns * _factors(columns)).sum() + 5 * (rows * _factors(rows)).sum()


_ROWS, _ROW = 16, 2047
"""The length is odd, so that rows of a matrix do not lie at multiples of it."""
_BLOCK = _ROWS * _ROW
_FEW = 2 * _BLOCK


def _factors(sums: torch.Tensor) -> torch.Tensor:
    places = torch.arange(1, len(sums) + 1, device=sums.device)
    return (places * places * 0x1E3779B97F4A7C15 + places * 0x14D049BB133111EB) * 2 + 1


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype.is_complex and (not tensor.dim() or tensor.stride(-1) != 1):
        tensor = torch.view_as_real(tensor)
    return tensor.view(_BITS[tensor.itemsize])


def _same_bits(target: torch.Tensor, source: torch.Tensor) -> bool:
    return torch.equal(_bits(target), _bits(source))


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
