"""Both ends of the wire as other programs write them: from the description of the messages alone,
with nothing but pickle and zmq. Run as processes of their own."""

from __future__ import annotations

import ctypes
import io
import mmap
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
import zmq
from torch.multiprocessing.reductions import reduce_tensor

from fleet import digests
from torchrun import forkserver

SECONDS = 15.0
Weights = dict[str, torch.Tensor]


@contextmanager
def child(target: Callable[..., Any], *args: Any) -> Iterator[Connection]:
    """``target(pipe, *args)`` in a process of its own; gives the other end of the pipe, and what
    it returns or raises comes as its last message, ``(value, error text)``."""
    ours, theirs = multiprocessing.Pipe()
    process = forkserver().Process(target=_run, args=(theirs, target, args))
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        process.join(SECONDS)
        process.kill()
        process.join()
        ours.close()


def _run(pipe: Connection, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: do not outlive the test
    torch.set_num_threads(1)
    try:
        pipe.send((target(pipe, *args), ""))
    except BaseException:
        pipe.send((None, traceback.format_exc()))


def result_of(pipe: Connection) -> Any:
    """What the child returned. Raises what it raised."""
    if not pipe.poll(SECONDS):
        raise TimeoutError("the other process does not answer")
    value, error = pipe.recv()
    if error:
        raise RuntimeError(error)
    return value


# ---------------------------------------------------------------------- the server's end


class Sender:
    """Binds a REQ socket and owns a double buffer; one message, one reply."""

    def __init__(self, address: str, half: int, device: str) -> None:
        self.half = half
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REQ)
        self._socket.setsockopt(zmq.RCVTIMEO, int(1000 * SECONDS))
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.bind(address)
        self._path = f"/dev/shm/checkpoint-engine-foreign-{os.getpid()}"
        if device == "cpu":
            with open(self._path, "xb") as file:
                file.truncate(2 * half)
            self._buffer = map_file(self._path, 2 * half)
        else:
            self._buffer = torch.empty(2 * half, dtype=torch.uint8, device=device)

    def ask(self, message: bytes) -> bytes:
        self._socket.send(message)
        return self._socket.recv()

    def hand_over(self, wrong: str = "") -> bytes:
        if self._buffer.is_cuda:
            return self.ask(pickle.dumps(reduce_tensor(self._buffer)))
        arguments = (self._path + wrong, 2 * self.half)
        return self.ask(
            call_by_name("checkpoint_engine.handover.ipc", "map_shared_memory", arguments)
        )

    def write(self, weights: Weights, turn: int) -> list[dict[str, Any]]:
        """Fill a half of the buffer; each tensor starts at a multiple of 256 bytes."""
        entries, offset = [], turn % 2 * self.half
        for name, tensor in weights.items():
            flat = tensor.contiguous().view(-1).view(torch.uint8)
            self._buffer[offset : offset + flat.numel()] = flat
            entries.append(
                {"name": name, "dtype": tensor.dtype, "shape": tensor.shape, "offset": offset}
            )
            offset += -(-flat.numel() // 256) * 256
        if self._buffer.is_cuda:
            torch.cuda.synchronize()
        return entries

    def unlink(self) -> None:
        if not self._buffer.is_cuda:
            os.unlink(self._path)

    def abort(self, reason: str) -> bool:
        """Whether the worker kept silent, as it must."""
        self._socket.send(pickle.dumps(RuntimeError(reason)))
        return not self._socket.poll(200)

    def close(self) -> None:
        """Go away."""
        self.unlink()
        self._socket.close()
        self._context.term()


def call_by_name(module: str, function: str, args: tuple[Any, ...]) -> bytes:
    """A pickled ``(function, args)`` of a function that this process need not have."""
    arguments = pickle.dumps(args, protocol=2)[2:-1]  # without its header and its end
    return b"\x80\x02" + f"c{module}\n{function}\n".encode() + arguments + b"\x86."


def cut(weights: Weights, half: int) -> Iterator[Weights]:
    """Buckets that fit into half of the buffer."""
    bucket: Weights = {}
    used = 0
    for name, tensor in weights.items():
        size = -(-tensor.nbytes // 256) * 256
        if used + size > half:
            yield bucket
            bucket, used = {}, 0
        bucket[name] = tensor
        used += size
    yield bucket


def send(
    pipe: Connection,
    address: str,
    weights: Weights,
    half: int,
    release: str = "0.4",
    stops_at: str = "",
    device: str = "cpu",
) -> list[str]:
    """One update as a sender of that release. Returns the worker's replies.

    ``stops_at``: ``handle`` sends one that cannot be opened, ``bucket`` aborts after the first one,
    ``first None`` dies after that.
    """
    sender = Sender(address, half, device)
    replies: list[str] = []

    def say(content: Any) -> None:
        replies.append(sender.ask(pickle.dumps(content)).decode())

    try:
        replies.append(sender.hand_over("-gone" if stops_at == "handle" else "").decode())
        for turn, bucket in enumerate(cut(weights, half)):
            if replies[-1] or (turn == 1 and stops_at == "bucket"):
                return [*replies, f"silent: {sender.abort('rank 3 failed')}"]
            say(sender.write(bucket, turn))
        say(None)
        if stops_at == "first None":
            sender.unlink()
            pipe.send((replies, ""))
            os.kill(os.getpid(), signal.SIGKILL)
        if release == "0.4":
            say(None)
        return replies
    finally:
        sender.close()


# ---------------------------------------------------------------------- the worker's end


class _Reader(pickle.Unpickler):
    """Maps the buffer with code of its own."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("checkpoint_engine.handover.ipc", "map_shared_memory"):
            return map_file
        return super().find_class(module, name)


def map_file(path: str, nbytes: int) -> torch.Tensor:
    with open(path, "rb+") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8)


def receive(pipe: Connection, address: str, release: str, fault: str) -> dict[str, Any]:
    """One update as a worker of that release; 0.2 ends with the first ``None``.

    ``fault``: what it cannot do: ``handle``, ``bucket`` or ``hook``.
    """
    weights: Weights = {}
    hooks = 0
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.setsockopt(zmq.RCVTIMEO, int(1000 * SECONDS))
        socket.setsockopt(zmq.LINGER, 1000)
        socket.connect(address)
        rebuild, args = _Reader(io.BytesIO(socket.recv())).load()
        if fault == "handle":
            socket.send(b"Traceback: cannot open the buffer")
            return {"told": repr(pickle.loads(socket.recv()))}
        buffer = rebuild(*args)
        socket.send(b"")
        while (content := pickle.loads(socket.recv())) is not None:
            if isinstance(content, Exception):
                return {"told": repr(content)}
            if fault == "bucket":
                socket.send(b"Traceback: cannot load the bucket")
                continue
            for entry in content:
                end = entry["offset"] + entry["dtype"].itemsize * entry["shape"].numel()
                flat = buffer[entry["offset"] : end].view(entry["dtype"])
                weights[entry["name"]] = flat.view(entry["shape"]).clone()
            socket.send(b"")
        del buffer
        if release == "0.4":
            socket.send(b"")
            content = pickle.loads(socket.recv())
            if isinstance(content, Exception):
                return {"told": repr(content)}
        hooks += 1
        socket.send(b"Traceback: cannot repack" if fault == "hook" else b"")
    return {"digests": digests(weights), "hooks": hooks}
