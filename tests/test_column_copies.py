"""Ranks of two or three hosts, some of which hold column copies. Whoever cannot use them reads the
plain bytes; ``test_columns.py`` is about the bytes themselves."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_engine.data_types import BucketRange, H2DBucket, MemoryBuffer
from checkpoint_engine.errors import UpdateError
from checkpoint_engine.ground.deadline import cancellable
from checkpoint_engine.memory import checkpoints
from checkpoint_engine.memory.columns import CopiedColumns
from checkpoint_engine.memory.host_memory import HostMemory
from checkpoint_engine.replay import replayed
from checkpoint_engine.transfer.p2p_store import P2PError, P2PStore
from checkpoint_engine.transfer.remote_loader import RemoteLoader
from checkpoint_engine.world.metas_file import encode_metas
from fleet import digests
from test_control import Rank, run_world
from test_owners import error_of
from test_peers import SECONDS, Server
from test_shard import read_bytes, server_on, sockets  # noqa: F401
from torchrun import mooncake_works

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(not mooncake_works(), reason="P2P tests need Mooncake"),
]
COUNT, SHAPE = 3, (128, 512)
WHOLE = COUNT * 4 * 128 * 512
GAPS = COUNT * 4 * 256
"""Bytes of each tensor before the first needed one, or after the last."""
LEARNING = [WHOLE, WHOLE, WHOLE - GAPS]


def matrices_of(owner: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * seed + owner)
    return {f"of.{owner}.{i}": torch.rand(SHAPE, generator=generator) for i in range(COUNT)}


def everything(seed: int, size: int) -> dict[str, torch.Tensor]:
    return {n: t for owner in range(size) for n, t in matrices_of(owner, seed).items()}


class Model(torch.nn.Module):
    """Keeps the left or the right half of every matrix."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.half = rank % 2
        self.params = torch.nn.ParameterDict(
            {
                name.replace(".", "_"): torch.nn.Parameter(torch.zeros(128, 256), False)
                for name in everything(0, size)
            }
        )

    def load_weights(self, weights: Any) -> set[str]:
        for name, tensor in weights:
            self.params[name.replace(".", "_")].copy_(tensor.narrow(1, 256 * self.half, 256))
        return set()

    def is_right(self, named: dict[str, torch.Tensor]) -> bool:
        return all(
            torch.equal(self.params[name.replace(".", "_")], one.narrow(1, 256 * self.half, 256))
            for name, one in named.items()
        )


def learner_on(me: Rank, copies: bool = True) -> tuple[Server, Model]:
    """The only rank of its host, whose worker reads half of the columns."""
    torch.set_num_threads(1)  # those of the process that this one was forked from are not here
    os.environ["PS_COLUMN_COPIES"] = str(int(copies))
    server, model = server_on(me, 1), Model(me.rank, me.size)
    server.run = replayed(model.load_weights)
    return server, model


def publish(server: Server, model: Model, seed: int, **options: Any) -> tuple[bool, int]:
    """Whether the worker has the right bytes, and how many were read."""
    rank, size = server.me.rank, server.me.size
    report = server.send(f"step-{seed}", matrices_of(rank, seed), **options)
    assert report.way == "shard"
    return model.is_right(everything(seed, size)), read_bytes(report)


def update(server: Server, model: Model, seed: int, named: dict[str, torch.Tensor]) -> Any:
    """New values of the same name, without a gather after the first."""
    ps, rank = server.ps, server.me.rank
    ps.unregister_checkpoint("same")
    ps.register_checkpoint("same", named_tensors=named)
    if seed == 1:
        ps.gather_metas("same")
    report = ps.update("same", lambda paths: server.ask(paths[rank][1]))
    return model.is_right(everything(seed, server.me.size)), read_bytes(report)


def copies_of(server: Server, name: str) -> list[str]:
    held = server.ps._checkpoints.get(name)
    assert held is not None
    return [meta.name for one in held.columns for meta in one.memory.metas]


@pytest.mark.parametrize("ranks", [None, [0, 1]])
def test_checkpoints_are_read_by_the_columns_that_were_needed_before(
    ranks: list[int] | None,
) -> None:
    def program(me: Rank) -> list[Any]:
        server, model = learner_on(me)
        return [publish(server, model, seed, ranks=ranks) for seed in range(1, 7)]

    expected = [(True, nbytes) for nbytes in [*LEARNING, *[WHOLE // 2] * 3]]
    assert run_world(2, program) == [expected] * 2


def test_one_owner_copies_and_the_other_does_not() -> None:
    def program(me: Rank) -> list[Any]:
        server, model = learner_on(me, copies=me.rank == 0)
        return [publish(server, model, seed) for seed in range(1, 6)]

    first, second = run_world(2, program)
    assert first == [(True, nbytes) for nbytes in [*LEARNING, *LEARNING[-1:] * 2]]
    assert second == [(True, nbytes) for nbytes in [*LEARNING, *[WHOLE // 2] * 2]]


def test_a_checkpoint_that_is_registered_again_has_other_copies_or_none() -> None:
    """Nothing is gathered again. Rank 0 copies in every second step."""

    def program(me: Rank) -> list[Any]:
        server, model = learner_on(me)
        seen = []
        for seed in range(1, 9):
            os.environ["PS_COLUMN_COPIES"] = str(int(me.rank == 1 or seed < 4 or seed % 2))
            seen.append(update(server, model, seed, matrices_of(me.rank, seed)))
        return seen

    first, second = run_world(2, program)
    assert first == [(True, nbytes) for nbytes in [*LEARNING, *[WHOLE // 2] * 5]]
    turns = [WHOLE // 2 if seed % 2 else WHOLE - GAPS for seed in range(4, 9)]
    assert second == [(True, nbytes) for nbytes in [*LEARNING, *turns]]


def test_a_worker_that_needs_other_columns_reads_the_plain_bytes() -> None:
    """As of another degree of tensor parallelism: the third quarter of a row."""

    class Quarter(Model):
        def load_weights(self, weights: Any) -> set[str]:
            for name, tensor in weights:
                for at in (0, 128):
                    param = self.params[name.replace(".", "_")]
                    param[:, at : at + 128].copy_(tensor[:, 256:384])
            return set()

        def is_right(self, named: dict[str, torch.Tensor]) -> bool:
            other = Quarter(self.half, 2)
            other.load_weights(named.items())
            return all(torch.equal(self.params[key], one) for key, one in other.params.items())

    def program(me: Rank) -> list[Any]:
        server, model = learner_on(me)
        if me.rank == 1:
            model = Quarter(1, 2)
            server.run = replayed(model.load_weights)
        return [publish(server, model, seed) for seed in range(1, 6)]

    first, second = run_world(2, program)
    # A half is two whole parts of what rank 1 copies; a quarter is no part of what rank 0 does.
    assert first == [(True, nbytes) for nbytes in [*LEARNING, *[WHOLE // 2] * 2]]
    assert second == [(True, nbytes) for nbytes in [WHOLE, WHOLE, *[WHOLE - GAPS * 3 // 2] * 3]]


# ---------------------------------------------------------------------- who sees plain bytes


def test_metas_lead_to_the_plain_bytes() -> None:
    """Another world that loads them, and whatever looks at the buffers of this one."""

    def program(me: Rank) -> list[Any]:
        server, model = learner_on(me)
        for seed in (1, 2, 3):
            publish(server, model, seed)
        ps, named, everyone = server.ps, matrices_of(me.rank, 4), [0, 1]
        ps.register_checkpoint("four", named_tensors=named)
        ps.gather_metas("four")
        parts = len(copies_of(server, "four"))
        metas = ps.get_metas()
        assert "column" not in encode_metas(metas).decode() + repr(metas)
        (pool,) = [buffers for name, buffers in ps._memory_pool.items() if name == "four"]
        assert sum(buffer.size for buffer in pool) == WHOLE
        (theirs,) = metas[1 - me.rank].memory_buffer_metas_list
        bucket = H2DBucket(size=WHOLE, ranges=[BucketRange(0, 0, WHOLE)], items=theirs.metas)
        target = torch.zeros(WHOLE, dtype=torch.uint8)
        ps._copy_to_buffer("four", bucket, target, 1 - me.rank)
        plain = torch.stack(list(matrices_of(1 - me.rank, 4).values()))
        assert torch.equal(target.view(torch.float32).view(plain.shape), plain)
        request = lambda paths: server.ask(paths[me.rank][1])  # noqa: E731
        ps.load_metas(metas)
        report = ps.update("four", request, ranks=everyone, timeout=SECONDS)
        seen = [model.is_right(everything(4, 2)), read_bytes(report)]
        return [parts, *seen]

    # Of another world even the own host's bytes are read.
    found = [2 * COUNT, True, 2 * (WHOLE - GAPS)]
    assert run_world(2, program) == [found] * 2


def test_a_worker_of_the_original_gets_everything() -> None:
    def program(me: Rank) -> list[Any]:
        server, model = learner_on(me)
        if me.rank == 0:
            return [publish(server, model, seed) for seed in range(1, 6)]
        server.ask, seen = server.as_foreigner, []
        for seed in range(1, 6):
            report = server.send(f"step-{seed}", matrices_of(1, seed))
            seen.append((server.digests == digests(everything(seed, 2)), read_bytes(report)))
        return seen

    ours, theirs = run_world(2, program)
    assert ours == [(True, nbytes) for nbytes in [*LEARNING, *LEARNING[-1:] * 2]]
    assert theirs == [(True, WHOLE)] * 5


def test_memory_that_users_may_change_is_not_copied() -> None:
    """The pool is filled again and again, and a file that is pinned in place is somebody's."""

    def program(me: Rank) -> list[Any]:
        from safetensors.torch import save_file

        server, model = learner_on(me)
        for seed in (1, 2, 3):
            publish(server, model, seed)
        ps, named = server.ps, matrices_of(me.rank, 4)
        file = Path(f"/dev/shm/columns-{os.getpid()}.safetensors")
        save_file(named, file)
        ps.register_checkpoint("pooled", named_tensors=named, use_shared_memory_pool=True)
        ps.register_checkpoint("in place", files=[str(file)], use_inplace_pin_memory=True)
        ps.register_checkpoint("plain", named_tensors=named)
        seen = [copies_of(server, name) for name in ("pooled", "in place", "plain")]
        for name in ("pooled", "in place"):
            ps.gather_metas(name)
            report = ps.update(name, lambda paths: server.ask(paths[me.rank][1]))
            seen.append([model.is_right(everything(4, 2)), read_bytes(report)])
        return [len(seen[0]), len(seen[1]), len(seen[2]), *seen[3:]]

    plain = [True, WHOLE - GAPS]
    assert run_world(2, program) == [[0, 0, 2 * COUNT, plain, plain]] * 2


# ---------------------------------------------------------------------- memory


def held(server: Server) -> tuple[int, list[str]]:
    """Bytes of host memory, and what is registered for P2P beside the leases."""
    store = server.ps._p2p_store
    assert store is not None
    names = [name for name in store.names() if not name.startswith("__")]
    return server.ps._checkpoints.memory.usage.in_use, names


def test_copies_are_freed_with_their_checkpoint() -> None:
    def program(me: Rank) -> list[Any]:
        server, model = learner_on(me)
        for seed in (1, 2, 3):
            publish(server, model, seed)
        before = held(server)
        server.ps.register_checkpoint("four", named_tensors=matrices_of(me.rank, 4))
        nbytes, names = held(server)
        server.ps.unregister_checkpoint("four")
        return [before, nbytes, len(names), held(server)]

    nothing = (0, [])
    assert run_world(2, program) == [[nothing, 2 * WHOLE, 2, nothing]] * 2


def test_a_checkpoint_is_registered_without_copies_where_they_cannot_be() -> None:
    """For lack of memory, or as the transfer engine refuses it."""

    def program(me: Rank) -> list[Any]:
        server, model = learner_on(me)
        seen = [publish(server, model, seed) for seed in (1, 2, 3)]

        def fail(*args: Any) -> Iterator[CopiedColumns]:
            yield from copy_columns(*args)
            raise MemoryError("none is left")

        copy_columns, checkpoints.copy_columns = checkpoints.copy_columns, fail
        seen.append(publish(server, model, 4))
        checkpoints.copy_columns = copy_columns
        register = P2PStore.register_named_tensors

        def refuse(store: P2PStore, named: dict[str, torch.Tensor]) -> None:
            if len(named) > 1:
                raise P2PError("too much is registered")
            register(store, named)

        P2PStore.register_named_tensors = refuse  # type: ignore[method-assign,assignment]
        seen.append(publish(server, model, 5))
        P2PStore.register_named_tensors = register  # type: ignore[method-assign]
        seen.append(publish(server, model, 6))
        return [seen, held(server)]

    expected = [(True, n) for n in [*LEARNING, *LEARNING[-1:] * 2, WHOLE // 2]]
    assert run_world(2, program) == [[expected, (0, [])]] * 2


def test_a_registration_that_is_cancelled_while_it_copies_keeps_nothing() -> None:
    def program(me: Rank) -> list[Any]:
        server, model = learner_on(me)
        for seed in (1, 2, 3):
            publish(server, model, seed)
        fill, fills = HostMemory.fill, []

        def note(self: HostMemory, *args: Any, **options: Any) -> list[MemoryBuffer]:
            fills.append(args)
            return fill(self, *args, **options)

        HostMemory.fill = note  # type: ignore[method-assign]
        with cancellable(lambda: "it was cancelled" if len(fills) > 1 else ""):
            register = partial(server.ps.register_checkpoint, "four")
            error = error_of(lambda: register(named_tensors=matrices_of(me.rank, 4)))
        return ["it was cancelled" in error, held(server), server.ps._checkpoints.get("four")]

    assert run_world(2, program) == [[True, (0, []), None]] * 2


# ---------------------------------------------------------------------- owners that go


def test_an_owner_that_frees_its_checkpoint_while_it_is_read_is_an_error() -> None:
    """Rank 1 takes no part in the update."""

    def program(me: Rank) -> list[Any]:
        server, model = learner_on(me)
        seen = [publish(server, model, seed) for seed in (1, 2, 3)]
        named = matrices_of(me.rank, 4)
        server.ps.register_checkpoint("four", named_tensors=named)
        server.ps.gather_metas("four")
        if me.rank == 1:
            me.signals[0].wait(20)
            server.ps.unregister_checkpoint("four")
            me.signals[1].set()
            return [seen, ""]
        read = RemoteLoader._read

        def read_and_free(self: RemoteLoader, regions: Sequence[Any], *place: Any) -> None:
            read(self, regions, *place)
            me.signals[0].set()
            me.signals[1].wait(20)

        RemoteLoader._read = read_and_free  # type: ignore[method-assign]
        request = lambda paths: server.ask(paths[0][1])  # noqa: E731
        with pytest.raises(UpdateError) as caught:
            server.ps.update("four", request, ranks=[0])
        return [seen, str(caught.value)]

    (seen, error), _ = run_world(2, program)
    assert seen == [(True, nbytes) for nbytes in LEARNING]
    assert "has unregistered or replaced the checkpoint" in error


@pytest.mark.parametrize("dies", [1, 2])
def test_another_owner_is_read_where_one_dies_in_the_middle(dies: int) -> None:
    """Two owners of equal bytes, of which rank 1 has copies. What the dead one has sent remains in
    the buffer until the other one's bytes replace it."""

    def program(me: Rank) -> list[Any]:
        server, model = learner_on(me, copies=me.rank == 1)
        seen = []
        for seed in range(1, 6):
            owned = {} if me.rank == 0 else matrices_of(0, seed)
            if me.rank == 0 and seed == 5:
                read, asked = RemoteLoader.read, []

                def die(self: RemoteLoader, owner: int, *args: Any) -> int:
                    nbytes = read(self, owner, *args)  # noqa: B023
                    asked.append(owner)  # noqa: B023
                    if owner == dies:
                        args[1].fill_(77)
                        raise P2PError("its process has ended")
                    return nbytes

                RemoteLoader.read = die  # type: ignore[method-assign,assignment]
            report = server.send(f"step-{seed}", owned)
            named = matrices_of(0, seed)
            seen.append((report.way, model.is_right(named), read_bytes(report)))
        return [seen, [sorted({*asked})] if me.rank == 0 else []]

    (seen, asked), *_ = run_world(3, program)
    assert [(way, right) for way, right, _ in seen] == [("shard", True)] * 5
    assert seen[3][2] == WHOLE // 2  # rank 1 is asked first
    assert seen[4][2] == (WHOLE - GAPS if dies == 1 else WHOLE // 2)
    assert asked == [[1, 2] if dies == 1 else [1]]
