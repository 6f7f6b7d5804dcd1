from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine import rdma

CASES = json.loads((Path(__file__).parent / "contract" / "hca_cases.json").read_text())["cases"]
NICS = ["mlx5_0", "mlx5_1", "mlx4_0", "mlx4_1"]
MANY = [f"mlx5_{i}" for i in range(40)]

names = st.text(alphabet="mlx45_^=:, 0²", max_size=12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case["value"]))
def test_hca_contract(case: dict[str, Any]) -> None:
    devices, findings = rdma.parse_hca(case["value"], case["available"])
    assert devices == case["expected"]
    if case["warning"] is not None:
        assert findings == [case["warning"]]


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
def test_select_devices(environ: dict[str, str], expected: list[str]) -> None:
    assert rdma.select_devices(environ, NICS) == (expected, [])


def test_selection_without_a_match_falls_back_to_all_and_says_so() -> None:
    devices, findings = rdma.select_devices({"NCCL_IB_HCA": "mlx6"}, NICS)
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
