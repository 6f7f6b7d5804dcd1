"""The original's own tests, as its releases have them, with this package in its place.

    python tests/originals/run.py [--release 0.4.2 ...]

Takes each release's source from the package index, and runs those of its tests that need no GPU,
unmodified, in a folder of their own. Prints a line per release; fails if a test fails.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from packages import PIP  # noqa: E402  (found by the line above)

RELEASES = {"0.1.3": False, "0.2.3": True, "0.3.4": True, "0.4.2": True}
"""The last of each line, and whether it has tests that need no GPU."""
SECONDS = 120  # that one release may take
_NOTHING_RAN = 5  # pytest's exit code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--release", nargs="*", default=list(RELEASES))
    good = [_run(release) for release in parser.parse_args().release]
    return 0 if all(good) else 1


def _run(release: str) -> bool:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tests = _unpacked(release, folder)
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*command, str(tests)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    last = done.stdout.strip().rpartition("\n")[2]
    print(f"{release}: {last}", flush=True)
    expected = 0 if RELEASES.get(release, True) else _NOTHING_RAN
    if done.returncode != expected or (expected == 0 and not re.search(r"\d+ passed", last)):
        print(done.stdout, done.stderr, sep="\n")
        return False
    return True


def _unpacked(release: str, folder: Path) -> Path:
    """The tests alone: their ``checkpoint_engine`` must not be found."""
    name = "checkpoint-engine"
    command = [*PIP, "download", "--no-deps", "--no-binary", name, "-d", str(folder)]
    subprocess.run([*command, f"{name}=={release}"], check=True, timeout=SECONDS)
    (source,) = folder.glob("*.tar.gz")
    tests = folder / "tests"
    tests.mkdir()
    with tarfile.open(source) as archive:
        for member in archive.getmembers():
            content = archive.extractfile(member)
            if content is not None and re.fullmatch(r"[^/]+/tests/\w+\.py", member.name):
                (tests / Path(member.name).name).write_bytes(content.read())
    return tests


if __name__ == "__main__":
    sys.exit(main())
