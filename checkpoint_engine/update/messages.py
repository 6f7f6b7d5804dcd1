"""What workers are told of the buckets of a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from checkpoint_engine.data_types import TensorPart
from checkpoint_engine.loading.loaded import digest
from checkpoint_engine.planning.plan import TransferPlan, to_named_tensor

BucketEncoder = Callable[[list[dict[str, Any]]], bytes]


class Messages:
    """What workers are told of a plan's buckets, each encoded once, however often it is sent."""

    def __init__(self, plan: TransferPlan) -> None:
        self.plan = plan
        self._encoded: dict[tuple[BucketEncoder, int], tuple[bytes, str]] = {}

    def of(self, index: int, encode: BucketEncoder) -> bytes:
        """The message of the plan's step ``index``."""
        return self._message(index, encode)[0]

    def planned(self, encode: BucketEncoder) -> list[str | None]:
        """The digest of each step's message, ``None`` for a part that does not end its tensor."""
        return [
            None
            if isinstance(step.bucket, TensorPart) and not step.bucket.is_last
            else self._message(index, encode)[1]
            for index, step in enumerate(self.plan.steps)
        ]

    def _message(self, index: int, encode: BucketEncoder) -> tuple[bytes, str]:
        if (encode, index) not in self._encoded:
            step = self.plan.steps[index]
            start = step.slot * self.plan.bucket_bytes
            if isinstance(step.bucket, TensorPart):
                start = 0  # of the tensor that the worker puts together
            message = encode(to_named_tensor(step.bucket.items, start))
            self._encoded[encode, index] = message, digest(message)
        return self._encoded[encode, index]
