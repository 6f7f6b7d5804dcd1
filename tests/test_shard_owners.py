"""Several owners of the same bytes, of which some are dead when they are read by hosts of another
world. The hosts are those of ``test_shard_hosts.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hosts import Host
from test_hosts import IN_THE_MIDDLE, SLOW, MakeHosts, await_, make_hosts  # noqa: F401
from test_shard_hosts import start
from torchrun import mooncake_works

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(not mooncake_works(), reason="P2P tests need Mooncake"),
]


class Worlds:
    """Owners, so many on each of the first hosts, and a joiner on the last."""

    def __init__(
        self,
        hosts: list[Host],
        tmp_path: Path,
        updates: int = 1,
        owners_each: int = 1,
        transport: str = "auto",
    ) -> None:
        """``transport``: with ``group``, the joiner pulls whole buckets."""
        self.hosts = hosts
        self._folder = tmp_path
        shared = {"folder": str(tmp_path)}
        self.owners = start(hosts[:-1], tmp_path / "a", "owner", owners_each, **shared)
        env = {"PS_TRANSPORT": transport}
        self.joiner = start(
            hosts[-1:], tmp_path / "b", "joiner", env=env, **shared, updates=updates
        )
        self._ready(0)

    def _ready(self, update: int) -> None:
        file = self._folder / f"ready-{update}-0"
        await_(file.exists, self.joiner, seconds=90)

    def begin(self, update: int) -> None:
        self._ready(update)
        (self._folder / f"go-{update}").touch()

    def begin_slowly(self, update: int, owner: int) -> None:
        """Returns while the joiner reads from the owner."""
        self.hosts[owner].slow_down(SLOW)
        self._ready(update)
        before = self.hosts[owner].bytes_sent()
        self.begin(update)
        await_(lambda: self.hosts[owner].bytes_sent() > before + IN_THE_MIDDLE, self.joiner)

    def end(self, host: int, how: str) -> None:
        """The owners' processes, or the whole host without anybody being told."""
        if how == "killed":
            self.owners._parts[host].kill()
        else:
            self.hosts[host].unplug()

    def seen(self) -> list[dict[str, Any]]:
        (result,) = self.joiner.wait(200)
        assert result["shared"] == []
        return list(result["seen"])


def is_right(seen: dict[str, Any], way: str = "shard") -> bool:
    return seen["kind"] is None and (seen["right"], seen["way"]) == (True, way)


@pytest.mark.parametrize("how", ["killed", "cut off"])
@pytest.mark.parametrize(
    ("count", "each", "dead"), [(2, 1, [0]), (3, 1, [0, 1]), (3, 1, [1]), (2, 3, [0])]
)
@pytest.mark.timeout(240)
def test_owners_that_were_dead_before_are_passed_over(
    tmp_path: Path,
    make_hosts: MakeHosts,  # noqa: F811
    how: str,
    count: int,
    each: int,
    dead: Sequence[int],
) -> None:
    """``count``: hosts of so many owners ``each``."""
    worlds = Worlds(make_hosts(count + 1), tmp_path, owners_each=each)
    for host in dead:
        worlds.end(host, how)
    worlds.begin(0)
    (seen,) = worlds.seen()
    assert is_right(seen), seen


@pytest.mark.parametrize("how", ["killed", "cut off"])
@pytest.mark.timeout(240)
def test_owners_that_died_after_they_were_read_are_passed_over(
    tmp_path: Path,
    make_hosts: MakeHosts,  # noqa: F811
    how: str,
) -> None:
    """Also by needs, which the workers have stated in the second update."""
    worlds = Worlds(make_hosts(4), tmp_path, updates=4)
    worlds.begin(0)
    worlds.begin(1)
    for update, owner in ((2, 0), (3, 1)):
        worlds._ready(update)
        worlds.end(owner, how)
        worlds.begin(update)
    for seen in worlds.seen():
        assert is_right(seen), seen


@pytest.mark.parametrize("how", ["killed", "cut off"])
@pytest.mark.timeout(240)
def test_an_owner_that_dies_while_it_is_read_is_replaced_by_another(
    tmp_path: Path,
    make_hosts: MakeHosts,  # noqa: F811
    how: str,
) -> None:
    worlds = Worlds(make_hosts(4), tmp_path)
    worlds.begin_slowly(0, owner=0)
    worlds.end(0, how)
    (seen,) = worlds.seen()
    assert is_right(seen), seen


@pytest.mark.parametrize("how", ["killed", "cut off"])
@pytest.mark.timeout(240)
def test_pull_passes_over_owners_that_die_too(
    tmp_path: Path,
    make_hosts: MakeHosts,  # noqa: F811
    how: str,
) -> None:
    """One while it is read, one before the next update, then nobody is left."""
    worlds = Worlds(make_hosts(4), tmp_path, updates=3, transport="group")
    worlds.begin_slowly(0, owner=0)
    worlds.end(0, how)
    for update, owner in ((1, 1), (2, 2)):
        worlds._ready(update)
        worlds.end(owner, how)
        worlds.begin(update)
    first, second, last = worlds.seen()
    assert is_right(first, "P2P"), first
    assert is_right(second, "P2P"), second
    assert last["kind"] == "p2p_failed"
    for owner in range(3):
        assert f"owner {owner}: " in last["error"]


@pytest.mark.parametrize("how", ["killed", "cut off"])
@pytest.mark.timeout(240)
def test_an_error_names_the_owners_once_nobody_else_holds_the_bytes(
    tmp_path: Path,
    make_hosts: MakeHosts,  # noqa: F811
    how: str,
) -> None:
    worlds = Worlds(make_hosts(3), tmp_path, updates=2)
    worlds.begin(0)
    worlds._ready(1)
    for owner in (0, 1):
        worlds.end(owner, how)
    worlds.begin(1)
    first, second = worlds.seen()
    assert is_right(first), first
    assert second["kind"] == "p2p_failed"
    for owner, host in enumerate(worlds.hosts[:2]):
        assert f"owner {owner}: " in second["error"]
        assert host.address in second["error"]
