"""``checkpoint-engine doctor``: why this machine is slow, or P2P is off."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from checkpoint_engine.cli.output import FAILED, Shown, shown

if TYPE_CHECKING:
    from checkpoint_engine.tools.doctor import Finding

_COLOURS = {"ok": "green", "note": None, "warning": "yellow", "broken": "red"}


@click.command(short_help="What is off on this machine, and how to mend it.")
@click.option("--quick", is_flag=True, help="Measure no rates.")
@click.option("--strict", is_flag=True, help="End with 1 for warnings too.")
@shown
def doctor(quick: bool, strict: bool) -> Shown:
    """Look at this machine: devices, network, limits, rates, engines.

    Each thing that is off has one line on what it costs and how to mend it. Ends with 1 if an
    update cannot run here.
    """
    from checkpoint_engine.tools.doctor import examine

    findings = examine(measure=not quick)
    failing = {"broken", "warning"} if strict else {"broken"}
    failed = any(one.level in failing for one in findings)
    result = {"healthy": not failed, "findings": [asdict(one) for one in findings]}
    return Shown(result, "\n".join(map(_as_text, findings)), FAILED if failed else 0)


def _as_text(one: Finding) -> str:
    level = click.style(f"{one.level:7}", fg=_COLOURS[one.level])
    notes = {"costs:": one.cost, "mend: ": one.mend}
    lines = [f"{'':24} {label} {note}" for label, note in notes.items() if note]
    return "\n".join([f"{level} {one.subject:16} {one.seen}", *lines])
