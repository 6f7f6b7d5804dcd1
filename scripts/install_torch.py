"""Install torch beside the python that runs this script: the CPU build where there is no GPU.

Usage: install_torch.py VERSION

Plain pip brings several GB of CUDA packages on most Linux machines. So we first ask what it would
bring; where that holds CUDA packages that this machine cannot use, uv chooses PyTorch's CPU build.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq"]
ANY_SUPPORTED = "torch>=2.5"


def main() -> None:
    if importlib.util.find_spec("torch") is not None:
        return
    requirements = [f"torch=={sys.argv[1]}", ANY_SUPPORTED]
    # Older releases of pip download every wheel just to resolve.
    run([*PIP, "install", "pip>=24"])
    if has_gpu():
        install(requirements, [*PIP, "install"])
    elif (requirement := first_without_cuda(requirements)) is not None:
        install([requirement], [*PIP, "install"])
    else:
        run([*PIP, "install", "uv"])
        uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable]
        install(requirements, [*uv, "--torch-backend", "cpu"])


def has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None and run(["nvidia-smi", "-L"], check=False)


def first_without_cuda(requirements: list[str]) -> str | None:
    """The first requirement for which plain pip brings no CUDA packages."""
    for requirement in requirements:
        names = resolve(requirement)
        if names and not any(name.startswith(("nvidia-", "cuda-")) for name in names):
            return requirement
    return None


def resolve(requirement: str) -> list[str]:
    """The distributions that plain pip would install; none if it finds no solution."""
    command = [*PIP, "install", "--dry-run", "--report", "-", requirement]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        return []
    items = json.loads(result.stdout)["install"]
    return [item["metadata"]["name"].lower().replace("_", "-") for item in items]


def install(requirements: list[str], command: list[str]) -> None:
    """Install the first requirement that can be had."""
    for requirement in requirements:
        print(f"Installing {requirement}", flush=True)
        if run([*command, requirement], check=False):
            return
    sys.exit(f"could not install any of {requirements} with {' '.join(command)}")


def run(command: list[str], check: bool = True) -> bool:
    quiet = subprocess.DEVNULL if command[0] == "nvidia-smi" else None
    return subprocess.run(command, check=check, stdout=quiet, stderr=quiet).returncode == 0


if __name__ == "__main__":
    main()
