"""The ranks of one host: what their leader does for them, and that nothing depends on it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist

from checkpoint_engine.errors import UpdateError
from checkpoint_engine.ground.deadline import Deadline, poll
from checkpoint_engine.world import exchange, host, store
from checkpoint_engine.world.exchange import APART, STORE, VALUE
from checkpoint_engine.world.host import Host
from checkpoint_engine.world.packing import came, pack, unpack, values_of
from test_control import LONG, SOON, Rank, _stop_until, first_life, run_world

SECRET = "5" * 32
DIGEST = bytes(range(32))
PATIENT = 5.0  # seconds: busy machines do not make ranks go to the store by themselves
NO_ROLL = r"no rank wrote this roll|the store holds values of ranks|not written by a rank"


# ---------------------------------------------------------------------- one host, in one process


@pytest.fixture
def join() -> Iterator[Callable[[int], Host]]:
    with contextlib.ExitStack() as stack:

        def enter(rank: int) -> Host:
            one = Host()
            stack.callback(one.close)
            one.join(rank, 9, SECRET, lambda has_one: None)
            return one

        yield enter


@pytest.fixture
def connect(join: Callable[[int], Host]) -> Iterator[Callable[[], socket.socket]]:
    """A connection of somebody who knows the name."""
    with contextlib.ExitStack() as stack:

        def enter() -> socket.socket:
            one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(one)
            one.settimeout(SOON)
            one.connect(host.name_of(SECRET))
            return one

        yield enter


def followed(join: Callable[[int], Host], *ranks: int) -> list[Host]:
    """A leader, and those that follow it and have been greeted."""
    leader = join(4)
    others = [join(rank) for rank in ranks]
    ends = Deadline(SOON)
    while len(leader.listen("", 0.01)) < len(ranks):
        ends.check("those that follow")
    for other in others:
        other.hear("", SOON)
    return [leader, *others]


def test_the_first_to_come_leads_and_the_others_are_heard_and_told(
    join: Callable[[int], Host],
) -> None:
    leader, *others = followed(join, 2, 7)
    assert not leader.follows
    assert all(one.follows and one.leader == 4 for one in others)
    assert leader.listen("1/v", 0.0) == {2: None, 7: None}
    assert others[0].say("1/v", DIGEST, b"\0two")
    assert leader.listen("1/v", SOON) == {2: (VALUE, DIGEST, b"\0two"), 7: None}
    assert leader.listen("2/v", 0.0) == {2: None, 7: None}
    leader.hand_on("1/v", VALUE + b"all")
    for one in others:
        assert one.hear("0/v", SOON) == b""  # of another exchange
        assert one.hear("1/v", 0.0) == b""
    leader.hand_on("1/v", VALUE + b"all")
    assert [one.hear("1/v", SOON) for one in others] == [VALUE + b"all"] * 2


def test_what_is_too_long_goes_by_the_store(join: Callable[[int], Host]) -> None:
    leader, other = followed(join, 2)
    assert not other.say("v", DIGEST, bytes(1 << 20))
    assert leader.listen("v", SOON) == {2: (APART, DIGEST, b"")}
    leader.hand_on("v", VALUE + bytes(1 << 20))
    assert other.hear("v", SOON) == STORE


def test_a_rank_that_has_not_been_greeted_speaks_for_itself(join: Callable[[int], Host]) -> None:
    """The leader must not count it: it would not know whose decisions concern it."""
    leader, other = join(4), join(2)
    assert not other.say("v", DIGEST, b"value")
    said: Any = {}
    deadline = Deadline(SOON)
    while said.get(2) is None:
        said = leader.listen("v", 0.01)
        deadline.check("the rank to be heard")
    assert said == {2: (APART, DIGEST, b"")}


def test_a_leader_that_is_lost_is_followed_no_more(join: Callable[[int], Host]) -> None:
    leader, other = followed(join, 2)
    leader.close()
    assert other.hear("v", SOON) == APART
    assert not other.follows
    assert not other.say("v", DIGEST, b"value")
    assert join(3).listen("v", 0.0) == {}  # leads those that come from now on


def test_a_rank_that_was_started_again_replaces_the_one_before(join: Callable[[int], Host]) -> None:
    leader, other = followed(join, 2)
    assert other.say("v", DIGEST, b"of the dead")
    assert leader.listen("v", SOON)[2] is not None
    other.close()
    again = join(2)
    deadline = Deadline(SOON)
    while again.leader is None:
        leader.listen("v", 0.01)
        again.hear("v", 0.01)
        deadline.check("the greeting")
    assert leader.listen("v", 0.0) == {2: None}


@pytest.mark.parametrize("comes_first", [True, False])
def test_the_one_before_ends_in_the_very_moment(
    join: Callable[[int], Host], connect: Callable[[], socket.socket], comes_first: bool
) -> None:
    """As where the leader was stopped meanwhile: it finds both at one look."""
    leader, other = followed(join, 2)
    again = connect()
    leader.listen("v", 0.0)
    for act in [lambda: again.send(f"{SECRET} 2".encode()), other.close][
        :: 1 if comes_first else -1
    ]:
        act()
    assert leader.listen("v", SOON) == {2: None}
    again.settimeout(SOON)
    assert again.recv(1024).endswith((4).to_bytes(4, "big"))


@pytest.mark.parametrize(
    "hello", [b"", b"x", b"0" * 32 + b" 2", f"{SECRET} 99".encode(), f"{SECRET} two".encode()]
)
def test_what_is_no_hello_is_turned_away(
    join: Callable[[int], Host], connect: Callable[[], socket.socket], hello: bytes
) -> None:
    leader, other = followed(join, 2)
    stranger = connect()
    stranger.send(hello)
    leader.listen("v", SOON)
    leader.listen("v", 0.0)
    assert stranger.recv(1) == b""
    assert other.say("v", DIGEST, b"value")
    assert leader.listen("v", SOON) == {2: (VALUE, DIGEST, b"value")}


def test_silent_strangers_are_limited_and_hold_nobody_up(
    join: Callable[[int], Host], connect: Callable[[], socket.socket]
) -> None:
    leader, other = followed(join, 2)
    strangers = []
    for _ in range(9 + 64 + 3):
        strangers.append(connect())
        leader.listen("v", SOON)
    assert [one.recv(1) for one in strangers[:3]] == [b""] * 3
    assert other.say("v", DIGEST, b"value")
    assert leader.listen("v", SOON) == {2: (VALUE, DIGEST, b"value")}


def test_another_users_process_neither_leads_nor_follows(
    join: Callable[[int], Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, other = followed(join, 2)
    monkeypatch.setattr(host, "is_of_this_user", lambda connection: False)
    foreign = join(3)
    assert not foreign.follows
    assert leader.listen("v", 0.05) == {2: None}
    assert other.follows


# ---------------------------------------------------------------------- what the store holds


@pytest.mark.parametrize("seed", range(20))
def test_however_ranks_come_their_values_come_out_in_order(seed: int) -> None:
    chance = random.Random(seed)
    members = sorted(chance.sample(range(40), chance.randint(2, 20)))
    values = {rank: chance.randbytes(chance.choice([0, 1, 100])) for rank in members}
    held, left = dist.HashStore(), chance.sample(members, len(members))
    while left:
        host_of = [left.pop() for _ in range(min(len(left), chance.randint(1, 5)))]
        if len(host_of) == 1:
            held.set(f"v/{host_of[0]}", values[host_of[0]])
        else:
            held.set(f"v/host-{host_of[0]}", pack([values[rank] for rank in host_of]))
        held.append("v/roll", ",".join(map(str, host_of)) + " ")
        assert sorted([*came(held, "v"), *left]) == members
    assert values_of(held, "v", members) == [values[rank] for rank in members]


@pytest.mark.parametrize("roll", ["0 ", "0 1 2 ", "0 x ", "0 1,", ",", "\xff", "0,1 "])
def test_a_roll_that_no_rank_wrote_is_an_error(roll: Any) -> None:
    held = dist.HashStore()
    held.append("v/roll", roll)
    held.set("v/host-0", "garbage")
    with pytest.raises(ValueError, match=NO_ROLL):
        values_of(held, "v", [0, 1])


# ---------------------------------------------------------------------- worlds of real processes


class Block(Host):
    """So many ranks meet as if they had a host of their own, and the first of them leads."""

    ranks = 2

    def join(self, rank: int, size: int, secret: str, on_leader: Callable[[bool], None]) -> None:
        super().join(rank, size, f"{secret}{rank // self.ranks}", on_leader)

    def _lead(self) -> bool:
        return self._rank % self.ranks == 0 and super()._lead()


def on_hosts_of(
    ranks: int, program: Callable[[Rank], Any], patience: float = PATIENT
) -> Callable[[Rank], Any]:
    """The program once the ranks of each host have found their leader."""

    def run(me: Rank) -> Any:
        Block.ranks, store.Host = ranks, Block  # type: ignore[misc]  # in this process
        exchange.UNRUNG = PATIENT
        host._TRIES = 5000
        for _ in range(3):  # connect; be greeted; speak through the leader
            assert me.exchange() == me.everyone()
        exchange.UNRUNG = patience
        return program(me)

    return run


@pytest.mark.parametrize(("size", "ranks"), [(2, 2), (3, 3), (4, 2), (5, 2), (5, 3)])
def test_what_all_say_reaches_every_rank_of_every_host(size: int, ranks: int) -> None:
    def program(me: Rank) -> Any:
        for value in ("-a", "-b"):
            assert me.exchange(value) == me.everyone(value)
        with me.plane.call("work", LONG) as call:
            values = call.all_gather("v", bytes([me.rank]) * (200_000 if me.rank == 1 else 1))
            assert [value[:1] for value in values] == [bytes([rank]) for rank in range(size)]
            call.all_gather("w", b"")
            roll = sorted(set(came(call.store, "w").values()))
        return roll

    hosts = [range(first, min(first + ranks, size)) for first in range(0, size, ranks)]
    for roll in run_world(size, on_hosts_of(ranks, program)):
        assert len(roll) == len(hosts)


def test_keys_of_hosts_do_not_pile_up() -> None:
    def program(me: Rank) -> Any:
        counts = []
        for _ in range(30):
            me.exchange()
            if me.rank == 0:
                counts.append(store._stores["127.0.0.1", me.port].store.num_keys())
        return counts

    counts = run_world(4, on_hosts_of(2, program))[0]
    ahead = 2 * 4  # keys of the next call, where the others may be already
    assert max(counts[10:]) <= max(counts[:10]) + ahead


def instead_of_handing_on(action: Callable[[Host, str, bytes], None]) -> None:
    """In this process, of the results of exchanges."""

    def hand_on(self: Host, name: str, content: bytes) -> None:
        if content[:1] == VALUE and self.followers:
            action(self, name, content)
        else:
            Host.hand_on(self, name, content)

    Block.hand_on = hand_on  # type: ignore[method-assign]


def work(call: Any) -> None:
    call.all_gather("v", b"")
    call.begin("loading")
    call.all_gather("w", b"")


@pytest.mark.parametrize("leader", [2, 4])
def test_a_leader_that_dies_before_it_hands_on_is_named_at_once(leader: int) -> None:
    def die(me: Rank) -> Any:
        instead_of_handing_on(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        me.failing(work)

    def program(me: Rank) -> Any:
        if me.rank == leader:
            first_life(me, lambda: on_hosts_of(2, die)(me))
            return "", 0.0, leader
        return on_hosts_of(2, lambda me: me.failing(work))(me)[:3]

    for rank, (text, seconds, named) in enumerate(run_world(6, program)):
        assert named == leader
        assert rank == leader or f"rank {leader} is gone" in text
        assert seconds < PATIENT


def test_ranks_whose_leader_hangs_up_are_not_counted_twice() -> None:
    """It has counted them, and they cannot tell by the connection alone."""

    def hang_up(self: Host, name: str, content: bytes) -> None:
        for follower in list(self.followers.values()):
            follower.shutdown(socket.SHUT_RDWR)

    def program(me: Rank) -> Any:
        if me.rank == 2:
            instead_of_handing_on(hang_up)
        with me.plane.call("work", LONG) as call:
            values = call.all_gather("v", b"%d" % me.rank)
            arrived = call.store.add("v/arrived", 0)
        assert me.exchange() == me.everyone()
        return values, arrived

    seen = run_world(4, on_hosts_of(2, program))
    assert seen == [([b"0", b"1", b"2", b"3"], 4)] * 4


def test_ranks_whose_leader_is_stopped_go_to_the_store() -> None:
    """It has counted them, and they read what all have packed; with it the call goes on."""

    def stop(me: Rank) -> Any:
        def pause(self: Host, name: str, content: bytes) -> None:
            _stop_until(me.signals[0])
            Host.hand_on(self, name, content)

        if me.rank == 2:
            instead_of_handing_on(pause)
        with me.plane.call("work", LONG) as call:
            values = call.all_gather("v", b"%d" % me.rank)
            if me.rank == 3:
                me.signals[0].set()
        if me.rank == 2:
            instead_of_handing_on(Host.hand_on)
        assert me.exchange() == me.everyone()
        return values

    seen = run_world(4, on_hosts_of(2, stop, patience=0.5))
    assert seen == [[b"0", b"1", b"2", b"3"]] * 4


def test_a_leader_that_stays_stopped_is_the_one_that_is_named() -> None:
    """Those that follow it have come, though it did not say so."""

    def program(me: Rank) -> Any:
        if me.rank == 2:
            _stop_until(me.signals[0])
            with contextlib.suppress(UpdateError):
                me.exchange()
            return None
        seen = me.failing(work, timeout=2.0)
        if me.rank == 0:
            me.signals[0].set()
        return seen[:2]

    seen = run_world(4, on_hosts_of(2, program, patience=0.25))
    for text, seconds in (one for one in seen if one is not None):
        assert "gave up after 2 s: ranks [2] did not join work" in text
        assert seconds < SOON


@pytest.mark.parametrize("own", [True, False])
def test_values_that_a_leader_hands_on_are_not_believed(own: bool) -> None:
    """A rank knows its own value; that others are not what the leader read is seen next time."""

    def lie(self: Host, name: str, content: bytes) -> None:
        values = unpack(content[1:], 4)
        values[3 if own else 0] = b"another"
        Host.hand_on(self, name, VALUE + pack(values))

    def program(me: Rank) -> Any:
        if me.rank == 2:
            instead_of_handing_on(lie)
        seen = me.failing(work)
        if me.rank == 2:
            instead_of_handing_on(Host.hand_on)
        assert me.exchange() == me.everyone()
        return seen

    for text, *_ in run_world(4, on_hosts_of(2, program)):
        says = "got back another value than it gave" if own else "ranks [3] were handed other"
        assert says in text


def test_a_rank_that_is_late_does_not_go_by_the_leader_and_all_is_well() -> None:
    def program(me: Rank) -> Any:
        if me.rank == 3:
            assert me.signals[0].wait(LONG)
        with me.plane.call("work", LONG) as call:
            if me.rank == 0:
                deadline = Deadline(LONG)
                poll(lambda: 2 in came(call.store, "v"), lambda: deadline.check("rank 2"))
                me.signals[0].set()
            return call.all_gather("v", b"%d" % me.rank), came(call.store, "v")

    for values, keys in run_world(4, on_hosts_of(2, program, patience=0.25)):
        assert values == [b"0", b"1", b"2", b"3"]
        assert (keys[2], keys[3]) == ("v/2", "v/3")
