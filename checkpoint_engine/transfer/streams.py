"""How the copies and broadcasts of one update are ordered on a device.

Steps of work are ordered by events. An event has ``query()``: whether it has happened; it raises
what went wrong.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from types import SimpleNamespace
from typing import Any

from checkpoint_engine.ground.deadline import Deadline, poll
from checkpoint_engine.ground.devices import DeviceManager

Event = Any


class DeviceStreams:
    """Two streams of an accelerator: host-to-device copies, and what enters the double buffer. The
    host never waits for them.

    Attributes:
        are_queues: whether copies and broadcasts that are begun later wait by themselves.
    """

    are_queues = True

    def __init__(self, device_module: Any) -> None:
        self._module = device_module
        self._copy = device_module.Stream()
        self._broadcast = device_module.Stream()

    def copying(self) -> contextlib.AbstractContextManager[Any]:
        """While this is entered, work goes to the stream of copies."""
        return self._module.stream(self._copy)

    def broadcasting(self) -> contextlib.AbstractContextManager[Any]:
        """While this is entered, work goes to the stream of the double buffer."""
        return self._module.stream(self._broadcast)

    def event(self) -> Event:
        """Marks the point that the current stream has reached."""
        event = self._module.Event()
        event.record()
        return event

    def wait(self, event: Event) -> None:
        """Work that is begun later in the current stream waits for ``event``."""
        self._module.current_stream().wait_event(event)

    def copy(self, action: Callable[[], None], after: Event) -> Event:
        """Have ``action`` copy in the current stream, once ``after`` has happened."""
        self.wait(after)
        action()
        return self.event()

    def close(self) -> None:
        """Nothing waits here: the device's own order protects memory that is freed."""


class HostStreams:
    """The same on the cpu device: one thread copies, beside the one that runs the update."""

    def __init__(self, are_queues: bool) -> None:
        """``are_queues``: whether what enters the double buffer is done by that thread, too."""
        self.are_queues = are_queues
        self._failed = False
        self._begun: list[InThread] = []
        self._ended = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-engine-copy")

    def copying(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    broadcasting = copying

    def event(self) -> Event:
        return HAPPENED

    def wait(self, event: Event) -> None:
        poll(event.query, self._check)

    def copy(self, action: Callable[[], None], after: Event) -> Event:
        def wait_and_copy() -> None:
            if self._failed:  # what is ordered after a copy may count on it
                raise RuntimeError("an earlier copy of this update failed")
            try:
                self.wait(after)
                action()
            except BaseException:
                self._failed = True
                raise

        self._begun.append(InThread(self._thread, wait_and_copy))
        return self._begun[-1]

    def close(self) -> None:
        """Return when no copy is under way any more."""
        self._ended.set()
        self._thread.shutdown(cancel_futures=True)
        for copy in self._begun:
            copy.forget()

    def _check(self) -> None:
        if self._ended.is_set():
            raise RuntimeError("the update has ended")


class InThread:
    """The event of what another thread does."""

    def __init__(self, thread: Executor, action: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        self._closed = False
        self._future = thread.submit(self._run, action)

    def query(self) -> bool:
        """Whether it is over; raises what went wrong, once."""
        if not self.is_over:
            return False
        if self._future.cancelled():
            raise RuntimeError("the update has ended")
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error  # this frame lives on in its traceback
        return True

    @property
    def is_over(self) -> bool:
        return self._future.done()

    def close(self, deadline: Deadline) -> None:
        """Wait for it until ``deadline`` at most, and forget it."""
        if not self._future.cancelled():  # which ``wait`` takes for one that goes on
            wait([self._future], deadline.remaining())
        self.forget()

    def forget(self) -> None:
        self._closed = True
        self._error = None

    def _run(self, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:
            if not self._closed:  # nobody asks any more, and its traceback leads to the memory
                self._error = error


HAPPENED: Event = SimpleNamespace(query=lambda: True)
"""The event of a device where every call has finished when it returns."""
Streams = DeviceStreams | HostStreams


def make_streams(device_manager: DeviceManager, orders_double_buffer: bool = False) -> Streams:
    """The streams of one update on the current device. Close them before the memory is freed.

    Args:
        orders_double_buffer: on the cpu device, whether the copying thread also does what enters
            the double buffer.
    """
    if device_manager.is_accelerator:
        return DeviceStreams(device_manager.device_module)
    return HostStreams(orders_double_buffer)
