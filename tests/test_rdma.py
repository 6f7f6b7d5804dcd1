from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.ground import rdma
from checkpoint_engine.planning.plan import assign_receiver_ranks

NICS = ["mlx5_0", "mlx5_1", "mlx4_0", "mlx4_1"]
MANY = [f"mlx5_{i}" for i in range(40)]

names = st.text(alphabet="mlx45_^=:, 0²", max_size=12)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("mlx5_1,mlx5_0", ["mlx5_0", "mlx5_1"]),
        ("mlx4,mlx5", ["mlx4_0", "mlx4_1", "mlx5_0", "mlx5_1"]),
        ("mlx5_0,mlx5", ["mlx5_0", "mlx5_1"]),
        ("= mlx5_0:1", ["mlx5_0"]),
        ("^=mlx5_0:1", ["mlx5_1", "mlx4_0", "mlx4_1"]),
        (",", []),
    ],
)
def test_hca_order_and_ports(value: str, expected: list[str]) -> None:
    assert rdma.parse_hca(value, NICS) == (expected, [])


def test_every_name_without_a_match_is_a_finding() -> None:
    devices, findings = rdma.parse_hca("mlx6,mlx5_0,mlx7", NICS)
    assert devices == ["mlx5_0"]
    assert ["mlx6" in findings[0], "mlx7" in findings[1]] == [True, True]


@pytest.mark.parametrize("value", ["", "mlx5", "^mlx4", "=" + ",".join(MANY)])
def test_at_most_32_devices_in_natural_order(value: str) -> None:
    assert rdma.parse_hca(value, MANY)[0] == MANY[:32]


@settings(deadline=None)
@given(value=names, available=st.lists(names, unique=True, max_size=40))
def test_parsing_never_fails_and_selects_only_what_is_there(
    value: str, available: list[str]
) -> None:
    devices, findings = rdma.parse_hca(value, available)
    assert set(devices) <= set(available)
    assert len(devices) == len(set(devices)) <= rdma.MAX_DEVICES
    assert all(isinstance(text, str) for text in findings)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, NICS),
        ({"NCCL_IB_HCA": "mlx5"}, ["mlx5_0", "mlx5_1"]),
        ({"NCCL_IB_HCA": ""}, NICS),
        ({"PS_P2P_STORE_RDMA_DEVICES": " b , a,,mlx5_0 "}, ["b", "a", "mlx5_0"]),
        ({"PS_P2P_STORE_RDMA_DEVICES": "a", "NCCL_IB_HCA": "mlx5"}, ["a"]),
        ({"PS_P2P_STORE_RDMA_DEVICES": " ", "NCCL_IB_HCA": "mlx4_1"}, ["mlx4_1"]),
    ],
)
def test_select_devices(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], expected: list[str]
) -> None:
    set_alone(monkeypatch, environ)
    assert rdma.select_devices(NICS) == (expected, [])


def set_alone(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    for name in ("PS_P2P_STORE_RDMA_DEVICES", "NCCL_IB_HCA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)


def test_selection_without_a_match_falls_back_to_all_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_alone(monkeypatch, {"NCCL_IB_HCA": "mlx6"})
    devices, findings = rdma.select_devices(NICS)
    assert devices == NICS
    assert findings == ["No RDMA device match device_name='mlx6' where is_exact_match=False."]


@pytest.mark.parametrize(
    ("gpus", "nics", "expected"),
    [
        (8, 8, ["0", "1", "2", "3", "4", "5", "6", "7"]),
        (8, 4, ["0", "0", "1", "1", "2", "2", "3", "3"]),
        (8, 1, ["0"] * 8),
        (2, 8, ["0,1,2,3", "4,5,6,7"]),
        (1, 3, ["0,1,2"]),
    ],
)
def test_ranks_and_devices_are_paired_in_blocks(gpus: int, nics: int, expected: list[str]) -> None:
    devices = [str(i) for i in range(nics)]
    assert [rdma.device_for_rank(rank, gpus, devices) for rank in range(gpus)] == expected


@pytest.mark.parametrize(("gpus", "nics"), [(8, 3), (3, 8), (4, 6)])
def test_uneven_blocks_name_both_variables(gpus: int, nics: int) -> None:
    with pytest.raises(AssertionError, match=r"PS_P2P_STORE_RDMA_DEVICES.*NCCL_IB_HCA"):
        rdma.device_for_rank(0, gpus, [str(i) for i in range(nics)])


def test_no_device_is_a_runtime_error() -> None:
    with pytest.raises(RuntimeError, match="no rdma devices found"):
        rdma.device_for_rank(0, 8, [])


@pytest.mark.parametrize("local_rank", [-1, 8])
def test_local_rank_out_of_range(local_rank: int) -> None:
    with pytest.raises(ValueError, match=f"local rank {local_rank} is not one of the node's 8"):
        rdma.device_for_rank(local_rank, 8, NICS)


@settings(deadline=None)
@given(gpus=st.integers(1, 16), nics=st.integers(1, 16))
def test_blocks_are_contiguous_and_use_every_device(gpus: int, nics: int) -> None:
    if gpus % nics != 0 and nics % gpus != 0:
        return
    devices = [f"mlx5_{i}" for i in range(nics)]
    chosen = [rdma.device_for_rank(rank, gpus, devices) for rank in range(gpus)]
    assert list(dict.fromkeys(",".join(chosen).split(","))) == devices


ACTIVE, DOWN = "4: ACTIVE", "1: DOWN"
GID = "fe80:0000:0000:0000:0c42:a1ff:fe00:0001"
NO_GID = "0000:0000:0000:0000:0000:0000:0000:0000"


def add_nic(
    sysfs: Path, name: str, *states: str, gids: tuple[str, ...] = (GID, NO_GID), vendor: str = ""
) -> None:
    """As the kernel describes a NIC with one port for each of ``states``."""
    for number, state in enumerate(states, start=1):
        port = sysfs / name / "ports" / str(number)
        (port / "gids").mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        for place, gid in enumerate(gids):
            (port / "gids" / str(place)).write_text(f"{gid}\n")
    (sysfs / name / "device").mkdir(parents=True)
    (sysfs / name / "device" / "vendor").write_text(f"{vendor or '0x15b3'}\n")


def test_a_nic_is_usable_with_one_active_port_that_has_an_address(tmp_path: Path) -> None:
    add_nic(tmp_path, "good", ACTIVE)
    add_nic(tmp_path, "one port of two", DOWN, ACTIVE)
    add_nic(tmp_path, "dead", DOWN)
    add_nic(tmp_path, "idle", ACTIVE, gids=(NO_GID, NO_GID))
    add_nic(tmp_path, "half dead, half idle", DOWN, ACTIVE, gids=(NO_GID,))
    names = [path.name for path in sorted(tmp_path.iterdir())]
    usable, findings = rdma.usable_devices([*names, "unknown to the kernel"], str(tmp_path))
    assert usable == ["good", "one port of two", "unknown to the kernel"]
    assert findings == [
        "RDMA device dead is not used: port 1 is 1: DOWN",
        "RDMA device half dead, half idle is not used: port 1 is 1: DOWN, port 2 has no GID",
        "RDMA device idle is not used: port 1 has no GID",
    ]


def test_an_entry_that_cannot_be_read_is_an_empty_one(tmp_path: Path) -> None:
    add_nic(tmp_path, "idle", ACTIVE, gids=(NO_GID,))
    (tmp_path / "idle/ports/1/gids/1").mkdir()  # reading it fails, as an empty entry of RoCE does
    assert rdma.usable_devices(["idle"], str(tmp_path))[0] == []
    (tmp_path / "idle/ports/1/gids/2").write_text(GID)
    assert rdma.usable_devices(["idle"], str(tmp_path))[0] == ["idle"]


def test_efa_is_told_by_its_vendor(tmp_path: Path) -> None:
    add_nic(tmp_path, "rdmap0s6", ACTIVE, vendor="0x1d0f")
    add_nic(tmp_path, "mlx5_0", ACTIVE)
    assert rdma.is_efa(["rdmap0s6"], str(tmp_path))
    assert rdma.is_efa(["mlx5_0", "rdmap0s6"], str(tmp_path))
    assert not rdma.is_efa(["mlx5_0", "unknown"], str(tmp_path))


def node(sysfs: Path, gpus: int, nics: list[str]) -> dict[str, set[int]]:
    """The ranks of one node on each NIC, or each for itself where there is none."""
    usable, _ = rdma.usable_devices(nics, str(sysfs))
    if not usable:
        return {f"rank-{rank}": {rank} for rank in range(gpus)}
    choice = rdma.with_stand_ins(nics, usable, gpus)
    topology: dict[str, set[int]] = {}
    for rank in range(gpus):
        topology.setdefault(rdma.device_for_rank(rank, gpus, choice), set()).add(rank)
    return topology


@pytest.mark.parametrize(
    ("gpus", "nics", "dead", "receivers"),
    [
        pytest.param(2, 8, [], 2, id="more NICs than GPUs"),
        pytest.param(8, 8, [], 8, id="one each"),
        pytest.param(8, 4, [], 4, id="fewer NICs"),
        pytest.param(8, 0, [], 8, id="none"),
        pytest.param(8, 8, [3], 7, id="one of eight dead"),
        pytest.param(8, 8, [0, 5], 6, id="two of eight dead"),
        pytest.param(8, 4, [0, 1], 2, id="half of four dead"),
        pytest.param(2, 8, [1], 2, id="one of many dead"),
        pytest.param(8, 9, [8], 8, id="one too many, idle"),
        pytest.param(8, 2, [0, 1], 8, id="all dead"),
    ],
)
def test_receivers_of_every_topology(
    tmp_path: Path, gpus: int, nics: int, dead: list[int], receivers: int
) -> None:
    names = [f"mlx5_{number}" for number in range(nics)]
    for number, name in enumerate(names):
        add_nic(tmp_path, name, DOWN if number in dead else ACTIVE)
    local = node(tmp_path, gpus, names)
    used = {name for choice in local for name in choice.split(",")}
    assert used.isdisjoint({f"mlx5_{number}" for number in dead})
    remote = {f"owner-{owner}": {owner} for owner in range(16)}
    buckets = [(owner, (owner, turn)) for owner in range(16) for turn in range(12)]
    assigned = assign_receiver_ranks(buckets, local, remote)
    assert sorted(bucket for _, _, bucket in assigned) == [bucket for _, bucket in buckets]
    counts = Counter(receiver for receiver, _, _ in assigned)
    assert len(counts) == receivers == len(local)
    assert max(counts.values()) <= 1.1 * len(buckets) / receivers


def test_no_nic_is_loaded_more_than_a_tenth_above_the_mean() -> None:
    """Eight owners on eight NICs, eight receivers on four; a round is what runs at the same
    time."""
    local = {f"nic-{number}": {2 * number, 2 * number + 1} for number in range(4)}
    remote = {f"nic-{number}": {number} for number in range(8)}
    buckets = [(owner, turn) for owner in range(8) for turn in range(25)]
    assigned = assign_receiver_ranks(buckets, local, remote)
    for loads in (
        Counter(receiver for receiver, _, _ in assigned),
        Counter(owner for _, owner, _ in assigned),
    ):
        assert max(loads.values()) <= 1.1 * len(buckets) / len(loads)
    for start in range(0, len(assigned), 4):
        at_once = assigned[start : start + 4]
        assert len({owner for _, owner, _ in at_once}) == len(at_once)


@pytest.mark.parametrize(
    ("devices", "usable", "gpus", "expected"),
    [
        ("abcd", "abcd", 8, "abcd"),
        ("abcd", "acd", 4, "accd"),
        ("abcd", "bd", 4, "bd"),
        ("abcd", "abc", 4, "abca"),
        ("abc", "ab", 4, "ab"),
        ("abc", "abc", 4, "abc"),  # uneven from the start: device_for_rank says what to set
    ],
)
def test_stand_ins(devices: str, usable: str, gpus: int, expected: str) -> None:
    assert rdma.with_stand_ins(devices, usable, gpus) == list(expected)


def test_no_device_is_given_to_a_rank_twice() -> None:
    choice = rdma.with_stand_ins("abcd", "acd", 2)
    assert [rdma.device_for_rank(rank, 2, choice) for rank in range(2)] == ["a,c", "c,d"]


class Verbs:
    """Stands in for libibverbs: its device list is a C array, here a Python list."""

    def __init__(self, devices: list[bytes]) -> None:
        self.devices = devices
        self.freed = 0

    def ibv_get_device_list(self, count: Any) -> list[bytes]:
        count._obj.value = len(self.devices)
        return self.devices

    def ibv_get_device_name(self, device: bytes) -> bytes:
        return device

    def ibv_free_device_list(self, devices: list[bytes]) -> None:
        assert devices is self.devices
        self.freed += 1


def test_listing_names_every_device_and_frees_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    verbs = Verbs([b"mlx5_0", b"mlx5_bond_0"])
    monkeypatch.setattr(rdma, "_load_verbs", lambda: verbs)
    assert rdma.list_devices() == (["mlx5_0", "mlx5_bond_0"], [])
    assert verbs.freed == 1


def test_no_kernel_support_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rdma, "_load_verbs", lambda: Verbs([]))
    assert rdma.list_devices() == ([], [])


def test_missing_library_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, **kwargs: Any) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(rdma.ctypes, "CDLL", missing)
    devices, findings = rdma.list_devices()
    assert devices == []
    assert "libibverbs.so.1" in findings[0]
    assert "install libibverbs1" in findings[0]


def test_listing_works_on_this_machine() -> None:
    devices, findings = rdma.list_devices()
    assert all(devices)
    assert len(findings) <= 1
