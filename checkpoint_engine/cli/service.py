"""Commands for a running service: register, update, metas, status, cancel, unregister."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from checkpoint_engine.cli.output import (
    FAILED,
    INTERRUPTED,
    SECONDS,
    UNREACHABLE,
    Failure,
    Shown,
    shown,
)
from checkpoint_engine.cli.servers import (
    RankService,
    ServiceError,
    WorldService,
    ask,
    find_servers,
    on_each,
    plain_url,
)
from checkpoint_engine.cli.watch import watched
from checkpoint_engine.ground.progress import Progress, size_text
from checkpoint_engine.memory.folder import expand_folders, split_over_ranks

_SHOWN_VERSION = 12  # characters, as on the page
_UNDOING = 60.0  # seconds that ranks have to free what they registered
_GRACE = 30.0  # seconds beyond a call's own timeout until its answer is given up


def service_command(function: Callable[..., Shown]) -> Callable[..., None]:
    """A command that asks the servers of ``--server``."""

    @click.option("--server", "places", multiple=True, required=True, metavar="ADDRESS",
                  envvar="PS_SERVERS", show_envvar=True,
                  help="A rank's Unix socket or URL; repeat it for all ranks, of all nodes. {rank} "
                  "in a socket's path stands for every rank whose socket is there.")  # fmt: skip
    @click.option("--token", envvar="PS_HTTP_TOKEN", show_envvar=True,
                  help="What a server on TCP asks for.")  # fmt: skip
    @click.option("--token-file", type=click.Path(exists=True, dir_okay=False),
                  help="Holds the token.")  # fmt: skip
    @shown
    @functools.wraps(function)
    def command(
        places: Sequence[str], token: str | None, token_file: str | None, **arguments: Any
    ) -> Shown:
        if token_file is not None:
            from checkpoint_engine.service.serve import read_token

            token = read_token(token_file)
        servers = find_servers(places, (token or "").strip() or None)
        try:
            return function(servers, **arguments)
        except KeyboardInterrupt:
            text = (
                "interrupted: a registration goes on, and so does an update that ranks have begun"
            )
            hint = "`checkpoint-engine status` shows them, `checkpoint-engine cancel` ends them"
            raise Failure(text, hint, INTERRUPTED) from None

    return command


_timeout = functools.partial(click.option, "--timeout", type=SECONDS, show_default=True)


def _name(value: str) -> str:
    """A checkpoint's name, as it can stand in a route."""
    if not value or "/" in value or not value.isprintable():
        raise click.BadParameter(f"{value!r}: a name has no slash and no control character")
    return value


def _route_of(name: str) -> str:
    return f"/v1/checkpoints/{quote(name, safe='')}"


# ---------------------------------------------------------------------- register, unregister


@click.command(short_help="Have the ranks hold a checkpoint, a share each.")
@click.argument("name", type=_name)
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@_timeout(default=3600.0, help="Seconds.")
@service_command
def register(servers: list[RankService], name: str, paths: Sequence[Path], timeout: float) -> Shown:
    """Register checkpoint NAME: the ranks share the files, or those in a folder, among them.

    Of a folder with an index (*.safetensors.index.json) only what the index names is registered.
    If one rank cannot, none keeps it.
    """
    world = WorldService(servers)
    if holders := [rank for rank, names in enumerate(world.held) if name in names]:
        raise Failure(
            f"checkpoint {name!r} is registered already, on ranks {holders}",
            f"give it another name, or `checkpoint-engine unregister {name}` first",
        )
    files = expand_folders(path.absolute() for path in paths)
    shares = split_over_ranks(files, len(world.servers))
    bodies = [{"files": share} for share in shares]
    began = time.perf_counter()
    with watched(world.servers[0], "register"):
        answers = ask(world.servers, "POST", f"{_route_of(name)}/files", timeout, bodies)
    _undo_unless_all_did(world, name, answers)
    seconds = time.perf_counter() - began
    shared = {server.place: share for server, share in zip(world.servers, shares, strict=True)}
    text = f"registered {name}: {len(files)} files on {len(shares)} ranks, {seconds:.2f} s"
    return Shown({"checkpoint": name, "seconds": seconds, "files": shared}, text)


def _undo_unless_all_did(world: WorldService, name: str, answers: Sequence[Any]) -> None:
    """Raise the first failure, once the ranks that succeeded have freed the checkpoint."""
    failures = _failures(answers)
    if not failures:
        return
    done = [rank for rank in range(len(answers)) if rank not in failures]
    undone = ask([world.servers[rank] for rank in done], "DELETE", _route_of(name), _UNDOING)
    kept = [done[place] for place in _failures(undone)]
    # These did not say that they failed.
    kept += [rank for rank, failure in failures.items() if failure.status in (None, 200)]
    first = next(iter(failures.values()))
    if kept:
        first.hint = f"ranks {sorted(kept)} may hold their part, or still register it: see "
        first.hint += f"`checkpoint-engine status`, then `checkpoint-engine unregister {name}`"
    raise first


def _failures(answers: Sequence[Any]) -> dict[int, ServiceError]:
    """By the place of the server."""
    return {place: one for place, one in enumerate(answers) if isinstance(one, ServiceError)}


@click.command()
@click.argument("name", type=_name)
@service_command
def unregister(servers: list[RankService], name: str) -> Shown:
    """Free checkpoint NAME on every rank."""
    world = WorldService(servers)
    _check_registered(world, name)
    _raise_first(ask(world.servers, "DELETE", _route_of(name)))
    return Shown({"checkpoint": name}, f"unregistered {name}")


def _raise_first(answers: Sequence[Any]) -> None:
    """The first failure, if any, and which ranks it is of."""
    for first in (failed := _failures(answers)).values():
        if len(failed) < len(answers):
            others = f"ranks {list(failed)} failed, the others have done it"
            first.hint = f"{first.hint}; {others}".removeprefix("; ")
        raise first


def _check_registered(world: WorldService, name: str) -> None:
    if name not in world.registered:
        text = f"no rank has registered {name!r}; registered: "
        text += ", ".join(world.registered) or "nothing"
        if world.has_loaded_metas:
            text += "; to read the metas that were loaded: --ranks and --no-gather"
        raise Failure(text)


# ---------------------------------------------------------------------- update


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not (name.strip() and colon):
        raise click.BadParameter("a header is NAME:VALUE")  # not shown: it may be a key
    return name.strip(), value.strip()


@click.command(short_help="Send a checkpoint into running engines.")
@click.argument("name", type=_name)
@click.option("--engine", "engines", multiple=True, metavar="URL", type=plain_url,
              help="An engine, as http://localhost:19730; repeat it in the order of the ranks "
              "that serve it.")  # fmt: skip
@click.option("--engine-uds", "sockets", multiple=True, metavar="PATH",
              help="An engine's Unix socket; these come after --engine.")  # fmt: skip
@click.option("--engine-kind", "kind", type=click.Choice(["vllm", "sglang", "lmdeploy"]),
              help="vllm: with the plug-in or the worker extension. Default: vLLM with the worker "
              "extension.")  # fmt: skip
@click.option("--engine-header", "headers", multiple=True, metavar="NAME:VALUE", type=_header,
              help="With every request to the engines, as an API key; may be repeated, needs "
              "--engine-kind. Default: the bearer token in the servers' PS_ENGINE_TOKEN."
              )  # fmt: skip
@click.option("--inference-parallel-size", "workers", type=click.IntRange(1), metavar="N",
              help="Workers per engine. Default: the ranks divided by the engines.")  # fmt: skip
@click.option("--ranks", default="", metavar="LIST", help="P2P to these ranks, as 0,1,4-7.")
@click.option("--gather/--no-gather", "gather_first", default=None,
              help="Learn first who owns what. Default: but where nothing is registered, metas "
              "were loaded, and --ranks read what they tell of.")  # fmt: skip
@_timeout(default=300.0, help="Seconds for the update.")
@service_command
def update(
    servers: list[RankService],
    name: str,
    engines: Sequence[str],
    sockets: Sequence[str],
    kind: str | None,
    headers: Sequence[tuple[str, str]],
    workers: int | None,
    ranks: str,
    gather_first: bool | None,
    timeout: float,
) -> Shown:
    """Send checkpoint NAME to the engines of all ranks, or of --ranks."""
    if not engines and not sockets:
        raise click.UsageError("no --engine or --engine-uds: nobody is asked to receive")
    members = parse_ranks(ranks)
    world = WorldService(servers)
    size = len(world.servers)
    if members and max(members) >= size:
        raise click.UsageError(f"--ranks names rank {max(members)}; the last one is {size - 1}")
    taking_part = members or list(range(size))
    asked = _engines(engines, sockets, kind, dict(headers))
    requests = _requests(asked, workers, taking_part, size)
    bodies = [{"ranks": members, "timeout": timeout, **requests.get(r, {})} for r in range(size)]
    if gather_first is None:
        gather_first = not (members and world.has_loaded_metas and not world.registered)
    began = time.perf_counter()
    if gather_first:
        _gather(world, name, timeout)
    gathered = time.perf_counter()
    route = f"{_route_of(name)}/update"
    with watched(world.servers[0], "update"):
        ask(world.servers, "POST", route, timeout + _GRACE, bodies, collective=True)
    seconds = {"gather": gathered - began, "update": time.perf_counter() - gathered}
    text = f"updated {name}: gather {seconds['gather']:.3f} s, update {seconds['update']:.3f} s"
    return Shown({"checkpoint": name, "ranks": taking_part, "seconds": seconds}, text)


def _engines(
    urls: Sequence[str], sockets: Sequence[str], kind: str | None, headers: dict[str, str]
) -> list[dict[str, Any]]:
    """What the service is told of each engine."""
    if headers and kind is None:
        raise click.UsageError("--engine-header needs --engine-kind")
    path = "/collective_rpc" if kind is None else ""
    how = {} if kind is None else {"engine_kind": kind, "engine_headers": headers or None}
    found = [{"update_url": f"{url}{path}", **how} for url in urls]
    return found + [{"update_url": f"http://engine{path}", "uds": at, **how} for at in sockets]


def _requests(
    engines: Sequence[dict[str, Any]], workers: int | None, members: list[int], size: int
) -> dict[int, dict[str, Any]]:
    """By rank, the engine that it asks: the first of an engine's ranks does.

    Raises:
        click.UsageError: a rank that takes part would wait for an engine that nobody asks.
    """
    workers = workers or max(1, size // len(engines))
    served = len(engines) * workers
    text = f"{len(engines)} engines of {workers} workers"
    if served > size:
        raise click.UsageError(f"{text} need more ranks than {size}")
    requests = {}
    for first, engine in zip(range(0, served, workers), engines, strict=True):
        group = list(range(first, first + workers))
        taking_part = set(group) & set(members)
        if taking_part and len(taking_part) < workers:
            raise click.UsageError(f"ranks {group} serve one engine: name all of them or none")
        if taking_part:
            requests[first] = {**engine, "inference_group_ranks": group}
    if alone := [rank for rank in members if rank >= served]:
        text += f" serve the first {served} ranks, so ranks {alone} have none: give one --engine "
        raise click.UsageError(text + "for each group of ranks, in their order")
    return requests


def _gather(world: WorldService, name: str, timeout: float) -> None:
    """Have all ranks learn who owns what of checkpoint ``name``."""
    _check_registered(world, name)
    route = f"{_route_of(name)}/gather-metas?timeout={timeout!r}"
    ask(world.servers, "POST", route, timeout + _GRACE, collective=True)


def parse_ranks(text: str) -> list[int]:
    """``0,1,4-7`` as a list.

    Raises:
        click.UsageError: it is something else.
    """
    ranks: list[int] = []
    for part in text.replace(" ", "").split(",") if text else []:
        ends = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part)
        some = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else ()
        if not some:
            raise click.UsageError(f"--ranks is a list as 0,1,4-7, not {text!r}")
        ranks += some
    return ranks


# ---------------------------------------------------------------------- metas, status, cancel


@click.command(short_help="Show, write or load who owns what.")
@click.argument("name", required=False, type=_name)
@click.option("--load", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Take over another world's metas from this file, on every rank.")  # fmt: skip
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path),
              help="Write them there, for --load or for examples/update.py.")  # fmt: skip
@_timeout(default=60.0, help="Seconds for all ranks to meet.")
@service_command
def metas(
    servers: list[RankService],
    name: str | None,
    load: Path | None,
    output: Path | None,
    timeout: float,
) -> Shown:
    """Show, write or load who owns what: of checkpoint NAME, which is gathered for that, or of the
    one that was gathered last."""
    if name is not None and load is not None:
        raise click.UsageError("give either NAME or --load")
    if name is not None:
        _gather(WorldService(servers), name, timeout)
    if load is not None:
        try:
            content = json.loads(load.read_bytes())
        except ValueError as error:
            raise Failure(f"{load} holds no metas as --output writes them: {error}") from error
        bodies = [content] * len(servers)
        _raise_first(ask(WorldService(servers).servers, "POST", "/v1/metas", bodies=bodies))
    found: dict[str, Any] = servers[0].ask("GET", "/v1/metas") or {}
    if output is not None:
        if not found:
            raise Failure("nothing was gathered: name a checkpoint that is registered")
        output.write_text(json.dumps(found))
    lines = [_describe(rank, owned) for rank, owned in found.items()]
    return Shown(found, "\n".join(lines) or "nothing was gathered")


def _describe(rank: str, owned: dict[str, Any]) -> str:
    buffers = owned["memory_buffer_metas_list"]
    tensors = sum(len(buffer["metas"]) for buffer in buffers)
    nbytes = sum(buffer["size"] for buffer in buffers)
    address = owned.get("p2p_store_addr") or "no P2P"
    return f"rank {rank}: {tensors} tensors, {nbytes / 1e9:.3f} GB, {address}"


@click.command()
@service_command
def status(servers: list[RankService]) -> Shown:
    """What every rank's server holds and does. Ends with 3 if one does not answer."""
    answers = ask(servers, "GET", "/v1/status")
    states = [_state(server, one) for server, one in zip(servers, answers, strict=True)]
    known = [state for state in states if "rank" in state]
    size = max((state["world_size"] for state in known), default=0)
    missing = sorted(set(range(size)) - {state["rank"] for state in known})
    lines = list(map(_one_line, states))
    if missing and len(known) == len(states):
        lines.append(f"ranks {missing} of {size} are missing: name them, or start them")
    is_down = missing or not all(state["up"] for state in states)
    code = UNREACHABLE if is_down else FAILED if len(known) < len(states) else 0
    return Shown({"servers": states, "missing_ranks": missing}, "\n".join(lines), code)


def _state(server: RankService, answer: Any) -> dict[str, Any]:
    if not isinstance(answer, ServiceError):
        return {"server": server.place, "up": True, **answer}
    up = answer.status is not None
    return {"server": server.place, "up": up, "error": answer.message, "hint": answer.hint}


def _one_line(state: dict[str, Any]) -> str:
    if "error" in state:
        return f"{state['error']}\n{state['hint']}".strip()
    jobs = [job for job in state["jobs"] if job["state"] == "running"] or state["jobs"][:1]
    held = len(state["checkpoints"])
    doing = ", ".join(f"{job['call']} {job['checkpoint']} {job['state']}" for job in jobs) or "idle"
    return (
        f"{state['server']}: rank {state['rank']} of {state['world_size']}, {state['device']}, "
        f"{held} checkpoint{'' if held == 1 else 's'}, {size_text(state['pinned_bytes'])}, "
        f"{_served(state)}{doing}{_how_far(state)}"
    )


def _served(state: dict[str, Any]) -> str:
    """Statuses of an earlier release have neither this nor progress."""
    served = state.get("served")
    if not served:
        return ""
    version = f" version {served['version'][:_SHOWN_VERSION]}" if served["version"] else ""
    return f"serves {served['checkpoint']}{version}, "


def _how_far(state: dict[str, Any]) -> str:
    if not state.get("progress"):
        return ""
    progress = Progress.model_validate(state["progress"])
    done = f" {progress.fraction:.0%} of {size_text(progress.total_bytes)}"
    return f" ({progress.phase}{done if progress.total_bytes else ''})"


@click.command()
@service_command
def cancel(servers: list[RankService]) -> Shown:
    """End the calls that run on the servers. A gather or an update ends on all ranks of its world;
    an engine that was being updated may be left partly written until the next update. Ends with 3
    if a server does not answer; on the others the calls are ended all the same."""
    found: list[dict[str, Any]] = []
    for server, told in zip(servers, on_each(servers, _cancel_all), strict=True):
        found += [_state(server, told)] if isinstance(told, ServiceError) else told
    failed = [one for one in found if "up" in one]
    cancelled = [one for one in found if one.get("state") == "running"]
    ended = [one for one in found if one.get("state") in ("done", "failed")]
    lines = [f"{one['server']}: cancelled {one['call']} {one['checkpoint']}" for one in cancelled]
    lines += [f"{o['server']}: {o['call']} {o['checkpoint']} had ended already" for o in ended]
    lines += map(_one_line, failed)
    is_down = not all(one["up"] for one in failed)
    code = UNREACHABLE if is_down else FAILED if failed else 0
    result = {"cancelled": cancelled, "ended": ended, "failed": failed}
    return Shown(result, "\n".join(lines) or "nothing runs", code)


def _cancel_all(server: RankService) -> list[dict[str, Any]]:
    """Cancel what runs on one server: the jobs as they are then, and what the server refused."""
    found = []
    running = [job for job in server.ask("GET", "/v1/jobs") if job["state"] == "running"]
    for job in running:
        try:
            found.append({"server": server.place, **server.ask("DELETE", f"/v1/jobs/{job['id']}")})
        except ServiceError as error:
            found.append(_state(server, error))
    return found
