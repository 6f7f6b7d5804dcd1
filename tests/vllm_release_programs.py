"""Both halves of the vLLM plug-in with a release's own files: ``vllm_release_programs.py all_cases
ARGUMENTS OUTPUT_FOLDER``. ``ARGUMENTS`` has the ``folder`` of the files, and the ``release``.

Each rank is a trainer and a worker of the engine that it updates. vLLM's own are: base classes and
factories of transfer engines, sources, the client for Ray's actors, the methods of a worker that
call a transfer engine, and the functions that put a drafter's quantised heads away. Stand-ins are:
the model, the engine between client and workers, and vLLM's configuration.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from multiprocessing.connection import Client, Listener
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
SLOW = 1.2  # seconds of an engine with a failure: longer than a server waits for its request
WORKER = "vllm/v1/worker/gpu_worker.py"
HEADS = "vllm/model_executor/layers/quantization/online/lm_head.py"


def module(name: str, **contents: Any) -> ModuleType:
    """A stand-in for one of vLLM's modules, in the modules that it is in."""
    made = ModuleType(name)
    vars(made).update(contents)
    sys.modules[name] = made
    if "." in name:
        importlib.import_module(name.rpartition(".")[0])
    return made


def definitions(path: Path, wanted: Callable[[ast.stmt, str], bool], into: ModuleType) -> None:
    """Run those of a file's statements, and of its classes' methods, that are wanted."""
    source = path.read_text()
    kept = []
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.ClassDef):
            statement.bases = []
            statement.body = [
                one for one in statement.body if wanted(one, ast.get_source_segment(source, one))
            ]
            kept += [statement] * bool(statement.body)
        elif wanted(statement, ast.get_source_segment(source, statement) or ""):
            kept.append(statement)
    future = "from __future__ import annotations"
    tree = ast.Module([*ast.parse(future).body, *kept], type_ignores=[])
    exec(compile(ast.fix_missing_locations(tree), str(path), "exec"), vars(into))


def real_vllm(folder: Path, release: str) -> SimpleNamespace:
    """The release's files, imported, with stand-ins for what they import of the rest of vLLM."""
    sys.path.insert(0, str(folder))
    dist.init_process_group("gloo")
    ours = SimpleNamespace(
        world_size=WORLD_SIZE,
        is_last_rank=RANK == WORLD_SIZE - 1,
        cpu_group=dist.new_group(),
        local_rank=RANK,
    )
    alone = SimpleNamespace(world_size=1, is_last_rank=True)
    vllm = importlib.import_module("vllm")  # a folder without an __init__.py
    vllm.__version__ = release
    config = importlib.import_module("vllm.config")
    config.set_current_vllm_config = lambda config: nullcontext()
    module("vllm.config.utils", config=lambda cls: cls)
    module("vllm.config.parallel", ParallelConfig=object)
    module("vllm.logger", init_logger=lambda name: SimpleNamespace(info=lambda *a: None))
    module(
        "vllm.distributed.parallel_state",
        model_parallel_is_initialized=lambda: True,
        get_world_group=lambda: ours,
        get_tp_group=lambda: ours,
        get_pp_group=lambda: alone,
    )
    module("ray", get=lambda futures: [future.result(60) for future in futures])
    heads = heads_of(folder)
    worker = module(
        "vllm.v1.worker.gpu_worker",
        set_current_vllm_config=config.set_current_vllm_config,
        **{name: one for name, one in vars(heads).items() if name.endswith("source_lm_heads")},
        **{name: one for name, one in vars(heads).items() if name.endswith("quantized_lm_heads")},
    )
    definitions(folder / WORKER, _calls_engine, worker)
    transfer = importlib.import_module("vllm.distributed.weight_transfer")
    base = importlib.import_module("vllm.distributed.weight_transfer.base")
    return SimpleNamespace(transfer=transfer, base=base, worker=worker.Worker, heads=heads)


def _calls_engine(one: ast.stmt, source: str) -> bool:
    if not isinstance(one, ast.FunctionDef) or one.name in ("__init__", "shutdown"):
        return False
    return "weight_transfer_engine" in source or one.name in (
        "get_draft_model",
        "start_weight_update",
        "start_draft_weight_update",
    )


def heads_of(folder: Path) -> ModuleType:
    """What vLLM does with a drafter's quantised heads since 0.33; the copies are a stand-in's."""
    name = HEADS.removesuffix(".py").replace("/", ".")
    if not (folder / HEADS).exists():
        return ModuleType(name)
    from itertools import chain
    from weakref import WeakKeyDictionary

    made = module(name, torch=torch, chain=chain, WeakKeyDictionary=WeakKeyDictionary)
    made._quantize_copy = lambda head, quantization: Head(head.weight.detach() * 2)
    kinds = (ast.FunctionDef, ast.AnnAssign)

    def wanted(one: ast.stmt, source: str) -> bool:
        return isinstance(one, kinds) and ("_SOURCES" in source or "_SWAPPED" in source)

    definitions(folder / HEADS, wanted, made)
    return made


class Head(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


class Model(nn.Module):
    """Of engine or trainer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        for name in ("first", "second", "third", "fourth", "fifth"):
            setattr(self, name, Head(torch.randn(40, 30, generator=random)))
        self.fails_at = ""

    def load_weights(self, weights: Any) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            if name == self.fails_at:
                raise RuntimeError(f"a planted fault at {name}")
            self.get_parameter(name).data.copy_(tensor)
            loaded.add(name)
        return loaded


class Worker:
    """vLLM's, as far as updates go, in a thread; the engine calls its methods by a socket."""

    def __init__(self, vllm: SimpleNamespace, folder: Path, drafter: nn.Module | None) -> None:
        model_config = SimpleNamespace(model="target", dtype=torch.float32)
        drafted = SimpleNamespace(model="drafter")
        self.model = Model(7)
        self.worker = vllm.worker()
        self.worker.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(data_parallel_index=0, world_size=WORLD_SIZE),
            model_config=model_config,
            speculative_config=drafter and SimpleNamespace(draft_model_config=drafted),
        )
        self.worker.speculative_config = self.worker.vllm_config.speculative_config
        self.worker.model_runner = SimpleNamespace(
            get_draft_model=lambda: drafter, reset_lora_state=lambda: None
        )
        self.worker.rank = RANK
        self.worker._weight_update_active = self.worker._weight_update_is_draft = False
        self.worker.weight_transfer_engine = (
            vllm.transfer.WeightTransferEngineFactory.create_engine(
                SimpleNamespace(backend="checkpoint_engine"),
                self.worker.vllm_config,
                torch.device("cpu"),
                self.model,
            )
        )
        self._listener = Listener(str(folder / f"worker-{RANK}"), "AF_UNIX")
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with self._listener.accept() as connection:
            while True:
                method, arguments = connection.recv()
                try:
                    connection.send((getattr(self.worker, method)(*arguments), ""))
                except Exception as error:
                    connection.send((None, f"{type(error).__name__}: {error}"))


class Actor:
    """An engine as vLLM's client for Ray sees it: each method has a ``remote``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(1)

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=functools.partial(self._pool.submit, self._call, method))

    def _call(self, method: str, *requests: Any) -> None:
        arguments = [request.update_info for request in requests]
        for worker in self._workers:
            worker.send((method, arguments))
        failures = [failure for _, failure in [worker.recv() for worker in self._workers]]
        if any(failures):
            time.sleep(SLOW)
            raise RuntimeError(f"Worker failed with error {max(failures)!r}")

    @functools.cached_property
    def _workers(self) -> list[Any]:
        return [Client(str(self._folder / f"worker-{rank}")) for rank in range(WORLD_SIZE)]


def split_source(vllm: SimpleNamespace, model: nn.Module, holders: dict[str, list[int]]) -> Any:
    """A source as this release defines it, for ranks that hold a part each: ``holders``, by name.
    Others are every rank's."""
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    base = vllm.base

    def is_mine(name: str) -> bool:
        return RANK in holders.get(name, [RANK])

    def meta(name: str, **options: Any) -> Any:
        return base.ParamMeta(name, tensors[name].dtype, tuple(tensors[name].shape), **options)

    if is_new(vllm):

        class Since(base.WeightSource):  # type: ignore[misc,name-defined]
            @functools.cached_property
            def metadata(self) -> list[Any]:
                return [meta(name, owners=holders.get(name)) for name in tensors]

            def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
                for name in self.owned_names(RANK):
                    yield name, tensors[name]

        return Since()

    class Before(base.WeightSource):  # type: ignore[misc,name-defined]
        def metadata(self) -> list[Any]:
            return [meta(name) for name in tensors]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor | None]]:
            for name, tensor in tensors.items():
                yield name, tensor if is_mine(name) else None

        if hasattr(base.WeightSource, "held_names"):

            def held_names(self) -> set[str]:
                return set(filter(is_mine, tensors))

    return Before()


class Trainer:
    def __init__(self, vllm: SimpleNamespace, folder: Path) -> None:
        from checkpoint_engine.integrations.vllm.trainer import CheckpointEngineTrainerInit

        self.vllm = vllm
        self.client = vllm.transfer.RayVLLMWeightSyncClient(Actor(folder))
        self.info = CheckpointEngineTrainerInit(rank=RANK)
        self.engine = self.made_of(vllm.transfer.ModuleSource(Model(0)))

    def made_of(self, source: Any) -> Any:
        factory = self.vllm.transfer.WeightTransferTrainerFactory
        return factory.trainer_init(self.info, client=self.client, source=source)

    def send(self, source: Any) -> str:
        """The error, if any."""
        self.engine.source = source
        try:
            self.engine.send_weights()
        except Exception as error:
            return f"{type(error).__name__}: {error}; caused by {error.__cause__!r}"
        return ""


def updates(vllm: SimpleNamespace, folder: Path) -> dict[str, Any]:
    """One after the other; what each ended with, and whether the worker holds the weights."""
    worker = Worker(vllm, folder, drafter=None)
    trainer = Trainer(vllm, folder)
    source, result = vllm.transfer.ModuleSource, {}

    def step(name: str, made: Any, seed: int) -> None:
        wanted = Model(seed).state_dict()
        error = trainer.send(made)
        held = [torch.equal(one, wanted[name]) for name, one in worker.model.state_dict().items()]
        result[name] = error, all(held)

    step("first", source(Model(1)), 1)
    worker.model.fails_at = "third.weight" if RANK == 0 else ""
    step("fails", source(Model(2)), 2)
    worker.model.fails_at = ""
    step("works again", source(Model(2)), 2)
    split = {"first.weight": [0], "second.weight": [0, 1], "third.weight": [1]}
    if not hasattr(vllm.base.WeightSource, "held_names") and not is_new(vllm):
        split = {name: [0] for name in split}  # whole on the sender alone
    step("split", split_source(vllm, Model(3), split), 3)
    nobody = {"second.weight": [WORLD_SIZE]}
    step("nobody", split_source(vllm, Model(4), nobody), 3)  # no byte of it is sent
    way = "iter_full" if is_new(vllm) else "__iter__"
    failing = type("Failing", (source,), {way: lambda self: [][RANK]})
    step("source fails", (failing if RANK == WORLD_SIZE - 1 else source)(Model(4)), 3)
    step("all sources fail", failing(Model(4)), 3)
    more = type("More", (source,), {way: lambda self: iter([("sixth", torch.ones(1))])})
    step("unnamed", more(Model(4)), 3)
    step("last", source(Model(5)), 5)
    result["rank"] = trainer.engine.rank
    trainer.engine.shutdown()
    return result


def is_new(vllm: SimpleNamespace) -> bool:
    """Whether sources say who owns what: 0.33."""
    return hasattr(vllm.base.WeightSource, "iter_full")


def refused(vllm: SimpleNamespace, folder: Path) -> list[str]:
    """Why a trainer is not made: of no source, and of one without full tensors."""
    sources = [None]
    if is_new(vllm):
        local = type(
            "Local", (vllm.base.WeightSource,), {"metadata": functools.cached_property(id)}
        )
        local.metadata.__set_name__(local, "metadata")
        local.iter_local = lambda self: iter(())
        sources.append(local())
    reasons = []
    for source in sources:
        try:
            Trainer(vllm, folder).made_of(source)
        except ValueError as error:
            reasons.append(str(error))
    return reasons


def open_session(vllm: SimpleNamespace, folder: Path) -> dict[str, Any]:
    """A client opens a session for a drafter with a quantised head, and is gone. The next one."""
    if not hasattr(vllm.heads, "_SOURCES"):
        return {}
    target = Head(torch.ones(4, 4))
    copy = vllm.heads._quantize_copy(target, "fp8")
    vllm.heads._SOURCES[copy] = (target, "fp8")
    drafter = nn.Module()
    drafter.lm_head = copy
    worker = Worker(vllm, folder, drafter).worker
    result = {}
    worker.start_draft_weight_update()
    result["is away"] = drafter.lm_head is target
    worker.start_draft_weight_update()
    result["is still away"] = drafter.lm_head is target
    target.weight.data.fill_(3)
    worker.finish_weight_update()
    result["is back"] = drafter.lm_head is copy
    result["is made anew"] = torch.equal(copy.weight, torch.full((4, 4), 6.0))
    worker.start_draft_weight_update()
    worker.start_weight_update()
    result["is back for the model"] = drafter.lm_head is copy
    return result


def all_cases(folder: str, release: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    vllm = real_vllm(Path(folder), release)
    from checkpoint_engine.integrations.vllm import register

    register()
    sockets = Path(os.environ["PS_IPC_DIR"]).parent
    places = [sockets / name for name in ("updates", "refused", "heads")]
    for place in places:
        place.mkdir(exist_ok=True)
    return {
        "updates": updates(vllm, places[0]),
        "refused": refused(vllm, places[1]),
        "heads": open_session(vllm, places[2]),
    }


if __name__ == "__main__":
    program, arguments, output = sys.argv[1:]
    answer = all_cases(**json.loads(arguments))
    (Path(output) / f"{RANK}.json").write_text(json.dumps(answer))
    dist.barrier()
    os._exit(0)  # threads wait for calls
