"""``checkpoint-engine serve``: the same as ``python -m checkpoint_engine``."""

from __future__ import annotations

import click


@click.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    short_help="Serve this rank's ParameterServer: --uds PATH.",
)
@click.pass_context
def serve(context: click.Context) -> None:
    """Serve this rank's ParameterServer. Takes the options of `python -m checkpoint_engine`."""
    from checkpoint_engine.__main__ import main

    main(context.args)
