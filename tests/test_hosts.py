"""Updates over several hosts: network namespaces on one machine, which the tests make and remove.

They need iproute2, and root or the right to make user namespaces.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hosts import Host, HostsUnavailableError, Network, World
from test_update import SMALL_BUCKETS
from torchrun import HERE

pytestmark = pytest.mark.alone
CPU = {"PS_DEVICE": "cpu"} | SMALL_BUCKETS
SLOW = 8  # Mbit/s: the few MB of a rank take seconds
IN_THE_MIDDLE = 1 << 20  # bytes; more than metas and leases, less than a rank has

MakeHosts = Callable[..., list[Host]]


@pytest.fixture
def make_hosts() -> Iterator[MakeHosts]:
    with ExitStack() as stack:

        def make(count: int, ipv6: bool = False) -> list[Host]:
            try:
                return stack.enter_context(Network(count, ipv6))
            except HostsUnavailableError as error:
                pytest.skip(str(error))

        yield make


def start(
    hosts: list[Host],
    place: Path,
    program: str,
    ranks_each: int = 1,
    env: dict[str, str] = CPU,
    **arguments: Any,
) -> World:
    command = [str(HERE / "host_programs.py"), program, json.dumps(arguments)]
    return World(hosts, place, command, ranks_each, env)


def check_clean(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["sockets"] == 0
        assert result["shared"] == []


def await_(happened: Callable[[], bool], *worlds: World, seconds: float = 40) -> None:
    ends = time.monotonic() + seconds
    while not happened():
        for world in worlds:
            assert world.running, world.output()
        assert time.monotonic() < ends, "\n".join(world.output() for world in worlds)
        time.sleep(0.01)


def owner_hosts(metas: Path) -> list[str]:
    owners = json.loads(metas.read_text()).values()
    return [owner["p2p_store_addr"].rpartition(":")[0] for owner in owners]


@pytest.mark.parametrize("count", [2, 3])
def test_a_broadcast_reaches_every_host(tmp_path: Path, make_hosts: MakeHosts, count: int) -> None:
    hosts = make_hosts(count)
    steps: list[dict[str, Any]] = [
        {"seed": 1},
        {"seed": 2, "owners": [2 * count - 1]},  # on the last host alone
        {"seed": 3, "env": {"PS_MAX_BUCKET_SIZE_GB": "1"}},
    ]
    results = start(hosts, tmp_path / "w", "updates", ranks_each=2, steps=steps).wait()
    check_clean(results)
    assert len(results) == 2 * count
    for result in results:
        assert result["hooks"] == len(steps)
        assert result["reports"][0]["buckets"] > 2 * count
    for host in hosts:
        assert host.bytes_sent() > IN_THE_MIDDLE


@pytest.mark.parametrize(
    ("source_hosts", "ranks_each", "ipv6"),
    [
        pytest.param(1, 1, False, id="one source rank"),
        pytest.param(1, 2, False, id="two source ranks"),
        pytest.param(2, 1, False, id="sources on two hosts"),
        pytest.param(2, 1, True, id="over IPv6"),
    ],
)
def test_instances_on_another_host_join(
    tmp_path: Path, make_hosts: MakeHosts, source_hosts: int, ranks_each: int, ipv6: bool
) -> None:
    """The sources go on with updates of their own until the joiner has what it wants."""
    *sources, last = make_hosts(source_hosts + 1, ipv6)
    shared: dict[str, Any] = {"folder": str(tmp_path), "changes": ["unregister"]}
    source = start(sources, tmp_path / "a", "source", ranks_each, **shared)
    count = source_hosts * ranks_each
    joined = start([last], tmp_path / "b", "joiner", 2, sources=count, **shared).wait()
    owners = source.wait()
    check_clean(joined + owners)
    addresses = [f"[{host.address}]" if ipv6 else host.address for host in sources]
    expected = [address for address in addresses for _ in range(ranks_each)]
    assert owner_hosts(tmp_path / "metas.json") == expected
    assert min(result["updates"] for result in owners) > 0
    for result in joined:
        assert result["buckets"][0] > 1
        assert set(result["ways"]) == {"shard"}
        assert "has unregistered or replaced the checkpoint" in result["seen"][-1]["error"]


@pytest.mark.parametrize(
    ("timeout", "notices_after"),
    [
        pytest.param(40, 4, id="the transport notices"),
        pytest.param(8, 30, id="the update's time is up"),
    ],
)
@pytest.mark.timeout(90)
def test_a_source_that_is_cut_off_while_it_is_read(
    tmp_path: Path, make_hosts: MakeHosts, timeout: int, notices_after: int
) -> None:
    far, near = make_hosts(2)
    env = CPU | {"MC_TCP_PROGRESS_TIMEOUT_SEC": str(notices_after)}
    source = start([far], tmp_path / "a", "source", folder=str(tmp_path), changes=[])
    arguments = {"folder": str(tmp_path), "sources": 1, "timeout": timeout}
    joiner = cut_off_while_reading(
        far, tmp_path, source, lambda: start([near], tmp_path / "b", "cut_off", 2, env, **arguments)
    )
    await_(lambda: all((tmp_path / f"failed-{rank}").exists() for rank in (0, 1)), source, joiner)
    far.full_speed()
    far.plug_in()
    (tmp_path / "plugged in").touch()
    joined = joiner.wait()
    check_clean(joined + source.wait())
    errors = {result["seen"]["error"] for result in joined}
    assert len(errors) == 1
    assert f"from {far.address}:" in errors.pop()
    for result in joined:
        assert result["seen"]["type"] == "UpdateError"
        assert result["seen"]["seconds"] < timeout + 3


def test_a_slow_link_is_waited_for(tmp_path: Path, make_hosts: MakeHosts) -> None:
    """However long a transfer takes, as long as bytes arrive only the update's time ends it."""
    far, near = make_hosts(2)
    env = {"PS_DEVICE": "cpu", "MC_TCP_PROGRESS_TIMEOUT_SEC": "2", "MC_TRANSFER_TIMEOUT": "2"}
    source = start([far], tmp_path / "a", "source", folder=str(tmp_path), changes=[])
    await_((tmp_path / "metas.json").exists, source)
    far.slow_down(SLOW // 2)
    (result,) = joined = start([near], tmp_path / "b", "slow", 1, env, folder=str(tmp_path)).wait()
    far.full_speed()
    check_clean(joined + source.wait())
    assert result["seconds"] > 4


def cut_off_while_reading(
    source_host: Host, folder: Path, source: World, start_reader: Callable[[], World]
) -> World:
    """Over a slow link, which is cut once bytes flow."""
    await_((folder / "metas.json").exists, source)
    source_host.slow_down(SLOW)
    reader = start_reader()
    await_((folder / "reads-0").exists, source, reader)
    before = source_host.bytes_sent()
    await_(lambda: source_host.bytes_sent() > before + IN_THE_MIDDLE, source, reader)
    source_host.unplug()
    return reader
