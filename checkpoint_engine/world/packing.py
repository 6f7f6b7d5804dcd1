"""What all ranks of an exchange say, as one value: whoever puts it together asks the store for each
value, and everybody else for this one."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any

_NOTHING = "?"  # what ``peek`` takes for a key that is not there; no rank writes that
_LARGEST = 1 << 30  # bytes of what ``unpack`` returns


def peek(store: Any, key: str) -> bytes | None:
    """What a store has under ``key`` now, by one request. ``None``: nothing."""
    found = bytes(store.compare_set(key, _NOTHING, _NOTHING))
    return None if found == _NOTHING.encode() else found


def pack(values: Sequence[bytes]) -> bytes:
    """For ``unpack``. Ranks mostly say the same or nearly so: equal values go once, compressed."""
    distinct = {value: place for place, value in enumerate(dict.fromkeys(values))}
    numbers = [len(values), len(distinct)]
    numbers += [distinct[value] for value in values]
    numbers += map(len, distinct)
    head = struct.pack(f"!{len(numbers)}I", *numbers)
    return zlib.compress(head + b"".join(distinct), level=1)


def unpack(packed: bytes, count: int) -> list[bytes]:
    """The inverse of ``pack``, of ``count`` values.

    Raises:
        ValueError: no rank packed that: whoever reaches the store may write there.
    """
    try:
        stream = zlib.decompressobj()
        content = memoryview(stream.decompress(packed, _LARGEST))
        said, kinds = struct.unpack_from("!2I", content)
        if said != count or kinds > count:
            raise ValueError(f"{kinds} values of {said} ranks")
        places = struct.unpack_from(f"!{count}I", content, 8)
        lengths = struct.unpack_from(f"!{kinds}I", content, 8 + 4 * count)
        ends = 8 + 4 * (count + kinds)
        distinct = []
        for length in lengths:
            distinct.append(bytes(content[ends : ends + length]))
            ends += length
        if ends != len(content) or not stream.eof:
            raise ValueError(f"{len(content)} bytes of {said} ranks")
        return [distinct[place] for place in places]
    except (ValueError, IndexError, struct.error, zlib.error) as error:
        raise ValueError(
            f"what the store holds of an exchange was not written by a rank: {error}"
        ) from error


def came(store: Any, what: str) -> dict[int, str]:
    """The ranks whose values of an exchange are in the store, and the key of each. A line of the
    roll is a rank that came by itself, or several of a host, of which the first leads."""
    roll = peek(store, f"{what}/roll") or b""
    try:
        lines = [[int(rank) for rank in line.split(b",")] for line in roll.split()]
    except ValueError as error:
        raise ValueError(f"no rank wrote this roll into the store: {roll!r:.200}") from error
    return {
        rank: f"{what}/{rank}" if len(line) == 1 else f"{what}/host-{line[0]}"
        for line in lines
        for rank in line
    }


def values_of(store: Any, what: str, members: Sequence[int]) -> list[bytes]:
    """What all members of an exchange have put into the store, once they have.

    Raises:
        ValueError: the store does not hold one value of each: whoever reaches it may write there.
    """
    keys = came(store, what)
    if sorted(keys) != list(members):
        raise ValueError(f"the store holds values of ranks {sorted(keys)}, not of {list(members)}")
    ranks_at: dict[str, list[int]] = {}
    for rank, key in keys.items():
        ranks_at.setdefault(key, []).append(rank)
    values: dict[int, bytes] = {}
    for (key, ranks), held in zip(ranks_at.items(), store.multi_get(list(ranks_at)), strict=True):
        said = [held] if key == f"{what}/{ranks[0]}" else unpack(held, len(ranks))
        values |= zip(ranks, said, strict=True)
    return [values[rank] for rank in members]
