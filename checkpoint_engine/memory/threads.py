"""Threads for memory that is freed afterwards. No ``ThreadPoolExecutor``: under signals it hangs or
crashes.

However their work ends, none of these threads touches the memory any more. With an executor that
was shut down in ``finally``, 9 of 16 runs of the test with 80 signals hung or crashed.
"""

from __future__ import annotations

import _thread
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

MAX_THREADS = 16

_Key = TypeVar("_Key")
Task = tuple[_Key, Callable[[], None]]


def run_tasks(
    tasks: Sequence[Task[_Key]], on_done: Callable[[_Key], None], cpus: Set[int] | None = None
) -> None:
    """Run all tasks, several at a time, and in this thread call ``on_done`` with the key of each.

    Args:
        cpus: where the threads run, as far as this thread may use them.

    Raises:
        BaseException: what a task or ``on_done`` raised first; tasks that have not begun by then
            never begin.
    """
    allowed = os.sched_getaffinity(0)
    usable = (allowed & cpus if cpus else allowed) or allowed
    threads = _TaskThreads(tasks, usable)
    try:
        for _ in range(min(MAX_THREADS, len(usable), len(tasks))):
            _thread.start_new_thread(threads.work, ())
        for _ in tasks:
            on_done(threads.wait_for_one())
    finally:
        threads.stop()


class _TaskThreads(Generic[_Key]):
    """``threading.Thread`` and executors wait in Python code, where an interrupt can lose a running
    thread or corrupt a lock. Here the caller waits in C only, so that ``stop`` always returns after
    the last thread.
    """

    def __init__(self, tasks: Iterable[Task[_Key]], cpus: Set[int]) -> None:
        self._cpus = cpus
        self._tasks: SimpleQueue[Task[_Key]] = SimpleQueue()
        self._results: SimpleQueue[tuple[_Key, BaseException | None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._busy = 0
        self._stopped = False
        for task in tasks:
            self._tasks.put(task)

    def wait_for_one(self) -> _Key:
        """The key of the next task that is done. Raises the error of one that failed."""
        key, error = self._results.get()
        try:
            if error is not None:
                raise error
        finally:
            del error  # this frame lives on in its traceback
        return key

    def stop(self) -> None:
        """Returns once no thread is at work any more. An interrupt is raised after that."""
        interrupts: list[KeyboardInterrupt] = []
        while not self._stopped or self._busy > 0:
            try:
                with self._lock:
                    self._stopped = True
                time.sleep(0.0001)
            except KeyboardInterrupt as interrupt:
                interrupts = [interrupt]
        if interrupts:
            raise interrupts.pop()  # no local name: this frame lives on in its traceback

    def work(self) -> None:
        """What each thread does."""
        with self._lock:
            if self._stopped:
                return
            self._busy += 1
        try:
            with suppress(OSError):  # a hint, which a sandbox may forbid
                os.sched_setaffinity(0, self._cpus)  # of this thread alone
            while not self._stopped:
                key, action = self._tasks.get_nowait()
                error = None
                try:
                    action()
                except BaseException as raised:
                    error = raised
                self._results.put((key, error))
                del key, action, error
        except Empty:
            pass
        finally:
            with self._lock:
                self._busy -= 1
