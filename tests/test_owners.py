"""One checkpoint, one owner for each state: several ranks with real servers and workers."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import zmq
from loguru import logger

from checkpoint_engine.memory import checkpoints
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.worker import update_weights_from_ipc
from test_control import Rank, first_life, run_world

SECONDS = timedelta(seconds=20)
Tensors = dict[str, torch.Tensor]


class Server:
    """One rank's server, with a worker that keeps what it is given, in a thread."""

    def __init__(self, me: Rank, **variables: str) -> None:
        folder = tempfile.mkdtemp(prefix="owners-", dir=os.environ["PS_IPC_DIR"])
        os.environ.update(
            PS_DEVICE="cpu", LOCAL_WORLD_SIZE=str(me.size), PS_IPC_DIR=folder, **variables
        )
        self.rank = me.rank
        self.got: Tensors = {}
        self.arrived = 0
        self.ps = ParameterServer(
            rank=me.rank, world_size=me.size, master_addr="127.0.0.1", master_port=me.port
        )

    def publish(self, name: str, tensors: Tensors) -> Any:
        self.ps.register_checkpoint(name, named_tensors=tensors)
        self.ps.gather_metas(name, timeout=SECONDS)
        report = self.ps.update(name, self.engine, timeout=SECONDS)
        self.ps.unregister_checkpoint(name)
        return report

    def engine(self, paths: list[tuple[str, str]]) -> None:
        def keep(weights: list[tuple[str, torch.Tensor]]) -> None:
            self.arrived += len(weights)
            self.got.update({name: tensor.clone() for name, tensor in weights})

        with zmq.Context() as context:
            update_weights_from_ipc(context, paths[self.rank][1], 0, run=keep)


@pytest.fixture(autouse=True)
def sockets(monkeypatch: pytest.MonkeyPatch) -> Any:
    with tempfile.TemporaryDirectory(prefix="owners-") as folder:
        monkeypatch.setenv("PS_IPC_DIR", folder)
        yield


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


OTHER = {
    "content": (torch.ones(8), "own tensor 'shared' with different content"),
    "last bit": (torch.tensor([0.0] * 7 + [-0.0]), "own tensor 'shared' with different content"),
    "dtype": (torch.zeros(8, dtype=torch.int32), "own different tensors 'shared'"),
    "shape": (torch.zeros(2, 4), "own different tensors 'shared'"),
}


@pytest.mark.parametrize("what", OTHER)
def test_a_tensor_that_two_ranks_own_differently_is_an_error_on_all(what: str) -> None:
    other, says = OTHER[what]

    def program(me: Rank) -> list[str]:
        server = Server(me)
        shared = {0: {}, 1: {"shared": torch.zeros(8)}, 2: {"shared": other}}[me.rank]
        own = {f"own.{me.rank}": torch.full((3,), float(me.rank))}
        failed = error_of(lambda: server.publish("a", shared | own))
        server.ps.unregister_checkpoint("a")
        server.publish("b", own)
        return [failed, *sorted(server.got)]

    for failed, *names in run_world(3, program):
        assert f"ranks 1 and 2 {says}" in failed
        assert names == ["own.0", "own.1", "own.2"]


def test_equal_tensors_of_several_ranks_are_warned_about_and_sent_once() -> None:
    def program(me: Rank) -> list[Any]:
        server = Server(me, PS_MAX_BUCKET_SIZE_GB="1e-6")
        warnings: list[str] = []
        logger.add(lambda message: warnings.append(str(message)), level="WARNING")
        tensors = {f"layer.{i}.norm": torch.full((40,), float(i)) for i in range(4)}
        tensors |= {f"layer.{i}.of.{me.rank}": torch.full((9,), 10.0 * i) for i in range(4)}
        report = server.publish("a", tensors)
        warned = [one for one in warnings if "several ranks own the same 4 tensors" in one]
        right = all(torch.equal(server.got[name], tensor) for name, tensor in tensors.items())
        return [len(server.got), server.arrived, report.tensors, right, len(warned)]

    results = run_world(3, program)
    assert [result[:4] for result in results] == [[16, 16, 16, True]] * 3
    assert [result[4] for result in results] == [1, 0, 0]


def test_equal_tensors_are_compared_again_when_their_values_are_new() -> None:
    """New values under the same name and layout need no new gather, but the comparison."""

    def program(me: Rank) -> list[Any]:
        server = Server(me)
        seen = []
        for step, values in enumerate([(1.0, 1.0), (2.0, 2.0), (2.0, 3.0), (4.0, 4.0)]):
            tensors = {"norm": torch.full((9,), values[me.rank]), f"of.{me.rank}": torch.ones(3)}
            server.ps.register_checkpoint("a", named_tensors=tensors)
            if step == 0:
                server.ps.gather_metas("a", timeout=SECONDS)
            failed = error_of(lambda: server.ps.update("a", server.engine, timeout=SECONDS))
            server.ps.unregister_checkpoint("a")
            seen.append((failed, float(server.got["norm"][0])))
        return seen

    for seen in run_world(2, program):
        assert [value for _, value in seen] == [1.0, 2.0, 2.0, 4.0]
        assert [bool(failed) for failed, _ in seen] == [False, False, True, False]
        assert "ranks 0 and 1 own tensor 'norm' with different content" in seen[2][0]


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_failed_register_never_mixes_two_steps(culprit: int) -> None:
    def program(me: Rank) -> list[tuple[str, list[float]]]:
        server = Server(me)
        seen = []
        for step in range(1, 6):
            tensors: dict[str, Any] = {f"of.{me.rank}": torch.full((50,), float(step))}
            if (me.rank, step) == (culprit, 2):
                tensors = {"bad": "no tensor"}
            failed = error_of(lambda step=step, tensors=tensors: server.publish(str(step), tensors))
            seen.append((failed, sorted({float(one[0]) for one in server.got.values()})))
        return seen

    for seen in run_world(2, program):
        assert [values for failed, values in seen if not failed] == [[1.0], [4.0], [5.0]]
        assert all("step" not in failed or "rank" in failed for failed, _ in seen)


@pytest.mark.parametrize("restarted", [0, 1])
@pytest.mark.parametrize("transport", ["gloo", "shared-memory"])
def test_the_first_update_after_a_restart_works(restarted: int, transport: str) -> None:
    """The other rank has kept its group, and its store's connection."""

    def program(me: Rank) -> list[Any]:
        def live() -> Server:
            server = Server(me, PS_CPU_TRANSPORT=transport)
            server.publish("a", {f"of.{me.rank}": torch.zeros(9)})
            return server

        if me.rank == restarted:
            first_life(me, lambda: (live(), me.signals[1].wait(20)))
            server = Server(me, PS_CPU_TRANSPORT=transport)
        else:
            server = live()
            me.signals[1].set()
            while (
                not server.ps._control._world.liveness.gone
                and not server.ps._control._world.is_lost
            ):
                threading.Event().wait(0.01)
        server.publish("b", {f"of.{me.rank}": torch.ones(9)})
        return sorted({float(one[0]) for one in server.got.values()})

    assert run_world(2, program) == [[1.0]] * 2


def test_registering_while_the_same_name_is_gathered_spoils_nothing() -> None:
    inside, go = threading.Event(), threading.Event()
    encode = checkpoints.encode_layout

    def slow(buffers: Any) -> Any:
        if not inside.is_set():
            inside.set()
            go.wait(20)
        return encode(buffers)

    def program(me: Rank) -> list[Any]:
        server = Server(me)
        with mock.patch.object(checkpoints, "encode_layout", slow):
            gathering = threading.Thread(
                target=lambda: error_of(lambda: server.ps.gather_metas("a"))  # it may be an error
            )
            gathering.start()
            inside.wait(20)
            server.ps.register_checkpoint("a", named_tensors={"w": torch.ones(9)})
            go.set()
            gathering.join()
        server.ps.gather_metas("a")
        server.ps.update("a", server.engine, timeout=SECONDS)
        return list(server.got)

    assert run_world(1, program) == [["w"]]


def test_a_checkpoint_in_use_is_busy_and_one_without_a_name_is_a_checkpoint() -> None:
    def program(me: Rank) -> list[str]:
        server = Server(me)
        server.ps.register_checkpoint("", named_tensors={"w": torch.ones(9)})
        server.ps.gather_metas("")
        busy: list[str] = []

        def engine(paths: list[tuple[str, str]]) -> None:
            busy.append(error_of(lambda: server.ps.unregister_checkpoint("")))
            server.engine(paths)

        server.ps.update("", engine, timeout=SECONDS)
        server.ps.unregister_checkpoint("")
        return [*busy, *server.ps._memory_pool]

    ((busy,),) = run_world(1, program)
    assert busy.startswith("BusyError: checkpoint '' is being updated from")
