"""Streams a plan to one rank's worker: each bucket behind the other.

While the worker loads one bucket, the next is on its way into the other half of a buffer, and a
worker of ours is told of it as soon as it is there. The first buckets set out before the worker has
answered at all.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

from checkpoint_engine.data_types import TensorPart
from checkpoint_engine.ground.checksum import check_bytes
from checkpoint_engine.handover.wire import CHECKSUM, NEEDS, PART, SOURCE, encode_extensions
from checkpoint_engine.loading.loaded import digest
from checkpoint_engine.planning.plan import Step, to_named_tensor
from checkpoint_engine.transfer.tracer import RELOAD, TracedSpan
from checkpoint_engine.update.session import WorkerSession
from checkpoint_engine.update.ways.base import Move, Mover

_HALVES = 2  # of the double buffer


class Pipeline:
    """One rank's execution of a plan. Made for one update."""

    _span: TracedSpan  # of the bucket that the worker loads

    def __init__(self, move: Move, mover: Mover, session: WorkerSession) -> None:
        self._move = move
        self._mover = mover
        self._session = session
        self._waiting = deque(move.plan.steps)
        self._loading: deque[Step] = deque()  # what the worker has, and loads in this order

    def begin(self) -> None:
        """Send the first buckets on their way, where that takes no waiting."""
        if self._mover.never_waits:
            for _ in range(_HALVES):
                self._start_next()

    def run(self) -> None:
        """Move every bucket. Returns when the worker has loaded the last one.

        A half of the double buffer is free once its bucket is loaded. Where starting a bucket only
        queues work, that is the moment to start the next in it; where it takes waiting, the worker
        is first given what has arrived, to load it meanwhile.
        """
        clock, steps = self._move.call.clock, self._move.plan.steps
        if self._move.skipped_bytes:
            clock.advance(self._move.skipped_bytes)
        if not steps:
            self._session.announce_end([])
        if len(self._waiting) == len(steps):
            self._start_next()
        for index, step in enumerate(steps):
            clock.begin("transfer")
            with self._naming_source(step):
                self._move.call.wait(partial(self._has_arrived, step))
            clock.arrived(step.receiver)
            clock.begin("reload")
            self._send(index, step)
            while len(self._loading) > self._ahead:
                self._await_oldest()
        while self._loading:
            self._await_oldest()

    @property
    def _ahead(self) -> int:
        """How many buckets a worker may have while it is sent another. One of ours finds the next
        when it has loaded one, and waits for nobody; it answers each of them."""
        return int(self._mover.never_waits and self._session.worker_is_ours)

    def _has_arrived(self, step: Step) -> bool:
        """Also takes note of what the worker has loaded meanwhile: others wait for that memory."""
        if self._loading and self._session.has_answered():
            self._await_oldest()
        return self._mover.has_arrived(step)

    def _send(self, index: int, step: Step) -> None:
        """Have the worker load the bucket, and use the time."""
        count = len(self._move.plan.steps)
        self._session.begin_reload(self._message(index)[0] + self._extensions(step))
        self._loading.append(step)
        if len(self._loading) == 1:
            self._trace_oldest()
        if index + 1 == count:
            self._session.announce_end(self._planned())
        if not self._mover.never_waits:
            self._start_next()
        if index + 1 < count:
            self._message(index + 1)

    def _await_oldest(self) -> None:
        """The bucket that the worker has had longest is loaded."""
        step = self._loading[0]
        what = f"bucket {step.number} of {len(self._move.plan.steps)}"
        self._session.await_reload(what, self._mover.advance)
        self._move.tracer.end(self._span, time.monotonic())
        self._loading.popleft()
        self._trace_oldest()
        self._mover.done_with(step)
        self._move.call.clock.advance(step.bucket.size)
        if self._mover.never_waits:
            self._start_next()

    def _trace_oldest(self) -> None:
        """The worker loads it from now on."""
        if self._loading:
            self._span = self._move.tracer.begin(RELOAD, self._loading[0])

    def _start_next(self) -> None:
        if self._waiting:
            step = self._waiting.popleft()
            with self._naming_source(step):
                self._mover.start(step)

    def _message(self, index: int) -> tuple[bytes, str]:
        """What the worker is told of a bucket, and the digest of that; encoded once for a plan."""
        plan, session = self._move.plan, self._session
        key = session.encode_bucket, session.finds_sources, index
        if key not in plan.messages:
            step = plan.steps[index]
            start = step.slot * plan.bucket_bytes
            if session.finds_sources or isinstance(step.bucket, TensorPart):
                start = 0  # of the bucket, or of the tensor that the worker puts together
            message = session.encode_bucket(to_named_tensor(step.bucket.items, start))
            plan.messages[key] = message, digest(message)
        found: tuple[bytes, str] = plan.messages[key]
        return found

    def _planned(self) -> list[str | None]:
        """The digest of each message, ``None`` for a part that does not end its tensor."""
        buckets = (step.bucket for step in self._move.plan.steps)
        ends = [not isinstance(bucket, TensorPart) or bucket.is_last for bucket in buckets]
        return [self._message(index)[1] if end else None for index, end in enumerate(ends)]

    def _extensions(self, step: Step) -> bytes:
        """What follows the message of a bucket, for workers of ours: where it lies, its sum, for
        those that check that themselves, and where a part of a tensor belongs.

        The bytes are checked here for workers that do not check them, such as the original's.
        """
        extensions: dict[str, Any] = {}
        bucket = step.bucket
        source, start = self._mover.lies_at(step)
        if self._session.finds_sources:
            extensions[SOURCE] = [source, start, bucket.size]
            start = 0
        lies_at, nbytes = start, bucket.size
        if isinstance(bucket, TensorPart):
            extensions[PART] = [start, bucket.size, bucket.begin, bucket.total, step.owner]
            lies_at, nbytes = 0, bucket.total  # once it has been put together
        if needs := self._mover.needs_for(step):
            return encode_extensions(extensions | {NEEDS: needs})  # sums are of all bytes
        expected = self._move.gathered.sum_of(step.owner, bucket)
        if self._mover.has_checked(step) and not isinstance(bucket, TensorPart):
            expected = None
        if expected is not None and self._session.worker_checks_sums:
            extensions[CHECKSUM] = [lies_at, nbytes, *expected]
        elif expected is not None:
            where = f"a bucket from {self._mover.source_of(step)}"
            check_bytes(self._move.slot(step), *expected, where)
        return encode_extensions(extensions) if extensions else b""

    @contextlib.contextmanager
    def _naming_source(self, step: Step) -> Iterator[None]:
        """If the time runs out in here, say whose bucket did not arrive."""
        try:
            yield
        except TimeoutError as error:
            source = self._mover.source_of(step)
            raise TimeoutError(f"{error}: a bucket from {source} did not arrive") from None
