"""What the tests of sharded updates start on every rank: a server rank, and a worker of the mini
engine's model in a process of its own.

``shard_programs.py NAME ARGUMENTS OUTPUT_FOLDER``
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

from checkpoint_engine.errors import UpdateError  # noqa: E402
from checkpoint_engine.ground.deadline import Deadline, cancellable  # noqa: E402
from checkpoint_engine.planning import shards  # noqa: E402
from checkpoint_engine.ps import ParameterServer  # noqa: E402
from checkpoint_engine.transfer.remote_loader import RemoteLoader  # noqa: E402
from checkpoint_engine.worker import VllmColocateWorkerExtension  # noqa: E402
from checkpoint_engine.world.metas_file import decode_metas, encode_metas  # noqa: E402
from engines import Workers  # noqa: E402
from fleet import left_segments  # noqa: E402
from parallel_layers import RowParallelLinear, TensorParallel  # noqa: E402
from random_checkpoint import tensor_shapes  # noqa: E402
from tiny_transformer import CausalLM, ModelConfig, new_model  # noqa: E402

RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
EACH = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
SHORT = timedelta(seconds=40)
LONG = timedelta(seconds=80)  # Mooncake gives a silent connection 30 s

CONFIG: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 17408,  # at TP 4 a row of its slice takes 8,704 bytes
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
SHAPES = tensor_shapes(CONFIG)


def weights(seed: int) -> dict[str, torch.Tensor]:
    """The whole checkpoint, the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(0, 1 << 14, shape, dtype=torch.int16, generator=generator).view(
            torch.bfloat16
        )
        for name, shape in SHAPES.items()
    }


def foreign_bytes() -> int:
    """All that the ranks of other hosts own."""
    return sum(
        2 * torch.Size(shape).numel()
        for place, shape in enumerate(SHAPES.values())
        if place % WORLD_SIZE // EACH != RANK // EACH
    )


def needed_bytes(tp: int, owners: int = WORLD_SIZE) -> int:
    """What the workers of this host read of what its ranks do not own, by the rules of the layers:
    norms in full, of all other tensors the shares of the host's tensor-parallel ranks. The first
    ``owners`` ranks own everything."""
    here = [rank for rank in range(WORLD_SIZE) if rank // EACH == RANK // EACH]
    shares = len({rank % tp for rank in here})
    return sum(
        2 * torch.Size(shape).numel() * (tp if name.endswith("norm.weight") else shares) // tp
        for place, (name, shape) in enumerate(SHAPES.items())
        if place % owners not in here
    )


class MiniWorker(VllmColocateWorkerExtension):
    """Rank ``rank`` of ``tp`` that share the model; it need not be run."""

    def __init__(self, rank: int, tp: int, local_rank: int) -> None:
        self.device = torch.device("cpu")
        self.local_rank = local_rank
        self._place = rank, tp
        self.model_runner = SimpleNamespace(model=self._fresh())

    def _fresh(self) -> CausalLM:
        config = ModelConfig(**CONFIG, qkv_bias=True, dtype=torch.bfloat16)
        return new_model(config, TensorParallel(*self._place), self.device)

    def is_right(self, seed: int) -> bool:
        """Compared with a model that is loaded without any server."""
        plain = self._fresh()
        plain.load_weights(list(weights(seed).items()))
        return digests(plain) == digests(self.model_runner.model)

    def clear(self) -> None:
        for parameter in self.model_runner.model.parameters():
            parameter.data.zero_()


def digests(model: CausalLM) -> dict[str, str]:
    return {
        name: hashlib.sha256(one.data.contiguous().view(torch.uint8).numpy()).hexdigest()
        for name, one in model.named_parameters()
    }


def received_bytes() -> int:
    """By this host's network interface."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        if line.strip().startswith("eth0:"):
            return int(line.split(":")[1].split()[0])
    return 0


class Rank:
    def __init__(self, tp: int) -> None:
        torch.set_num_threads(1)
        local = RANK % EACH

        def make(_: int) -> MiniWorker:
            return MiniWorker(RANK % tp, tp, local)

        self.make = make
        self.owners = WORLD_SIZE
        self.copies_last = False
        self.workers = Workers(make, 1)
        self.ps = ParameterServer()

    def share_of(self, seed: int) -> dict[str, torch.Tensor]:
        """What this rank owns, where the first ``owners`` ranks own everything. ``copies_last``:
        rank 0 also has what the last of them owns."""
        mine = {RANK, self.owners - 1} if self.copies_last and RANK == 0 else {RANK}
        return {
            one: tensor
            for place, (one, tensor) in enumerate(weights(seed).items())
            if place % self.owners in mine
        }

    def register(self, seed: int) -> str:
        """This rank's share of the checkpoint."""
        name = f"step-{seed}"
        if self.owners > RANK:
            self.ps.register_checkpoint(name, named_tensors=self.share_of(seed))
        self.ps.gather_metas(name, timeout=SHORT)
        return name

    def ask(self, paths: list[tuple[str, str]]) -> None:
        self.workers.call("update_weights_from_ipc", dict(paths))

    def update(self, seed: int) -> dict[str, Any]:
        name = self.register(seed)
        self.workers.call("clear")
        self.ps.store_based_barrier()
        before = received_bytes()
        report = self.ps.update(name, self.ask, timeout=SHORT)
        self.ps.store_based_barrier()
        received = received_bytes() - before
        (right,) = self.workers.call("is_right", seed)
        if self.owners > RANK:
            self.ps.unregister_checkpoint(name)
        return _seen(report, right, received)

    def update_rest(self, name: str, seed: int) -> dict[str, Any]:
        """Without the last rank. Nothing is gathered."""
        self.workers.call("clear")
        before = received_bytes()
        rest = list(range(WORLD_SIZE - 1))
        report = self.ps.update(name, self.ask, ranks=rest, timeout=SHORT)
        received = received_bytes() - before
        (right,) = self.workers.call("is_right", seed)
        return _seen(report, right, received)


def _seen(report: Any, right: bool, received: int) -> dict[str, Any]:
    """``received``: bytes that entered this host."""
    read = report.stages.get("P2P read")
    return {
        "way": report.way,
        "reason": report.way_reason,
        "right": right,
        "received": received,
        "read": 0 if read is None else read.bytes,
        "seconds": report.seconds,
        "reading": 0.0 if read is None else read.seconds,
    }


def sharded(tp: int, updates: int, layers: int = 2) -> dict[str, Any]:
    """One update after the other, of a model of so many layers."""
    CONFIG["num_hidden_layers"] = layers
    SHAPES.update(tensor_shapes(CONFIG))  # in the order of those that are there
    rank = Rank(tp)
    seen = [rank.update(seed) for seed in range(1, updates + 1)]
    rank.workers.stop()
    return {
        "seen": seen,
        "needed": needed_bytes(tp),
        "elsewhere": foreign_bytes(),
        "sockets": len(list(Path(os.environ["PS_IPC_DIR"]).iterdir())),
        "shared": left_segments(),
    }


def short_rows(
    updates: int, layers: int, gap: int, contiguous: bool, copying: Sequence[int] = ()
) -> dict[str, Any]:
    """``sharded`` at TP 2, where a rank's columns of a row take 768 bytes; with how many ranges are
    read.

    Args:
        gap: bytes between ranges that are read along.
        contiguous: each rank loads as many bytes, but whole rows: what another order of the
            checkpoint's bytes could do at best.
        copying: the ranks that hold column copies.
    """
    os.environ["PS_COLUMN_COPIES"] = str(int(RANK in copying))
    CONFIG.update(hidden_size=768, intermediate_size=768)
    shapes = tensor_shapes(CONFIG | {"num_hidden_layers": layers})
    kind_first = sorted(shapes, key=lambda name: name.split(".", 3)[::-1])  # both own as much
    SHAPES.clear()
    SHAPES.update({name: shapes[name] for name in kind_first})
    ranges: list[int] = []

    def counted(self: RemoteLoader, regions: Sequence[Any], *place: Any) -> None:
        ranges.append(len(regions))
        read(self, regions, *place)

    def load_rows(self: RowParallelLinear, param: Any, loaded: torch.Tensor, _: str) -> None:
        share = self.tp.narrow(loaded, 0, len(param) // self.tp.size)
        param.data.copy_(share.reshape(param.shape))

    read, shards.SHORTEST_GAP = RemoteLoader._read, gap
    with mock.patch.object(RemoteLoader, "_read", counted), ExitStack() as patches:
        if contiguous:
            patches.enter_context(mock.patch.object(RowParallelLinear, "load", load_rows))
        found = sharded(2, updates, layers)
    return found | {"ranges": ranges}


def interrupted(tp: int, folder: str, timeout: float) -> dict[str, Any]:
    """Two updates that teach, and one in whose middle a host is cut off. Rank 0 goes on with the
    host's successor."""
    rank, here = Rank(tp), Path(folder)
    seen = [rank.update(seed) for seed in (1, 2)]
    name = rank.register(3)
    (here / f"ready-{RANK}").touch()
    while not (here / "slow").exists():
        time.sleep(0.01)
    (here / f"reads-{RANK}").touch()
    began = time.monotonic()
    failure: dict[str, Any] = {}
    try:
        rank.ps.update(name, rank.ask, timeout=timedelta(seconds=timeout))
    except UpdateError as error:
        failure = {"error": str(error), "kind": error.kind, "rank": error.rank}
    failure["seconds"] = time.monotonic() - began
    (here / f"failed-{RANK}").touch()
    if RANK == 0:
        rank.ps.unregister_checkpoint(name)
        while not (here / "again").exists():
            time.sleep(0.01)
        seen += [rank.update(seed) for seed in (4, 5, 6)]
    rank.workers.stop()
    return {"seen": seen, "failure": failure}


def succeeded(tp: int, folder: str) -> dict[str, Any]:
    """A host that is there again, with nothing of what it had before."""
    rank = Rank(tp)
    (Path(folder) / "again").touch()
    seen = [rank.update(seed) for seed in (4, 5, 6)]
    rank.workers.stop()
    return {"seen": seen}


def _error_of(action: Callable[[], Any]) -> dict[str, Any]:
    """How a call failed, and after how many seconds."""
    began = time.monotonic()
    seen: dict[str, Any] = {"kind": None}
    try:
        action()
    except UpdateError as error:
        seen = {"error": str(error), "kind": error.kind, "rank": error.rank}
    return {**seen, "seconds": time.monotonic() - began}


def _await(path: Path) -> None:
    ends = Deadline(90)
    while not path.exists():
        ends.check(f"{path.name} of the test")
        time.sleep(0.01)


def left_for_good(folder: str, owners: int, copies: bool) -> dict[str, Any]:
    """The last rank leaves in order after a few updates of all.

    Args:
        owners: the first ranks that own everything.
        copies: whether rank 0 also owns what the last of them does.
    """
    rank, here = Rank(2), Path(folder)
    rank.owners, rank.copies_last = owners, copies
    seen = [rank.update(seed) for seed in (1, 2, 3)]
    name = rank.register(4)
    if RANK == WORLD_SIZE - 1:
        rank.workers.stop()
        return {"seen": seen}
    _await(here / "left")
    of_all = _error_of(lambda: rank.ps.update(name, rank.ask, timeout=SHORT))
    gathered = _error_of(lambda: rank.ps.gather_metas(name, timeout=SHORT))
    rest: list[dict[str, Any]] = []
    of_rest = _error_of(lambda: rest.append(rank.update_rest(name, 4)))
    if owners < WORLD_SIZE:  # new values where the first ones were: nothing is gathered
        for seed, transport in ((5, "auto"), (6, "group")):
            os.environ["PS_TRANSPORT"] = transport
            rank.ps.unregister_checkpoint(name)
            rank.ps.register_checkpoint(name, named_tensors=rank.share_of(seed))
            rest.append(rank.update_rest(name, seed))
    rank.workers.stop()
    failures = {"of_all": of_all, "gather": gathered, "of_rest": of_rest}
    return {"seen": seen, **failures, "rest": rest, "needed": needed_bytes(2, owners)}


def cancelled(tp: int, folder: str) -> dict[str, Any]:
    """Rank 0's caller cancels an update in the middle; the next ones are as before."""
    rank, here = Rank(tp), Path(folder)
    seen = [rank.update(seed) for seed in (1, 2, 3)]
    name = rank.register(4)
    (here / f"ready-{RANK}").touch()
    _await(here / "slow")
    wish = here / f"cancel-{RANK}"
    with cancellable(lambda: "it was cancelled" if wish.exists() else ""):
        failure = _error_of(lambda: rank.ps.update(name, rank.ask, timeout=SHORT))
    (here / f"failed-{RANK}").touch()
    _await(here / "fast")
    rank.ps.unregister_checkpoint(name)
    seen += [rank.update(seed) for seed in (5, 6)]
    rank.workers.stop()
    return {"seen": seen, "failure": failure, "shared": left_segments()}


def continued(folder: str) -> dict[str, Any]:
    """Every rank is an instance. The last one's does not answer, then is killed in the middle; the
    others are updated, and all of them the next time."""
    rank, here = Rank(1), Path(folder)
    spare = Workers(rank.make, 1)
    seen = [rank.update(seed) for seed in (1, 2, 3)]
    is_last = RANK == WORLD_SIZE - 1

    def refuse(paths: list[tuple[str, str]]) -> None:
        raise RuntimeError("the engine is not up")

    def die(paths: list[tuple[str, str]]) -> None:
        _await(here / "kill")
        rank.workers.stop()
        raise RuntimeError("the engine has died")

    def ask_and_die(paths: list[tuple[str, str]]) -> None:
        with ThreadPoolExecutor(1) as killer:
            killer.submit(die, paths)
            rank.ask(paths)

    failed, right = [], []
    for seed, fault in ((4, refuse), (5, ask_and_die)):
        name = rank.register(seed)
        if fault is ask_and_die:
            (here / f"ready-{RANK}").touch()
            _await(here / "slow")
        ask = partial(fault if is_last else rank.ask)
        ask.instance = f"engine {RANK}"  # type: ignore[attr-defined]
        report = rank.ps.update(name, ask, timeout=SHORT, on_instance_failure="continue")
        failed.append([report.way, [one.model_dump() for one in report.failed_instances]])
        right += [] if is_last else rank.workers.call("is_right", seed)
        rank.ps.unregister_checkpoint(name)
    (here / f"done-{RANK}").touch()
    _await(here / "fast")
    if is_last:
        rank.workers = spare
    seen += [rank.update(seed) for seed in (6, 7, 8)]
    rank.workers.stop()
    spare.stop()
    return {"seen": seen, "failed": failed, "right": right, "shared": left_segments()}


def broken_off(folder: str, owners: int, members: list[int], timeout: float) -> dict[str, Any]:
    """In the middle of an update of ``members`` the last rank, which may be one of them, is killed
    or cut off. The others go on among themselves.

    Args:
        owners: the first ranks that own everything.
    """
    rank, here = Rank(2), Path(folder)
    rank.owners = owners
    seen = [rank.update(seed) for seed in (1, 2, 3)]
    name = rank.register(4)
    rank.workers.call("clear")
    rank.ps.store_based_barrier()
    (here / f"ready-{RANK}").touch()
    if RANK not in members:
        _await(here / "finished")
        return {"seen": seen}
    _await(here / "slow")
    seconds = timedelta(seconds=timeout)
    failure = _error_of(lambda: rank.ps.update(name, rank.ask, ranks=members, timeout=seconds))
    failure["at"] = time.monotonic()
    (here / f"failed-{RANK}").touch()
    rest: list[dict[str, Any]] = []
    if RANK < WORLD_SIZE - 1:
        _await(here / "fast")
        failure["next"] = _error_of(lambda: rest.append(rank.update_rest(name, 4)))
    rank.workers.stop()
    return {"seen": seen, "failure": failure, "rest": rest, "shared": left_segments()}


def owner(folder: str) -> dict[str, Any]:
    """One of several that own everything, for other worlds."""
    here, ps = Path(folder), ParameterServer()
    ps.register_checkpoint("step-1", named_tensors=weights(1))
    ps.gather_metas("step-1", timeout=SHORT)
    if RANK == 0:
        (here / "half").write_bytes(encode_metas(ps.get_metas()))
        (here / "half").rename(here / "metas.json")
    _await(here / "finished")
    return {}


def joiner(folder: str, updates: int) -> dict[str, Any]:
    """Updates out of the memory of ``owner``, each once the test says so."""
    rank, here = Rank(1), Path(folder)
    _await(here / "metas.json")
    rank.ps.gather_metas("step-1", timeout=SHORT)
    rank.ps.load_metas(decode_metas((here / "metas.json").read_bytes()))
    everyone = list(range(WORLD_SIZE))
    seen: list[dict[str, Any]] = []
    for number in range(updates):
        (here / f"ready-{number}-{RANK}").touch()
        _await(here / f"go-{number}")
        rank.workers.call("clear")
        seen.append({"kind": None})
        try:
            before = received_bytes()
            report = rank.ps.update("step-1", rank.ask, ranks=everyone, timeout=LONG)
        except UpdateError as error:
            seen[-1] = {"error": str(error), "kind": error.kind}
            continue
        received = received_bytes() - before
        (right,) = rank.workers.call("is_right", 1)
        seen[-1] |= _seen(report, right, received)
    (here / "finished").touch()
    rank.workers.stop()
    return {"seen": seen, "shared": left_segments()}


if __name__ == "__main__":
    program, arguments, results = sys.argv[1:]
    every = (sharded, short_rows, interrupted, succeeded, left_for_good, cancelled, continued)
    every += (broken_off, owner, joiner)
    programs: dict[str, Callable[..., Any]] = {f.__name__: f for f in every}
    result = programs[program](**json.loads(arguments))
    (Path(results) / f"{RANK}.json").write_text(json.dumps(result))
