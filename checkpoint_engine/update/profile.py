"""What is known of this rank's engine between updates."""

from __future__ import annotations

import time

from checkpoint_engine.ground.report import LoadedCheckpoint
from checkpoint_engine.update.session import EngineState, WorkerSession


class EngineProfile:
    """Written at the end of each update.

    Attributes:
        joins_parts: whether the worker puts tensors together that travel in parts. Plans are made
            before a worker is there to be asked.
        served: what the engine holds; ``None`` before the first update, and while the weights are
            partly written.
    """

    def __init__(self) -> None:
        self.joins_parts = False
        self.served: LoadedCheckpoint | None = None

    def learn(self, session: WorkerSession, rank: int, served: LoadedCheckpoint) -> None:
        """However the update ended. ``served``: what the engine holds if it succeeded."""
        if session.worker_joins_parts is not None:
            self.joins_parts = session.worker_joins_parts
        failed = any(rank in one.ranks for one in session.failed)
        if session.state is EngineState.HOLDS and not failed:
            self.served = served.model_copy(update={"since": time.time()})
        elif session.state is not EngineState.UNTOUCHED:
            self.served = None
