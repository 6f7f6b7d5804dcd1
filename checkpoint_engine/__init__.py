"""Update the weights of running LLM inference engines in place.

Importing the package is cheap; each name loads its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.5.0"

_MODULES = {
    "client": "request_inference_to_update",
    "data_types": "BucketRange DataToGather H2DBucket MemoryBuffer MemoryBufferMetaList "
    "MemoryBufferMetas ParameterMeta",
    "device_utils": "DeviceManager get_ip npu_generate_uuid",
    "errors": "BusyError UpdateError",
    "ground.report": "UpdateReport",
    "p2p_store": "P2PStore",
    "ps": "ParameterServer",
    "worker": "FlattenedTensorMetadata VllmColocateWorkerExtension update_weights_from_ipc",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:  # ``as``: type checkers cannot read such an ``__all__``
    from checkpoint_engine.client import request_inference_to_update as request_inference_to_update
    from checkpoint_engine.data_types import BucketRange as BucketRange
    from checkpoint_engine.data_types import DataToGather as DataToGather
    from checkpoint_engine.data_types import H2DBucket as H2DBucket
    from checkpoint_engine.data_types import MemoryBuffer as MemoryBuffer
    from checkpoint_engine.data_types import MemoryBufferMetaList as MemoryBufferMetaList
    from checkpoint_engine.data_types import MemoryBufferMetas as MemoryBufferMetas
    from checkpoint_engine.data_types import ParameterMeta as ParameterMeta
    from checkpoint_engine.errors import BusyError as BusyError
    from checkpoint_engine.errors import UpdateError as UpdateError
    from checkpoint_engine.ground.devices import DeviceManager as DeviceManager
    from checkpoint_engine.ground.devices import get_ip as get_ip
    from checkpoint_engine.ground.devices import npu_generate_uuid as npu_generate_uuid
    from checkpoint_engine.ground.report import UpdateReport as UpdateReport
    from checkpoint_engine.ps import ParameterServer as ParameterServer
    from checkpoint_engine.transfer.p2p_store import P2PStore as P2PStore
    from checkpoint_engine.worker import FlattenedTensorMetadata as FlattenedTensorMetadata
    from checkpoint_engine.worker import VllmColocateWorkerExtension as VllmColocateWorkerExtension
    from checkpoint_engine.worker import update_weights_from_ipc as update_weights_from_ipc


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
