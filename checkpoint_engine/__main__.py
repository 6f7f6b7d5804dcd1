"""``checkpoint-engine --uds PATH``: serve this rank's ``ParameterServer`` on a Unix socket."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import socket
import stat
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

_SHUTDOWN_SECONDS = 5


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGINT or SIGTERM. Called by every rank, or alone as a world of one.

    The ranks come from the launcher's environment. Exits with status 1 if ``PATH`` cannot be used.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    path = _parse(argv).uds.replace("{rank}", str(rank))
    try:
        listener = listen(path)
    except OSError as error:
        sys.exit(f"rank {rank} cannot serve on {path}: {error}")
    with _removed_at_exit(path, listener):
        serve(listener, rank, world_size)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="checkpoint-engine",
        description="Serve a rank's ParameterServer over HTTP on a Unix socket.",
    )
    parser.add_argument(
        "--uds",
        required=True,
        metavar="PATH",
        help="the socket; {rank} in it becomes the rank, so that under torchrun each has its own",
    )
    return parser.parse_args(argv)


def listen(path: str) -> socket.socket:
    """A listening socket at ``path`` that only this user can reach.

    A socket that a dead server left there is replaced.

    Raises:
        OSError: a live server or another kind of file is there, or the path cannot be used.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The file that bind makes inherits this mode, so it is never open to others.
        os.fchmod(listener.fileno(), 0o600)
        with _folder_locked(path):
            _remove_stale(path)
            listener.bind(path)
            listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


@contextlib.contextmanager
def _folder_locked(path: str) -> Iterator[None]:
    """Keep other servers from testing and replacing the socket at the same time."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _remove_stale(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError("a file that is not a socket is there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise FileExistsError(
        "another server listens there; give each rank its own path, for example with {rank} in it"
    )


@contextlib.contextmanager
def _removed_at_exit(path: str, listener: socket.socket) -> Iterator[None]:
    # uvicorn shuts down on SIGTERM, then raises it again: without this the process would end there.
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _exit(signum: int, _frame: object) -> NoReturn:
    sys.exit(128 + signum)


def serve(listener: socket.socket, rank: int, world_size: int) -> None:
    """Make this rank's server and answer requests on ``listener`` until a signal ends it."""
    import uvicorn

    from checkpoint_engine.api import _init_api
    from checkpoint_engine.ps import ParameterServer

    app = _init_api(ParameterServer(rank=rank, world_size=world_size, auto_pg=True))
    config = uvicorn.Config(
        app, loop="asyncio", timeout_graceful_shutdown=_SHUTDOWN_SECONDS, log_level="warning"
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
