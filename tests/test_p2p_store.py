"""``P2PStore`` over real Mooncake on TCP; sources that must fail are processes of their own."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import json
import os
import signal
import socket
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loguru import logger

from checkpoint_engine.data_types import (
    BucketRange,
    H2DBucket,
    Lease,
    MemoryBufferMetaList,
    MemoryBufferMetas,
)
from checkpoint_engine.device_utils import DeviceManager
from checkpoint_engine.ground.deadline import poll
from checkpoint_engine.ground.sockets import open_listeners, unreachable
from checkpoint_engine.planning.plan import Step
from checkpoint_engine.transfer import p2p_store, remote_loader
from checkpoint_engine.transfer.p2p_store import P2PError, P2PStore, StaleSourceError
from checkpoint_engine.transfer.remote_loader import RemoteLoader
from p2p_source import pattern
from torchrun import HERE, MOONCAKE_ADVICE, Forked, mooncake_works

pytestmark = pytest.mark.skipif(not mooncake_works(), reason=MOONCAKE_ADVICE)
MIB = 1 << 20
LOCAL = "127.0.0.1"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[P2PStore]:
    monkeypatch.setenv("PS_DEVICE", "cpu")
    store = P2PStore(host=LOCAL)
    yield store
    store.close()


class Source:
    """Another process, whose memory can be read: ``pattern``."""

    def __init__(self, nbytes: int, folder: Path) -> None:
        folder.mkdir()
        script = str(HERE / "p2p_source.py")
        self._forked = Forked(folder, [script, str(nbytes), str(folder)], [{"PS_DEVICE": "cpu"}])
        self._folder = folder
        self._await("place")
        place = json.loads((folder / "place").read_text())
        self.address, self.ptr, self._pid = place["address"], place["ptr"], place["pid"]
        self.lease = Lease(**place["lease"])
        self.nbytes = nbytes

    def _await(self, name: str) -> None:
        while not (self._folder / name).exists():
            assert self.is_running(0.01), self._forked.output()

    def read(self, store: P2PStore, target: torch.Tensor, **options: Any) -> None:
        store.batch_transfer_sync_read(
            self.address, [target.data_ptr()], [self.ptr], [target.nbytes], **options
        )

    def is_running(self, seconds: float = 0) -> bool:
        return self._forked.is_running(seconds)

    def pause(self) -> None:
        os.kill(self._pid, signal.SIGSTOP)
        stat = Path(f"/proc/{self._pid}/stat")  # its threads stop a moment later
        settles(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")

    def go_on(self) -> None:
        os.kill(self._pid, signal.SIGCONT)

    def revoke(self) -> None:
        (self._folder / "revoke").touch()
        self._await("revoked")

    def kill(self) -> None:
        self._forked.kill()


@pytest.fixture
def make_source(tmp_path: Path) -> Iterator[Callable[[int], Source]]:
    sources: list[Source] = []

    def make(nbytes: int = 4096) -> Source:
        sources.append(Source(nbytes, tmp_path / f"source-{len(sources)}"))
        return sources[-1]

    yield make
    for source in sources:
        source.kill()


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    texts: list[str] = []
    sink = logger.add(texts.append, level="WARNING", format="{message}")
    yield texts
    logger.remove(sink)


def refusing(store: P2PStore, monkeypatch: pytest.MonkeyPatch, **codes: list[int]) -> list[int]:
    """Have the store's engine answer calls with these codes, in turn; the addresses it was given
    come back."""
    seen: list[int] = []
    engine = store._engine

    class Refusing:
        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def register_memory(self, ptr: int, nbytes: int) -> int:
            seen.append(ptr)
            return codes["register"].pop(0) or int(engine.register_memory(ptr, nbytes))

        def unregister_memory(self, ptr: int) -> int:
            seen.append(-ptr)
            return codes["unregister"].pop(0) or int(engine.unregister_memory(ptr))

    monkeypatch.setattr(store, "_engine", Refusing())
    return seen


# ---------------------------------------------------------------------- registration


def test_registration_is_of_all_or_none(store: P2PStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {name: torch.zeros(4096, dtype=torch.uint8) for name in "abc"}
    a, b = tensors["a"].data_ptr(), tensors["b"].data_ptr()
    with monkeypatch.context() as patch:
        seen = refusing(store, patch, register=[0, -5], unregister=[0])
        with pytest.raises(P2PError, match=rf"{store.addr} cannot register 4096 bytes.*code -5"):
            store.register_named_tensors(tensors)
    assert seen == [a, b, -a]
    assert store.unregister_named_tensors("abc") == 0
    store.register_named_tensors(tensors)
    assert store.unregister_named_tensors("abc") == 3


def test_a_name_is_registered_once(store: P2PStore) -> None:
    tensor = torch.zeros(4096, dtype=torch.uint8)
    store.register_named_tensors({"a": tensor})
    with pytest.raises(ValueError, match=r"\['a'\] are registered for P2P already"):
        store.register_named_tensors({"b": torch.zeros(8), "a": tensor})
    assert store.unregister_named_tensors(["a", "b", "c", "a"]) == 1
    assert store.unregister_named_tensors(["a"]) == 0


def test_what_is_not_given_back_is_named_and_the_rest_is(
    store: P2PStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.register_named_tensors({name: torch.zeros(4096) for name in "abc"})
    with monkeypatch.context() as patch:
        refusing(store, patch, unregister=[0, -7, 0])
        with pytest.raises(P2PError, match=r"cannot unregister \[\('b', -7\)\]"):
            store.unregister_named_tensors("abc")
    with pytest.raises(ValueError, match=r"\['b'\] are registered"):
        store.register_named_tensors({"b": torch.zeros(4096)})
    assert store.unregister_named_tensors("abc") == 1


# ---------------------------------------------------------------------- leases


def test_a_lease_holds_until_it_is_revoked(
    store: P2PStore, make_source: Callable[..., Source]
) -> None:
    source = make_source()
    store.check_lease(source.address, source.lease)
    source.revoke()
    with pytest.raises(P2PError, match=f"source {source.address} has unregistered or replaced"):
        store.check_lease(source.address, source.lease)


def test_a_slot_is_used_again_under_another_id(store: P2PStore) -> None:
    leases = [store.grant() for _ in range(p2p_store._SLOTS)]
    assert len({lease.ptr for lease in leases}) == len({lease.id for lease in leases})
    with pytest.raises(P2PError, match=f"more than {p2p_store._SLOTS} checkpoints"):
        store.grant()
    store.revoke(leases[3])
    again = store.grant()
    assert again.ptr == leases[3].ptr
    assert again.id != leases[3].id


def test_a_bucket_whose_lease_ends_during_the_read_is_an_error(
    store: P2PStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes may be of before or after: only a lease that still holds says which."""
    owner = P2PStore(host=LOCAL)
    memory = pattern(4000)
    owner.register_named_tensors({"memory": memory})
    lease = owner.grant()
    metas = [MemoryBufferMetas(metas=[], ptr=memory.data_ptr(), size=4000)]
    owned = MemoryBufferMetaList(
        p2p_store_addr=owner.addr, memory_buffer_metas_list=metas, rdma_device="", lease=lease
    )
    loader = RemoteLoader(store, {0: owned}, DeviceManager("cpu"), torch.device("cpu"))
    bucket = H2DBucket(size=4096, ranges=[BucketRange(0, 0, 4000)], items=[])
    target = torch.full((4096,), 255, dtype=torch.uint8)
    read = store.batch_transfer_sync_read

    def read_then_revoke(*args: Any, **options: Any) -> None:
        read(*args, **options)
        if list(args[3]) == [4000]:
            owner.revoke(lease)

    try:
        loader.read(0, bucket, target)
        assert torch.equal(target, torch.cat([memory, torch.zeros(96, dtype=torch.uint8)]))
        monkeypatch.setattr(store, "batch_transfer_sync_read", read_then_revoke)
        with pytest.raises(StaleSourceError):
            loader.read(0, bucket, target)
    finally:
        loader.close()
        owner.close()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("late", [False, True])
def test_another_owner_is_asked_unless_bytes_of_the_first_may_still_arrive(
    store: P2PStore, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first has replaced its checkpoint: its bytes, if late, would replace those of the
    second."""
    owners = [P2PStore(host=LOCAL), P2PStore(host=LOCAL)]
    memory = [torch.full((4096,), 7, dtype=torch.uint8), pattern(4096)]
    owned = {}
    for rank, (owner, held) in enumerate(zip(owners, memory, strict=True)):
        owner.register_named_tensors({"memory": held})
        owned[rank] = MemoryBufferMetaList(
            p2p_store_addr=owner.addr,
            memory_buffer_metas_list=[MemoryBufferMetas(metas=[], ptr=held.data_ptr(), size=4096)],
            rdma_device="",
            lease=owner.grant(),
        )
    loader = RemoteLoader(store, owned, DeviceManager("cpu"), torch.device("cpu"))
    bucket = H2DBucket(size=4096, ranges=[BucketRange(0, 0, 4096)], items=[])
    target = torch.full((8192,), 255, dtype=torch.uint8)[4096:]
    runs = np.array([0, 1024]), np.array([512, 2048])
    try:
        assert owned[0].lease is not None
        owners[0].revoke(owned[0].lease)
        if late:
            under_way: Any = types.SimpleNamespace(memory=target, is_over=lambda: False)
            store._unfinished.append(under_way)
            monkeypatch.setattr(remote_loader, "_LATE_BYTES", 0.1)
            with pytest.raises(StaleSourceError):
                loader.read_any({0: bucket, 1: bucket}, target, runs)
        else:
            assert loader.read_any({0: bucket, 1: bucket}, target, runs) == 1536
            expected = torch.full((4096,), 255, dtype=torch.uint8)
            for begin, end in zip(*runs, strict=True):
                expected[begin:end] = memory[1][begin:end]
            assert torch.equal(target, expected)
    finally:
        store._unfinished.clear()
        loader.close()
        for owner in owners:
            owner.close()


def test_addresses_where_nobody_answers_are_found_at_once() -> None:
    """One refuses, one has no port, one is silent, as its queue of connections is full; one
    answers."""
    with contextlib.ExitStack() as held:
        open_, full, closed = (held.enter_context(socket.socket()) for _ in range(3))
        for one in (open_, full, closed):
            one.bind((LOCAL, 0))
        open_.listen()
        full.listen(0)
        waiting = held.enter_context(socket.socket())
        waiting.connect(full.getsockname())
        said = [f"{LOCAL}:{one.getsockname()[1]}" for one in (open_, full, closed)]
        found = unreachable([*said, f"{LOCAL}:none", "[::1]:1"], 0.3, lambda: None)
    assert found.pop(said[1]) == "no answer within 0.3 s"
    assert found.pop(said[2]) == os.strerror(errno.ECONNREFUSED)
    assert found.keys() == {f"{LOCAL}:none", "[::1]:1"}


# ---------------------------------------------------------------------- reading


def test_a_read_is_exact_whatever_its_pieces(
    store: P2PStore, make_source: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(p2p_store, "_SLICE_BYTES", MIB)
    source = make_source(12 * MIB + 345)
    target = torch.zeros(source.nbytes, dtype=torch.uint8)
    source.read(store, target)
    assert torch.equal(target, pattern(source.nbytes))
    target.zero_()
    regions = [(0, 5, 1), (100, 7, 3 * MIB + 1), (5 * MIB, 0, 0), (9 * MIB, 11 * MIB, MIB + 345)]
    store.batch_transfer_sync_read(
        source.address,
        [target.data_ptr() + start for start, _, _ in regions],
        [source.ptr + offset for _, offset, _ in regions],
        [size for _, _, size in regions],
    )
    expected = torch.zeros_like(target)
    for start, offset, size in regions:
        expected[start : start + size] = pattern(source.nbytes)[offset : offset + size]
    assert torch.equal(target, expected)


def test_memory_that_is_not_offered_cannot_be_read(
    store: P2PStore, make_source: Callable[..., Source]
) -> None:
    source, target = make_source(), torch.zeros(4096, dtype=torch.uint8)
    with pytest.raises(P2PError, match=rf"{store.addr} cannot .* {source.address}: .* code -1"):
        store.batch_transfer_sync_read(source.address, [target.data_ptr()], [64], [4096])
    source.read(store, target)
    assert torch.equal(target, pattern(4096))


def test_two_reads_through_host_memory_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """All reads on their way to a device pass through the same memory."""
    here = types.SimpleNamespace(synchronize=lambda: None, record=lambda: None)
    device = types.SimpleNamespace(
        set_device=lambda _: None,
        Stream=lambda: here,
        Event=lambda: here,
        stream=lambda _: contextlib.nullcontext(),
    )
    memory = [pattern(4 << 20), pattern(4 << 20).flip(0)]
    met = threading.Barrier(2)

    def read(_: str, here: Any, there: Any, sizes: Any, **__: Any) -> None:
        for to, of, nbytes in zip(here, there, sizes, strict=True):
            with contextlib.suppress(threading.BrokenBarrierError):
                met.wait(0.2)  # for the other read to begin, if it does
            ctypes.memmove(to, of, nbytes)
            with contextlib.suppress(threading.BrokenBarrierError):
                met.wait(0.2)

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **o: empty(*size, **o))
    store = types.SimpleNamespace(
        reads_into_device_memory=False, batch_transfer_sync_read=read, check_lease=lambda *_: None
    )
    metas = [MemoryBufferMetas(metas=[], ptr=one.data_ptr(), size=one.nbytes) for one in memory]
    owned = MemoryBufferMetaList(
        p2p_store_addr="owner", memory_buffer_metas_list=metas, rdma_device=""
    )
    manager = types.SimpleNamespace(device_module=device)
    loader = RemoteLoader(store, {0: owned}, manager, torch.device("cpu"))  # type: ignore[arg-type]
    buckets = [
        H2DBucket(size=4 << 20, ranges=[BucketRange(index, 0, 4 << 20)], items=[])
        for index in range(2)
    ]
    targets = [torch.zeros(4 << 20, dtype=torch.uint8) for _ in buckets]
    there = types.SimpleNamespace(query=lambda: True)
    arrivals = [
        loader.start(Step(0, 0, bucket, index), {0: bucket}, target, there)
        for index, (bucket, target) in enumerate(zip(buckets, targets, strict=True))
    ]
    poll(lambda: all(one.query() for one in arrivals), lambda: None)
    loader.close()
    assert all(map(torch.equal, targets, memory))


@pytest.mark.parametrize("known", [True, False])
def test_a_dead_source_is_an_error_with_code_and_addresses(
    store: P2PStore, make_source: Callable[..., Source], known: bool
) -> None:
    source, target = make_source(), torch.zeros(4096, dtype=torch.uint8)
    if known:
        source.read(store, target)
    source.kill()
    with pytest.raises(
        P2PError, match=rf"{store.addr} cannot read 4096 bytes from {source.address}: .*code -?\d"
    ):
        source.read(store, target)


def test_a_read_takes_no_processor_while_it_waits(
    store: P2PStore, make_source: Callable[..., Source]
) -> None:
    source, target = make_source(), torch.zeros(4096, dtype=torch.uint8)
    source.read(store, target)
    source.pause()
    began, spent = time.monotonic(), time.process_time()
    with pytest.raises(TimeoutError):
        source.read(store, target, check=stop_after(1.0))
    assert time.process_time() - spent < 0.5 * (time.monotonic() - began)


def stop_after(seconds: float) -> Callable[[], None]:
    ends = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > ends:
            raise TimeoutError("enough")

    return check


def test_memory_is_kept_until_nothing_can_arrive_in_it_any_more(
    store: P2PStore, make_source: Callable[..., Source], warnings: list[str]
) -> None:
    source = make_source(256 * MIB)
    target = torch.zeros(source.nbytes, dtype=torch.uint8)
    view = target[4096:]
    source.read(store, view[:4096])
    view[:4096] = 0
    source.pause()
    with pytest.raises(TimeoutError):
        source.read(store, view, memory=view, check=stop_after(0.5))
    assert len(warnings) == 1
    assert f"{source.nbytes} bytes of memory are kept" in warnings[0]
    assert source.address in warnings[0]
    address, storage = target.data_ptr(), weakref.ref(view)
    arrived = int(target.count_nonzero())
    del target, view
    gc.collect()
    kept = storage()
    assert kept is not None
    fresh = torch.zeros(source.nbytes, dtype=torch.uint8)
    assert not address <= fresh.data_ptr() < address + source.nbytes
    source.go_on()
    (unfinished,) = store._unfinished
    while not unfinished.is_over():
        time.sleep(0.001)
    assert int(kept.count_nonzero()) > arrived  # late bytes, in memory that nobody uses
    assert not fresh.any()
    del kept, unfinished
    source.read(store, fresh, memory=fresh)
    assert torch.equal(fresh, pattern(source.nbytes))
    assert storage() is None
    assert len(warnings) == 1


def test_a_source_that_dies_leaves_nothing_to_keep(
    store: P2PStore, make_source: Callable[..., Source], warnings: list[str]
) -> None:
    source = make_source(64 * MIB)
    target = torch.zeros(source.nbytes, dtype=torch.uint8)
    source.read(store, target[:4096])
    source.pause()

    def kill_once_under_way() -> None:
        if source.is_running():
            source.kill()

    with pytest.raises(P2PError, match="cannot read"):
        source.read(store, target, memory=target, check=kill_once_under_way)
    assert warnings == []
    assert store._unfinished == []


def test_closing_ends_what_is_under_way(
    make_source: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PS_DEVICE", "cpu")
    source = make_source(64 * MIB)
    threads, files = count("task"), count("fd")
    store = P2PStore(host=LOCAL)
    target = torch.zeros(source.nbytes, dtype=torch.uint8)
    source.read(store, target[:4096])
    source.pause()
    with pytest.raises(TimeoutError):
        source.read(store, target, memory=target, check=stop_after(0.2))
    store.close()
    arrived = target.clone()
    source.go_on()
    assert source.is_running(0.5)  # time in which late bytes would come
    assert torch.equal(target, arrived)
    settles(lambda: count("task") <= threads and count("fd") <= files)


def count(what: str) -> int:
    """Threads (``task``) or open files (``fd``) of this process."""
    return len(os.listdir(f"/proc/self/{what}"))


def settles(happened: Callable[[], bool]) -> None:
    ends = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < ends, (count("task"), count("fd"))
        time.sleep(0.01)


def test_nothing_piles_up(
    make_source: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PS_DEVICE", "cpu")
    source = make_source(MIB)
    target = torch.zeros(MIB, dtype=torch.uint8)

    def use_a_store() -> None:
        store = P2PStore(host=LOCAL)
        for _ in range(20):
            store.register_named_tensors({"target": target})
            source.read(store, target, memory=target)
            store.unregister_named_tensors(["target"])
        store.close()

    use_a_store()
    threads, files = count("task"), count("fd")
    for _ in range(3):
        use_a_store()
    settles(lambda: count("task") <= threads and count("fd") <= files)


# ---------------------------------------------------------------------- start-up


def test_the_protocol_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_DEVICE", "cpu")
    monkeypatch.setenv("PS_P2P_PROTOCOL", "tcp")
    store = P2PStore(device="mlx5_0", host=LOCAL)
    assert (store.protocol, store.device) == ("tcp", "")
    assert store.reads_into_device_memory
    assert not store.needs_registered_targets
    store.close()


@pytest.mark.parametrize(
    ("device_type", "device", "efa", "protocol"),
    [
        ("cpu", "", False, "tcp"),
        ("cuda", "", False, "tcp"),
        ("cuda", "mlx5_0", False, "rdma"),
        ("cuda", "rdmap0s6,rdmap0s7", True, "efa"),
        ("npu", "", False, "ascend_direct"),
    ],
)
def test_the_protocol_fits_the_hardware(
    monkeypatch: pytest.MonkeyPatch, device_type: str, device: str, efa: bool, protocol: str
) -> None:
    monkeypatch.delenv("PS_P2P_PROTOCOL", raising=False)
    monkeypatch.setattr(p2p_store, "is_efa", lambda devices: efa)
    manager = DeviceManager("cpu")
    monkeypatch.setattr(manager, "device_type", device_type)
    assert p2p_store._choose_protocol(manager, device) == protocol


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            "raise ImportError('libibverbs.so.1: cannot open shared object file')",
            "libibverbs.so.1: cannot open.*packages libibverbs1 and libnuma1",
        ),
        (
            "raise ImportError('libcudart.so.12: cannot open shared object file')",
            "libcudart.so.12: cannot open.*wheel is for CUDA.*mooncake-transfer-engine-non-cuda",
        ),
        (None, "Mooncake is not installed.*checkpoint-engine.p2p.*non-cuda"),
    ],
)
def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, says: str
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "mooncake"]:
        monkeypatch.delitem(sys.modules, name)
    package = tmp_path / "mooncake"
    package.mkdir()
    (package / "__init__.py").touch()
    if content is not None:
        (package / "engine.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=says):
        P2PStore(DeviceManager("cpu"), host=LOCAL)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mooncake"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("failures", [2, p2p_store._START_ATTEMPTS])
def test_start_up_is_tried_again_and_leaves_no_engine(
    monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    monkeypatch.setattr(p2p_store, "_FIRST_PAUSE", 0.0)
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    class Engine:
        def __init__(self) -> None:
            alive.append(sum(one() is not None for one in made))
            made.append(weakref.ref(self))

        def initialize(self, *arguments: str) -> int:
            return -1 if len(made) <= failures else 0

        def get_rpc_port(self) -> int:
            return 1

        def register_memory(self, ptr: int, nbytes: int) -> int:
            return 0

    monkeypatch.setattr(p2p_store, "_import_engine", lambda: Engine)
    if failures < p2p_store._START_ATTEMPTS:
        store = P2PStore(DeviceManager("cpu"), host=LOCAL)
        assert store.addr == f"{LOCAL}:1"
        expected = failures + 1
    else:
        with pytest.raises(RuntimeError, match=r"does not start at 127.0.0.1 .*'tcp'.*code -1"):
            P2PStore(DeviceManager("cpu"), host=LOCAL)
        expected = failures
    assert len(made) == expected
    assert not any(alive)


def test_mooncake_is_reached_at_its_own_address_alone(store: P2PStore) -> None:
    """It listens on every interface, and lets anybody write into registered memory."""
    ports = {one.getsockname()[1] for _, one in open_listeners()} & set(p2p_store._PORTS)
    assert store._port in ports
    assert len(ports) >= 2  # for what is where, and for the bytes
    for port in ports:
        socket.create_connection((LOCAL, port), 5).close()
        with pytest.raises(TimeoutError):  # dropped, not refused
            socket.create_connection(("127.0.0.2", port), 0.3)


def test_a_listener_of_the_program_itself_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_DEVICE", "cpu")
    initialize, made = p2p_store._import_engine().initialize, []

    def listen_and_initialize(*arguments: Any) -> Any:
        made.append(socket.create_server(("", 0)))
        return initialize(*arguments)

    monkeypatch.setattr(p2p_store._import_engine(), "initialize", listen_and_initialize)
    store = P2PStore(host=LOCAL)
    with made[0] as listener:
        socket.create_connection(("127.0.0.2", listener.getsockname()[1]), 5).close()
    store.close()


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
def test_ipv6(tmp_path: Path) -> None:
    """In a process of its own: Mooncake decides when it is loaded, which it is here already."""
    script = tmp_path / "read.py"
    script.write_text(READ_OVER_IPV6)
    Forked(tmp_path, [str(script)], [{"PS_DEVICE": "cpu"}]).join(40)


READ_OVER_IPV6 = """
import torch
from checkpoint_engine.p2p_store import P2PStore
owner, reader = P2PStore(host="::1"), P2PStore(host="::1")
memory, target = torch.arange(4096), torch.zeros(4096, dtype=torch.int64)
owner.register_named_tensors({"memory": memory})
assert owner.addr.startswith("[::1]:"), owner.addr
reader.batch_transfer_sync_read(
    owner.addr, [target.data_ptr()], [memory.data_ptr()], [memory.nbytes]
)
assert torch.equal(target, memory)
reader.close()
owner.close()
"""
