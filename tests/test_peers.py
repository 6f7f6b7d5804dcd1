"""Ranks of one host whose workers read each other's staging buffers, on the cpu device.

Which way is taken and why, who is served how, and when an owner may overwrite what others read.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import zmq

from checkpoint_engine.ground.checksum import FACTORS
from checkpoint_engine.handover.ipc import SharedBuffer, open_buffer
from checkpoint_engine.loading import receive
from checkpoint_engine.memory.checkpoints import Checkpoint
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.replay import replayed
from checkpoint_engine.transfer import host_peers
from checkpoint_engine.update.ways import peers
from checkpoint_engine.worker import update_weights_from_ipc
from checkpoint_engine.world.hello import Hello
from fleet import digests, left_segments
from foreign import receive as receive_as
from test_control import Rank, run_world
from test_owners import error_of

SECONDS = timedelta(seconds=20)
COUNT = 12  # tensors of a rank, of which two fill a bucket
BUCKET = 1 << 16

pytestmark = pytest.mark.alone


@pytest.fixture(autouse=True)
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PS_MAX_BUCKET_SIZE_GB", str(BUCKET / 2**30))
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        monkeypatch.setenv("PS_IPC_DIR", folder)
        yield


class Model(torch.nn.Module):
    """Keeps one half of every tensor of all ranks, as a tensor-parallel worker."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank = rank
        self.params = torch.nn.ParameterDict(
            {
                key(owner, i): torch.nn.Parameter(torch.zeros(BUCKET // 8), requires_grad=False)
                for owner in range(size)
                for i in range(COUNT)
            }
        )

    def load_weights(self, weights: Any) -> set[str]:
        for name, tensor in weights:
            half = tensor.narrow(0, self.rank % 2 * (BUCKET // 16), BUCKET // 16)
            self.params[name.replace(".", "_")][: BUCKET // 16].copy_(half)
            self.params[name.replace(".", "_")][BUCKET // 16 :].copy_(half)
        return set()


def key(owner: int, i: int) -> str:
    return f"of_{owner}_{i}"


def tensors_of(owner: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * seed + owner)
    return {f"of.{owner}.{i}": torch.rand(BUCKET // 8, generator=generator) for i in range(COUNT)}


class Server:
    """One rank's server; its worker is a thread, or whatever ``ask`` is."""

    def __init__(self, me: Rank) -> None:
        os.environ.update(
            PS_DEVICE="cpu",
            LOCAL_WORLD_SIZE=str(me.size),
            PS_IPC_DIR=tempfile.mkdtemp(prefix="peers-", dir=os.environ["PS_IPC_DIR"]),
        )
        self.me = me
        self.got: dict[str, torch.Tensor] = {}
        self.loads = 0
        self.run: Any = self.keep
        self.ask: Callable[[str], None] = self.receive
        self.shared: list[int] = []
        self.ps = ParameterServer(
            rank=me.rank, world_size=me.size, master_addr="127.0.0.1", master_port=me.port
        )

    def keep(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.loads += 1
        self.got.update({name: tensor.clone() for name, tensor in weights})

    def receive(self, address: str) -> None:
        with zmq.Context() as context:
            update_weights_from_ipc(context, address, None, run=self.run)

    def as_foreigner(self, address: str) -> None:
        self.digests = receive_as(None, address, "0.4", "")["digests"]  # type: ignore[arg-type]

    def publish(self, seed: int, **options: Any) -> Any:
        """The report, of an update whose bytes are all right."""
        return self.send(f"step-{seed}", tensors_of(self.me.rank, seed), **options)

    def send(self, name: str, owned: dict[str, torch.Tensor], **options: Any) -> Any:
        """The report of an update in which this rank owns these tensors."""
        self.got.clear()
        rank = self.me.rank
        self.ps.register_checkpoint(name, named_tensors=owned)
        try:
            self.ps.gather_metas(name, timeout=SECONDS)
            init = SharedBuffer.__init__

            def noting(buffer: SharedBuffer, manager: Any, index: int, nbytes: int) -> None:
                self.shared.append(nbytes)
                init(buffer, manager, index, nbytes)

            with mock.patch.object(SharedBuffer, "__init__", noting):
                return self.ps.update(
                    name, lambda paths: self.ask(paths[rank][1]), timeout=SECONDS, **options
                )
        finally:
            self.ps.unregister_checkpoint(name)

    def has(self, seed: int) -> bool:
        expected = {n: t for r in range(self.me.size) for n, t in tensors_of(r, seed).items()}
        return self.got.keys() == expected.keys() and all(
            torch.equal(self.got[name], tensor) for name, tensor in expected.items()
        )


def refusing(rank: int) -> Callable[..., torch.Tensor]:
    """Opens nothing of other ranks."""

    def refuse(rebuild: Any, args: Any, device_id: Any, of_peer: bool = False) -> torch.Tensor:
        if of_peer:
            raise RuntimeError(f"rank {rank} has no peer access")
        return open_buffer(rebuild, args, device_id)

    return refuse


# ---------------------------------------------------------------------- which way, and why


@pytest.mark.parametrize("size", [2, 3])
def test_workers_read_the_staging_buffers_of_all_ranks(size: int) -> None:
    def program(me: Rank) -> list[Any]:
        server = Server(me)
        seen = []
        for seed in (1, 2):
            report = server.publish(seed)
            seen.append((report.way, report.way_reason, server.has(seed)))
        return [*seen, [nbytes // BUCKET for nbytes in server.shared], left_segments()]

    for first, second, slots, left in run_world(size, program):
        assert first == second == ("peers", "", True)
        assert slots == [4, 2]  # the worker is known then: no double buffer
        assert left == []


def test_a_foreign_worker_sees_nothing_of_it() -> None:
    """It has the double buffer of its own rank, and messages of the original's bytes."""

    def program(me: Rank) -> list[Any]:
        server = Server(me)
        if me.rank == 1:
            server.ask = server.as_foreigner
        seen = []
        for seed in (1, 2):
            report = server.publish(seed)
            right = server.has(seed)
            if me.rank == 1:
                right = server.digests == {
                    n: d for r in range(2) for n, d in digests(tensors_of(r, seed)).items()
                }
            seen.append((report.way, report.way_reason, right))
        return [*seen, [nbytes // BUCKET for nbytes in server.shared]]

    ours, theirs = run_world(2, program)
    assert ours == [("peers", "", True)] * 2 + [[4, 2]]
    reason = "the worker, of another release or library, cannot read other ranks' buffers"
    assert theirs == [("peers", reason, True)] * 2 + [[4, 4]]


def test_a_worker_that_cannot_map_is_served_by_its_server_rank() -> None:
    def program(me: Rank) -> list[Any]:
        server = Server(me)
        if me.rank == 0:
            receive.open_buffer = refusing(0)
        reports = [server.publish(seed) for seed in (1, 2)]
        return [(r.way, r.way_reason) for r in reports] + [server.has(2)]

    first, second = run_world(2, program)
    assert first[0] == first[1]
    assert first[0][0] == "peers"
    assert "cannot map other ranks' buffers: RuntimeError: rank 0 has no peer access" in first[0][1]
    assert second == [("peers", "")] * 2 + [True]
    assert first[2]


def test_ranks_that_cannot_map_each_other_take_the_group() -> None:
    def program(me: Rank) -> list[Any]:
        server = Server(me)
        if me.rank == 1:
            peers.open_buffer = refusing(1)
        report = server.publish(1)
        return [report.way, report.way_reason, server.has(1), left_segments()]

    for way, reason, right, left in run_world(2, program):
        assert way == "broadcast"
        text = "rank 1 cannot map rank 0's memory: rank 1 has no peer access"
        assert reason == f"not by peers: {text}"
        assert right
        assert left == []


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("PS_PEERS", "0", "ranks [1] share no memory, by their device or settings"),
        ("PS_CPU_TRANSPORT", "gloo", "ranks [1] share no memory, by their device or settings"),
        ("elsewhere", "", "the ranks are on 2 hosts, or in as many network namespaces"),
        ("no room", "", "has no room for two staging buffers"),
    ],
)
def test_the_report_says_why_it_is_the_group(variable: str, value: str, reason: str) -> None:
    def program(me: Rank) -> list[Any]:
        server = Server(me)
        if me.rank == 1 and value:
            os.environ[variable] = value
        if me.rank == 1 and variable == "elsewhere":
            host_peers._this_host = lambda: "another"
        if variable == "no room":
            server.ps._server.here.__class__.spare_memory = lambda here: 7 * BUCKET // 4
        report = server.publish(1)
        return [report.way, report.way_reason, server.has(1)]

    for way, why, right in run_world(2, program):
        assert (way, right) == ("broadcast", True)
        assert reason in why


def test_one_rank_needs_no_reason() -> None:
    def program(me: Rank) -> list[Any]:
        report = Server(me).publish(1)
        return [report.way, report.way_reason]

    assert run_world(1, program) == [["broadcast", ""]]


def test_a_worker_of_another_library_after_one_of_ours_is_served_at_the_second_try() -> None:
    """There is no double buffer for it, as the rank did not know."""

    def program(me: Rank) -> list[Any]:
        server = Server(me)
        server.publish(1)
        if me.rank == 1:
            server.ask = server.as_foreigner
        failed = error_of(lambda: server.publish(2))
        report = server.publish(3)
        return [failed, report.way, bool(report.way_reason)]

    for rank, (failed, way, served) in enumerate(run_world(2, program)):
        assert "cannot read other ranks' buffers" in failed
        assert "update again" in failed
        assert (way, served) == ("peers", rank == 1)


# ---------------------------------------------------------------------- loaders that are learned


def test_a_learned_loader_recognises_its_buckets_by_every_way() -> None:
    """What it learned out of staging buffers holds for a group's buckets, and the other way
    round."""

    def program(me: Rank) -> list[Any]:
        server, model = Server(me), Model(me.rank, me.size)
        seen = []
        for seed in range(1, 7):
            os.environ["PS_PEERS"] = "0" if seed in (4, 6) else "1"
            server.run = replayed(model.load_weights, model)
            decoded = mock.Mock(wraps=receive.extract_weights)
            with mock.patch.object(receive, "extract_weights", decoded):
                way = server.publish(seed).way
            right = all(
                torch.equal(model.params[n.replace(".", "_")][: BUCKET // 16], half)
                for r in range(me.size)
                for n, t in tensors_of(r, seed).items()
                for half in [t.narrow(0, me.rank % 2 * (BUCKET // 16), BUCKET // 16)]
            )
            seen.append((way, server.run.report["loaded"], decoded.call_count > 0, right))
        return seen

    for seen in run_world(2, program):
        ways, loaded, decoded, right = zip(*seen, strict=True)
        assert ways == ("peers", "peers", "peers", "broadcast", "peers", "broadcast")
        assert loaded == ("recorded", "recorded", *["replayed"] * 4)
        assert decoded[:2] == (True, True)
        assert decoded[4:] == (False, False)
        assert all(right)


def test_a_loader_that_raises_fails_the_update_everywhere_and_the_next_is_right() -> None:
    def program(me: Rank) -> list[Any]:
        server = Server(me)
        server.publish(1)

        def raises(weights: Any) -> None:
            server.keep(weights)
            if server.loads == 2:
                raise ValueError("no such parameter")

        if me.rank == 1:
            server.run, server.loads = raises, 0
        failed = error_of(lambda: server.publish(2))
        server.run = server.keep
        server.publish(3)
        return [failed, server.has(3), left_segments()]

    for failed, right, left in run_world(2, program):
        assert "failed on rank 1" in failed
        assert "no such parameter" in failed
        assert right
        assert left == []


def test_a_loader_may_write_into_what_it_is_given() -> None:
    """As that of GPT-OSS does at tensor-parallel size 2; the others read the same memory."""

    def program(me: Rank) -> list[Any]:
        server = Server(me)

        def overwrite(weights: list[tuple[str, torch.Tensor]]) -> None:
            server.keep(weights)
            for _, tensor in weights:
                tensor.zero_()

        def keep_late(weights: list[tuple[str, torch.Tensor]]) -> None:
            time.sleep(0.05)
            server.keep(weights)

        server.run = overwrite if me.rank else keep_late
        seen = []
        for seed in (1, 2):
            report = server.publish(seed)
            seen.append((report.way, server.has(seed)))
        return seen

    assert run_world(3, program) == [[("peers", True)] * 2] * 3


# ---------------------------------------------------------------------- when memory is overwritten


def test_an_owner_waits_for_the_slowest_reader() -> None:
    """Its staging keeps a bucket while a worker reads it, however far the others are."""

    def program(me: Rank) -> list[Any]:
        server = Server(me)
        filled: list[float] = []
        fill = peers.PeersMover._fill

        def noting(mover: Any, step: Any) -> None:
            filled.append(time.monotonic())
            fill(mover, step)

        def slowly(weights: Any) -> None:
            before = [tensor.clone() for _, tensor in weights]
            if server.loads == 0:
                time.sleep(1.0)
            assert all(torch.equal(a, b) for a, (_, b) in zip(before, weights, strict=True))
            server.keep(weights)

        if me.rank == 1:
            server.run = slowly
        with mock.patch.object(peers.PeersMover, "_fill", noting):
            server.publish(1)
        return [filled[4] - filled[3], server.has(1)]

    (waited, first_right), (_, second_right) = run_world(2, program)
    assert waited > 0.9
    assert first_right
    assert second_right


def test_a_reader_that_never_says_so_is_named() -> None:
    def program(me: Rank) -> str:
        server = Server(me)
        if me.rank == 1:
            said = host_peers.HostPeers.tell

            def silent(self: Any, owner: int, word: bytes) -> None:
                if word != host_peers.TAKEN:
                    said(self, owner, word)

            host_peers.HostPeers.tell = silent  # type: ignore[method-assign]
        name = "step"
        server.ps.register_checkpoint(name, named_tensors=tensors_of(0, 1) if me.rank == 0 else {})
        server.ps.gather_metas(name, timeout=SECONDS)
        return error_of(
            lambda: server.ps.update(
                name, lambda paths: server.ask(paths[me.rank][1]), timeout=timedelta(seconds=2)
            )
        )

    for error in run_world(2, program):
        assert "gave up after 2 s" in error
        assert "rank 0" in error


def test_an_update_ends_once_nobody_maps_an_owners_memory() -> None:
    """An owner gives its memory back when all workers have dropped it."""

    def program(me: Rank) -> list[float]:
        server = Server(me)
        ends: list[float] = []
        dropped: list[float] = []
        release, close = receive._Reception._load_buckets, SharedBuffer.close

        def late(reception: Any, version: Any) -> None:
            release(reception, version)
            if me.rank == 1:
                time.sleep(0.7)
            dropped.append(time.monotonic())

        def noting(buffer: SharedBuffer, **options: Any) -> None:
            if buffer.tensor.nbytes:
                ends.append(time.monotonic())
            close(buffer, **options)

        with (
            mock.patch.object(receive._Reception, "_load_buckets", late),
            mock.patch.object(SharedBuffer, "close", noting),
        ):
            server.publish(1)
        return [dropped[0], ends[0]]

    (_, owner_closed), (reader_dropped, _) = run_world(2, program)
    assert owner_closed >= reader_dropped


# ---------------------------------------------------------------------- sums


@pytest.mark.parametrize("damaged", [False, True])
def test_an_owner_that_sums_up_staging_offers_nothing_that_is_damaged(damaged: bool) -> None:
    """As accelerators do, which read a bucket many times over a slower link than their own memory.
    Workers do not sum it up again."""

    def program(me: Rank) -> list[Any]:
        server = Server(me)
        make, copy = peers.PeersMover.__init__, Checkpoint.copy

        def summing(mover: Any, *args: Any) -> None:
            with mock.patch.object(peers.PeersMover, "_fill_slots"):
                make(mover, *args)
            mover._factors = torch.from_numpy(FACTORS)
            mover._fill_slots(0)

        def damaging(source: Checkpoint, bucket: Any, target: torch.Tensor) -> None:
            copy(source, bucket, target)
            if damaged and me.rank == 1 and bucket.items[0].name == f"of.1.{COUNT - 2}":
                target[300] ^= 1

        checked = mock.Mock(wraps=receive._check_bytes)
        with (
            mock.patch.object(peers.PeersMover, "__init__", summing),
            mock.patch.object(Checkpoint, "copy", damaging),
            mock.patch.object(receive, "_check_bytes", checked),
        ):
            failed = error_of(lambda: server.publish(1))
        sums = [call.args[0] for call in checked.call_args_list]
        return [failed, set(sums) == {None}, server.has(1)]

    for failed, unchecked, right in run_world(2, program):
        assert ("the bytes of a bucket from rank 1 are not those" in failed) == damaged
        assert bool(failed) == damaged
        assert unchecked
        assert right != damaged


@pytest.mark.parametrize(
    ("ranks", "learned", "free", "largest"),
    [
        (2, True, 64 << 30, 240 << 20),
        (2, False, 64 << 30, 240 << 20),
        (2, False, 2 << 30, 120 << 20),  # beside a KV cache
        (4, False, 64 << 30, 120 << 20),  # sixteen buffers to map
        (4, True, 64 << 30, 240 << 20),
    ],
)
def test_few_ranks_with_room_send_workers_that_learn_larger_buckets(
    ranks: int, learned: bool, free: int, largest: int
) -> None:
    here: Any = SimpleNamespace(device_manager=SimpleNamespace(is_accelerator=True))
    hellos = [
        Hello(rank, "update", maps_peers=learned, free_bytes=free if rank else 64 << 30)
        for rank in range(ranks)
    ]
    assert peers.Peers(here).pace(hellos) == (120 << 20, largest)
