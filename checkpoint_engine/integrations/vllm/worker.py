"""The worker half: a ``WeightTransferEngine`` of vLLM, for
``--weight-transfer-config '{"backend": "checkpoint_engine"}'``.

``update_weights`` receives, loads and processes all weights; ``start_weight_update`` and
``finish_weight_update`` only open and close vLLM's session. So a failure at any point is over, and
cleaned up, before vLLM's call ends, and the next session starts from scratch.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, wraps
from types import SimpleNamespace
from typing import Any

import torch
import vllm
from vllm.distributed.parallel_state import get_world_group
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from checkpoint_engine.ground.devices import DeviceManager, worker_index
from checkpoint_engine.loading.lm_heads import restore_of_open_session
from checkpoint_engine.loading.vllm_ranks import Reception, in_step, raise_on_last_rank
from checkpoint_engine.worker import VllmColocateWorkerExtension

SUPPORTED = "0.26 to 0.33"
INTRODUCE_DRAFTER = (
    "this engine's drafter came from the same checkpoint, and vLLM has not shown it to the plug-in "
    "yet: POST /start_draft_weight_update and /finish_weight_update, then start again"
)
_ARGUMENTS = ["config", "vllm_config", "device", "model"]
_STARTS = ("start_weight_update", "start_draft_weight_update")
_METHODS = ("set_weight_update_target", "start_weight_update", "update_weights")


def check_interface() -> None:
    """Raise ``RuntimeError`` unless this vLLM makes and calls transfer engines as the plug-in
    expects."""
    arguments = list(inspect.signature(WeightTransferEngine.__init__).parameters)[1:]
    lacking = [name for name in _METHODS if not hasattr(WeightTransferEngine, name)]
    if arguments != _ARGUMENTS or lacking:
        raise RuntimeError(
            f"vLLM {vllm.__version__} makes weight transfer engines of {arguments}"
            + (f", without {lacking}" if lacking else "")
            + f"; the checkpoint_engine backend knows the interface of {SUPPORTED}. Start vLLM with"
            " --worker-extension-cls checkpoint_engine.worker.VllmColocateWorkerExtension instead"
        )


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing has to be agreed before the first update."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Where the parameter server waits for this worker.

    Attributes:
        zmq_handles: addresses by device identity, of at least this engine's devices.
        address: of this worker, where the caller gives each worker its own.
    """

    zmq_handles: dict[str, str] | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if (self.zmq_handles is None) == (self.address is None):
            raise ValueError("an update needs either zmq_handles or address")


class _Target(VllmColocateWorkerExtension):
    """A model as our worker side expects an engine's worker to hold it."""

    def __init__(self, vllm_config: Any, device: torch.device, model: Any, config: Any) -> None:
        self.vllm_config = vllm_config
        self.device = device
        self.local_rank = get_world_group().local_rank
        self.model_runner = SimpleNamespace(model=model, model_config=config, drafter=None)

    def receive(self, handles: dict[str, str]) -> Reception:
        yield from self._receive_from_ipc(handles)

    def share_version(self, worker: Any) -> None:
        """A worker with the extension tells of the plug-in's updates, too."""
        if isinstance(worker, VllmColocateWorkerExtension):
            self.__dict__["_weights_held"] = worker._weight_version()

    def identity(self) -> str:
        """Of its device, as server ranks name it."""
        index = self.device.index if self.device.index is not None else self.local_rank
        return DeviceManager(self.device.type).identity(worker_index(self.device.type, index))


class CheckpointEngineTransfer(WeightTransferEngine):  # type: ignore[misc]
    """Made by vLLM in each worker, once its model is loaded.

    A session updates the model, and a drafter that came from the same checkpoint; a session that
    ``start_draft_weight_update`` opened updates the drafter alone.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: Any) -> None:
        check_interface()
        replace_open_sessions()
        super().__init__(config, vllm_config, device, model)
        self._model = _Target(vllm_config, device, model, self.model_config)
        self._drafter: _Target | None = None

    def begin_session(self, worker: Any) -> None:
        """vLLM's ``worker`` is about to start one. One that is open ends: it holds nothing."""
        if getattr(worker, "_weight_update_active", False):
            worker._weight_update_active = False
            if self.model is not self._default_model:
                restore_of_open_session(self.model)
            self.reset_weight_update_target()
        self._model.share_version(worker)

    def set_weight_update_target(self, model: Any, model_config: Any) -> None:
        """vLLM shows the drafter; the session that now starts is for it."""
        super().set_weight_update_target(model, model_config)
        if self._drafter is None or self._drafter.model_runner.model is not model:
            self._drafter = _Target(self.vllm_config, self.device, model, model_config)
            self._model.model_runner.drafter = SimpleNamespace(model=model)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Nothing to do: each update brings its addresses."""

    def start_weight_update(self) -> None:
        """Raises ``RuntimeError``, on the last rank, if an update would leave a drafter behind."""
        if self.model is self._default_model and self._lacks_drafter():
            raise_on_last_rank(RuntimeError(INTRODUCE_DRAFTER), self.vllm_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """All of one update; returns when the engine may compute with the new weights.

        A failure on any rank is raised on the last one. vLLM ends the session there alone:
        ``finish_weight_update``, which then fails on that rank, ends it on the others.
        """
        in_step(self._receive(update_info), self.vllm_config)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """As ``update_weights``."""
        self.update_weights(asdict(update_info))

    def _receive(self, update_info: dict[str, Any]) -> Reception:
        info = self.parse_update_info(update_info)
        target = self._model
        if self.model is not self._default_model and self._drafter is not None:
            target = self._drafter
        handles = info.zmq_handles
        if info.address is not None:
            handles = {target.identity(): info.address}
        yield from target.receive(handles or {})

    def finish_weight_update(self) -> None:
        """Nothing to do: ``update_weights`` has processed what it loaded."""

    def shutdown(self) -> None:
        """Nothing to do: an update's sockets and memory end with it."""

    def trainer_send_weights(self, *args: Any, **kwargs: Any) -> None:
        """Releases before 0.28 ask for it; weights are sent by ``ParameterServer.update``."""
        raise NotImplementedError("weights are sent by checkpoint_engine's ParameterServer.update")

    def _lacks_drafter(self) -> bool:
        drafted = getattr(self.vllm_config.speculative_config, "draft_model_config", None)
        same = getattr(drafted, "model", None) == self._default_model_config.model
        return same and self._model.model_runner.drafter is None


@cache
def replace_open_sessions() -> None:
    """Have vLLM's workers, in this process, start a session of ours also while one is open, as of a
    client that died. They would refuse it before they ask the engine, all of them, and may not:
    see ``loading.vllm_ranks``."""
    module = sys.modules.get("vllm.v1.worker.gpu_worker")  # a platform may have its own
    workers = getattr(module, "Worker", None)
    for name in _STARTS:
        if start := getattr(workers, name, None):
            setattr(workers, name, _replacing(start))


def _replacing(start: Callable[..., None]) -> Callable[..., None]:
    @wraps(start)
    def replace(worker: Any, *args: Any, **kwargs: Any) -> None:
        engine = getattr(worker, "weight_transfer_engine", None)
        if isinstance(engine, CheckpointEngineTransfer):
            engine.begin_session(worker)
        start(worker, *args, **kwargs)

    return replace
