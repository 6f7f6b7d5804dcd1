"""The caller's ``req_func``, which asks the inference engine to receive."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from checkpoint_engine.errors import RequestError
from checkpoint_engine.ground.deadline import poll

_FAREWELL = 1.0  # seconds that a failed update waits for req_func to return

SocketPaths = list[tuple[str, str]]
RequestFunction = Callable[[SocketPaths], Any]


class Request:
    """The caller's ``req_func``, running in a thread of its own while the update goes on."""

    def __init__(self, req_func: RequestFunction, socket_paths: SocketPaths) -> None:
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(
            target=self._run,
            args=(req_func, socket_paths),
            name="checkpoint-engine-request",
            daemon=True,  # a request that never returns must not keep the process
        )
        self._thread.start()

    def _run(self, req_func: RequestFunction, socket_paths: SocketPaths) -> None:
        try:
            req_func(socket_paths)
        except BaseException as error:
            if not self._closed:  # nobody asks any more, and its traceback leads back here
                self._error = error

    def check(self) -> None:
        """Raise what ``req_func`` raised."""
        if self._error is not None:
            error = self._error
            raise RequestError(f"req_func raised {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """After a failure: let the engine answer before the next update asks it again."""
        self._thread.join(_FAREWELL)
        self._closed = True
        self._error = None

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def join(self, check: Callable[[], None]) -> None:
        """Wait for ``req_func`` to return; ``check`` ends the wait by raising."""
        poll(lambda: self.is_over, check)
        self.check()
