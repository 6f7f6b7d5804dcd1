"""Inputs from seeds and a random generator: the same seed gives the same inputs."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence

_INTERESTING = (
    b"\x00",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\xff",
    b"\xff" * 8,
    b"\x00" * 8,
    b"[" * 50,
    b'{"a":' * 20,
    b"1e999",
    b"NaN",
    b"-1",
    b"9" * 40,
    b"null",
    b"true",
    b'"\\ud800"',
    b"\\u0000",
    b"2\x86" * 40,  # a nested tuple of itself
    b"r\xff\xff\xff\x0f",  # pickle: a memo of gigabytes
    b"\x8f(", b"\x90", b"}(", b"u", b"\x94h\x00", b"cos\nsystem\n", b"R", b"b", b"\x81", b".",
)  # fmt: skip


def inputs(seeds: Sequence[bytes], count: int, seed: int) -> Iterator[bytes]:
    """``count`` inputs. The pool grows by what was made, so that changes add up."""
    chance = random.Random(seed)
    pool = list(seeds)
    for number in range(count):
        data = _mutated(chance, pool)
        if number % 8 == 0 and len(data) < 4096:
            pool.append(data)
            if len(pool) > 512:
                pool.pop(chance.randrange(len(seeds), len(pool)))
        yield data


def _mutated(chance: random.Random, pool: Sequence[bytes]) -> bytes:
    data = chance.choice(pool)
    if data[:1] == b"x" and chance.random() < 0.8:  # zlib: change what is inside
        try:
            stream = zlib.decompressobj()
            return zlib.compress(_changed(chance, stream.decompress(data, 1 << 20), pool), 1)
        except zlib.error:
            pass
    return _changed(chance, data, pool)


def _changed(chance: random.Random, data: bytes, pool: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        at = chance.randint(0, len(changed))
        match chance.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                changed[at:at] = chance.choice(_INTERESTING)
            case 2:
                changed[at : at + chance.randint(1, 8)] = b""
            case 3:
                end = at + chance.randint(1, 16)
                changed[at:at] = changed[at:end] * chance.choice((1, 1, 1, 30))
            case 4:
                changed[at : at + 4] = chance.choice(_INTERESTING)
            case _:
                other = chance.choice(pool)
                start = chance.randint(0, len(other))
                changed[at:at] = other[start : start + 32]
    return bytes(changed[: 1 << 16])
