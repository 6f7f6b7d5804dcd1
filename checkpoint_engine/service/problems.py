"""What went wrong, for programs: a code, the text, and a hint what to do."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from checkpoint_engine.errors import UpdateError, kind_of


class Problem(BaseModel):
    """A failed call."""

    model_config = ConfigDict(frozen=True)

    code: str = Field(description="One of a few words that do not change.", examples=["busy"])
    message: str = Field(description="The error's text, a worker's traceback included.")
    cause: str = Field(
        default="failed",
        description="What failed, of a few words: of an update, on the rank that failed first.",
        examples=["worker_failed"],
    )
    hint: str = Field(default="", description="What to do about it.")
    rank: int | None = Field(default=None, description="That failed first, of several.")
    phase: str = Field(default="", description="In which it failed.", examples=["reload"])
    engines: dict[int, str] = Field(
        default={}, description="What the engine of each rank held then, of an update."
    )
    seconds: dict[str, float] = Field(
        default={}, description="That this rank had spent in each phase until then."
    )
    trace: str | None = Field(
        default=None, description="A file with what the ranks did until then."
    )


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


def describe(error: BaseException) -> Problem:
    """The problem that an exception stands for."""
    cause = kind_of(error)
    code = "update_failed" if isinstance(error, UpdateError) else cause
    code = code if code in _HINTS else "failed"
    problem = Problem(code=code, message=str(error) or repr(error), cause=cause, hint=_HINTS[code])
    if not isinstance(error, UpdateError):
        return problem
    known = ("rank", "phase", "engines", "seconds", "trace")
    return problem.model_copy(update={name: getattr(error, name) for name in known})
