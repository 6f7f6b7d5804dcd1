"""``PS_SKIP_EQUAL``: what workers hold already is not sent again, and nothing else is left out."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from checkpoint_engine.errors import UpdateError
from checkpoint_engine.handover import wire
from checkpoint_engine.replay import replayed
from checkpoint_engine.transfer import host_peers
from checkpoint_engine.update.session import WorkerSession
from checkpoint_engine.worker import update_weights_from_ipc
from fleet import digests
from test_control import Rank, run_world
from test_peers import BUCKET, COUNT, Server
from torchrun import mooncake_works

pytestmark = pytest.mark.alone

LEARNED = 2  # updates, after which a worker states what it holds
NUMEL = BUCKET // 8  # of a tensor; a bucket takes two
Seeds = dict[int, int]


@pytest.fixture(autouse=True)
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PS_MAX_BUCKET_SIZE_GB", str(BUCKET / 2**30))
    monkeypatch.setenv("PS_SKIP_EQUAL", "1")
    with tempfile.TemporaryDirectory(prefix="skip-") as folder:
        monkeypatch.setenv("PS_IPC_DIR", folder)
        yield


def tensors_of(owner: int, seeds: Seeds, default: int = 1) -> dict[str, torch.Tensor]:
    """``seeds``: of some tensors; the others have the default one."""
    made = {}
    for i in range(COUNT):
        seed = 1000 * seeds.get(i, default) + 10 * i + owner
        made[f"of.{owner}.{i}"] = torch.rand(NUMEL, generator=torch.Generator().manual_seed(seed))
    return made


class Model(torch.nn.Module):
    """Keeps one half of every tensor of all ranks, twice, as a tensor-parallel worker. ``each``
    tensors of a rank are in one module."""

    def __init__(self, rank: int, size: int, each: int = 1) -> None:
        super().__init__()
        self.rank, self.size, self.each = rank, size, each
        self.layers = torch.nn.ModuleDict()
        for owner in range(size):
            for begin in range(0, COUNT, each):
                layer = torch.nn.ParameterDict()
                for i in range(begin, min(begin + each, COUNT)):
                    layer[f"p{i}"] = torch.nn.Parameter(torch.zeros(NUMEL), requires_grad=False)
                self.layers[f"{owner}-{begin}"] = layer

    def of(self, owner: int, i: int) -> torch.nn.Parameter:
        return self.layers[f"{owner}-{i // self.each * self.each}"][f"p{i}"]

    def load_weights(self, weights: Any) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            _, owner, i = name.split(".")
            loaded.add(f"layers.{owner}-{int(i) // self.each * self.each}.p{i}")
            half = tensor.narrow(0, self.rank % 2 * (NUMEL // 2), NUMEL // 2)
            self.of(int(owner), int(i))[: NUMEL // 2].copy_(half)
            self.of(int(owner), int(i))[NUMEL // 2 :].copy_(half)
        return loaded

    def is_right(self, seeds: Seeds, default: int = 1) -> bool:
        begin = self.rank % 2 * (NUMEL // 2)
        return all(
            torch.equal(self.of(owner, i), tensor[begin : begin + NUMEL // 2].repeat(2))
            for owner in range(self.size)
            for i, tensor in enumerate(tensors_of(owner, seeds, default).values())
        )


class Skipping:
    """A server whose worker has learned its loader."""

    def __init__(self, me: Rank, each: int = 1, host: int = 0) -> None:
        if host:
            host_peers._this_host = lambda: f"host-{me.rank // host}"  # type: ignore[assignment]
        self.me = me
        self.server = Server(me)
        self.start_worker(each)
        for default in range(100, 100 + LEARNED):
            self.send({}, default)

    def start_worker(self, each: int = 1) -> None:
        self.model = Model(self.me.rank, self.me.size, each)
        self.server.run = replayed(self.model.load_weights)

    def send(self, seeds: Seeds, default: int = 1, **options: Any) -> tuple[int, int]:
        """How many tensors were sent and skipped, of an update that is right."""
        report = self.report(seeds, default, **options)
        assert self.model.is_right(seeds, default)
        assert report.skipped_bytes == report.skipped_tensors * NUMEL * 4
        return report.tensors, report.skipped_tensors

    def report(self, seeds: Seeds, default: int = 1, **options: Any) -> Any:
        owned = tensors_of(self.me.rank, seeds, default)
        return self.server.send("step", owned, **options)

    @contextlib.contextmanager
    def failing(self, after: int) -> Iterator[None]:
        """This rank's worker fails once it has loaded so many buckets."""
        run, loaded = self.server.run, 0

        def wrapped(load: Callable[..., None]) -> Callable[..., None]:
            def count(*args: Any, **options: Any) -> None:
                nonlocal loaded
                if loaded == after:
                    raise RuntimeError("fails here")
                loaded += 1
                load(*args, **options)

            return count

        with (
            mock.patch.object(run, "replay", wrapped(run.replay)),
            mock.patch.object(run, "load_bucket", wrapped(run.load_bucket)),
        ):
            yield


FROZEN = {i: 2 for i in range(COUNT // 2)}  # what is not frozen, of the others


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("transport", ["auto", "group"])
def test_what_is_frozen_is_not_sent(
    size: int, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PS_TRANSPORT", transport)

    def program(me: Rank) -> list[Any]:
        mine = Skipping(me)
        return [mine.send({}), mine.send(FROZEN), mine.send(FROZEN), mine.send({}, 3)]

    every, half = COUNT * size, COUNT * size // 2
    for seen in run_world(size, program):
        assert seen == [(every, 0), (half, half), (0, every), (every, 0)]


def test_every_second_tensor() -> None:
    """Buckets end at what is left out: there are more of them, each with a sum of its own."""

    def program(me: Rank) -> list[Any]:
        mine = Skipping(me)
        odd = {i: 2 for i in range(1, COUNT, 2)}
        return [mine.send({}), mine.send(odd), mine.send({})]

    half = COUNT, COUNT
    assert run_world(2, program) == [[(2 * COUNT, 0), half, half]] * 2


def test_an_update_that_sends_nothing_has_its_end() -> None:
    hooks: list[str] = []

    def program(me: Rank) -> list[Any]:
        mine = Skipping(me)
        mine.send({})
        version = mock.Mock()

        def receive(address: str) -> None:
            import zmq

            with zmq.Context() as context:
                run = mine.server.run
                options = {"post_hook": lambda: hooks.append("hook"), "version": version}
                update_weights_from_ipc(context, address, None, run=run, **options)

        mine.server.ask = receive
        report = mine.report({}, version="next")
        calls = [call[0] for call in version.method_calls]
        args = version.begin.call_args.args
        return [calls, args, hooks, report.version, report.engines, str(report), report.table()]

    for rank, (calls, args, hook, version, engines, text, table) in enumerate(
        run_world(2, program)
    ):
        assert (calls, args) == (["begin", "complete", "fail"], ("next",))
        assert (hook, version) == (["hook"], "next")
        assert engines == {rank: {"model": {"tensors": 0, "left_over": 0}}}
        assert "0.000 GB in 0 tensors and 0 buckets" in text
        assert "not sent, as held: 0.001 GB in 24 tensors" in text
        assert table


def test_one_bit_is_sent() -> None:
    def program(me: Rank) -> Any:
        mine = Skipping(me)
        mine.send({})
        owned = tensors_of(me.rank, {})
        changed = owned["of.0.5"]
        changed.view(torch.int32)[7] ^= 1 << 31
        report = mine.server.send("step", owned)
        return report.tensors, report.skipped_tensors, bool(mine.model.of(0, 5)[7] == changed[7])

    assert run_world(1, program) == [(1, COUNT - 1, True)]


def test_memory_that_was_written_after_it_was_registered_is_an_error() -> None:
    """As without the setting: what was hashed before is not taken for what is there now."""

    def program(me: Rank) -> Any:
        mine = Skipping(me)
        mine.send({})
        ps, rank = mine.server.ps, me.rank
        ps.register_checkpoint("mine", named_tensors=tensors_of(rank, {}))
        ps.gather_metas("mine")

        def update() -> Any:
            return ps.update("mine", lambda paths: mine.server.ask(paths[rank][1]))

        reports = [update()]
        memory = ps._checkpoints.get("mine").filled[0].buffer
        memory[100] ^= 1
        with pytest.raises(UpdateError, match="are not those"):
            update()
        memory[100] ^= 1
        reports.append(update())
        assert mine.model.is_right({})
        return [(one.tensors, one.skipped_tensors) for one in reports]

    assert run_world(1, program) == [[(0, COUNT), (0, COUNT)]]  # it was not loaded


def test_equal_content_under_another_name_is_sent() -> None:
    """Content is compared by name: that another tensor holds the same bytes says nothing."""

    def program(me: Rank) -> Any:
        mine = Skipping(me)
        mine.send({})
        owned = tensors_of(me.rank, {})
        owned["of.0.3"], owned["of.0.4"] = owned["of.0.4"], owned["of.0.3"]
        report = mine.server.send("step", owned)
        right = [
            torch.equal(mine.model.of(0, i)[: NUMEL // 2], owned[f"of.0.{i}"][: NUMEL // 2])
            for i in range(COUNT)
        ]
        return report.tensors, report.skipped_tensors, all(right)

    assert run_world(1, program) == [(2, COUNT - 2, True)]


# ---------------------------------------------------------------------- what is not held any more


def spoil(model: Model) -> None:
    model.of(0, 3)[17] += 1


def move(model: Model) -> None:
    """Equal, but the engine may compute with what is elsewhere."""
    layer = model.layers["0-3"]
    layer["p3"] = torch.nn.Parameter(layer["p3"].clone(), requires_grad=False)


def add_a_tensor(model: Model) -> None:
    model.layers["0-3"].register_buffer("scale", torch.ones(1))


def add_an_object(model: Model) -> None:
    model.layers["0-3"].packed = lambda: None


def load_behind_our_back(model: Model) -> None:
    model.load_weights([("of.0.3", torch.ones(NUMEL))])


@pytest.mark.parametrize("change", [spoil, load_behind_our_back, add_an_object])
def test_what_was_changed_behind_our_back_is_sent(change: Callable[[Model], None]) -> None:
    def program(me: Rank) -> Any:
        mine = Skipping(me)
        mine.send({})
        if me.rank == 1:
            change(mine.model)
        return mine.send({}), mine.send({})

    assert run_world(2, program) == [((1, 2 * COUNT - 1), (0, 2 * COUNT))] * 2


@pytest.mark.parametrize("change", [move, add_a_tensor])
def test_a_model_of_another_form_gets_everything(change: Callable[[Model], None]) -> None:
    def program(me: Rank) -> Any:
        mine = Skipping(me)
        mine.send({})
        change(mine.model)
        return mine.send({})

    assert run_world(1, program) == [(COUNT, 0)]


def test_what_changes_while_nothing_is_sent_is_an_error() -> None:
    def program(me: Rank) -> Any:
        mine = Skipping(me)
        mine.send({})
        settle = WorkerSession.leave_out

        def change(session: WorkerSession, bits: bytes, is_settled: bool) -> None:
            settle(session, bits, is_settled)
            if is_settled:
                spoil(mine.model)

        with mock.patch.object(WorkerSession, "leave_out", change):
            try:
                mine.send({})
            except UpdateError as error:
                return str(error), mine.send({})

    ((error, after),) = run_world(1, program)
    assert "the model's memory was changed while it was updated, where nothing was sent" in error
    assert after == (COUNT, 0)


def test_an_update_of_another_server_is_noticed() -> None:
    """It knows nothing of what workers hold, and writes everything."""

    def program(me: Rank) -> Any:
        mine = Skipping(me)
        mine.send({})
        os.environ["PS_SKIP_EQUAL"] = "0"
        foreign = mine.send({}, 5)
        os.environ["PS_SKIP_EQUAL"] = "1"
        return foreign, mine.send({})

    assert run_world(1, program) == [((COUNT, 0), (COUNT, 0))]


def test_a_worker_that_is_started_again_gets_everything() -> None:
    def program(me: Rank) -> Any:
        mine = Skipping(me)
        mine.send({})
        if me.rank == 1:
            mine.start_worker()
        return mine.send({})

    assert run_world(2, program) == [(2 * COUNT, 0)] * 2


def test_a_server_that_is_started_again_knows_what_is_held() -> None:
    def program(me: Rank) -> Any:
        mine = Skipping(me)
        mine.send({})
        run = mine.server.run
        me.port += 2
        mine.server = Server(me)
        mine.server.run = run
        return mine.send(FROZEN)

    assert run_world(1, program) == [(COUNT // 2, COUNT // 2)]


# ---------------------------------------------------------------------- after a failure


@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_a_retry_sends_the_rest(after: int) -> None:
    def program(me: Rank) -> Any:
        mine = Skipping(me)
        mine.send({})
        with mine.failing(after), pytest.raises(UpdateError, match="fails here"):
            mine.send({}, 2)
        return mine.send({}, 2), mine.send({}, 2)

    done = 2 * after
    assert run_world(1, program) == [((COUNT - done, done), (0, COUNT))]


def test_a_retry_of_several_ranks_sends_what_any_of_them_lacks() -> None:
    def program(me: Rank) -> Any:
        mine = Skipping(me, each=4)
        mine.send({})
        try:
            with mine.failing(5) if me.rank == 0 else contextlib.nullcontext():
                mine.send({}, 2)
        except UpdateError:
            return mine.send({}, 2)

    (sent, skipped), other = run_world(2, program)
    assert (sent, skipped) == other
    assert sent + skipped == 2 * COUNT
    assert 0 < skipped <= 8  # of four buckets, or two groups


def test_after_a_failure_the_old_content_is_sent_again() -> None:
    def program(me: Rank) -> Any:
        mine = Skipping(me)
        mine.send({})
        with mine.failing(3), pytest.raises(UpdateError):
            mine.send({}, 2)
        return mine.send({})

    ((sent, skipped),) = run_world(1, program)
    assert (sent, skipped) == (6, 6)  # those that the failed update has not reached are held


# ---------------------------------------------------------------------- groups


@pytest.mark.parametrize("each", [3, 5, COUNT])
def test_groups_are_sent_whole(each: int) -> None:
    def program(me: Rank) -> Any:
        mine = Skipping(me, each)
        mine.send({})
        return mine.send({4: 2})

    sent = len([i for i in range(COUNT) if i // each == 4 // each])
    assert run_world(1, program) == [(sent, COUNT - sent)]


def test_workers_of_different_groups() -> None:
    """A group of one worker is sent because of a tensor of another's, and so on."""

    def program(me: Rank) -> Any:
        mine = Skipping(me, each=2 + me.rank)
        mine.send({})
        return mine.send({1: 2}), mine.send({1: 2, 11: 7})

    # Groups of 2 and of 3, of each of two owners: 0 to 5 are connected, and 6 to 11.
    assert run_world(2, program) == [((12, 12), (12, 12))] * 2


# ---------------------------------------------------------------------- who leaves nothing out


def test_beside_a_foreign_worker_everything_is_sent() -> None:
    def program(me: Rank) -> Any:
        server, seen = Server(me), []
        model = Model(me.rank, me.size)
        server.run = replayed(model.load_weights)
        if me.rank == 1:
            server.ask = server.as_foreigner
        for seed in (1, 2, 3, 3):
            report = server.send("step", tensors_of(me.rank, {}, seed))
            seen.append((report.tensors, report.skipped_tensors))
            if me.rank == 0:
                assert model.is_right({}, seed)
                continue
            assert server.digests == {
                n: d for r in range(2) for n, d in digests(tensors_of(r, {}, seed)).items()
            }
        return seen

    assert run_world(2, program) == [[(2 * COUNT, 0)] * 4] * 2


def test_beside_a_plain_loader_everything_is_sent() -> None:
    def program(me: Rank) -> Any:
        mine = Skipping(me)
        mine.send({})
        if me.rank == 1:
            mine.server.run = mine.model.load_weights
        return mine.send({})

    assert run_world(2, program) == [(2 * COUNT, 0)] * 2


@pytest.mark.parametrize(
    "env", [{"PS_REPLAY": "off"}, {"PS_REPLAY": "verify"}, {"PS_REPLAY_CHECK": "1"}]
)
def test_where_the_loader_is_to_be_called_everything_is_sent(env: dict[str, str]) -> None:
    def program(me: Rank) -> Any:
        os.environ.update(env)
        mine = Skipping(me)
        return [mine.send({}) for _ in range(3)]

    assert run_world(1, program) == [[(COUNT, 0)] * 3]


def test_a_check_sends_everything_and_holds_it() -> None:
    def program(me: Rank) -> Any:
        os.environ["PS_REPLAY_CHECK"] = "3"
        mine = Skipping(me)
        return [mine.send({}) for _ in range(5)]

    sent, skipped = (COUNT, 0), (0, COUNT)
    assert run_world(1, program) == [[sent, skipped, sent, skipped, skipped]]


def test_without_sums_everything_is_sent() -> None:
    """Nobody would notice that other bytes were sent than were hashed."""

    def program(me: Rank) -> Any:
        os.environ["PS_CHECKSUM"] = "off" if me.rank == 1 else "on"
        mine = Skipping(me)
        return mine.send({}), mine.send({})

    assert run_world(2, program) == [((2 * COUNT, 0), (COUNT, COUNT))] * 2


def test_one_rank_without_the_setting_is_enough() -> None:
    def program(me: Rank) -> Any:
        mine = Skipping(me)
        mine.send({})
        if me.rank == 1:
            os.environ["PS_SKIP_EQUAL"] = "0"
        return mine.send({}), mine.send({})

    assert run_world(2, program) == [((2 * COUNT, 0),) * 2] * 2


def test_without_the_setting_messages_are_as_before() -> None:
    def program(me: Rank) -> Any:
        os.environ["PS_SKIP_EQUAL"] = "0"
        offered: list[Any] = []
        encode = wire.encode_handle

        def noting(rebuild: Any, args: Any, extensions: dict[str, Any]) -> bytes:
            offered.append(sorted(extensions))
            return encode(rebuild, args, extensions)

        with (
            mock.patch.object(wire, "encode_handle", noting),
            mock.patch.object(wire, "encode_contents", side_effect=AssertionError),
            mock.patch.object(wire, "encode_left_out", side_effect=AssertionError),
        ):
            mine = Skipping(me)
            seen = mine.send({}), mine.send({})
        return seen, offered[-1]

    names = ["json buckets", "sources", "statement", "timeout", "weight_version"]
    assert run_world(1, program) == [(((COUNT, 0), (COUNT, 0)), names)]


def test_updates_that_go_on_without_an_engine() -> None:
    """One that has failed is no reason to send anything, and is brought up to date by the next."""

    def program(me: Rank) -> Any:
        mine = Skipping(me)
        mine.send({}, on_instance_failure="continue")
        receive = mine.server.receive
        seen = []
        for fails in (True, False, False):

            def ask(address: str, fails: bool = fails) -> None:
                if fails and me.rank == 0:
                    raise ConnectionError("the engine is not up")
                receive(address)

            mine.server.ask = ask
            report = mine.report({0: 2}, on_instance_failure="continue")
            seen.append((report.tensors, report.skipped_tensors, len(report.failed_instances)))
            assert mine.model.is_right({0: 2}) == (not fails or me.rank == 1)
        return seen

    sent = 2, 2 * COUNT - 2
    assert run_world(2, program) == [[(*sent, 1), (*sent, 0), (0, 2 * COUNT, 0)]] * 2


# ---------------------------------------------------------------------- several hosts


@pytest.mark.skipif(not mooncake_works(), reason="P2P tests need Mooncake")
@pytest.mark.parametrize(("size", "host"), [(2, 1), (4, 2)])
def test_between_hosts_workers_read_what_they_need_of_the_rest(
    size: int, host: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PS_TRANSPORT", "shard")
    monkeypatch.setenv("PS_P2P_HOST", "127.0.0.1")

    def program(me: Rank) -> Any:
        mine = Skipping(me, host=host)
        seen = [mine.send({})]
        report = mine.report({i: 2 for i in range(1, COUNT, 2)})
        assert mine.model.is_right({i: 2 for i in range(1, COUNT, 2)})
        reads = report.stages["P2P read"].bytes if "P2P read" in report.stages else 0
        return [*seen, report.way, report.tensors, report.skipped_tensors, reads]

    found = run_world(size, program)
    every = COUNT * size
    for seen in found:
        assert seen[:4] == [(every, 0), "shard", every // 2, every // 2]
    share = 2 if host == 1 else 1  # two workers of a host need both halves
    for first in range(0, size, host):
        read = sum(seen[4] for seen in found[first : first + host])
        assert read == (size - host) * COUNT // 2 * NUMEL * 4 // share


@pytest.mark.skipif(not mooncake_works(), reason="P2P tests need Mooncake")
def test_updates_of_some_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What owners have that take no part is sent: they hash nothing."""
    monkeypatch.setenv("PS_P2P_HOST", "127.0.0.1")

    def program(me: Rank) -> Any:
        mine = Skipping(me)
        mine.send({})
        seen = []
        for _ in range(2):
            report = mine.report({}, ranks=[0])
            seen.append((report.tensors, report.skipped_tensors))
            assert mine.model.is_right({})
        return seen

    assert run_world(2, program) == [[(COUNT, COUNT)] * 2, [(0, 0)] * 2]
