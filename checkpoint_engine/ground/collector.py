"""Python's garbage collector, kept from looking for garbage where there is none."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_at_rest() -> Iterator[None]:
    """Around what makes many small objects and keeps them. The collector would go through all
    objects of the process again and again meanwhile, and find nothing. Afterwards it looks at the
    new ones alone: they are so many that it would go through all of them at once."""
    was_at_work = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_at_work:
            gc.enable()  # first: an interrupt leaves it so
            gc.collect(0)
