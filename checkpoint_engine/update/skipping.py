"""What an update need not send: tensors that every worker states that it holds already.

Every owner hashes what it has, every worker says which of it it holds, and the ranks agree on the
tensors that all of them hold, in whole groups of what each worker processes together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from loguru import logger

from checkpoint_engine.data_types import ParameterMeta, TensorPart
from checkpoint_engine.ground.needs import HASH_BYTES, UNKNOWN_HASH, tensors_digest
from checkpoint_engine.memory.checkpoints import Checkpoint
from checkpoint_engine.planning.plan import TransferPlan
from checkpoint_engine.update.session import WorkerSession
from checkpoint_engine.world.call import Call
from checkpoint_engine.world.gathered import Gathered
from checkpoint_engine.world.hello import Hello

_MOST_ROUNDS = 8
"""In which workers that process other tensors together agree, or nothing is left out."""


def may_skip(call: Call, hellos: Sequence[Hello], gathered: Gathered) -> bool:
    """Whether the ranks look for tensors that need not be sent. The same on all of them.

    Owners of another world are only read: nobody there hashes anything.
    """
    without = [hello.rank for hello in hellos if not hello.skips_equal]
    if call.leads and 0 < len(without) < len(hellos):
        log = logger.bind(rank=call.rank)
        log.warning("everything is sent: PS_SKIP_EQUAL=1 is not set on ranks {}", without)
    return not without and not gathered.is_loaded


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds, by content.

    Attributes:
        names: of all tensors, in order.
        tensors: ``tensors_digest`` of them.
        hashes: of each tensor's content, one behind the other; zeros: it is not known.
    """

    names: Sequence[str]
    tensors: str
    hashes: bytes

    @staticmethod
    def gather(call: Call, plan: TransferPlan, source: Checkpoint, gathered: Gathered) -> Contents:
        """Hash what this rank owns, and learn what the others have found. Called by all members."""
        told = call.all_gather("contents", source.content_hashes(call.check))
        hash_of = _hashes_by_name(dict(zip(call.members, told, strict=True)), gathered)
        metas = sorted(_tensors_of(plan), key=lambda meta: meta.name)
        return Contents(
            [meta.name for meta in metas],
            tensors_digest([(meta.name, meta.dtype, tuple(meta.shape)) for meta in metas]),
            b"".join(hash_of.get(meta.name, UNKNOWN_HASH) for meta in metas),
        )

    def agree(self, call: Call, session: WorkerSession) -> frozenset[str]:
        """The names of the tensors that are left out. Called by all members.

        A worker leaves out only whole groups, and what another one lacks may be a part of one. So
        each says how much may be left out of what all hold, until that is the same for all.
        """
        nothing = bytes(-(-len(self.names) // 8))
        session.ask_held(self.tensors, self.hashes)
        common = nothing
        for number in range(_MOST_ROUNDS):
            mine = b"" if session.held is None else session.held
            told = {bits for bits in call.all_gather(f"held {number}", mine) if bits}
            common = _common(told, nothing)
            if len(told) < 2 or common == nothing:
                break
            session.leave_out(common, is_settled=False)
        else:
            common = nothing
        session.leave_out(common, is_settled=True)
        bits = np.unpackbits(np.frombuffer(common, np.uint8), count=len(self.names))
        return frozenset(self.names[place] for place in np.flatnonzero(bits).tolist())


def _common(told: set[bytes], nothing: bytes) -> bytes:
    """The bits that are set in all."""
    if not told:
        return nothing
    every = [np.frombuffer(bits, np.uint8) for bits in told]
    if {len(bits) for bits in every} != {len(nothing)}:
        raise RuntimeError("the ranks tell of another number of tensors each")
    return np.bitwise_and.reduce(every).tobytes()


def _tensors_of(plan: TransferPlan) -> Iterator[ParameterMeta]:
    for step in plan.steps:
        if not isinstance(step.bucket, TensorPart) or step.bucket.is_last:
            yield from step.bucket.items


def _hashes_by_name(told: dict[int, bytes], gathered: Gathered) -> dict[str, bytes]:
    """By the ranks that are members; of what several own, only if all of them say the same."""
    found: dict[str, bytes] = {}
    for rank, owned in gathered.metas.items():
        names = [meta.name for one in owned.memory_buffer_metas_list for meta in one.metas]
        hashes = told.get(rank, b"")
        if len(hashes) != HASH_BYTES * len(names):
            hashes = UNKNOWN_HASH * len(names)
        for place, name in enumerate(names):
            own = hashes[HASH_BYTES * place : HASH_BYTES * (place + 1)]
            found[name] = own if found.get(name, own) == own else UNKNOWN_HASH
    return found
