"""The trainer half: vLLM's ``TrainerWeightTransferEngine``, for a loop that is written for vLLM's
own weight transfer, from 0.28 on.

    info = CheckpointEngineTrainerInit(rank=rank)
    engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)
    engine.send_weights()

The trainer's ranks are server ranks: as many as the engines of ``client`` have workers, and each on
the device of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine

from checkpoint_engine.client import BACKEND
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.settings import from_launcher

_NAME = "weights"


@dataclass
class CheckpointEngineTrainerInit(TrainerInitInfo):  # type: ignore[misc]
    """Which rank this is: of the trainer, and of the server. Rank 0 alone uses the client.

    Attributes:
        world_size: the trainer's ranks. Default: ``WORLD_SIZE``.
    """

    backend: ClassVar[str] = BACKEND

    world_size: int | None = None


class CheckpointEngineTrainer(TrainerWeightTransferEngine):  # type: ignore[misc]
    """Made on every rank of the trainer, by ``trainer_init``."""

    init_info_cls = CheckpointEngineTrainerInit

    def __init__(self, rank: int, world_size: int, **options: Any) -> None:
        """``options``: those of vLLM's base class."""
        super().__init__(**options)
        self._server = ParameterServer(rank=rank, world_size=world_size)
        self._rank, self._world_size = rank, world_size
        self._updates = 0

    @classmethod
    def trainer_init(
        cls, init_info: CheckpointEngineTrainerInit, *, client: Any, source: Any = None
    ) -> CheckpointEngineTrainer:
        """Nothing is connected yet. Raises ``ValueError`` without a ``source``."""
        if source is None:
            raise ValueError("the checkpoint_engine backend sends a WeightSource: give source=")
        world_size = from_launcher(init_info.world_size, "WORLD_SIZE")
        options = {"client": client, "source": source, "is_sender": init_info.is_sender}
        return cls(init_info.rank, world_size, **options)

    @torch.no_grad()
    def send_weights(self) -> None:
        """One update, from the source to all workers. All ranks.

        Raises:
            UpdateError: on every rank, naming the one that failed first.
        """
        self._updates += 1
        version = f"update-{self._updates}"
        server = self._server
        server.register_checkpoint(_NAME, named_tensors=dict(self._own()))
        try:
            server.gather_metas(_NAME)
            server.update(_NAME, self._ask, version=version)
        finally:
            server.unregister_checkpoint(_NAME)

    def shutdown(self) -> None:
        """Give back what is kept between updates."""
        self._server.release_groups()

    def _ask(self, socket_paths: list[tuple[str, str]]) -> None:
        if not self.is_sender:
            return
        self.client.start_weight_update()
        try:
            self.client.update_weights({"zmq_handles": dict(socket_paths)})
        except BaseException:
            with suppress(Exception):  # of the worker that failed; there it is over
                self.client.finish_weight_update()
            raise
        self.client.finish_weight_update()

    def _own(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's share, on the host. All of the source is iterated: that is collective. A
        tensor may be several ranks', which must agree on its bytes."""
        owners = _owners_of(self.source)
        tensors = self.source.iter_full() if owners is not None else self.source
        for number, (name, tensor) in enumerate(tensors):
            holders: Sequence[int] = range(self._world_size)
            if owners is not None:
                holders = owners[name] or holders
            elif self.source.held_names() is not None:
                holders = [self._rank]  # which others hold it is not known
            if tensor is not None and holders[number % len(holders)] == self._rank:
                yield name, tensor.detach().cpu()


def _owners_of(source: Any) -> dict[str, Any] | None:
    """By name, the ranks that hold a tensor, in vLLM 0.33; ``None`` before, where a source is
    iterated itself."""
    if not hasattr(source, "iter_full"):
        return None
    return {meta.name: meta.owners for meta in source.metadata}
