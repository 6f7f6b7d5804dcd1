"""``checkpoint-engine doctor``: why this machine is slow, or P2P is off."""

from __future__ import annotations

from dataclasses import asdict

import click

from checkpoint_engine.cli.output import FAILED, json_option

_COLOURS = {"ok": "green", "note": None, "warning": "yellow", "broken": "red"}


@click.command()
@click.option("--quick", is_flag=True, help="Measure no rates.")
@click.option("--strict", is_flag=True, help="End with 1 for warnings too.")
@json_option
def doctor(quick: bool, strict: bool, as_json: bool) -> None:
    """Look at this machine: devices, network, limits, rates, engines.

    Each thing that is off has one line on what it costs and how to mend it. Ends with 1 if an
    update cannot run here.
    """
    import json

    from checkpoint_engine.tools.doctor import examine

    findings = examine(measure=not quick)
    worst = [one.level for one in findings]
    failed = "broken" in worst or (strict and "warning" in worst)
    if as_json:
        result = {"healthy": not failed, "findings": [asdict(one) for one in findings]}
        click.echo(json.dumps(result, indent=1))
    else:
        for one in findings:
            level = click.style(f"{one.level:7}", fg=_COLOURS[one.level])
            click.echo(f"{level} {one.subject:16} {one.seen}")
            if one.cost:
                click.echo(f"{'':24} costs: {one.cost}")
            if one.mend:
                click.echo(f"{'':24} mend:  {one.mend}")
    if failed:
        raise click.exceptions.Exit(FAILED)
