"""What every command shares: ``--json``, and how a failure is told."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import click

from checkpoint_engine.settings import LONGEST_UPDATE

FAILED, WRONG_USAGE, UNREACHABLE, BUSY = 1, 2, 3, 4
_CODES = {FAILED: "failed", WRONG_USAGE: "usage", UNREACHABLE: "unreachable", BUSY: "busy"}

F = TypeVar("F", bound=Callable[..., Any])


class Commands(click.Group):
    """A group that tells wrong usage as JSON, too, where that is asked for."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        arguments = list(sys.argv[1:] if args is None else args)
        if "--json" not in arguments or not options.get("standalone_mode", True):
            return super().main(arguments, *rest, **options)
        try:
            sys.exit(super().main(arguments, *rest, **options | {"standalone_mode": False}))
        except click.UsageError as error:
            _tell(error.format_message(), "", as_json=True, status=WRONG_USAGE)
            sys.exit(WRONG_USAGE)
        except click.Abort:
            _tell("interrupted", "", as_json=True, status=FAILED)
            sys.exit(FAILED)


class Positive(click.FloatRange):
    """More than nothing, no more than ``most``, and a number."""

    def __init__(self, most: float) -> None:
        super().__init__(0, most, min_open=True)

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        found = float(super().convert(value, param, ctx))
        return self.fail(f"{value!r} is no number", param, ctx) if math.isnan(found) else found


SECONDS = Positive(LONGEST_UPDATE)


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Write JSON to stdout.")(function)


def show(result: Mapping[str, Any], text: str, as_json: bool) -> None:
    """The result of a command, for a program or for a reader."""
    click.echo(json.dumps(result, indent=1) if as_json else text)


def fail(message: str, hint: str, as_json: bool, status: int = FAILED) -> NoReturn:
    """End the command; the text goes to stderr, the JSON to stdout."""
    _tell(message, hint, as_json, status)
    raise click.exceptions.Exit(status)


def _tell(message: str, hint: str, as_json: bool, status: int) -> None:
    if as_json:
        error = {"code": _CODES[status], "message": message, "hint": hint}
        click.echo(json.dumps({"error": error}, indent=1))
    else:
        click.echo(f"Error: {message}" + (f"\n{hint}" if hint else ""), err=True)


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"
