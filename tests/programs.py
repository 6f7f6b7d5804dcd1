"""Programs that the update tests start under torchrun: ``programs.py NAME ARGUMENTS
OUTPUT_FOLDER``.

Each runs on every rank and writes what it saw to ``OUTPUT_FOLDER/<rank>.json``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.world.metas_file import decode_metas, encode_metas
from fleet import Worker, digests, left_segments, mixed_tensors, request_of

RANK = int(os.environ.get("RANK", "0"))
os.environ.setdefault("NCCL_HOSTID", f"rank-{RANK}")  # several NCCL ranks on one GPU
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
SHORT = timedelta(seconds=40)


class Rank:
    """A server rank with its worker."""

    def __init__(self, **server_options: Any) -> None:
        torch.set_num_threads(1)
        self.worker = Worker(device_index=0)
        self._spare = Worker(device_index=0)  # forked now: not once this process has a GPU
        self.ps = ParameterServer(**server_options)

    def replace_worker(self) -> None:
        """The engine restarts, once. The old one's descriptors stay, so that they can be
        counted."""
        self.worker, self._spare = self._spare, self.worker

    def stop(self) -> None:
        self.worker.stop()
        self._spare.stop()

    def publish(self, name: str, seed: int, owners: set[int]) -> None:
        tensors = mixed_tensors(seed, RANK) if RANK in owners else {}
        self.ps.register_checkpoint(name, named_tensors=tensors)
        self.ps.gather_metas(name)

    def update(
        self, name: str, fault: str = "", timeout: timedelta = SHORT, **options: Any
    ) -> dict[str, Any]:
        request = request_of(self.worker, RANK, fault)
        return self.ps.update(name, request, timeout=timeout, **options).model_dump()

    def check(self, seed: int, owners: set[int]) -> None:
        """The worker holds exactly what all owners sent."""
        expected: dict[str, str] = {}
        for owner in sorted(owners):
            expected |= digests(mixed_tensors(seed, owner))
        received = self.worker.call("digests")
        assert received == expected, sorted(
            name for name in expected if received.get(name) != expected[name]
        )

    def resources(self) -> dict[str, Any]:
        """What an update must not leave behind."""
        folder = Path(os.environ["PS_IPC_DIR"])
        return {
            "files": sorted(_open_files()),
            "sockets": len(list(folder.iterdir())),
            "shared": left_segments(),
        }


def _settled(rank: Rank, before: dict[str, Any]) -> dict[str, Any]:
    """What is there once background threads have finished."""
    ends = time.monotonic() + 5
    while (after := rank.resources()) != before and time.monotonic() < ends:
        time.sleep(0.02)
    return after


def _open_files() -> list[str]:
    """Without what is another for each new group, pipe or socket."""
    files = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # another thread closed it meanwhile
            target = os.readlink(f"/proc/self/fd/{fd}")
            files.append(re.sub(r"(?<=^/dev/shm/nccl-).*|:.*", "", target))
    return files


def updates(steps: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """One update after the other on the same servers, each of another checkpoint."""
    rank = Rank(**options)
    reports = []
    for step in steps:
        seed, owners = step["seed"], set(step.get("owners", range(WORLD_SIZE)))
        os.environ.update(step.get("env", {}))
        rank.worker.call("forget")
        rank.publish(f"step-{seed}", seed, owners)
        reports.append(rank.update(f"step-{seed}", compare_ranks=step.get("compare", False)))
        rank.check(seed, owners)
        rank.ps.unregister_checkpoint(f"step-{seed}")
    hooks = rank.worker.call("hooks")
    rank.stop()
    return {"reports": reports, "hooks": hooks, **rank.resources()}


def traced(folder: str, version: str) -> dict[str, Any]:
    """Two updates of the same version, of which the last rank wants a trace."""
    rank = Rank()
    rank.publish("step-1", 1, set(range(WORLD_SIZE)))
    trace = folder if RANK == WORLD_SIZE - 1 else None
    ask = request_of(rank.worker, RANK, "")
    reports = [rank.ps.update("step-1", ask, version=version, trace=trace) for _ in range(2)]
    rank.stop()
    return {"traces": [report.trace for report in reports]}


def faults(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Each fault ends the update on every rank with one error; the next update works."""
    rank = Rank()
    owners = set(range(WORLD_SIZE))
    rank.publish("good", 1, owners)
    rank.update("good")  # what is made once is there before resources are counted
    rank.ps.store_based_barrier()
    before = rank.resources()
    rank.ps.store_based_barrier()
    seen = []
    for case in cases:
        mine = case["fault"] if case["rank"] == RANK else ""
        began = time.monotonic()
        seen.append(_error_of(lambda mine=mine: rank.update("good", mine)))
        seen[-1]["seconds"] = time.monotonic() - began
        if mine.startswith("die"):
            rank.replace_worker()
        rank.worker.call("forget")
        rank.update("good")
        rank.check(1, owners)
        rank.ps.store_based_barrier()
        after = _settled(rank, before)
        seen[-1]["leaked"] = [(k, before[k], after[k]) for k in before if after[k] != before[k]]
        rank.ps.store_based_barrier()
    rank.stop()
    return {"seen": seen}


def instances(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Updates that go on without the engines that fail; two ranks to an instance, or one."""
    rank = Rank()
    owners = set(range(WORLD_SIZE))
    rank.publish("good", 1, owners)
    seen = []
    for number, case in enumerate(cases):
        mine = case["fault"] if case["rank"] == RANK else ""
        rank.worker.call("forget")

        def ask(paths: list[tuple[str, str]], mine: str = mine, case: Any = case) -> None:
            if mine == "refuse":
                raise ConnectionError("the engine is not up")
            if case.get("unreached") == RANK:
                return
            rank.worker.call("update", paths[RANK][1], mine)

        ask.instance = f"engine {RANK // case['size']}"  # type: ignore[attr-defined]
        one = _error_of(
            lambda ask=ask, number=number: seen.append(
                rank.ps.update(
                    "good",
                    ask,
                    timeout=SHORT,
                    version=f"version-{number}",
                    on_instance_failure="continue",
                ).model_dump()
            )
        )
        if one["error"]:
            seen.append(one)
        seen[-1]["holds"] = rank.worker.call("version")
        if seen[-1]["holds"]["version"] == f"version-{number}":
            rank.check(1, owners)
        rank.ps.store_based_barrier()
    rank.worker.call("forget")
    report = rank.update("good")
    rank.check(1, owners)
    held = rank.worker.call("version")
    assert held == {"version": report["version"], "state": "complete", "updating": None}
    rank.stop()
    return {"seen": seen, **rank.resources()}


def bad_calls() -> dict[str, Any]:
    """Mistakes of the caller, in turn on the same servers."""
    rank = Rank()
    ps = rank.ps
    ps._p2p_store = None  # as programs do that switch it off
    owners = set(range(WORLD_SIZE))
    seen = {
        "gather before register": _error_of(lambda: ps.gather_metas("nothing")),
        "update before gather": _error_of(lambda: rank.update("nothing")),
        "ranks without P2P": _error_of(lambda: ps.update("x", print, ranks=[0])),
    }
    rank.publish("good", 3, owners)
    seen["unknown checkpoint"] = _error_of(lambda: rank.update("other"))
    seen["req_func raises"] = _error_of(lambda: ps.update("good", _refuse, timeout=SHORT))
    seen["nobody connects"] = _error_of(
        lambda: ps.update("good", lambda _: None, timeout=timedelta(seconds=2))
    )
    seen["one rank stays away"] = {"error": "", "type": ""}
    if RANK > 0 or WORLD_SIZE == 1:
        short = timedelta(seconds=1)
        seen["one rank stays away"] = _error_of(lambda: rank.update("good", timeout=short))
        seen["one rank stays away"]["seconds"] = 0.0
    _gather_point("stayed away")
    os.environ["PS_MEM_FRACTION"] = "1e-9"
    tight = _error_of(lambda: _update_with_little_memory(rank))
    del os.environ["PS_MEM_FRACTION"]
    seen["memory too small"] = tight
    ps.unregister_checkpoint("good")
    ps.register_checkpoint("good", named_tensors={})
    seen["changed since gather"] = _error_of(lambda: rank.update("good"))
    ps.unregister_checkpoint("good")
    rank.publish("good", 4, owners)
    rank.worker.call("forget")
    rank.update("good")
    rank.check(4, owners)
    rank.stop()
    return {"seen": seen, **rank.resources()}


def _update_with_little_memory(rank: Rank) -> None:
    kept = rank.ps._server
    rank.ps._server = replace(kept, here=replace(kept.here, mem_fraction=1e-9))
    try:
        rank.update("good")
    finally:
        rank.ps._server = kept


def _gather_point(name: str) -> None:
    """All ranks meet here, by a way that the code under test has no part in."""
    folder = Path(os.environ["PS_IPC_DIR"]).parent / name
    folder.mkdir(exist_ok=True)
    (folder / str(RANK)).touch()
    while len(list(folder.iterdir())) < WORLD_SIZE:
        time.sleep(0.01)


def _refuse(socket_paths: list[tuple[str, str]]) -> None:
    if RANK == WORLD_SIZE - 1:
        raise ConnectionError("engine at http://nowhere is not up")


def process_groups() -> dict[str, Any]:
    """``auto_pg`` in its three forms: what is there before, within and after."""
    seen: dict[str, Any] = {}
    worker = Worker(device_index=0)
    for auto_pg in (True, None, False):
        ps = ParameterServer(auto_pg=auto_pg)
        ps.register_checkpoint("c", named_tensors=mixed_tensors(5, RANK))
        ps.gather_metas("c")
        seen[f"{auto_pg} gathered"] = dist.is_initialized()
        for explicit in (False, True):
            if explicit:
                ps.init_process_group()
            if dist.is_initialized():
                dist.barrier()
            ps.update("c", request_of(worker, RANK), timeout=SHORT)
            seen[f"{auto_pg} {explicit}"] = dist.is_initialized()
        if dist.is_initialized():
            dist.destroy_process_group()
    dist.init_process_group("gloo" if not torch.cuda.is_available() else "nccl")
    for auto_pg in (True, None, False):
        ps = ParameterServer(auto_pg=auto_pg)
        ps.register_checkpoint("c", named_tensors=mixed_tensors(6, RANK))
        ps.gather_metas("c")
        ps.update("c", request_of(worker, RANK), timeout=SHORT)
        seen[f"{auto_pg} callers"] = dist.is_initialized()
    dist.destroy_process_group()
    worker.stop()
    return seen


def transports() -> list[bool]:
    """Whether gloo was used: never, where one rank wants it, where all do."""
    worker, used = Worker(device_index=0), []
    for on in ((), (0,), range(WORLD_SIZE)):
        os.environ["PS_CPU_TRANSPORT"] = "gloo" if RANK in on else "shared-memory"
        ps = ParameterServer(auto_pg=False)  # keeps what it made
        ps.register_checkpoint("c", named_tensors=mixed_tensors(7, RANK))
        ps.gather_metas("c")
        worker.call("forget")
        ps.update("c", request_of(worker, RANK), timeout=SHORT)
        assert len(worker.call("digests")) == WORLD_SIZE * len(mixed_tensors(7, RANK))
        used.append(ps._server.ways[-1]._group is not None)
    worker.stop()
    return used


def p2p(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Updates of some ranks by P2P; the others call too, unless the step says not."""
    rank = Rank()
    owners = set(range(WORLD_SIZE))
    rank.publish("good", 1, owners)
    seen, ways = [], []
    for step in steps:
        members = step["ranks"]
        os.environ.update(step.get("env", {}))
        rank.worker.call("forget")
        if RANK in members or step.get("all_call", True):
            request = request_of(rank.worker, RANK)
            report = rank.ps.update("good", request, ranks=members, timeout=SHORT)
            seen.append(report.buckets)
        if RANK in members:
            ways.append(report.way)
            rank.check(1, owners)
        else:
            assert rank.worker.call("digests") == {}
        rank.ps.store_based_barrier()
    rank.worker.call("forget")
    rank.update("good")
    rank.check(1, owners)
    rank.stop()
    return {"seen": seen, "ways": ways, **rank.resources()}


def source(folder: str, changes: list[str]) -> dict[str, Any]:
    """A world whose memory others read: it goes on with updates of its own, then changes things.

    ``changes`` are made one by one, each when a file ``want-<n>`` appears.
    """
    rank, here = Rank(), Path(folder)
    owners = set(range(WORLD_SIZE))
    pool = "pool" in "".join(changes)
    tensors = mixed_tensors(1, RANK)
    rank.ps.register_checkpoint("good", named_tensors=tensors, use_shared_memory_pool=pool)
    rank.ps.gather_metas("good")
    (here / f"pid-{RANK}").write_text(str(os.getpid()))
    _save_metas(rank, here / "metas.json")
    updates = 0
    for number, change in enumerate(changes):
        while not _all_see(rank, here / f"want-{number}"):
            rank.worker.call("forget")
            rank.update("good")
            rank.check(1, owners)
            updates += 1
        if change == "die":
            _die(here, number)
        _change(rank, change)
        rank.ps.store_based_barrier()
        if RANK == 0:
            (here / f"done-{number}").touch()
    _await_file(here / "finished")
    rank.stop()
    return {"updates": updates, **rank.resources()}


def _all_see(rank: Rank, file: Path) -> bool:
    """Whether it was there when rank 0 looked; the same answer on every rank."""
    with rank.ps._control.call("look", 30) as call:
        return call.all_gather("seen", b"1" if file.exists() else b"0")[0] == b"1"


def _save_metas(rank: Rank, path: Path) -> None:
    if RANK == 0:
        path.with_suffix(".new").write_bytes(encode_metas(rank.ps.get_metas()))
        path.with_suffix(".new").rename(path)


def _change(rank: Rank, change: str) -> None:
    if change in ("unregister", "replace"):
        rank.ps.unregister_checkpoint("good")
    if change == "replace":
        rank.ps.register_checkpoint("good", named_tensors=mixed_tensors(2, RANK))
    if change == "reuse pool":
        rank.ps.unregister_checkpoint("good")
        rank.ps.register_checkpoint(
            "next", named_tensors=mixed_tensors(2, RANK), use_shared_memory_pool=True
        )


def _die(here: Path, number: int) -> None:
    if RANK == 0:
        _await(lambda: not any(_lives(here / f"pid-{other}") for other in range(1, WORLD_SIZE)))
        (here / f"done-{number}").touch()
    os._exit(0)


def joiner(folder: str, sources: int, changes: list[str]) -> dict[str, Any]:
    """A world that takes its weights from a source's memory: before a change, while it is made
    between two buckets, and after it."""
    rank, here = Rank(), Path(folder)
    _await_file(here / "metas.json")
    rank.ps.gather_metas("good")
    rank.ps.load_metas(decode_metas((here / "metas.json").read_bytes()))
    everyone = list(range(WORLD_SIZE))
    request = request_of(rank.worker, RANK)
    buckets, ways = [], []
    for members in (everyone, [WORLD_SIZE - 1]):
        rank.worker.call("forget")
        report = rank.ps.update("good", request, ranks=members, timeout=SHORT)
        buckets.append(report.buckets)
        ways += [report.way] if RANK in members else []
        if RANK in members:
            rank.check(1, set(range(sources)))
    seen = []
    for number in range(len(changes)):
        rank.ps.store_based_barrier()
        meet = f"meet:1:{here}:{number}" if RANK == 0 else ""
        for ask in (request_of(rank.worker, RANK, meet), request):
            seen.append(
                _error_of(lambda a=ask: rank.ps.update("good", a, ranks=everyone, timeout=SHORT))
            )
    rank.ps.store_based_barrier()
    (here / "finished").touch()
    rank.stop()
    return {"seen": seen, "buckets": buckets, "ways": ways, **rank.resources()}


def _lives(pid_file: Path) -> bool:
    stat = Path(f"/proc/{pid_file.read_text()}/stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"


def _await_file(path: Path) -> None:
    _await(path.exists)


def _await(happened: Callable[[], bool]) -> None:
    ends = time.monotonic() + 40
    while not happened():
        if time.monotonic() > ends:
            raise TimeoutError("the other world did not go on")
        time.sleep(0.01)


def _error_of(call: Callable[[], object]) -> dict[str, Any]:
    began = time.monotonic()
    try:
        call()
    except Exception as error:
        seconds = time.monotonic() - began
        trace = getattr(error, "trace", None)
        name = type(error).__name__
        return {"error": str(error), "type": name, "seconds": seconds, "trace": trace}
    return {"error": "", "type": "", "seconds": time.monotonic() - began}


PROGRAMS = {
    f.__name__: f
    for f in (
        updates,
        traced,
        faults,
        instances,
        bad_calls,
        process_groups,
        transports,
        p2p,
        source,
        joiner,
    )
}

if __name__ == "__main__":
    name, arguments, folder = sys.argv[1:]
    result = PROGRAMS[name](**json.loads(arguments))
    (Path(folder) / f"{RANK}.json").write_text(json.dumps(result))
