"""The built wheel, installed into a virtual environment that has nothing else of this project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import checkpoint_engine

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "checkpoint_engine"

IMPORT_EVERYTHING = """
import importlib.util, json, pkgutil
import checkpoint_engine
BROUGHT = {"vllm": {"vllm"}, "verl": {"verl", "ray"}}  # by the program that imports the plug-in
names = [m.name for m in pkgutil.walk_packages(checkpoint_engine.__path__, "checkpoint_engine.")]
files = {"checkpoint_engine": checkpoint_engine.__file__}
for name in names:
    try:
        files[name] = importlib.import_module(name).__file__
    except ModuleNotFoundError as error:
        _, room, program = (name.split(".") + ["", ""])[:3]
        if room != "integrations" or error.name not in BROUGHT.get(program, ()):
            raise
        files[name] = importlib.util.find_spec(name).origin
print(json.dumps(files))
"""
IMPORT_WORKER = """
import json, sys
import checkpoint_engine.worker
print(json.dumps(sorted(sys.modules)))
"""


def run(*command: str | Path) -> str:
    """Its output. Apart from this checkout and whatever the caller's environment points to."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(word) for word in command], env=environment, cwd="/", capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@dataclass(frozen=True)
class Installed:
    """The wheel and the virtual environment that it was installed into."""

    wheel: Path
    venv: Path

    def python(self, program: str) -> str:
        return run(self.venv / "bin" / "python", "-I", "-c", program)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("packaging")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    venv = folder / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    python = venv / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    # The dependencies, which would take minutes and gigabytes to install once more.
    site_packages = next((venv / "lib").glob("python*/site-packages"))
    (site_packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    return Installed(wheel, venv)


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_bytes(archive.read(name))


def test_wheel_holds_every_source_file(installed: Installed) -> None:
    sources = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".html")]
    expected = {str(path.relative_to(ROOT)) for path in [*sources, PACKAGE / "py.typed"]}
    with zipfile.ZipFile(installed.wheel) as archive:
        names = archive.namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("/LICENCE") for name in names)


def test_metadata(installed: Installed) -> None:
    found = metadata(installed.wheel)
    assert found["Name"] == "checkpoint-engine"
    assert found["Version"] == checkpoint_engine.__version__
    assert found["Requires-Python"] == ">=3.10"
    required = [text for text in found.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert sorted(required) == [
        "click>=8.1",
        "fastapi",
        "httpx",
        "loguru",
        "numpy",
        "pydantic>=2.9",
        "pyzmq>=22",
        "safetensors",
        "torch>=2.5",
        "uvicorn",
    ]
    assert "mooncake-transfer-engine>=0.3.5; extra == 'p2p'" in found.get_all("Requires-Dist", [])


def test_every_module_imports_from_the_wheel(installed: Installed) -> None:
    files = json.loads(installed.python(IMPORT_EVERYTHING))
    sources = {path.relative_to(ROOT) for path in PACKAGE.rglob("*.py")}
    assert len(files) == len(sources)
    assert all(Path(file).is_relative_to(installed.venv) for file in files.values())


def test_worker_stays_cheap_to_import(installed: Installed) -> None:
    """It is imported inside every inference worker."""
    loaded = json.loads(installed.python(IMPORT_WORKER))
    unwanted = {"fastapi", "httpx", "uvicorn", "starlette", "mooncake", "checkpoint_engine.ps"}
    assert unwanted.isdisjoint(loaded)


def test_public_names_can_be_imported(installed: Installed) -> None:
    installed.python("from checkpoint_engine import *; ParameterServer, update_weights_from_ipc")


def test_console_script(installed: Installed) -> None:
    script = installed.venv / "bin" / "checkpoint-engine"
    assert "doctor" in run(script, "--help")
    assert "--uds PATH" in run(script, "serve", "--help")
    assert "--uds PATH" in run(installed.venv / "bin" / "python", "-m", "checkpoint_engine", "-h")
