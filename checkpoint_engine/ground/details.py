"""Log lines for those who look for a fault. They are silent until the program asks for them, by
``logger.enable("checkpoint_engine")`` after it has imported this library."""

from __future__ import annotations

from loguru import logger

logger.disable(__name__)


def log_detail(rank: int, text: str, *values: object) -> None:
    """At ``DEBUG``. ``text``: as loguru formats it, without the rank."""
    logger.bind(rank=rank).debug("rank {}: " + text, rank, *values)
