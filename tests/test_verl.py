"""verl's own worker classes, from PyPI, with our backend on CPU: see ``verl_programs.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from packages import installed, unpacked
from torchrun import HERE, MOONCAKE_ADVICE, mooncake_works

RELEASE = os.environ.get("VERL_RELEASE", "0.9.1")
NEEDS = ["dill", "hf-xet", "httpcore2", "httpx2", "huggingface_hub", "psutil", "pillow", "regex"]
NEEDS += ["msgspec", "orjson", "pybase64", "tokenizers==0.23.2", "tqdm", "transformers==5.19.0"]
STAND_INS = "from stand_ins import stand_in_for\nstand_in_for(*'{}'.split())\n"
NAMES = "codetiming datasets hydra IPython omegaconf pandas peft pyarrow pylatexenc "
NAMES += "sentencepiece tensorboard tensordict torchdata torchvision truststore wandb"


@pytest.mark.alone
@pytest.mark.timeout(400)
def test_two_trainers_update_two_rollouts_three_times(tmp_path: Path) -> None:
    if not mooncake_works():
        pytest.skip(MOONCAKE_ADVICE)
    folders = [tmp_path / "site", HERE.parent, HERE, unpacked(f"verl=={RELEASE}", tmp_path)]
    folders.append(installed(NEEDS, tmp_path / "needs"))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(STAND_INS.format(NAMES))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "PS_DEVICE": "cpu",
        "RAY_worker_niceness": "0",
        "RAY_TMPDIR": "/tmp",  # Ray's sockets have short paths
    }
    output = tmp_path / "result.json"
    command = [sys.executable, str(HERE / "verl_programs.py"), str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result = json.loads(output.read_text())
    assert result["served"] == [True, True]
    assert "a planted fault" in result["failure"]
    metrics = ["checkpoint_engine/read_seconds", "checkpoint_engine/register_seconds"]
    assert result["metrics"] == [metrics] * 3
