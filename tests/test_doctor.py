from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from checkpoint_engine import __version__
from checkpoint_engine.cli import commands
from checkpoint_engine.ground import rdma
from checkpoint_engine.tools import doctor
from checkpoint_engine.tools.doctor import Finding
from checkpoint_engine.world.control import ControlPlane


def findings_of(check: object) -> list[Finding]:
    return doctor._run(check)  # type: ignore[arg-type]


def test_this_machine_is_examined_within_seconds() -> None:
    findings = doctor.examine()
    subjects = {finding.subject for finding in findings}
    assert {"libibverbs", "Mooncake", "memlock", "huge pages", "/dev/shm", "CPUs"} <= subjects
    assert any("GB/s" in finding.seen for finding in findings)
    for finding in findings:
        off = finding.level in ("warning", "broken")
        assert not off or (finding.cost and finding.mend), finding


def test_a_device_that_is_not_there_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_DEVICE", "abacus")
    (finding,) = findings_of(doctor._devices)
    assert finding.level == "broken"
    assert "abacus" in finding.seen


@pytest.fixture
def nics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel with one NIC that is up, one that is down; libibverbs sees both."""
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state)
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    usable = rdma.usable_devices
    monkeypatch.setattr(rdma, "SYSFS", str(tmp_path))
    monkeypatch.setattr(rdma, "usable_devices", lambda found: usable(found, str(tmp_path)))
    monkeypatch.setattr(rdma, "list_devices", lambda: (["mlx5_0", "mlx5_1"], []))
    monkeypatch.delenv(rdma.DEVICES_VARIABLE, raising=False)
    monkeypatch.delenv(rdma.HCA_VARIABLE, raising=False)
    return tmp_path


@pytest.mark.usefixtures("nics")
def test_nics_are_told_with_their_state() -> None:
    found = findings_of(doctor._nics)
    up = next(one for one in found if one.subject == "NIC mlx5_0")
    down = next(one for one in found if "mlx5_1" in one.seen)
    assert (up.level, down.level) == ("ok", "warning")
    assert "400 Gb/sec" in up.seen
    assert "port 1 is 1: DOWN" in down.seen


def test_a_nic_that_only_the_kernel_sees(nics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rdma, "list_devices", lambda: (["mlx5_0"], []))
    (unseen,) = [one for one in findings_of(doctor._nics) if one.subject == "NIC mlx5_1"]
    assert "/dev/infiniband" in unseen.mend


def test_a_missing_libibverbs_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise OSError("libibverbs.so.1: cannot open shared object file")

    monkeypatch.setattr(rdma, "_load_verbs", missing)
    found = next(one for one in findings_of(doctor._nics) if one.subject == "libibverbs")
    assert found.level == "warning"
    assert "P2P is off" in found.cost
    assert "libibverbs1" in found.mend


def test_a_memlock_limit_matters_where_there_is_rdma(
    nics: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 << 20, 8 << 20))
    (finding,) = findings_of(doctor._memory_limits)
    assert finding.level == "warning"
    assert "memlock=-1" in finding.mend


@pytest.mark.parametrize(
    ("limit", "level"),
    [("/sys/fs/cgroup/a/memory.max", "note"), ("MemAvailable of /proc/meminfo", "ok")],
)
def test_a_containers_memory_limit_is_noted(
    monkeypatch: pytest.MonkeyPatch, limit: str, level: str
) -> None:
    monkeypatch.setattr(doctor, "available_host_memory", lambda: (3 * 10**9, limit))
    (finding,) = findings_of(doctor._host_memory)
    assert (finding.level, finding.seen) == (level, f"3.0 GB available ({limit})")


@pytest.mark.parametrize(("near", "level"), [({0, 1, 2}, "ok"), ({6, 7}, "warning")])
def test_a_process_far_from_its_device(
    monkeypatch: pytest.MonkeyPatch, near: set[int], level: str
) -> None:
    manager = SimpleNamespace(device_count=lambda: 1, nearby_cpus=lambda index: near)
    monkeypatch.setattr(doctor, "DeviceManager", lambda device_type: manager)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    cpus, device = findings_of(doctor._affinity)
    assert cpus.level == "ok"
    assert device.level == level
    assert bool(device.mend) == (level == "warning")


def test_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=64 << 20, used=0, free=64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    (finding,) = findings_of(doctor._shared_memory)
    assert finding.level == "warning"
    assert "--shm-size" in finding.mend


def test_devices_without_peer_access(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: {a, b} != {0, 2})
    (finding,) = findings_of(doctor._peers)
    assert (finding.level, finding.seen) == ("note", "not between 0-2, 2-0")
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    (finding,) = findings_of(doctor._peers)
    assert (finding.level, finding.seen) == ("ok", "between all 3 devices")


def test_mooncake_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda *names: None)
    (finding,) = findings_of(doctor._mooncake)
    assert finding.level == "warning"
    wheel = "mooncake-transfer-engine" + ("" if torch.cuda.is_available() else "-non-cuda")
    assert finding.mend == f"pip install {wheel}"


def test_a_mooncake_for_cuda_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "mooncake.engine":
                raise ImportError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(doctor, "_installed", lambda *names: SimpleNamespace(version="1"))
    monkeypatch.delitem(sys.modules, "mooncake.engine", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    (finding,) = findings_of(doctor._mooncake)
    assert (finding.level, "libcudart.so.12" in finding.seen) == ("warning", True)
    assert "pip install mooncake-transfer-engine-non-cuda" in finding.mend


def test_where_p2p_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_P2P_HOST", "127.0.0.1")
    (finding,) = findings_of(doctor._p2p_exposure)
    assert (finding.level, "127.0.0.1" in finding.seen) == ("ok", True)
    monkeypatch.delenv("PS_P2P_HOST")
    monkeypatch.setattr(ControlPlane, "reachable_ip", lambda control: "8.8.8.8")
    (finding,) = findings_of(doctor._p2p_exposure)
    assert (finding.level, "PS_P2P_HOST" in finding.mend) == ("warning", True)
    monkeypatch.setenv("PS_P2P", "off")
    (finding,) = findings_of(doctor._p2p_exposure)
    assert (finding.level, finding.seen) == ("ok", "PS_P2P=off: nothing listens")


def test_ports_that_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert findings_of(doctor._ports) == []
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("PS_LIVENESS_PORT", str(port))
        (finding,) = findings_of(doctor._ports)
        assert (finding.level, finding.subject) == ("warning", "PS_LIVENESS_PORT")
        monkeypatch.setenv("MASTER_PORT", str(port - 1))
        monkeypatch.delenv("PS_LIVENESS_PORT")
        (finding,) = findings_of(doctor._ports)
        assert (finding.level, finding.subject) == ("warning", "MASTER_PORT + 1")
        assert "in use" in finding.seen
    (finding,) = findings_of(doctor._ports)
    assert (finding.level, finding.seen) == ("ok", f"port {port}")


def test_where_the_sockets_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "sockets"
    monkeypatch.setenv("PS_IPC_DIR", str(folder))
    (finding,) = findings_of(doctor._sockets)
    assert (finding.level, finding.seen) == ("ok", f"in {folder}")
    assert not folder.exists()  # it changes nothing
    folder.mkdir()
    folder.chmod(0o777)
    (finding,) = findings_of(doctor._sockets)
    assert (finding.level, "other users may write" in finding.seen) == ("broken", True)
    monkeypatch.setenv("PS_IPC_DIR", str(tmp_path / ("x" * 100)))
    (finding,) = findings_of(doctor._sockets)
    assert (finding.level, "longer than 107 bytes" in finding.seen) == ("broken", True)
    monkeypatch.setenv("PS_IPC_ABSTRACT", "1")
    (finding,) = findings_of(doctor._sockets)
    assert finding.level == "note"


def test_a_second_copy_of_this_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(doctor.__file__).parents[2])])
    (finding,) = findings_of(doctor._copies)
    assert finding.level == "ok"
    other = tmp_path / "checkpoint_engine" / "__init__.py"
    other.parent.mkdir()
    other.touch()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (finding,) = findings_of(doctor._copies)
    assert (finding.level, str(other.parent) in finding.seen) == ("warning", True)


def test_a_slow_copy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_copy_rate", lambda device: 1.5)
    (finding,) = findings_of(doctor._copy_rates)
    assert (finding.level, finding.seen.split()[0]) == ("warning", "1.5")


def test_a_check_that_fails_is_a_finding_and_the_others_go_on() -> None:
    def _broken_thing() -> Iterator[Finding]:
        yield Finding("ok", "first", "seen")
        raise OSError("no such file")

    (finding,) = findings_of(_broken_thing)
    assert finding.subject == "broken thing"
    assert "no such file" in finding.seen


# ---------------------------------------------------------------------- the command


def run_doctor(
    monkeypatch: pytest.MonkeyPatch, *options: str, found: list[Finding]
) -> tuple[int, str]:
    monkeypatch.setattr(doctor, "examine", lambda measure: found)
    result = CliRunner().invoke(commands, ["doctor", *options])
    return result.exit_code, result.stdout


WARNING = Finding("warning", "Mooncake", "not installed", "P2P is off", "pip install it")
BROKEN = Finding("broken", "device", "none", "nothing starts", "buy one")


@pytest.mark.parametrize(
    ("found", "options", "code"),
    [([], [], 0), ([WARNING], [], 0), ([WARNING], ["--strict"], 1), ([WARNING, BROKEN], [], 1)],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, found: list[Finding], options: list[str], code: int
) -> None:
    assert run_doctor(monkeypatch, *options, found=found)[0] == code


def test_it_says_what_it_costs_and_how_to_mend_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _, text = run_doctor(monkeypatch, found=[WARNING])
    assert "costs: P2P is off" in text
    assert "mend:  pip install it" in text


def test_json(monkeypatch: pytest.MonkeyPatch) -> None:
    _, text = run_doctor(monkeypatch, "--json", found=[WARNING])
    assert json.loads(text) == {"healthy": True, "findings": [vars(WARNING)]}


@pytest.mark.parametrize(
    ("version", "has_plugins", "level"),
    [
        (__version__, True, "ok"),
        (__version__, False, "note"),
        ("0.1.2", True, "note"),
    ],
)
def test_which_implementation_engines_load(
    monkeypatch: pytest.MonkeyPatch, version: str, has_plugins: bool, level: str
) -> None:
    ours = "checkpoint_engine.integrations.vllm:register"
    points = [EntryPoint("checkpoint_engine", ours, "vllm.general_plugins")]
    installed = SimpleNamespace(version=version, entry_points=points if has_plugins else [])
    monkeypatch.setattr(doctor, "_installed", lambda *names: installed)
    (finding,) = findings_of(doctor._implementation)
    assert finding.level == level
    assert f"installed: {version}, plug-ins: " in finding.seen
    assert ("vllm.general_plugins" in finding.seen) == has_plugins
