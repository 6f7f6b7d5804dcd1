"""The inference side, as engines import it. Imported inside every worker: it stays cheap to import.

The extension is for vLLM; other engines call ``update_weights_from_ipc`` themselves.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import zmq

from checkpoint_engine.ground.devices import DeviceManager, worker_index
from checkpoint_engine.handover.wire import FlattenedTensorMetadata
from checkpoint_engine.loading.receive import own_address, update_weights_from_ipc
from checkpoint_engine.loading.reload import EngineReload
from checkpoint_engine.loading.version import WeightVersion
from checkpoint_engine.loading.vllm_ranks import Reception, in_step, is_one_of_many

__all__ = ["FlattenedTensorMetadata", "VllmColocateWorkerExtension", "update_weights_from_ipc"]


class VllmColocateWorkerExtension:
    """Mixed into vLLM's workers by ``--worker-extension-cls``; called over ``/collective_rpc``.

    Any engine can use it whose workers have ``device``, ``local_rank`` and
    ``model_runner.model.load_weights``.
    """

    device: torch.device
    local_rank: int
    model_runner: Any

    def update_weights_from_ipc(self, zmq_handles: dict[str, str]) -> dict[str, Any]:
        """Load the weights that the parameter server sends to this worker's device.

        Args:
            zmq_handles: device identity to address, of at least this engine's devices.

        Returns:
            By model (``model``, ``drafter``), what it took: ``tensors``, ``bytes``, ``missing``
            parameters, ``unused`` tensors and more; see ``reload.ModelReload``.

        Raises:
            KeyError: this worker's device is not among them. This, and whatever else fails on any
                worker of a vLLM, is raised on its last rank; see ``loading.vllm_ranks``. No worker
                connects unless all can begin.
        """
        return in_step(self._receive_from_ipc(zmq_handles), getattr(self, "vllm_config", None))

    def _receive_from_ipc(self, zmq_handles: dict[str, str]) -> Reception:
        device_manager = DeviceManager(self.device.type)
        index = self.device.index if self.device.index is not None else self.local_rank
        identity = device_manager.identity(worker_index(self.device.type, index))
        address = own_address(zmq_handles, identity)
        habits = self.__dict__.setdefault("_loader_habits", {})
        with contextlib.closing(EngineReload(self, habits)) as reload, zmq.Context() as context:
            if is_one_of_many():  # otherwise its server is told
                reload.check()
            yield {}
            update_weights_from_ipc(
                context,
                address,
                device_id=index,
                run=reload,
                version=self._weight_version(),
            )
            report = reload.summary()
        yield report

    def weight_version(self) -> dict[str, str | None]:
        """Which weights this worker's model holds; callable over ``/collective_rpc``.

        Returns:
            ``state``: ``initial``, ``updating``, ``complete`` or ``failed`` (partly written).
            ``version``: the id of the update, where it is complete and its server gave one.
            ``updating``: the id of one that is, or was left, half-way.
        """
        return self._weight_version().describe()

    def _weight_version(self) -> WeightVersion:
        return self.__dict__.setdefault("_weights_held", WeightVersion())
