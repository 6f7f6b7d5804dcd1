from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from checkpoint_engine.ground import devices
from checkpoint_engine.ground.devices import (
    DeviceManager,
    detect_device_type,
    get_ip,
    npu_generate_uuid,
    worker_index,
)

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------------- which device


def test_ps_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_DEVICE", "cpu")
    assert detect_device_type() == "cpu"
    assert DeviceManager().device_type == "cpu"
    assert DeviceManager().device_module.Stream is torch.cpu.Stream


@pytest.mark.parametrize("wanted", ["tpu", "", "CPU", "cuda:0"])
def test_a_device_that_is_none(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    monkeypatch.setenv("PS_DEVICE", wanted)
    with pytest.raises(
        ValueError, match=rf"PS_DEVICE must be one of cpu, cuda, npu, got '{wanted}'"
    ):
        DeviceManager()
    with pytest.raises(ValueError, match=f"'{wanted}' is none of"):
        DeviceManager(wanted)


def test_a_device_that_this_machine_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PS_DEVICE", "npu")
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(RuntimeError, match="'npu' is not available here: set PS_DEVICE"):
        DeviceManager()


def test_detection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PS_DEVICE", raising=False)
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert detect_device_type() == expected


# ---------------------------------------------------------------------- the cpu device


def test_the_cpu_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    device = DeviceManager("cpu")
    assert (device.backend, device.is_accelerator, device.device_count()) == ("gloo", False, 1)
    assert device.device(3) == torch.device("cpu")
    device.synchronize()
    device.release_cached_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device.device_count() == 4


def test_a_cpu_identity_is_stable_over_processes() -> None:
    imports = "from checkpoint_engine.device_utils import DeviceManager"
    program = f"{imports}; print(DeviceManager('cpu').identity(2))"
    seen = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert seen.stdout.strip() == DeviceManager("cpu").identity(2)


def test_a_cpu_identity_differs_between_hosts_and_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    device = DeviceManager("cpu")
    here = device.identity(0)
    kind, host, index = here.split("-")
    assert (kind, index) == ("CPU", "0")
    assert len(host) >= 8
    assert device.identity(1) == f"CPU-{host}-1"
    monkeypatch.setattr(socket, "gethostname", lambda: "another-host")
    assert device.identity(0) != here


def test_free_memory_of_the_cpu_is_within_the_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "available_host_memory", lambda: (5000, "a cgroup"))
    assert DeviceManager("cpu").free_memory() == 5000


def test_free_memory_of_the_cpu_is_the_smaller_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    device = DeviceManager("cpu")
    assert 0 < device.free_memory() <= devices.shutil.disk_usage("/dev/shm").free + (64 << 20)

    def has_left(folder: str) -> SimpleNamespace:
        assert folder == "/dev/shm"
        return SimpleNamespace(free=4097)

    monkeypatch.setattr(devices.shutil, "disk_usage", has_left)
    assert device.free_memory() == 4097
    monkeypatch.setattr(devices.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 60))
    assert 0 < device.free_memory() < 1 << 60


def test_the_index_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PS_CPU_DEVICE_BASE", raising=False)
    assert [worker_index("cpu", 3), worker_index("cuda", 3)] == [3, 3]
    monkeypatch.setenv("PS_CPU_DEVICE_BASE", "4")
    assert [worker_index("cpu", 3), worker_index("cuda", 3)] == [7, 3]


@pytest.mark.gpu
def test_the_cuda_device() -> None:
    device = DeviceManager("cuda")
    assert (device.backend, device.is_accelerator) == ("nccl", True)
    assert device.device(0) == torch.device("cuda", 0)
    assert device.identity(0).startswith("GPU-")
    assert 0 < device.free_memory() <= torch.cuda.mem_get_info()[1]
    assert device.device_count() == torch.cuda.device_count()


# ---------------------------------------------------------------------- npu, with a stand-in

PROC_MEM = """\
        NPU ID                         : {npu}
        Chip Count                     : {chips}

        Process id                     : 17
        Process name                   : other
        Process memory(MB)             : 9
        Chip ID                        : 0
        {own}
"""
OWN = """
        Process id                     : {pid}
        Process name                   : python
        Process memory(MB)             : 512
        Chip ID                        : {chip}
"""


def install_npu_smi(
    monkeypatch: pytest.MonkeyPatch, folder: Path, npu: int, chips: int, chip: int
) -> None:
    """A stand-in that lists this process on one chip of one NPU."""
    for i in range(8):
        own = OWN.format(pid=os.getpid(), chip=chip) if i == npu else ""
        (folder / f"report-{i}").write_text(PROC_MEM.format(npu=i, chips=chips, own=own))
    program = folder / "npu-smi"
    program.write_text(
        "#!/bin/sh\n"
        '[ "$1 $2 $3 $4" = "info -t proc-mem -i" ] || exit 1\n'
        f'cat "{folder}/report-$5"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("npu", "chips", "chip", "number"), [(0, 1, 0, 0), (3, 1, 0, 3), (2, 2, 1, 5), (7, 2, 0, 14)]
)
def test_npu_identity(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, npu: int, chips: int, chip: int, number: int
) -> None:
    install_npu_smi(monkeypatch, tmp_path, npu, chips, chip)
    assert npu_generate_uuid() == f"{get_ip()}-{number}"


def test_npu_that_does_not_know_this_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install_npu_smi(monkeypatch, tmp_path, npu=99, chips=1, chip=0)
    with pytest.raises(RuntimeError, match=f"npu-smi lists process {os.getpid()} on none"):
        npu_generate_uuid()


def test_npu_without_its_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="npu-smi"):
        npu_generate_uuid()


def test_the_npu_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []
    module = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 8,
        mem_get_info=lambda: (1000, 2000),
        synchronize=lambda: calls.append("synchronize"),
        empty_cache=lambda: calls.append("empty_cache"),
    )
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    monkeypatch.setattr(torch, "npu", module, raising=False)
    monkeypatch.delenv("PS_DEVICE", raising=False)
    install_npu_smi(monkeypatch, tmp_path, npu=1, chips=2, chip=1)
    device = DeviceManager()
    assert (device.device_type, device.backend, device.is_accelerator) == ("npu", "hccl", True)
    assert device.device_module is module
    assert device.device_count() == 8
    assert device.identity(0) == f"NPU-{get_ip()}-3"
    assert device.free_memory() == 1000
    device.synchronize()
    device.release_cached_memory()
    assert calls == ["empty_cache", "synchronize", "empty_cache"]


# ---------------------------------------------------------------------- addresses of this host


def test_the_address_towards_a_host() -> None:
    assert get_ip("127.0.0.1") == "127.0.0.1"
    assert get_ip("localhost") in ("127.0.0.1", "::1")


def test_the_address_of_the_default_route() -> None:
    family = socket.AF_INET6 if ":" in get_ip() else socket.AF_INET
    assert socket.inet_pton(family, get_ip())


def test_a_host_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert get_ip() == "127.0.0.1"
    assert get_ip("10.1.2.3") == "127.0.0.1"


def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert get_ip("nowhere.invalid") == get_ip()


def test_processors_near_a_device(tmp_path: Path) -> None:
    (tmp_path / "0000:18:00.0").mkdir()
    (tmp_path / "0000:18:00.0" / "local_cpulist").write_text("0-2,8,10-11\n")
    (tmp_path / "0000:19:00.0").mkdir()
    (tmp_path / "0000:19:00.0" / "local_cpulist").write_text("\n")
    near = devices._cpus_of_pci_device
    assert near("0000:18:00.0", str(tmp_path)) == {0, 1, 2, 8, 10, 11}
    assert near("0000:19:00.0", str(tmp_path)) is None
    assert near("0000:1a:00.0", str(tmp_path)) is None


def test_all_of_torchs_cpu_module_is_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "of_a_later_torch", 1, raising=False)
    module = DeviceManager("cpu").device_module
    assert isinstance(module, ModuleType)
    assert module.of_a_later_torch == 1
    assert [name for name in dir(torch.cpu) if not hasattr(module, name)] == []
    assert set(dir(module)) >= {*dir(torch.cpu), "empty_cache", "mem_get_info"}
    assert not hasattr(torch.cpu, "empty_cache")
