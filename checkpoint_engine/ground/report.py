"""What an update did."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping

from pydantic import BaseModel, Field

PHASES = (
    *("start", "plan", "buffers", "process group", "handshake", "transfer", "reload", "release"),
    *("post hook", "comparison", "completion"),
)
"""Of an update, in their order; some updates go without some. Each has a colour of its own in
``service/page.html``."""


class InstanceFailure(BaseModel, frozen=True):
    """An engine instance that an update went on without.

    ``rank`` of its ``ranks`` failed first, in ``phase``, with ``error``.
    """

    instance: str
    ranks: list[int]
    rank: int
    phase: str
    error: str


class LoadedCheckpoint(BaseModel, frozen=True):
    """What a rank's engine holds."""

    checkpoint: str
    version: str
    engine: str = Field(description="The instance, as req_func names it; else the rank.")
    since: float = Field(description="Unix time.")


class Stage(BaseModel, frozen=True):
    """What a stage moved, and for how long there was a bucket in it."""

    bytes: int
    seconds: float

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes / 1e9 / self.seconds if self.seconds else 0.0


_MOVING = ("transfer", "reload")
"""Phases that wait for all bytes: their rate is a lower bound, since they overlap."""


class UpdateReport(BaseModel, frozen=True):
    """One update as one rank saw it; ``ParameterServer.update`` returns it.

    ``version`` is the id that the updated workers now hold; ``None`` on a rank that had no part in
    it. ``failed_instances`` were not updated: empty, unless the update was to go on without them.

    ``way`` is how the bytes travelled: ``peers`` (workers read the staging buffers of all ranks of
    their host), ``shard`` (each host reads what its workers need from the others by P2P; inside it
    peers), ``broadcast`` (a group of NCCL, gloo or another backend; with one rank, none) or
    ``P2P``. ``way_reason`` says why not by peers, or why this rank's worker does not read those
    buffers and gets whole buckets from its server rank.

    ``phases`` holds the seconds this rank spent in each, in order. Transfer and reload overlap:
    each is the time that this rank waited for it. ``waited_for`` parts the transfer by the rank
    that sent what was waited for; under its own number this rank waited for its own copies or P2P
    reads, and for the broadcast of them. ``gather_seconds`` is what the gather before took.

    ``stages`` are "host to device", "P2P read", "broadcast" and "reload", those that there were on
    this rank, by the clock of its device if it has one. They overlap, also with what was waited
    for. Where a broadcast waits for its sender to have the bytes, that counts as broadcast; by
    peers it is that wait alone, for workers read the bytes while they load.

    ``by_rank`` and ``waited_for_by_rank``, if ranks were to be compared, hold the same of every
    rank that took part, up to when its engine was done; a rank waits for the slower ones under
    "comparison".

    ``engines`` says of this rank's engine, and if ranks were to be compared of every rank's, what
    its worker states that the update wrote, by model: ``tensors`` that arrived, those of them that
    were ``left_over``, and how many parameters are ``missing`` (nothing was written into them) or
    ``partial``. ``missing`` is left out if neither loader nor engine tells; all is, if nothing is
    known: of the original's workers, and with a ``run`` that is a plain function.

    ``skipped_tensors``, of ``skipped_bytes``, were not sent, because every worker held them already
    (``PS_SKIP_EQUAL``); ``tensors``, ``buckets`` and ``bytes`` are of what was sent.

    ``checkpoint_memory`` and ``retained_memory`` are bytes of host memory that this rank's server
    holds at the end: for checkpoints, and kept for later ones. ``trace`` is the trace's file, on
    the rank that wrote it.
    """

    checkpoint_name: str
    rank: int
    world_size: int
    tensors: int = 0
    buckets: int = 0
    bucket_bytes: int = 0
    bytes: int = 0
    skipped_tensors: int = 0
    skipped_bytes: int = 0
    seconds: float = 0.0
    phases: dict[str, float] = {}
    version: str | None = None
    way: str = ""
    way_reason: str = ""
    failed_instances: list[InstanceFailure] = []
    gather_seconds: float = 0.0
    waited_for: dict[int, float] = {}
    stages: dict[str, Stage] = {}
    by_rank: dict[int, dict[str, float]] = {}
    waited_for_by_rank: dict[int, dict[int, float]] = {}
    engines: dict[int, dict[str, dict[str, int]]] = {}
    checkpoint_memory: int = 0
    retained_memory: int = 0
    trace: str | None = None

    @property
    def gigabytes_per_second(self) -> float:
        """Checkpoint bytes over the time from the call to the last worker's last answer."""
        return self.bytes / 1e9 / self.seconds

    @staticmethod
    def of_nothing(checkpoint_name: str, rank: int, world_size: int) -> UpdateReport:
        """Of an update that this rank had no part in."""
        return UpdateReport(checkpoint_name=checkpoint_name, rank=rank, world_size=world_size)

    def completed(self, phases: dict[str, float], in_use: int, retained: int) -> UpdateReport:
        """The report of a call that is over.

        Args:
            phases: all that it spent time with.
            in_use, retained: bytes of host memory.
        """
        over = {
            "phases": dict(phases),
            "seconds": sum(phases.values()),
            "checkpoint_memory": in_use,
            "retained_memory": retained,
        }
        return self.model_copy(update=over)

    @property
    def slowest(self) -> tuple[int, str, float] | None:
        """The rank that spent the most time beyond the median of the ranks in one phase, that
        phase, and by how many seconds; ``None`` for a single rank."""
        if len(self.by_rank) < 2:
            return None
        excess = []
        for phase in {phase for spent in self.by_rank.values() for phase in spent}:
            seconds = {rank: spent.get(phase, 0.0) for rank, spent in self.by_rank.items()}
            usual = statistics.median(seconds.values())
            excess += [(spent - usual, rank, phase) for rank, spent in seconds.items()]
        most, rank, phase = max(excess)
        return rank, phase, most

    @property
    def most_waited_for(self) -> tuple[int, float] | None:
        """The rank whose buckets the others waited for longest, and how long one of them did on
        average; ``None`` unless ranks were compared, or for a single rank."""
        waits: Counter[int] = Counter()
        for rank, waited_for in self.waited_for_by_rank.items():
            waits.update({sender: s for sender, s in waited_for.items() if sender != rank})
        if not waits:
            return None
        ((most, seconds),) = waits.most_common(1)
        return most, seconds / (len(self.waited_for_by_rank) - 1)

    def table(self) -> str:
        """What it took by phase and stage, for people: seconds, share, rate; whom it waited for;
        memory."""
        lines = [str(self).partition(" (")[0]]
        for phase, seconds in self.phases.items():
            rate = f"{self.bytes / 1e9 / seconds:9.2f} GB/s" if phase in _MOVING and seconds else ""
            share = seconds / self.seconds if self.seconds else 0.0
            lines.append(f"{phase:16} {seconds:9.4f} s {share:6.1%} {rate}".rstrip())
        if self.stages:
            lines.append("stages, which overlap:")
        for name, stage in self.stages.items():
            rate = f"{stage.gigabytes_per_second:9.2f} GB/s"
            lines.append(f"{name:16} {stage.seconds:9.4f} s {'':6} {rate}")
        if self.slowest is not None:
            rank, phase, excess = self.slowest
            lines.append(f"slowest: rank {rank} in {phase}, {excess:.4f} s beyond the median")
        if self.most_waited_for is not None:
            rank, mean = self.most_waited_for
            lines.append(f"most waited for: rank {rank}, {mean:.4f} s by each other rank")
        lines.append(
            f"host memory: {self.checkpoint_memory / 1e9:.3f} GB of checkpoints, "
            f"{self.retained_memory / 1e9:.3f} GB kept for later ones"
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in self.phases.items())
        told = [f"; {_statement(rank, models)}" for rank, models in self.engines.items()]
        if self.skipped_tensors:
            nbytes = f"{self.skipped_bytes / 1e9:.3f} GB"
            told.insert(0, f"; not sent, as held: {nbytes} in {self.skipped_tensors} tensors")
        failed = [f"; FAILED on ranks {one.ranks}: {one.error}" for one in self.failed_instances]
        return (
            f"{self.checkpoint_name}: {self.bytes / 1e9:.3f} GB in {self.tensors} tensors and "
            f"{self.buckets} buckets, {self.seconds:.3f} s, {self.gigabytes_per_second:.2f} GB/s "
            f"({phases}){''.join(told)}{''.join(failed)}"
        )


def _statement(rank: int, models: Mapping[str, Mapping[str, int]]) -> str:
    """What a worker states, for people."""
    said = [
        f"{role} {', '.join(f'{count} {what}' for what, count in taken.items() if count)}"
        for role, taken in models.items()
    ]
    return f"rank {rank}'s engine: {'; '.join(said) or 'unknown what it wrote'}"
