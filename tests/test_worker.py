"""Each end of the wire against another end that was written from the wire's description alone."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import sys
import traceback
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zmq

from checkpoint_engine import ps
from checkpoint_engine.device_utils import DeviceManager
from checkpoint_engine.errors import EngineError, UpdateError, WireError
from checkpoint_engine.ground.checksum import FORMULA, checksum
from checkpoint_engine.ground.deadline import Deadline, poll
from checkpoint_engine.handover import link
from checkpoint_engine.handover.ipc import SharedBuffer, map_shared_memory
from checkpoint_engine.handover.wire import (
    CHECKSUM,
    DELIVERED,
    NOTHING_MORE,
    PART,
    SOURCE,
    decode_acceptance,
    encode_extensions,
    encode_handle,
)
from checkpoint_engine.loading.loaded import LoadedBuckets, digest
from checkpoint_engine.loading.receive import extract_weights
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.replay import replayed
from checkpoint_engine.update.session import WorkerSession
from checkpoint_engine.update.ways.base import Move
from checkpoint_engine.update.ways.broadcast import Broadcast
from checkpoint_engine.worker import VllmColocateWorkerExtension, update_weights_from_ipc
from fleet import digests, left_segments, mixed_tensors

SOON = 4.0  # seconds
HALF = 4096  # bytes of a bucket

Weights = dict[str, torch.Tensor]


# ---------------------------------------------------------------------- senders of our worker


class Sender:
    """Another program's sender: REQ, bound, one message and one reply after the other."""

    def __init__(self, context: zmq.Context, address: str, buffer: SharedBuffer) -> None:
        self.address = address
        self.buffer = buffer
        self._socket = context.socket(zmq.REQ)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, int(1000 * SOON))
        self._socket.bind(address)

    def say(self, content: Any) -> bytes:
        self.post(content)
        return self._socket.recv()

    def post(self, content: Any) -> None:
        self._socket.send(content if isinstance(content, bytes) else pickle.dumps(content))

    def hand_over(self) -> None:
        assert self.say(self.buffer.handle()) == b""

    def bucket(self, weights: Weights, slot: int = 0) -> list[dict[str, Any]]:
        entries, offset = [], slot * HALF
        for name, tensor in weights.items():
            flat = tensor.contiguous().view(-1).view(torch.uint8)
            self.buffer.tensor[offset : offset + flat.numel()] = flat
            entries.append(
                {"name": name, "dtype": tensor.dtype, "shape": tensor.shape, "offset": offset}
            )
            offset += -(-flat.numel() // 256) * 256
        return entries

    def says_nothing(self) -> bool:
        return not self._socket.poll(100)

    def leave(self) -> None:
        self._socket.close()


class Engine:
    """What an inference engine gives to our worker."""

    def __init__(self) -> None:
        self.weights: Weights = {}
        self.hooks = 0
        self.error: BaseException | None = None
        self.hook_error: BaseException | None = None

    def run(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        if self.error is not None:
            raise self.error
        self.weights |= {name: tensor.clone() for name, tensor in weights}

    def post_hook(self) -> None:
        self.hooks += 1
        if self.hook_error is not None:
            raise self.hook_error


@pytest.fixture
def sender(tmp_path: Path) -> Iterator[Sender]:
    with zmq.Context() as context, SharedBuffer(DeviceManager("cpu"), 0, 2 * HALF) as buffer:
        made = Sender(context, f"ipc://{tmp_path}/s", buffer)
        try:
            yield made
        finally:
            made.leave()


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadPoolExecutor]:
    monkeypatch.setattr("checkpoint_engine.loading.receive.SERVER_TIMEOUT", 2 * SOON)
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def update(pool: ThreadPoolExecutor, sender: Sender, engine: Engine) -> Future[None]:
    return pool.submit(receive, sender.address, engine)


def receive(address: str, engine: Engine) -> None:
    with zmq.Context() as context:
        update_weights_from_ipc(
            context,
            address,
            device_id=None,
            run=lambda weights: engine.run(weights),
            post_hook=engine.post_hook,
        )


BUCKETS = [
    {"a": torch.arange(60, dtype=torch.float32).view(3, 4, 5), "scalar": torch.tensor(2.5)},
    {"none": torch.zeros(0, 7, dtype=torch.bfloat16), "b": torch.ones(33, dtype=torch.int8)},
    {"c": torch.full((5,), 7, dtype=torch.int64)},
]


def stream(sender: Sender) -> None:
    sender.hand_over()
    for i, bucket in enumerate(BUCKETS):
        assert sender.say(sender.bucket(bucket, i % 2)) == b""


def all_weights() -> dict[str, str]:
    return digests({name: tensor for bucket in BUCKETS for name, tensor in bucket.items()})


def test_a_sender_of_release_0_4(sender: Sender, engine: Engine, update: Future[None]) -> None:
    stream(sender)
    assert sender.say(None) == b""
    assert engine.hooks == 0
    assert sender.say(None) == b""
    assert engine.hooks == 1
    assert update.result(SOON) is None
    assert digests(engine.weights) == all_weights()


def test_all_is_done_on_the_device_of_the_buffer(
    sender: Sender, engine: Engine, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An accelerator's waits go by the thread's current device, which may be another one."""
    current: list[torch.device] = []
    seen: list[list[torch.device]] = []

    @contextlib.contextmanager
    def at(_: DeviceManager, device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.clear()

    def look(*_: Any) -> None:
        seen.append([*current])

    monkeypatch.setattr(DeviceManager, "at", at)
    monkeypatch.setattr(DeviceManager, "synchronize", look)
    monkeypatch.setattr(engine, "run", look)
    monkeypatch.setattr(engine, "post_hook", look)
    update = pool.submit(receive, sender.address, engine)
    stream(sender)
    assert (sender.say(None), sender.say(None)) == (b"", b"")
    assert update.result(SOON) is None
    assert seen == [[torch.device("cpu")]] * len(seen)
    assert len(seen) > 2 * len(BUCKETS)
    assert current == []


def test_an_address_of_the_original_is_used_again(
    sender: Sender, engine: Engine, pool: ThreadPoolExecutor
) -> None:
    """Its servers count their updates, and begin anew when they are restarted."""
    with zmq.Context() as context:
        for number in (1, 2):
            update = pool.submit(receive, sender.address, engine)
            stream(sender)
            assert [sender.say(None), sender.say(None)] == [b"", b""]
            update.result(SOON)
            assert engine.hooks == number
            sender.leave()
            sender = Sender(context, sender.address, sender.buffer)
        sender.leave()


def test_a_sender_of_release_0_2(sender: Sender, engine: Engine, update: Future[None]) -> None:
    """It says ``None`` once and leaves."""
    stream(sender)
    assert sender.say(None) == b""
    sender.leave()
    assert update.result(SOON) is None
    assert engine.hooks == 1
    assert digests(engine.weights) == all_weights()


def test_no_buckets_and_no_post_hook(sender: Sender, pool: ThreadPoolExecutor) -> None:
    def without_hook() -> None:
        with zmq.Context() as context:
            update_weights_from_ipc(context, sender.address, None, run=print)

    update = pool.submit(without_hook)
    sender.hand_over()
    assert [sender.say([]), sender.say(None), sender.say(None)] == [b"", b"", b""]
    assert update.result(SOON) is None


def test_the_handle_of_a_sender_that_adds_to_it(
    sender: Sender, engine: Engine, update: Future[None]
) -> None:
    assert sender.say(pickle.dumps(sender.buffer.handle()) + b"\0 more") == b""
    assert [sender.say(None), sender.say(None)] == [b"", b""]
    assert update.result(SOON) is None
    assert engine.hooks == 1


def load_one(name: str, tensor: torch.Tensor) -> None:
    raise KeyError(name)


def load_badly(weights: list[tuple[str, torch.Tensor]]) -> None:
    """Its errors lead to frames that hold views of the buffer."""
    for name, tensor in weights:
        try:
            load_one(name, tensor)
        except KeyError as error:
            raise ValueError(f"no parameter for {name}") from error


@pytest.mark.parametrize("failing", [False, True])
def test_the_buffer_is_gone_before_the_first_none_is_answered(
    sender: Sender, engine: Engine, update: Future[None], failing: bool
) -> None:
    path = sender.buffer.handle()[1][0]

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(path)

    if failing:
        engine.run = load_badly  # type: ignore[method-assign]
    sender.hand_over()
    assert mappings() == 2
    sender.say(sender.bucket(BUCKETS[0]))
    sender.say(None)
    assert mappings() == 1
    sender.say(None)
    assert isinstance(update.exception(SOON), ValueError) == failing


def test_a_failed_load_is_answered_and_the_worker_goes_on(
    sender: Sender, engine: Engine, update: Future[None]
) -> None:
    sender.hand_over()
    assert sender.say(sender.bucket(BUCKETS[0])) == b""
    engine.error = ValueError("no parameter b")
    reply = sender.say(sender.bucket(BUCKETS[1])).decode()
    assert "Traceback" in reply
    assert "ValueError: no parameter b" in reply
    assert "in run" in reply
    engine.error = None
    assert sender.say(sender.bucket(BUCKETS[2])) != b""  # the update has failed, whatever follows
    sender.post(RuntimeError("another worker failed too"))
    with pytest.raises(RuntimeError, match="another worker failed too") as caught:
        update.result(SOON)
    assert isinstance(caught.value.__cause__, ValueError)
    assert engine.hooks == 0


@pytest.mark.parametrize("release", ["0.2", "0.4"])
def test_a_sender_that_ignores_a_failure(
    sender: Sender, engine: Engine, update: Future[None], release: str
) -> None:
    """As the original does with the reply to its last bucket: the worker itself still fails."""
    sender.hand_over()
    engine.error = ValueError("no parameter b")
    sender.say(sender.bucket(BUCKETS[1]))
    sender.say(None)
    if release == "0.4":
        assert sender.say(None) != b""
    else:
        sender.leave()
    with pytest.raises(ValueError, match="no parameter b"):
        update.result(SOON)
    assert engine.hooks == 0


@pytest.mark.parametrize("release", ["0.2", "0.4"])
def test_a_failed_post_hook(
    sender: Sender, engine: Engine, update: Future[None], release: str
) -> None:
    engine.hook_error = ValueError("cannot repack")
    stream(sender)
    assert sender.say(None) == b""
    if release == "0.4":
        assert "ValueError: cannot repack" in sender.say(None).decode()
    else:
        sender.leave()
    with pytest.raises(ValueError, match="cannot repack"):
        update.result(SOON)
    assert engine.hooks == 1


@pytest.mark.parametrize("buckets", [0, 1])
def test_an_abort_is_raised_and_gets_no_reply(
    sender: Sender, engine: Engine, update: Future[None], buckets: int
) -> None:
    sender.hand_over()
    for bucket in BUCKETS[:buckets]:
        sender.say(sender.bucket(bucket))
    sender.post(KeyError("rank 3 failed"))
    with pytest.raises(KeyError, match="rank 3 failed"):
        update.result(SOON)
    assert sender.says_nothing()
    assert engine.hooks == 0


def test_an_abort_instead_of_a_handle(sender: Sender, update: Future[None]) -> None:
    sender.post(RuntimeError("rank 3 failed"))
    with pytest.raises(RuntimeError, match="rank 3 failed"):
        update.result(SOON)
    assert sender.says_nothing()


def test_an_abort_between_the_two_nones(
    sender: Sender, engine: Engine, update: Future[None]
) -> None:
    stream(sender)
    assert sender.say(None) == b""
    sender.post(RuntimeError("rank 3 failed"))
    with pytest.raises(RuntimeError, match="rank 3 failed"):
        update.result(SOON)
    assert engine.hooks == 0


def test_what_the_worker_says_comes_before_what_else_failed() -> None:
    """A neighbour that hangs up may have failed of the same cause: the traceback says which."""
    said = b"Traceback: out of memory"
    link = SimpleNamespace(has_reply=lambda: True, receive=lambda _: said, check=lambda: None)
    call = SimpleNamespace(check=lambda: None)
    session = WorkerSession(link, call, "step-1")  # type: ignore[arg-type]

    def neighbour_is_gone() -> None:
        raise RuntimeError("rank 3 has left")

    with pytest.raises(EngineError, match="out of memory"):
        session.await_reload("bucket 1", neighbour_is_gone)


@pytest.mark.parametrize("stage", ["handle", "bucket", "end"])
def test_what_an_aborted_update_held_does_not_wait_for_the_collector(
    sender: Sender, pool: ThreadPoolExecutor, stage: str
) -> None:
    """The error's traceback leads to the loader, which has the model."""
    gc.disable()
    try:
        engine = Engine()
        held = weakref.ref(engine)
        update = pool.submit(receive, sender.address, engine)
        if stage == "bucket":
            sender.hand_over()
            engine.error = ValueError("no parameter a")
            sender.say(sender.bucket(BUCKETS[0]))
        elif stage == "end":
            stream(sender)
            sender.say(None)
        sender.post(RuntimeError("rank 3 failed"))
        assert isinstance(update.exception(SOON), RuntimeError)
        del engine, update
        poll(lambda: held() is None, partial(Deadline(SOON).check, "the loader to be freed"))
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("handle", "error", "says"),
    [
        ((map_shared_memory, ("/etc/passwd", 1)), ValueError, "not a shared buffer"),
        ((map_shared_memory, ("/dev/shm/checkpoint-engine-gone", 1)), OSError, "No such file"),
        ((map_shared_memory, ()), TypeError, "argument"),
        ((os.system, ("true",)), WireError, r"system is not allowed in it"),
        ("nonsense", WireError, "expected the handle"),
        (b"nonsense", WireError, "cannot be read"),
    ],
)
def test_a_handle_that_cannot_be_opened(
    sender: Sender, update: Future[None], handle: Any, error: type[Exception], says: str
) -> None:
    reply = sender.say(handle).decode()
    assert "Traceback" in reply
    assert says in reply
    assert sender.says_nothing()
    assert not update.done()  # until it hears one thing more, whatever it is
    sender.post(b"anything")
    with pytest.raises(error, match=says):
        update.result(SOON)


def test_a_sender_that_leaves_after_a_bad_handle(sender: Sender, update: Future[None]) -> None:
    sender.say(b"nonsense")
    sender.leave()
    with pytest.raises(WireError, match="cannot be read"):
        update.result(SOON)


@pytest.mark.parametrize("buckets", [0, 1])
def test_a_sender_that_dies(
    sender: Sender, engine: Engine, update: Future[None], buckets: int
) -> None:
    sender.hand_over()
    for bucket in BUCKETS[:buckets]:
        sender.say(sender.bucket(bucket))
    sender.leave()
    with pytest.raises(WireError, match="the parameter server closed"):
        update.result(SOON)
    assert engine.hooks == 0


def test_a_sender_that_says_none_once_and_waits_for_the_engine(
    sender: Sender, engine: Engine, update: Future[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As release 0.2 does while its request is not answered."""
    monkeypatch.setattr("checkpoint_engine.loading.receive.PATIENCE_WITH_0_2", 0.2)
    sender.hand_over()
    assert sender.say(None) == b""
    update.result(SOON)
    assert engine.hooks == 1


ACCEPTED = {"version": 1, "checksum": FORMULA, "part": True, "delivered": True}


def test_a_server_of_ours_that_dies_between_the_nones_is_no_success(
    sender: Sender, engine: Engine, update: Future[None]
) -> None:
    """Ours always says it twice; it says so in the handle."""
    reply = sender.say(encode_handle(*sender.buffer.handle(), {"timeout": 5.0}))
    assert decode_acceptance(reply) == ACCEPTED
    assert sender.say(None) == b""
    sender.leave()
    with pytest.raises(WireError, match="the parameter server closed"):
        update.result(SOON)
    assert engine.hooks == 0


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        ([0, 1, 2], ""),
        ([2, 0, 1], ""),
        ([0, 2], r"bucket 2 of 3 was loaded 0 times, not 1$"),
        ([0, 1, 1, 2], r"bucket 2 of 3 was loaded 2 times, not 1$"),
        ([0, 1, 2, 3], r"1 buckets were loaded that were not planned$"),
        ([0, 3, 3], r"bucket 2 of 3 .* 0 times.*bucket 3 of 3 .* 0 times.*2 buckets were loaded"),
    ],
)
def test_what_was_loaded_is_what_the_server_planned(
    sender: Sender, engine: Engine, update: Future[None], sent: list[int], says: str
) -> None:
    weights = [*BUCKETS, {"strange": torch.ones(3)}]
    messages = [pickle.dumps(sender.bucket(bucket)) for bucket in weights]
    sender.say(encode_handle(*sender.buffer.handle(), {"timeout": 5.0}))
    for index in sent:
        assert sender.say(messages[index]) == b""
    planned = [digest(message) for message in messages[:3]]
    reply = sender.say(NOTHING_MORE + encode_extensions({DELIVERED: planned})).decode()
    assert bool(reply) == bool(says)
    sender.say(None)
    if not says:
        update.result(SOON)
        assert engine.hooks == 1
        return
    with pytest.raises(WireError, match=says):
        update.result(SOON)
    assert engine.hooks == 0


def test_an_update_that_ends_within_a_tensor_is_refused(
    sender: Sender, engine: Engine, update: Future[None]
) -> None:
    sender.say(encode_handle(*sender.buffer.handle(), {"timeout": 5.0}))
    whole = pickle.dumps(sender.bucket({"large": torch.ones(100)}))
    assert sender.say(whole + encode_extensions({PART: [0, 256, 0, 400, 0]})) == b""
    assert "ended before all of their parts came" in sender.say(None).decode()
    sender.say(None)
    with pytest.raises(WireError, match="ended before all of their parts came"):
        update.result(SOON)
    assert (engine.weights, engine.hooks) == ({}, 0)


def test_bytes_that_changed_on_their_way_reach_no_loader(
    sender: Sender, engine: Engine, update: Future[None]
) -> None:
    sender.say(encode_handle(*sender.buffer.handle(), {"timeout": 5.0}))
    message = pickle.dumps(sender.bucket({"w": torch.arange(64.0)}))
    sums = {CHECKSUM: [0, 256, 0, checksum(sender.buffer.tensor[:256], 0)]}
    assert sender.say(message + encode_extensions(sums)) == b""
    assert engine.weights.keys() == {"w"}
    sender.buffer.tensor[100] ^= 4
    assert "the bucket at 0" in sender.say(message + encode_extensions(sums)).decode()
    assert engine.weights["w"].tolist() == list(range(64))
    sender.say(None)
    sender.say(None)
    with pytest.raises(ValueError, match="the bucket at 0"):
        update.result(SOON)
    assert engine.hooks == 0


@pytest.mark.parametrize(
    "place",
    [[1, 0, 256], [-1, 0, 256], [0, 3 * HALF, 256], [0, 2 * HALF - 256, 512], [0, -256, 256]],
)
def test_a_bucket_lies_in_a_buffer(
    sender: Sender, engine: Engine, update: Future[None], place: list[int]
) -> None:
    sender.say(encode_handle(*sender.buffer.handle(), {"timeout": 5.0}))
    message = pickle.dumps(sender.bucket({"w": torch.ones(64)}))
    reply = sender.say(message + encode_extensions({SOURCE: place})).decode()
    assert f"no place of a bucket in 1 buffers: {place}" in reply
    sender.say(None)
    sender.say(None)
    with pytest.raises(WireError, match="no place of a bucket"):
        update.result(SOON)
    assert (engine.weights, engine.hooks) == ({}, 0)


@pytest.mark.parametrize("planned", [None, 3, {}, [[]], ["a", 2], "abc"])
def test_a_plan_that_is_none(sender: Sender, update: Future[None], planned: Any) -> None:
    sender.say(encode_handle(*sender.buffer.handle(), {"timeout": 5.0}))
    reply = sender.say(NOTHING_MORE + encode_extensions({DELIVERED: planned})).decode()
    assert "planned buckets are digests" in reply
    sender.say(None)
    with pytest.raises(WireError, match="planned buckets are digests"):
        update.result(SOON)


def test_a_server_that_stops_sending_is_given_up_at_its_own_deadline(
    sender: Sender, update: Future[None]
) -> None:
    reply = sender.say(encode_handle(*sender.buffer.handle(), {"timeout": 0.3}))
    assert decode_acceptance(reply) == ACCEPTED
    with pytest.raises(TimeoutError, match=r"gave up after 0\.3 s"):
        update.result(SOON)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shape": torch.Size([2 * HALF + 1])}, f"'w' ends at {2 * HALF + 1} of {2 * HALF} bytes"),
        ({"offset": 2 * HALF}, "ends at"),
        ({"offset": 1, "dtype": torch.float32, "shape": torch.Size([1])}, "between its elements"),
        ({"shape": torch.Size([1 << 40])}, "ends at"),
    ],
)
def test_a_tensor_that_cannot_be_in_the_buffer(
    sender: Sender, update: Future[None], changes: dict[str, Any], says: str
) -> None:
    entry = {"name": "w", "dtype": torch.uint8, "shape": torch.Size([1]), "offset": 0} | changes
    sender.hand_over()
    assert says in sender.say([entry]).decode()
    sender.post(RuntimeError("stop"))
    with pytest.raises(RuntimeError, match="stop"):
        update.result(SOON)


@pytest.mark.parametrize(
    "shape", [(), (1,), (0,), (3, 0), (0, 3), (5, 7), (2, 1, 3), (1, 1), (2, 0, 4, 3)]
)
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.complex128]
)
@pytest.mark.parametrize("begin", [0, 256])
def test_tensors_of_a_bucket_are_as_views_of_slices(
    shape: tuple[int, ...], dtype: torch.dtype, begin: int
) -> None:
    buffer = torch.randint(0, 2, (4096,), dtype=torch.uint8)[begin:]
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    entry = {"name": "w", "dtype": dtype, "shape": torch.Size(shape), "offset": 512}
    plain = buffer[512 : 512 + nbytes].view(dtype).view(shape)
    ((name, found),) = extract_weights([entry], buffer)  # type: ignore[list-item]
    assert (name, found.dtype, found.shape) == ("w", dtype, plain.shape)
    assert (found.stride(), found.storage_offset()) == (plain.stride(), plain.storage_offset())
    assert found.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    assert found.is_contiguous()
    for elsewhere in ({"offset": 512 + dtype.itemsize // 2}, {"offset": len(buffer)}):
        if dtype.itemsize > 1 and nbytes:
            with pytest.raises(ValueError, match="tensor 'w' "):
                extract_weights([entry | elsewhere], buffer)  # type: ignore[list-item]


@pytest.mark.parametrize("content", ["nonsense", b"nonsense", [{"name": 1}], (1, 2)])
def test_a_message_that_is_none(sender: Sender, update: Future[None], content: Any) -> None:
    sender.hand_over()
    sender.post(content)
    with pytest.raises(WireError):
        update.result(SOON)


def test_an_error_whose_text_is_no_utf_8(
    sender: Sender, engine: Engine, update: Future[None]
) -> None:
    engine.error = ValueError("bad \udc80 name")
    sender.hand_over()
    assert "bad ? name" in sender.say(sender.bucket(BUCKETS[0])).decode()
    sender.post(RuntimeError("stop"))
    assert isinstance(update.exception(SOON), RuntimeError)


# ---------------------------------------------------------------------- workers of our server


class OtherWorker:
    """Another program's worker, as of release 0.4: REP, connected, plain pickle.

    ``fault`` names the message that it answers with a traceback.
    """

    def __init__(self, fault: str = "", dies_at: str = "") -> None:
        self.fault = fault
        self.dies_at = dies_at
        self.weights: Weights = {}
        self.hooks = 0
        self.raised: BaseException | None = None

    def __call__(self, socket_paths: list[tuple[str, str]]) -> None:
        """A ``req_func``: it runs in a thread of its own, which is all that a worker needs."""
        with zmq.Context() as context, context.socket(zmq.REP) as socket:
            socket.setsockopt(zmq.LINGER, 1000)
            socket.setsockopt(zmq.RCVTIMEO, int(1000 * SOON))
            socket.connect(socket_paths[0][1])
            try:
                self._serve(socket)
            except Exception as error:
                self.raised = error

    def _serve(self, socket: zmq.Socket) -> None:
        rebuild, args = pickle.loads(socket.recv())
        buffer = rebuild(*args)
        self._answer(socket, "handle")
        if self.fault == "handle":
            raise pickle.loads(socket.recv())
        bucket = 0
        while (content := pickle.loads(socket.recv())) is not None:
            if isinstance(content, Exception):
                raise content
            bucket += 1
            if self.dies_at == f"bucket {bucket}":
                return
            self.weights |= {entry["name"]: _extract(entry, buffer) for entry in content}
            self._answer(socket, f"bucket {bucket}")
        del buffer
        gc.collect()
        self._answer(socket, "first None")
        content = pickle.loads(socket.recv())
        if isinstance(content, Exception):
            raise content
        self.hooks += 1
        self._answer(socket, "second None")

    def _answer(self, socket: zmq.Socket, to: str) -> None:
        if to != self.fault:
            socket.send(b"")
            return
        try:
            raise ValueError(f"this worker failed at {to}")
        except ValueError:
            socket.send(traceback.format_exc().encode())


def _extract(entry: dict[str, Any], buffer: torch.Tensor) -> torch.Tensor:
    end = entry["offset"] + entry["dtype"].itemsize * entry["shape"].numel()
    flat = buffer[entry["offset"] : end].view(dtype=entry["dtype"])
    return flat.view(entry["shape"]).clone()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ParameterServer]:
    monkeypatch.setenv("PS_DEVICE", "cpu")
    monkeypatch.setenv("PS_IPC_DIR", str(tmp_path / "sockets"))
    monkeypatch.setenv("PS_MAX_BUCKET_SIZE_GB", str(2**-13))  # 128 KiB
    monkeypatch.setattr(ps, "P2PStore", _no_p2p)
    made = ParameterServer(rank=0, world_size=1)
    made.register_checkpoint("c", named_tensors=tensors())
    made.gather_metas("c")
    yield made
    made.unregister_checkpoint("c")
    assert list((tmp_path / "sockets").iterdir()) == []
    assert left_segments() == []
    gc.collect()
    assert "/dev/shm/checkpoint-engine-" not in Path("/proc/self/maps").read_text()


def _no_p2p(*args: Any, **options: Any) -> None:
    raise RuntimeError("not in this test")


def tensors() -> Weights:
    return mixed_tensors(seed=1, owner=0, largest=100_000)


def update_from(server: ParameterServer, req_func: Any, seconds: float = SOON) -> Any:
    return server.update("c", req_func, timeout=timedelta(seconds=seconds))


def test_a_worker_of_release_0_4(server: ParameterServer) -> None:
    other = OtherWorker()
    report = update_from(server, other)
    assert other.raised is None
    assert other.hooks == 1
    assert digests(other.weights) == digests(tensors())
    assert report.tensors == len(tensors())
    assert report.buckets > 3


FAULTS = {
    "handle": "handshake",
    "bucket 1": "reload",
    "bucket 2": "reload",
    "last bucket": "reload",
    "first None": "release",
    "second None": "post hook",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_failure_of_a_worker_goes_unnoticed(server: ParameterServer, fault: str) -> None:
    buckets = update_from(server, OtherWorker()).buckets
    other = OtherWorker(fault.replace("last bucket", f"bucket {buckets}"))
    with pytest.raises(UpdateError) as caught:
        update_from(server, other)
    error = caught.value
    assert (error.rank, error.phase) == (0, FAULTS[fault])
    assert f"ValueError: this worker failed at {other.fault}" in error.cause
    assert error.cause in str(error)
    is_untouched = fault == "handle"
    assert error.engines == {0: "untouched" if is_untouched else "partly written"}
    assert (server.served is not None) == is_untouched
    if fault != "second None":
        assert other.fault in str(other.raised)  # the server told it why it gave up
    again = OtherWorker()
    update_from(server, again)
    assert digests(again.weights) == digests(tensors())


@pytest.mark.parametrize("place", ["bucket 1", "bucket 2"])
def test_a_worker_that_dies_ends_the_update_at_once(server: ParameterServer, place: str) -> None:
    with pytest.raises(UpdateError, match="the inference worker closed its connection"):
        update_from(server, OtherWorker(dies_at=place), seconds=30)
    update_from(server, OtherWorker())


def test_a_worker_that_never_connects(server: ParameterServer) -> None:
    with pytest.raises(UpdateError, match=r"rank 0 during handshake: gave up after 0\.5 s"):
        update_from(server, lambda paths: None, seconds=0.5)
    update_from(server, OtherWorker())


def test_an_engine_that_cannot_be_asked(server: ParameterServer) -> None:
    def refuse(paths: list[tuple[str, str]]) -> None:
        raise ConnectionError("no engine at port 8000")

    with pytest.raises(UpdateError, match="ConnectionError: no engine at port 8000"):
        update_from(server, refuse, seconds=30)
    update_from(server, OtherWorker())


def test_every_update_has_an_address_of_its_own(server: ParameterServer) -> None:
    seen: list[tuple[str, str]] = []

    def remember(paths: list[tuple[str, str]]) -> None:
        seen.extend(paths)
        OtherWorker()(paths)

    for _ in range(3):
        update_from(server, remember)
    assert {identity for identity, _ in seen} == {server._device_uuid}
    assert len({address for _, address in seen}) == 3


# ---------------------------------------------------------------------- vLLM's worker extension


class Model:
    def __init__(self) -> None:
        self.weights: Weights = {}

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> set[str]:
        self.weights |= {name: tensor.clone() for name, tensor in weights}
        return {name for name, _ in weights}


class EngineWorker(VllmColocateWorkerExtension):
    """As vLLM makes one: the extension is mixed into the worker's class."""

    def __init__(self, local_rank: int = 0) -> None:
        self.device = torch.device("cpu")
        self.local_rank = local_rank
        self.model_runner = SimpleNamespace(model=Model(), model_config=None)


def test_the_extension_loads(server: ParameterServer) -> None:
    engine_worker = EngineWorker()
    report = update_from(server, lambda paths: engine_worker.update_weights_from_ipc(dict(paths)))
    assert digests(engine_worker.model_runner.model.weights) == digests(tensors())
    nothing = {"left_over": 0, "missing": 0, "partial": 0}
    assert report.engines == {0: {"model": {"tensors": len(tensors()), **nothing}}}
    assert f"rank 0's engine: model {len(tensors())} tensors" in str(report)


def test_what_a_plain_function_wrote_is_unknown(server: ParameterServer) -> None:
    held: Weights = {}

    def ask(paths: list[tuple[str, str]]) -> None:
        with zmq.Context() as context:
            run = lambda weights: held.update((name, t.clone()) for name, t in weights)  # noqa: E731
            update_weights_from_ipc(context, paths[0][1], None, run=run)

    report = update_from(server, ask)
    assert digests(held) == digests(tensors())
    assert report.engines == {0: {}}
    assert "rank 0's engine: unknown what it wrote" in str(report)


@pytest.mark.parametrize(
    ("ours", "says"),
    [(True, "failed in bucket .*the bytes of the bucket at"), (False, "of a bucket from rank 0")],
)
def test_a_byte_that_changed_since_it_was_registered_is_an_error(
    server: ParameterServer, ours: bool, says: str
) -> None:
    """Our worker looks itself; the server looks for one that does not."""

    def update() -> None:
        engine_worker = EngineWorker()
        ask = lambda paths: engine_worker.update_weights_from_ipc(dict(paths))  # noqa: E731
        update_from(server, ask if ours else OtherWorker())

    update()
    memory = server._memory_pool["c"][0].buffer
    memory[len(memory) // 2] ^= 1
    with pytest.raises(UpdateError, match=f"(?s){says}.* are not those that were registered"):
        update()


def test_our_server_tells_our_worker_what_there_was_to_load(
    server: ParameterServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine_worker, note = EngineWorker(), LoadedBuckets.note
    noted: list[bytes] = []

    def forget_the_first(self: LoadedBuckets, message: bytes) -> None:
        noted.append(message)
        if len(noted) > 1:
            note(self, message)

    monkeypatch.setattr(LoadedBuckets, "note", forget_the_first)
    with pytest.raises(UpdateError, match=r"bucket 1 of .* was loaded 0 times, not 1"):
        update_from(server, lambda paths: engine_worker.update_weights_from_ipc(dict(paths)))


def asleep(monkeypatch: pytest.MonkeyPatch, worker: EngineWorker, tag: str = "weights") -> None:
    """As vLLM's allocator for GPUs says it, which cannot be imported here."""
    blocks = {1: SimpleNamespace(tag="kv_cache", is_asleep=True, cpu_backup_tensor=None)}
    blocks[2] = SimpleNamespace(tag=tag, is_asleep=True, cpu_backup_tensor=None)
    allocator = SimpleNamespace(instance=SimpleNamespace(pointer_to_data=blocks))
    module = SimpleNamespace(CuMemAllocator=allocator)
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", module)  # type: ignore[misc]


def asleep_by_an_older_allocator(monkeypatch: pytest.MonkeyPatch, worker: EngineWorker) -> None:
    blocks = {1: SimpleNamespace(tag="weights", cpu_backup_tensor=torch.empty(1))}
    allocator = SimpleNamespace(instance=SimpleNamespace(pointer_to_data=blocks))
    module = SimpleNamespace(CuMemAllocator=allocator)
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", module)  # type: ignore[misc]


def asleep_at_level_2(monkeypatch: pytest.MonkeyPatch, worker: EngineWorker) -> None:
    worker._sleep_saved_buffers = {"rotary.cos": torch.ones(1)}  # type: ignore[attr-defined]


def moving_experts(monkeypatch: pytest.MonkeyPatch, worker: EngineWorker) -> None:
    parallel = SimpleNamespace(enable_eplb=True)
    worker.vllm_config = SimpleNamespace(parallel_config=parallel)  # type: ignore[attr-defined]


def merged_with_an_adapter(monkeypatch: pytest.MonkeyPatch, worker: EngineWorker) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.load_weights = Model().load_weights  # type: ignore[assignment]
    model[0].merged_adapters = ["tuned"]  # type: ignore[assignment]
    worker.model_runner.model = model


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (asleep, "this engine is asleep.*wake it up first"),
        (asleep_by_an_older_allocator, "this engine is asleep"),
        (asleep_at_level_2, "this engine is asleep"),
        (moving_experts, "moves experts .*start it without that"),
        (merged_with_an_adapter, "a LoRA adapter is merged into '0'.*unmerge it"),
    ],
)
def test_an_engine_that_would_lose_new_weights_refuses_them(
    server: ParameterServer, monkeypatch: pytest.MonkeyPatch, spoil: Any, says: str
) -> None:
    """Before the first byte, and with the reason."""
    engine_worker = EngineWorker()
    spoil(monkeypatch, engine_worker)
    with pytest.raises(UpdateError, match=f"(?s)failed in the handshake.*{says}") as caught:
        update_from(server, lambda paths: engine_worker.update_weights_from_ipc(dict(paths)))
    assert caught.value.engines == {0: "untouched"}
    assert engine_worker.weight_version()["state"] == "initial"


def test_an_engine_whose_weights_alone_are_awake_is_updated(
    server: ParameterServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in reinforcement learning, where the KV cache has no room beside the old weights."""
    engine_worker = EngineWorker()
    asleep(monkeypatch, engine_worker, tag="kv_cache")
    update_from(server, lambda paths: engine_worker.update_weights_from_ipc(dict(paths)))
    assert digests(engine_worker.model_runner.model.weights) == digests(tensors())


class Named(torch.nn.Module):
    """Knows a few names, and passes over all others, as vLLM's loaders do."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        shapes = {name: tensor.shape for name, tensor in tensors().items() if name in names}
        for name, shape in shapes.items():
            empty = torch.zeros(shape, dtype=tensors()[name].dtype)
            self.register_buffer(name.replace(".", "_"), empty)

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name.replace(".", "_") in self._buffers:
                getattr(self, name.replace(".", "_")).copy_(tensor)


def receive_with(run: Any) -> Any:
    def ask(paths: list[tuple[str, str]]) -> None:
        with zmq.Context() as context:
            update_weights_from_ipc(context, paths[0][1], None, run=run)

    return ask


def test_a_learned_loader_states_what_it_left_over(server: ParameterServer) -> None:
    name = next(name for name, tensor in tensors().items() if tensor.numel())
    run = replayed(Named(name).load_weights)
    for _ in range(3):
        report = update_from(server, receive_with(run))
        left_over = sum(tensor.numel() > 0 for tensor in tensors().values()) - 1
        stated = {"tensors": len(tensors()), "left_over": left_over}
        assert report.engines == {0: {"model": stated}}


def test_names_that_match_nothing_are_an_error(server: ParameterServer) -> None:
    run = replayed(Named("of another model").load_weights)
    with pytest.raises(UpdateError, match=r"none of .* tensors was written into the model"):
        update_from(server, receive_with(run))


def test_tensors_that_are_needed_and_do_not_come_are_an_error(server: ParameterServer) -> None:
    names = [name for name, tensor in tensors().items() if tensor.numel()]
    run = replayed(Named(*names[:2]).load_weights)
    for _ in range(3):
        update_from(server, receive_with(run))
    server.unregister_checkpoint("c")
    rest = {name: tensor for name, tensor in tensors().items() if name != names[0]}
    server.register_checkpoint("c", named_tensors=rest)
    server.gather_metas("c")
    with pytest.raises(UpdateError, match="1 tensors did not come that the model needs"):
        update_from(server, receive_with(run))


def test_a_second_model_at_the_same_address_is_refused_at_once(server: ParameterServer) -> None:
    """SGLang's scheduler updates its target, and then calls again for its draft model."""
    target, draft = EngineWorker(), EngineWorker()

    def ask(paths: list[tuple[str, str]]) -> None:
        target.update_weights_from_ipc(dict(paths))
        with pytest.raises(RuntimeError, match="a draft model its weights in the same call"):
            draft.update_weights_from_ipc(dict(paths))

    update_from(server, ask)
    assert draft.weight_version()["state"] == "initial"
    assert digests(target.model_runner.model.weights) == digests(tensors())


def test_the_extension_looks_for_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = DeviceManager("cpu")
    served = {device.identity(0): "ipc://a", device.identity(1): "ipc://b"}
    with pytest.raises(KeyError) as caught:
        EngineWorker(2).update_weights_from_ipc(served)
    text = caught.value.args[0]
    assert f"this worker is {device.identity(2)}" in text
    assert str(sorted(served)) in text
    monkeypatch.setenv("PS_CPU_DEVICE_BASE", "5")
    with pytest.raises(KeyError, match=f"this worker is {device.identity(7)}"):
        EngineWorker(2).update_weights_from_ipc(served)


def test_several_instances_of_an_engine_share_a_host(
    server: ParameterServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PS_CPU_DEVICE_BASE", "3")
    engine_worker = EngineWorker()
    identity = DeviceManager("cpu").identity(3)
    update_from(
        server, lambda paths: engine_worker.update_weights_from_ipc({identity: paths[0][1]})
    )
    assert len(engine_worker.model_runner.model.weights) == len(tensors())


def test_a_missing_key_is_told_to_the_server(server: ParameterServer) -> None:
    def call(paths: list[tuple[str, str]]) -> None:
        EngineWorker(4).update_weights_from_ipc(dict(paths))

    with pytest.raises(UpdateError, match=r"req_func raised KeyError.*this worker is CPU-"):
        update_from(server, call, seconds=30)


@pytest.mark.parametrize("fails", [False, True])
def test_ranks_that_take_long_to_meet_keep_their_worker(
    server: ParameterServer, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """It is asked meanwhile, and would take a server that does not let it in for gone."""
    monkeypatch.setattr(link, "_CONNECT_SECONDS", 0.3)
    connect = Broadcast.connect
    heard: list[BaseException] = []

    def connect_late(self: Broadcast, move: Move, *arguments: Any) -> Any:
        meeting = Deadline(1.0)
        move.call.wait(lambda: meeting.remaining() == 0.0)
        if fails:
            raise RuntimeError("a planted fault")
        return connect(self, move, *arguments)

    def receive(paths: list[tuple[str, str]]) -> None:
        weights: dict[str, torch.Tensor] = {}
        try:
            with zmq.Context() as context:
                update_weights_from_ipc(context, paths[0][1], None, run=weights.update)
        except BaseException as error:
            heard.append(error)
            raise

    monkeypatch.setattr(Broadcast, "connect", connect_late)
    if not fails:
        update_from(server, receive)
        return
    with pytest.raises(UpdateError, match="a planted fault"):
        update_from(server, receive)
    assert "a planted fault" in str(heard[0])
