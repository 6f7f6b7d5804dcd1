"""A worker extension whose second worker is killed in the middle of its first update."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint_engine.loading.reload import EngineReload, NamedTensors
from checkpoint_engine.worker import VllmColocateWorkerExtension

LAST_BUCKET = 3
KILLED_AT = "DYING_WORKER_KILLED_AT"
"""Names the file that says when; there is one such death only."""


class DyingWorker(VllmColocateWorkerExtension):
    rank: int

    def update_weights_from_ipc(self, zmq_handles: dict[str, str]) -> dict[str, Any]:
        if self.rank == 1 and not Path(os.environ[KILLED_AT]).exists():
            EngineReload.load = _dying(EngineReload.load)  # type: ignore[method-assign]
        return super().update_weights_from_ipc(zmq_handles)


def _dying(load: Callable[..., None]) -> Any:
    buckets = iter(range(1, LAST_BUCKET + 1))

    def load_and_die(self: EngineReload, weights: NamedTensors, *delivery: Any) -> None:
        load(self, weights, *delivery)
        if next(buckets) == LAST_BUCKET:
            Path(os.environ[KILLED_AT]).write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    return load_and_die
