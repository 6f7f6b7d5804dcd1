"""The main job, from end to end: new weights into a running tensor-parallel engine, twice.

    python examples/demo.py [--size small] [--keep]

It starts the engine with dummy weights, writes a checkpoint, has two parameter-server ranks send it
into the engine's workers, and does the same with a second checkpoint, as the next training step
would. After each it compares every shard of every worker with its slice of the files, and the
tokens that the engine generates with those of a second engine, which loads the files itself. Exit
code 0: all equal, and nothing left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import httpx

from checkpoint_engine.ground.sockets import free_port_pair
from random_checkpoint import (
    SIZES,
    expected_digests,
    model_config,
    tensor_shapes,
    write_checkpoint,
)

EXAMPLES = Path(__file__).parent
SHARED_MEMORY = Path("/dev/shm")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TP = 2
PROMPT = [11, 22, 33, 44]
MAX_TOKENS = 8
UPDATE_DEFAULTS = {
    "PS_MAX_BUCKET_SIZE_GB": "0.125",
    "OMP_NUM_THREADS": "1",
    "LOGURU_FORMAT": "{message}",
    "LOGURU_LEVEL": "INFO",
}
TIMEOUT = 120.0
STOP_TIMEOUT = 40.0  # torchrun gives its ranks 30 s to go

_children: list[subprocess.Popen[str]] = []


class HasUrl(Protocol):
    """An engine that listens somewhere."""

    url: str


class Engine:
    """A mini_engine.py of our own, for as long as the ``with`` block lasts."""

    def __init__(self, model: Path, load_format: str, tp: int = TP) -> None:
        command = [sys.executable, str(EXAMPLES / "mini_engine.py"), f"--model={model}"]
        command += [f"--tp={tp}", "--port=0", f"--load-format={load_format}"]
        self.process = start(command)
        self._http = httpx.Client(trust_env=False, timeout=TIMEOUT)
        self.url = ""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.close()
        stop(self.process)

    def wait_until_healthy(self) -> None:
        """Raises RuntimeError if the engine does not come up."""
        deadline = time.monotonic() + TIMEOUT
        if (stdout := self.process.stdout) and select.select([stdout], [], [], TIMEOUT)[0]:
            self.url = stdout.readline().strip()
        while self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if self._http.get(f"{self.url}/health").is_success:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"the engine did not start, its exit code is {self.process.poll()}")

    def generate(self) -> list[int]:
        """The tokens that the engine's weights give after the prompt."""
        body = {"prompt_token_ids": PROMPT, "max_tokens": MAX_TOKENS}
        tokens: list[int] = self._post("generate", body)["token_ids"]
        return tokens

    def call_workers(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker; returns their results in rank order."""
        body = {"method": method, "args": args}
        results: list[Any] = self._post("collective_rpc", body)["results"]
        return results

    def _post(self, route: str, body: dict[str, Any]) -> Any:
        response = self._http.post(f"{self.url}/{route}", json=body)
        if not response.is_success:
            raise RuntimeError(f"the engine answered {response.status_code}: {response.text}")
        return response.json()


def start(command: list[str], **options: Any) -> subprocess.Popen[str]:
    """A child in a session of its own: Ctrl-C reaches this process alone, which ends the others."""
    options = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True, **options}
    with _signals_deferred():  # one that came within Popen would leave a child that nobody knows
        process = subprocess.Popen(command, **options)
        _children.append(process)
    return process


@contextlib.contextmanager
def _signals_deferred() -> Iterator[None]:
    came: list[int] = []
    handlers = {n: signal.signal(n, lambda number, _: came.append(number)) for n in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def stop(process: subprocess.Popen[str], seconds: float = STOP_TIMEOUT) -> None:
    """The engine and torchrun both take SIGINT as the end and see to their own children."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


class Account:
    """What is printed: a line per step, with seconds, bytes and rate where they say something."""

    def __init__(self) -> None:
        self.failures = 0

    def line(self, label: str, text: str, seconds: float | None = None, size: int = 0) -> None:
        """``size`` is in bytes."""
        figures = "" if seconds is None else f"{seconds:6.2f} s"
        if seconds and size:
            figures += f" {size / 1e9:6.2f} GB {size / 1e9 / seconds:6.2f} GB/s"
        print(f"  {label:<10} {text:<64}{figures}".rstrip(), flush=True)

    def relay(self, text: str) -> None:
        """What another program printed."""
        for part in textwrap.wrap(text, 88) or [""]:
            self.line("", f"| {part}")

    def verdict(self, equal: bool, text: str, seconds: float | None = None) -> None:
        """Something that has to be so."""
        self.failures += not equal
        self.line("PASS" if equal else "FAIL", text, seconds)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self._start


def push(account: Account, checkpoint: Path, engine: HasUrl, device: str) -> None:
    """Run ``examples/update.py`` under torchrun: one parameter-server rank for each worker.

    Raises:
        RuntimeError: it failed, or took longer than ``TIMEOUT`` seconds.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--master-addr=127.0.0.1"]
    command += [f"--master-port={free_port_pair()}", f"--nproc-per-node={TP}"]
    command += [f"--log-dir={checkpoint.parent}"]
    command += [str(EXAMPLES / "update.py")]
    command += [f"--checkpoint-path={checkpoint}", f"--checkpoint-name={checkpoint.name}"]
    command += [f"--endpoint={engine.url}", f"--inference-parallel-size={TP}"]
    command += ["--update-method=broadcast"]
    environment = {**UPDATE_DEFAULTS, **os.environ, "PS_DEVICE": device}
    process = start(command, stderr=subprocess.STDOUT, env=environment)
    overdue = threading.Timer(TIMEOUT, process.send_signal, [signal.SIGINT])
    overdue.start()
    try:
        for text in process.stdout or ():
            account.relay(text)
        process.wait()
    finally:
        overdue.cancel()
        stop(process)
    if process.returncode != 0:
        raise RuntimeError(f"update.py ended with exit code {process.returncode}")


def check(account: Account, checkpoint: Path, engine: Engine, direct: Engine) -> list[int]:
    """Does ``engine`` hold this checkpoint, and generate what ``direct`` does? Returns the tokens.

    ``direct`` loads the files itself, through its ordinary loader.
    """
    clock = Stopwatch()
    found, expected = engine.call_workers("weights_digest"), expected_digests(checkpoint, TP)
    count = len(expected[0])
    account.verdict(
        found == expected, f"{TP} x {count} shards equal their slices of the files", clock()
    )
    clock = Stopwatch()
    tokens = engine.generate()
    account.line("tokens", " ".join(map(str, tokens)), clock())
    clock = Stopwatch()
    direct.call_workers("load_checkpoint", str(checkpoint))
    same = direct.generate() == tokens
    account.verdict(same, "the tokens are those of an engine that loaded the files", clock())
    return tokens


def run(account: Account, size: str, folder: Path, keep: bool) -> None:
    """Start the engine, then twice: write a checkpoint, send it, check."""
    config = model_config(size)
    model = _config_only(folder / "model", config)
    clock = Stopwatch()
    with Engine(model, "dummy") as engine, Engine(model, "dummy") as direct:
        engine.wait_until_healthy()
        direct.wait_until_healthy()
        device = engine.call_workers("describe")[0]["device"]
        text = f"one to update, one to compare, each with {TP} workers on {device}"
        account.line("engines", text, clock())
        clock = Stopwatch()
        answers = [engine.generate()]
        account.line("tokens", " ".join(map(str, answers[0])), clock())
        for checkpoint in (folder / "step-1", folder / "step-2"):
            print(f"\n{checkpoint.name}")
            clock = Stopwatch()
            written = write_checkpoint(checkpoint, config, seed=len(answers))
            text = f"{len(tensor_shapes(config))} tensors in 4 files"
            account.line("checkpoint", text, clock(), written)
            clock = Stopwatch()
            push(account, checkpoint, engine, device)
            account.line("update", f"torchrun --nproc-per-node {TP} examples/update.py", clock())
            answers.append(check(account, checkpoint, engine, direct))
            if not keep:
                shutil.rmtree(checkpoint)
    different = len({tuple(tokens) for tokens in answers}) == len(answers)
    account.verdict(different, "other weights, other tokens")


def _config_only(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@contextlib.contextmanager
def workplace(account: Account, keep: bool) -> Iterator[Path]:
    """A folder for files and sockets; at the end it is removed, and so is whatever still runs."""
    folder = Path(tempfile.mkdtemp(prefix="ps-demo-"))
    sockets = folder / "sockets"
    sockets.mkdir(mode=0o700)
    os.environ["PS_IPC_DIR"] = str(sockets)  # also tells our processes from others
    segments = set(SHARED_MEMORY.iterdir())
    try:
        yield folder
    finally:
        for process in _children:
            stop(process)
        processes = _processes_with(str(sockets))
        left = [*processes, *sockets.iterdir(), *abandoned(segments)]
        account.verdict(not left, f"left behind: {', '.join(map(str, left)) or 'nothing'}")
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if keep:
            print(f"kept {folder}")
        else:
            shutil.rmtree(folder)


def _processes_with(value: str) -> list[int]:
    """The other processes that have ``value`` in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if value.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


def abandoned(before: set[Path]) -> list[Path]:
    """Shared memory made since ``before`` that no process maps: others may be at work here too."""
    inodes = {}
    for segment in set(SHARED_MEMORY.iterdir()) - before:
        with contextlib.suppress(FileNotFoundError):
            inodes[segment.stat().st_ino] = segment
    for path in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            for line in path.read_text().splitlines():
                inodes.pop(int(line.split()[4]), None)
    return list(inodes.values())


def _interrupt(number: int, frame: FrameType | None) -> None:
    for signal_number in SIGNALS:  # what follows cleans up, and is not to be interrupted
        signal.signal(signal_number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="Update a running engine's weights, and check.")
    parser.add_argument("--size", choices=SIZES, default="full", help="full: 1 GB, small: 8 MB")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints on the disk")
    args = parser.parse_args()
    return perform(
        f"Checkpoint to running engine, {TP} parameter-server ranks to {TP} workers, twice",
        lambda account, folder: run(account, args.size, folder, args.keep),
        args.keep,
    )


def perform(title: str, play: Callable[[Account, Path], None], keep: bool) -> int:
    """``play`` in a folder of its own, with an account of what happens; returns the exit code."""
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    account, clock = Account(), Stopwatch()
    print(f"{title}\n")
    try:
        with workplace(account, keep) as folder:
            play(account, folder)
    except (RuntimeError, OSError, httpx.HTTPError) as error:
        account.verdict(False, str(error))
    except KeyboardInterrupt:
        account.verdict(False, "interrupted")
    outcome = f"{account.failures} failures" if account.failures else "all passed"
    print(f"\n{outcome}, {clock():.1f} s")
    return 1 if account.failures else 0


if __name__ == "__main__":
    sys.exit(main())
