"""``checkpoint-engine serve``, which is ``python -m checkpoint_engine``."""

from __future__ import annotations

from typing import Any

import click

from checkpoint_engine.settings import integer


@click.command(short_help="Serve this rank's ParameterServer over HTTP.")
@click.option("--uds", metavar="PATH",
              help="The socket; {rank} in it becomes the rank, so that under torchrun each has its "
              "own.")  # fmt: skip
@click.option("--host", default="127.0.0.1", help="For --port: the address to listen on.")
@click.option("--port", type=int, help="Listen on TCP; under torchrun, local rank r on PORT + r.")
@click.option("--token-file", metavar="FILE",
              help="Holds the bearer token that callers must send. Default: "
              "PS_HTTP_TOKEN.")  # fmt: skip
@click.option("--no-token", "allow_anyone", is_flag=True, help="Serve TCP to everybody.")
@click.option("--allow-path", multiple=True, metavar="DIR",
              help="Only files below it may be registered, symbolic links resolved; "
              "repeatable.")  # fmt: skip
@click.option("--allow-update-url", multiple=True, metavar="URL",
              help="Only engines at or below it may be asked; unix:PATH for a socket; "
              "repeatable.")  # fmt: skip
@click.option("--max-body", "max_body_bytes", type=click.IntRange(1), default=64 << 20,
              metavar="BYTES", help="Of one request.")  # fmt: skip
def serve(
    uds: str | None,
    port: int | None,
    token_file: str | None,
    allow_path: tuple[str, ...],
    allow_update_url: tuple[str, ...],
    **others: Any,
) -> None:
    """Serve this rank's ParameterServer over HTTP on a Unix socket, or on TCP.

    Until SIGINT, SIGTERM or SIGHUP. Called by every rank, or alone as a world of one: the ranks
    come from the launcher's environment. Ends with 1 if the socket cannot be used.
    """
    from checkpoint_engine.service.access import Access
    from checkpoint_engine.service.serve import ServeOptions, read_token, serve

    try:
        rank, world_size = integer("RANK", 0), integer("WORLD_SIZE", 1)
        if not 0 <= rank < world_size:
            raise ValueError(f"RANK {rank} of WORLD_SIZE {world_size}: torchrun sets both")
        options = ServeOptions(
            uds=None if uds is None else uds.replace("{rank}", str(rank)),
            port=port + integer("LOCAL_RANK", 0) if port else port,
            token=None if others["allow_anyone"] else read_token(token_file),
            access=Access.of(allow_path, allow_update_url),
            **others,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    try:
        serve(options, rank, world_size)
    except OSError as error:
        where = options.uds or f"{options.host}:{options.port}"
        raise click.ClickException(f"rank {rank} cannot serve on {where}: {error}") from error
