"""What an update did."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class InstanceFailure(BaseModel):
    """An engine instance that an update went on without.

    ``rank`` of its ``ranks`` failed first, in ``phase``, with ``error``.
    """

    model_config = ConfigDict(frozen=True)

    instance: str
    ranks: list[int]
    rank: int
    phase: str
    error: str


class UpdateReport(BaseModel):
    """One update as one rank saw it; ``ParameterServer.update`` returns it.

    ``version`` is the id that the updated workers now hold; ``None`` on a rank that had no part in
    it. ``failed_instances`` were not updated: empty, unless the update was to go on without them.

    ``phases`` holds the seconds this rank spent in each, in order. Transfer and reload overlap:
    each
    is the time that this rank waited for it.
    """

    model_config = ConfigDict(frozen=True)

    checkpoint_name: str
    rank: int
    world_size: int
    tensors: int
    buckets: int
    bucket_bytes: int
    bytes: int
    seconds: float
    phases: dict[str, float]
    version: str | None = None
    failed_instances: list[InstanceFailure] = []

    @property
    def gigabytes_per_second(self) -> float:
        """Checkpoint bytes over the time from the call to the last worker's last answer."""
        return self.bytes / 1e9 / self.seconds

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in self.phases.items())
        failed = [f"; FAILED on ranks {one.ranks}: {one.error}" for one in self.failed_instances]
        return (
            f"{self.checkpoint_name}: {self.bytes / 1e9:.3f} GB in {self.tensors} tensors and "
            f"{self.buckets} buckets, {self.seconds:.3f} s, {self.gigabytes_per_second:.2f} GB/s "
            f"({phases}){''.join(failed)}"
        )
