"""Update the weights of running LLM inference engines in place.

Importing the package is cheap; each name loads its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.5.0"

_EXPORTS = {
    "BucketRange": "data_types",
    "BusyError": "errors",
    "DataToGather": "data_types",
    "DeviceManager": "device_utils",
    "FlattenedTensorMetadata": "worker",
    "H2DBucket": "data_types",
    "MemoryBuffer": "data_types",
    "MemoryBufferMetaList": "data_types",
    "MemoryBufferMetas": "data_types",
    "P2PStore": "p2p_store",
    "ParameterMeta": "data_types",
    "ParameterServer": "ps",
    "UpdateError": "errors",
    "UpdateReport": "ground.report",
    "VllmColocateWorkerExtension": "worker",
    "get_ip": "device_utils",
    "npu_generate_uuid": "device_utils",
    "request_inference_to_update": "client",
    "update_weights_from_ipc": "worker",
}

__all__ = [
    "BucketRange",
    "BusyError",
    "DataToGather",
    "DeviceManager",
    "FlattenedTensorMetadata",
    "H2DBucket",
    "MemoryBuffer",
    "MemoryBufferMetaList",
    "MemoryBufferMetas",
    "P2PStore",
    "ParameterMeta",
    "ParameterServer",
    "UpdateError",
    "UpdateReport",
    "VllmColocateWorkerExtension",
    "__version__",
    "get_ip",
    "npu_generate_uuid",
    "request_inference_to_update",
    "update_weights_from_ipc",
]

if TYPE_CHECKING:
    from checkpoint_engine.client import request_inference_to_update
    from checkpoint_engine.data_types import (
        BucketRange,
        DataToGather,
        H2DBucket,
        MemoryBuffer,
        MemoryBufferMetaList,
        MemoryBufferMetas,
        ParameterMeta,
    )
    from checkpoint_engine.device_utils import DeviceManager, get_ip, npu_generate_uuid
    from checkpoint_engine.errors import BusyError, UpdateError
    from checkpoint_engine.ground.report import UpdateReport
    from checkpoint_engine.p2p_store import P2PStore
    from checkpoint_engine.ps import ParameterServer
    from checkpoint_engine.worker import (
        FlattenedTensorMetadata,
        VllmColocateWorkerExtension,
        update_weights_from_ipc,
    )


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
