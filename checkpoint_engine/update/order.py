"""What the caller of ``ParameterServer.update`` asked for, and its ``req_func`` at work."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from checkpoint_engine.errors import RequestError
from checkpoint_engine.ground.deadline import poll
from checkpoint_engine.ground.local_rank import LocalRank
from checkpoint_engine.ground.progress import Progress
from checkpoint_engine.settings import max_bucket_bytes, trace_folder
from checkpoint_engine.world.hello import Hello

_FAREWELL = 1.0  # seconds that a failed update waits for req_func to return

SocketPaths = list[tuple[str, str]]
RequestFunction = Callable[[SocketPaths], Any]


@dataclass(frozen=True)
class Order:
    """The arguments of ``update``; see there.

    Attributes:
        ranks: the members of a P2P update, sorted; ``None``: a broadcast to all.
    """

    checkpoint: str
    req_func: RequestFunction
    ranks: tuple[int, ...] | None = None
    version: str | None = None
    on_instance_failure: str = "abort"
    on_progress: Callable[[Progress], None] | None = None
    compare_ranks: bool = False
    trace: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.on_instance_failure not in ("abort", "continue"):
            raise ValueError(
                f'on_instance_failure is "abort" or "continue", not {self.on_instance_failure!r}'
            )

    def hello(self, here: LocalRank, address: str, metas: str) -> Hello:
        """What this rank says first.

        Args:
            address: where its worker connects.
            metas: digest of what it gathered or loaded.
        """
        return Hello(
            rank=here.rank,
            call="update",
            checkpoint=self.checkpoint,
            ranks=self.ranks,
            version=self.version,
            on_instance_failure=self.on_instance_failure,
            compare_ranks=self.compare_ranks,
            metas=metas,
            device=here.device_uuid,
            address=address,
            free_bytes=here.spare_memory(),
            bucket_cap=max_bucket_bytes(),
            host=here.host_ip,
            instance=str(getattr(self.req_func, "instance", f"rank {here.rank}")),
            nonce=uuid.uuid4().hex,
            trace=trace_folder() if self.trace is None else os.fspath(self.trace),
        )


def members_of(ranks: Sequence[int] | None, world_size: int) -> tuple[int, ...] | None:
    """The ranks of a P2P update, sorted; ``None`` for a broadcast to all.

    Raises:
        ValueError: one is not in the world.
    """
    if not ranks:
        return None
    strangers = [rank for rank in ranks if not 0 <= rank < world_size]
    if strangers:
        raise ValueError(f"ranks {strangers} are not in a world of {world_size}")
    return tuple(sorted(set(ranks)))


class Request:
    """The caller's ``req_func``, running in a thread of its own while the update goes on."""

    def __init__(self, req_func: RequestFunction, socket_paths: SocketPaths) -> None:
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(
            target=self._run,
            args=(req_func, socket_paths),
            name="checkpoint-engine-request",
            daemon=True,  # a request that never returns must not keep the process
        )
        self._thread.start()

    def _run(self, req_func: RequestFunction, socket_paths: SocketPaths) -> None:
        try:
            req_func(socket_paths)
        except BaseException as error:
            if not self._closed:  # nobody asks any more, and its traceback leads back here
                self._error = error

    def check(self) -> None:
        """Raise what ``req_func`` raised."""
        if self._error is not None:
            error = self._error
            raise RequestError(f"req_func raised {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """After a failure: let the engine answer before the next update asks it again."""
        self._thread.join(_FAREWELL)
        self._closed = True
        self._error = None

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def join(self, check: Callable[[], None]) -> None:
        """Wait for ``req_func`` to return; ``check`` ends the wait by raising."""
        poll(lambda: self.is_over, check)
        self.check()
