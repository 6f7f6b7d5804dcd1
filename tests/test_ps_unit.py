"""A single ``ParameterServer``: what it takes, keeps, refuses and gives back."""

from __future__ import annotations

import json
import mmap
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import zmq
from pydantic import TypeAdapter
from safetensors.torch import save_file

from checkpoint_engine import ps
from checkpoint_engine.data_types import Lease, MemoryBufferMetaList, align_up
from checkpoint_engine.errors import BusyError, UpdateError
from checkpoint_engine.memory import checksum
from checkpoint_engine.memory.checkpoints import Checkpoint
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.worker import update_weights_from_ipc

SOON = 4.0
GIB = 1 << 30

Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def start(*args: Any, **options: Any) -> None:
        raise RuntimeError("no wheel of Mooncake")

    for variable in list(os.environ):
        if variable.startswith("PS_") or variable in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("PS_DEVICE", "cpu")
    monkeypatch.setenv("PS_IPC_DIR", str(tmp_path / "sockets"))
    monkeypatch.setattr(ps, "P2PStore", start)


@pytest.fixture
def server() -> ParameterServer:
    return ParameterServer(rank=0, world_size=1)


def in_use(server: ParameterServer) -> int:
    return server._checkpoints.memory.usage.in_use


def test_the_next_step_allocates_nothing(server: ParameterServer) -> None:
    addresses = set()
    for step in range(3):
        name = f"step-{step}"
        server.register_checkpoint(name, named_tensors={"w": torch.full((5000,), step)})
        addresses.add(server._memory_pool[name][0].buffer.data_ptr())
        server.unregister_checkpoint(name)
    assert len(addresses) == 1
    assert server._checkpoints.memory.usage.retained >= 40000


def test_memory_is_given_back_when_asked_for(
    server: ParameterServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.register_checkpoint("a", named_tensors={"w": torch.ones(5000)})
    server.unregister_checkpoint("a", force=True)
    assert server._checkpoints.memory.usage == (0, 0)
    monkeypatch.setenv("PS_RETAIN_HOST_MEMORY", "0")
    frugal = ParameterServer(rank=0, world_size=1)
    frugal.register_checkpoint("a", named_tensors={"w": torch.ones(5000)})
    frugal.unregister_checkpoint("a")
    assert frugal._checkpoints.memory.usage == (0, 0)


def test_plans_are_kept_between_updates(server: ParameterServer) -> None:
    server.register_checkpoint("a", named_tensors={"w": torch.ones(5000)})
    received(server, "a")
    assert received(server, "a").keys() == {"w"}  # the rank knows its worker by now
    broadcast = server._server.ways[-1]
    planned = broadcast._planned
    assert planned is not None
    server.unregister_checkpoint("a")
    server.register_checkpoint("a", named_tensors={"w": torch.zeros(5000)})
    assert received(server, "a").keys() == {"w"}
    assert broadcast._planned is planned
    server.unregister_checkpoint("a")
    server.register_checkpoint("a", named_tensors={"v": torch.ones(7)})
    assert received(server, "a").keys() == {"v"}


def received(server: ParameterServer, name: str) -> Weights:
    """What a worker gets when ``name`` is gathered and sent."""
    server.gather_metas(name)
    return updated(server, name)


def updated(server: ParameterServer, name: str) -> Weights:
    """What a worker gets when ``name``, gathered some time before, is sent."""
    weights: Weights = {}

    def engine(paths: list[tuple[str, str]]) -> None:
        with zmq.Context() as context:
            update_weights_from_ipc(
                context,
                paths[0][1],
                None,
                run=lambda some: weights.update({k: v.clone() for k, v in some}),
            )

    server.update(name, engine, timeout=timedelta(seconds=SOON))
    return weights


def same(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


def some(seed: int, count: int = 3, size: int = 500) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {f"w.{i}": torch.rand(size + i, generator=generator) for i in range(count)}


# ---------------------------------------------------------------------- construction


def test_the_launchers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    server = ParameterServer()
    assert (server._rank, server._world_size) == (5, 8)
    assert (server._gpu_count, server._local_rank) == (4, 1)
    assert server._device_uuid.endswith("-1")
    assert server._auto_pg is None


def test_arguments_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    server = ParameterServer(rank=0, world_size=2, gpu_count=2, auto_pg=False, mem_fraction=0.5)
    assert (server._rank, server._world_size, server._gpu_count) == (0, 2, 2)
    assert (server._auto_pg, server._mem_fraction) == (False, 0.5)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "2"}, "give rank=, or set RANK"),
        ({"RANK": "0"}, "give world_size=, or set WORLD_SIZE"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK must be an integer, got 'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 is not in a world of 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "rank -1 is not in a world of 2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "rank 0 is not in a world of 0"),
        ({"RANK": "0", "WORLD_SIZE": "1", "PS_DEVICE": "tpu"}, "PS_DEVICE must be"),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "PS_MEM_FRACTION": "0"},
            r"FRACTION\) must be in \(0, 1\], got 0",
        ),
        ({"RANK": "0", "WORLD_SIZE": "1", "PS_MEM_FRACTION": "x"}, "PS_MEM_FRACTION must be a num"),
        ({"RANK": "0", "WORLD_SIZE": "1", "PS_MEM_FRACTION": "nan"}, r"must be in \(0, 1\]"),
        ({"RANK": "0", "WORLD_SIZE": "1", "PS_MAX_BUCKET_SIZE_GB": "x"}, "PS_MAX_BUCKET_SIZE_GB"),
        ({"RANK": "0", "WORLD_SIZE": "1", "PS_MAX_BUCKET_SIZE_GB": "0"}, "must be a positive"),
        ({"RANK": "0", "WORLD_SIZE": "1", "PS_MAX_BUCKET_SIZE_GB": "inf"}, "must be a positive"),
        ({"RANK": "0", "WORLD_SIZE": "1", "PS_CPU_TRANSPORT": "tcp"}, "PS_CPU_TRANSPORT must be"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "1", "PS_P2P_PROTOCOL": "rdam"}, "PS_P2P_PROTOCOL must be"),
        ({"RANK": "0", "WORLD_SIZE": "1", "PS_IPC_UIDS": "me"}, "PS_IPC_UIDS must be user ids"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a:1"}, "MASTER_ADDR must be a host name"),
    ],
)
def test_a_bad_environment(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=says):
        ParameterServer()


@pytest.mark.parametrize("mem_fraction", [0, 0.0, -0.1, 1.5, float("nan")])
def test_a_bad_memory_fraction(mem_fraction: float) -> None:
    with pytest.raises(ValueError, match=r"mem_fraction \(PS_MEM_FRACTION\) must be in \(0, 1\]"):
        ParameterServer(rank=0, world_size=1, mem_fraction=mem_fraction)


@pytest.mark.parametrize("gpu_count", [0, -1])
def test_a_bad_gpu_count(gpu_count: int) -> None:
    with pytest.raises(ValueError, match=f"gpu_count must be at least 1, got {gpu_count}"):
        ParameterServer(rank=0, world_size=1, gpu_count=gpu_count)


def test_a_world_of_several_connects_only_when_it_has_to() -> None:
    ParameterServer(rank=1, world_size=2, master_addr="127.0.0.1", master_port=1)


# ---------------------------------------------------------------------- registering


def test_registered_tensors_are_copies(server: ParameterServer) -> None:
    sent = some(1) | {
        "t": torch.rand(7, 5).t(),
        "scalar": torch.tensor(3),
        "none": torch.zeros(0, 2),
    }
    expected = {name: tensor.clone() for name, tensor in sent.items()}
    server.register_checkpoint("c", named_tensors=sent)
    for tensor in sent.values():
        tensor.zero_()
    assert same(received(server, "c"), expected)


def test_files_and_tensors_that_override_them(server: ParameterServer, tmp_path: Path) -> None:
    on_disk, given = some(1), {"w.1": torch.ones(3, dtype=torch.int8), "more": torch.zeros(2)}
    save_file(on_disk, tmp_path / "a.safetensors")
    save_file({"other": torch.arange(9)}, tmp_path / "b.safetensors")
    server.register_checkpoint(
        "c",
        files=[str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")],
        named_tensors=given,
    )
    assert same(received(server, "c"), on_disk | {"other": torch.arange(9)} | given)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_name_that_is_taken_leaves_the_first_intact(server: ParameterServer) -> None:
    server.register_checkpoint("c", named_tensors=some(1))
    used = in_use(server)
    for again in (some(2), {}):
        with pytest.raises(ValueError, match="'c' is registered already: unregister_checkpoint"):
            server.register_checkpoint("c", named_tensors=again)
    assert in_use(server) == used
    assert same(received(server, "c"), some(1))


def test_a_failure_leaves_nothing(server: ParameterServer, tmp_path: Path) -> None:
    save_file(some(1), tmp_path / "good.safetensors")
    (tmp_path / "bad.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:-1])
    bad: dict[str, tuple[dict[str, Any], str]] = {
        "missing": ({"files": [str(tmp_path / "gone.safetensors")]}, "gone.safetensors"),
        "truncated": ({"files": [str(tmp_path / "bad.safetensors")]}, "bad.safetensors"),
        "no tensor": ({"named_tensors": {"w": [1, 2]}}, "'w'"),
        "pool": ({"named_tensors": {"w": 1}, "use_shared_memory_pool": True}, "'w'"),
    }
    for name, (arguments, says) in bad.items():
        with pytest.raises(ValueError, match=says):
            server.register_checkpoint(name, **arguments)
    assert server._memory_pool == {}
    assert in_use(server) == 0
    server.register_checkpoint("truncated", named_tensors=some(1))
    assert same(received(server, "truncated"), some(1))


@pytest.mark.parametrize("arguments", [{}, {"files": []}, {"named_tensors": {}}])
def test_nothing_to_register(server: ParameterServer, arguments: dict[str, Any]) -> None:
    server.register_checkpoint("c", **arguments)
    with pytest.raises(UpdateError, match="'c' holds no tensors on any rank: there is nothing to"):
        received(server, "c")
    assert server.get_metas() == {}
    server.unregister_checkpoint("c")


def test_the_pool_itself_is_no_checkpoint(server: ParameterServer) -> None:
    name = server.shared_memory_pool_name
    with pytest.raises(ValueError, match="is the name of the shared memory pool itself"):
        server.register_checkpoint(name, named_tensors=some(1))
    server.register_checkpoint("c", named_tensors=some(1), use_shared_memory_pool=True)
    server.unregister_checkpoint(name, force=True)
    assert same(received(server, "c"), some(1))


def test_unregistering_frees(server: ParameterServer) -> None:
    server.register_checkpoint("a", named_tensors=some(1))
    server.register_checkpoint("b", named_tensors=some(2))
    server.unregister_checkpoint("a")
    assert "a" not in server._memory_pool
    assert same(received(server, "b"), some(2))
    server.unregister_checkpoint("b")
    assert in_use(server) == 0
    server.register_checkpoint("a", named_tensors=some(3))
    assert same(received(server, "a"), some(3))


def test_unregistering_what_is_unknown_only_warns(server: ParameterServer) -> None:
    with patch.object(server._checkpoints, "_log") as log:
        server.unregister_checkpoint("nothing")
        server.unregister_checkpoint("nothing", force=True)
    assert log.warning.call_count == 2
    assert "nothing" in str(log.warning.call_args)


# ---------------------------------------------------------------------- the shared pool


def addresses(server: ParameterServer, name: str) -> list[int]:
    return [buffer.buffer.data_ptr() for buffer in server._memory_pool[name]]


def test_the_pool_is_used_again(server: ParameterServer) -> None:
    server.register_checkpoint("step-1", named_tensors=some(1), use_shared_memory_pool=True)
    where, used = addresses(server, "step-1"), in_use(server)
    assert same(received(server, "step-1"), some(1))
    for step in (2, 3):
        server.unregister_checkpoint(f"step-{step - 1}")
        assert in_use(server) == used
        server.register_checkpoint(
            f"step-{step}", named_tensors=some(step), use_shared_memory_pool=True
        )
        assert addresses(server, f"step-{step}") == where
        assert in_use(server) == used
        assert same(received(server, f"step-{step}"), some(step))


def test_the_pool_has_one_user_at_a_time(server: ParameterServer) -> None:
    server.register_checkpoint("a", named_tensors=some(1), use_shared_memory_pool=True)
    with pytest.raises(ValueError, match="'a' occupies the shared memory pool"):
        server.register_checkpoint("b", named_tensors=some(2), use_shared_memory_pool=True)
    server.register_checkpoint("b", named_tensors=some(2))
    assert same(received(server, "a"), some(1))
    assert same(received(server, "b"), some(2))


def test_force_frees_the_pool(server: ParameterServer) -> None:
    server.register_checkpoint("a", named_tensors=some(1), use_shared_memory_pool=True)
    server.unregister_checkpoint("a", force=True)
    assert (in_use(server), server._memory_pool) == (0, {})
    larger = some(2, count=9, size=9000)
    server.register_checkpoint("a", named_tensors=larger, use_shared_memory_pool=True)
    assert same(received(server, "a"), larger)


def test_force_frees_nothing_of_others(server: ParameterServer) -> None:
    """A checkpoint beside the pool does not take the pool along."""
    server.register_checkpoint("pooled", named_tensors=some(1), use_shared_memory_pool=True)
    server.register_checkpoint("other", named_tensors=some(2))
    server.unregister_checkpoint("other", force=True)
    assert same(received(server, "pooled"), some(1))


def test_what_does_not_fit_the_pool_is_refused_and_may_be_mended(server: ParameterServer) -> None:
    server.register_checkpoint("a", named_tensors=some(1), use_shared_memory_pool=True)
    server.unregister_checkpoint("a")
    larger = some(2, count=9, size=9000)
    with pytest.raises(ValueError, match=r"do not fit: free the pool first.*force=True"):
        server.register_checkpoint("b", named_tensors=larger, use_shared_memory_pool=True)
    assert "b" not in server._memory_pool
    server.register_checkpoint("b", named_tensors=some(3), use_shared_memory_pool=True)
    assert same(received(server, "b"), some(3))
    server.unregister_checkpoint("b", force=True)
    server.register_checkpoint("b", named_tensors=larger, use_shared_memory_pool=True)
    assert same(received(server, "b"), larger)


def test_a_rank_that_owned_nothing_of_the_first_step(server: ParameterServer) -> None:
    server.register_checkpoint("a", use_shared_memory_pool=True)
    server.unregister_checkpoint("a")
    server.register_checkpoint("b", named_tensors=some(2), use_shared_memory_pool=True)
    assert same(received(server, "b"), some(2))
    server.unregister_checkpoint("b")
    server.register_checkpoint("c", use_shared_memory_pool=True)
    server.gather_metas("c")
    assert server.get_metas() == {}


# ---------------------------------------------------------------------- in place


@pytest.fixture
def shm_file() -> Iterator[Path]:
    folder = Path("/dev/shm") / f"test-ps-unit-{os.getpid()}"
    folder.mkdir()
    path = folder / "model.safetensors"
    save_file(some(1), path)
    yield path
    path.unlink(missing_ok=True)
    folder.rmdir()


def test_nothing_is_deleted_unless_asked_for(server: ParameterServer, shm_file: Path) -> None:
    server.register_checkpoint("c", files=[str(shm_file)])
    assert shm_file.exists()
    assert same(received(server, "c"), some(1))


def test_in_place(server: ParameterServer, shm_file: Path, tmp_path: Path) -> None:
    save_file({"copied": torch.arange(5)}, tmp_path / "x.safetensors")
    server.register_checkpoint(
        "c",
        files=[str(tmp_path / "x.safetensors"), str(shm_file)],
        named_tensors={"given": torch.ones(4)},
        use_inplace_pin_memory=True,
    )
    assert not shm_file.exists()
    assert (tmp_path / "x.safetensors").exists()
    expected = some(1) | {"copied": torch.arange(5), "given": torch.ones(4)}
    assert same(received(server, "c"), expected)
    server.unregister_checkpoint("c")
    assert in_use(server) == 0


def test_a_plan_is_not_kept_for_buffers_of_other_sizes(
    server: ParameterServer, shm_file: Path
) -> None:
    """A file that ends with its last page has no room for the last tensor's padding."""
    for length in range(1, mmap.PAGESIZE):
        tensors = {"w": torch.full((length,), 7, dtype=torch.uint8)}
        save_file(tensors, shm_file)
        if shm_file.stat().st_size % mmap.PAGESIZE == 0:
            break
    server.register_checkpoint("c", named_tensors=tensors)
    for _ in range(2):  # the second time the rank knows its worker, and plans as it will
        assert same(received(server, "c"), tensors)
    server.unregister_checkpoint("c")
    server.register_checkpoint("c", files=[str(shm_file)], use_inplace_pin_memory=True)
    assert server._memory_pool["c"][0].size < align_up(length)
    assert same(received(server, "c"), tensors)


def test_named_tensors_override_files_in_place_too(server: ParameterServer, shm_file: Path) -> None:
    given = {"w.1": torch.full((3,), 7.0)}
    server.register_checkpoint(
        "c", files=[str(shm_file)], named_tensors=given, use_inplace_pin_memory=True
    )
    assert same(received(server, "c"), some(1) | given)


def test_a_failure_in_place_deletes_and_keeps_nothing(
    server: ParameterServer, shm_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="gone"):
        server.register_checkpoint(
            "c",
            files=[str(shm_file), str(tmp_path / "gone.safetensors")],
            use_inplace_pin_memory=True,
        )
    assert shm_file.exists()
    shm_file.write_bytes(shm_file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        server.register_checkpoint(
            "c", files=[str(shm_file)], named_tensors=some(2), use_inplace_pin_memory=True
        )
    assert shm_file.exists()
    assert in_use(server) == 0
    server.register_checkpoint("c", named_tensors=some(2))


@pytest.mark.parametrize("raised", [MemoryError, KeyboardInterrupt])
def test_a_failure_while_summing_deletes_and_keeps_nothing(
    server: ParameterServer,
    shm_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: type[BaseException],
) -> None:
    server.register_checkpoint("before", named_tensors=some(3))
    before = in_use(server)

    def fail(*_: object) -> None:
        raise raised("no room for sums")

    ways: list[dict[str, Any]] = [
        {"named_tensors": some(1)},
        {"named_tensors": some(1), "use_shared_memory_pool": True},
        {"files": [str(shm_file)], "use_inplace_pin_memory": True},
        {"files": [str(shm_file)], "named_tensors": some(2), "use_inplace_pin_memory": True},
    ]
    for options in ways:
        with monkeypatch.context() as patch:
            patch.setattr(checksum._TensorSums, "encode", fail)
            with pytest.raises(raised, match="no room for sums"):
                server.register_checkpoint("c", **options)
        assert in_use(server) == before
        assert shm_file.exists()
    server.register_checkpoint("c", files=[str(shm_file)], use_inplace_pin_memory=True)
    assert not shm_file.exists()
    assert same(received(server, "c"), some(1))


def test_a_failure_while_summing_leaves_the_pool_to_others(
    server: ParameterServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.register_checkpoint("a", named_tensors=some(1), use_shared_memory_pool=True)
    server.unregister_checkpoint("a")
    before = in_use(server)

    def fail(*_: object) -> None:
        raise MemoryError("no room for sums")

    with monkeypatch.context() as patch:
        patch.setattr(checksum._TensorSums, "encode", fail)
        with pytest.raises(MemoryError, match="no room for sums"):
            server.register_checkpoint("b", named_tensors=some(2), use_shared_memory_pool=True)
    assert in_use(server) == before
    server.register_checkpoint("b", named_tensors=some(2), use_shared_memory_pool=True)
    assert same(received(server, "b"), some(2))


def test_in_place_and_the_shared_pool(server: ParameterServer, shm_file: Path) -> None:
    """Files that stay where they are give no memory to the checkpoints that follow."""
    server.register_checkpoint(
        "a", files=[str(shm_file)], use_inplace_pin_memory=True, use_shared_memory_pool=True
    )
    assert same(received(server, "a"), some(1))
    server.unregister_checkpoint("a")
    next_step = {f"w.{i}": torch.rand(512) for i in range(3)}  # longer, but padded alike
    server.register_checkpoint("b", named_tensors=next_step, use_shared_memory_pool=True)
    assert same(received(server, "b"), next_step)
    server.unregister_checkpoint("b")
    save_file(some(3), shm_file)
    server.register_checkpoint(
        "c", files=[str(shm_file)], use_inplace_pin_memory=True, use_shared_memory_pool=True
    )
    assert same(received(server, "c"), some(3))
    server.unregister_checkpoint("c", force=True)
    assert in_use(server) == 0


# ---------------------------------------------------------------------- metas


METAS = TypeAdapter(dict[int, MemoryBufferMetaList])


def metas_of(server: ParameterServer, address: str | None) -> dict[int, MemoryBufferMetaList]:
    server.register_checkpoint("for metas", named_tensors=some(1))
    server.gather_metas("for metas")
    held = json.loads(METAS.dump_json(server.get_metas()))
    for owned in held.values():
        owned |= {"p2p_store_addr": address, "rdma_device": "mlx5_0"}
    return METAS.validate_python(held)


def test_metas_say_where_everything_is(server: ParameterServer) -> None:
    assert server.get_metas() == {}
    server.register_checkpoint("c", named_tensors=some(1))
    server.gather_metas("c")
    metas = server.get_metas()
    (held,) = metas[0].memory_buffer_metas_list
    assert [one.name for one in held.metas] == list(some(1))
    assert held.ptr == addresses(server, "c")[0]
    assert held.size == sum(one.aligned_size for one in held.metas)
    assert METAS.validate_json(METAS.dump_json(metas)) == metas
    metas.clear()
    assert set(server.get_metas()) == {0}
    assert server._current_global_parameter_metas == server.get_metas()


def test_gathering_replaces_what_was_gathered(server: ParameterServer) -> None:
    for name, seed in (("a", 1), ("b", 2), ("a", 1)):
        if name not in server._memory_pool:
            server.register_checkpoint(name, named_tensors={f"{name}.w": torch.rand(seed)})
        server.gather_metas(name)
        ((held,),) = [owned.memory_buffer_metas_list for owned in server.get_metas().values()]
        assert [one.name for one in held.metas] == [f"{name}.w"]
        assert list(server._local_rdma_devices.values()) == [{0}]
        assert list(server._remote_rdma_devices.values()) == [{0}]


def test_gathering_what_nobody_registered(server: ParameterServer) -> None:
    with pytest.raises(UpdateError, match=r"no rank has registered checkpoint 'x'.*register_check"):
        server.gather_metas("x")
    assert server.get_metas() == {}
    server.register_checkpoint("x", named_tensors=some(1))
    assert same(received(server, "x"), some(1))


def test_a_failed_gather_changes_nothing(server: ParameterServer) -> None:
    server.register_checkpoint("c", named_tensors=some(1))
    server.gather_metas("c")
    before = server.get_metas()
    with pytest.raises(UpdateError):
        server.gather_metas("x")
    assert server.get_metas() == before


def test_loading_metas(server: ParameterServer) -> None:
    metas = metas_of(server, "10.0.0.9:777")
    empty = MemoryBufferMetaList(p2p_store_addr=None, memory_buffer_metas_list=[], rdma_device="")
    other = ParameterServer(rank=0, world_size=1)
    other.load_metas({3: empty, 5: metas[0], 6: metas[0]})
    assert set(other.get_metas()) == {5, 6}
    assert other.get_metas()[5] == metas[0]
    assert list(other._remote_rdma_devices.values()) == [{5, 6}]
    other.load_metas({2: metas[0]})
    assert set(other.get_metas()) == {2}
    assert list(other._remote_rdma_devices.values()) == [{2}]


def test_metas_without_leases_are_warned_about(server: ParameterServer) -> None:
    """As releases of the original write them."""
    metas = metas_of(server, "10.0.0.9:777")
    with patch("checkpoint_engine.world.gathered.logger") as log:
        server.load_metas(metas)
        server.load_metas(
            {0: metas[0].model_copy(update={"lease": Lease(ptr=1, id="ab" * 32)})},
        )
    ((text, ranks),) = [call.args for call in log.warning.call_args_list]
    assert "gave no lease" in text
    assert ranks == [0]


@pytest.mark.parametrize("address", [None, ""])
def test_metas_without_addresses_are_refused(server: ParameterServer, address: str | None) -> None:
    metas = metas_of(server, address)
    before = server.get_metas()
    with pytest.raises(ValueError, match=r"owner ranks \[0\] have no P2P address"):
        server.load_metas(metas)
    assert server.get_metas() == before


def test_loaded_metas_are_no_broadcast(server: ParameterServer) -> None:
    server.load_metas(metas_of(server, "10.0.0.9:777"))
    with pytest.raises(UpdateError, match="gather"):
        server.update("for metas", print, timeout=timedelta(seconds=SOON))


# ---------------------------------------------------------------------- updating


def test_updating_what_is_not_gathered(server: ParameterServer) -> None:
    began = time.monotonic()
    server.register_checkpoint("a", named_tensors=some(1))
    with pytest.raises(UpdateError, match=r"'a' have not been gathered.*gather_metas\('a'\)"):
        server.update("a", print)
    server.gather_metas("a")
    with pytest.raises(UpdateError, match=r"'b' have not been gathered \(last: 'a'\)"):
        server.update("b", print)
    assert time.monotonic() - began < SOON
    assert same(received(server, "a"), some(1))


@pytest.mark.parametrize("change", ["other tensors", "gone"])
def test_updating_what_changed_since_it_was_gathered(server: ParameterServer, change: str) -> None:
    server.register_checkpoint("a", named_tensors=some(1))
    server.gather_metas("a")
    server.unregister_checkpoint("a")
    if change == "other tensors":
        server.register_checkpoint("a", named_tensors=some(1, count=2))
    with pytest.raises(UpdateError, match="changed on this rank since its metas were gathered"):
        server.update("a", print)


def test_the_same_tensors_with_new_values_need_no_new_gather(server: ParameterServer) -> None:
    server.register_checkpoint("a", named_tensors=some(1))
    assert same(received(server, "a"), some(1))
    for seed in (2, 3):
        server.unregister_checkpoint("a")
        server.register_checkpoint("a", named_tensors=some(seed))
        assert same(updated(server, "a"), some(seed))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"lease": Lease(ptr=1, id="ab")}, "owner 0 hold a damaged lease: 'ab'"),
        ({"lease": Lease(ptr=1, id="")}, "damaged lease"),
        ({"checksums": "!!!"}, "owner 0 hold damaged checksums: '!!!'"),
        ({"checksums": "odd factors, 2047:!!!"}, "damaged checksums"),
        ({"checksums": ""}, "damaged checksums"),
    ],
)
def test_damaged_proofs_are_refused(
    server: ParameterServer, damage: dict[str, Any], says: str
) -> None:
    """Taken for none, they would leave bytes unchecked."""
    metas = metas_of(server, "10.0.0.9:777")
    (buffer,) = metas[0].memory_buffer_metas_list
    if "checksums" in damage:
        buffer.checksums = damage["checksums"]
    else:
        metas[0] = metas[0].model_copy(update=damage)
    before = server.get_metas()
    with pytest.raises(ValueError, match=says):
        server.load_metas(metas)
    assert server.get_metas() == before


def test_a_damaged_proof_of_a_rank_of_this_world_is_refused(server: ParameterServer) -> None:
    server.register_checkpoint("c", named_tensors=some(1))
    damaged = server._checkpoints.all()[0].owned
    damaged.memory_buffer_metas_list[0].checksums = "!!!"
    with (
        patch.object(Checkpoint, "owned", damaged),
        pytest.raises(UpdateError, match="owner 0 hold damaged checksums: '!!!'"),
    ):
        server.gather_metas("c")


def test_two_owners_of_other_worlds_with_different_tensors_of_one_name(
    server: ParameterServer,
) -> None:
    metas = metas_of(server, "10.0.0.9:777")
    other = metas[0].model_copy(deep=True)
    other.memory_buffer_metas_list[0].metas[0].dtype = torch.int32
    with pytest.raises(ValueError, match=r"ranks 0 and 1 own different tensors 'w\.0'"):
        server.load_metas({0: metas[0], 1: other})


def test_p2p_that_cannot_start_warns_once_and_says_why() -> None:
    with patch("checkpoint_engine.ps.logger") as logger:
        server = ParameterServer(rank=0, world_size=1)
    levels = [call.args[0] for call in logger.bind.return_value.log.call_args_list]
    assert levels.count("WARNING") == 1
    assert server._p2p_store is None
    server.register_checkpoint("a", named_tensors=some(1))
    server.gather_metas("a")
    with pytest.raises(RuntimeError, match=r"ranks=\[0\]\) needs P2P.*no wheel of Mooncake"):
        server.update("a", print, ranks=[0])


def test_a_report(server: ParameterServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_MAX_BUCKET_SIZE_GB", "1e-9")
    server.register_checkpoint("a", named_tensors=some(1))
    server.gather_metas("a")

    def engine(paths: list[tuple[str, str]]) -> None:
        with zmq.Context() as context:
            update_weights_from_ipc(context, paths[0][1], None, run=lambda weights: None)

    report = server.update("a", engine, timeout=timedelta(seconds=SOON))
    assert (report.checkpoint_name, report.rank, report.world_size) == ("a", 0, 1)
    assert (report.tensors, report.buckets) == (3, 3)
    assert report.bytes == 3 * 2048
    assert report.bucket_bytes == 2048
    assert report.seconds == pytest.approx(sum(report.phases.values()), abs=0.05)
    assert {"plan", "handshake", "transfer", "reload", "release", "post hook"} <= set(report.phases)
    assert report.gigabytes_per_second > 0
    assert "3 tensors" in str(report)


class SlowEngine:
    """An engine that begins to receive when it is told to."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.go = threading.Event()

    def __call__(self, paths: list[tuple[str, str]]) -> None:
        self.asked.set()
        assert self.go.wait(SOON)
        with zmq.Context() as context:
            update_weights_from_ipc(context, paths[0][1], None, run=lambda weights: None)


def test_a_server_that_is_busy(server: ParameterServer) -> None:
    server.register_checkpoint("a", named_tensors=some(1), use_shared_memory_pool=True)
    server.gather_metas("a")
    engine = SlowEngine()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.update, "a", engine, timeout=timedelta(seconds=2 * SOON))
        assert engine.asked.wait(SOON)
        for call in (
            lambda: server.update("a", print),
            lambda: server.gather_metas("a"),
            lambda: server.store_based_barrier(),
            lambda: server.load_metas({}),
            lambda: server.release_groups(),
        ):
            with pytest.raises(BusyError, match="refused: this rank is in a collective call"):
                call()
        for force in (False, True):
            with pytest.raises(BusyError, match="'a' is being updated from"):
                server.unregister_checkpoint("a", force=force)
        server.register_checkpoint("b", named_tensors=some(2))
        server.unregister_checkpoint("b")
        with pytest.raises(ValueError, match="registered already"):
            server.register_checkpoint("a", named_tensors=some(2))
        engine.go.set()
        assert first.result(SOON).tensors == 3
    server.unregister_checkpoint("a", force=True)
    assert in_use(server) == 0


def test_a_failed_update_is_busy_no_more(server: ParameterServer) -> None:
    def refuse(paths: list[tuple[str, str]]) -> None:
        raise OSError("no engine")

    server.register_checkpoint("a", named_tensors=some(1))
    server.gather_metas("a")
    for _ in range(2):
        with pytest.raises(UpdateError, match="no engine"):
            server.update("a", refuse)
    assert same(received(server, "a"), some(1))
    server.unregister_checkpoint("a")


@pytest.mark.parametrize("seconds", [0, -3])
def test_a_timeout_that_is_none(server: ParameterServer, seconds: float) -> None:
    server.register_checkpoint("a", named_tensors=some(1))
    server.gather_metas("a")
    with pytest.raises(ValueError, match="timeout must be positive"):
        server.update("a", print, timeout=timedelta(seconds=seconds))
    assert same(received(server, "a"), some(1))


def test_a_single_rank_passes_any_barrier(server: ParameterServer) -> None:
    for _ in range(3):
        server.store_based_barrier()


def test_descriptors_and_threads_do_not_pile_up(server: ParameterServer) -> None:
    server.register_checkpoint("a", named_tensors=some(1))
    received(server, "a")
    threads = set(threading.enumerate())
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        received(server, "a")
    assert set(threading.enumerate()) - threads == set()
    assert len(os.listdir("/proc/self/fd")) <= files
