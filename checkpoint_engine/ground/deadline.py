"""One deadline per operation, derived once from its timeout and passed down."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import TypeVar

from checkpoint_engine.settings import LONGEST_UPDATE

T = TypeVar("T")

_LOOKS_PER_CHECK = 20
_why_cancelled: ContextVar[Callable[[], str]] = ContextVar("why_cancelled", default=str)


@contextmanager
def cancellable(why: Callable[[], str]) -> Iterator[None]:
    """What this thread begins in here is given up once ``why`` returns a reason."""
    token = _why_cancelled.set(why)
    try:
        yield
    finally:
        _why_cancelled.reset(token)


def check_cancelled() -> None:
    """Raise if the call that this thread is in was cancelled.

    Raises:
        CollectiveError: of kind ``interrupted``; the reason.
    """
    if reason := _why_cancelled.get()():
        from checkpoint_engine.errors import CollectiveError  # imports torch

        raise CollectiveError(reason, "interrupted")


class Deadline:
    """The point in time at which an operation gives up."""

    def __init__(self, timeout: timedelta | float) -> None:
        """``timeout``: from now, in seconds or as a ``timedelta``: positive, at most 30 days."""
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
        if not 0 < seconds <= LONGEST_UPDATE:  # torch's waits overflow far beyond
            raise ValueError(f"timeout must be positive and at most 30 days, got {timeout!r}")
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._end - time.monotonic())

    def check(self, waiting_for: str) -> None:
        """Raise ``TimeoutError`` naming what was waited for, once the time is up."""
        if self.remaining() == 0.0:
            raise TimeoutError(f"gave up after {self.seconds:g} s waiting for {waiting_for}")


def poll(done: Callable[[], bool], check: Callable[[], None], longest: float = 0.001) -> None:
    """Wait until ``done()``; ``check()`` runs between looks and ends the wait by raising.

    Looks often at first, for events that are microseconds away, then after every twentieth of the
    time that it has waited, from 0.2 ms to ``longest`` seconds; ``check``, which may ask around,
    less often.
    """
    looks = 0
    waited = 0.0
    while not done():
        if looks % _LOOKS_PER_CHECK == 0:
            check()
        looks += 1
        pause = 0.0 if looks < _LOOKS_PER_CHECK else min(max(waited / 20, 0.0002), longest)
        time.sleep(pause)
        waited += pause


@contextmanager
def holding(lock: threading.Lock, seconds: float, late: str) -> Iterator[None]:
    """Raises ``TimeoutError``, which begins with ``late``, if it is not to be had in time."""
    if not lock.acquire(timeout=seconds):
        raise TimeoutError(f"{late} within {seconds:.3g} s")
    try:
        yield
    finally:
        lock.release()


def begin(action: Callable[[], T], name: str) -> Future[T]:
    """What ``action`` will have returned or raised; a daemon thread of its own does it, so one that
    never ends does not keep the process."""
    future: Future[T] = Future()
    threading.Thread(target=_run, args=(future, action), name=name, daemon=True).start()
    return future


def _run(future: Future[T], action: Callable[[], T]) -> None:
    try:
        future.set_result(action())
    except BaseException as error:
        future.set_exception(error)
    finally:
        del future  # the error's traceback leads here, and must not lead back to it


def in_thread(
    action: Callable[[], T], check: Callable[[], None], name: str, daemon: bool = True
) -> T:
    """What ``action`` returns, in a thread of its own; raises what it raises. ``check()`` ends the
    wait by raising, and leaves the thread behind.

    Args:
        daemon: whether the process may end while the thread is blocked.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:
            # Its traceback leads to this frame, which holds all that ``action`` refers to.
            errors.append(error.with_traceback(None))

    thread = threading.Thread(target=run, name=name, daemon=daemon)
    thread.start()
    poll(lambda: not thread.is_alive(), check)
    if errors:
        raise errors.pop()
    return results[0]
