"""Server ranks and workers that live through many faults; only what was killed is started again."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import programs_of_faults
from own_namespaces import enter_network
from programs_of_faults import NAME, RANKS, TENSORS, ask_worker, part_of
from steps import Fault, await_file

from fleet import digests
from torchrun import free_port_pair

LONGEST = 30.0  # seconds for an answer before it counts as a hang
SETTLING = 10.0  # seconds for background threads to finish
P2P_CONNECTIONS = 2 * (RANKS - 1)  # that may come and go: one to and one from every peer

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["own_namespaces", "programs_of_faults"])
_FOR_THE_FORKSERVER = {
    "FAULTS_SMALL_SHM": "1",
    "PYTHONPATH": os.pathsep.join(sys.path),  # it does not get ``sys.path`` otherwise
    "OMP_NUM_THREADS": "1",
}


class HangError(AssertionError):
    """A rank did not answer."""


@dataclass
class Answer:
    """How a call ended on a rank: ``result``, ``error`` or ``died``."""

    kind: str
    value: Any
    when: float

    @property
    def text(self) -> str:
        return f"{self.value[0]}: {self.value[1]}" if self.kind == "error" else ""


@dataclass
class _Rank:
    process: BaseProcess
    pipe: Connection
    pid: int = field(init=False)

    def __post_init__(self) -> None:
        self.pid = int(self.process.pid or 0)


class Fleet:
    """Three server ranks, each with a worker."""

    def __init__(self) -> None:
        os.environ.update(_FOR_THE_FORKSERVER)
        self.folder = Path(tempfile.mkdtemp(prefix="faults-"))
        (self.folder / "sockets").mkdir(mode=0o700)
        self._port = free_port_pair()
        self.workers: list[BaseProcess] = [self._start_worker(rank) for rank in range(RANKS)]
        self.servers: list[_Rank] = [self._start_server(rank) for rank in range(RANKS)]
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _BrokenEngine)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.seed = 0
        self.restarts = 0
        self.warm_up()
        self.good_update()
        assert self.call(0, "resources")["shared memory"] == [], "no /dev/shm of its own"
        self.baseline = [self.resources(rank) for rank in range(RANKS)]

    # processes

    def _start_worker(self, rank: int) -> BaseProcess:
        process = _context.Process(
            target=programs_of_faults.run_worker, args=(str(self.folder), rank), daemon=True
        )
        (self.folder / f"engine-{rank}").unlink(missing_ok=True)
        process.start()
        ends = time.monotonic() + LONGEST
        while True:  # until it listens
            try:
                self.ask_worker(rank, "version")
                return process
            except OSError:
                assert time.monotonic() < ends, f"worker {rank} does not start"
                time.sleep(0.01)

    def worker_is_there(self, rank: int) -> bool:
        """Whether its process answers; the forkserver is late to say that it ended."""
        try:
            self.ask_worker(rank, "version")
        except OSError:
            self.workers[rank].join(LONGEST)
        return self.workers[rank].is_alive()

    def _start_server(self, rank: int) -> _Rank:
        ours, theirs = _context.Pipe()
        process = _context.Process(
            target=programs_of_faults.run_server,
            args=(theirs, str(self.folder), rank, RANKS, self._port),
            daemon=True,
        )
        process.start()
        theirs.close()
        server = _Rank(process, ours)
        self._receive(server)
        return server

    def kill_server(self, rank: int) -> None:
        self.note_fault()
        self.servers[rank].process.kill()
        self.servers[rank].process.join()

    def stop_server(self, rank: int) -> None:
        self.note_fault()
        os.kill(self.servers[rank].pid, signal.SIGSTOP)

    def serve_http(self, path: str) -> None:
        """The URL of an engine that misbehaves as ``path`` says; without, of one that is not up."""
        port = self._http.server_address[1] if path else closed_port()
        (self.folder / "url").write_text(f"http://127.0.0.1:{port}/{path}")

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        for process in [*(server.process for server in self.servers), *self.workers]:
            process.kill()
            process.join()
        shutil.rmtree(self.folder)

    # calls

    def send(self, rank: int, method: str, fault: Fault | None = None, **options: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.servers[rank].pipe.send((method, options, fault))

    def receive(self, rank: int, seconds: float = LONGEST) -> Answer:
        return self._receive(self.servers[rank], seconds)

    def _receive(self, server: _Rank, seconds: float = LONGEST) -> Answer:
        if not server.pipe.poll(seconds):
            raise HangError(f"no answer within {seconds:g} s")
        try:
            return Answer(*server.pipe.recv())
        except (EOFError, ConnectionResetError):
            died = time.monotonic()
            server.process.join(LONGEST)
            return Answer("died", None, died)

    def call(self, rank: int, method: str, **options: Any) -> Any:
        """On one rank; raises what it raised."""
        self.send(rank, method, **options)
        answer = self.receive(rank)
        assert answer.kind == "result", f"rank {rank}, {method}: {answer}"
        return answer.value

    def call_all(self, method: str, **options: Any) -> list[Any]:
        return self.call_on(range(RANKS), method, **options)

    def call_on(self, callers: Sequence[int], method: str, **options: Any) -> list[Any]:
        for rank in callers:
            self.send(rank, method, **options)
        answers = [self.receive(rank) for rank in callers]
        assert all(answer.kind == "result" for answer in answers), f"{method}: {answers}"
        return [answer.value for answer in answers]

    def ask_worker(self, rank: int, method: str, *args: object) -> Any:
        return ask_worker(self.folder, rank, method, *args)

    def note_fault(self) -> None:
        (self.folder / "fault").write_text(str(time.monotonic()))

    def await_fault(self) -> None:
        """Until it has struck."""
        await_file(self.folder / "fault")

    def forget_fault(self) -> None:
        for name in ("fault", "go", "awake"):
            (self.folder / name).unlink(missing_ok=True)

    def fault_time(self) -> float:
        """When the fault of this case struck, on the clock of all processes."""
        try:
            return float((self.folder / "fault").read_text())
        except FileNotFoundError:
            raise AssertionError("the fault never struck") from None

    # health

    def good_update(
        self, tensors: int = TENSORS, members: Sequence[int] = tuple(range(RANKS))
    ) -> None:
        """What must work after every fault: new weights for everybody, bit for bit.

        Args:
            tensors: of each rank.
            members: the ranks that are updated; if not all, by P2P.
        """
        self.seed += 1
        version = f"good-{self.seed}"
        self.call_all("register", seed=self.seed, tensors=tensors)
        self.call_all("gather")
        for rank in range(RANKS):
            self.ask_worker(rank, "forget")
        by_p2p = {} if len(members) == RANKS else {"ranks": list(members)}
        reports = self.call_on(members, "update", version=version, **by_p2p)
        assert [report["version"] for report in reports] == [version] * len(members)
        self.check_workers(self.seed, version, tensors, members)
        self.call_all("unregister")
        self.call_all("barrier")

    def warm_up(self) -> None:
        """What is made once is there before resources are counted: connections of P2P."""
        self.call_all("register", seed=0)
        self.call_all("gather")
        for ranks in ([0, 1], [1, 2]):
            self.call_on(ranks, "update", ranks=ranks)
        self.call_all("clear")

    def expected(self, seed: int, tensors: int = TENSORS) -> dict[str, str]:
        """What a worker holds after an update of ``seed``."""
        return {
            name: value
            for rank in range(RANKS)
            for name, value in digests(part_of(rank, seed, tensors)).items()
        }

    def check_workers(
        self,
        seed: int,
        version: str,
        tensors: int = TENSORS,
        members: Sequence[int] = tuple(range(RANKS)),
    ) -> None:
        expected = self.expected(seed, tensors)
        for rank in members:
            held = self.ask_worker(rank, "version")
            assert held == {"version": version, "state": "complete", "updating": None}
            assert self.ask_worker(rank, "digests") == expected, f"worker {rank}"

    def resources(self, rank: int) -> dict[str, Any]:
        return {
            **{f"server {what}": n for what, n in self.call(rank, "resources").items()},
            **{f"worker {what}": n for what, n in self.ask_worker(rank, "resources").items()},
        }

    def leaks(self) -> list[str]:
        """What is not as the baseline, once background threads have finished."""
        found = self._differences()
        if found:
            self.warm_up()  # a world that was met anew connects once more when it makes a group
            self.good_update()
        ends = time.monotonic() + SETTLING  # a busy machine takes that long for these two
        while found and time.monotonic() < ends:
            time.sleep(0.1)
            found = self._differences()
        return found

    def _differences(self) -> list[str]:
        return [
            f"rank {rank}, {what}: {_difference(before, now[what])}"
            for rank, baseline in enumerate(self.baseline)
            for now in [self.resources(rank)]
            for what, before in baseline.items()
            if not self._is_as_before(before, now[what])
        ]

    def _is_as_before(self, before: Any, now: Any) -> bool:
        """Mooncake opens and closes connections as it needs them, and keeps those to the dead."""
        if not isinstance(before, dict):
            return bool(now == before)
        most = before.get("P2P", 0) + P2P_CONNECTIONS + self.restarts
        return now.get("P2P", 0) <= most and {**now, "P2P": 0} == {**before, "P2P": 0}

    def wake(self) -> None:
        """Let everything that was stopped go on."""
        (self.folder / "awake").touch()
        for process in [*(server.process for server in self.servers), *self.workers]:
            if process.is_alive():
                os.kill(int(process.pid or 0), signal.SIGCONT)

    def repair(self) -> list[int]:
        """Start again what has died; returns the ranks of these processes."""
        for rank in range(RANKS):
            if not self.worker_is_there(rank):
                self.workers[rank] = self._start_worker(rank)
        dead = [rank for rank in range(RANKS) if not _is_alive(self.servers[rank])]
        for rank in dead:
            self.servers[rank].pipe.close()
            self.servers[rank] = self._start_server(rank)
            self.restarts += 1
        if dead:
            self._reunite(dead)
        return dead

    def _reunite(self, started: list[int]) -> None:
        """A rank that took another one's place calls first, so that the others see it."""
        others = [rank for rank in range(RANKS) if rank not in started]
        for rank in started:
            self.send(rank, "barrier")
        ends = time.monotonic() + LONGEST
        if 0 in started:
            self._try_until_it_works(others, "barrier", ends)
        else:
            while any(self.call(rank, "gone") for rank in others):
                assert time.monotonic() < ends
                time.sleep(0.01)
            for rank in others:
                self.send(rank, "barrier")
            for rank in others:
                assert self.receive(rank).kind == "result"
        for rank in started:
            assert self.receive(rank).kind == "result"

    def _try_until_it_works(self, ranks: list[int], method: str, ends: float) -> None:
        """Each calls again where rank 0 was not there yet; they meet in one call."""
        for rank in ranks:
            self.send(rank, method)
        waiting = list(ranks)
        while waiting:
            assert time.monotonic() < ends, f"ranks {waiting} do not find rank 0"
            for rank in [r for r in waiting if self.servers[r].pipe.poll(0.01)]:
                if self.receive(rank).kind == "result":
                    waiting.remove(rank)
                else:
                    self.send(rank, method)

    def settle_baseline(self, started: list[int]) -> None:
        """New processes have a baseline of their own."""
        for rank in started:
            self.baseline[rank] = self.resources(rank)


class _BrokenEngine(BaseHTTPRequestHandler):
    """An engine's HTTP side, which answers as the path says."""

    def do_POST(self) -> None:
        if self.path.startswith("/slow"):
            time.sleep(4.0)
        if self.path.startswith("/cut"):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nbut")
            return
        self.send_error(500, explain="the engine is broken")

    def log_message(self, *args: object) -> None:
        """Quietly."""


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict):
        kinds = [kind for kind in {**before, **now} if before.get(kind) != now.get(kind)]
        before = {kind: before.get(kind, 0) for kind in kinds}
        now = {kind: now.get(kind, 0) for kind in kinds}
    return f"{before} before, {now} now"


def _is_alive(server: _Rank) -> bool:
    server.process.join(0)
    return server.process.is_alive()


class Fleets:
    """One fleet for all cases, and a new one after a case that broke it. In a network of their
    own, which this thread stays in."""

    def __init__(self) -> None:
        enter_network()
        self._fleet: Fleet | None = None

    def get(self) -> Fleet:
        if self._fleet is None:
            self._fleet = Fleet()
        return self._fleet

    def drop(self) -> None:
        if self._fleet is not None:
            self._fleet.close()
            self._fleet = None


def closed_port() -> int:
    """Nobody listens there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


__all__ = ["NAME", "RANKS", "Answer", "Fleet", "Fleets", "HangError", "closed_port"]
