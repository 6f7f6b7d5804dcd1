"""What report, metrics and logs add to an update: with them and without, in turns.

    python benchmarks/overhead.py
    torchrun --nproc-per-node 2 benchmarks/overhead.py

Without: nothing is noted of stages, of what was waited for and of phases that begin, nothing is
logged, and there is neither report nor jobs nor metrics. With: all of them; the log goes to a
file. The order within a pair alternates. The figure is the median over all pairs of how much longer
the one with them took, beside the error of that median.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from loguru import logger
from worker_process import WorkerProcess

from checkpoint_engine.ground.report import Stage
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.service.jobs import Jobs, Status
from checkpoint_engine.service.metrics import Metrics
from checkpoint_engine.update import update as update_module
from checkpoint_engine.world.clock import Clock
from update import NAME, RANK, WORLD_SIZE, Engine, make_tensors


class Unobserving:
    """Takes the place of a ``RankTracer``. No mock: that would cost more than what it replaces."""

    exact = False

    def __init__(self, *_: object, **__: object) -> None:
        """Nothing to keep."""

    def copying(self, *_: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    reloading = on_host = copying

    def begin(self, *_: object) -> int:
        return 0

    broadcasting = begin

    def end(self, *_: object) -> None:
        """Nothing to note."""

    broadcast = broadcast_seen = end

    def stages(self) -> dict[str, Stage]:
        return {}


def nothing(*_: object, **__: object) -> None:
    """Instead of what observes."""


@contextlib.contextmanager
def unobserved() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(update_module, "RankTracer", Unobserving))
        stack.enter_context(mock.patch.object(update_module, "_show_progress", nothing))
        stack.enter_context(mock.patch.object(update_module.Server, "learn", nothing))
        stack.enter_context(mock.patch.object(Clock, "arrived", nothing))
        logger.disable("checkpoint_engine")
        try:
            yield
        finally:
            logger.enable("checkpoint_engine")


class Overhead:
    """Updates of one rank."""

    def __init__(self, layers: int) -> None:
        self._worker = WorkerProcess(Engine, layers)
        options = {"auto_pg": True} if WORLD_SIZE > 1 else {}
        self._ps = ParameterServer(rank=RANK, world_size=WORLD_SIZE, **options)
        self._jobs = Jobs()
        self._metrics = Metrics(
            lambda: Status(**dict(self._ps.snapshot()), jobs=self._jobs.all()), self._jobs
        )
        mine = range(layers * RANK // WORLD_SIZE, layers * (RANK + 1) // WORLD_SIZE)
        self._ps.register_checkpoint(NAME, named_tensors=make_tensors(mine, seed=1))
        self._ps.gather_metas(NAME)

    def update(self) -> None:
        self._ps.update(NAME, lambda paths: self._worker.call("update", paths[RANK][1]))

    def observed(self) -> float:
        began = time.perf_counter()
        _, ended = self._jobs.start("update", NAME, self.update)
        ended.result()
        return time.perf_counter() - began

    def plain(self) -> float:
        with unobserved():
            began = time.perf_counter()
            self.update()
            return time.perf_counter() - began

    def measure(self, pairs: int) -> tuple[list[float], list[float]]:
        """Seconds of the updates with and without."""
        for _ in range(3):
            self.observed()
            self.plain()
        observed, plain = [], []
        for pair in range(pairs):
            if pair % 2:
                plain.append(self.plain())
            observed.append(self.observed())
            if not pair % 2:
                plain.append(self.plain())
        self._metrics.text()
        return observed, plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1, help="of 1.25 GB")
    parser.add_argument("--bucket-gb", type=float, default=2.0)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--no-log", action="store_true", help="report and metrics alone")
    arguments = parser.parse_args()
    os.environ["PS_MAX_BUCKET_SIZE_GB"] = f"{arguments.bucket_gb:g}"
    torch.set_num_threads(1)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    with tempfile.TemporaryFile("w") as log:
        logger.remove()
        if not arguments.no_log:
            logger.add(log, level="DEBUG")
        observed, plain = Overhead(arguments.layers).measure(arguments.pairs)
    if RANK > 0:
        return
    more = [one - other for one, other in zip(observed, plain, strict=True)]
    usual, added = statistics.median(plain), statistics.median(more)
    error = 1.25 * statistics.stdev(more) / math.sqrt(len(more))
    print(
        f"update {usual * 1e3:.2f} ms; with report, metrics{'' if arguments.no_log else ', log'} "
        f"{added * 1e3:+.3f} "
        f"+- {error * 1e3:.3f} ms, {added / usual:+.2%} +- {error / usual:.2%}; "
        f"{len(more)} pairs"
    )


if __name__ == "__main__":
    main()
