"""Which functions written in C a thread calls from Python, seen by Python itself.

A hook is set once around many calls. To set and unset it around each of a loader's calls would cost
more than the calls: from Python 3.12 on, both go through the code of every function that runs.
"""

from __future__ import annotations

import _thread
import builtins
import contextlib
import sys
import sysconfig
import threading
from _queue import SimpleQueue
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack, handle_torch_function

Notice = Callable[[Any, Any], None]
"""Gets the function, and what it is a method of; for a plain function, its module."""

_NAME = "checkpoint-engine"
_MONITORING: Any = getattr(sys, "monitoring", None)
_OWN_CODE = str(Path(__file__).parent)  # the calls of our own code, which follow the loader's
_METHOD, _BUILTIN = type(str.join), type(len)
_CONTAINERS = {str, bytes, dict, list, tuple, set, frozenset, int, float, deque, MappingProxyType}
"""Whose methods meet no other thread and no tensor, like the functions of ``builtins``."""
_functions = [one for kind in (*_CONTAINERS, builtins) for one in vars(kind).values()]
_HARMLESS = {one for one in _functions if type(one) in (_METHOD, _BUILTIN)} | {tuple.__new__}
_PACKAGES = ("torch", "vllm", "sglang")
"""In one place of their code, one thing is called. A loader's own code may have a table of them."""
_STDLIB, _INSTALLED = f"{sysconfig.get_path('stdlib')}/", ("site-packages/", "dist-packages/")
_OWN_ROOM = __name__.rpartition(".")[0]
_POP_MODE = torch._C._pop_torch_function_stack
_FRAMES_TO_POP = 8  # from the hook to torch's function that calls a mode
_Lock = type(threading.Lock())
_HOOKS = {getattr(sys, name) for name in ("getprofile", "setprofile", "settrace")}
_HOOKS |= {getattr(sys, name) for name in ("_setprofileallthreads",) if hasattr(sys, name)}
_BOUND_BY_PYBIND = ("PyCapsule", "pybind11_")  # what its functions are methods of: up to 2, from 3
_THREADS = {_thread.start_new_thread, torch._C._to_dlpack}
_THREADS |= {getattr(torch._C, one) for one in ("_data_address",) if hasattr(torch._C, one)}
_THREADS |= {
    getattr(_thread, name) for name in ("start_joinable_thread",) if hasattr(_thread, name)
}


@contextlib.contextmanager
def noticing_calls(notice: Notice, lost: Callable[[], None]) -> Iterator[None]:
    """Around calls of this thread's.

    Args:
        notice: called before each call of a function written in C, but for those of containers and
            of ``builtins``.
        lost: called if a profiler has the hook's place, or takes it meanwhile.
    """
    if sys.getprofile() is not None:
        lost()
        yield
        return
    with _profiling(notice, lost) if _MONITORING is None else _monitoring(notice, lost):
        yield


@contextlib.contextmanager
def _profiling(notice: Notice, lost: Callable[[], None]) -> Iterator[None]:
    def profile(frame: Any, event: str, function: Any) -> None:
        if event == "c_call":
            owner = function.__self__
            if type(owner) in _CONTAINERS or owner is builtins:
                return
            if not frame.f_code.co_filename.startswith(_OWN_CODE):
                notice(function, owner)

    # The profile hook is this thread's alone. To patch threads or ThreadPoolExecutor would change
    # them for the whole program.
    sys.setprofile(profile)
    try:
        yield
        if sys.getprofile() is not profile:
            lost()
    finally:
        sys.setprofile(None)


@contextlib.contextmanager
def _monitoring(notice: Notice, lost: Callable[[], None]) -> Iterator[None]:
    """From Python 3.12 on."""
    tool = next((one for one in (3, 4, 2, 1, 5, 0) if _MONITORING.get_tool(one) is None), None)
    if tool is None:
        lost()
        yield
        return
    thread, current_thread = threading.get_ident(), threading.get_ident
    event, never_again = _MONITORING.events.CALL, _MONITORING.DISABLE
    packages = [sys.modules[name].__path__ for name in _PACKAGES if name in sys.modules]
    known_code = tuple(f"{path}/" for paths in packages for path in paths)

    def is_known(file: str) -> bool:
        own = file.removeprefix(_STDLIB)
        return file.startswith(known_code) or (own != file and not own.startswith(_INSTALLED))

    def called(code: Any, _: int, function: Any, first: Any) -> Any:
        if code.co_filename.startswith(_OWN_CODE):
            return never_again  # in this place of the code
        kind = type(function)
        if kind is not _METHOD and kind is not _BUILTIN:
            return None
        if function in _HARMLESS:
            return never_again if is_known(code.co_filename) else None
        if current_thread() == thread:
            notice(function, first if kind is _METHOD else function.__self__)
        return None

    _MONITORING.use_tool_id(tool, _NAME)
    try:
        _MONITORING.register_callback(tool, event, called)
        _MONITORING.set_events(tool, event)
        _MONITORING.restart_events()  # what is never called again is looked at once in each bucket
        yield
        is_there = (_MONITORING.get_tool(tool), _MONITORING.get_events(tool)) == (_NAME, event)
        if not is_there or _MONITORING.register_callback(tool, event, None) is not called:
            lost()
    finally:
        if _MONITORING.get_tool(tool) == _NAME:
            _MONITORING.set_events(tool, 0)
            _MONITORING.register_callback(tool, event, None)
            _MONITORING.free_tool_id(tool)


@contextlib.contextmanager
def noticing_blindness(give_up: Callable[[str], None]) -> Iterator[None]:
    """Around calls: ``give_up`` is told of whoever has torch call no modes for a while. What a
    function written in C calls then, as ``map``, neither modes nor hook would see."""
    blindfold = torch._C.DisableTorchFunction

    def noticed() -> Any:
        give_up("the loader disables torch functions")
        return blindfold()

    torch._C.DisableTorchFunction = noticed
    try:
        yield
    finally:
        torch._C.DisableTorchFunction = blindfold


def leaves_the_thread(function: Any, owner: Any, locks: set[int]) -> bool:
    """Whether a call starts a thread, wakes one or waits for one, gives a tensor's memory away,
    could hide other calls from the hook or from our mode, or is an extension's.

    Args:
        locks: those that the thread was seen to take; kept from call to call.
    """
    kind = type(owner)
    if kind is _Lock:
        return _meets_others(id(owner), function.__name__, locks)
    if kind is SimpleQueue:
        return bool(function.__name__ == "put")
    if function is _POP_MODE:
        modes = _get_current_function_mode_stack()
        is_ours = bool(modes) and type(modes[-1]).__module__.startswith(_OWN_ROOM)
        return is_ours and not _is_torch_about_to_call_it()
    changes_hook = function in _HOOKS or (owner is _MONITORING and owner is not None)
    return changes_hook or function in _THREADS or _is_an_extensions(function, owner)


def _is_an_extensions(function: Any, owner: Any) -> bool:
    """Whether it was bound by pybind11, and not by torch: such a function may read a tensor that it
    is given."""
    if not type(owner).__name__.startswith(_BOUND_BY_PYBIND):
        return False
    return not str(getattr(function, "__module__", None)).startswith("torch.")


def _is_torch_about_to_call_it() -> bool:
    """A mode, which it takes off the stack meanwhile."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_FRAMES_TO_POP):
        if frame is None or frame.f_code is handle_torch_function.__code__:
            break
        frame = frame.f_back
    return frame is not None and frame.f_code is handle_torch_function.__code__


def _meets_others(lock: int, name: str, held: set[int]) -> bool:
    """Whether a thread waits for another one, or wakes it: takes a lock that it has, or releases
    one that it has not."""
    has_it = lock in held  # the hook does not see a ``with``: such a lock is never in here
    if name == "acquire":
        held.add(lock)
        return has_it
    held.discard(lock)
    return name == "release" and not has_it
