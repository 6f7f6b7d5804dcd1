"""How the ranks of a call tell each other what each of them has to say.

A rank puts its value into the store. The last one to come puts all values together, so that each of
the others asks for one, not for all. On a host with a leader, see ``Host``, the ranks tell it their
values: it puts one for all of them into the store, asks for the result, and hands that on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from checkpoint_engine.world.host import APART, STORE, VALUE, Words
from checkpoint_engine.world.outcome import missing
from checkpoint_engine.world.packing import came, pack, peek, unpack, values_of

if TYPE_CHECKING:
    from checkpoint_engine.world.call import Call

PAUSE = 0.01  # seconds at most between two looks at what other ranks do
UNRUNG = 0.25  # seconds after which a rank looks though nobody rang: a bell is no promise


def gather(call: Call, what: str, value: bytes) -> list[bytes]:
    """Every member's ``value``, in rank order. Called by all members.

    Raises:
        CollectiveError: ranks do not come in time.
        RuntimeError: what came back, of this exchange or an earlier one, is not what all said.
        ValueError: what the store holds was not written by a rank.
    """
    if len(call.members) == 1:
        call.tell(f"{what}/{call.rank}", value)
        return [value]
    packed = _exchange(call, what, value)
    call.seen.update(packed)
    values = unpack(packed, len(call.members))
    if values[call.members.index(call.rank)] != value:
        raise RuntimeError(
            f"of {what!r} in {call.name}, rank {call.rank} got back another value than it gave: "
            "what it was handed is not of this exchange"
        )
    return values


def _exchange(call: Call, what: str, value: bytes) -> bytes:
    """What the last rank to come has packed."""
    # Before this rank arrives: the last one may ring as soon as it has.
    heard = call.membership.world.liveness.rings
    packed, is_counted = b"", False
    if call.membership.host.follows:
        packed, is_counted = _follow(call, what, value)
        if is_counted and call.heard is None:  # the leader has looked after this rank spoke
            call.heard = heard
    if packed:
        return packed
    is_last = not is_counted and _arrive(call, what, value)
    packed = _pack(call, what) if is_last else _await_packed(call, what, heard)
    call.membership.host.hand_on(_name(call, what), VALUE + packed)
    return packed


def _name(call: Call, what: str) -> str:
    """Of an exchange, among all that there ever are in a world."""
    return f"{call.membership.part}/{what}"


# ---------------------------------------------------------------------- by the store


def _arrive(call: Call, what: str, value: bytes) -> bool:
    """Put into the store what this rank says, with those that follow it if they are all there.
    Returns whether nobody is missing any more."""
    call.announce()
    said = _collect(call, what, value)
    if not said or not _decide(call, what, pack(list(said.values()))):
        call.membership.host.hand_on(_name(call, what), APART)
        said = {call.rank: value}
        call.tell(f"{what}/{call.rank}", value)
    call.store.append(f"{what}/roll", ",".join(map(str, said)) + " ")
    count = call.store.add(f"{what}/arrived", len(said))
    if count == len(said):
        call.keys += [f"{what}/roll", f"{what}/arrived"]
    return bool(count == len(call.members))


def _pack(call: Call, what: str) -> bytes:
    packed = pack(values_of(call.store, what, call.members))
    call.tell(what, packed)
    call.store.check([what])  # answered once it is there: before that nobody shall look
    membership = call.membership
    liveness = membership.world.liveness
    liveness.ring_leaders() if membership.host is membership.world.host else liveness.ring()
    return packed


def _await_packed(call: Call, what: str, heard: int | None) -> bytes:
    looks_at = time.monotonic() + UNRUNG
    if call.heard is None:
        call.look_for_outcome()
    while True:
        if heard != call.membership.world.liveness.rings or time.monotonic() > looks_at:
            heard, looks_at = call.membership.world.liveness.rings, time.monotonic() + UNRUNG
            if (packed := peek(call.store, what)) is not None:
                return packed
            call.look_for_outcome()
        if call.is_late():  # says who did not come, which a plain ``check`` does not know
            return _pack_at_the_end(call, what)
        call.look_around(lambda: _absent(call, what))
        if not call.membership.host.follows:
            call.membership.world.liveness.await_ring(heard, PAUSE)
        elif (content := call.membership.host.hear(_name(call, what), PAUSE))[:1] == VALUE:
            return content[1:]
        elif content == STORE:
            looks_at = 0.0


def _pack_at_the_end(call: Call, what: str) -> bytes:
    """Of an exchange that nobody has packed in time: the last one to come may have died, or was
    stopped, before it had."""
    if absent := _absent(call, what):
        raise missing(call.deadline.seconds, call.name, absent)
    return pack(values_of(call.store, what, call.members))


def _absent(call: Call, what: str) -> list[int]:
    there = came(call.store, what)
    return [rank for rank in call.members if rank not in there]


# ---------------------------------------------------------------------- by the leader of a host


def _follow(call: Call, what: str, value: bytes) -> tuple[bytes, bool]:
    """Say it to the leader. Returns what all have packed, if that handed it on; and whether it has
    counted this rank: otherwise this rank must arrive by itself."""
    ends = _end_of_patience(call)
    is_told = call.membership.host.say(_name(call, what), call.seen.digest(), value)
    while is_told and time.monotonic() < ends and not call.is_late():
        content = call.membership.host.hear(_name(call, what), PAUSE)
        if not call.membership.host.follows:  # it is lost, and may have counted this rank before
            break
        if content:
            return (content[1:], True) if content[:1] == VALUE else (b"", content == STORE)
        if call.heard is not None and call.heard != call.membership.world.liveness.rings:
            call.look_for_outcome()
    return b"", is_told and not _decide(call, what, APART)


def _collect(call: Call, what: str, value: bytes) -> dict[int, bytes]:
    """As the leader: what it and those that follow it say. Empty if they speak for themselves, as
    one of them is late, or is not told what it needs."""
    ends = _end_of_patience(call)
    host, name = call.membership.host, _name(call, what)
    words: Mapping[int, Words | None] = {}
    while None in (words := host.listen(name, PAUSE if words else 0.0)).values():
        if call.heard is not None and call.heard != call.membership.world.liveness.rings:
            call.look_for_outcome()
        if time.monotonic() > ends or call.is_late():
            return {}
    if not words:
        return {}
    if call.heard is None:
        call.look_for_outcome()  # for those that follow, too
    said = {rank: one for rank, one in words.items() if one is not None}
    differing = [rank for rank, (_, digest, _) in said.items() if digest != call.seen.digest()]
    if differing:
        raise RuntimeError(
            f"ranks {differing} were handed other values by rank {call.rank}, which leads their "
            f"host, than it holds itself: {call.name} cannot go on"
        )
    if any(kind == APART for kind, *_ in said.values()):
        return {}
    return {call.rank: value} | {rank: theirs for rank, (*_, theirs) in said.items()}


def _decide(call: Call, what: str, content: bytes) -> bool:
    """Whether this is what the host does, of which ranks may have decided otherwise: the leader
    writes what all of them say, or one of them, which waited too long, that each goes by itself."""
    leads = call.membership.host.leader is None
    key = f"{what}/host-{call.rank if leads else call.membership.host.leader}"
    if leads:
        call.keys.append(key)
    held = bytes(call.store.compare_set(key, "", content))
    return held == content


def _end_of_patience(call: Call) -> float:
    return time.monotonic() + min(UNRUNG, call.deadline.remaining() / 4)
