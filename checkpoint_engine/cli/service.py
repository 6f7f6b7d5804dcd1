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
    UNREACHABLE,
    fail,
    gigabytes,
    json_option,
    show,
)
from checkpoint_engine.cli.servers import Server, ServiceError, ask_all, find_servers

_SHORT = 10.0  # seconds for what a server answers out of its memory
_GRACE = 30.0  # seconds beyond an update's own timeout until its answer is given up


def service_command(function: Callable[..., None]) -> Callable[..., None]:
    """A command that asks the servers; failures end it with their exit code."""

    @click.option(
        "--server",
        "places",
        multiple=True,
        required=True,
        metavar="ADDRESS",
        envvar="PS_SERVERS",
        help="A rank's Unix socket or URL; repeat it in rank order. {rank} in a socket's path "
        "stands for every rank whose socket is there.",
    )
    @click.option("--token", envvar="PS_HTTP_TOKEN", help="What a server on TCP asks for.")
    @json_option
    @functools.wraps(function)
    def command(places: Sequence[str], token: str | None, as_json: bool, **arguments: Any) -> None:
        try:
            function(find_servers(places, token), as_json=as_json, **arguments)
        except ServiceError as error:
            statuses = {None: UNREACHABLE, 409: BUSY}
            fail(str(error), error.hint, as_json, statuses.get(error.status, FAILED))
        except (ValueError, OSError) as error:
            fail(str(error), "", as_json)

    return command


@click.command()
@click.argument("name")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--timeout", default=3600.0, show_default=True, help="Seconds.")
@service_command
def register(
    servers: list[Server], name: str, paths: Sequence[Path], timeout: float, as_json: bool
) -> None:
    """Register checkpoint NAME: the ranks share the files, or those in a folder, among them."""
    files = [str(file.absolute()) for path in paths for file in _files_of(path)]
    count = len(servers)
    shares = [files[r * len(files) // count : (r + 1) * len(files) // count] for r in range(count)]
    began = time.perf_counter()
    bodies = [{"files": share} for share in shares]
    ask_all(servers, "POST", f"{_route_of(name)}/files", timeout, bodies)
    seconds = time.perf_counter() - began
    result = {
        "checkpoint": name,
        "seconds": seconds,
        "files": {server.place: share for server, share in zip(servers, shares, strict=True)},
    }
    show(
        result,
        f"registered {name}: {len(files)} files on {count} ranks, {seconds:.2f} s",
        as_json,
    )


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path} holds no *.safetensors files")
    return files


@click.command()
@click.argument("name")
@click.option("--engine", "engines", multiple=True, metavar="URL",
              help="An engine, as http://localhost:19730; repeat it in the order of the ranks "
              "that serve it. None: no engine is asked.")  # fmt: skip
@click.option("--engine-uds", "sockets", multiple=True, metavar="PATH",
              help="An engine's Unix socket; these come after --engine.")  # fmt: skip
@click.option("--inference-parallel-size", default=0, metavar="N",
              help="Workers per engine. Default: the ranks divided by the engines.")  # fmt: skip
@click.option("--ranks", default="", metavar="LIST", help="P2P to these ranks, as 0,1,4-7.")
@click.option(
    "--gather/--no-gather", "gather_first", default=True, help="Learn first who owns what."
)
@click.option("--timeout", default=300.0, show_default=True, help="Seconds for the update.")
@service_command
def update(
    servers: list[Server],
    name: str,
    engines: Sequence[str],
    sockets: Sequence[str],
    inference_parallel_size: int,
    ranks: str,
    gather_first: bool,
    timeout: float,
    as_json: bool,
) -> None:
    """Send checkpoint NAME to the engines of all ranks, or of --ranks."""
    members = parse_ranks(ranks)
    asked: list[tuple[str, str | None]] = [(url, None) for url in engines]
    asked += [("http://engine", path) for path in sockets]
    workers = inference_parallel_size or len(servers) // max(len(asked), 1)
    if len(asked) * workers > len(servers):
        raise ValueError(
            f"{len(asked)} engines of {workers} workers need more ranks than {len(servers)}"
        )
    bodies: list[dict[str, Any]] = [{"ranks": members, "timeout": timeout} for _ in servers]
    for place, (url, uds) in enumerate(asked):
        group = list(range(place * workers, (place + 1) * workers))
        bodies[group[0]] |= {
            "update_url": f"{url.rstrip('/')}/collective_rpc",
            "inference_group_ranks": group,
            "uds": uds,
        }
    began = time.perf_counter()
    if gather_first:
        gather(servers, name, timeout)
    gathered = time.perf_counter()
    ask_all(servers, "POST", f"{_route_of(name)}/update", timeout + _GRACE, bodies)
    seconds = {"gather": gathered - began, "update": time.perf_counter() - gathered}
    result = {"checkpoint": name, "ranks": members or list(range(len(servers))), "seconds": seconds}
    show(
        result,
        f"updated {name}: gather {seconds['gather']:.3f} s, update {seconds['update']:.3f} s",
        as_json,
    )


def gather(servers: list[Server], name: str, timeout: float) -> None:
    """Have all ranks learn who owns what of checkpoint ``name``."""
    nothing = [None] * len(servers)
    ask_all(servers, "POST", f"{_route_of(name)}/gather-metas", timeout + _GRACE, nothing)


def _route_of(name: str) -> str:
    return f"/v1/checkpoints/{quote(name, safe='')}"


def parse_ranks(text: str) -> list[int]:
    """``0,1,4-7`` as a list.

    Raises:
        ValueError: it is something else.
    """
    ranks: list[int] = []
    for part in filter(None, text.replace(" ", "").split(",")):
        first, dash, last = part.partition("-")
        try:
            ranks += range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise ValueError(f"--ranks is a list as 0,1,4-7, not {text!r}") from None
    return ranks


@click.command()
@click.argument("name", required=False)
@click.option("--load", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Take over another world's metas from this file, on every rank.")  # fmt: skip
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path),
              help="Write them there, for --load or for examples/update.py.")  # fmt: skip
@service_command
def metas(
    servers: list[Server],
    name: str | None,
    load: Path | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Show, write or load who owns what: of checkpoint NAME, which is gathered for that, or of the
    one that was gathered last."""
    if name is not None and load is not None:
        raise ValueError("give either NAME or --load")
    if name is not None:
        gather(servers, name, _SHORT)
    if load is not None:
        content = json.loads(load.read_bytes())
        ask_all(servers, "POST", "/v1/metas", _SHORT, [content] * len(servers))
    found: dict[str, Any] = servers[0].ask("GET", "/v1/metas", _SHORT) or {}
    if output is not None:
        if not found:
            raise ValueError("nothing was gathered: name a checkpoint that is registered")
        output.write_text(json.dumps(found))
    show(found, _describe(found), as_json)


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
@click.argument("name")
@service_command
def unregister(servers: list[Server], name: str, as_json: bool) -> None:
    """Free checkpoint NAME on every rank."""
    ask_all(servers, "DELETE", _route_of(name), _SHORT, [None] * len(servers))
    show({"checkpoint": name}, f"unregistered {name}", as_json)


@click.command()
@service_command
def status(servers: list[Server], as_json: bool) -> None:
    """What every rank's server holds and does. Ends with 3 if one does not answer."""
    states = [_state(server) for server in servers]
    show({"servers": states}, "\n".join(map(_one_line, states)), as_json)
    if not all(one["up"] for one in states):
        raise click.exceptions.Exit(UNREACHABLE)


def _state(server: Server) -> dict[str, Any]:
    try:
        found = server.ask("GET", "/v1/status", _SHORT)
    except ServiceError as error:
        return {"server": server.place, "up": False, "error": str(error)}
    return {"server": server.place, "up": True, **found}


def _one_line(state: dict[str, Any]) -> str:
    if not state["up"]:
        return str(state["error"])
    jobs = state["jobs"]
    doing = f"{jobs[0]['call']} {jobs[0]['checkpoint']} {jobs[0]['state']}" if jobs else "idle"
    return (
        f"{state['server']}: rank {state['rank']} of {state['world_size']}, {state['device']}, "
        f"{len(state['checkpoints'])} checkpoints, {gigabytes(state['pinned_bytes'])}, {doing}"
    )
