"""Threads that are gone, however their work ends, before the memory that they work on is."""

from __future__ import annotations

import os
import threading
import time
from functools import partial

import pytest

from checkpoint_engine.memory import threads


def test_every_task_is_done_and_told_of_in_the_callers_thread() -> None:
    begun: list[int] = []
    told: list[tuple[int, int]] = []
    tasks = [(number, partial(begun.append, number)) for number in range(100)]
    threads.run_tasks(tasks, lambda number: told.append((number, threading.get_ident())))
    assert sorted(begun) == list(range(100))
    assert sorted(told) == [(number, threading.get_ident()) for number in range(100)]


def test_no_task_is_no_work() -> None:
    threads.run_tasks([], pytest.fail)


def test_threads_run_where_they_are_told_to_if_they_may() -> None:
    cpu = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    where = []
    tasks = [("", lambda: where.append(os.sched_getaffinity(0)))]
    threads.run_tasks(tasks, lambda _: None, {cpu, 1 << 20})
    threads.run_tasks(tasks, lambda _: None, {1 << 20})
    assert where == [{cpu}, before]
    assert os.sched_getaffinity(0) == before


def test_a_sandbox_may_forbid_to_choose_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(threads.os, "sched_setaffinity", refuse)
    done: list[int] = []
    threads.run_tasks([(1, lambda: None)], done.append)
    assert done == [1]


@pytest.mark.parametrize("caller_fails", [False, True])
def test_after_a_failure_nothing_runs_and_nothing_begins(caller_fails: bool) -> None:
    running, ended = [], []

    def slow() -> None:
        running.append(1)
        time.sleep(0.05)
        ended.append(1)

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    first = (lambda: None) if caller_fails else fail
    on_done = fail if caller_fails else (lambda _: None)
    with pytest.raises(OSError, match="the disk is full"):
        threads.run_tasks([(0, first)] + [(number, slow) for number in range(1, 100)], on_done)
    assert len(running) == len(ended) < 99


def test_stopping_goes_on_through_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    busy: threads._TaskThreads[None] = threads._TaskThreads([], os.sched_getaffinity(0))
    busy._busy = 1  # a thread that ends after the third look
    looks = []

    def sleep(_: float) -> None:
        looks.append(busy._busy)
        if len(looks) == 3:
            busy._busy = 0
        raise KeyboardInterrupt

    monkeypatch.setattr(threads.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        busy.stop()
    assert looks == [1, 1, 1]
