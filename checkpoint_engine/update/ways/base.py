"""The interface of a way, and of the mover that executes its plan on a rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch

from checkpoint_engine.ground.local_rank import LocalRank
from checkpoint_engine.handover.ipc import SharedBuffer
from checkpoint_engine.memory.checkpoints import Checkpoint
from checkpoint_engine.planning import plan
from checkpoint_engine.planning.left_out import without
from checkpoint_engine.planning.plan import Pace, Step, TransferPlan
from checkpoint_engine.transfer.tracer import RankTracer
from checkpoint_engine.world.call import Call
from checkpoint_engine.world.gathered import Gathered, topology
from checkpoint_engine.world.hello import Hello


def bucket_size(
    hellos: Sequence[Hello], gathered: Gathered, may_cut: bool, shares: int = 3
) -> plan.BucketSize:
    """How the memory that every rank can spare is shared out."""
    least = min(hellos, key=lambda hello: hello.free_bytes)
    return plan.bucket_size(
        least.free_bytes,
        gathered.extent[1],
        min(hello.bucket_cap for hello in hellos),
        may_cut,
        shares,
        min(hello.free_beside for hello in hellos),
        least.memory,
    )


class Way(ABC):
    """One way for bytes to travel. One object per ``ParameterServer``; it owns what is kept between
    updates.

    Attributes:
        name: in reports.
        deals_out_reads: whether the plan says which of the members reads a bucket for all of them.
    """

    name: str
    deals_out_reads = False

    def __init__(self, here: LocalRank) -> None:
        self.here = here
        self._planned: tuple[object, TransferPlan] | None = None  # the basis of a plan, and it

    # ------------------------------------------------------------------ whether it can be taken

    def introduce(self, mine: Hello, held: ExitStack) -> Hello:
        """Add to this rank's hello what the way needs to know of the others.

        Args:
            held: closes what this opens, when the update ends.
        """
        return mine

    @abstractmethod
    def refusal(self, gathered: Gathered, hellos: Sequence[Hello]) -> str | None:
        """``None`` if the ranks can go this way, else why not; empty where nobody would ask. The
        same on all of them."""

    def prepare(self, call: Call, hellos: Sequence[Hello], needs: str) -> None:
        """Called by all ranks before ``plan``: exchange what the plan needs beside the hellos.

        Args:
            needs: what this rank's worker reads, as its hello says by digest.
        """
        return

    # ------------------------------------------------------------------ what is moved, and when

    @abstractmethod
    def pace(self, hellos: Sequence[Hello]) -> Pace:
        """The best size of a bucket."""

    @property
    def joins_parts(self) -> bool:
        """Whether a tensor may travel in parts, where all workers put them together."""
        return True

    @property
    def first_receiver(self) -> int | None:
        """Whose bucket comes first in each round; ``None``: the same on all ranks."""
        return None

    def plan(self, gathered: Gathered, hellos: Sequence[Hello]) -> TransferPlan:
        """What the update moves.

        Equal inputs give an equal plan, so all ranks have the same buckets. The plan of the last
        update is taken if nothing that it depends on has changed.

        Raises:
            ValueError: there is nothing to move, or the largest tensor does not fit.
        """
        may_cut = self._may_cut(gathered, hellos)
        size = bucket_size(hellos, gathered, may_cut, self.shares(hellos))
        size = plan.paced(size, self.pace(hellos), gathered.extent, may_cut)
        nics = topology((hello.rank, hello.nic, hello.host) for hello in hellos)
        members = hellos[0].ranks if self.deals_out_reads else None
        basis = (gathered.plan_basis, size, nics, members, may_cut)
        if self._planned is None or self._planned[0] != basis:
            transfer = plan.plan_transfer(
                gathered.metas,
                size,
                nics,
                gathered.owner_nics,
                members,
                may_cut=may_cut,
                duplicates=gathered.duplicates,
                first=self.first_receiver,
            )
            if not transfer.steps:
                raise ValueError(
                    f"checkpoint {hellos[0].checkpoint!r} holds no tensors on any rank: there is "
                    "nothing to update"
                )
            self._planned = basis, transfer
        return self._planned[1]

    def shares(self, hellos: Sequence[Hello]) -> int:
        """How many buckets the buffers of a rank take, at most."""
        return 3

    def buffer_slots(self, transfer: TransferPlan, hellos: Sequence[Hello]) -> int:
        """How many buckets the buffer takes that this rank's worker maps."""
        return transfer.slots_for(len(transfer.steps))

    def _may_cut(self, gathered: Gathered, hellos: Sequence[Hello]) -> bool:
        """A worker that has not said is asked in the handshake, where nothing else would do."""
        known = {hello.joins_parts for hello in hellos}
        if not self.joins_parts or False in known:
            return False
        return None not in known or not self._has_room(gathered, hellos)

    def _has_room(self, gathered: Gathered, hellos: Sequence[Hello]) -> bool:
        """Whether all tensors can travel whole."""
        try:
            bucket_size(hellos, gathered, may_cut=False, shares=self.shares(hellos))
        except ValueError:
            return False
        return True

    # ------------------------------------------------------------------ moving it

    @abstractmethod
    def connect(self, move: Move, hellos: Sequence[Hello], held: ExitStack) -> Mover | str:
        """Called by all ranks: connect them. If they cannot, after all: why, on all of them.

        Args:
            held: closes what this opens, last first; on failure with the exception.
        """

    def release(self) -> None:  # noqa: B027  # most ways keep nothing
        """Give back what is kept between updates."""


class Move(NamedTuple):
    """What a way moves in one update, and into what.

    Attributes:
        source: this rank's part of the checkpoint.
        buffer: what this rank's worker maps. It begins with the double buffer, if there is one.
        way, reason: the name of the way that is taken, and why those before it are not.
        left_out: the tensors that the plan lacks, as all workers hold them already.
        skipped_bytes: of those.
    """

    call: Call
    plan: TransferPlan
    source: Checkpoint
    gathered: Gathered
    buffer: SharedBuffer
    tracer: RankTracer
    way: str = ""
    reason: str = ""
    left_out: frozenset[str] = frozenset()
    skipped_bytes: int = 0

    def without(self, names: frozenset[str]) -> Move:
        """The same, but for these tensors."""
        left = without(self.plan, names)
        nbytes = self.plan.total_bytes - left.total_bytes
        return self._replace(plan=left, left_out=names, skipped_bytes=nbytes)

    def slot(self, step: Step) -> torch.Tensor:
        """Where the step's bucket goes: its half of the double buffer."""
        start = step.slot * self.plan.bucket_bytes
        return self.buffer.tensor[start : start + step.bucket.size]


def gone_owners(move: Move) -> frozenset[int]:
    """The owners of this world that are gone. Of another world nobody tells."""
    return frozenset() if move.gathered.is_loaded else move.call.membership.world.liveness.gone


class Mover(ABC):
    """Brings the buckets of one update into this rank's double buffer, in the order of the plan.

    Attributes:
        never_waits: whether ``start`` only queues work.
        sources: handles of what this rank's worker is to map beside its own rank's buffer;
            ``None``: buckets do not arrive where they are staged.
        must_map: whether it has to, as there is no double buffer.
        served: why this rank's worker does not read where buckets arrive; empty if it does.
    """

    never_waits = True
    sources: Sequence[bytes] | None = None
    must_map = False
    served = ""

    def __init__(self, move: Move) -> None:
        self.move = move

    @abstractmethod
    def begin(self, plan: TransferPlan) -> None:
        """Bring the first buckets, where that takes no waiting. Called once, when the ranks know
        what they move: by ``Way.connect``, or later if its plan ``may_shrink``.

        Args:
            plan: the move's, or what is left of it.
        """

    def handed_over(self, unmapped: str, reads_needs: bool = False) -> None:
        """This rank's worker has mapped the buffer, and its ``sources`` unless it says why not.

        ``reads_needs``: it is going to read no more than its hello's needs.
        """
        self.move.buffer.unlink()

    @abstractmethod
    def start(self, step: Step) -> None:
        """Begin to bring the step's bucket into its half of the double buffer, which is free."""

    @abstractmethod
    def has_arrived(self, step: Step) -> bool:
        """Whether the bucket is there, on this rank and on those that this rank sends it to.

        Raises:
            RuntimeError: it will not come.
        """

    def advance(self) -> None:
        """Do whatever can be done by now, without waiting. Called while the worker loads."""
        return

    def lies_at(self, step: Step) -> tuple[int, int]:
        """Where the worker finds a bucket that has arrived: 0 for its own rank's buffer, else the
        place among ``sources``, from 1; and the first byte there."""
        return 0, step.slot * self.move.plan.bucket_bytes

    def has_checked(self, step: Step) -> bool:
        """Whether the bytes of a bucket that has arrived were compared with its owner's sums."""
        return False

    def needs_for(self, step: Step) -> str:
        """The digest of the needs that the bytes of a bucket suffice for, where they are not all
        there; empty if they are."""
        return ""

    def done_with(self, step: Step) -> None:  # noqa: B027  # most buckets are nobody else's
        """The worker has loaded the bucket."""

    def let_go(self) -> None:  # noqa: B027
        """The worker has dropped all buffers; return when nobody maps this rank's any more."""

    def source_of(self, step: Step) -> str:
        """Where the bucket comes from, for errors."""
        return f"rank {step.owner}"
