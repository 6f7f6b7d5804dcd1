"""What a server rank remembers of its inference worker from one update to the next."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EngineProfile:
    """Updated when a worker has answered the handshake.

    ``joins_parts``: whether the worker takes tensors in parts. Plans are made before the worker
    of an update can be asked.
    """

    joins_parts: bool = False
