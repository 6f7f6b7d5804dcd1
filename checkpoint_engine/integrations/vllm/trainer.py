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
from functools import partial
from threading import Lock
from typing import Any, ClassVar

import torch
from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine

from checkpoint_engine.client import BACKEND
from checkpoint_engine.errors import UpdateError
from checkpoint_engine.ground.deadline import holding
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.settings import from_launcher

_NAME = "weights"
_PATIENCE = 600.0  # seconds, as long as an update may take


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
        """``options``: those that vLLM's base class has in every release."""
        super().__init__(**options)
        self.rank = rank
        self._world_size = world_size
        self._server = ParameterServer(rank=rank, world_size=world_size)
        self._updates = 0
        self._session = Lock()  # a failed update may be over before its engine has answered

    @classmethod
    def trainer_init(
        cls, init_info: CheckpointEngineTrainerInit, *, client: Any, source: Any = None
    ) -> CheckpointEngineTrainer:
        """Nothing is connected yet. Raises ``ValueError`` without a ``source`` of full tensors."""
        if source is None:
            raise ValueError("the checkpoint_engine backend sends a WeightSource: give source=")
        if hasattr(source, "implements_iter_full") and not source.implements_iter_full():
            raise ValueError(
                "the checkpoint_engine backend sends full tensors, and "
                f"{type(source).__name__} does not implement iter_full()"
            )
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
        server, failure = self._server, None
        senders: dict[str, int] = {}
        try:
            senders = self._senders()
            server.register_checkpoint(_NAME, named_tensors=dict(self._share(senders)))
        except Exception as error:
            failure = error  # of this rank: the others wait for it in the calls below
        try:
            server.gather_metas(_NAME)
            ask = partial(self._ask, senders, failure)
            server.update(_NAME, ask, version=f"update-{self._updates}")
        except UpdateError as error:
            if failure is not None:
                raise error from failure
            raise
        finally:
            server.unregister_checkpoint(_NAME)

    def shutdown(self) -> None:
        """Give back what is kept between updates."""
        self._server.release_groups()

    def _ask(
        self,
        senders: dict[str, int],
        failure: Exception | None,
        socket_paths: list[tuple[str, str]],
    ) -> None:
        if failure is not None:
            raise failure
        if not self.is_sender:
            return
        self._check_sent(senders)
        with holding(self._session, _PATIENCE, "vLLM has not answered an earlier update"):
            self.client.start_weight_update()
            try:
                self.client.update_weights({"zmq_handles": dict(socket_paths)})
            except BaseException:
                with suppress(Exception):  # of the worker that failed; there it is over
                    self.client.finish_weight_update()
                raise
            self.client.finish_weight_update()

    def _check_sent(self, senders: dict[str, int]) -> None:
        owned = [one.memory_buffer_metas_list for one in self._server.get_metas().values()]
        sent = {meta.name for buffers in owned for buffer in buffers for meta in buffer.metas}
        if lacking := [name for name in senders if name not in sent]:
            rank = senders[lacking[0]]
            of = f", which rank {rank} was to send" if rank != self.rank else ""
            raise ValueError(
                f"{len(lacking)} of {len(senders)} tensors that the source's metadata names came "
                f"from no trainer rank, such as {lacking[0]!r}{of}"
            )

    def _senders(self) -> dict[str, int]:
        """The rank that sends each tensor, of the whole model: those that hold it, in turn."""
        source, everyone = self.source, range(self._world_size)
        if hasattr(source, "iter_full"):  # metadata is a list since 0.33, and names the owners
            holders = [(meta.name, meta.owners or everyone) for meta in source.metadata]
        else:
            ranks = self._holders()
            holders = [(meta.name, ranks) for meta in source.metadata()]
        return {name: ranks[n % len(ranks)] for n, (name, ranks) in enumerate(holders)}

    def _holders(self) -> Sequence[int]:
        """Before 0.33: the ranks that take turns at sending, as far as this rank can tell."""
        if not hasattr(self.source, "held_names"):
            return [0]  # in 0.28 a tensor need be whole on the sender alone
        if self.source.held_names() is None:
            return range(self._world_size)
        return [self.rank]  # others may hold it too: the ranks agree on its bytes

    def _share(self, senders: dict[str, int]) -> Iterator[tuple[str, torch.Tensor]]:
        """What this rank sends, on the host. All of the source is iterated: that is collective."""
        source = self.source
        for name, tensor in source.iter_full() if hasattr(source, "iter_full") else source:
            if name not in senders:
                raise ValueError(f"the source yields {name!r}, which its metadata does not name")
            if tensor is not None and senders[name] == self.rank:
                yield name, tensor.detach().cpu()
