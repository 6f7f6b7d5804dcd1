"""``checkpoint-engine --uds PATH``: serve this rank's ``ParameterServer`` over HTTP."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from checkpoint_engine.service.access import Access
from checkpoint_engine.service.serve import (
    MAX_BODY_BYTES,
    TOKEN_VARIABLE,
    ServeOptions,
    read_token,
    serve,
)
from checkpoint_engine.settings import integer


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGINT or SIGTERM. Called by every rank, or alone as a world of one.

    The ranks come from the launcher's environment. Exits with status 1 if the socket cannot be
    used, with 2 if the options make no sense.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        rank, world_size = integer("RANK", 0), integer("WORLD_SIZE", 1)
        if not 0 <= rank < world_size:
            raise ValueError(
                f"RANK {rank} of WORLD_SIZE {world_size}: a launcher such as torchrun sets both"
            )
        options = _options(args, rank)
    except ValueError as error:
        parser.error(str(error))
    try:
        serve(options, rank=rank, world_size=world_size)
    except OSError as error:
        sys.exit(f"rank {rank} cannot serve on {options.where}: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="checkpoint-engine",
        description="Serve a rank's ParameterServer over HTTP on a Unix socket, or on TCP.",
    )
    add = parser.add_argument
    add(
        "--uds",
        metavar="PATH",
        help="the socket; {rank} in it becomes the rank, so that under torchrun each has its own",
    )
    add("--host", default="127.0.0.1", help="for --port: the address to listen on")
    add("--port", type=int, help="listen on TCP; under torchrun, local rank r on PORT + r")
    add(
        "--token-file",
        metavar="FILE",
        help=f"holds the bearer token that callers must send; default: {TOKEN_VARIABLE}",
    )
    add("--no-token", action="store_true", help="serve TCP to everybody who can connect")
    add(
        "--allow-path",
        action="append",
        default=[],
        metavar="DIR",
        help="only files below it may be registered, symbolic links resolved; repeatable",
    )
    add(
        "--allow-update-url",
        action="append",
        default=[],
        metavar="URL",
        help="only engines at or below it may be asked; unix:PATH for a socket; repeatable",
    )
    add(
        "--max-body", type=_positive, default=MAX_BODY_BYTES, metavar="BYTES", help="of one request"
    )
    return parser


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _options(args: argparse.Namespace, rank: int) -> ServeOptions:
    port = args.port
    return ServeOptions(
        uds=None if args.uds is None else args.uds.replace("{rank}", str(rank)),
        host=args.host,
        port=port + int(os.environ.get("LOCAL_RANK", "0")) if port else port,
        token=None if args.no_token else read_token(args.token_file),
        allow_anyone=args.no_token,
        access=Access.of(args.allow_path, args.allow_update_url),
        max_body_bytes=args.max_body,
    )


if __name__ == "__main__":
    main()
