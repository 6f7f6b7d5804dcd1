"""What a call spends its time with, and how far it has come."""

from __future__ import annotations

import time
from collections.abc import Callable

from checkpoint_engine.ground.progress import Progress


class Clock:
    """The phases of one call on one rank.

    Attributes:
        phase: what this rank does or waits for now.
        seconds: what it has spent in each phase that is over.
        history: the phases with the time at which each began, by the monotonic clock.
        waited_for: seconds that an update waited for buckets, by the rank that they came from.
        total_bytes, done_bytes: how far an update has come on this rank.
        on_phase: called with the name of a phase that begins for the first time.
        on_advance: called when ``done_bytes`` has grown.
    """

    def __init__(self, call: str, checkpoint: str) -> None:
        self._about = {"call": call, "checkpoint": checkpoint}
        self.phase = "start"
        self.seconds: dict[str, float] = {}
        self.waited_for: dict[int, float] = {}
        self.total_bytes = self.done_bytes = 0
        self.on_phase: Callable[[str], None] | None = None
        self.on_advance: Callable[[], None] | None = None
        self.began = time.monotonic()
        self.history = [(self.phase, self.began)]

    @property
    def progress(self) -> Progress:
        """How far the call has come on this rank. Any thread."""
        return Progress(
            **self._about,
            phase=self.phase,
            done_bytes=self.done_bytes,
            total_bytes=self.total_bytes,
            seconds=dict(self.seconds),
        )

    @property
    def elapsed(self) -> float:
        """Seconds since the call began."""
        return time.monotonic() - self.history[0][1]

    def begin(self, phase: str) -> None:
        """What this rank does from now on."""
        now = time.monotonic()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.began
        self.phase, self.began = phase, now
        self.history.append((phase, now))
        if self.on_phase is not None and phase not in self.seconds:
            self.on_phase(phase)

    def arrived(self, sender: int) -> None:
        """What this phase has waited for so far came from rank ``sender``."""
        waited = time.monotonic() - self.began
        self.waited_for[sender] = self.waited_for.get(sender, 0.0) + waited

    def advance(self, nbytes: int) -> None:
        """This rank's worker has loaded ``nbytes`` more."""
        self.done_bytes += nbytes
        if self.on_advance is not None:
            self.on_advance()
