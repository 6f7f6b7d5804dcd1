"""Ranks say what they do first: calls that do not go together end at once, on every rank that has
come, and the ranks are in step again afterwards. Real processes and a real store."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

import pytest

from checkpoint_engine.errors import CollectiveError, UpdateError
from checkpoint_engine.world.call import Call
from checkpoint_engine.world.hello import Hello, check_agreement
from test_control import LONG, Rank, run_world

SOON = 8.0  # seconds; far below LONG, the timeout of every call here


def say(me: Rank, **words: Any) -> str:
    """Make the call of a hello; returns ``ok``, or the text of its error."""
    hello = Hello(me.rank, **{"call": "update", "device": f"device {me.rank}", **words})
    members = None if hello.ranks is None else list(hello.ranks)
    began = time.monotonic()
    try:
        with me.plane.call(hello.call, LONG, members, hello.checkpoint) as call:
            call.exchange(hello)
    except UpdateError as error:
        assert time.monotonic() - began < SOON
        return str(error)
    return "ok"


DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "checkpoint": (
        {"checkpoint": "step-8"},
        {"checkpoint": "step-7"},
        r"rank 1 is in update\('step-7'\), rank 0 in update\('step-8'\)",
    ),
    "kind of call": (
        {"checkpoint": "step-8"},
        {"call": "gather_metas", "checkpoint": "step-7"},
        r"rank 1 is in gather_metas\('step-7'\), rank 0 in update\('step-8'\)",
    ),
    "version": (
        {"checkpoint": "a", "version": "7"},
        {"checkpoint": "a", "version": "8"},
        r"rank 1 is in update\('a', version='8'\), rank 0 in update\('a', version='7'\)",
    ),
    "on_instance_failure": (
        {"checkpoint": "a", "on_instance_failure": "abort"},
        {"checkpoint": "a", "on_instance_failure": "continue"},
        r"rank 1 is in update\('a', on_instance_failure='continue'\), rank 0 in update\('a'\)",
    ),
    "compare_ranks": (
        {"checkpoint": "a", "compare_ranks": False},
        {"checkpoint": "a", "compare_ranks": True},
        r"rank 1 is in update\('a', compare_ranks=True\), rank 0 in update\('a'\)",
    ),
    "metas": (
        {"checkpoint": "a", "metas": "one"},
        {"checkpoint": "a", "metas": "other"},
        r"ranks 0 and 1 gathered other metas for update\('a'\): call gather_metas\('a'\)",
    ),
    "barrier": (
        {"checkpoint": "a"},
        {"call": "store_based_barrier"},
        r"rank 1 is in store_based_barrier\(\), rank 0 in update\('a'\)",
    ),
    "ranks": (
        {"checkpoint": "a"},
        {"checkpoint": "a", "ranks": (1,)},
        r"update\('a', ranks=\[1\]\)",
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
@pytest.mark.parametrize("first", [0, 1])
def test_different_calls_end_at_once_and_name_who_wants_what(what: str, first: int) -> None:
    ours, theirs, says = DIFFERENT[what]

    def program(me: Rank) -> list[str]:
        me.exchange()
        if me.rank != first:
            while not me.plane.store().check([f"doing/{first}"]) and what == "ranks":
                time.sleep(0.01)
        words = [ours, theirs][me.rank]
        seen = hold(me, words) if "ranks" in words and first == 1 else say(me, **words)
        return [seen, say(me, checkpoint="next"), *me.exchange()]

    for seen, following, *exchanged in run_world(2, program):
        assert_match(says, seen)
        assert following == "ok"
        assert exchanged == ["0", "1"]


def test_the_other_call_has_failed_before_its_rank_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank that was ended from there may begin the next call of all sooner."""
    publish = Call.publish

    def publish_late(call: Call, error: BaseException) -> bytes:
        time.sleep(0.5 if call.rank == 0 else 0.0)
        return publish(call, error)

    def program(me: Rank) -> list[str]:
        if me.rank == 1:
            return [hold(me, {"checkpoint": "a", "ranks": (1,)}), say(me, checkpoint="next")]
        monkeypatch.setattr(Call, "publish", publish_late)
        while not me.plane.store().check(["doing/1"]):
            time.sleep(0.01)
        return [say(me, checkpoint="a"), say(me, checkpoint="next")]

    for seen, following in run_world(2, program):
        assert "update('a', ranks=[1])" in seen
        assert following == "ok"


def assert_match(pattern: str, text: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


def hold(me: Rank, words: dict[str, Any]) -> str:
    """A P2P update that goes on until another rank ends it."""
    hello = Hello(me.rank, **{"call": "update", "device": f"device {me.rank}", **words})
    try:
        with me.plane.call("update", LONG, list(hello.ranks or ()), hello.checkpoint) as call:
            call.exchange(hello)
            while True:
                call.look_for_outcome()
                call.check()
    except UpdateError as error:
        return str(error)


@pytest.mark.parametrize("size", [3, 5])
def test_one_rank_of_several_that_is_elsewhere_is_named_on_all(size: int) -> None:
    def program(me: Rank) -> list[str]:
        name = "step-3" if me.rank == 1 else "step-2"
        return [say(me, checkpoint=name), say(me, checkpoint="step-9")]

    for seen, following in run_world(size, program):
        assert_match(r"rank 1 .*step-3|step-3.*rank 1|in update\('step-3'\)", seen)
        assert following == "ok"


def test_a_late_rank_finds_the_disagreement_and_is_in_step_afterwards() -> None:
    def program(me: Rank) -> list[str]:
        if me.rank == 2:
            assert me.signals[0].wait(LONG)
            assert me.signals[1].wait(LONG)
        seen = say(me, checkpoint=["a", "b", "a"][me.rank])
        if me.rank < 2:
            me.signals[me.rank].set()
        return [seen, say(me, checkpoint="next")]

    for seen, following in run_world(3, program):
        assert_match(r"update\('[ab]'\), rank \d in update\('[ab]'\)", seen)
        assert following == "ok"


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_publish_loop_is_in_step_again_one_step_after_a_failure(ranks: int, culprit: int) -> None:
    """One rank cannot register step 2 and goes on to step 3, as the others do after an error."""

    def program(me: Rank) -> dict[int, str]:
        results = {}
        for step in range(1, 7):
            if (me.rank, step) == (culprit, 2):
                results[step] = "not registered"
                continue
            results[step] = say(me, call="gather_metas", checkpoint=f"step-{step}")
            if results[step] == "ok":
                results[step] = say(me, checkpoint=f"step-{step}")
        return results

    for results in run_world(ranks, program):
        assert results[1] == "ok"
        assert results[2] != "ok"
        assert results[3] != "ok"
        assert [results[step] for step in (4, 5, 6)] == ["ok"] * 3


def test_a_loop_that_catches_every_error_of_its_own_is_in_step_again() -> None:
    """Where a failed gather does not keep a rank from its update."""

    def program(me: Rank) -> list[tuple[str, str]]:
        results = []
        for step in range(1, 8):
            if (me.rank, step) != (1, 2):
                name = f"step-{step}"
                gathered = say(me, call="gather_metas", checkpoint=name)
                results.append((gathered, say(me, checkpoint=name)))
        return results

    for results in run_world(2, program):
        assert results[0] == ("ok", "ok")
        assert results[-1] == ("ok", "ok")


def test_a_p2p_update_beside_one_of_all_ends_both_and_the_ranks_are_in_step() -> None:
    def program(me: Rank) -> list[str]:
        if me.rank == 0:
            while not me.plane.store().check(["doing/1"]):
                time.sleep(0.01)
            seen = say(me, checkpoint="a")
        else:
            seen = hold(me, {"checkpoint": "a", "ranks": (1, 2)})
        return [seen, say(me, checkpoint="next")]

    for seen, following in run_world(3, program):
        assert_match(r"update\('a'\)", seen)
        assert_match(r"update\('a', ranks=\[1, 2\]\)", seen)
        assert following == "ok"


def test_p2p_updates_of_ranks_apart_go_on_side_by_side() -> None:
    def program(me: Rank) -> list[str]:
        mine = (0, 1) if me.rank < 2 else (2,)
        return [say(me, checkpoint="a", ranks=mine), *me.exchange()]

    assert run_world(3, program) == [["ok", "0", "1", "2"]] * 3


def test_a_rank_outside_a_p2p_update_may_be_in_the_next_call_already() -> None:
    """It waits there for the others, whose update is of another checkpoint or call."""

    def program(me: Rank) -> list[str]:
        if me.rank == 1:
            return [say(me, call="gather_metas", checkpoint="b")]
        seen = say(me, checkpoint="a", ranks=(0,))
        return [seen, say(me, call="gather_metas", checkpoint="b")]

    assert run_world(2, program) == [["ok", "ok"], ["ok"]]


def test_two_ranks_on_one_device_are_named() -> None:
    def program(me: Rank) -> str:
        return say(me, device="GPU-1")

    for seen in run_world(2, program):
        assert "ranks 0 and 1 are both on device GPU-1" in seen


def test_a_version_goes_with_none() -> None:
    def program(me: Rank) -> str:
        return say(me, version="7" if me.rank == 1 else None)

    assert run_world(3, program) == ["ok"] * 3


def test_versions_of_two_later_ranks_are_compared_too() -> None:
    hellos = [Hello(rank, "update", "a", version=[None, "7", "8"][rank]) for rank in range(3)]
    check_agreement(hellos[:2])
    with pytest.raises(CollectiveError, match=r"version='8'.*version='7'"):
        check_agreement(hellos)


def test_a_hello_survives_the_store() -> None:
    hello = Hello(3, "update", "a", (1, 3), "7", "abort", True, "digest", device="GPU-1")
    assert Hello.decode(hello.encode()) == hello
    assert hello.terms().device == ""
    assert not hello.terms().differs_from(hello)


def test_a_p2p_update_of_one_rank_beside_one_of_all_ends_both() -> None:
    """A rank alone in its call has nobody to wait for; it looks at the outcome all the same."""

    def program(me: Rank) -> str:
        if me.rank == 0:
            return hold(me, {"checkpoint": "a", "ranks": (0,)})
        while not me.plane.store().check(["doing/0"]):
            time.sleep(0.01)
        return say(me, checkpoint="a")

    for seen in run_world(2, program):
        assert_match(r"rank 1 is in update\('a'\), rank 0 in update\('a', ranks=\[0\]\)", seen)


# ---------------------------------------------------------------------- ranks outside a P2P update


def visit(me: Rank, checkpoint: str, ranks: list[int], timeout: float = LONG) -> str:
    """Wait for the update that this rank has no part in; ``ok``, or the text of its error."""
    try:
        me.plane.await_others("update", timeout, ranks, checkpoint)
    except UpdateError as error:
        return str(error)
    return "ok"


def test_a_rank_outside_passes_over_updates_that_it_skipped() -> None:
    def program(me: Rank) -> list[str]:
        if me.rank == 0:
            seen = [fail(me, checkpoint="a", ranks=(0,)), say(me, checkpoint="b", ranks=(0,))]
            me.signals[0].set()
            me.signals[1].wait(LONG)
            return [*seen, say(me, checkpoint="c", ranks=(0,))]
        me.signals[0].wait(LONG)
        late = visit(me, "b", [0])
        me.signals[1].set()
        return [late, visit(me, "c", [0])]

    (failed, *others), visitor = run_world(2, program)
    assert "failed here" in failed
    assert others == visitor == ["ok", "ok"]


def test_a_rank_outside_learns_of_the_death_inside_and_of_later_updates() -> None:
    """The first member died in its call; the process that takes its place ends that call."""

    def program(me: Rank) -> list[str]:
        if me.rank == 0:
            seen = [visit(me, "a", [1])]
            me.signals[0].set()
            me.signals[1].wait(LONG)
            return [*seen, visit(me, "a", [1]), visit(me, "a", [1])]
        if os.fork() == 0:
            hold_until_killed(me.new_plane(), me.rank, (1,))
        os.wait()
        me.signals[0].wait(LONG)
        updates = [say(me, checkpoint="a", ranks=(1,)) for _ in range(2)]
        me.signals[1].set()
        return updates

    outside, inside = run_world(2, program)
    assert "rank 1 is gone" in outside[0]
    assert outside[1:] == inside == ["ok", "ok"]


@pytest.mark.parametrize("later", [0.0, 0.5])
def test_members_that_died_together_do_not_meet_in_the_call_they_left(later: float) -> None:
    """Nobody was left to end that call; what it holds of the dead is nobody's any more. One of them
    may be back before the other is gone."""

    def program(me: Rank) -> list[str]:
        if me.rank == 0:
            me.plane.store()
            return []
        pid = os.fork()
        if pid == 0:
            hold_until_killed(me.new_plane(), me.rank, (1, 2), wait=me.signals[me.rank])
        me.signals[1].wait(LONG)
        me.signals[2].wait(LONG)
        time.sleep(later if me.rank == 2 else 0.0)
        os.kill(pid, signal.SIGKILL)
        os.wait()
        hello = Hello(me.rank, "update", "a", (1, 2), device=f"{me.rank}", address="of the living")
        with me.plane.call("update", LONG, [1, 2], "a") as call:
            return [one.address for one in call.exchange(hello)]

    assert run_world(3, program)[1:] == [["of the living"] * 2] * 2


def fail(me: Rank, **words: Any) -> str:
    """As ``say``, with a failure after the hellos."""
    hello = Hello(me.rank, "update", device=f"device {me.rank}", **words)
    try:
        with me.plane.call("update", LONG, list(hello.ranks or ()), hello.checkpoint) as call:
            call.exchange(hello)
            raise ValueError("failed here")
    except UpdateError as error:
        return str(error)


def hold_until_killed(plane: Any, rank: int, ranks: tuple[int, ...], wait: Any = None) -> None:
    """A process that says hello and dies: at once, or by a signal once ``wait`` is set."""
    hello = Hello(rank, "update", "a", ranks, device=f"{rank}", address="of the dead")
    with contextlib.suppress(UpdateError), plane.call("update", LONG, list(ranks), "a") as call:
        call.exchange(hello)
        if wait is None:
            os._exit(0)
        wait.set()
        call.wait(lambda: False)
    time.sleep(LONG)
