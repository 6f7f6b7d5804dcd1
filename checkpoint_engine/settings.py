"""The environment variables of an update, read once per use into a frozen object."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

GIB = 1 << 30
LONGEST_UPDATE = 30 * 86_400.0
"""Seconds; more than anybody waits for one."""
SHARED_MEMORY, GLOO = "shared-memory", "gloo"


@dataclass(frozen=True)
class Settings:
    """
    Attributes:
        max_bucket_bytes: cap of a bucket.
        mem_fraction: share of free device memory.
        retain_host_memory: whether memory of unregistered checkpoints is kept for the next.
        cpu_transport: of weights between ranks of one host on the cpu device: ``SHARED_MEMORY`` or
            ``GLOO``.
    """

    max_bucket_bytes: int
    mem_fraction: float
    retain_host_memory: bool
    cpu_transport: str

    @staticmethod
    def from_env(mem_fraction: float | None = None) -> Settings:
        """``mem_fraction``: what the caller gave instead of ``PS_MEM_FRACTION``.

        Raises:
            ValueError: a value is no number or out of range; names the variable.
        """
        fraction = _number("PS_MEM_FRACTION", 0.9) if mem_fraction is None else mem_fraction
        if not 0 < fraction <= 1:
            raise ValueError(f"mem_fraction (PS_MEM_FRACTION) must be in (0, 1], got {fraction}")
        retain = integer("PS_RETAIN_HOST_MEMORY", 1) != 0
        transport = os.environ.get("PS_CPU_TRANSPORT", SHARED_MEMORY)
        if transport not in (SHARED_MEMORY, GLOO):
            raise ValueError(
                f"PS_CPU_TRANSPORT must be {SHARED_MEMORY} or {GLOO}, got {transport!r}"
            )
        return Settings(max_bucket_bytes(), fraction, retain, transport)


def max_bucket_bytes() -> int:
    """``PS_MAX_BUCKET_SIZE_GB``: cap of a bucket.

    Raises:
        ValueError: it is no positive number.
    """
    cap = _number("PS_MAX_BUCKET_SIZE_GB", 8.0)
    if not 0 < cap < math.inf:
        raise ValueError(f"PS_MAX_BUCKET_SIZE_GB must be positive, got {cap}")
    return int(cap * GIB)


def _number(variable: str, default: float) -> float:
    text = os.environ.get(variable)
    if text is None:
        return default
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{variable} must be a number, got {text!r}") from None


def admitted_users() -> set[int]:
    """``PS_IPC_UIDS``: users besides this one, as numbers, whose workers may connect.

    Raises:
        ValueError: it holds something else.
    """
    text = os.environ.get("PS_IPC_UIDS", "")
    try:
        return {int(uid) for uid in text.split(",") if uid.strip()}
    except ValueError:
        raise ValueError(f"PS_IPC_UIDS must be user ids with commas, got {text!r}") from None


def integer(variable: str, default: int) -> int:
    """An integer from the environment.

    Raises:
        ValueError: it is none; names the variable.
    """
    text = os.environ.get(variable)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{variable} must be an integer, got {text!r}") from None


def from_launcher(value: int | None, variable: str) -> int:
    """``value``, or else the launcher's environment variable.

    Raises:
        ValueError: neither is given, or the variable is no integer.
    """
    if value is not None:
        return value
    if variable not in os.environ:
        raise ValueError(f"give {variable.lower()}=, or set {variable} as torchrun does")
    return integer(variable, 0)


def keeps_groups() -> bool:
    """``PS_KEEP_GROUPS``: whether the group that weights are broadcast in is kept between updates;
    making and destroying one takes half a second on GPUs.

    Raises:
        ValueError: it is no integer.
    """
    return integer("PS_KEEP_GROUPS", 1) != 0


def trace_folder() -> str:
    """``PS_TRACE``: the folder for the traces of updates; empty: none are written."""
    return os.environ.get("PS_TRACE", "")


REPLAY_MODES = ("on", "off", "verify")


def replay_mode() -> str:
    """``PS_REPLAY``: whether workers replay what they learned of a loader; see ``replay.py``.

    Raises:
        ValueError: it is none of ``on``, ``off``, ``verify``.
    """
    mode = os.environ.get("PS_REPLAY", "on")
    if mode not in REPLAY_MODES:
        raise ValueError(f"PS_REPLAY must be one of {', '.join(REPLAY_MODES)}, got {mode!r}")
    return mode


def replay_check() -> int:
    """``PS_REPLAY_CHECK``: of so many replayed updates, one bucket also goes through the loader.

    Raises:
        ValueError: it is no positive integer.
    """
    every = integer("PS_REPLAY_CHECK", 50)
    if every < 1:
        raise ValueError(f"PS_REPLAY_CHECK must be positive, got {every}")
    return every
