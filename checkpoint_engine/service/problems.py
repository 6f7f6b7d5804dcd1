"""What went wrong, for programs: a code, the text, and a hint what to do."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from checkpoint_engine.errors import UpdateError, kind_of


class Described(BaseModel):
    """What the service gets or tells: openapi.json has the text that stands below a field."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Problem(Described):
    """A failed call."""

    code: str = Field(examples=["busy"])
    """One of a few words that do not change."""
    message: str
    """The error's text, a worker's traceback included."""
    cause: str = Field(default="failed", examples=["worker_failed"])
    """What failed, of a few words: of an update, on the rank that failed first."""
    hint: str = ""
    """What to do about it."""
    rank: int | None = None
    """That failed first, of several."""
    phase: str = Field(default="", examples=["reload"])
    """In which it failed."""
    engines: dict[int, str] = {}
    """What the engine of each rank held then, of an update."""
    seconds: dict[str, float] = {}
    """That this rank had spent in each phase until then."""
    trace: str | None = None
    """A file with what the ranks did until then."""


_HINTS = {
    "busy": "wait for the call that is running: GET /v1/status shows it",
    "update_failed": "everything is released; mend the cause that the message names and update "
    "again, healthy ranks and engines need no restart",
    "forbidden": "this service was started with --allow-path or --allow-update-url",
    "not_found": "see that the path is the same on the server's host and readable by its user",
    "out_of_memory": "free host memory, or unregister a checkpoint first",
    "timeout": "look at the rank or engine that the message names, or raise the timeout",
    "invalid": "mend the request: the message names the value",
    "failed": "",
}
_OF_UPDATES = ("rank", "phase", "engines", "seconds", "trace")


def describe(error: BaseException) -> Problem:
    """The problem that an exception stands for."""
    cause = code = kind_of(error)
    known = {}
    if isinstance(error, UpdateError):
        code, known = "update_failed", {name: getattr(error, name) for name in _OF_UPDATES}
    elif code not in _HINTS:
        code = "failed"
    message = str(error) or repr(error)
    return Problem(code=code, message=message, cause=cause, hint=_HINTS[code], **known)
