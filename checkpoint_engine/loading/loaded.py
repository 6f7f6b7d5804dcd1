"""Whether a worker loaded every bucket of an update's plan once, and no other.

The server says with the first ``None`` what was planned, the worker compares it with what it loaded
itself. That buckets hold every tensor once is the plan's property, which its tests show.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

from checkpoint_engine.errors import WireError

_SHOWN = 3


def digest(message: bytes) -> str:
    """What stands for a bucket: names, dtypes, shapes and places of its tensors are in it."""
    return hashlib.blake2b(message, digest_size=8).hexdigest()


class LoadedBuckets:
    """The buckets that a worker has loaded in one update."""

    def __init__(self) -> None:
        self._loaded: Counter[str] = Counter()

    def note(self, message: bytes) -> None:
        """This bucket is loaded; with tensors in parts: the whole tensor."""
        self._loaded[digest(message)] += 1

    def check(self, planned: Any) -> None:
        """Raise ``WireError`` if other buckets were loaded than those ``planned``.

        Args:
            planned: the digest of each, in the plan's order; ``None`` in place of those that end
                no tensor.
        """
        if not isinstance(planned, list) or {type(one) for one in planned} - {str, type(None)}:
            raise WireError(f"planned buckets are digests, not {planned!r:.100}")
        loaded, wanted = self._loaded, Counter(one for one in planned if one is not None)
        texts = [
            f"bucket {planned.index(one) + 1} of {len(planned)} was loaded {loaded[one]} times, "
            f"not {times}"
            for one, times in wanted.items()
            if loaded[one] != times
        ]
        if len(texts) > _SHOWN:
            texts[_SHOWN:] = [f"{len(texts) - _SHOWN} more were not loaded once"]
        if strange := sum(times for one, times in loaded.items() if one not in wanted):
            texts.append(f"{strange} buckets were loaded that were not planned")
        if texts:
            raise WireError("; ".join(texts))
