"""``P2PStore``, where the original's releases 0.3 and 0.4 have it.

The code is in ``transfer.p2p_store``.
"""

from loguru import logger

from checkpoint_engine.ground.rdma import names_for
from checkpoint_engine.transfer.p2p_store import P2PStore

__all__ = ["P2PStore", "logger"]

_ibv_get_device_list, _get_rdma_devices, _parse_NCCL_IB_HCA, _get_my_rdma_device = names_for(
    globals()
)
