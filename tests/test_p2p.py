"""P2P over real Mooncake on TCP: some ranks of a world, and worlds that join another."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_engine.ground.sockets import open_listeners
from checkpoint_engine.memory.checkpoints import POOL
from checkpoint_engine.ps import ParameterServer, UpdateError
from checkpoint_engine.transfer.p2p_store import P2PError
from test_update import SMALL_BUCKETS
from torchrun import MOONCAKE_ADVICE, Run, mooncake_works, torchrun

pytestmark = [
    pytest.mark.skipif(not mooncake_works(), reason=MOONCAKE_ADVICE),
    pytest.mark.alone,
]
CPU = {"PS_DEVICE": "cpu"} | SMALL_BUCKETS


by_each_way = pytest.mark.parametrize(("transport", "way"), [("auto", "shard"), ("group", "P2P")])


@by_each_way
def test_chosen_ranks_pull_from_all_owners(tmp_path: Path, transport: str, way: str) -> None:
    steps = [
        {"ranks": [0, 1], "env": SMALL_BUCKETS},
        {"ranks": [1, 3]},
        {"ranks": [2], "all_call": False},
        {"ranks": [2, 1, 0, 3]},
        {"ranks": [3, 0], "all_call": False, "env": {"PS_MAX_BUCKET_SIZE_GB": "1"}},
    ]
    env = {"PS_DEVICE": "cpu", "PS_TRANSPORT": transport}
    results = torchrun(tmp_path, 4, "p2p", env=env, steps=steps)
    for result in results:
        assert result["sockets"] == 0
        assert set(result["ways"]) == {way}


def test_ranks_that_share_no_memory_read_whole_buckets(tmp_path: Path) -> None:
    env = {"PS_DEVICE": "cpu", "PS_PEERS": "0"} | SMALL_BUCKETS
    for result in torchrun(tmp_path, 2, "p2p", env=env, steps=[{"ranks": [0, 1]}]):
        assert set(result["ways"]) == {"P2P"}


@by_each_way
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("unregister", "has unregistered or replaced the checkpoint"),
        ("replace", "has unregistered or replaced the checkpoint"),
        ("reuse pool", "has unregistered or replaced the checkpoint"),
        ("die", "cannot read"),
    ],
)
def test_a_world_joins_and_never_takes_stale_weights(
    tmp_path: Path, change: str, says: str, transport: str, way: str
) -> None:
    """Two worlds: three owners that go on with their own updates, and two ranks that join.

    The change is made while an update of theirs is between two buckets; another one follows.
    """
    arguments = {"folder": str(tmp_path), "changes": [change]}
    owners = Run(tmp_path / "a", 3, "source", CPU, **arguments)
    try:
        env = CPU | {"PS_TRANSPORT": transport}
        joined = torchrun(tmp_path / "b", 2, "joiner", 55, env, sources=3, **arguments)
        if change != "die":
            assert min(result["updates"] for result in owners.wait()) > 0
    except AssertionError as error:
        raise AssertionError(f"{error}\nthe owners: {owners.output()}") from None
    finally:
        owners.kill()
    sources = json.loads((tmp_path / "metas.json").read_text()).values()
    for result in joined:
        assert result["buckets"][0] >= 6  # some of them not read yet at the change
        assert result["sockets"] == 0
        assert set(result["ways"]) == {way}
        assert len(result["seen"]) == 2
        for seen in result["seen"]:
            print(f"{change}: {seen['error']}")
            assert says in seen["error"]
            assert any(source["p2p_store_addr"] in seen["error"] for source in sources)
            assert seen["seconds"] < 15


@pytest.mark.parametrize("refuses", ["register_named_tensors", "grant"])
def test_what_could_not_be_registered_is_not_offered(
    monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    """It can be broadcast, and nobody reads it unguarded."""
    monkeypatch.setenv("PS_DEVICE", "cpu")
    server = ParameterServer(rank=0, world_size=1)
    store = server._p2p_store
    assert store is not None

    def refuse(*arguments: object) -> None:
        raise P2PError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(store, refuses, refuse)
        server.register_checkpoint("c", named_tensors={"w": torch.ones(4)})
    server.gather_metas("c")
    metas = server.get_metas()
    assert metas[0].p2p_store_addr is None
    with pytest.raises(ValueError, match=r"owner ranks \[0\] have no P2P address"):
        server.load_metas(metas)
    with pytest.raises(UpdateError, match=r"ranks \[0\] own parts of 'c' that cannot be read"):
        server.update("c", print, ranks=[0])
    server.unregister_checkpoint("c")
    server.register_checkpoint("c", named_tensors={"w": torch.ones(4)})
    server.gather_metas("c")
    assert server.get_metas()[0].p2p_store_addr == store.addr
    server.unregister_checkpoint("c")
    store.close()


def test_without_p2p_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_DEVICE", "cpu")
    monkeypatch.setenv("PS_P2P", "off")
    before = {inode for inode, _ in open_listeners()}
    server = ParameterServer(rank=0, world_size=1)
    assert server._p2p_store is None
    assert {inode for inode, _ in open_listeners()} == before
    server.register_checkpoint("c", named_tensors={"w": torch.ones(4)})
    server.gather_metas("c")
    with pytest.raises(UpdateError, match="this rank has no P2P: PS_P2P=off"):
        server.update("c", print, ranks=[0])
    with pytest.raises(UpdateError, match=r"no rank has registered .*no rank has P2P"):
        server.gather_metas("joined")


def test_metas_of_nobody_say_where_to_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_DEVICE", "cpu")
    server = ParameterServer(rank=0, world_size=1)
    server.register_checkpoint("c", named_tensors={})
    server.gather_metas("c")
    server.load_metas({})
    with pytest.raises(
        UpdateError, match="no owner of weights: gather the checkpoint in the world"
    ):
        server.update("c", print, ranks=[0])


def test_twenty_updates_leave_no_more_than_one(tmp_path: Path) -> None:
    """Rank 0 reads what rank 1 owns; threads and open files of both are counted."""
    results = torchrun(
        tmp_path, 2, "repeat", 50, CPU, script="host_programs.py", members=[0], times=20
    )
    for seen in results:
        for what, most in seen["early"].items():
            assert seen["after"][what] <= most, seen


@pytest.mark.parametrize("method", ["unregister_named_tensors", "register_named_tensors"])
def test_an_interrupted_call_leaves_a_name_that_can_be_registered(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setenv("PS_DEVICE", "cpu")
    server = ParameterServer(rank=0, world_size=1, gpu_count=1)
    store = server._p2p_store
    assert store is not None
    tensors = {"w": torch.ones(1 << 10)}
    if method.startswith("un"):
        server.register_checkpoint("a", named_tensors=tensors)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def call() -> None:
        if method.startswith("un"):
            server.unregister_checkpoint("a")
        server.register_checkpoint("a", named_tensors=tensors)

    with monkeypatch.context() as patch:
        patch.setattr(store, method, interrupt)
        with pytest.raises(KeyboardInterrupt):
            call()
    assert server._memory_pool == {}
    server.register_checkpoint("a", named_tensors=tensors)
    assert "a/0" in store.names()
    server.unregister_checkpoint("a")
    assert "a/0" not in store.names()
    assert server._checkpoints.memory.usage.in_use == 0


def test_a_pool_that_could_not_be_registered_is_registered_the_next_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PS_DEVICE", "cpu")
    server = ParameterServer(rank=0, world_size=1, gpu_count=1)
    store = server._p2p_store
    assert store is not None

    def refuse(_: Any) -> None:
        raise P2PError("memlock")

    leases = []
    for name in ("first", "second", "third"):
        with monkeypatch.context() as patch:
            if name == "first":
                patch.setattr(store, "register_named_tensors", refuse)
            tensors = {"w": torch.ones(1 << 10)}
            server.register_checkpoint(name, named_tensors=tensors, use_shared_memory_pool=True)
        leases.append(next(one.lease for one in server._checkpoints.all()))
        server.unregister_checkpoint(name)
    assert leases[0] is None
    assert None not in leases[1:]
    assert f"{POOL}/0" in store.names()


def test_a_file_pinned_in_place_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mooncake takes a millisecond for each registration, and none of no bytes."""
    monkeypatch.setenv("PS_DEVICE", "cpu")
    tensors = {f"w{number}": torch.full((number,), float(number)) for number in range(200)}
    server = ParameterServer(rank=0, world_size=1)
    store = server._p2p.store
    assert store is not None
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = f"{folder}/a.safetensors"
        save_file(tensors, path)
        server.register_checkpoint("c", files=[path], use_inplace_pin_memory=True)
    assert sorted(store.names()) == ["__leases__", "c/0"]
    server.gather_metas("c")
    (owner,) = server.get_metas().values()
    assert owner.p2p_store_addr == store.addr
    for buffer in owner.memory_buffer_metas_list:
        (meta,) = buffer.metas
        seen = torch.zeros(meta.shape)
        place = [seen.data_ptr()], [buffer.ptr], [seen.nbytes]
        store.batch_transfer_sync_read(store.addr, *place)
        assert torch.equal(seen, tensors[meta.name])
    server.unregister_checkpoint("c")
    assert store.names() == ["__leases__"]
