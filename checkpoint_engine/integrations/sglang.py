"""What SGLang calls at its start: the entry point of the group ``sglang.srt.plugins``.

SGLang receives an update with the target, and then once more with each draft model, at an address
that is over by then; it restores no packed weights before it loads, and only logs what fails in its
post hook. With the plug-in all models of a process are filled from one stream, between SGLang's own
steps that unpack and pack, and whatever fails on one rank is the answer of all.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import weakref
from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import zmq
from loguru import logger

from checkpoint_engine.ground.devices import DeviceManager, worker_index
from checkpoint_engine.loading.adapters import LoadOver
from checkpoint_engine.loading.receive import own_address, update_weights_from_ipc
from checkpoint_engine.loading.reload import LoaderHabits, ModelReload, ModelsReload, habits_of

SUPPORTED = "0.5.21 to 0.5.23"
_MANAGER = "sglang.srt.managers.scheduler_components.weight_updater"
_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater"
_OF_UPDATER = ("begin_weight_update", "end_weight_update", "_assert_weight_cache_inactive")
_OF_MODULE = "_unsupported_derived_weight_cache_error"

_habits: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, LoaderHabits]]
_habits = weakref.WeakKeyDictionary()


def register() -> None:
    """Take over ``/update_weights_from_ipc``. Called once in every process of SGLang, which logs
    what this raises and goes on without the plug-in.

    Raises:
        RuntimeError: this SGLang does not update its models as the plug-in expects.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    check_interface()
    target = f"{_MANAGER}.SchedulerWeightUpdaterManager.update_weights_from_ipc"
    HookRegistry.register(target, update_all_models, HookType.AROUND)


def check_interface() -> None:
    """Raise ``RuntimeError`` unless this SGLang's models are updated as the plug-in expects."""
    manager = getattr(importlib.import_module(_MANAGER), "SchedulerWeightUpdaterManager", None)
    update = getattr(manager, "update_weights_from_ipc", None)
    arguments = list(inspect.signature(update).parameters) if callable(update) else []
    lacking = [] if hasattr(manager, "_select_runners") else ["_select_runners"]
    lacking += [name for name in (*_OF_UPDATER, _OF_MODULE) if f"def {name}(" not in _source()]
    if arguments != ["self", "recv_req"] or lacking:
        version = getattr(sys.modules["sglang"], "__version__", "of an unknown version")
        raise RuntimeError(
            f"SGLang {version} has no {lacking} and takes {arguments} for an update by IPC; the "
            f"plug-in checkpoint_engine knows the interface of {SUPPORTED}. SGLang updates its "
            "target model without it; a server with a draft model needs one of those releases"
        )


def _source() -> str:
    """Of the module that updates one model. Only some processes of SGLang may import it."""
    spec = importlib.util.find_spec(_UPDATER)
    return "" if spec is None or spec.origin is None else Path(spec.origin).read_text()


def update_all_models(original: Any, manager: Any, recv_req: Any) -> Any:
    """SGLang's own answer to an update, of which each model's part was one of ours."""
    return original(_OneUpdate(manager), recv_req)


class _OneUpdate:
    """SGLang's manager while it updates. It asks each model in turn to receive, and is told what
    became of the one update of all of them."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._answer: tuple[bool, str] | None = None
        self.weight_updater = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def _select_runners(self) -> list[tuple[str, Any]]:
        return [(role, self) for role, _ in self._manager._select_runners()]

    def update_weights_from_ipc(self, recv_req: Any) -> tuple[bool, str]:
        if self._answer is None:
            runners = _fed(self._manager._select_runners())
            failure = _in_step(_receive(runners, recv_req.zmq_handles), self._manager.tp_cpu_group)
            self._answer = not failure, failure or "All models were updated from one stream."
        return self._answer


def _fed(runners: list[tuple[str, Any]]) -> dict[str, Any]:
    """By role: the target, and the draft models that came from the same checkpoint."""
    target = runners[0][1]
    fed = {"model": target}
    for number, (_, runner) in enumerate(runners[1:], 1):
        if runner.model_config.model_path == target.model_config.model_path:
            fed["drafter" if number == 1 else f"drafter {number}"] = runner
        else:
            path = runner.model_config.model_path
            logger.info("the draft model of {} keeps its weights: they are not the target's", path)
    return fed


def _in_step(reception: Generator[None, None, None], group: Any) -> str:
    """Take both steps of an update, the second only if the first succeeded on every rank of the
    engine: a rank that connects waits for the others. Returns what failed, the same on all."""
    with closing(reception):
        for _ in ("begin", "receive"):
            failure = ""
            try:
                next(reception)
            except Exception as error:
                logger.exception("an update of this engine failed")
                failure = f"{type(error).__name__}: {error}"
            told: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(told, failure, group=group)
            if failure := next(filter(None, told), ""):
                return failure
    return ""


def _receive(runners: dict[str, Any], handles: dict[str, str]) -> Generator[None, None, None]:
    target = runners["model"]
    device = DeviceManager(torch.device(target.device).type)
    index = target.gpu_id
    if device.is_accelerator:
        index = device.device_module.current_device()
    address = own_address(handles, device.identity(worker_index(device.device_type, index)))
    for runner in runners.values():
        _check(runner.weight_updater, runner.model)
    with closing(_RunnersReload(runners)) as reload, zmq.Context() as context:
        yield
        update_weights_from_ipc(context, address, device_id=index, run=reload)
        yield


def _check(updater: Any, model: torch.nn.Module) -> None:
    """What SGLang asks before it updates a model."""
    updater._assert_weight_cache_inactive("update_weights_from_ipc")
    reason = getattr(sys.modules[type(updater).__module__], _OF_MODULE)(model)
    if reason is not None:
        raise RuntimeError(reason)


class _RunnersReload(ModelsReload):
    """One update of the models that SGLang's runners hold."""

    def __init__(self, runners: dict[str, Any]) -> None:
        habits = _habits.setdefault(runners["model"].model, {})
        super().__init__({}, habits)
        self._dtype = runners["model"].model_config.dtype
        filled: set[int] = set()
        for role, runner in runners.items():
            shared = frozenset(_shared(runner.model, filled))
            filled.update(map(id, runner.model.parameters()))
            self._models[role] = ModelReload(
                habits_of(habits, role, runner.model), _Unpacked(runner), None, shared
            )

    def surroundings(self) -> Any:
        from sglang.srt.model_loader.utils import set_default_torch_dtype

        return set_default_torch_dtype(self._dtype)


def _shared(model: torch.nn.Module, filled: set[int]) -> Iterable[str]:
    """The parameters that are those of a model before, as a draft model's embedding."""
    return (name for name, one in model.named_parameters() if id(one) in filled)


class _Unpacked(LoadOver):
    """A model of SGLang, which is unpacked before the first tensor and packed after the last."""

    def __init__(self, runner: Any) -> None:
        device = torch.device(runner.device)
        super().__init__(runner.model, runner.model_config, device)
        self._updater = runner.weight_updater
        self._is_unpacked = False

    def cannot(self) -> str:
        if hasattr(self._model, "post_load_weights"):
            return "its loader derives tensors from those that it has loaded"
        return super().cannot()

    def begin(self) -> None:
        self._is_unpacked = True
        self._updater.begin_weight_update()

    def finish(self) -> None:
        self._is_unpacked = False
        self._updater.end_weight_update(run_post_load=False)

    def abandon(self) -> None:
        """The engine cannot compute with unpacked weights."""
        if not self._is_unpacked:
            return
        try:
            self.finish()
        except Exception:  # what the update failed with is what is told
            logger.exception("weights of an update that failed could not be packed")
