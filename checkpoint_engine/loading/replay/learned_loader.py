"""What is known of a model's loader, and one update that makes use of it.

An update learns, while the engine's loader is watched; or it replays what was learned; or it is
plain, and the loader is left alone. Two updates learn. The first records. The second records again,
and must see the same; what the first saw is compared with what the loader leaves in every parameter
and buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch

from checkpoint_engine.ground.collector import collector_at_rest
from checkpoint_engine.ground.needs import Needs
from checkpoint_engine.loading.replay import fused_copies
from checkpoint_engine.loading.replay.adapter import (
    ModelAdapter,
    ModelUpdate,
    cannot_compare,
    every_tensor,
)
from checkpoint_engine.loading.replay.comparison import Comparison
from checkpoint_engine.loading.replay.geometry import whole_storage
from checkpoint_engine.loading.replay.held import HeldTensors
from checkpoint_engine.loading.replay.memory import as_columns, columns_of, places_of
from checkpoint_engine.loading.replay.program import Program
from checkpoint_engine.loading.replay.recorder import Recorder
from checkpoint_engine.loading.replay.recording import (
    NamedTensors,
    Outcome,
    ReceivedBucket,
    Recording,
    placements_of,
)
from checkpoint_engine.settings import replay_check, replay_mode

Held = list[torch.UntypedStorage]
_CUTS = 3  # for which programs are kept
_MOST_RESTARTS = 2  # without a replay in between; then a loader is left alone


class LearnedLoader:
    """What is known of one model's loader; kept from update to update.

    Attributes:
        recording: what it does; replayed once two updates did it.
        agreed: how many updates in a row did it.
        why_not: why it is not replayed, ever; empty while it may be.
        keeps_tensors: it must be given copies.
        held: what of a checkpoint the model holds.
    """

    def __init__(self) -> None:
        self.recording: Recording | None = None
        self.agreed = 0
        self.why_not = ""
        self.keeps_tensors = False
        self.held = HeldTensors()
        self._restarts = self._replays = 0

    @collector_at_rest()  # else every few updates wait for it, though all of this is gone
    def begin(self, model: ModelAdapter, version: str = "") -> ModelUpdate:
        """A new update; the engine is ready to load.

        Raises:
            ValueError: ``PS_REPLAY`` or ``PS_REPLAY_CHECK`` is not what it may be.
        """
        mode, every = replay_mode(), replay_check()
        reason = "PS_REPLAY=off" if mode == "off" else self.why_not or model.cannot()
        if not reason and self.recording is None:
            reason = cannot_compare(model.modules)
        if reason:
            return ModelUpdate(self, model, reason)
        if self.recording is not None and not self.recording.holds(version, model):
            self._restart("its parameters, or what it looks at, are others in every update")
        if self.why_not:
            return ModelUpdate(self, model, self.why_not)
        if self.recording is None or self.agreed < (3 if mode == "verify" else 2):
            return _Learning(self, model, version)
        self._restarts = 0
        self._replays += 1
        checks, rest = divmod(self._replays, every)
        if rest == 0 and self.recording.together:  # one bucket says little
            return _Learning(self, model, version)
        checked = checks % max(1, self.recording.buckets) if rest == 0 else None
        return _Replaying(self, model, self.recording, checked)

    def recognises(self, message: bytes) -> bool:
        """Whether the recording, if it still holds, has this bucket; nothing is begun."""
        return self.agreed > 1 and self.recording is not None and message in self.recording.programs

    @property
    def needs(self) -> Needs | None:
        """What it reads as long as it is replayed; ``None``: everything."""
        learned = self.recording if self.agreed > 1 and replay_mode() == "on" else None
        return None if learned is None else learned.needs

    @property
    def reads_next(self) -> str:
        """The digest of what the next update reads, if it reads no more; nothing is begun."""
        checks = (self._replays + 1) % replay_check() == 0
        return "" if checks or self.needs is None else self.needs.digest

    def learn(self, recording: Recording, agrees: bool) -> None:
        """What an update did, and whatever else is known if the one before did the same."""
        if self.recording is not None and agrees:
            self.agreed += 1
            recording.together |= self.recording.together
            recording.programs = self.recording.programs
        elif self.recording is not None:
            self._restart("its loader does something else in every update")
        if not self.why_not:
            self.recording, self.agreed = recording, max(1, self.agreed)

    def forget(self) -> None:
        """Learn anew."""
        self.recording, self.agreed = None, 0
        self.held.forget()

    def refuse(self, reason: str) -> None:
        """Never again."""
        self.forget()
        self.why_not = reason

    def _restart(self, reason: str) -> None:
        self.forget()
        self._restarts += 1
        if self._restarts > _MOST_RESTARTS:
            self.refuse(reason)


class _Learning(ModelUpdate):
    """Goes through the engine's loader, and watches; compares what the loader leaves with the
    recording of the update before, where there is one."""

    def __init__(self, learned: LearnedLoader, model: ModelAdapter, version: str) -> None:
        super().__init__(learned, model)
        self.how = "verified" if learned.agreed > 1 else "recorded"
        self._before = learned.recording
        for program in self._before.programs.values() if self._before is not None else ():
            program.release()  # the recorder counts who has the model's memory
        self._version, tensors = version, list(model.tensors())
        self._names, self._places = model.names(), places_of(tensors)
        self._recorder = Recorder(tensors, every_tensor(model.modules))
        self._comparison = Comparison(model, self._before)
        self._buckets, self._agrees = 0, False
        self._device: torch.device | None = None
        self._recording: Recording | None = None

    @collector_at_rest()
    def load(self, weights: NamedTensors, received: ReceivedBucket | None = None) -> None:
        self._buckets += 1
        if received is not None and self._device is None:
            self._device = received.buffer.device
            fused_copies.warm_up(self._device)
        if self._before is not None:
            for placement in placements_of(weights, received):
                self._comparison.expect(self._before.program_for(placement), placement.buffer)
        if not self._model.is_persistent:
            self._recorder.rebind(self._model.moved())
        super().load(weights, received)

    def _load_weights(self, weights: NamedTensors) -> Any:
        if self._recorder.failure:
            return self._model.load_weights(weights)
        try:
            offered = self._recorder.offer(weights)
        except (BufferError, NotImplementedError, RuntimeError, TypeError) as error:
            self._recorder.give_up(f"tensors of this device cannot be told apart: {error}")
            return self._model.load_weights(weights)
        with ExitStack() as around:
            if self._before is not None:
                around.enter_context(self._model.checking(self._comparison.check))
            around.enter_context(self._model.watching(self._recorder))
            return self._model.load_weights(offered, self._recorder.watching())

    def settle(self) -> list[str]:
        return self._recorder.settle()

    def written(self) -> set[str] | None:
        written = self._recorder.written
        return None if written is None else {name.replace(".base_layer.", ".") for name in written}

    def loaded(self) -> set[str] | None:
        written, declared = self.written(), super().loaded()
        return declared if written is None else written | (declared or set())

    def unused(self) -> set[str]:
        return set() if self._recording is None else self._recording.unused

    @collector_at_rest()
    def finish(self) -> None:
        recording = self._recorder.finish(self._model.refuses)
        if recording is None:
            self.reason = self._recorder.failure
            return
        recording.version = self._version
        recording.names, recording.places = self._names, self._places
        recording.buckets = self._buckets
        recording.loaded = self.loaded()
        self._agrees = self._before is not None and recording.does_as(self._before)
        if self._before is None or self._agrees:
            self.reason = self._comparison.finish(recording)
        self._recording = recording

    def commit(self) -> None:
        if self._recording is None or self.reason:
            self._learned.refuse(self.reason)
        else:
            self._learned.learn(self._recording, self._agrees)
            if self._learned.agreed < 2:
                return
            if self._device is not None:  # the next update replays
                self._recording.prepare(self._device, at_once=self._model.is_persistent)
            self._learned.held.note_loaded([source.name for source in self._recording.entries])
            self._learned.held.finish(self._model, self._recording)


class _Replaying(ModelUpdate):
    """Executes the recording; what is not in it goes through the engine's loader."""

    how = "replayed"

    def __init__(
        self,
        learned: LearnedLoader,
        model: ModelAdapter,
        recording: Recording,
        checked: int | None,
    ) -> None:
        """``checked``: the bucket that goes through the loader, and is compared."""
        super().__init__(learned, model)
        self._recording, self._checked, self._held_tensors = recording, checked, learned.held
        self.may_leave_out = checked is None and model.keeps_others and replay_mode() == "on"
        self._places, self._addresses = recording.places, recording.addresses
        self._order = list(recording.programs)
        self._known: Held | None = None  # of the bucket that was asked for last
        self._held: Held = []
        self._comparison: Comparison | None = None
        self._bucket = 0
        self._used: dict[Hashable, Program] = {}
        self._filled: set[str] = set()
        self._is_stale = False

    @property
    def needs(self) -> str:
        # It takes a while to work out, and not every server asks.
        reads_all = self._is_stale or self._checked is not None
        return "" if reads_all else self._recording.needs_digest

    @property
    def _leaves_it(self) -> bool:
        """The checkpoint was another one from the first bucket on: this update is plain."""
        return self._is_stale and not self._used

    def knows(self, message: bytes) -> bool:
        if self._leaves_it or self._bucket == self._checked:
            return False
        program = self._recording.programs.get(message)
        self._known = None if program is None else self._in_place(program)
        return self._known is not None

    def replay(self, received: ReceivedBucket) -> None:
        held, self._known = self._known, None
        if held is None:
            raise RuntimeError("a bucket is replayed that is not known")
        self._bucket += 1
        key = received.message
        self._execute(key, self._recording.programs[key], received.buffer, held)
        if self._bucket < len(self._order):
            # While the device copies. The look that counts comes right before the next bucket is
            # written; this one has the processor fetch what it looks at, which takes longest.
            self._in_place(self._recording.programs[self._order[self._bucket]])

    @collector_at_rest()
    def load(self, weights: NamedTensors, received: ReceivedBucket | None = None) -> None:
        placements = placements_of(weights, received)
        programs = [(one, self._recording.program_for(one)) for one in placements]
        unknown = {placed.source.name for _, program in programs for placed in program.unknown}
        in_place = [
            (placement, program, held)
            for placement, program in programs
            if (held := self._in_place(program)) is not None
        ]
        if (unknown or len(in_place) < len(programs)) and not self._leaves_it:
            self._leave(unknown, received)
        self._bucket += 1
        if self._leaves_it:
            return super().load(weights, received)
        if self._bucket - 1 == self._checked and not self._is_stale:
            self._used |= {placement.key: program for placement, program in programs}
            self._comparison = Comparison(self._model, self._recording, [p for _, p in programs])
            for placement, program in programs:
                self._comparison.expect(program, placement.buffer)
            with self._model.checking(self._comparison.check):
                super().load(weights, received)
            self._held_tensors.note_loaded([name for name, _ in weights])
            return self._look_anew()
        for placement, program, held in in_place:
            self._execute(placement.key, program, placement.buffer, held)
        known = {name for _, program, _ in in_place for name in program.names}
        if rest := [one for one in weights if one[0] not in known]:
            self._held_tensors.begin_writing(None)
            self._load_plainly(rest)
            self._look_anew()

    def _in_place(self, program: Program) -> Held | None:
        """The memory that it writes into, if that is where the recording, or the loader since then,
        has it; nothing where the engine opens modules itself."""
        if not self._model.is_persistent:
            return []
        places = self._places
        if program.targets is None or program.targets[0] is not places:
            slots = list(self._recording.written([program]))
            program.targets = places, slots, as_columns(map(places.get, slots))
        _, slots, expected = program.targets
        tensors = [self._model.memory(slot) for slot in slots]
        if columns_of(tensors) != expected:
            return None
        return list(map(torch.Tensor.untyped_storage, tensors))

    def _look_anew(self) -> None:
        """The engine's loader was at work: what it wrote may be elsewhere now. What is of another
        form is not written any more."""
        if self._model.is_persistent:
            for program in (*self._recording.programs.values(), *self._used.values()):
                program.release()
            before = self._recording.places
            now = places_of(self._model.tensors())
            self._addresses = [place.address for place in now.values()]
            self._places = {
                slot: place
                for slot, place in now.items()
                if slot in before and before[slot].view == place.view
            }

    def settle(self) -> list[str]:
        comparison, self._comparison = self._comparison, None
        if comparison is not None and (differs := comparison.finish(self._recording)):
            self._learned.refuse(differs)
            raise RuntimeError(f"{differs}: update again, it will not be replayed any more")
        return []

    def finish(self) -> None:
        if self._model.is_persistent and (self._used or self._held_tensors.left_out):
            self._check_addresses()
        if self._recording.together and (absent := self.absent()):
            self._refuse(f"the checkpoint lacks {len(absent)} tensors that it had before")
        if not self._held_tensors.left_out:
            self._recording.buckets = self._bucket
        # A server that does not know this worker yet cuts the checkpoint in another way: programs
        # of the cuts before are kept, too, the last ones first.
        kept = {**self._used, **self._recording.programs}
        most = _CUTS * max(len(self._used), self._recording.buckets)
        self._recording.programs = dict(islice(kept.items(), most))
        if self._is_stale:
            self._learned.forget()

    def commit(self) -> None:
        if not self._is_stale:
            self._held_tensors.finish(self._model, self._recording)

    def abandon(self, undo: Callable[[], None] = lambda: None) -> None:
        is_known = self._learned.recording is self._recording and not self._is_stale
        with self._held_tensors.keeping(self._model, self._recording if is_known else None):
            undo()

    def loaded(self) -> set[str] | None:
        if self._leaves_it:
            return self.loaded_plainly
        if self.loaded_plainly is None or self._recording.loaded is None:
            return None
        return self.loaded_plainly | self._outcome.loaded

    def unused(self) -> set[str]:
        return self._outcome.unused

    def absent(self) -> set[str]:
        return set() if self._is_stale else self._outcome.absent

    @property
    def _outcome(self) -> Outcome:
        return self._recording.outcome(self._used, self._held_tensors.left_out)

    def _leave(self, unknown: set[str], received: ReceivedBucket | None) -> None:
        """The checkpoint is not the one that was recorded, or the model's memory moved: the next
        update learns it anew."""
        self._is_stale = True
        if self._held_tensors.left_out:
            self._refuse("the model moved, or the checkpoint became another")
        if received is not None:
            received.check(self.needs)
        if self._used and self._recording.together:
            others = f"has {len(unknown)} tensors that it did not have before, as {min(unknown)!r}"
            self._refuse(f"the checkpoint {others}" if unknown else "the model's memory moved")

    def _refuse(self, what: str) -> None:
        self._learned.forget()
        why = "; its loader looks at tensors together" if self._recording.together else ""
        raise RuntimeError(f"{what}{why}: update again, it will be learned anew")

    def _check_addresses(self) -> None:
        """Every tensor was where it should be when it was written, and has to be there still."""
        if self._model.addresses() != self._addresses:
            self._learned.forget()
            raise RuntimeError("the model's memory moved while it was updated: update again")

    def _execute(self, key: Hashable, program: Program, buffer: torch.Tensor, held: Held) -> None:
        self._used[key] = program
        self._held = held  # it stays until the device is done, whatever the engine does
        self.tensors += program.tensors
        self.nbytes += program.nbytes
        self.replayed += program.tensors - len(program.unknown)
        self._held_tensors.begin_writing(program.names)
        try:
            with torch.no_grad():
                self._run(program, buffer)
        except Exception as error:
            self._learned.refuse(f"replaying failed: {type(error).__name__}: {error}")
            raise
        self._held_tensors.note_loaded(program.names)

    def _run(self, program: Program, buffer: torch.Tensor) -> None:
        memory = self._model.memory
        if self._model.is_persistent:
            program.batch.execute(buffer, memory, stays=True)
            for part in program.parts if self._recording.fills else ():
                self._fill(part.module)
            return
        for part in program.parts:
            self._model.open(part.module)
            self._fill(part.module)
            part.batch.execute(buffer, memory, stays=False)
            if not self._model.delivered(part.module, part.numel):
                self.held_bytes += part.nbytes

    def _fill(self, module: str) -> None:
        """Write a module's constants once, where no copy of the recording goes."""
        fills = () if module in self._filled else self._recording.fills.get(module, ())
        self._filled.add(module)
        for fill in fills:
            storage = whole_storage(self._model.memory(fill.slot), fill.view.dtype)
            fill.view.in_storage(storage).fill_(fill.value)
