"""What a command shows on a terminal while ranks work."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import ExitStack
from functools import partial

from checkpoint_engine.cli.servers import STATUS, RankService, ServiceError
from checkpoint_engine.ground.deadline import begin
from checkpoint_engine.ground.progress import Progress, drawn_bar

_BETWEEN_LOOKS = 0.2  # seconds
_ANSWER_SECONDS = 2.0


@contextlib.contextmanager
def watched(server: RankService, call: str) -> Iterator[None]:
    """A bar on stderr, if that is a terminal; it moves with ``call`` as ``server`` tells of it."""
    if not sys.stderr.isatty():
        yield
        return
    bar, ended, succeeded = _Bar(call), threading.Event(), False
    looking = begin(partial(_look, server, bar, ended), "watch")
    try:
        yield
        succeeded = True
    finally:
        ended.set()
        wait([looking], _ANSWER_SECONDS)
        bar.close(succeeded)


def _look(server: RankService, bar: _Bar, ended: threading.Event) -> None:
    while not ended.wait(_BETWEEN_LOOKS):
        with contextlib.suppress(ServiceError):  # the command itself tells of a server's end
            told = server.ask("GET", STATUS, _ANSWER_SECONDS).get("progress")
            if told is not None and not ended.is_set():
                bar.move(Progress.model_validate(told))


class _Bar:
    """Of one call; registering has a bar for its filling and then one for its summing."""

    def __init__(self, call: str) -> None:
        self._call = call
        self._drawn = ExitStack()
        self._last: Progress | None = None

    def move(self, progress: Progress) -> None:
        if progress.call != self._call or not progress.total_bytes:
            return
        label = "update" if self._call == "update" else f"{self._call}: {progress.phase}"
        if self._last is None or (label != "update" and progress.phase != self._last.phase):
            self.close(succeeded=True)
            self._show = self._drawn.enter_context(drawn_bar(label, progress.total_bytes))
        self._last = progress
        self._show(progress)

    def close(self, succeeded: bool) -> None:
        if succeeded and self._last is not None:
            self._show(self._last.model_copy(update={"done_bytes": self._last.total_bytes}))
        self._drawn.close()
        self._last = None
