"""What every command shares: ``--json``, and how its result or its failure is told."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import IO, Any, NamedTuple

import click

from checkpoint_engine.settings import LONGEST_UPDATE

FAILED, WRONG_USAGE, UNREACHABLE, BUSY, INTERRUPTED = 1, 2, 3, 4, 130
_CODES = {
    FAILED: "failed",
    WRONG_USAGE: "usage",
    UNREACHABLE: "unreachable",
    BUSY: "busy",
    INTERRUPTED: "interrupted",
}


class Shown(NamedTuple):
    """What a command found: for programs, for readers, and the exit code that it stands for."""

    result: Mapping[str, Any]
    text: str
    exit_code: int = 0


class Failure(click.ClickException):
    """A command could not do what it was asked to.

    Attributes:
        hint: what to do about it.
        cause: one of ``errors.KINDS``, where the server said so.
    """

    def __init__(self, message: str, hint: str = "", exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.hint = hint
        self.cause = ""
        self.exit_code = exit_code  # type: ignore[misc]

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"Error: {self.message}\n{self.hint}".strip(), file, err=True)


class Commands(click.Group):
    """A group that tells failures as JSON, wrong usage too, where that is asked for."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """An empty option is most often a variable that the shell does not have."""
        for before, argument in () if ctx.resilient_parsing else pairwise(["", *args]):
            option, equals, value = argument.partition("=")
            if option.startswith("--") and equals and not value:
                raise click.UsageError(f"{option} is empty: is a variable not set?", ctx)
            if not argument:
                raise click.UsageError(f"an argument after {before!r} is empty", ctx)
        return super().parse_args(ctx, args)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        arguments = list(sys.argv[1:] if args is None else args)
        if "--json" not in arguments or not options.get("standalone_mode", True):
            return super().main(arguments, *rest, **options)
        try:
            sys.exit(super().main(arguments, *rest, **options | {"standalone_mode": False}))
        except (click.ClickException, click.Abort) as error:
            failure = error if isinstance(error, click.ClickException) else Failure("interrupted")
            told = {"code": _CODES[failure.exit_code], "message": failure.format_message()}
            told["cause"] = getattr(failure, "cause", "")  # click's own have neither
            told["hint"] = getattr(failure, "hint", "")
            click.echo(json.dumps({"error": told}, indent=1))
            sys.exit(failure.exit_code)


def shown(function: Callable[..., Shown]) -> Callable[..., None]:
    """Give a command ``--json``, show what it returns, and end it with a line where it raises."""

    @click.option("--json", "as_json", is_flag=True, help="Write JSON to stdout.")
    @functools.wraps(function)
    def command(as_json: bool, **arguments: Any) -> None:
        try:
            found = function(**arguments)
            click.echo(json.dumps(found.result, indent=1) if as_json else found.text)
        except (ValueError, OSError) as error:
            raise Failure(str(error)) from error
        if found.exit_code:
            raise click.exceptions.Exit(found.exit_code)

    return command


class Positive(click.FloatRange):
    """More than nothing, no more than ``most``, and a number."""

    def __init__(self, most: float) -> None:
        super().__init__(0, most, min_open=True)

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        found = float(super().convert(value, param, ctx))
        return self.fail(f"{value!r} is no number", param, ctx) if math.isnan(found) else found


SECONDS = Positive(LONGEST_UPDATE)
