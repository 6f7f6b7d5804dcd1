"""Devices, under the name that the original's releases 0.4 have for them.

The code is in ``ground``.
"""

from loguru import logger

from checkpoint_engine.ground.devices import DeviceManager, get_ip, npu_generate_uuid
from checkpoint_engine.ground.rdma import names_for

__all__ = ["DeviceManager", "get_ip", "logger", "npu_generate_uuid"]

_ibv_get_device_list, _get_rdma_devices, _parse_NCCL_IB_HCA, _get_my_rdma_device = names_for(
    globals()
)
