"""What is fuzzed: each target gets bytes, and may raise nothing but its documented exceptions.

``seeds`` are valid inputs to start from. A target that returns has read the input; one that takes
memory out of proportion to it fails by the limit that ``run.py`` sets.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import json
import os
import pickle
import re
import socket
import struct
import tempfile
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loguru import logger
from torch.multiprocessing.reductions import rebuild_cuda_tensor
from uvicorn.server import ServerState

from checkpoint_engine.api import _init_api
from checkpoint_engine.data_types import (
    DataToGather,
    Lease,
    MemoryBufferMetaList,
    MemoryBufferMetas,
    ParameterMeta,
)
from checkpoint_engine.errors import WireError
from checkpoint_engine.handover import wire
from checkpoint_engine.handover.ipc import map_shared_memory, open_buffer
from checkpoint_engine.loading.loaded import LoadedBuckets, Parts, digest
from checkpoint_engine.loading.receive import _check_bytes, extract_weights
from checkpoint_engine.loading.replay.held import HeldTensors
from checkpoint_engine.memory import files, folder
from checkpoint_engine.planning import layouts as gather
from checkpoint_engine.service.access import Guard, ImpatientProtocol
from checkpoint_engine.service.serve import ServeOptions, uvicorn_config
from checkpoint_engine.world import gathered, metas_file
from checkpoint_engine.world.hello import Hello
from checkpoint_engine.world.liveness import LivenessClient, LivenessServer
from checkpoint_engine.world.outcome import encode_failure, error_of
from checkpoint_engine.world.packing import pack, unpack
from checkpoint_engine.world.store import connect_store
from samples import CUDA_ARGS

logger.remove()
ENTRIES = [
    {"name": "a.weight", "dtype": torch.bfloat16, "shape": torch.Size([3, 4]), "offset": 0},
    {"name": "b", "dtype": torch.float8_e4m3fn, "shape": torch.Size([]), "offset": 256},
]
METAS = [
    ParameterMeta(name="a.weight", dtype=torch.bfloat16, shape=torch.Size([3, 4])),
    ParameterMeta(name="b", dtype=torch.int8, shape=torch.Size([])),
]
OWNED = MemoryBufferMetaList(
    p2p_store_addr="192.0.2.1:1",
    memory_buffer_metas_list=[MemoryBufferMetas(metas=METAS, ptr=4096, size=512)],
    rdma_device="mlx5_0",
    lease=Lease(ptr=1, id="ab"),
)
LOADABLE = OWNED.model_copy(update={"lease": Lease(ptr=1, id="ab" * 32)})
HELLO = Hello(1, "update", "c", ranks=(0, 1), version="v", address="ipc:///x", nonce="1")
PLACE = DataToGather(**dict(OWNED), host_ip="192.0.2.1", device_uuid="GPU-1")


@dataclass(frozen=True)
class Target:
    """``run`` may raise ``allowed`` and nothing else."""

    name: str
    run: Callable[[bytes], object]
    allowed: tuple[type[Exception], ...]
    seeds: tuple[bytes, ...]


# ---------------------------------------------------------------------- the wire

BUFFER = torch.zeros(1024, dtype=torch.uint8)


def handle(data: bytes) -> None:
    read = wire.decode_handle(data)
    if isinstance(read, wire.Handle) and read.rebuild is map_shared_memory:
        with contextlib.suppress(ValueError, OSError, TypeError):
            open_buffer(read.rebuild, read.args, None)
    elif isinstance(read, Exception):
        assert isinstance(str(read), str)


def message(data: bytes) -> None:
    read = wire.decode_message(data)
    if isinstance(read, list):
        with contextlib.suppress(ValueError, RuntimeError):
            extract_weights(read, BUFFER)
    elif isinstance(read, Exception):
        assert isinstance(str(read), str)


def extensions(data: bytes) -> None:
    _, found = wire.split_extensions(data)
    uses: dict[str, Callable[[Any], object]] = {
        wire.PART: lambda part: Parts().add(b"message", part, BUFFER),
        wire.DELIVERED: LoadedBuckets().check,
        wire.CHECKSUM: lambda expected: _check_bytes(expected, BUFFER),
    }
    for key in uses.keys() & found.keys():
        with contextlib.suppress(WireError, ValueError, RuntimeError):  # the last: a huge part
            uses[key](found[key])


def reply(data: bytes) -> None:
    said = wire.decode_acceptance(data)
    if said is None:
        data.decode(errors="replace")
    elif wire.HELD in said:
        wire.decode_bits(said[wire.HELD])


def left_out(data: bytes) -> None:
    read = wire.decode_held(data)
    if isinstance(read, Exception):
        assert isinstance(str(read), str)
        return
    held = HeldTensors()
    with contextlib.suppress(RuntimeError):  # it is of another checkpoint
        what, about, content = read
        if what == wire.HELD:
            held.narrow(held.offer(None, about, content, True))
        held.leave_out(content)


# ---------------------------------------------------------------------- files


@functools.cache
def _own() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(dir="/dev/shm")


def _folder() -> Path:
    """The runner's, for a fuzzer ends its process without cleaning up; or one of its own."""
    return Path(os.environ.get("FUZZ_FOLDER") or _own().name)


class _Files:
    """One file in memory, and its path: the readers open it by name."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix

    @property
    def path(self) -> str:
        return str(_folder() / f"input{self._suffix}")

    def write(self, data: bytes, suffix: str = "") -> None:
        Path(self.path + suffix).write_bytes(data)


_SAFETENSORS, _NPY = _Files(".safetensors"), _Files(".npy")
_INDEX = _Files(folder.INDEX)


def safetensors(data: bytes) -> None:
    _SAFETENSORS.write(data)
    files.open_files([_SAFETENSORS.path])


_INDEX_JSON = b'{"weight_map": {"a": "x.safetensors", "b": "y/z.safetensors"}}'


def index(data: bytes) -> None:
    _INDEX.write(data)
    folder.read_index(_INDEX.path)


NPY_META = pickle.dumps(
    [
        {
            "key": "w",
            "dtype": torch.float32,
            "shape": torch.Size([2, 2]),
            "type": torch.Tensor,
            "tp_concat_dim": 0,
        }
    ]
)


def _npy_bytes() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros((2, 2), np.float32))
    return file.getvalue()


def npy(data: bytes) -> None:
    _NPY.write(data)
    _NPY.write(NPY_META, ".meta")
    files.open_files([_NPY.path])


def npy_meta(data: bytes) -> None:
    _NPY.write(_npy_bytes())
    _NPY.write(data, ".meta")
    files.open_files([_NPY.path])


def _safetensors_bytes(header: Any, nbytes: int) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(nbytes)


# ---------------------------------------------------------------------- who is there


class _Ranks:
    """A rank 0 that reads what others send, and what sends others what rank 0 might."""

    def __init__(self) -> None:
        self.host = LivenessServer(2)
        self.host.token = "token"
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.answer = b""
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(1024)
                connection.sendall(self.answer)


@functools.cache
def _ranks() -> _Ranks:
    return _Ranks()


def hello_to_rank_0(data: bytes) -> None:
    host = _ranks().host
    with (
        contextlib.suppress(ConnectionError),  # it is closed before all has been read
        socket.create_connection(("127.0.0.1", host.port), timeout=5) as connection,
    ):
        reset = struct.pack("ii", 1, 0)  # and no port that waits for a minute
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1024):
            pass
    assert host._thread.is_alive()


def answer_of_rank_0(data: bytes) -> None:
    ended = threading.Event()
    _ranks().answer = data
    port = _ranks().listener.getsockname()[1]
    guest = LivenessClient(1, "127.0.0.1", port, "token", ended.set)
    assert ended.wait(5)
    assert guest.gone == {0}


@functools.cache
def _store() -> Any:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return connect_store(0, 2, "127.0.0.1", port)


def stranger_at_the_store(data: bytes) -> None:
    """The store is torch's; it must go on serving the ranks."""
    store = _store()
    with (
        contextlib.suppress(ConnectionError),
        socket.create_connection(("127.0.0.1", store.port), timeout=5) as connection,
    ):
        reset = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        connection.sendall(data)
    store.set("rank", "is here")
    assert store.get("rank") == b"is here"


def hello_in_the_store(data: bytes) -> None:
    said = Hello.decode(data)
    said.differs_from(HELLO)
    assert said.wish
    Hello.decode(said.encode())


def outcome_in_the_store(data: bytes) -> None:
    assert str(error_of(data, "update"))


def packed_exchange(data: bytes) -> None:
    """As it comes, and as what decompressing returns: few inputs are whole streams."""
    for packed in (data, zlib.compress(data, level=1)):
        with contextlib.suppress(ValueError):
            values = unpack(packed, 3)
            assert len(values) == 3
            assert unpack(pack(values), 3) == values


def loaded_metas(data: bytes) -> None:
    gathered.load(metas_file.decode_metas(data))


# ---------------------------------------------------------------------- ranks and HTTP


def layout(data: bytes) -> None:
    gather.decode_layout(data)


def place(data: bytes) -> None:
    gather.decode_place(data.decode(), [METAS])


class _Server:
    """Takes every call and does nothing."""

    allowed_folders: Any = None
    progress: Any = None

    def register_checkpoint(self, name: str, *, files: list[str], on_progress: Any) -> None: ...
    def unregister_checkpoint(self, name: str) -> None: ...
    def gather_metas(self, name: str) -> None: ...
    def load_metas(self, metas: Any) -> None: ...
    def update(
        self, name: str, req: Any, *, ranks: list[int], timeout: timedelta, on_progress: Any
    ) -> None: ...


_APP = Guard(_init_api(_Server()), None, 1 << 20)  # type: ignore[arg-type]
_LOOP = asyncio.new_event_loop()
_ROUTES = ("/v1/checkpoints/c/files", "/v1/checkpoints/c/update", "/v1/metas", "/v1/checkpoints/c")


def http(data: bytes) -> None:
    """The first byte chooses the route, and whether the body says that it is JSON."""
    choice, body = (data[0], data[1:]) if data else (0, b"")
    kind = b"application/json" if choice < 192 else b"text/plain"
    scope = {
        "type": "http",
        "method": "POST",
        "path": _ROUTES[choice % len(_ROUTES)],
        "raw_path": b"/",
        "query_string": b"",
        "headers": [(b"content-type", kind), (b"content-length", str(len(body)).encode())],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("x", 1),
        "client": ("x", 1),
        "root_path": "",
        "asgi": {"version": "3.0"},
    }
    answers: list[Any] = []
    waiting = [body]

    async def receive() -> Any:
        if not waiting:
            await asyncio.Future()  # as a server does while the client is there
        waiting.clear()
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        answers.append(message)

    _LOOP.run_until_complete(_APP(scope, receive, send))
    _check_answers(answers)


def _check_answers(answers: list[Any]) -> None:
    status, sent = answers[0]["status"], sum(len(a.get("body", b"")) for a in answers)
    if status >= 500:
        raise AssertionError(f"answered {status}")
    if sent > 10_000:
        raise AssertionError(f"answered with {sent} bytes")


class _Wire(asyncio.Transport):
    """What uvicorn writes to a connection."""

    def __init__(self) -> None:
        super().__init__({"peername": ("192.0.2.1", 1), "sockname": ("192.0.2.2", 80)})
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def set_protocol(self, protocol: Any) -> None: ...


@functools.cache
def _uvicorn() -> Any:
    config = uvicorn_config(_init_api(_Server()), ServeOptions(uds="/x"))  # type: ignore[arg-type]
    config.load()
    return config


def http_head(data: bytes) -> None:
    """All that comes over a connection, as the server that is used reads it."""
    wire_, errors = _Wire(), list[Any]()

    async def serve() -> None:
        _LOOP.set_exception_handler(lambda loop, context: errors.append(context))
        protocol = ImpatientProtocol(_uvicorn(), ServerState(), {})
        protocol.connection_made(wire_)
        for start in range(0, len(data), 64):
            if not wire_.closed:
                protocol.data_received(data[start : start + 64])
        for _ in range(20):
            await asyncio.sleep(0)
        protocol.connection_lost(None)
        for _ in range(3):
            await asyncio.sleep(0)

    _LOOP.run_until_complete(serve())
    if errors or re.match(rb"HTTP/1.1 5", wire_.written):
        raise AssertionError(f"{errors}, {wire_.written!r:.300}")


def _pickles(content: Any) -> tuple[bytes, ...]:
    return tuple(pickle.dumps(content, protocol) for protocol in (3, 4))


_METAS_JSON = metas_file.encode_metas({0: OWNED})
TARGETS = (
    Target(
        "wire: handle",
        handle,
        (WireError,),
        (
            wire.encode_handle(map_shared_memory, ("/dev/shm/x", 8), {"timeout": 1.0}),
            *_pickles((rebuild_cuda_tensor, CUDA_ARGS)),
        ),
    ),
    Target(
        "wire: bucket, None",
        message,
        (WireError,),
        (*_pickles(ENTRIES), wire.NOTHING_MORE, wire.encode_bucket_as_json(ENTRIES)),
    ),
    Target(
        "wire: abort",
        message,
        (WireError,),
        (*_pickles(RuntimeError("why", 3)), *_pickles(OSError(2, "no"))),
    ),
    Target(
        "wire: extensions",
        extensions,
        (WireError,),
        tuple(
            wire.NOTHING_MORE + wire.encode_extensions(one)
            for one in (
                {wire.PART: [0, 256, 256, 512, 1]},
                {wire.DELIVERED: [digest(b"a"), None]},
                {wire.CHECKSUM: [0, 512, 3, 7]},
            )
        ),
    ),
    Target(
        "wire: replies",
        reply,
        (WireError,),
        (
            b"",
            b"Traceback",
            wire.encode_extensions({"version": 1, wire.JSON_BUCKETS: True}),
            wire.encode_extensions({wire.HELD: wire.encode_bits(b"\x05\x80")}),
        ),
    ),
    Target(
        "wire: held, left out",
        left_out,
        (WireError,),
        (
            wire.encode_contents("digest", bytes(range(32))),
            wire.encode_left_out(b"\x80", True),
            *_pickles(RuntimeError("why", 3)),
        ),
    ),
    Target(
        "safetensors",
        safetensors,
        (ValueError,),
        (
            _safetensors_bytes(
                {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}, 16
            ),
            _safetensors_bytes({"__metadata__": {"a": "b"}}, 0),
        ),
    ),
    Target("index", index, (ValueError,), (_INDEX_JSON,)),
    Target(".npy", npy, (ValueError,), (_npy_bytes(),)),
    Target(".npy.meta", npy_meta, (ValueError,), (NPY_META,)),
    Target("metas: JSON", metas_file.decode_metas, (ValueError,), (_METAS_JSON,)),
    Target("metas: pickle", metas_file.decode_metas, (ValueError,), _pickles({0: OWNED})[-1:]),
    Target(
        "gather: layout", layout, (ValueError,), (gather.encode_layout(gather.Layout.of([METAS])),)
    ),
    Target("gather: place", place, (ValueError,), (gather.encode_place(PLACE).encode(),)),
    Target("liveness: hello", hello_to_rank_0, (), (b"token 1\n", b"token 0\n", b"other 1\n")),
    Target(
        "liveness: answers",
        answer_of_rank_0,
        (OSError, ValueError),
        (b"0\n", b"1 0 2\n0\n", b"0 1\n0 1 2\n"),
    ),
    Target(
        "store: strangers",
        stranger_at_the_store,
        (),
        (
            b"\x00\x3c\x85\xf7\xb2",  # who connects says this first
            b"\x00\x3c\x85\xf7\xb2\x09\x01\x00\x00\x00",
            b"\x00\x3c\x85\xf7\xb2\x01\x04\x00\x00\x00\x00\x00\x00\x00/key",
        ),
    ),
    Target("store: hello", hello_in_the_store, (ValueError,), (HELLO.encode(),)),
    Target(
        "store: outcome",
        outcome_in_the_store,
        (),
        (encode_failure(RuntimeError("why"), 1, "plan", ""), b"ok"),
    ),
    Target(
        "exchange: packed",
        packed_exchange,
        (),
        tuple(
            seed
            for values in ([b"a", b"", b"a"], [HELLO.encode()] * 2 + [b"\0" * 300], [b""] * 3)
            for seed in (pack(values), zlib.decompress(pack(values)))
        ),
    ),
    Target(
        "metas: load",
        loaded_metas,
        (ValueError,),
        (metas_file.encode_metas({0: LOADABLE}), *_pickles({0: LOADABLE})[-1:]),
    ),
    Target(
        "HTTP heads",
        http_head,
        (),
        (
            b"GET /v1/healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"DELETE /v1/checkpoints/%41 HTTP/1.1\r\nHost: x\r\nAuthorization: Basic eDp5\r\n\r\n",
            b"POST /v1/metas?wait=false HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
            b"Origin: http://a\r\nSec-Fetch-Site: cross-site\r\n\r\n{}",
            b"POST /v1/checkpoints/c/files HTTP/1.1\r\nHost: localhost\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        ),
    ),
    Target(
        "HTTP bodies",
        http,
        (),
        (
            b'\x00{"files": ["/a"]}',
            b'\x01{"ranks": [0], "update_url": "http://x", "timeout": 3.0, "uds": null}',
            b"\x02" + _METAS_JSON,
            b'\x03{"inference_group_ranks": [1]}',
        ),
    ),
)
BY_NAME = {target.name: target for target in TARGETS}


def check(target: Target, data: bytes) -> None:
    """One input. Raises what the target must not."""
    with contextlib.suppress(*target.allowed):
        target.run(data)


def clean_up() -> None:
    """Remove all files, so that the next input finds none of the last."""
    for path in _folder().glob("input*"):
        path.unlink()
    if _own.cache_info().currsize:
        _own().cleanup()
        _own.cache_clear()
