"""Fuzz every target, each in a process of its own, and print how many inputs it took and survived.

    python tests/fuzz/run.py [--count 100000] [--target NAME ...]

Guided by coverage where ``atheris`` can be imported (``pip install atheris``), by a seeded mutation
otherwise. An input that a target must not fail on is kept in the folder that ``--keep`` names.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
SECONDS_PER_INPUT = 10
EXTRA_BYTES = 1 << 30
"""What all inputs of a target together may add to the process's memory."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", action="append")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        fuzz(args.worker, args.count, args.seed)
        return
    sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
    import targets

    names = args.target or [target.name for target in targets.TARGETS]
    how = "coverage-guided (atheris)" if has_atheris() else f"mutations, seed {args.seed}"
    print(f"{args.count} inputs each, {how}")
    print(f"{'target':<20} {'inputs':>8} {'seconds':>8}  result")
    with ThreadPoolExecutor(max(1, multiprocessing.cpu_count())) as pool:
        good = list(pool.map(lambda name: show(name, args), names))
    failed = [name for name, passed in zip(names, good, strict=True) if not passed]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def show(name: str, args: argparse.Namespace) -> bool:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        environment = {**os.environ, "FUZZ_FOLDER": folder}
        command = [sys.executable, __file__, "--worker", name]
        command += ["--count", str(args.count), "--seed", str(args.seed)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        failures = [path for path in Path(folder).glob("*-*") if path.is_file()]
        if done.returncode:
            args.keep.mkdir(exist_ok=True)
            for path in failures:
                (args.keep / f"{name.replace(' ', '_').replace('/', '_')}-{path.name}").write_bytes(
                    path.read_bytes()
                )
    # libFuzzer's own timer may still strike while Python ends, after the last input.
    good = done.returncode == 0 or (
        f"Done {args.count} in" in done.stderr
        and done.returncode == -signal.SIGALRM
        and not failures
    )
    seconds = time.monotonic() - began
    print(f"{name:<20} {args.count:>8} {seconds:>8.1f}  {'ok' if good else 'FAILED'}", flush=True)
    if not good:
        print((done.stdout + done.stderr)[-4000:], flush=True)
    return good


def has_atheris() -> bool:
    try:
        import atheris  # noqa: F401
    except ImportError:
        return False
    return True


def fuzz(name: str, count: int, seed: int) -> None:
    """One target, in this process."""
    sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
    if has_atheris():
        guided(name, count, seed)
    else:
        import mutate
        import targets

        target = targets.BY_NAME[name]
        with little_memory():
            for data in mutate.inputs(target.seeds, count, seed):
                run_one(target, data)
        targets.clean_up()


def guided(name: str, count: int, seed: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["checkpoint_engine"]):
        import targets
    target = targets.BY_NAME[name]
    corpus = Path("corpus")
    corpus.mkdir()
    for number, data in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(data)
    import mutate

    # Half of them by what knows the formats, so that coverage guides from more than the seeds.
    for number, data in enumerate(mutate.inputs(target.seeds, 200, seed)):
        (corpus / f"m{number}").write_bytes(data)
    arguments = [
        f"-atheris_runs={count}",
        f"-seed={seed}",
        "-max_len=16384",
        f"-timeout={SECONDS_PER_INPUT}",
        f"-rss_limit_mb={(EXTRA_BYTES >> 20) + 2048}",
        f"-malloc_limit_mb={EXTRA_BYTES >> 20}",
    ]
    atheris.Setup([sys.argv[0], *arguments, str(corpus)], lambda data: targets.check(target, data))
    atheris.Fuzz()


def run_one(target: object, data: bytes) -> None:
    """Kept where it fails; a hang ends with SIGALRM."""
    import targets

    signal.alarm(SECONDS_PER_INPUT)
    try:
        targets.check(target, data)  # type: ignore[arg-type]
    except BaseException:
        Path(f"crash-{abs(hash(data)):x}").write_bytes(data)
        raise
    finally:
        signal.alarm(0)


class little_memory:  # noqa: N801
    """Memory for what is there and ``EXTRA_BYTES``: an allocation out of proportion fails."""

    def __enter__(self) -> None:
        self._kept = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + EXTRA_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, self._kept[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self._kept)


if __name__ == "__main__":
    main()
