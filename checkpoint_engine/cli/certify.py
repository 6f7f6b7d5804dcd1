"""``checkpoint-engine certify``: whether updates of a model in an engine are right, by trying."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from checkpoint_engine.cli.output import FAILED, SECONDS, Shown, shown

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command(short_help="Prove that updates leave an engine as a fresh start does.")
@click.argument("model", type=_FOLDER)
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True,
              help="Tensor-parallel size.")  # fmt: skip
@click.option("--engine", default="vllm", show_default=True, metavar="ADAPTER",
              help="vllm, in this process; server, a program with vLLM's HTTP interface; or an "
              "adapter of your own: module:Class or path.py:Class.")  # fmt: skip
@click.option("--engine-args", default="", metavar="TEXT",
              help="For vllm: options of `vllm serve`. For server: the command that starts it, "
              "with {model}, {load_format}, {tp}, {port} and {extension}.")  # fmt: skip
@click.option("--other-checkpoint", type=_FOLDER, metavar="PATH",
              help="Another checkpoint of the model. Default: one is made of the first, in "
              "TMPDIR.")  # fmt: skip
@click.option("--certificate", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Write the certificate, JSON, to it.")  # fmt: skip
@click.option("--timeout", type=SECONDS, default=1800.0, show_default=True, metavar="SECONDS",
              help="For each update and request, and for a server to start.")  # fmt: skip
@shown
def certify(
    model: Path,
    tp: int,
    engine: str,
    engine_args: str,
    other_checkpoint: Path | None,
    certificate: Path | None,
    timeout: float,
) -> Shown:
    """Prove that updates of MODEL, a folder, leave an engine as a fresh start does.

    Starts the engine from the files of two checkpoints and notes every parameter and buffer, and
    what it generates; starts it with dummy weights, updates it to one, to the other and back, in
    small buckets and in one, learned, replayed and plain; compares.

    Ends with 0 if all is equal, with 1 if something differs or the engine refuses, with 2 for
    wrong usage.
    """
    from checkpoint_engine.certify.certify import Order
    from checkpoint_engine.certify.certify import certify as run
    from checkpoint_engine.certify.engine import OrderError

    def tell(text: str) -> None:
        click.echo(f"certify: {text}", err=True)

    try:
        order = Order(model, other_checkpoint, engine, tp, engine_args, timeout)
        with _stdout_to_stderr(), _cleanup_at_sigterm():
            found = run(order, tell if sys.stderr.isatty() else lambda _: None)
    except OrderError as error:
        raise click.UsageError(str(error)) from error
    told = found.as_dict()
    if certificate is not None:
        certificate.write_text(json.dumps(told, indent=1) + "\n")
    return Shown(told, found.table(), 0 if found.result == "right" else FAILED)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Engines and their libraries print, and stdout is for the result."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def _cleanup_at_sigterm() -> Iterator[None]:
    """SIGTERM, of ``timeout`` or a batch system, ends the run as Ctrl-C does: the engine is closed,
    and the temporary folder, which is as large as the model, is removed."""
    kept = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, kept)
