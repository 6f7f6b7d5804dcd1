"""Certifies tiny models of many architectures and writes ``docs/certified.md``: ``make certify``.

certify_all.py [--only NAME ...] [--page FILE] [--certificates FOLDER]
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
    parser.add_argument("--only", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--page", type=Path)
    parser.add_argument("--certificates", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0, help="that one model may take")
    options = parser.parse_args()
    rows = []
    with CommandStarter() as starter:
        for name in options.only:
            for size in MODELS[name].sizes:
                rows.append(_row(starter, name, size, options))
    if options.page is not None:
        options.page.write_text(page(rows))
    return 0 if all(row["exit_code"] in (0, 1) for row in rows) else 1


def _row(
    starter: CommandStarter, name: str, size: int, options: argparse.Namespace
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        model = write(name, Path(folder) / name)
        row = certify(starter, model, size, Path(folder), seconds=options.seconds)
        seconds = time.monotonic() - began
    print(f"{name} tp {size}: {row['result']}, {seconds:.1f} s {row.get('reason', '')}", flush=True)
    if row["result"] == "failed":
        print(row["output"][-4000:], starter.output(), file=sys.stderr)
    if (certificates := options.certificates) is not None:
        certificates.mkdir(exist_ok=True)
        told = {key: value for key, value in row.items() if key != "output"}
        (certificates / f"{name}-tp{size}.json").write_text(json.dumps(told, indent=1))
        (certificates / f"{name}-tp{size}.txt").write_text(row["output"])
    return {**row, "name": name, "size": size}


def page(rows):
    return ""


if __name__ == "__main__":
    sys.exit(main())
