"""Two ranks of one host, each with a device, and a worker on it: processes that live through every
way to be served, and through what kills or stops one of them in the middle of reads from a peer.

On two GPUs, and the same on the cpu device.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from fleet import digest, digests, left_segments
from foreign import receive as receive_as
from torchrun import forkserver, free_port_pair

RANKS = 2
COUNT = 24  # tensors of a rank, of which two fill a bucket
MIDDLE = COUNT // 2
SIZES = {"cpu": 1 << 16, "cuda": 1 << 24}  # bytes of a tensor
LONG, SHORT = 60.0, 5.0  # seconds
NOTICED = 2.0  # seconds until the others have an error when a process dies
FORGIVEN = 48 << 20  # bytes of a device that may be a cache's; less than a rank's staging

pytestmark = [pytest.mark.alone, pytest.mark.timeout(170)]


def tensors_of(owner: int, seed: int, nbytes: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * seed + owner)
    tensors = {}
    for i in range(COUNT):
        bits = torch.empty(nbytes // 8, dtype=torch.int64).random_(generator=generator)
        tensors[f"of.{owner}.{i}"] = bits.view(torch.int16).view(nbytes // 4096, 2048)
    return tensors


class Model(torch.nn.Module):
    """Keeps a half of the rows of every tensor, as a worker of a tensor-parallel engine."""

    def __init__(self, rank: int, device: str) -> None:
        super().__init__()
        self.rank = rank
        rows = SIZES[device.partition(":")[0]] // 4096
        self.kept = torch.nn.ParameterDict(
            {
                f"of_{owner}_{i}": torch.nn.Parameter(
                    torch.zeros(rows // 2, 2048, dtype=torch.int16, device=device),
                    requires_grad=False,
                )
                for owner in range(RANKS)
                for i in range(COUNT)
            }
        )

    def load_weights(self, weights: Any) -> None:
        for name, tensor in weights:
            self.kept[name.replace(".", "_")].copy_(half_of(tensor, self.rank))


def half_of(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    rows = tensor.shape[0] // 2
    return tensor.narrow(0, rank * rows, rows)


# ---------------------------------------------------------------------- what the processes do


class Engine:
    """A worker: loads plainly, or with a loader that is learned, or as one of another library."""

    def __init__(self, rank: int, device: str, sees_all: bool) -> None:
        from checkpoint_engine.replay import replayed

        if device == "cuda" and not sees_all:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(rank)
        self._index = None if device == "cpu" else rank if sees_all else 0
        on = device if self._index is None else f"{device}:{self._index}"
        if self._index is not None:
            torch.cuda.set_device(self._index)
        self._model = Model(rank, on)
        self._replayed = lambda: replayed(self._model.load_weights, self._model)
        self._foreign: dict[str, str] | None = None

    def update(self, address: str, how: str, victim: tuple[int, int] | None) -> str:
        """Returns how its loader was called. ``victim``: the process, and the signal, which it gets
        as soon as the reads of a bucket in the middle are under way."""
        from checkpoint_engine.worker import update_weights_from_ipc

        self._foreign = None
        if how == "foreign":
            self._foreign = receive_as(None, address, "0.4", "")["digests"]  # type: ignore[arg-type]
            return how
        loader = self._replayed() if how == "learned" else self._model.load_weights
        if victim is not None:
            loader.replay = striking(loader.replay, *victim)
        with zmq.Context() as context:
            update_weights_from_ipc(context, address, self._index, run=loader)
        return str(getattr(loader, "report", {}).get("loaded", "plain"))

    def digests(self) -> dict[str, str]:
        if self._foreign is not None:
            return self._foreign
        return digests({name.replace("_", "."): one for name, one in self._model.kept.items()})


def striking(replay: Any, pid: int, number: int) -> Any:
    buckets = 0

    def strike(*args: Any, **kwargs: Any) -> None:
        nonlocal buckets
        replay(*args, **kwargs)
        buckets += 1
        if buckets == MIDDLE:
            os.kill(pid, number)

    return strike


class Server:
    """A server rank."""

    def __init__(self, rank: int, device: str, port: int, worker: str) -> None:
        from checkpoint_engine.ps import ParameterServer

        os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(RANKS))
        self._rank, self._device, self._worker = rank, device, worker
        self._ps = ParameterServer(
            auto_pg=True, rank=rank, world_size=RANKS, master_addr="127.0.0.1", master_port=port
        )

    def publish(self, seed: int) -> None:
        with contextlib.suppress(Exception):
            self._ps.unregister_checkpoint("weights")
        owned = tensors_of(self._rank, seed, SIZES[self._device])
        self._ps.register_checkpoint("weights", named_tensors=owned)
        self._ps.gather_metas("weights", timeout=timedelta(seconds=LONG))

    def update(self, ask: tuple[Any, ...], seconds: float, env: dict[str, str]) -> dict[str, str]:
        """``ask``: as of ``Engine.update``."""
        told: list[str] = []

        def request(paths: list[tuple[str, str]]) -> None:
            told.append(call(self._worker, "update", paths[self._rank][1], *ask))

        os.environ.update(env)
        try:
            report = self._ps.update("weights", request, timeout=timedelta(seconds=seconds))
        finally:
            for name in env:
                del os.environ[name]
        return {"way": report.way, "why": report.way_reason, "worker": told[0]}

    def release_groups(self) -> None:
        self._ps.release_groups()

    def free(self) -> int:
        """Bytes of the rank's device."""
        return torch.cuda.mem_get_info(self._rank)[0] if self._device == "cuda" else 0


def call(address: str, method: str, *args: Any) -> Any:
    """Have another process do something. Raises what it raised, as text."""
    with Client(address) as pipe:
        pipe.send((method, args))
        try:
            result, error = pipe.recv()
        except (EOFError, ConnectionResetError):
            raise RuntimeError("the process died") from None
    if error:
        raise RuntimeError(error)
    return result


def serve(address: str, device: str, make: Any, args: tuple[Any, ...]) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: do not outlive the test
    torch.set_num_threads(1)
    os.environ["PS_IPC_DIR"] = str(Path(address).parent / "sockets")
    os.environ["PS_MAX_BUCKET_SIZE_GB"] = str(2 * SIZES[device] / 2**30)
    if device == "cpu":
        os.environ["PS_DEVICE"] = device
    made = make(*args)
    with Listener(address) as listener:
        while True:
            with listener.accept() as pipe:
                method, arguments = pipe.recv()
                try:
                    answer = getattr(made, method)(*arguments), ""
                except Exception as error:
                    answer = None, f"{type(error).__name__}: {error}"
                with contextlib.suppress(BrokenPipeError):  # who asked may be dead
                    pipe.send(answer)


# ---------------------------------------------------------------------- the host


class Host:
    """Servers and workers; what died is started again."""

    def __init__(self, device: str, folder: Path) -> None:
        self._device, self._folder, self._port = device, folder, free_port_pair()
        (folder / "sockets").mkdir(mode=0o700)
        self._processes: dict[str, Any] = {}
        self._pool = ThreadPoolExecutor(RANKS)
        self._seed = 0
        self.sees_all = True
        self.repair()

    def repair(self) -> None:
        for rank in range(RANKS):
            self._start(f"worker-{rank}", Engine, rank, self._device, self.sees_all)
        for rank in range(RANKS):
            worker = str(self._folder / f"worker-{rank}")
            self._start(f"server-{rank}", Server, rank, self._device, self._port, worker)

    def _start(self, name: str, make: Any, *args: Any) -> None:
        if (process := self._processes.get(name)) is not None and process.is_alive():
            return
        address = self._folder / name
        address.unlink(missing_ok=True)
        process = forkserver().Process(
            target=serve, args=(str(address), self._device, make, args), daemon=True
        )
        process.start()
        self._processes[name] = process
        ends = time.monotonic() + LONG
        while not address.exists():
            assert process.is_alive(), f"{name} does not start"
            assert time.monotonic() < ends
            time.sleep(0.01)

    def stop_workers(self) -> None:
        for rank in range(RANKS):
            self._kill(f"worker-{rank}")

    def _kill(self, name: str) -> None:
        self._processes[name].kill()
        self._processes[name].join()

    def close(self) -> None:
        for name in self._processes:
            self._kill(name)
        self._pool.shutdown()

    def pid(self, name: str) -> int:
        return int(self._processes[name].pid)

    def _ask(self, name: str, method: str, *args: Any) -> Any:
        return call(str(self._folder / name), method, *args)

    def _on_all(self, method: str, *args: Any) -> list[Any]:
        asked = [self._pool.submit(self._ask, f"server-{r}", method, *args) for r in range(RANKS)]
        return [one.result(LONG) for one in asked]

    def free(self) -> list[int]:
        return self._on_all("free")

    def release_groups(self) -> None:
        self._on_all("release_groups")

    def good_update(self, *hows: str, **env: str) -> list[dict[str, str]]:
        """What each rank says of an update of new weights, which arrive bit for bit. ``hows``: of
        each worker; ``env``: of the servers."""
        self._seed += 1
        self._on_all("publish", self._seed)
        reports = [one.result() for one in self._update([(how, None) for how in hows], LONG, env)]
        for rank, how in enumerate(hows):
            expected = {
                name: digest(tensor if how == "foreign" else half_of(tensor, rank))
                for owner in range(RANKS)
                for name, tensor in tensors_of(owner, self._seed, SIZES[self._device]).items()
            }
            assert self._ask(f"worker-{rank}", "digests") == expected
        return reports

    def until_replayed(self) -> list[dict[str, str]]:
        for _ in range(4):
            reports = self.good_update("learned", "learned")
        assert [one["worker"] for one in reports] == ["replayed"] * RANKS
        assert [one["way"] for one in reports] == ["peers"] * RANKS
        return reports

    def broken_update(self, victim: str, number: int) -> tuple[list[str], float]:
        """The errors of both ranks of an update in which a process of rank 1's dies or stops, and
        the seconds until rank 0 has its own."""
        strikes = [("learned", None), ("learned", (self.pid(victim), number))]
        began = time.monotonic()
        asked = self._update(strikes, SHORT, {})
        first = str(asked[0].exception(LONG))
        seconds = time.monotonic() - began
        for process in self._processes.values():
            if process.is_alive():
                os.kill(process.pid, signal.SIGCONT)
        return [first, str(asked[1].exception(LONG))], seconds

    def _update(self, asks: list[Any], seconds: float, env: dict[str, str]) -> list[Future[Any]]:
        return [
            self._pool.submit(self._ask, f"server-{rank}", "update", ask, seconds, env)
            for rank, ask in enumerate(asks)
        ]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    device = request.param
    if device == "cuda" and torch.cuda.device_count() < RANKS:
        pytest.skip(f"needs {RANKS} CUDA devices")
    with tempfile.TemporaryDirectory(prefix="gpus-") as folder:
        host = Host(device, Path(folder))
        try:
            yield host
        finally:
            host.close()


def test_a_learned_worker_reads_what_it_needs_from_every_rank(host: Host) -> None:
    assert [one["why"] for one in host.until_replayed()] == [""] * RANKS


def test_a_plain_loader_gets_everything(host: Host) -> None:
    reports = host.good_update("plain", "plain")
    assert [(one["way"], one["worker"]) for one in reports] == [("peers", "plain")] * RANKS


def test_a_worker_of_another_library_is_served_by_its_own_rank(host: Host) -> None:
    with pytest.raises(RuntimeError, match="update again"):  # its rank expected one of ours
        host.good_update("learned", "foreign")
    ours, theirs = host.good_update("learned", "foreign")
    assert (ours["way"], ours["why"]) == ("peers", "")
    assert theirs["way"] == "peers"
    assert "of another release or library" in theirs["why"]


def test_a_group_that_is_wanted_is_kept_until_it_is_released(host: Host) -> None:
    for _ in range(2):
        reports = host.good_update("learned", "learned", PS_PEERS="0")
        assert [one["way"] for one in reports] == ["broadcast"] * RANKS
        assert all("PS_PEERS" in one["why"] or "share no memory" in one["why"] for one in reports)
    host.release_groups()
    reports = host.good_update("learned", "learned")
    assert [one["way"] for one in reports] == ["peers"] * RANKS


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", ["worker-1", "server-1"])
def test_what_dies_or_stops_in_the_middle_of_reads_leaves_nothing(
    host: Host, victim: str, number: signal.Signals
) -> None:
    assert [one["why"] for one in host.until_replayed()] == [""] * RANKS
    before = host.free()
    errors, seconds = host.broken_update(victim, number)
    if number == signal.SIGKILL:
        assert seconds < NOTICED
    else:
        assert SHORT <= seconds < SHORT + NOTICED
    assert "rank 1" in errors[0], errors
    assert errors[1] != "None"
    host.repair()
    assert [one["why"] for one in host.until_replayed()] == [""] * RANKS
    assert left_segments() == []
    for then, now in zip(before, host.free(), strict=True):
        assert then - now < FORGIVEN


def test_workers_that_see_only_their_own_device(host: Host) -> None:
    host.stop_workers()
    host.sees_all = False
    host.repair()
    reports = host.until_replayed()
    assert all(not one["why"] or "cannot map" in one["why"] for one in reports)
