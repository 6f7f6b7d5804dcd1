"""Tensors that travel in parts, because they are larger than a bucket."""

from __future__ import annotations

from typing import Any

import torch

from checkpoint_engine.errors import WireError


class Parts:
    """The tensors of one update that a worker is putting together, on the double buffer's device.

    Parts of several tensors may come in any order; each tensor takes its own size in memory until
    it has been loaded.
    """

    def __init__(self) -> None:
        self._tensors: dict[tuple[bytes, int], tuple[torch.Tensor, dict[int, int]]] = {}

    def add(self, message: bytes, part: Any, buffer: torch.Tensor) -> torch.Tensor | None:
        """Take a part out of the double buffer; returns the tensor's bytes when all are there.

        Args:
            message: of the whole tensor; the same with each of its parts.
            part: where the part lies, its bytes, where it belongs, the tensor's bytes, and its
                owner, for two may have a tensor of that name.

        Raises:
            WireError: the part reaches beyond the buffer or the tensor, or came before.
        """
        match part:
            case [int(start), int(nbytes), int(begin), int(total), int(owner)] if (
                0 <= min(part) <= max(part) < 1 << 62
            ):
                tensor = message, owner
            case _:
                raise WireError(f"a part is five numbers, not {part!r:.100}")
        if not (0 < nbytes <= total - begin and start + nbytes <= buffer.numel()):
            raise WireError(f"a part of {nbytes} bytes at {begin} of {total} cannot be at {start}")
        if tensor not in self._tensors:
            whole = torch.empty(total, dtype=torch.uint8, device=buffer.device)
            self._tensors[tensor] = whole, {}
        whole, seen = self._tensors[tensor]
        overlaps = any(at < begin + nbytes and begin < at + size for at, size in seen.items())
        if overlaps or total != whole.numel():
            raise WireError(f"the part at {begin} of {total} bytes came before, or is another's")
        whole[begin : begin + nbytes].copy_(buffer[start : start + nbytes])
        seen[begin] = nbytes
        if sum(seen.values()) < total:
            return None
        del self._tensors[tensor]
        return whole

    def check_complete(self) -> None:
        """Raises ``WireError`` if a part of some tensor never came."""
        if self._tensors:
            raise WireError(f"{len(self._tensors)} tensors ended before all of their parts came")
