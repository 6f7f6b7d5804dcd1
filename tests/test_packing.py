"""What all ranks of an exchange say, as one value, and the bell that tells ranks to look for it."""

from __future__ import annotations

import struct
import time
import tracemalloc
import zlib
from typing import Any

import pytest
import torch.distributed as dist

from checkpoint_engine.ground.deadline import Deadline, poll
from checkpoint_engine.world.liveness import Liveness, LivenessClient, LivenessServer
from checkpoint_engine.world.packing import pack, peek, unpack

SOON = 10.0


@pytest.mark.parametrize(
    "values", [[b""], [b"", b""], [b"a", b"", b"a"], [bytes(range(256)) * 9, b"\0", b"?"]]
)
def test_what_is_packed_comes_out(values: list[bytes]) -> None:
    assert unpack(pack(values), len(values)) == values


def test_equal_values_go_once() -> None:
    value = bytes(range(256)) * 16
    assert len(pack([value] * 1024)) < len(pack([value])) + 100


@pytest.mark.parametrize(
    "packed",
    [b"", b"garbage", pack([b"a"]), pack([b"a", b"b"])[:-3], zlib.compress(b"\xff" * 64)],
)
def test_what_no_rank_packed_is_refused(packed: bytes) -> None:
    with pytest.raises(ValueError, match="was not written by a rank"):
        unpack(packed, 2)


def test_what_no_rank_packed_takes_no_memory() -> None:
    """More values than ranks: the lengths alone would become objects of half a gigabyte."""
    lengths = 15_000_000
    packed = zlib.compress(struct.pack("!5I", 3, lengths, 0, 0, 0) + b"\0\0\3\xe8" * lengths)
    assert len(packed) < 300_000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="15000000 values of 3 ranks"):
            unpack(packed, 3)
        assert tracemalloc.get_traced_memory()[1] < 4 * 5 * lengths
    finally:
        tracemalloc.stop()


def test_peek_neither_waits_nor_writes() -> None:
    store = dist.HashStore()
    assert peek(store, "key") is None
    assert not store.check(["key"])
    for value in ("", "value"):
        store.set("key", value)
        assert peek(store, "key") == value.encode()


def test_a_bell_is_heard_by_all_others() -> None:
    server = LivenessServer(3)
    clients = [
        LivenessClient(rank, "127.0.0.1", server.port, server.token, lambda: None)
        for rank in (1, 2)
    ]
    ranks: list[Any] = [server, *clients]
    try:
        for rings in ranks:
            before = [one.rings for one in ranks]
            rings.ring()
            for one, heard in zip(ranks, before, strict=True):
                if one is not rings:
                    one.await_ring(heard, SOON)
                    assert one.rings > heard
        assert not server.gone
        clients[0].close()
        deadline = Deadline(SOON)
        poll(lambda: clients[1].gone == {1}, lambda: deadline.check("news of the dead"))
    finally:
        for one in reversed(ranks):
            one.close()


def test_where_no_bell_can_be_heard_ranks_look_by_themselves() -> None:
    alone = Liveness()
    heard, began = alone.rings, time.monotonic()
    while alone.rings == heard:
        alone.await_ring(heard, 0.01)
    assert time.monotonic() - began < 1.0
