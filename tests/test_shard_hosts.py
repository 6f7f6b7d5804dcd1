"""Sharded updates over hosts with networks of their own: namespaces, and Mooncake over TCP. What
enters a host is counted by its network interface."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from hosts import Host, World
from test_hosts import IN_THE_MIDDLE, SLOW, MakeHosts, await_, check_clean, make_hosts  # noqa: F401
from torchrun import HERE, Forked, mooncake_works, ranks_of

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(not mooncake_works(), reason="P2P tests need Mooncake"),
]
CPU = {"PS_DEVICE": "cpu", "PS_MAX_BUCKET_SIZE_GB": str(5 / 1024)}


def start(
    hosts: list[Host],
    place: Path,
    program: str,
    ranks_each: int = 1,
    env: dict[str, str] | None = None,
    **arguments: Any,
) -> World:
    command = [str(HERE / "shard_programs.py"), program, json.dumps(arguments)]
    return World(hosts, place, command, ranks_each, CPU | (env or {}))


@pytest.mark.parametrize(
    ("count", "each", "tp"),
    [
        pytest.param(2, 1, 2, id="TP over two hosts"),
        pytest.param(2, 2, 4, id="TP over two hosts of two ranks"),
        pytest.param(2, 2, 2, id="TP inside each of two hosts"),
        pytest.param(3, 1, 1, id="three hosts"),
    ],
)
@pytest.mark.timeout(120)
def test_each_host_gets_what_its_workers_need_once(
    tmp_path: Path,
    make_hosts: MakeHosts,  # noqa: F811
    count: int,
    each: int,
    tp: int,
) -> None:
    hosts = make_hosts(count)
    results = start(hosts, tmp_path / "w", "sharded", each, tp=tp, updates=4).wait(100)
    check_clean(results)
    for host in range(count):
        here = results[host * each : (host + 1) * each]
        assert all(one["right"] for rank in here for one in rank["seen"])
        for number in (0, 1):  # the workers have stated nothing yet
            seen = here[0]["seen"][number]
            assert seen["way"] == ("shard" if count > 2 else "broadcast")
            assert seen["received"] >= here[0]["elsewhere"]
        for number in (2, 3):
            seen = [rank["seen"][number] for rank in here]
            assert {one["way"] for one in seen} == {"shard"}
            read = sum(one["read"] for one in seen)
            assert here[0]["needed"] <= read <= seen[0]["received"] <= 1.05 * here[0]["needed"]


@pytest.mark.parametrize("copying", [[], [1], [0, 1]])
@pytest.mark.timeout(120)
def test_columns_of_short_rows_enter_a_host_without_the_others(
    tmp_path: Path,
    make_hosts: MakeHosts,  # noqa: F811
    copying: list[int],
) -> None:
    """From the hosts that hold column copies."""
    order = {"gap": 8 << 10, "contiguous": False, "copying": copying}
    results = start(make_hosts(2), tmp_path / "w", "short_rows", updates=6, layers=2, **order).wait(
        100
    )
    check_clean(results)
    for host, result in enumerate(results):
        needed, learned = result["needed"], result["seen"][3:]
        assert all(one["right"] for one in result["seen"])
        assert {one["way"] for one in learned} == {"shard"}
        for one in learned:
            if 1 - host in copying:
                assert needed == one["read"] <= one["received"] <= 1.05 * needed
            else:
                assert 1.2 * needed < one["read"] <= one["received"]


@pytest.mark.timeout(240)
def test_a_host_is_cut_off_and_comes_again(
    tmp_path: Path,
    make_hosts: MakeHosts,  # noqa: F811
) -> None:
    """In the middle of what the other one reads. Each gets an error in time; the next update, with
    what is started anew on that host, needs nothing to be rebuilt."""
    near, far = make_hosts(2)
    world = start(
        [near, far], tmp_path / "w", "interrupted", tp=2, folder=str(tmp_path), timeout=40
    )
    await_(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)), world, seconds=80)
    far.slow_down(SLOW)
    before = far.bytes_sent()
    (tmp_path / "slow").touch()
    await_(lambda: far.bytes_sent() > before + IN_THE_MIDDLE, world)
    far.unplug()
    await_(
        lambda: all((tmp_path / f"failed-{rank}").exists() for rank in (0, 1)), world, seconds=60
    )
    far.full_speed()
    far.plug_in()
    here, there = world._parts
    there.join(60)
    arguments = json.dumps({"tp": 2, "folder": str(tmp_path)})
    command = [str(HERE / "shard_programs.py"), "succeeded", arguments]
    variables = CPU | ranks_of(2, 1, place=1)[0] | world.variables
    again = Forked(
        tmp_path / "again-there",
        [*command, str(tmp_path / "w" / "again")],
        [variables],
        far.namespaces(),
    )
    (tmp_path / "w" / "again").mkdir()
    again.join(60)
    here.join(60)
    first, second = (
        json.loads((tmp_path / "w" / "results" / f"{rank}.json").read_text()) for rank in (0, 1)
    )
    successor = json.loads((tmp_path / "w" / "again" / "1.json").read_text())
    assert (first["failure"]["kind"], first["failure"]["rank"]) == ("rank_gone", 1)
    assert second["failure"]["kind"] in ("rank_gone", "store_lost")
    assert max(first["failure"]["seconds"], second["failure"]["seconds"]) < 30
    for seen in (*first["seen"], *successor["seen"]):
        assert seen["right"]
    assert [one["way"] for one in successor["seen"]] == ["shard"] * 3


def left_for_good(hosts: list[Host], tmp_path: Path, **arguments: Any) -> list[dict[str, Any]]:
    """The results of three ranks. The last one leaves; what is meant for everybody names it."""
    place = tmp_path / "w"
    world = start(hosts, place, "left_for_good", folder=str(tmp_path), **arguments)
    world._parts[2].join(100)
    (tmp_path / "left").touch()
    results = world.wait(100)
    for result in results:
        assert all(one["right"] for one in result["seen"])
        assert {one["way"] for one in result["seen"]} == {"shard"}
    for result in results[:2]:
        for failure in (result["of_all"], result["gather"]):
            assert (failure["kind"], failure["rank"]) == ("rank_gone", 2)
            assert failure["seconds"] < 15
    return results


@pytest.mark.timeout(240)
def test_a_host_that_owns_nothing_leaves_for_good(
    tmp_path: Path,
    make_hosts: MakeHosts,  # noqa: F811
) -> None:
    """The others go on among themselves, by what their workers need, with what they gathered before
    and with new values, and rebuild nothing."""
    for result in left_for_good(make_hosts(3), tmp_path, owners=2, copies=False)[:2]:
        assert result["of_rest"]["kind"] is None
        assert [one["right"] for one in result["rest"]] == [True] * 3
        assert [one["way"] for one in result["rest"]] == ["shard", "shard", "P2P"]
        assert result["rest"][2]["reason"] == "not by shard: PS_TRANSPORT=group"
        for one in result["rest"][:2]:
            needed = result["needed"]
            assert needed <= one["read"] <= one["received"] <= 1.05 * needed


@pytest.mark.timeout(240)
def test_what_a_host_that_left_owned_is_read_elsewhere(
    tmp_path: Path,
    make_hosts: MakeHosts,  # noqa: F811
) -> None:
    for result in left_for_good(make_hosts(3), tmp_path, owners=3, copies=True)[:2]:
        assert result["of_rest"]["kind"] is None
        assert [(one["right"], one["way"]) for one in result["rest"]] == [(True, "shard")]


@pytest.mark.timeout(240)
def test_what_only_a_host_that_left_owned_is_an_error_that_names_it(
    tmp_path: Path,
    make_hosts: MakeHosts,  # noqa: F811
) -> None:
    for result in left_for_good(make_hosts(3), tmp_path, owners=3, copies=False)[:2]:
        failure = result["of_rest"]
        assert (failure["kind"], failure["rank"]) == ("rank_gone", 2)
        assert "rank 2 is gone, and no other rank owns" in failure["error"]
        assert "start that rank again" in failure["error"]
        assert failure["seconds"] < 15
        assert result["rest"] == []


def broken_off(
    hosts: list[Host], tmp_path: Path, how: str, timeout: float, **arguments: Any
) -> list[dict[str, Any]]:
    """What two ranks see of an update in whose middle the third one is killed or cut off; with the
    seconds from then to their errors."""
    world = start(
        hosts, tmp_path / "w", "broken_off", folder=str(tmp_path), timeout=timeout, **arguments
    )
    slowed(hosts, tmp_path, world, sender=arguments["owners"] - 1)
    last, began = world._parts[2], time.monotonic()
    if how == "killed":
        last.kill()
        hosts[2].full_speed()  # otherwise the end of its connections waits behind what it had sent
    else:
        hosts[2].unplug()
    rest = world._parts[:2]
    places = (0, 1)
    await_(lambda: all((tmp_path / f"failed-{one}").exists() for one in places), seconds=90)
    sped_up(hosts[:2] if how == "killed" else hosts, tmp_path)
    for part in rest:
        part.join(90)
    last.kill()
    results = [
        json.loads((tmp_path / "w" / "results" / f"{one}.json").read_text()) for one in places
    ]
    for result in results:
        result["failure"]["after"] = result["failure"]["at"] - began
    return results


HOW = [pytest.param("killed", marks=pytest.mark.alone), "cut off"]
"""Of the first the seconds are measured."""


@pytest.mark.parametrize("how", HOW)
@pytest.mark.timeout(240)
def test_a_member_of_an_update_of_some_ranks_breaks_off_in_its_middle(
    tmp_path: Path,
    make_hosts: MakeHosts,  # noqa: F811
    how: str,
) -> None:
    for result in broken_off(make_hosts(3), tmp_path, how, 40, owners=2, members=[0, 1, 2]):
        failure = result["failure"]
        assert (failure["kind"], failure["rank"]) == ("rank_gone", 2)
        assert failure["after"] < (2 if how == "killed" else 40)
        assert [(one["right"], one["way"]) for one in result["rest"]] == [(True, "shard")]
        assert result["shared"] == []


@pytest.mark.parametrize("how", HOW)
@pytest.mark.timeout(240)
def test_an_owner_that_takes_no_part_breaks_off_in_the_middle_of_an_update(
    tmp_path: Path,
    make_hosts: MakeHosts,  # noqa: F811
    how: str,
) -> None:
    """Nobody else holds what it owned, so the next update names it as well."""
    for result in broken_off(make_hosts(3), tmp_path, how, 40, owners=3, members=[0, 1]):
        failure = result["failure"]
        assert (failure["kind"], failure["rank"]) == ("rank_gone", 2)
        assert failure["after"] < (2 if how == "killed" else 40)
        following = failure["next"]
        assert (following["kind"], following["rank"]) == ("rank_gone", 2)
        assert "no other rank owns" in following["error"]
        assert result["shared"] == []


def slowed(hosts: list[Host], tmp_path: Path, world: World, sender: int = -1) -> None:
    """Once all ranks are ready, have every host send slowly, and wait until ``sender`` does."""
    places = range(len(hosts))
    await_(lambda: all((tmp_path / f"ready-{one}").exists() for one in places), world, seconds=90)
    for host in hosts:
        host.slow_down(SLOW)
    before = hosts[sender].bytes_sent()
    (tmp_path / "slow").touch()
    await_(lambda: hosts[sender].bytes_sent() > before + IN_THE_MIDDLE, world)


def sped_up(hosts: list[Host], tmp_path: Path) -> None:
    for host in hosts:
        host.full_speed()
    (tmp_path / "fast").touch()


@pytest.mark.parametrize("by", [0, 1])
@pytest.mark.timeout(240)
def test_an_update_that_is_cancelled_leaves_the_next_as_before(
    tmp_path: Path,
    make_hosts: MakeHosts,  # noqa: F811
    by: int,
) -> None:
    hosts = make_hosts(2)
    world = start(hosts, tmp_path / "w", "cancelled", tp=2, folder=str(tmp_path))
    slowed(hosts, tmp_path, world)
    (tmp_path / f"cancel-{by}").touch()
    await_(lambda: all((tmp_path / f"failed-{one}").exists() for one in (0, 1)), world, seconds=40)
    sped_up(hosts, tmp_path)
    results = world.wait(90)
    for result in results:
        assert result["failure"]["kind"] == "interrupted"
        assert "it was cancelled" in result["failure"]["error"]
        assert result["failure"]["seconds"] < 30
        assert all(one["right"] for one in result["seen"])
        assert [one["way"] for one in result["seen"][2:]] == ["shard"] * 3
        assert result["shared"] == []


@pytest.mark.timeout(240)
def test_other_instances_are_updated_where_one_fails(
    tmp_path: Path,
    make_hosts: MakeHosts,  # noqa: F811
) -> None:
    hosts = make_hosts(2)
    world = start(hosts, tmp_path / "w", "continued", folder=str(tmp_path))
    slowed(hosts, tmp_path, world)
    (tmp_path / "kill").touch()
    sped_up(hosts, tmp_path)
    results = world.wait(90)
    assert results[0]["right"] == [True, True]
    for result in results:
        assert all(one["right"] for one in result["seen"])
        assert [one["way"] for one in result["seen"][2:]] == ["shard"] * 4
        for way, failed in result["failed"]:
            assert way == "shard"
            assert [(one["rank"], one["instance"]) for one in failed] == [(1, "engine 1")]
        assert result["shared"] == []
