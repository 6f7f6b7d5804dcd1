"""Runs one case of the table on a fleet and judges how it ended."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import Any

from fault_fleet import RANKS, Answer, Fleet, HangError
from table import Case

PATIENCE = 12.0  # seconds beyond the deadline before a rank counts as hanging
PROMPT = 6.0  # seconds from fault or deadline to an error; about one on a machine that is not busy


@dataclass
class Verdict:
    """What was wrong with a case; nothing, if all lists are empty."""

    hangs: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Updates that were reported and did not happen, or the other way round."""
    other: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """The longest time from the fault, or from the deadline it had to wait for, to an error."""

    @property
    def faults(self) -> list[str]:
        return [*self.hangs, *self.leaks, *self.wrong, *self.other]


def run_case(fleet: Fleet, case: Case) -> Verdict:
    verdict = Verdict()
    version = f"faulty-{fleet.seed}"
    fleet.forget_fault()
    fleet.seed += 1
    seed = fleet.seed
    try:
        _prepare(fleet, case, seed)
        began = time.monotonic()
        _call(fleet, case, seed, version)
        answers = _answers(fleet, case, verdict)
        _judge_answers(fleet, case, answers, verdict, began)
        case.after(fleet)
        if case.call == "update":
            _judge_workers(fleet, answers, seed, version, verdict)
        _recover(fleet, case, verdict)
    except (AssertionError, OSError, RuntimeError) as error:
        verdict.other.append(f"{type(error).__name__}: {error}"[:2000])
    return verdict


def _prepare(fleet: Fleet, case: Case, seed: int) -> None:
    if case.call in ("update", "gather"):
        fleet.call_all("register", seed=seed)
    if case.call == "update":
        fleet.call_all("gather")
        for rank in range(RANKS):
            fleet.ask_worker(rank, "forget")
    case.before(fleet)


def _call(fleet: Fleet, case: Case, seed: int, version: str) -> None:
    for rank in case.callers:
        options: dict[str, Any] = {**case.each, **case.of_rank.get(rank, {})}
        if "make" in options:
            options["files"] = [options.pop("make")(fleet)]
        if case.call == "update":
            options |= {"version": version, "timeout": case.timeout}
            options["fault"] = case.inject
        if case.call in ("gather", "register_and_gather"):
            options["timeout"] = case.timeout
        if case.call == "register_and_gather":
            options["seed"] = seed
        fleet.send(rank, case.call, case.inject, **_named(options))
    if case.during.__name__ != "nothing":
        fleet.await_fault()
        case.during(fleet)


def _named(options: dict[str, Any]) -> dict[str, Any]:
    """The call's own ``fault`` is another argument than that of ``send``."""
    if "fault" in options:
        options["worker_fault"] = options.pop("fault")
    return options


def _answers(fleet: Fleet, case: Case, verdict: Verdict) -> dict[int, Answer]:
    answers: dict[int, Answer] = {}
    for rank in case.callers:
        if rank == case.stops:
            continue
        try:
            answers[rank] = fleet.receive(rank, case.timeout + PATIENCE)
        except HangError as error:
            verdict.hangs.append(f"rank {rank}: {error}")
            fleet.kill_server(rank)
    fleet.wake()
    if case.stops is not None:
        answers[case.stops] = fleet.receive(case.stops, case.timeout + PATIENCE)
    return answers


def _judge_answers(
    fleet: Fleet, case: Case, answers: dict[int, Answer], verdict: Verdict, began: float
) -> None:
    for rank, answer in answers.items():
        if rank == case.kills:
            if answer.kind != "died":
                verdict.other.append(f"rank {rank} did not die: {answer}")
        elif case.succeeds:
            _judge_success(case, rank, answer, verdict)
        elif rank not in case.on:
            if answer.kind != "result":
                verdict.other.append(f"rank {rank} did not go on: {answer}")
        elif answer.kind != "error":
            verdict.wrong.append(f"rank {rank} answered {answer}")
        else:
            if not re.search(case.says, answer.text, re.DOTALL):
                verdict.other.append(f"rank {rank} said {answer.text!r}, not {case.says!r}")
            if rank != case.stops:
                _note_time(fleet, case, rank, answer, verdict, began)


def _note_time(
    fleet: Fleet, case: Case, rank: int, answer: Answer, verdict: Verdict, began: float
) -> None:
    waits_for_deadline = case.timeout < 20.0 and answer.when - began >= case.timeout
    try:
        since = fleet.fault_time()
    except AssertionError:
        since = began  # the fault was there before the call
    seconds = answer.when - (began + case.timeout if waits_for_deadline else max(since, began))
    verdict.seconds = max(verdict.seconds, seconds)
    if seconds > PROMPT:
        verdict.hangs.append(f"rank {rank} took {seconds:.1f} s to its error")


def _judge_success(case: Case, rank: int, answer: Answer, verdict: Verdict) -> None:
    if answer.kind != "result":
        verdict.other.append(f"rank {rank} did not go on: {answer}")
        return
    failed = answer.value["failed_instances"]
    if case.failed is not None:
        if [one["ranks"] for one in failed] != [[case.failed]]:
            verdict.wrong.append(f"rank {rank} names {failed} as failed")
        elif not re.search(case.says, failed[0]["error"]):
            verdict.other.append(f"rank {rank} says {failed[0]['error']!r}, not {case.says!r}")
    elif rank in case.of_rank and not re.search(case.says, answer.value["meanwhile"]):
        verdict.other.append(f"meanwhile: {answer.value['meanwhile']!r}, not {case.says!r}")


def _judge_workers(
    fleet: Fleet, answers: dict[int, Answer], seed: int, version: str, verdict: Verdict
) -> None:
    """No worker says that it holds what it does not, and no rank says so of one."""
    for rank in range(RANKS):
        if not fleet.worker_is_there(rank):
            continue
        holds = fleet.ask_worker(rank, "version")["version"] == version
        if holds and fleet.ask_worker(rank, "digests") != fleet.expected(seed):
            verdict.wrong.append(f"worker {rank} says it holds {version}, and does not")
        for other, answer in answers.items():
            if answer.kind == "error":
                said = answer.value[2].get(rank, "")
                if said == f"holds {version}" and not holds:
                    verdict.wrong.append(f"rank {other} says that worker {rank} {said}")
            if answer.kind == "result" and not holds and rank == other:
                failed = [r for one in answer.value["failed_instances"] for r in one["ranks"]]
                if rank not in failed:
                    verdict.wrong.append(f"rank {rank} says its worker holds {version}")


def _recover(fleet: Fleet, case: Case, verdict: Verdict) -> None:
    """Nothing healthy is started again; the next update works, and nothing is left."""
    started = fleet.repair()
    fleet.call_all("clear")
    if started:
        fleet.warm_up()
    fleet.good_update()
    fleet.settle_baseline(started)
    verdict.leaks += fleet.leaks()
