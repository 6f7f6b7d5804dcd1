"""What all ranks of a call say in one exchange, as one value in the store."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence


def pack(values: Sequence[bytes]) -> bytes:
    """Compressed: what the ranks say differs little."""
    sizes = json.dumps([len(value) for value in values]).encode()
    return zlib.compress(b"\n".join([sizes, b"".join(values)]), 1)


def unpack(blob: bytes, count: int) -> list[bytes]:
    """The ``count`` values. Raises ``ValueError`` if no rank packed them: whoever reaches the store
    may write there."""
    try:
        head, _, rest = zlib.decompress(blob).partition(b"\n")
        sizes = json.loads(head)
        values = []
        for size in sizes:
            values.append(rest[:size])
            rest = rest[size:]
    except (zlib.error, ValueError, TypeError, RecursionError) as error:
        raise _strange(blob) from error
    if len(values) != count or rest:
        raise _strange(blob)
    return values


def _strange(blob: bytes) -> ValueError:
    return ValueError(
        f"what the store holds of an exchange between ranks was not written by one: {blob!r:.200}"
    )
