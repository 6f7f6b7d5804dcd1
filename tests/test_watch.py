"""What a command shows on a terminal while ranks work."""

from __future__ import annotations

import io
import sys
import threading
from typing import Any

import pytest

from checkpoint_engine.cli.servers import RankService
from checkpoint_engine.cli.watch import watched
from checkpoint_engine.ground.progress import size_text
from engines import serve_http


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Rank:
    """A server whose status tells these steps of a call, the last one for ever."""

    def __init__(self, *steps: dict[str, Any] | None) -> None:
        self._steps = list(steps)
        self.all_told = threading.Event()

    def status(self, _: Any) -> tuple[int, Any]:
        if len(self._steps) == 1:
            self.all_told.set()
        step = self._steps.pop(0) if len(self._steps) > 1 else self._steps[0]
        state = {"rank": 0, "world_size": 1, "checkpoints": [], "jobs": [], "pinned_bytes": 0}
        return 200, {**state, "progress": step}


def step(call: str, phase: str, done: int, total: int = 4_000_000) -> dict[str, Any]:
    about = {"call": call, "checkpoint": "c", "phase": phase}
    return {**about, "done_bytes": done, "total_bytes": total}


def shown(
    rank: Rank,
    call: str,
    monkeypatch: pytest.MonkeyPatch,
    stream: io.StringIO,
    error: Exception | None = None,
) -> str:
    """What is written until the call has ended, by ``error`` if there is one."""
    monkeypatch.setattr(sys, "stderr", stream)
    with serve_http({"GET /v1/status": rank.status}) as url, watched(RankService(url), call):
        assert rank.all_told.wait(30)
        rank.all_told.clear()
        assert rank.all_told.wait(30)  # so the answer before has been drawn
        if error is not None:
            raise error
    return stream.getvalue()


def test_an_update_has_one_bar_that_ends_full(monkeypatch: pytest.MonkeyPatch) -> None:
    told = (
        step("update", "plan", 0, 0),
        step("update", "transfer", 0),
        None,
        step("update", "reload", 1_000_000),
    )
    text = shown(Rank(*told), "update", monkeypatch, Terminal())
    assert text.count("update 4.0 MB") == text.count("\r")
    assert text.count("\n") == 1
    for share in ("  0%", " 25%", "100%"):
        assert share in text


def test_registering_has_a_bar_for_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    told = step("register", "filling", 1_000_000), step("register", "summing", 2_000_000)
    text = shown(Rank(*told), "register", monkeypatch, Terminal())
    filling, summing, _ = text.split("\n")
    assert "register: filling 4.0 MB" in filling
    assert "register: summing 4.0 MB" in summing
    assert text.count("100%") == 2


def test_a_call_that_fails_has_a_bar_that_stays_where_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream, rank = Terminal(), Rank(step("update", "reload", 1_000_000))
    with pytest.raises(ValueError, match="it failed"):
        shown(rank, "update", monkeypatch, stream, ValueError("it failed"))
    assert " 25%" in stream.getvalue()
    assert "100%" not in stream.getvalue()


def test_nothing_is_asked_or_drawn_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with watched(RankService("http://127.0.0.1:1"), "update"):
        pass
    assert stream.getvalue() == ""


def test_other_calls_and_servers_that_do_not_answer_draw_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = Rank(step("gather_metas", "layouts", 1_000_000))
    assert shown(told, "update", monkeypatch, Terminal()) == ""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with watched(RankService("http://127.0.0.1:1"), "update"):
        pass
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (2_097_152, "2.1 MB"), (16.2e9, "16.2 GB")],
)
def test_sizes_are_in_the_unit_that_fits(nbytes: float, text: str) -> None:
    assert size_text(nbytes) == text
