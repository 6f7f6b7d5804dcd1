"""Server ranks of ``certify``, one process each: they send checkpoints to the engine's workers."""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from loguru import logger

from checkpoint_engine import settings
from checkpoint_engine.ground.deadline import Deadline
from checkpoint_engine.ground.sockets import free_port_pair

Ask = Callable[[dict[str, str]], Any]
"""Has the engine receive: gets every worker's address by its device's identity."""

_STOP_SECONDS = 20.0
_GRACE = 30.0
"""Seconds beyond an update's own timeout until its ranks must have answered."""


class Ranks:
    """As many ranks as the engine has workers. Use as a context manager."""

    def __init__(self, count: int) -> None:
        environment = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port_pair())}
        # Not forked from this process, which may hold devices and threads; torch is imported once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["checkpoint_engine.ps"])
        self._connections, self._processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=serve, args=(theirs, own), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        for connection in self._connections:
            connection.close()  # the end for a rank
        for process in self._processes:
            process.join(_STOP_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()

    def update(self, folder: Path, bucket_bytes: int, ask: Ask, timeout: float) -> dict[str, Any]:
        """Send the checkpoint in ``folder``; what rank 0 reports, and ``answer``: what ``ask``
        returned.

        Raises:
            RuntimeError: it failed; the text is rank 0's error.
            TimeoutError: a rank does not answer.
        """
        for connection in self._connections:
            connection.send((str(folder), bucket_bytes, timeout))
        deadline = Deadline(timeout + _GRACE)
        ended: dict[int, tuple[str, Any]] = {}
        answer: Any = None
        while len(ended) < len(self._connections):
            ready = wait(self._connections, deadline.remaining())
            for rank, connection in enumerate(self._connections):
                if connection not in ready or rank in ended:
                    continue
                kind, value = _received(connection)
                if kind == "ask":
                    answer = _answer(connection, ask, value)
                else:
                    ended[rank] = kind, value
            deadline.check("the server ranks of an update")
        failures = [value for kind, value in ended.values() if kind == "failed"]
        if failures:
            raise RuntimeError(ended[0][1] if ended[0][0] == "failed" else failures[0])
        return {**ended[0][1], "answer": answer}


def _received(connection: Any) -> tuple[str, Any]:
    try:
        kind, value = connection.recv()
    except EOFError:
        return "failed", "a server rank ended; what it wrote to stderr says why"
    return kind, value


def _answer(connection: Any, ask: Ask, handles: dict[str, str]) -> Any:
    """Ask the engine on behalf of rank 0."""
    try:
        answer, error = ask(handles), ""
    except Exception:
        answer, error = None, traceback.format_exc()
    connection.send(error)
    return answer


def serve(connection: Connection, environment: Mapping[str, str]) -> None:
    """One rank's process: an update for each order, until the connection closes."""
    settings.set_here(environment)
    logger.remove()
    logger.add(sys.stderr, level="WARNING")  # an update's phases are in the certificate
    from checkpoint_engine.ps import ParameterServer

    ps = ParameterServer(auto_pg=False)
    number = 0
    while True:
        try:
            folder, bucket_bytes, timeout = connection.recv()
        except EOFError:
            return
        number += 1
        try:
            connection.send(
                ("done", _update(ps, connection, number, folder, bucket_bytes, timeout))
            )
        except Exception as error:
            connection.send(("failed", str(error)))


def _update(
    ps: Any, connection: Connection, number: int, folder: str, bucket_bytes: int, timeout: float
) -> dict[str, Any]:
    from checkpoint_engine.memory.files import open_files, view_tensors

    settings.set_here({"PS_MAX_BUCKET_SIZE_GB": repr(bucket_bytes / settings.GIB)})
    name = f"certify-{number}"
    rank, world_size = settings.integer("RANK", 0), settings.integer("WORLD_SIZE", 1)
    mine = view_tensors(list(open_files([folder]).values())[rank::world_size])
    ps.register_checkpoint(name, named_tensors=mine)

    def ask(socket_paths: list[tuple[str, str]]) -> None:
        if rank == 0:
            connection.send(("ask", dict(socket_paths)))
            if error := connection.recv():
                raise RuntimeError(error)

    try:
        ps.gather_metas(name, timeout=timedelta(seconds=timeout))
        report = ps.update(name, ask, timeout=timedelta(seconds=timeout))
    finally:
        ps.unregister_checkpoint(name)
    return {"buckets": report.buckets, "bytes": report.bytes, "seconds": report.seconds}
