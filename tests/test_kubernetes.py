"""The Kubernetes example, offline: against the schemas, against itself, and its two programs run
as the manifests say."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from torchrun import free_port_pair

EXAMPLES = Path(__file__).parents[1] / "examples"
FOLDER = EXAMPLES / "kubernetes"
sys.path.insert(0, str(EXAMPLES))

from demo import TP, Engine  # noqa: E402
from random_checkpoint import expected_digests, model_config, write_checkpoint  # noqa: E402

yaml = pytest.importorskip("yaml")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

OLDEST = "1.28"  # the pod-index label
DOCUMENTS = list(yaml.safe_load_all((FOLDER / "engines.yaml").read_text()))
SERVICE, SET = DOCUMENTS
POD = SET["spec"]["template"]["spec"]
ENGINE, SERVERS = POD["containers"]


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in container["env"]}


def mounts(container: dict[str, Any]) -> dict[str, str]:
    return {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}


def ports(container: dict[str, Any]) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container["ports"]}


@pytest.mark.parametrize("version", [OLDEST, "1.37"])
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["kind"])
def test_the_schemas_of_kubernetes(document: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def test_what_the_containers_share() -> None:
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert volumes.keys() == mounts(SERVERS).keys()
    for name in ("sockets", "shared-memory", "models"):
        assert mounts(ENGINE)[name] == mounts(SERVERS)[name]
    assert mounts(SERVERS)["shared-memory"] == "/dev/shm"
    assert volumes["shared-memory"]["emptyDir"]["medium"] == "Memory"
    assert "emptyDir" in volumes["sockets"]
    folder = mounts(SERVERS)["sockets"]
    assert environment(SERVERS)["PS_IPC_DIR"].startswith(f"{folder}/")
    assert environment(SERVERS)["SERVERS"] == folder
    assert POD["shareProcessNamespace"] is True
    assert {"runAsUser", "runAsGroup", "fsGroup"} <= POD["securityContext"].keys()
    assert ENGINE["image"] == SERVERS["image"]


def test_both_see_the_same_gpus() -> None:
    gpus = ENGINE["resources"]["limits"]["nvidia.com/gpu"]
    assert f"--tensor-parallel-size={gpus}" in ENGINE["args"]
    assert environment(SERVERS)["GPUS"] == str(gpus)
    assert environment(SERVERS)["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert "nvidia.com/gpu" not in SERVERS["resources"]["limits"]


def test_where_the_ranks_meet() -> None:
    variables = environment(SERVERS)
    name = SERVICE["metadata"]["name"]
    assert variables["MASTER_ADDR"] == f"{SET['metadata']['name']}-0.{SET['spec']['serviceName']}"
    assert SET["spec"]["serviceName"] == name
    assert SERVICE["spec"]["selector"] == SET["spec"]["template"]["metadata"]["labels"]
    assert SERVICE["spec"]["publishNotReadyAddresses"] is True
    listening = ports(ENGINE) | ports(SERVERS)
    assert listening["torchrun"] == int(variables["MASTER_PORT"])
    assert listening["store"] == int(variables["MASTER_PORT"]) + 1
    assert f"--port={listening['http']}" in ENGINE["args"]
    assert {p["targetPort"]: p["port"] for p in SERVICE["spec"]["ports"]} == listening
    assert variables["NODES"] == str(SET["spec"]["replicas"])


def test_what_kustomize_adds() -> None:
    added = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    (script,) = added["configMapGenerator"]
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert script["name"] == volumes["scripts"]["configMap"]["name"]
    assert all((FOLDER / file).is_file() for file in [*added["resources"], *script["files"]])
    (check,) = [part for part in SERVERS["readinessProbe"]["exec"]["command"] if "/" in part]
    assert check == f"{mounts(SERVERS)['scripts']}/{script['files'][0]}"
    assert {image["name"] for image in added["images"]} == {ENGINE["image"]}


@contextmanager
def sidecar(variables: dict[str, str], output: Path) -> Iterator[None]:
    """The parameter-server container's command, ``$(NAMES)`` filled in as Kubernetes does."""
    assert SERVERS["command"] == ["torchrun"]
    arguments = [re.sub(r"\$\((\w+)\)", lambda m: variables[m[1]], a) for a in SERVERS["args"]]
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    with output.open("wb") as file:
        process = subprocess.Popen(
            command,
            env={**os.environ, **variables},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def publish(variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FOLDER / "publish.py"), *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )


@pytest.mark.timeout(90)
def test_the_sidecar_and_publish(tmp_path: Path) -> None:
    """One pod of two CPU ranks: the paths are moved, the rest is as the manifest says."""
    model, step = tmp_path / "model", tmp_path / "step-7"
    write_checkpoint(model, model_config("small"), seed=1)
    write_checkpoint(step, model_config("small"), seed=2)
    first, second = expected_digests(model, TP), expected_digests(step, TP)
    for folder in (model, step):  # a file that the index leaves out
        save_file({"of no model": torch.ones(2)}, folder / "consolidated.safetensors")
    sockets = tmp_path / "s"
    sockets.mkdir(mode=0o700)
    variables = {
        name: value.replace(mounts(SERVERS)["sockets"], str(sockets))
        for name, value in environment(SERVERS).items()
        if name not in ("HOME", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES")
    }
    variables |= {"NODES": "1", "NODE_RANK": "0", "GPUS": str(TP), "MASTER_ADDR": "localhost"}
    variables |= {"MASTER_PORT": str(free_port_pair()), "PS_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH")])
    )
    log = tmp_path / "log"
    with Engine(model, "safetensors") as engine, sidecar(variables, log):
        engine.wait_until_healthy()
        while publish(variables, "--check").returncode != 0:  # as the probe does, again and again
            pass
        done = publish(variables, "step-7", str(step), f"--engine={engine.url}")
        assert done.returncode == 0, done.stderr + log.read_text()
        assert engine.call_workers("weights_digest") == second
        wrong = publish(variables, "step-8", str(step), "--engine=http://localhost:9")
        assert wrong.returncode != 0
        assert "is it up?" in wrong.stderr
        again = publish(variables, "step-9", str(model), f"--engine={engine.url}")
        assert again.returncode == 0, again.stderr + log.read_text()
        assert engine.call_workers("weights_digest") == first
        nowhere = publish(variables, "step-9", str(tmp_path / "none"))
        assert "there is no such folder" in nowhere.stderr
    assert [path.name for path in sockets.rglob("*.sock")] == []
