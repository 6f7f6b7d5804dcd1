"""The host memory of a server, under the name that the original has for it.

The code is in ``memory``.
"""

from checkpoint_engine.ground.limits import available_host_memory
from checkpoint_engine.memory.host_memory import HostMemory, MemoryUsage
from checkpoint_engine.memory.layout import pack, pack_into, packed_size

__all__ = ["HostMemory", "MemoryUsage", "available_host_memory", "pack", "pack_into", "packed_size"]
