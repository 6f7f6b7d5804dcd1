"""Shared buffers and socket addresses: private to this user, and never left behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import multiprocessing
import os
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import zmq

from checkpoint_engine.device_utils import DeviceManager
from checkpoint_engine.errors import WireError
from checkpoint_engine.ground.deadline import Deadline
from checkpoint_engine.handover import ipc, link
from checkpoint_engine.handover.ipc import SharedBuffer, map_shared_memory, open_buffer
from checkpoint_engine.handover.link import ServerLink, WorkerLink, open_context
from checkpoint_engine.handover.wire import ACK

SHM = Path("/dev/shm")
MINE = f"checkpoint-engine-{os.getuid()}-"
SOON = 4.0


# ---------------------------------------------------------------------- shared buffers


@pytest.fixture
def buffer() -> Iterator[SharedBuffer]:
    with SharedBuffer(DeviceManager("cpu"), 0, 1 << 20) as shared:
        yield shared


def path_of(buffer: SharedBuffer) -> Path:
    return Path(buffer.handle()[1][0])


def mappings_of(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def test_both_ends_see_the_same_bytes(buffer: SharedBuffer) -> None:
    rebuild, args = buffer.handle()
    opened = open_buffer(rebuild, args, None)
    assert (opened.dtype, opened.shape) == (torch.uint8, torch.Size([1 << 20]))
    assert not opened.any()
    buffer.tensor[-3:] = 7
    assert opened[-4:].tolist() == [0, 7, 7, 7]
    assert opened.data_ptr() != buffer.tensor.data_ptr()


def test_a_device_number_changes_nothing_for_shared_memory(buffer: SharedBuffer) -> None:
    assert open_buffer(*buffer.handle(), 3).nbytes == 1 << 20


def test_a_segment_is_private_and_has_its_memory(buffer: SharedBuffer) -> None:
    path = path_of(buffer)
    found = path.lstat()
    assert path.parent == SHM
    assert path.name.startswith(MINE)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_blocks * 512 >= 1 << 20  # not a SIGBUS once it is written


def test_closing_removes_it_and_the_worker_keeps_what_it_mapped(buffer: SharedBuffer) -> None:
    path = path_of(buffer)
    opened = open_buffer(*buffer.handle(), None)
    buffer.tensor.fill_(3)
    buffer.close()
    buffer.close()
    assert not path.exists()
    assert buffer.tensor.nbytes == 0
    assert opened.min() == 3
    assert mappings_of(path) == 1
    del opened
    gc.collect()
    assert mappings_of(path) == 0


def test_leaving_by_an_exception_removes_it() -> None:
    paths = []

    def fail_with_a_buffer() -> None:
        with SharedBuffer(DeviceManager("cpu"), 0, 512) as shared:
            paths.append(path_of(shared))
            assert paths[0].exists()
            raise KeyError

    with pytest.raises(KeyError):
        fail_with_a_buffer()
    assert not paths[0].exists()


def test_an_abandoned_segment_is_removed_and_a_live_one_is_not(buffer: SharedBuffer) -> None:
    """A server that was killed leaves a segment without a lock."""
    abandoned = SHM / f"{MINE}abandoned-{os.getpid()}"
    abandoned.write_bytes(b"x")
    with SharedBuffer(DeviceManager("cpu"), 0, 512):
        assert not abandoned.exists()
        assert path_of(buffer).exists()


def test_other_peoples_files_are_left_alone(buffer: SharedBuffer) -> None:
    others = SHM / f"checkpoint-engine-{os.getuid() + 1}-abc{os.getpid()}"
    others.write_bytes(b"x")
    try:
        SharedBuffer(DeviceManager("cpu"), 0, 512).close()
        assert others.exists()
    finally:
        others.unlink()


def test_a_segment_taken_for_abandoned_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another server may remove it between its creation and its lock."""
    taken = []

    def lock_too_late(fd: int, operation: int) -> None:
        if not taken and operation == fcntl.LOCK_EX:
            taken.append(os.readlink(f"/proc/self/fd/{fd}"))
            os.unlink(taken[0])
        lock(fd, operation)

    lock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lock_too_late)
    with SharedBuffer(DeviceManager("cpu"), 0, 512) as shared:
        assert str(path_of(shared)) != taken[0]
        assert path_of(shared).exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM])
def test_no_room_says_what_to_do_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refused = []

    def refuse(fd: int, offset: int, nbytes: int) -> None:
        refused.append(Path(os.readlink(f"/proc/self/fd/{fd}")))
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(
        RuntimeError, match=r"has no room for a buffer of 4096 bytes.*PS_MAX_BUCKET"
    ):
        SharedBuffer(DeviceManager("cpu"), 0, 4096)
    assert refused[0].parent == SHM
    assert not refused[0].exists()


def test_no_descriptor_stays_open(buffer: SharedBuffer) -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = opened()
    for _ in range(5):
        with SharedBuffer(DeviceManager("cpu"), 0, 4096) as shared:
            open_buffer(*shared.handle(), None)
    gc.collect()
    assert opened() == before


# ---------------------------------------------------------------------- what a worker opens


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/dev/shm/other",
        "/dev/shm/../../etc/passwd",
        "/dev/shm/checkpoint-engine-0/../x",
        "/dev/shm/checkpoint-engine-x/y",
        "checkpoint-engine-0-x",
        "",
    ],
)
def test_other_paths_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="is not a shared buffer of checkpoint-engine"):
        map_shared_memory(path, 1)


def test_a_short_file_is_refused(buffer: SharedBuffer) -> None:
    with pytest.raises(ValueError, match=f"shorter than the {(1 << 20) + 1} bytes"):
        map_shared_memory(str(path_of(buffer)), (1 << 20) + 1)


def test_a_link_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(bytes(4096))
    path = SHM / f"{MINE}link-{os.getpid()}"
    path.symlink_to(target)
    try:
        with pytest.raises(OSError, match=str(path)) as caught:
            map_shared_memory(str(path), 4096)
        assert caught.value.errno == errno.ELOOP
    finally:
        path.unlink()


def test_a_segment_that_is_gone(buffer: SharedBuffer) -> None:
    path = path_of(buffer)
    buffer.close()
    with pytest.raises(FileNotFoundError):
        map_shared_memory(str(path), 1)


def test_the_worker_opens_on_its_own_device() -> None:
    """The exporter's device number stands at place 6 of a CUDA handle."""
    seen: list[tuple[Any, ...]] = []

    def rebuild(*args: Any) -> torch.Tensor:
        seen.append(args)
        return torch.zeros(8, dtype=torch.uint8)

    args = tuple(range(15))
    open_buffer(rebuild, args, 4)
    open_buffer(rebuild, args, None)
    assert seen == [(*args[:6], 4, *args[7:]), args]
    current = SimpleNamespace(
        is_accelerator=True, device_module=SimpleNamespace(current_device=lambda: 3)
    )
    with mock.patch.object(ipc, "DeviceManager", return_value=current):
        open_buffer(rebuild, args, None)
    assert seen[-1] == (*args[:6], 3, *args[7:])


@pytest.mark.parametrize(
    "made", [torch.zeros(8), torch.zeros(2, 4, dtype=torch.uint8)], ids=["float", "two dimensions"]
)
def test_what_is_no_flat_buffer_is_refused(made: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected a flat uint8 buffer"):
        open_buffer(lambda: made, (), None)


# ---------------------------------------------------------------------- readers of device memory


@pytest.fixture
def counts() -> tuple[bytes, torch.Tensor]:
    """A file that torch shares between processes, as that with its counts of readers."""
    storage = torch.UntypedStorage._new_using_filename_cpu(64)
    _, file, _ = storage._share_filename_cpu_()
    numbers = torch.tensor([], dtype=torch.int64).set_(storage)  # type: ignore[call-overload]
    return file, numbers.zero_()


def test_a_count_of_readers_is_where_torch_has_it(counts: tuple[bytes, torch.Tensor]) -> None:
    file, numbers = counts
    numbers[3] = 1
    (count,) = ipc.readers_of(file, 3)
    numbers[3] -= 1
    assert count.tolist() == [0]
    count[0] = 5
    assert numbers.tolist() == [0, 0, 0, 5, 0, 0, 0, 0]


@pytest.mark.parametrize("place", [2, 3, 1 << 20])
def test_what_is_no_count_of_one_reader_is_left_alone(
    counts: tuple[bytes, torch.Tensor], place: int
) -> None:
    file, numbers = counts
    numbers[3] = 2
    assert ipc.readers_of(file, place) == []
    assert ipc.readers_of(b"/torch_that_is_gone", 0) == []


def closed_with(counts: list[int], **options: bool) -> tuple[list[int], float]:
    """What a buffer leaves of its readers' counts, and the seconds that it took."""
    shared = SharedBuffer(DeviceManager("cpu"), 0, 4096)
    found = np.array(counts)
    shared._counts = list(found.reshape(-1, 1))
    began = time.monotonic()
    shared.close(**options)
    return found.tolist(), time.monotonic() - began


def test_no_count_is_left_below_nothing_or_above() -> None:
    """A reader that has closed a handle has counted it down itself; others never will."""
    assert closed_with([0, 1], have_all_left=True)[0] == [0, 0]


def test_a_buffer_of_a_failed_update_waits_for_readers_a_moment() -> None:
    left, seconds = closed_with([0, 1])
    assert left == [0, 0]
    assert seconds >= ipc._CLOSED_WITHIN
    assert closed_with([0, 0])[1] < ipc._CLOSED_WITHIN


def read_and(end: str, handles: Any, said: Any) -> None:
    """A worker that has mapped device memory and closes it, is killed, or keeps it a while."""
    opened = [open_buffer(*handle, 0) for handle in handles]
    assert all(one[:8].tolist() == [7] * 8 for one in opened)
    if end == "killed":
        said.put("open")
        time.sleep(60)
    if end == "kept":
        said.put("open")
        time.sleep(2)
        assert all(one[-8:].tolist() == [7] * 8 for one in opened)
    opened.clear()
    DeviceManager().release_cached_memory()
    said.put("closed")
    time.sleep(60)


@pytest.mark.gpu
@pytest.mark.parametrize("end", ["closed", "killed", "kept"])
def test_device_memory_comes_back_whatever_readers_did(end: str) -> None:
    """Of two handles one is never opened."""
    torch.zeros(1, device="cuda")
    processes = multiprocessing.get_context("spawn")
    said = processes.Queue()
    nbytes = 256 << 20
    free = []
    for _ in range(3):
        shared = SharedBuffer(DeviceManager(), 0, nbytes)
        shared.tensor.fill_(7)
        torch.cuda.synchronize()
        handles = [shared.handle(), shared.handle()]
        reader = processes.Process(target=read_and, args=(end, handles[:1], said), daemon=True)
        reader.start()
        try:
            assert said.get(timeout=60) == ("closed" if end == "closed" else "open")
            if end == "killed":
                reader.kill()
                reader.join()
            shared.close(have_all_left=end == "closed")
            if end == "kept":
                assert said.get(timeout=60) == "closed"
        finally:
            reader.kill()
            reader.join()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[0] - free[-1] < nbytes // 4


# ---------------------------------------------------------------------- addresses


@pytest.fixture
def no_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The default folder, below a runtime folder whose path is short: sockets have 107 bytes."""
    for variable in ("PS_IPC_DIR", "PS_IPC_ABSTRACT"):
        monkeypatch.delenv(variable, raising=False)
    with tempfile.TemporaryDirectory() as runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        yield Path(runtime) / f"checkpoint-engine-{os.getuid()}"


def new_address() -> str:
    """One that nobody uses."""
    with open_context() as context, contextlib.closing(WorkerLink(context)) as server:
        return server.url


def folder_of(address: str) -> Path:
    assert address.startswith("ipc:///")
    assert len(address.removeprefix("ipc://").encode()) <= 107
    return Path(address.removeprefix("ipc://")).parent


def test_addresses_are_never_the_same(no_choice: Path) -> None:
    addresses = {new_address() for _ in range(100)}
    assert len(addresses) == 100
    assert {folder_of(address) for address in addresses} == {no_choice}


def test_the_default_folder_is_private(no_choice: Path) -> None:
    umask = os.umask(0)
    try:
        new_address()
    finally:
        os.umask(umask)
    assert stat.S_IMODE(no_choice.stat().st_mode) == 0o700


def test_without_a_runtime_folder_it_is_below_the_temporary_one(
    no_choice: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(no_choice.parent)
    monkeypatch.setattr("tempfile.tempdir", os.environ["XDG_RUNTIME_DIR"])
    for text in (None, "", "/nonexistent/run/user/0"):
        if text is None:
            monkeypatch.delenv("XDG_RUNTIME_DIR")
        else:
            monkeypatch.setenv("XDG_RUNTIME_DIR", text)
        assert folder_of(new_address()) == no_choice


def test_a_chosen_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PS_IPC_DIR", str(tmp_path / "a" / "b"))
    assert folder_of(new_address()) == tmp_path / "a" / "b"
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o702])
def test_a_chosen_folder_that_others_may_write_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: int
) -> None:
    """They could put a socket of theirs in the place of ours."""
    folder = tmp_path / "sockets"
    folder.mkdir()
    monkeypatch.setenv("PS_IPC_DIR", str(folder))
    folder.chmod(mode)
    with pytest.raises(RuntimeError, match=rf"PS_IPC_DIR.*other users may write.*{mode:04o}"):
        new_address()
    folder.chmod(mode | stat.S_ISVTX)  # as /tmp: nobody can touch what is not theirs
    assert folder_of(new_address()) == folder


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder to another group")
def test_a_group_of_this_user_alone_may_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where every user has a group of their own, folders are made so."""
    folder = tmp_path / "sockets"
    folder.mkdir()
    folder.chmod(0o770)
    monkeypatch.setenv("PS_IPC_DIR", str(folder))
    assert folder_of(new_address()) == folder
    os.chown(folder, -1, 4321)
    with pytest.raises(RuntimeError, match=r"PS_IPC_DIR.*other users may write"):
        new_address()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder to another user")
def test_a_chosen_folder_of_another_user_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, link = tmp_path / "sockets", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    os.chown(link, 65534, 65534, follow_symlinks=False)
    for chosen in (link, folder):
        monkeypatch.setenv("PS_IPC_DIR", str(chosen))
        with pytest.raises(RuntimeError, match="belongs to user 65534"):
            new_address()
        os.chown(folder, 65534, 65534)
    monkeypatch.setenv("PS_IPC_UIDS", "65534")
    assert folder_of(new_address()) == folder


def test_a_relative_folder_is_made_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The worker may run in another folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PS_IPC_DIR", "sockets")
    assert folder_of(new_address()) == tmp_path / "sockets"


def test_a_path_that_is_too_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PS_IPC_DIR", str(tmp_path / ("x" * 100)))
    with pytest.raises(RuntimeError, match=r"longer than 107 bytes: set PS_IPC_DIR.*ABSTRACT"):
        new_address()


def test_the_abstract_namespace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PS_IPC_DIR", str(tmp_path / "unused"))
    monkeypatch.setenv("PS_IPC_ABSTRACT", "1")
    first, second = new_address(), exchange_once()
    assert first != second
    assert second.startswith("ipc://@")
    assert not (tmp_path / "unused").exists()


def test_a_folder_that_others_may_enter_is_refused(no_choice: Path) -> None:
    no_choice.mkdir()
    no_choice.chmod(0o755)
    with pytest.raises(RuntimeError, match=f"{no_choice} must be a folder that only user"):
        new_address()


def test_a_folder_of_somebody_else_is_refused(
    no_choice: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    with pytest.raises(RuntimeError, match=f"only user {os.geteuid() + 1} can enter"):
        new_address()


def test_a_link_to_a_folder_is_refused(no_choice: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir(mode=0o700)
    no_choice.symlink_to(tmp_path / "target")
    with pytest.raises(RuntimeError, match="must be a folder that only user"):
        new_address()


def test_what_a_killed_server_left_is_removed_and_nothing_else(no_choice: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            WorkerLink(zmq.Context())
        finally:
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert {path.suffix for path in no_choice.iterdir()} == {".sock", ".lock"}
    next(no_choice.glob("*.sock")).with_suffix(".own").touch()  # release 0.5.0 had a second socket
    plain = no_choice / "ps-4567.sock.txt"
    plain.touch()
    with zmq.Context() as context:
        live = WorkerLink(context)
        try:
            new_address()
            name = Path(live.url).stem
            assert {path.name for path in no_choice.iterdir()} == {
                plain.name,
                f"{name}.sock",
                f"{name}.lock",
            }
        finally:
            live.close()


def test_an_address_that_nobody_listens_at_yet_is_kept(no_choice: Path) -> None:
    """Ranks come up together: one looks around while another is between bind and listen."""
    _, path, lock = link.new_address()
    assert path is not None
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        new_address()
        assert path.exists()
    os.close(lock)
    new_address()
    assert list(no_choice.iterdir()) == []


# ---------------------------------------------------------------------- links


def bounded() -> Callable[[], None]:
    deadline = Deadline(SOON)
    return lambda: deadline.check("the test")


def exchange_once() -> str:
    """Returns the address."""
    with open_context() as context:
        server = WorkerLink(context)
        worker = ServerLink(context, server.url, SOON)
        try:
            server.send(b"ping", bounded())
            assert worker.receive() == b"ping"
            worker.reply(b"pong")
            assert server.receive(bounded()) == b"pong"
            return server.url
        finally:
            worker.close()
            server.close()


Pair = tuple[WorkerLink, ServerLink]


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Pair]:
    monkeypatch.setenv("PS_IPC_DIR", str(tmp_path))
    with open_context() as context:
        server = WorkerLink(context)
        worker = ServerLink(context, server.url, SOON)
        try:
            yield server, worker
        finally:
            for end in (worker, server):
                with contextlib.suppress(zmq.ZMQError):  # a test may have closed it
                    end.close()
    assert list(tmp_path.iterdir()) == []


def test_messages_and_replies(pair: Pair) -> None:
    server, worker = pair
    for message in (b"", b"x", bytes(3 << 20)):
        server.send(message, bounded())
        assert worker.receive() == message
        worker.reply()
        assert server.receive(bounded()) == ACK
    server.send(b"x", bounded())
    worker.receive()
    worker.reply(b"failed: \xff")
    assert server.receive(bounded()).startswith(b"failed: ")


def test_another_server_that_starts_beside_disturbs_nobody(pair: Pair) -> None:
    """It looks whether the sockets in the folder are in use."""
    server, worker = pair
    server.send(b"first", bounded())
    worker.receive()
    worker.reply()
    assert server.receive(bounded()) == ACK
    server.send(b"second", bounded())
    assert worker.receive() == b"second"
    new_address()
    looks = iter(range(6))

    def check() -> None:
        if next(looks, None) is None:
            raise InterruptedError

    with pytest.raises(InterruptedError):  # and not that the worker is gone
        server.receive(check)
    worker.reply()
    assert server.receive(bounded()) == ACK


def test_a_worker_that_leaves_is_noticed_at_once(pair: Pair) -> None:
    server, worker = pair
    server.send(b"x", bounded())
    worker.receive()
    worker.close()
    with pytest.raises(WireError, match="the inference worker closed its connection"):
        server.receive(bounded())


def test_a_reply_of_a_worker_that_left_is_still_read(pair: Pair) -> None:
    server, worker = pair
    server.send(b"x", bounded())
    worker.receive()
    worker.reply()
    worker.close()
    assert server.receive(bounded()) == ACK


def test_a_server_that_leaves_is_noticed_at_once(pair: Pair) -> None:
    server, worker = pair
    server.send(b"x", bounded())
    worker.receive()
    worker.reply()
    assert server.receive(bounded()) == ACK
    server.close()
    with pytest.raises(WireError, match="the parameter server closed"):
        worker.receive()


def test_an_abort_overtakes_no_message_and_needs_no_reply(pair: Pair) -> None:
    server, worker = pair
    server.send(b"x", bounded())
    assert worker.receive() == b"x"
    server.abort("another rank failed")
    worker.reply()
    assert b"another rank failed" in worker.receive()


@pytest.fixture
def talker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[WorkerLink, Any]]:
    """A server, and a socket that replies whenever it wants to."""
    monkeypatch.setenv("PS_IPC_DIR", str(tmp_path))
    with open_context() as context, contextlib.closing(WorkerLink(context)) as server:
        socket = context.socket(zmq.DEALER)
        socket.connect(server.url)
        yield server, socket
        socket.close()


def test_a_reply_before_its_message_is_an_error(talker: tuple[WorkerLink, Any]) -> None:
    server, worker = talker
    worker.send_multipart([b"", ACK])
    while not server._socket.poll(0, zmq.POLLIN):
        server._wait(zmq.POLLIN)
    with pytest.raises(WireError, match="replied to a message before it was sent"):
        server.send(b"handle", bounded())
    assert not worker.poll(0)


def test_surplus_replies_are_an_error(talker: tuple[WorkerLink, Any]) -> None:
    server, worker = talker
    server.send(b"handle", bounded())
    for _ in range(51):
        worker.send_multipart([b"", ACK])

    def receive_one() -> None:
        server.receive(bounded())
        check = bounded()
        while True:  # the surplus may arrive after the reply was taken
            server.check()
            check()

    with pytest.raises(WireError, match="replied to a message before it was sent"):
        receive_one()
    with pytest.raises(WireError, match="replied to a message before it was sent"):
        server.send(b"bucket", bounded())
    server.abort("the worker does not keep to the protocol")
    assert b"does not keep to the protocol" in [worker.recv_multipart() for _ in "ab"][1][1]


def test_a_peer_that_sends_more_than_a_message_may_have_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PS_IPC_DIR", str(tmp_path))
    monkeypatch.setattr(link, "_MAX_REPLY", 1000)
    with (
        open_context() as context,
        contextlib.closing(WorkerLink(context)) as server,
        contextlib.closing(ServerLink(context, server.url, SOON)) as worker,
    ):
        server.send(b"handle", bounded())
        worker.receive()
        worker.reply(bytes(1001))
        with pytest.raises(WireError, match="closed its connection"):
            server.receive(bounded())


def test_a_wait_ends_when_its_check_raises(pair: Pair) -> None:
    server, _ = pair

    def stop() -> None:
        raise KeyError("another rank failed")

    with pytest.raises(KeyError):
        server.receive(stop)


def test_a_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PS_IPC_DIR", str(tmp_path))
    with open_context() as context:
        server = WorkerLink(context)
        worker = ServerLink(context, server.url, 0.2)
        with pytest.raises(TimeoutError, match=r"gave up after 0\.2 s"):
            worker.receive()
        worker.close()
        server.close()


def test_nobody_at_the_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(link, "_CONNECT_SECONDS", 0.2)
    with open_context() as context:
        worker = ServerLink(context, f"ipc://{tmp_path}/nobody", SOON)
        with pytest.raises(WireError, match="no parameter server answers at ipc://"):
            worker.receive()
        worker.close()


@pytest.mark.parametrize("address", ["", "nonsense", "ipc://" + "x" * 200])
def test_what_is_no_address(address: str) -> None:
    with open_context() as context, pytest.raises(WireError, match="cannot connect"):
        ServerLink(context, address, SOON)


def test_without_a_socket_the_address_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PS_IPC_DIR", str(tmp_path))
    monkeypatch.setattr(link, "_new_socket", lambda *_: 1 / 0)
    before = len(os.listdir("/proc/self/fd"))
    with open_context() as context, pytest.raises(ZeroDivisionError):
        WorkerLink(context)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_address_that_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PS_IPC_DIR", str(tmp_path))
    url, path, lock = link.new_address()
    assert path is not None
    path.touch()
    below = f"{url}/below-a-file.sock"
    monkeypatch.setattr(link, "new_address", lambda: (below, path, lock))
    with open_context() as context, pytest.raises(RuntimeError, match="cannot listen at"):
        WorkerLink(context)
    assert list(tmp_path.iterdir()) == []  # it gives up the address, too
