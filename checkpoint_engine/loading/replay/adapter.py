"""What replay asks of a model, or of the engine that it belongs to; one update of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.parameter import is_lazy

from checkpoint_engine.loading.replay.geometry import View
from checkpoint_engine.loading.replay.memory import Slot, addresses_of
from checkpoint_engine.loading.replay.recorder import Recorder
from checkpoint_engine.loading.replay.recording import NamedTensors, ReceivedBucket

if TYPE_CHECKING:
    from checkpoint_engine.loading.replay.learned_loader import LearnedLoader

nothing: AbstractContextManager[Any] = nullcontext()


class ModelAdapter(Protocol):
    """A model as replay sees it. The defaults suit an engine whose loader is all there is."""

    is_persistent: bool
    """Whether the memory of slots stays the same from update to update."""
    modules: Mapping[str, torch.nn.Module]
    """The model's, by name."""
    keeps_others: bool = False
    """Whether modules that get nothing in an update keep the weights that they have."""

    def load_weights(
        self, weights: NamedTensors, around: AbstractContextManager[Any] = nothing
    ) -> Any:
        """The engine's own loader; ``around`` that alone."""
        ...

    def cannot(self) -> str:
        """Why this engine cannot be watched; empty where it can."""
        return ""

    def tensors(self) -> Iterator[tuple[Slot, torch.Tensor]]:
        """What the loader may write into, as it is now."""
        ...

    def moved(self) -> Iterator[tuple[Slot, torch.Tensor]]:
        """Those of ``tensors`` that may have got other memory since this was asked last."""
        return self.tensors()

    def names(self) -> list[Any]:
        """Of ``tensors``, in their order: equal as long as there are just these."""
        return [slot for slot, _ in self.tensors()]

    def addresses(self) -> list[int]:
        """Where each of ``tensors`` begins, in their order."""
        return addresses_of(tensor for _, tensor in self.tensors())

    def refuses(self, slot: Slot) -> str | None:
        """Why a slot that was written needs the engine's own loader."""
        return None

    def watching(self, recorder: Recorder) -> AbstractContextManager[Any]:
        """Around the loader while it is recorded."""
        return nullcontext()

    def checking(self, check: Callable[[str], None]) -> AbstractContextManager[Any]:
        """Around the loader while a recording is compared with it: call ``check`` with a module's
        name before what was loaded into it is changed."""
        return nullcontext()

    def open(self, module: str) -> None:
        """A module's tensors are about to be written, for the first time or again."""
        return

    def memory(self, slot: Slot) -> torch.Tensor:
        """What to write into."""
        ...

    def delivered(self, module: str, numel: int) -> bool:
        """So many elements were loaded. Returns whether nothing of the module is held a second
        time: it is complete and processed, or loaded where the engine computes with it."""
        return False

    def keep(self, modules: Iterable[str]) -> None:
        """These modules get nothing in this update, and are not to wait for anything."""
        return

    def is_done(self, module: str) -> bool:
        """Whether the engine computes with all that was loaded into a module, also if the update
        fails now."""
        return self.is_persistent


class InPlace(ModelAdapter):
    """A model whose parameters stay where they are and as they are."""

    is_persistent = True
    keeps_others = True

    def __init__(self, model: torch.nn.Module, load_weights: Callable[[NamedTensors], Any]) -> None:
        self.modules: Mapping[str, torch.nn.Module] = dict(model.named_modules())
        self._load_weights = load_weights

    def load_weights(
        self, weights: NamedTensors, around: AbstractContextManager[Any] = nothing
    ) -> Any:
        with around:
            return self._load_weights(weights)

    def tensors(self) -> Iterator[tuple[Slot, torch.Tensor]]:
        for name, module in self.modules.items():
            for named in _owned_by(module):
                for own, tensor in named.items():
                    if tensor is not None:
                        yield Slot(name, own), tensor

    def names(self) -> list[Any]:
        named = [(name, of) for name, one in self.modules.items() for of in _owned_by(one)]
        return [(name, [own for own, one in of.items() if one is not None]) for name, of in named]

    def addresses(self) -> list[int]:
        owned = (of for one in self.modules.values() for of in _owned_by(one))
        return addresses_of(one for of in owned for one in of.values() if one is not None)

    def memory(self, slot: Slot) -> torch.Tensor:
        name, own = slot
        module = self.modules[name]
        tensor: torch.Tensor | None = module._parameters.get(own)
        tensor = module._buffers.get(own) if tensor is None else tensor
        if tensor is None:
            raise RuntimeError(f"{slot.qualified} is gone")
        return tensor


def _owned_by(module: torch.nn.Module) -> tuple[dict[str, torch.Tensor | None], ...]:
    return module._parameters, module._buffers  # type: ignore[return-value]


def cannot_compare(modules: Mapping[str, torch.nn.Module]) -> str:
    """Why some tensor of a model cannot be compared byte by byte; empty if all can."""
    for slot, tensor in every_tensor(modules):
        if not _is_of_bytes(tensor):
            return f"{slot.qualified} is no tensor that can be compared byte by byte"
    return ""


def _is_of_bytes(tensor: torch.Tensor) -> bool:
    if is_lazy(tensor) or tensor.is_nested or tensor.layout is not torch.strided:
        return False
    if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return False
    has_nothing = tensor.is_meta or not tensor.numel()
    return has_nothing or tensor.untyped_storage().nbytes() >= View.of(tensor).span[1]


def every_tensor(modules: Mapping[str, torch.nn.Module]) -> Iterator[tuple[Slot, torch.Tensor]]:
    """Parameters, buffers, and tensors that are plain attributes."""
    for name, module in modules.items():
        for named in (module._parameters, module._buffers, vars(module)):
            for own, tensor in named.items():
                if isinstance(tensor, torch.Tensor):
                    yield Slot(name, own), tensor


class ModelUpdate:
    """One update of one model; this one leaves it to the engine's loader.

    Attributes:
        how: ``plain``, ``recorded``, ``verified`` (recorded again, and found the same) or
            ``replayed``.
        reason: why it is plain, or will be.
        tensors, nbytes: what arrived.
        replayed: tensors that did not go through the loader.
        held_bytes: of those, what went to modules that the bucket left incomplete.
        loaded_plainly: the parameters that the loader says it loaded; ``None`` if it does not say.
        may_leave_out: whether it goes without tensors that the model holds.
    """

    how = "plain"
    may_leave_out = False

    def __init__(self, learned: LearnedLoader, model: ModelAdapter, reason: str = "") -> None:
        self.reason = reason
        self.tensors = self.nbytes = self.replayed = self.held_bytes = 0
        self.loaded_plainly: set[str] | None = set()
        self._learned = learned
        self._model = model

    @property
    def needs(self) -> str:
        """The digest of what it reads at most; empty: everything."""
        return ""

    def load(self, weights: NamedTensors, received: ReceivedBucket | None = None) -> None:
        """Load a bucket; ``received`` says where its tensors lie, if they came in one buffer."""
        self.tensors += len(weights)
        self.nbytes += sum(tensor.nbytes for _, tensor in weights)
        self._learned.held.begin_writing(None)
        self._load_plainly(weights)

    def knows(self, message: bytes) -> bool:
        """Whether a bucket's message need not be decoded: ``replay`` it."""
        return False

    def replay(self, received: ReceivedBucket) -> None:
        """Load a bucket whose message is known."""
        raise RuntimeError("only known messages can be replayed")

    def offer(self, tensors: str, hashes: bytes) -> bytes:
        """What the model holds of the checkpoint that comes; see ``HeldTensors.offer``."""
        known = self._learned.recording if self._learned.agreed > 1 else None
        return self._learned.held.offer(known, tensors, hashes, self.may_leave_out)

    def narrow(self, bits: bytes) -> bytes:
        """See ``HeldTensors.narrow``."""
        return self._learned.held.narrow(bits)

    def leave_out(self, bits: bytes) -> None:
        """See ``HeldTensors.leave_out``."""
        self._model.keep(self._learned.held.leave_out(bits))

    def settle(self) -> list[str]:
        """The bucket's memory is about to be overwritten. Returns the names of tensors that the
        loader was seen to keep."""
        return []

    def loaded(self) -> set[str] | None:
        """The parameters that were loaded: that something was seen to be written into, and those
        that the loader names, for it may fill some by itself; ``None`` if neither is known."""
        return self.loaded_plainly

    def written(self) -> set[str] | None:
        """Those that something was seen to be written into; ``None`` if nobody looked."""
        return None

    def unused(self) -> set[str]:
        """The tensors that the loader did nothing with, as far as is known."""
        return set()

    def absent(self) -> set[str]:
        """The tensors that are known to be needed, and did not come."""
        return set()

    def finish(self) -> None:
        """Every bucket has been loaded."""

    def commit(self) -> None:
        """The update succeeded: keep what was learned.

        Raises:
            RuntimeError: it has left out what the model does not hold any more.
        """

    def abandon(self, undo: Callable[[], None] = lambda: None) -> None:
        """The update failed; ``undo``: has the engine compute with what is there."""
        undo()

    def _load_weights(self, weights: NamedTensors) -> Any:
        return self._model.load_weights(weights)

    def _load_plainly(self, weights: NamedTensors) -> None:
        if self._learned.keeps_tensors:
            weights = [(name, tensor.clone()) for name, tensor in weights]
        loaded = self._load_weights(weights)
        if not isinstance(loaded, (set, frozenset)):  # not every engine's loader says
            self.loaded_plainly = None
        elif self.loaded_plainly is not None:
            self.loaded_plainly |= loaded
