"""Certifies tiny models of many architectures and writes ``docs/certified.md``: ``make certify``.

certify_all.py --certificates FOLDER [--only NAME ...] [--page FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from certified_models import MODELS, write
from command_starter import CommandStarter

ENGINE_ARGS = "--enforce-eager --max-model-len 128 --num-gpu-blocks-override 16 --max-num-seqs 8"


def certify(
    starter: CommandStarter,
    model: Path,
    size: int,
    folder: Path,
    arguments: str = ENGINE_ARGS,
    seconds: float = 200.0,
) -> dict[str, Any]:
    """The certificate that ``checkpoint-engine certify`` writes of ``model``, and how it ended:
    ``exit_code`` and ``output``."""
    path, output = folder / "certificate.json", folder / "output"
    path.unlink(missing_ok=True)
    command = ["certify", str(model), f"--tp={size}", f"--engine-args={arguments}"]
    command += [f"--certificate={path}", f"--timeout={seconds}"]
    code = starter.run(command, output, seconds)
    printed = output.read_text(errors="replace")
    told = json.loads(path.read_text()) if path.exists() else {"result": "failed"}
    return {**told, "exit_code": code, "output": printed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--only", nargs="*", choices=MODELS, default=list(MODELS), help="models to certify")
    add("--certificates", type=Path, required=True, help="folder to keep the certificates in")
    add("--page", type=Path, help="write a page of all certificates of that folder")
    add("--on-gpus", type=Path, help="folder of the certificates of GPUs, for the page")
    add("--seconds", type=float, default=600.0, help="that one model may take")
    add("--engine-args", default=ENGINE_ARGS, help="of the engine")
    options = parser.parse_args()
    options.certificates.mkdir(exist_ok=True, parents=True)
    cases = [(name, size) for name in options.only for size in MODELS[name].sizes]
    results = set()
    if cases:
        with CommandStarter() as starter:
            results = {_certify(starter, name, size, options) for name, size in cases}
    if options.page is not None:
        options.page.write_text(page(read(options.certificates), read(options.on_gpus)))
    return 1 if "failed" in results else 0


def _certify(starter: CommandStarter, name: str, size: int, options: argparse.Namespace) -> str:
    """The result; the certificate and what the command printed are in the folder then."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        model = write(name, Path(folder) / name)
        told = certify(starter, model, size, Path(folder), options.engine_args, options.seconds)
        seconds = time.monotonic() - began
    result, output = str(told["result"]), told.pop("output")
    print(f"{name} tp {size}: {result}, {seconds:.1f} s {told.get('reason', '')}", flush=True)
    path = options.certificates / f"{name}-tp{size}.json"
    path.write_text(json.dumps(told, indent=1) + "\n")
    path.with_suffix(".txt").write_text(f"{output}\n{starter.output()}")
    return result


Certificates = dict[tuple[str, int], dict[str, Any]]


def read(folder: Path | None) -> Certificates:
    """By model and tensor-parallel size."""
    found = {}
    for name, tiny in MODELS.items():
        for size in tiny.sizes:
            path = (folder or Path("/nowhere")) / f"{name}-tp{size}.json"
            if path.exists():
                found[name, size] = json.loads(path.read_text())
    return found


HEAD = """# Certified models

Written by `make certify`: `checkpoint-engine certify` of tiny random models, made by transformers
with the configuration, names and shapes of each architecture. Every update is compared with a fresh
start from the same files: all parameters and buffers bit for bit, tokens and log probabilities.
[Certify](how-to/certify.md) does the same with a model of yours.

**right**: every update left the engine as a fresh start does. **differs**: one did not, and the row
says where. **refused**: the engine does not start, or refuses updates; the row has its words.
**held**: the most that a worker held in any update of incomplete layers, beside what the
engine computes with, of the bytes that arrived. Each model is updated in one bucket, and in many.

| model | architecture | quantisation | TP | CPU | GPU | held | loaded | to be known |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def page(on_cpus: Certificates, on_gpus: Certificates) -> str:
    """The table, and on what it was made."""
    lines = []
    for name, tiny in MODELS.items():
        for size in tiny.sizes:
            lines.append(_line(name, size, on_cpus.get((name, size)), on_gpus.get((name, size))))
    made = {_made(one) for one in (*on_cpus.values(), *on_gpus.values()) if "engine" in one}
    text = HEAD + "\n".join(lines) + "\n\nMade with:\n\n"
    return text + "".join(f"- {one}\n" for one in sorted(made))


def _line(name: str, size: int, cpu: dict[str, Any] | None, gpu: dict[str, Any] | None) -> str:
    any_: dict[str, Any] = cpu or gpu or {}
    model = any_.get("model", {})
    updates = any_.get("updates", [])
    loaded = ", ".join(dict.fromkeys(how for one in updates for how in one["loaded"]))
    notes = dict.fromkeys(reason for one in updates for reason in one["reasons"])
    said = [one["reason"] for one in (cpu, gpu) if one and one.get("reason")]
    cells = [name, model.get("architecture", ""), model.get("quantisation") or "none", str(size)]
    cells += [one["result"] if one else "not run" for one in (cpu, gpu)]
    held = max((one.get("held_share", 0.0) for one in updates), default=0.0)
    cells += [f"{held:.0%}" if updates else "", loaded, "; ".join([*said, *notes])]
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def _made(certificate: dict[str, Any]) -> str:
    engine, versions = certificate["engine"], certificate["versions"]
    made = f"{engine['engine']} {engine['version']} on {engine['device']}"
    return f"{made}, torch {versions['torch']}, Python {versions['python']}"


if __name__ == "__main__":
    sys.exit(main())
