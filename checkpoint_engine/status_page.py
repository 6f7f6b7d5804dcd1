"""The page at ``GET /``: what one rank's service holds, does and did. HTML made here, no framework;
its script only asks for the same again. Nothing is loaded from another host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources

from checkpoint_engine.journal import Job
from checkpoint_engine.problems import Problem
from checkpoint_engine.progress import Progress
from checkpoint_engine.report import PHASES
from checkpoint_engine.status import Rank, Status

_SHOWN_UPDATES = 12
_SHOWN_FAILURES = 5
_SHOWN_RANKS = 64
_LONGEST_TO_SCALE = 3
"""Times the median of what is shown: a single slow update must not make the others unreadable."""


def render_page(status: Status) -> str:
    """The whole page."""
    template = resources.files("checkpoint_engine").joinpath("status_page.html").read_text()
    title = f"rank {status.rank} of {status.world_size}"
    return template.replace("{title}", escape(title)).replace("{body}", render_body(status))


def render_body(status: Status) -> str:
    """What changes, and is fetched again and again."""
    updates = [job for job in status.jobs if job.call == "update" and job.state != "running"]
    failures = [job for job in status.jobs if job.error is not None]
    return "\n".join(
        [
            _header(status),
            *(_running(job, status.progress) for job in status.jobs if job.state == "running"),
            _section("Last updates", _timelines(updates[:_SHOWN_UPDATES])),
            _section(
                "Failures", "".join(map(_failure, failures[:_SHOWN_FAILURES])) or _none("none")
            ),
            _section("Checkpoints on this rank", _checkpoints(status)),
            _section("What each rank owns, as gathered last", _ranks(status)),
            f'<p class="zone">Times are in {escape(time.strftime("%Z"))}.</p>',
        ]
    )


def _header(status: Status) -> str:
    running = [job for job in status.jobs if job.state == "running"]
    last = next((job for job in status.jobs if job.call == "update"), None)
    state = "running" if running else "failed" if last and last.state == "failed" else "idle"
    facts = {
        "state": f'<span class="state {state}">{state}</span>',
        "serves": _served(status),
        "device": escape(f"{status.device} {status.device_uuid}"),
        "P2P": _p2p(status),
        "host memory": _host_memory(status),
        "library": escape(status.version),
    }
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    return (
        f"<header><h1>Rank {status.rank} <small>of {status.world_size}</small></h1>"
        f"<dl>{cells}</dl></header>"
    )


def _served(status: Status) -> str:
    served = status.served
    if served is not None:
        what = escape(f"{served.checkpoint}, version {served.version:.12}")
        return f"{what} since {_time(served.since)}"
    if any(job.call == "update" and job.state == "failed" for job in status.jobs):
        return '<span class="state failed">not known, or in part</span>'
    return "not known yet"


def _p2p(status: Status) -> str:
    if not status.p2p:
        return "off"
    return f"by RDMA, {escape(status.nic)}" if status.nic else "over TCP, no RDMA"


def _host_memory(status: Status) -> str:
    kept = f", {_bytes(status.retained_bytes)} kept for later" if status.retained_bytes else ""
    return f"{_bytes(status.pinned_bytes)}{kept}"


def _running(job: Job, progress: Progress | None) -> str:
    what = f"{escape(job.call)} <b>{escape(job.checkpoint)}</b>, {job.seconds:.1f}&nbsp;s"
    if progress is None or progress.checkpoint != job.checkpoint:
        return f'<section class="now"><h2>Now: {what}</h2></section>'
    share = progress.fraction
    moved = f", {_bytes(progress.done_bytes)} of {_bytes(progress.total_bytes)}, {share:.0%}"
    phases = dict(progress.seconds)
    rest = max(0.0, job.seconds - sum(phases.values()))
    phases[progress.phase] = phases.get(progress.phase, 0.0) + rest
    return (
        f'<section class="now"><h2>Now: {what}</h2>'
        f"<p>{escape(progress.phase)}{moved if progress.total_bytes else ''}</p>"
        f'<div class="bar" role="progressbar" aria-label="loaded" aria-valuemin="0" '
        f'aria-valuenow="{share * 100:.0f}" aria-valuemax="100">'
        f'<i style="width:{share:.1%}"></i></div>'
        f"<p>time so far</p>{_bar(phases, sum(phases.values()))}{_legend(phases)}</section>"
    )


def _timelines(updates: Sequence[Job]) -> str:
    """One bar per update on one scale, but for those that are much longer."""
    if not updates:
        return _none("none yet")
    seconds = [job.seconds for job in updates]
    scale = min(max(seconds), _LONGEST_TO_SCALE * statistics.median(seconds))
    rows = "".join(_timeline(job, scale) for job in updates)
    seen = {phase for job in updates for phase in _phases_of(job)}
    return f'{_legend(dict.fromkeys(seen))}<ol class="updates">{rows}</ol>'


def _legend(phases: Mapping[str, float | None]) -> str:
    """The colours of ``phases``, and their seconds where there are any."""
    rows = []
    for phase in (*PHASES, *sorted(set(phases).difference(PHASES))):
        if phase in phases:
            seconds = phases[phase]
            figure = "" if seconds is None else f" <b>{seconds:.2f}&nbsp;s</b>"
            rows.append(f'<li><i class="{_class(phase)}"></i>{escape(phase)}{figure}</li>')
    return f'<ul class="legend">{"".join(rows)}</ul>'


def _phases_of(job: Job) -> dict[str, float]:
    """Of an update that has ended; what a failed one took to end everywhere is ``failed``."""
    if job.report is not None:
        return job.report.phases
    known = {} if job.error is None else dict(job.error.seconds)
    return {**known, "failed": max(0.0, job.seconds - sum(known.values()))}


def _timeline(job: Job, scale: float) -> str:
    if job.report is None:
        figures = f"failed after {job.seconds:.3f}&nbsp;s{_place(job.error)}"
    else:
        rate = job.report.bytes / job.seconds if job.seconds else 0.0
        figures = f"{job.seconds:.3f}&nbsp;s, {_bytes(job.report.bytes)}, {_bytes(rate)}/s"
    if job.seconds > scale:
        figures += ", bar not to scale"
    return (
        f'<li class="{job.state}"><div>{_time(job.began)} <b>{escape(job.checkpoint)}</b> '
        f"<span>{figures}</span></div>{_bar(_phases_of(job), max(scale, job.seconds))}</li>"
    )


def _place(error: Problem | None) -> str:
    if error is None or error.rank is None:
        return ""
    return escape(f" on rank {error.rank} during {error.phase}")


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
    return f"p{PHASES.index(phase)}" if phase in PHASES else "other"


def _failure(job: Job) -> str:
    assert job.error is not None
    lines = [line for line in job.error.message.splitlines() if line.strip()]
    short = "\n".join(
        lines if len(lines) < 3 else [lines[0], "...", lines[-1]]
    )  # the cause is last
    whole = escape(job.error.message)
    more = f'<details id="job-{job.id}"><summary>whole text</summary><pre>{whole}</pre></details>'
    notes = [job.error.hint, _engines(job.error.engines)]
    notes += [f"trace: {job.error.trace}"] if job.error.trace else []
    return (
        f'<article class="failure"><h3>{_time(job.began)} {escape(job.call)} '
        f"{escape(job.checkpoint)}: {escape(job.error.code)}</h3>"
        f"<pre>{escape(short)}</pre>{more if len(lines) > 2 else ''}"
        f"{''.join(f'<p>{escape(note)}</p>' for note in notes if note)}</article>"
    )


def _engines(engines: Mapping[int, str]) -> str:
    """``engines: untouched (rank 0), partly written (ranks 1, 2)``."""
    ranks: dict[str, list[int]] = {}
    for rank, state in sorted(engines.items()):
        ranks.setdefault(state, []).append(rank)
    said = [f"{state} (rank{'s' * (len(of) > 1)} {_few(of)})" for state, of in ranks.items()]
    return f"engines then: {'; '.join(said)}" if said else ""


def _few(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"{', '.join(map(str, ranks[:8]))}{more}"


def _checkpoints(status: Status) -> str:
    rows = [(one.name, f"{one.tensors:,}", _bytes(one.bytes)) for one in status.checkpoints]
    return _table(("name", "#tensors", "#size"), rows)


def _ranks(status: Status) -> str:
    rows = [
        (str(one.rank), *_host_and_nic(one), f"{one.tensors:,}", _bytes(one.bytes), one.p2p or "no")
        for one in status.ranks[:_SHOWN_RANKS]
    ]
    rest = len(status.ranks) - len(rows)
    more = f"<p>and {rest:,} more in v1/status</p>" if rest else ""
    head = ("rank", "host", "NIC", "#tensors", "#size", "P2P address")
    return _table(head, rows) + more


def _host_and_nic(rank: Rank) -> tuple[str, str]:
    nic, _, host = rank.nic.rpartition("@")
    return host, "none" if nic == f"rank-{rank.rank}" else nic


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of numbers have a name that begins with ``#``."""
    if not rows:
        return _none("none")
    kinds = [' class="n"' if name.startswith("#") else "" for name in head]

    def row_of(tag: str, cells: Sequence[str]) -> str:
        each = zip(kinds, cells, strict=True)
        return f"<tr>{''.join(f'<{tag}{kind}>{escape(cell)}</{tag}>' for kind, cell in each)}</tr>"

    return (
        f'<div class="wide"><table><thead>{row_of("th", [name.lstrip("#") for name in head])}'
        f"</thead><tbody>{''.join(row_of('td', row) for row in rows)}</tbody></table></div>"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _none(text: str) -> str:
    return f'<p class="none">{escape(text)}</p>'


def _time(when: float) -> str:
    """Of day, with the date if that is not today's."""
    local = time.localtime(when)
    today = local[:3] == time.localtime()[:3]
    shown = time.strftime("%H:%M:%S" if today else "%d %b %H:%M:%S", local)
    return f'<time datetime="{time.strftime("%Y-%m-%dT%H:%M:%S%z", local)}">{shown}</time>'


def _bytes(count: float) -> str:
    """Three digits, and a space at which no line is broken."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g}\N{NO-BREAK SPACE}{unit}"
        count /= 1000
    return f"{count:.2f}\N{NO-BREAK SPACE}GB"
