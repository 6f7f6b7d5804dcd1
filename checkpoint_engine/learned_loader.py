"""What is known of a model's loader, and one update that makes use of it.

An update is a session: of learning, while the engine's loader is watched; of replaying what was
learned; of verifying it; or plain, where the loader is left alone.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch

from checkpoint_engine import gather_scatter
from checkpoint_engine.recording import NamedTensors, Recorder, Slot, UnaccountableError
from checkpoint_engine.replay_plan import Move, Placed, Plan, Program, Step
from checkpoint_engine.settings import replay_mode
from checkpoint_engine.strided import View

_SHOWN_NAMES = 20

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
        """Around the loader while a plan is verified: call ``check`` with an owner before what was
        loaded into it is changed."""
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
        self._modules = dict(model.named_modules())

    def cannot(self) -> str:
        return ""

    def tensors(self) -> Iterator[tuple[Slot, torch.Tensor]]:
        for owner, module in self._modules.items():
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
        module = self._modules[slot.owner]
        tensor = module._parameters.get(slot.name)
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
    """What is known of one model's loader; kept from update to update."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.why_not = ""
        self.keeps_tensors = False
        self.verified = False
        self._drops = 0

    def begin(self, host: Host, version: str = "") -> Session:
        """A new update; the engine is ready to load.

        Raises:
            ValueError: ``PS_REPLAY`` is none of ``on``, ``off``, ``verify``.
        """
        mode = replay_mode()
        reason = "PS_REPLAY=off" if mode == "off" else self.why_not or host.cannot()
        if reason:
            return Session(self, host, reason)
        fingerprint = _fingerprint(host, version)
        if self.plan is not None and self.plan.fingerprint != fingerprint:
            self._drop()
        if self.why_not:
            return Session(self, host, self.why_not)
        if self.plan is None:
            return _Learning(self, host, fingerprint)
        self._drops = 0
        if mode == "verify" and not self.verified:
            return _Verifying(self, host, self.plan)
        return _Replaying(self, host, self.plan)

    def recognises(self, message: bytes) -> bool:
        """Whether the plan, if it still holds, has this bucket; nothing is begun to find out."""
        return self.plan is not None and digest_of(message) in self.plan.programs

    def learned(self, plan: Plan) -> None:
        self.plan, self.verified = plan, False

    def refuse(self, reason: str) -> None:
        """Never again."""
        self.plan, self.why_not = None, reason

    def _drop(self) -> None:
        self.plan = None
        self._drops += 1
        if self._drops > 1:
            self.why_not = "its parameters are others in every update"


class Session:
    """One update of one model; this one leaves it to the engine's loader.

    Attributes:
        how: ``plain``, ``recorded``, ``verified`` or ``replayed``.
        reason: why it is plain.
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
    """Goes through the engine's loader, and watches."""

    how = "recorded"

    def __init__(self, learned: LearnedLoader, host: Host, fingerprint: Hashable) -> None:
        super().__init__(learned, host)
        self._fingerprint = fingerprint
        self._recorder = Recorder(host.tensors())
        self._cuts: dict[bytes, list[Placed]] = {}
        self._plan: Plan | None = None

    def load(
        self, weights: NamedTensors, plainly: Plainly, delivery: Delivery | None = None
    ) -> None:
        if delivery is not None:
            for _, placed in _by_storage(weights, delivery.buffer):
                self._cuts[delivery.digest] = placed
        self._recorder.rebind(self._host.tensors())
        super().load(weights, lambda given: self._watched(given, plainly), delivery)

    def _watched(self, weights: NamedTensors, plainly: Plainly) -> Any:
        try:
            offered = self._recorder.offer(weights)
        except (BufferError, NotImplementedError, RuntimeError, TypeError) as error:
            self._recorder.give_up(f"tensors of this device cannot be told apart: {error}")
            return plainly(weights)
        with self._host.watching(self._recorder), self._recorder.watching():
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
        self._plan = Plan(recording, self._fingerprint, self._loaded)
        for digest, placed in self._cuts.items():
            self._plan.programs[digest] = self._plan.compile(placed)

    def commit(self) -> None:
        if self._plan is None:
            self._learned.refuse(self.reason)
        else:
            self._learned.learned(self._plan)


class _Replaying(Session):
    """Executes the plan; what is not in it goes through the engine's loader."""

    how = "replayed"

    def __init__(self, learned: LearnedLoader, host: Host, plan: Plan) -> None:
        super().__init__(learned, host)
        self._plan = plan
        self._used: dict[Hashable, Program] = {}
        self._opened: set[str] = set()
        self._bases: dict[str, dict[tuple[int, torch.dtype], torch.Tensor]] = {}
        self._is_stale = False
        self._leaves_it = False

    def knows(self, message: bytes) -> bool:
        return not self._leaves_it and digest_of(message) in self._plan.programs

    def replay(self, delivery: Delivery, plainly: Plainly) -> None:
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
        if self._leaves_it:
            return super().load(weights, plainly, delivery)
        for buffer, key, program in programs:
            self._execute(key, program, buffer, plainly)

    def _compiled(self, key: Hashable, placed: list[Placed]) -> tuple[Hashable, Program]:
        program = self._plan.programs.get(key)
        if program is None:
            program = self._plan.programs[key] = self._plan.compile(placed)
        return key, program

    def finish(self) -> None:
        if self._plan.recording.together and not self._is_stale:
            self._require_all()
        self._plan.programs = {  # what other cuts need is compiled again
            key: program for key, program in self._used.items() if not program.unknown
        }
        if self._is_stale:
            self._learned.plan = None

    def _require_all(self) -> None:
        absent = self._plan.replayable - self._arrived()
        if absent:
            self._learned.plan = None
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
            self._learned.plan = None
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
            targets = self._targets(owner, move)
            if self._host.is_persistent:
                program.targets[place] = targets
        _copy_all(targets, _sources(move, flat))

    def _open(self, owner: str) -> None:
        self._host.open(owner)
        if owner in self._opened:
            return
        self._opened.add(owner)
        for fill in self._plan.recording.fills.get(owner, ()):
            self._region(owner, fill.slot, fill.target).fill_(fill.value)

    def _targets(self, owner: str, move: Move) -> list[torch.Tensor]:
        dtype = move.casts[-1] if move.casts else move.dtype
        base = self._base(owner, move.slot, dtype)
        return [
            base.as_strided(copy.sizes, copy.target_strides, copy.target) for copy in move.copies
        ]

    def _region(self, owner: str, slot: int, view: View) -> torch.Tensor:
        return self._base(owner, slot, view.dtype).as_strided(view.sizes, view.strides, view.offset)

    def _base(self, owner: str, slot: int, dtype: torch.dtype) -> torch.Tensor:
        """All of a slot's storage as elements of ``dtype``."""
        bases = self._bases.setdefault(owner, {})
        if (slot, dtype) not in bases:
            memory = self._host.memory(self._plan.recording.slots[slot])
            storage = memory.untyped_storage()
            empty = torch.empty(0, dtype=dtype, device=memory.device)
            bases[slot, dtype] = empty.set_(storage)
        return bases[slot, dtype]


class _Verifying(_Replaying):
    """Goes through the engine's loader, and compares what it writes with what the plan would."""

    how = "verified"

    def __init__(self, learned: LearnedLoader, host: Host, plan: Plan) -> None:
        super().__init__(learned, host, plan)
        self._differing: list[str] = []
        self._pending: dict[str, list[tuple[Step, torch.Tensor]]] = {}

    def knows(self, message: bytes) -> bool:
        return False

    def load(
        self, weights: NamedTensors, plainly: Plainly, delivery: Delivery | None = None
    ) -> None:
        for buffer, placed in _by_storage(weights, delivery and delivery.buffer):
            program = self._plan.compile(placed)
            self._is_stale |= bool(program.unknown)
            for step in program.steps:
                self._pending.setdefault(step.owner, []).append((step, buffer))
        self._count(len(weights), sum(tensor.nbytes for _, tensor in weights))
        with self._host.checking(self._check):
            self._load_plainly(weights, plainly)

    def loaded(self) -> set[str] | None:
        return self._loaded

    def settle(self) -> list[str]:
        for owner in list(self._pending):
            self._check(owner)
        return []

    def finish(self) -> None:
        if self._differing:
            shown = sorted(set(self._differing))[:_SHOWN_NAMES]
            self.reason = f"the loader wrote something else than was recorded into {shown}"
            self._learned.refuse(self.reason)
        elif self._is_stale:
            self._learned.plan = None
        else:
            self._learned.verified = True

    def _check(self, owner: str) -> None:
        """What has been loaded into an owner is there, and nothing has changed it yet."""
        for step, buffer in self._pending.pop(owner, ()):
            for move in step.moves:
                sources = _sources(move, _as(buffer, move.dtype))
                if not all(map(_same_bits, self._targets(owner, move), sources)):
                    self._differing.append(self._plan.recording.slots[move.slot].qualified)
            self._bases.pop(owner, None)


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


def _copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if len(targets) == 1:
        targets[0].copy_(sources[0])
    elif targets:
        torch._foreach_copy_(targets, sources)


def _same_bits(target: torch.Tensor, source: torch.Tensor) -> bool:
    bits = _BITS[target.itemsize]
    return torch.equal(target.view(bits), source.to(target.dtype).view(bits))


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
