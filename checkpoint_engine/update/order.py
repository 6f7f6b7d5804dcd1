"""What the caller of ``ParameterServer.update`` asked for, and its ``req_func`` at work."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from checkpoint_engine.errors import EngineError
from checkpoint_engine.ground.local_rank import LocalRank
from checkpoint_engine.ground.progress import Progress
from checkpoint_engine.settings import max_bucket_bytes, skip_equal, trace_folder
from checkpoint_engine.world.hello import Hello

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
        spare = here.spare_memory()
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
            free_bytes=spare,
            free_beside=here.spare_beside(spare),
            memory=here.device_manager.scarcest_memory,
            bucket_cap=max_bucket_bytes(),
            host=here.host_ip,
            instance=str(getattr(self.req_func, "instance", f"rank {here.rank}")),
            nonce=uuid.uuid4().hex,
            trace=trace_folder() if self.trace is None else os.fspath(self.trace),
            skips_equal=skip_equal(),
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


def check_request(request: Future[Any]) -> None:
    """Raise what ``req_func`` has raised."""
    if request.done() and (error := request.exception()) is not None:
        text = f"req_func raised {type(error).__name__}: {error}"
        raise EngineError(text, "request_failed") from error
