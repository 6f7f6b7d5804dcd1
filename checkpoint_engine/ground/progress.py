"""How far a call has come: for bars, pages and the caller's own callback."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from pydantic import BaseModel, ConfigDict, Field


class Progress(BaseModel):
    """A call that is running on this rank."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    call: str = Field(examples=["update"])
    checkpoint: str
    phase: str = Field(examples=["reload", "filling", "summing"])
    """What this rank does or waits for."""
    done_bytes: int
    """That this rank's worker has loaded, or that are filled, or summed."""
    total_bytes: int
    """0 while it is not known yet."""
    seconds: dict[str, float] = {}
    """Spent in the phases before."""

    @property
    def fraction(self) -> float:
        return self.done_bytes / self.total_bytes if self.total_bytes else 0.0


def size_text(nbytes: float) -> str:
    """For people, in the unit that fits: ``512 bytes``, ``8.0 MB``, ``1234.5 GB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes:.0f} bytes"


@contextlib.contextmanager
def drawn_bar(call: str, total_bytes: int) -> Iterator[Callable[[Progress], None]]:
    """A bar on stderr, for as long as the block lasts; it moves with what the function gets."""
    import click

    label = f"{call} {size_text(total_bytes)}"
    # Seconds that are left are guessed wrong: the first bytes wait for engines.
    with click.progressbar(length=total_bytes, label=label, file=sys.stderr, show_eta=False) as bar:
        yield lambda progress: bar.update(progress.done_bytes - bar.pos)
