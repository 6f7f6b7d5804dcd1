"""``checkpoint-engine``: serve, ask a running service, plan without a GPU, look at a machine,
certify an engine.

Exit codes: 0 done; 1 it failed, ``doctor`` found something broken, or
``certify`` something that is not right; 2 wrong usage; 3 a server
does not answer; 4 it is busy. With ``--json`` every command but ``serve`` writes one JSON document
to stdout, and a failure writes ``{"error": {"code", "message", "cause", "hint"}}``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from checkpoint_engine.cli.certify import certify
from checkpoint_engine.cli.doctor import doctor
from checkpoint_engine.cli.output import Commands
from checkpoint_engine.cli.plan import plan
from checkpoint_engine.cli.serve import serve
from checkpoint_engine.cli.service import cancel, metas, register, status, unregister, update


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="checkpoint-engine")
def commands() -> None:
    """Move new weights into running inference engines.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a server does not answer, 4 busy.

    Completion for bash: eval "$(_CHECKPOINT_ENGINE_COMPLETE=bash_source checkpoint-engine)"; zsh
    and fish likewise.
    """


for command in (serve, register, update, metas, status, cancel, unregister, plan, doctor, certify):
    commands.add_command(command)


def main(argv: Sequence[str] | None = None) -> None:
    """The console script. Options of ``serve`` may stand without it: ``--uds PATH``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = arguments[0].partition("=")[0] if arguments else ""
    if first.startswith("--") and first not in ("--help", "--version"):
        arguments.insert(0, "serve")
    commands(arguments, prog_name="checkpoint-engine")
