"""The page at ``GET /``: what one rank's service holds, does and did. HTML made here, no framework;
its script only asks for the same again. Nothing is loaded from another host."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources

from checkpoint_engine.journal import Job
from checkpoint_engine.progress import Progress
from checkpoint_engine.report import Served
from checkpoint_engine.status import Status

_SHOWN_UPDATES = 12
_SHOWN_FAILURES = 5
_PHASES = (
    "start",
    "plan",
    "buffers",
    "process group",
    "handshake",
    "transfer",
    "reload",
    "release",
    "post hook",
    "comparison",
    "completion",
)
"""Each has a colour of its own in ``status_page.html``; any other phase is grey."""


def render_page(status: Status) -> str:
    """The whole page."""
    template = resources.files("checkpoint_engine").joinpath("status_page.html").read_text()
    title = f"rank {status.rank} of {status.world_size}"
    return template.replace("{title}", escape(title)).replace("{body}", render_body(status))


def render_body(status: Status) -> str:
    """What changes, and is fetched again and again."""
    updates = [job for job in status.jobs if job.call == "update" and job.state != "running"]
    failures = [job for job in status.jobs if job.error is not None][:_SHOWN_FAILURES]
    return "\n".join(
        [
            _header(status),
            *(_running(job, status.progress) for job in status.jobs if job.state == "running"),
            _section("Last updates", _timelines(updates[:_SHOWN_UPDATES])),
            _section("Failures", "".join(map(_failure, failures)) or _none("none")),
            _section("Checkpoints on this rank", _checkpoints(status)),
            _section("Ranks, as gathered last", _ranks(status)),
        ]
    )


def _header(status: Status) -> str:
    running = [job for job in status.jobs if job.state == "running"]
    last = next((job for job in status.jobs if job.call == "update"), None)
    state = "running" if running else "failed" if last and last.state == "failed" else "idle"
    facts = {
        "state": f'<span class="state {state}">{state}</span>',
        "device": escape(f"{status.device} {status.device_uuid}"),
        "NIC": escape(status.nic or "none"),
        "P2P": "on" if status.p2p else "off",
        "pinned": _bytes(status.pinned_bytes),
        "serves": _served(status.served),
        "library": escape(status.version),
    }
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    return (
        f"<header><h1>Rank {status.rank} <small>of {status.world_size}</small></h1>"
        f"<dl>{cells}</dl></header>"
    )


def _served(served: Served | None) -> str:
    if served is None:
        return "unknown"
    when = time.strftime("%H:%M:%S", time.localtime(served.since))
    return escape(f"{served.checkpoint}, version {served.version:.12} since {when}")


def _running(job: Job, progress: Progress | None) -> str:
    what = f"{escape(job.call)} <b>{escape(job.checkpoint)}</b>, {job.seconds:.1f} s"
    if progress is None or progress.checkpoint != job.checkpoint:
        return f'<section class="now"><h2>Now: {what}</h2></section>'
    share = progress.fraction
    moved = f"{_bytes(progress.done_bytes)} of {_bytes(progress.total_bytes)}"
    return (
        f'<section class="now"><h2>Now: {what}</h2>'
        f"<p>{escape(progress.phase)}{', ' + moved if progress.total_bytes else ''}</p>"
        f'<div class="bar" role="progressbar" aria-valuenow="{share * 100:.0f}" '
        f'aria-valuemin="0" aria-valuemax="100"><i style="width:{share:.1%}"></i></div>'
        f"{_bar(progress.seconds, sum(progress.seconds.values()))}</section>"
    )


def _timelines(updates: Sequence[Job]) -> str:
    """One bar per update, all on the scale of the longest."""
    if not updates:
        return _none("none yet")
    longest = max(job.seconds for job in updates)
    rows = "".join(_timeline(job, longest) for job in updates)
    seen = {phase for job in updates if job.report for phase in job.report.phases}
    legend = "".join(
        f'<li><i class="{_class(phase)}"></i>{escape(phase)}</li>'
        for phase in (*_PHASES, *sorted(seen.difference(_PHASES)))
        if phase in seen
    )
    return f'<ul class="legend">{legend}</ul><ol class="updates">{rows}</ol>'


def _timeline(job: Job, longest: float) -> str:
    when = time.strftime("%H:%M:%S", time.localtime(job.began))
    if job.report is None:
        figures = f"failed after {job.seconds:.3f} s"
        bar = _bar({"failed": job.seconds}, longest)
    else:
        rate = job.report.bytes / 1e9 / job.seconds if job.seconds else 0.0
        figures = f"{job.seconds:.3f} s, {_bytes(job.report.bytes)}, {rate:.3g} GB/s"
        bar = _bar(job.report.phases, longest)
    return (
        f'<li class="{job.state}"><div><time>{when}</time> <b>{escape(job.checkpoint)}</b> '
        f"<span>{figures}</span></div>{bar}</li>"
    )


def _bar(phases: Mapping[str, float], whole: float) -> str:
    parts = "".join(
        f'<i class="{_class(phase)}" style="width:{seconds / whole:.3%}" '
        f'title="{escape(phase)}: {seconds:.4f} s"></i>'
        for phase, seconds in phases.items()
        if whole > 0
    )
    return f'<div class="bar">{parts}</div>'


def _class(phase: str) -> str:
    if phase == "failed":
        return "failed"
    return f"p{_PHASES.index(phase)}" if phase in _PHASES else "other"


def _failure(job: Job) -> str:
    assert job.error is not None
    when = time.strftime("%H:%M:%S", time.localtime(job.began))
    lines = [line for line in job.error.message.splitlines() if line.strip()]
    short = "\n".join(
        lines if len(lines) < 3 else [lines[0], "...", lines[-1]]
    )  # the cause is last
    whole = escape(job.error.message)
    more = f"<details><summary>whole text</summary><pre>{whole}</pre></details>"
    hint = f"<p>{escape(job.error.hint)}</p>" if job.error.hint else ""
    return (
        f'<article class="failure"><h3><time>{when}</time> {escape(job.call)} '
        f"{escape(job.checkpoint)}: {escape(job.error.code)}</h3>"
        f"<pre>{escape(short)}</pre>{more if len(lines) > 2 else ''}{hint}</article>"
    )


def _checkpoints(status: Status) -> str:
    rows = [(one.name, f"{one.tensors:,}", _bytes(one.bytes)) for one in status.checkpoints]
    return _table(("name", "tensors", "size"), rows)


def _ranks(status: Status) -> str:
    rows = [
        (str(one.rank), one.nic, f"{one.tensors:,}", _bytes(one.bytes), one.p2p or "none")
        for one in status.ranks
    ]
    return _table(("rank", "NIC", "owns tensors", "owns", "P2P address"), rows)


def _table(head: Iterable[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return _none("none")
    columns = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{columns}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _none(text: str) -> str:
    return f'<p class="none">{escape(text)}</p>'


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
