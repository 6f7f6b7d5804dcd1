"""Another user of the machine, at every port and socket of a running world. As root, ``python
tests/second_user.py`` prints a table.

Two server ranks serve HTTP, one on a Unix socket and one on a port, and are in the middle of an
update, whose workers wait in their loader. The second user is given what it could learn by itself,
and more: every name, and the metas.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from test_authenticator import as_nobody
from test_service import RANKS, ROOT, WEIGHTS, Engine, World, listening
from torchrun import free_port_pair

with contextlib.suppress(ImportError):  # now: the second user may not be able to read it
    from mooncake.engine import TransferEngine

TOKEN = "the-token-of-the-owner"
LISTENS = "0A"
WAITS_FOR_CONNECTIONS = 1 << 16  # __SO_ACCEPTCON
"""Flag of /proc/net/unix."""


ROUTES = [
    ("GET", "/v1/healthz"),
    ("GET", "/v1/metas"),
    ("GET", "/v1/status"),
    ("GET", "/metrics"),
    ("DELETE", "/v1/checkpoints/c"),
    ("POST", "/v1/metas"),
    ("POST", "/v1/checkpoints/c/update"),
]


class Place(NamedTuple):
    """Where a process of the world can be reached."""

    kind: str
    address: str
    pid: int


class Row(NamedTuple):
    """What the second user tried somewhere, and got."""

    place: Place
    tried: str
    got: str


# ---------------------------------------------------------------------- what the world opens


def inodes_of(pid: int) -> set[int]:
    """Of the sockets of a process."""
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(fd)):
                found.add(int(match[1]))
    return found


def tcp_places(pid: int) -> Iterator[Place]:
    mine = inodes_of(pid)
    for family in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{family}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTENS and int(words[9]) in mine:
                yield Place("tcp", str(int(words[1].split(":")[1], 16)), pid)


def unix_places(pid: int) -> Iterator[Place]:
    mine = inodes_of(pid)
    for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
        words = line.split()
        if len(words) > 7 and int(words[6]) in mine and int(words[3], 16) & WAITS_FOR_CONNECTIONS:
            kind = "abstract" if words[7].startswith("@") else "unix"
            yield Place(kind, words[7], pid)


def memory_places(pid: int) -> Iterator[Place]:
    """Files of shared memory, by name, and by the descriptors of the process."""
    for path in Path("/dev/shm").glob("checkpoint-engine-*"):
        yield Place("memory", str(path), pid)
    maps = Path(f"/proc/{pid}/maps").read_text()
    for start in re.findall(r"^(\S+) .*/dev/shm/checkpoint-engine-", maps, re.MULTILINE):
        yield Place("memory", f"/proc/{pid}/map_files/{start}", pid)
    yield Place("memory", f"/proc/{pid}/mem", pid)


def places_of(pids: Sequence[int]) -> list[Place]:
    finders = (tcp_places, unix_places, memory_places)
    return sorted({place for pid in pids for find in finders for place in find(pid)})


# ---------------------------------------------------------------------- what the second user tries


def tell(family: int, address: Any, said: bytes, kind: int = socket.SOCK_STREAM) -> str:
    with socket.socket(family, kind) as peer:
        peer.settimeout(0.5)
        try:
            peer.connect(address)
        except TimeoutError:
            return "the kernel dropped it"
        try:
            peer.sendall(said)
            got = peer.recv(4096)
        except TimeoutError:
            return "connected, no answer"
        except OSError:
            return "connected, was dropped"
        return f"connected, got {got[:24]!r}" if got else "connected, was dropped"


def tell_tcp(host: str, port: int, said: bytes) -> str:
    return tell(socket.AF_INET, (host, port), said)


def tell_unix(name: str, said: bytes) -> str:
    if name.startswith("@"):  # a rank's, for the other ranks of its host
        return tell(socket.AF_UNIX, "\0" + name[1:], said, socket.SOCK_SEQPACKET)
    return tell(socket.AF_UNIX, name, said)


def open_memory(path: str) -> str:
    with open(path, "r+b"):
        return "opened it"


def ask_http(port: int, method: str, route: str) -> str:
    answer = httpx.request(method, f"http://127.0.0.1:{port}{route}", json={}, timeout=5)
    return str(answer.status_code)


def store_of(port: int) -> Any:
    return dist.TCPStore("127.0.0.1", port, wait_for_workers=False)


def read_store(port: int) -> str:
    return bytes(store_of(port).get("checkpoint-engine/1/liveness")).decode()


def write_store(port: int) -> str:
    store = store_of(port)
    store.set("stranger", "was here")
    return bytes(store.get("stranger")).decode()


def move_weights(source: str, ptr: int, writes: bool) -> str:
    """By Mooncake, as another rank reads, or the other way round; the eight bytes it holds then."""
    engine, mine = TransferEngine(), torch.full((8,), 0x5A, dtype=torch.uint8)
    engine.initialize(f"{source.rpartition(':')[0]}:0", "P2PHANDSHAKE", "tcp", "")
    engine.register_memory(mine.data_ptr(), 8)
    move = engine.transfer_sync_write if writes else engine.transfer_sync_read
    if move(source, mine.data_ptr(), ptr, 8) != 0:
        return "refused"
    return bytes(mine.numpy()).hex()


RUBBISH = {
    "rubbish": bytes(range(256)) * 16,
    "brackets": b"[" * 5000 + b"\n",
    "lengths": struct.pack("<Q", 1 << 62) * 64,
    "silence": b"",
}


def rubbish_at(place: Place, hosts: Sequence[str]) -> Iterator[tuple[str, Callable[[], str]]]:
    if place.kind == "memory":
        yield "open", lambda: open_memory(place.address)
        return
    for name, said in RUBBISH.items():
        if place.kind in ("unix", "abstract"):
            yield name, lambda said=said: tell_unix(place.address, said)
            continue
        for host in hosts:
            port = int(place.address)
            yield f"{name} at {host}", lambda h=host, p=port, s=said: tell_tcp(h, p, s)


# ---------------------------------------------------------------------- the world


class Held:
    """A world in the middle of an update, until ``go_on`` is set."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.store_port, self.http_port = free_port_pair() + 1, free_port_pair()
        self.uds = folder / "0.sock"
        self.go_on, self._inside = threading.Event(), threading.Event()
        self.engine = Engine()
        self.engine.on_bucket = self._wait
        self._folder = folder
        (folder / "s").mkdir(mode=0o711)
        hows = (["--uds", str(self.uds)], ["--port", str(self.http_port - 1)])
        ranks = [self._start(rank, how) for rank, how in enumerate(hows)]
        for rank in ranks:
            stack.callback(_end, rank)
        self.pids = [rank.pid for rank in ranks]
        self.world = World(
            [stack.enter_context(contextlib.closing(one)) for one in self._clients()]
        )
        self._url = stack.enter_context(listening(self.engine))
        self.register()
        pool = stack.enter_context(ThreadPoolExecutor(1))
        stack.callback(self.go_on.set)
        self.answers = pool.submit(self.update)
        assert self._inside.wait(40), self.answers.result(40)

    @property
    def p2p_host(self) -> str:
        return str(self.metas()["0"]["p2p_store_addr"].rpartition(":")[0])

    def metas(self) -> dict[str, Any]:
        return self.world.clients[0].get("/v1/metas").json()

    def update(self) -> list[httpx.Response]:
        """Rank 0 asks the engine."""
        asks = {"update_url": self._url, "inference_group_ranks": [0, 1], "timeout": 120}
        return self.world.post("/v1/checkpoints/c/update", asks, {"timeout": 120})

    def _wait(self) -> None:
        self._inside.set()
        self.go_on.wait(240)

    def _start(self, rank: int, how: list[str]) -> subprocess.Popen[bytes]:
        variables = {
            "PS_DEVICE": "cpu",
            "PS_IPC_DIR": str(self._folder / "s"),
            "PS_HTTP_TOKEN": TOKEN,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store_port - 1),
            "WORLD_SIZE": str(RANKS),
            "LOCAL_WORLD_SIZE": str(RANKS),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        command = [sys.executable, "-m", "checkpoint_engine", *how]
        with (self._folder / f"log-{rank}").open("wb") as log:
            return subprocess.Popen(command, env={**os.environ, **variables}, stderr=log)

    def _clients(self) -> Iterator[httpx.Client]:
        for uds in (str(self.uds), None):
            client = httpx.Client(
                transport=httpx.HTTPTransport(uds=uds),
                base_url=f"http://127.0.0.1:{self.http_port}",
                headers={"Authorization": f"Bearer {TOKEN}"},
                timeout=250,
            )
            ends = time.monotonic() + 50
            while True:
                with contextlib.suppress(httpx.TransportError):
                    client.get("/v1/healthz")
                    break
                assert time.monotonic() < ends, [p.read_text() for p in self._folder.glob("log-*")]
                time.sleep(0.05)
            yield client

    def register(self) -> None:
        """The first half of the weights on rank 0, the rest on rank 1."""
        names = list(WEIGHTS)
        files = [self._folder / f"{rank}.safetensors" for rank in range(RANKS)]
        for file, held in zip(files, [names[:4], names[4:]], strict=True):
            save_file({name: WEIGHTS[name] for name in held}, file)
        bodies = ({"files": [str(file)]} for file in files)
        for answer in [
            *self.world.post("/v1/checkpoints/c/files", *bodies),
            *self.world.post("/v1/checkpoints/c/gather-metas", None),
        ]:
            assert answer.is_success, answer.text

    def holds_the_weights(self) -> bool:
        return len(self.engine.weights) == RANKS and all(
            torch.equal(loaded[name], tensor)
            for loaded in self.engine.weights
            for name, tensor in WEIGHTS.items()
        )


def _end(rank: subprocess.Popen[bytes]) -> None:
    rank.terminate()
    try:
        rank.wait(20)
    finally:
        rank.kill()


@contextlib.contextmanager
def held() -> Iterator[Held]:
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder, contextlib.ExitStack() as stack:
        os.chmod(folder, 0o711)  # others may enter it: what they meet are the sockets themselves
        yield Held(Path(folder), stack)


# ---------------------------------------------------------------------- everything


def named(place: Place, world: Held, liveness: int) -> Place:
    """Whose port it is."""
    known = {world.store_port: "store", world.http_port: "http", liveness: "liveness"}
    kind = known.get(int(place.address), "P2P") if place.kind == "tcp" else place.kind
    return place._replace(kind=kind)


def rows_of_strangers(world: Held) -> Iterator[Row]:
    """What must not disturb the update."""
    liveness, token, _ = as_nobody(lambda: read_store(world.store_port)).split()
    for place in places_of(world.pids):
        place = named(place, world, int(liveness))
        hosts = ("127.0.0.1", world.p2p_host) if place.kind == "P2P" else ("127.0.0.1",)
        for tried, attempt in rubbish_at(place, hosts):
            yield Row(place, tried, as_nobody(attempt))
    guess = f"{'0' * len(token)} 1\n".encode()
    yield Row(
        Place("liveness", liveness, world.pids[0]),
        "says it is rank 1, without the token",
        as_nobody(lambda: tell_tcp("127.0.0.1", int(liveness), guess)),
    )
    http = Place("http", str(world.http_port), world.pids[1])
    for method, route in ROUTES:
        got = as_nobody(lambda m=method, r=route: ask_http(world.http_port, m, r))
        yield Row(http, f"{method} {route}", got)
    for pid in world.pids:
        place = Place("process", str(pid), pid)
        yield Row(place, "SIGTERM", as_nobody(lambda p=pid: os.kill(p, 15)))


def rows_of_the_trusted(world: Held) -> Iterator[Row]:
    """What nothing keeps out, see SECURITY.md: ``MASTER_PORT`` + 1, and P2P."""
    store = Place("store", str(world.store_port), world.pids[0])
    for tried, attempt in (("read", read_store), ("write", write_store)):
        yield Row(store, tried, as_nobody(lambda a=attempt: a(world.store_port)))
    for rank, metas in world.metas().items():
        source, ptr = metas["p2p_store_addr"], metas["memory_buffer_metas_list"][0]["ptr"]
        place = Place("P2P", source, world.pids[int(rank)])
        for tried, writes in (("read weights", False), ("write weights", True)):
            move = partial(move_weights, source, ptr, writes)
            yield Row(place, tried, as_nobody(move))


def show(row: Row) -> None:
    print(f"{row.place.kind:9}{row.place.address:60}{row.tried:40}{row.got}", flush=True)


def main() -> None:
    with held() as world:
        for row in rows_of_strangers(world):
            show(row)
        print("the update still waits:", not world.answers.done())
        world.go_on.set()
        print("it ended:", [answer.status_code for answer in world.answers.result(60)])
        print("its workers hold the weights:", world.holds_the_weights())
        for row in rows_of_the_trusted(world):
            show(row)
        print("the next update:", *(answer.text for answer in world.update()), sep="\n")


if __name__ == "__main__":
    main()
