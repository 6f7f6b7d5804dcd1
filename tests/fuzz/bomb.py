"""One input of one target, with little memory: ``bomb.py TARGET HEXADECIMAL``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import run
import targets

with run.little_memory():
    targets.check(targets.BY_NAME[sys.argv[1]], bytes.fromhex(sys.argv[2]))
targets.clean_up()
