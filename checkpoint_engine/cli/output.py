"""What every command shares: ``--json``, and how a failure is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import click

FAILED, UNREACHABLE, BUSY = 1, 3, 4
_CODES = {FAILED: "failed", UNREACHABLE: "unreachable", BUSY: "busy"}

F = TypeVar("F", bound=Callable[..., Any])


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Write JSON to stdout.")(function)


def show(result: Mapping[str, Any], text: str, as_json: bool) -> None:
    """The result of a command, for a program or for a reader."""
    click.echo(json.dumps(result, indent=1) if as_json else text)


def fail(message: str, hint: str, as_json: bool, status: int = FAILED) -> NoReturn:
    """End the command; the text goes to stderr, the JSON to stdout."""
    if as_json:
        error = {"code": _CODES[status], "message": message, "hint": hint}
        click.echo(json.dumps({"error": error}, indent=1))
    else:
        click.echo(f"Error: {message}" + (f"\n{hint}" if hint else ""), err=True)
    raise click.exceptions.Exit(status)


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"
