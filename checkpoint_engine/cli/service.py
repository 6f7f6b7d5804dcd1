"""Commands for a running service: register, update, metas, status, unregister."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from checkpoint_engine.cli.output import (
    BUSY,
    FAILED,
    SECONDS,
    UNREACHABLE,
    fail,
    gigabytes,
    json_option,
    show,
)
from checkpoint_engine.cli.servers import (
    SHORT,
    Server,
    ServiceError,
    World,
    ask,
    ask_status,
    find_servers,
)
from checkpoint_engine.memory.folder import expand_folders, split_over_ranks

_UNDOING = 60.0  # seconds that ranks have to free what they registered
_GRACE = 30.0  # seconds beyond a call's own timeout until its answer is given up


class _Name(click.ParamType):
    """A checkpoint's name, as it can stand in a route."""

    name = "name"

    def convert(self, value: str, param: Any, ctx: Any) -> str:
        if not value or "/" in value or not value.isprintable():
            self.fail(f"{value!r}: a checkpoint's name has no slash and no control character")
        return value


def service_command(function: Callable[..., None]) -> Callable[..., None]:
    """A command that asks the servers; failures end it with their exit code."""

    @click.option(
        "--server",
        "places",
        multiple=True,
        required=True,
        metavar="ADDRESS",
        envvar="PS_SERVERS",
        show_envvar=True,
        help="A rank's Unix socket or URL; repeat it for all ranks, of all nodes. {rank} in a "
        "socket's path stands for every rank whose socket is there.",
    )
    @click.option("--token", envvar="PS_HTTP_TOKEN", show_envvar=True,
                  help="What a server on TCP asks for.")  # fmt: skip
    @click.option("--token-file", type=click.Path(exists=True, dir_okay=False),
                  help="Holds the token.")  # fmt: skip
    @json_option
    @functools.wraps(function)
    def command(
        places: Sequence[str],
        token: str | None,
        token_file: str | None,
        as_json: bool,
        **arguments: Any,
    ) -> None:
        try:
            if token_file is not None:
                from checkpoint_engine.service import read_token

                token = read_token(token_file)
            token = (token or "").strip() or None
            function(find_servers(places, token), as_json=as_json, **arguments)
        except ServiceError as error:
            statuses = {None: UNREACHABLE, 409: BUSY}
            fail(str(error), error.hint, as_json, statuses.get(error.status, FAILED))
        except (ValueError, OSError) as error:
            fail(str(error), "", as_json)

    return command


def _route_of(name: str) -> str:
    return f"/v1/checkpoints/{quote(name, safe='')}"


# ---------------------------------------------------------------------- register, unregister


@click.command()
@click.argument("name", type=_Name())
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--timeout", type=SECONDS, default=3600.0,
              show_default=True, help="Seconds.")  # fmt: skip
@service_command
def register(
    servers: list[Server], name: str, paths: Sequence[Path], timeout: float, as_json: bool
) -> None:
    """Register checkpoint NAME: the ranks share the files, or those in a folder, among them.

    Of a folder with an index (*.safetensors.index.json) only what the index names is registered.
    If one rank cannot, none keeps it.
    """
    world = World(servers)
    if ranks := world.holders(name):
        fail(f"checkpoint {name!r} is registered already, on ranks {ranks}",
             f"give it another name, or `checkpoint-engine unregister {name}` first",
             as_json)  # fmt: skip
    files = expand_folders(path.absolute() for path in paths)
    shares = split_over_ranks(files, len(world.servers))
    began = time.perf_counter()
    bodies = [{"files": share} for share in shares]
    answers = ask(world.servers, "POST", f"{_route_of(name)}/files", timeout, bodies).each()
    _undo_unless_all_did(world, name, answers)
    seconds = time.perf_counter() - began
    result = {
        "checkpoint": name,
        "seconds": seconds,
        "files": {server.place: share for server, share in zip(world.servers, shares, strict=True)},
    }
    show(
        result,
        f"registered {name}: {len(files)} files on {len(shares)} ranks, {seconds:.2f} s",
        as_json,
    )


def _undo_unless_all_did(world: World, name: str, answers: Sequence[Any]) -> None:
    """Raise the first failure, once the ranks that succeeded have freed the checkpoint."""
    failures = [answer for answer in answers if isinstance(answer, Exception)]
    if not failures:
        return
    done = [place for place, answer in enumerate(answers) if not isinstance(answer, Exception)]
    registered = [world.servers[place] for place in done]
    undone = ask(registered, "DELETE", _route_of(name), _UNDOING).each()
    kept = [place for place, one in zip(done, undone, strict=True) if isinstance(one, Exception)]
    kept += [place for place, answer in enumerate(answers) if _may_have_done(answer)]
    first = failures[0]
    if kept and isinstance(first, ServiceError):
        first.hint = (
            f"ranks {sorted(kept)} may hold their part, or still register it: see "
            f"`checkpoint-engine status`, then `checkpoint-engine unregister {name}`"
        )
    raise first


def _may_have_done(answer: Any) -> bool:
    """It did not say that it failed."""
    return isinstance(answer, Exception) and getattr(answer, "status", None) in (None, 200)


@click.command()
@click.argument("name", type=_Name())
@service_command
def unregister(servers: list[Server], name: str, as_json: bool) -> None:
    """Free checkpoint NAME on every rank."""
    world = World(servers)
    _check_registered(world, name)
    _raise_first(ask(world.servers, "DELETE", _route_of(name), SHORT).each())
    show({"checkpoint": name}, f"unregistered {name}", as_json)


def _raise_first(answers: Sequence[Any]) -> None:
    """The first failure, if any, and which ranks it is of."""
    failed = [place for place, answer in enumerate(answers) if isinstance(answer, Exception)]
    if failed:
        first = answers[failed[0]]
        if isinstance(first, ServiceError) and len(failed) < len(answers):
            others = f"ranks {failed} failed, the others have done it"
            first.hint = f"{first.hint}; {others}" if first.hint else others
        raise first


def _check_registered(world: World, name: str) -> None:
    if not world.holders(name):
        registered = ", ".join(world.registered) or "nothing"
        loaded = "; to read the metas that were loaded: --ranks and --no-gather"
        raise ValueError(
            f"no rank has registered {name!r}; registered: {registered}"
            + (loaded if world.has_loaded_metas else "")
        )


# ---------------------------------------------------------------------- update


@click.command()
@click.argument("name", type=_Name())
@click.option("--engine", "engines", multiple=True, metavar="URL",
              help="An engine, as http://localhost:19730; repeat it in the order of the ranks "
              "that serve it. None: no engine is asked.")  # fmt: skip
@click.option("--engine-uds", "sockets", multiple=True, metavar="PATH",
              help="An engine's Unix socket; these come after --engine.")  # fmt: skip
@click.option("--inference-parallel-size", type=click.IntRange(1), metavar="N",
              help="Workers per engine. Default: the ranks divided by the engines.")  # fmt: skip
@click.option("--ranks", default="", metavar="LIST", help="P2P to these ranks, as 0,1,4-7.")
@click.option("--gather/--no-gather", "gather_first", default=None,
              help="Learn first who owns what. Default: but where nothing is registered, metas "
              "were loaded, and --ranks read what they tell of.")  # fmt: skip
@click.option("--timeout", type=SECONDS, default=300.0,
              show_default=True, help="Seconds for the update.")  # fmt: skip
@service_command
def update(
    servers: list[Server],
    name: str,
    engines: Sequence[str],
    sockets: Sequence[str],
    inference_parallel_size: int | None,
    ranks: str,
    gather_first: bool | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Send checkpoint NAME to the engines of all ranks, or of --ranks."""
    members = parse_ranks(ranks)
    world = World(servers)
    size = len(world.servers)
    if members and max(members) >= size:
        raise click.UsageError(f"--ranks names rank {max(members)}; the last one is {size - 1}")
    taking_part = members or list(range(size))
    asked = [(_engine(url), None) for url in engines]
    bodies = _bodies(
        [*asked, *(("http://engine", path) for path in sockets)],
        inference_parallel_size,
        taking_part,
        size,
    )
    for body in bodies:
        body |= {"ranks": members, "timeout": timeout}
    if gather_first is None:
        gather_first = not (members and world.has_loaded_metas and not world.registered)
    began = time.perf_counter()
    if gather_first:
        _gather(world, name, timeout)
    gathered = time.perf_counter()
    ask(world.servers, "POST", f"{_route_of(name)}/update", timeout + _GRACE, bodies).all()
    seconds = {"gather": gathered - began, "update": time.perf_counter() - gathered}
    result = {"checkpoint": name, "ranks": taking_part, "seconds": seconds}
    show(
        result,
        f"updated {name}: gather {seconds['gather']:.3f} s, update {seconds['update']:.3f} s",
        as_json,
    )


def _engine(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise click.UsageError(f"--engine {url!r} is no URL as http://localhost:19730")
    return url.rstrip("/")


def _bodies(
    engines: Sequence[tuple[str, str | None]], workers: int | None, members: list[int], size: int
) -> list[dict[str, Any]]:
    """For each rank, the engine that it asks, if any: the first of an engine's ranks does.

    Raises:
        click.UsageError: a rank that takes part would wait for an engine that nobody asks.
    """
    bodies: list[dict[str, Any]] = [{} for _ in range(size)]
    if not engines:
        return bodies
    workers = workers or max(1, size // len(engines))
    if len(engines) * workers > size:
        raise click.UsageError(
            f"{len(engines)} engines of {workers} workers need more ranks than {size}"
        )
    for place, (url, uds) in enumerate(engines):
        group = list(range(place * workers, (place + 1) * workers))
        left_out = sorted(set(group) - set(members))
        if len(left_out) == workers:
            continue
        if left_out:
            raise click.UsageError(
                f"ranks {group} serve one engine: --ranks has to name all of them or none"
            )
        bodies[group[0]] |= {
            "update_url": f"{url}/collective_rpc",
            "inference_group_ranks": group,
            "uds": uds,
        }
    alone = [rank for rank in members if rank >= len(engines) * workers]
    if alone:
        raise click.UsageError(
            f"{len(engines)} engines of {workers} workers are those of the first "
            f"{len(engines) * workers} ranks, so ranks {alone} have none: give one --engine for "
            "each group of ranks, in their order, or none at all"
        )
    return bodies


def _gather(world: World, name: str, timeout: float) -> None:
    """Have all ranks learn who owns what of checkpoint ``name``."""
    _check_registered(world, name)
    route = f"{_route_of(name)}/gather-metas?timeout={timeout!r}"
    ask(world.servers, "POST", route, timeout + _GRACE).all()


def parse_ranks(text: str) -> list[int]:
    """``0,1,4-7`` as a list.

    Raises:
        click.UsageError: it is something else.
    """
    ranks: list[int] = []
    for part in text.replace(" ", "").split(",") if text else []:
        first, dash, last = part.partition("-")
        try:
            some = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            some = range(0)
        if not some:
            raise click.UsageError(f"--ranks is a list as 0,1,4-7, not {text!r}")
        ranks += some
    return ranks


# ---------------------------------------------------------------------- metas, status


@click.command()
@click.argument("name", required=False, type=_Name())
@click.option("--load", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Take over another world's metas from this file, on every rank.")  # fmt: skip
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path),
              help="Write them there, for --load or for examples/update.py.")  # fmt: skip
@click.option("--timeout", type=SECONDS, default=60.0,
              show_default=True, help="Seconds for all ranks to meet.")  # fmt: skip
@service_command
def metas(
    servers: list[Server],
    name: str | None,
    load: Path | None,
    output: Path | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Show, write or load who owns what: of checkpoint NAME, which is gathered for that, or of the
    one that was gathered last."""
    if name is not None and load is not None:
        raise click.UsageError("give either NAME or --load")
    if name is not None:
        _gather(World(servers), name, timeout)
    if load is not None:
        content = _read_json(load)
        world = World(servers)
        contents = [content] * len(world.servers)
        _raise_first(ask(world.servers, "POST", "/v1/metas", SHORT, contents).each())
    found: dict[str, Any] = servers[0].ask("GET", "/v1/metas", SHORT) or {}
    if output is not None:
        if not found:
            raise ValueError("nothing was gathered: name a checkpoint that is registered")
        output.write_text(json.dumps(found))
    show(found, _describe(found), as_json)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} holds no metas as --output writes them: {error}") from error


def _describe(found: dict[str, Any]) -> str:
    lines = []
    for rank, owned in found.items():
        buffers = owned["memory_buffer_metas_list"]
        tensors = sum(len(buffer["metas"]) for buffer in buffers)
        nbytes = sum(buffer["size"] for buffer in buffers)
        address = owned.get("p2p_store_addr") or "no P2P"
        lines.append(f"rank {rank}: {tensors} tensors, {nbytes / 1e9:.3f} GB, {address}")
    return "\n".join(lines) or "nothing was gathered"


@click.command()
@service_command
def status(servers: list[Server], as_json: bool) -> None:
    """What every rank's server holds and does. Ends with 3 if one does not answer."""
    answers = ask_status(servers).each()
    states = [_state(server, one) for server, one in zip(servers, answers, strict=True)]
    known = [state for state in states if "rank" in state]
    size = max((state["world_size"] for state in known), default=0)
    missing = sorted(set(range(size)) - {state["rank"] for state in known})
    lines = list(map(_one_line, states))
    if missing and len(known) == len(states):
        lines.append(f"ranks {missing} of {size} are missing: name them, or start them")
    show({"servers": states, "missing_ranks": missing}, "\n".join(lines), as_json)
    if missing or not all(state["up"] for state in states):
        raise click.exceptions.Exit(UNREACHABLE)
    if len(known) < len(states):
        raise click.exceptions.Exit(FAILED)


def _state(server: Server, answer: Any) -> dict[str, Any]:
    if isinstance(answer, ServiceError):
        up = answer.status is not None
        return {"server": server.place, "up": up, "error": str(answer), "hint": answer.hint}
    if isinstance(answer, Exception):
        raise answer
    return {"server": server.place, "up": True, **answer}


def _one_line(state: dict[str, Any]) -> str:
    if "error" in state:
        return f"{state['error']}\n{state['hint']}".strip()
    running = [job for job in state["jobs"] if job["state"] == "running"]
    jobs = running or state["jobs"][:1]
    doing = ", ".join(f"{job['call']} {job['checkpoint']} {job['state']}" for job in jobs) or "idle"
    return (
        f"{state['server']}: rank {state['rank']} of {state['world_size']}, {state['device']}, "
        f"{len(state['checkpoints'])} checkpoints, {gigabytes(state['pinned_bytes'])}, {doing}"
    )
