"""The conductor: one update on one rank, from what the ranks agree on to the report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from loguru import logger

from checkpoint_engine.data_types import ALIGNMENT
from checkpoint_engine.errors import EngineError, UpdateError
from checkpoint_engine.ground.deadline import begin
from checkpoint_engine.ground.details import log_detail
from checkpoint_engine.ground.local_rank import LocalRank
from checkpoint_engine.ground.needs import digest_of
from checkpoint_engine.ground.progress import drawn_bar
from checkpoint_engine.ground.report import LoadedCheckpoint, UpdateReport
from checkpoint_engine.handover.ipc import SharedBuffer
from checkpoint_engine.handover.link import WorkerLink, open_context
from checkpoint_engine.memory.checkpoints import Checkpoint
from checkpoint_engine.planning.layouts import encode_place
from checkpoint_engine.planning.plan import TransferPlan
from checkpoint_engine.transfer.tracer import RankTracer
from checkpoint_engine.update.instances import Instance
from checkpoint_engine.update.order import Order, SocketPaths, check_request
from checkpoint_engine.update.pipeline import Pipeline
from checkpoint_engine.update.session import EngineState, WorkerSession
from checkpoint_engine.update.skipping import Contents, may_skip
from checkpoint_engine.update.trace import write_trace
from checkpoint_engine.update.ways.base import Move, Mover, Way
from checkpoint_engine.update.ways.shard import can_shard
from checkpoint_engine.world.call import Call
from checkpoint_engine.world.gathered import Gathered
from checkpoint_engine.world.hello import Hello, agreed_version

_FAREWELL = 1.0  # seconds that a failed update waits for req_func to return
_COMES_WITHIN = 30.0  # seconds for a worker, once every req_func has returned; or half the timeout
_LOOK_AGAIN = 0.5  # seconds between two looks at whether they have
_NAMED_BEFORE = 1.0  # seconds before the end at which a rank without a worker says so


@dataclass
class Server:
    """What one rank keeps between its updates.

    Attributes:
        ways: in the order of preference; the first that serves all ranks is taken.
        joins_parts: whether the worker puts tensors together that travel in parts; ``None``: none
            has said so. Plans are made before a worker is there to be asked.
        maps_peers: whether it mapped the other ranks' buffers, when it was last asked to.
        needs: what the worker reads, as it stated in its last update; empty: everything.
        served: what the engine holds; ``None`` before the first update, and while the weights are
            partly written.
    """

    here: LocalRank
    ways: Sequence[Way]
    joins_parts: bool | None = None
    maps_peers: bool = False
    needs: str = ""
    served: LoadedCheckpoint | None = None

    def learn(self, session: WorkerSession, loaded: LoadedCheckpoint) -> None:
        """However an update ended. ``loaded``: what the engine holds if it succeeded."""
        if session.worker_joins_parts is not None:
            self.joins_parts, self.needs = session.worker_joins_parts, session.needs
        if session.unmapped is not None:
            self.maps_peers = not session.unmapped
        failed = any(self.here.rank in one.ranks for one in session.failed)
        if session.state is EngineState.HOLDS and not failed:
            self.served = loaded.model_copy(update={"since": time.time()})
        elif session.state is not EngineState.UNTOUCHED:
            self.served = None


def run_update(
    call: Call, source: Checkpoint, gathered: Gathered, order: Order, server: Server
) -> tuple[UpdateReport, Gathered]:
    """Send ``source``, and what other ranks own of that checkpoint, to the workers. All members.

    Returns the report, and what is known of the owners now.
    """
    call.clock.on_phase = partial(log_detail, call.rank, "updating {}: {}", order.checkpoint)
    with ExitStack() as held:
        link = _listen(held)
        hellos = _agree(call, link, source, gathered, order, server, held)
        call.watch()
        gathered = gathered.renewed(call, hellos, source)
        ask = cache(partial(_ask, order, link, hellos, gathered, server.here, held))
        with call.guarded(link.let_in):  # a worker does not wait long for that
            move, mover, moving = _connect(call, source, gathered, hellos, order, server, ask, held)

        call.begin("handshake")
        request = ask()
        session = _open_session(call, link, request, order, hellos, server, held)
        pipeline = Pipeline(move, mover, session)
        skips = move.plan.may_shrink
        contents = Contents.gather(call, move.plan, source, gathered) if skips else None
        if contents is None:
            pipeline.begin()
        worker = (server.needs, can_shard(hellos), contents is not None)
        options = (move.plan.cuts_tensors, mover.sources, mover.must_map, *worker, mover.advance)
        session.hand_over(move.buffer, call.deadline.remaining(), *options)
        mover.handed_over(session.unmapped or "", session.reads_needs)
        if contents is not None:
            move = move.without(contents.agree(call, session))
            mover.begin(move.plan)
            pipeline = Pipeline(move, mover, session)
            pipeline.begin()
        pipeline.run()

        call.begin("release")
        session.release()
        call.begin("post hook")  # the worker goes on while the ranks let go of its memory
        mover.let_go()
        served = mover.served
        moving.close()  # NICs and neighbours let go of the memory before it is given back
        del pipeline, mover  # and so does staging
        move.buffer.close(have_all_left=True)
        session.finish(request)
        return _report(call, move, session, hellos, order, server.here, served), gathered


# ---------------------------------------------------------------------- agreeing


def _listen(held: ExitStack) -> WorkerLink:
    context = held.enter_context(open_context())
    return held.enter_context(closing(WorkerLink(context)))


def _agree(
    call: Call,
    link: WorkerLink,
    source: Checkpoint,
    gathered: Gathered,
    order: Order,
    server: Server,
    held: ExitStack,
) -> list[Hello]:
    """What every member says; raises if they do not want the same."""
    call.begin("plan")
    mine = order.hello(server.here, link.url, gathered.digest)
    mine = replace(mine, joins_parts=server.joins_parts, maps_peers=server.maps_peers)
    mine = replace(mine, needs=digest_of(server.needs))
    call.claim(mine)
    if mine.ranks is not None:
        mine = replace(mine, gone=tuple(sorted(call.membership.world.liveness.gone)))
    for way in server.ways:
        mine = way.introduce(mine, held)
    gathered.check_usable(source, remote=order.ranks is not None)
    if source.serial != gathered.serial and not gathered.is_loaded:
        mine = replace(mine, place=encode_place(source.owned), layout=gathered.layout)
    return call.exchange(mine)


def _connect(
    call: Call,
    source: Checkpoint,
    gathered: Gathered,
    hellos: Sequence[Hello],
    order: Order,
    server: Server,
    ask: Callable[[], Any],
    held: ExitStack,
) -> tuple[Move, Mover, ExitStack]:
    """By the first way that turns out to connect all ranks; the last one always does.

    Returns what is moved and by what, and the stack that disconnects.
    """
    refusals: list[str] = []
    may_shrink = may_skip(call, hellos, gathered)
    for way in server.ways:
        refused = way.refusal(gathered, hellos)
        if refused is None:
            way.prepare(call, hellos, server.needs)
            plan = way.plan(gathered, hellos)
            plan = replace(plan, may_shrink=True) if may_shrink else plan
            _show_progress(call, plan, order, server, held)
            tracer = _trace(call, hellos, order, server)
            call.begin("buffers")
            nbytes = max(way.buffer_slots(plan, hellos) * plan.bucket_bytes, ALIGNMENT)
            buffer = _share_buffer(nbytes, server.here, held)
            said = way.name, "; ".join(refusals)
            move = Move(call, plan, source, gathered, buffer, tracer, *said)
            ask()  # the engine makes itself ready while the ranks reach each other
            with ExitStack() as attempt:
                connected = way.connect(move, hellos, attempt)
                if isinstance(connected, Mover):
                    return move, connected, held.enter_context(attempt.pop_all())
            buffer.close()
            refused = connected
        if refused:
            refusals.append(f"not by {way.name}: {refused}")
    raise RuntimeError(f"there is no way between the ranks: {'; '.join(refusals)}")


# ---------------------------------------------------------------------- the engine


def _share_buffer(nbytes: int, here: LocalRank, held: ExitStack) -> SharedBuffer:
    return held.enter_context(SharedBuffer(here.device_manager, here.local_rank, nbytes))


def _ask(
    order: Order,
    link: WorkerLink,
    hellos: Sequence[Hello],
    gathered: Gathered,
    here: LocalRank,
    held: ExitStack,
) -> Future[Any]:
    """Run the caller's ``req_func``; after a failure it may answer before the next one asks."""
    paths: SocketPaths = [(gathered.devices.get(rank, ""), "") for rank in range(here.world_size)]
    for hello in hellos:
        paths[hello.rank] = hello.device, hello.address
    request = begin(partial(order.req_func, paths), "checkpoint-engine-request")
    held.callback(wait, [request], _FAREWELL)
    held.push(lambda _, exc, *__: None if exc is None else link.abort(_words(exc)))
    return request


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _open_session(
    call: Call,
    link: WorkerLink,
    request: Future[Any],
    order: Order,
    hellos: Sequence[Hello],
    server: Server,
    held: ExitStack,
) -> WorkerSession:
    """From now on every wait of the call looks at the engine, too."""

    def give_up(exc_type: object, exc: BaseException | None, traceback: object) -> None:
        """On failure, tell the other ranks and this rank's worker before cleaning up."""
        if isinstance(exc, EngineError):
            call.clock.begin(session.phase)
        if exc is not None:
            call.publish(exc)
            link.abort(_words(exc))

    version = agreed_version(hellos)
    goes_on = order.on_instance_failure == "continue"
    session = (
        Instance(link, request, call, [one.instance for one in hellos], version)
        if goes_on
        else WorkerSession(link, call, version)
    )
    held.push(give_up)
    if not goes_on:
        held.enter_context(call.guarded(partial(check_request, request)))
        held.enter_context(call.guarded(_expect_worker(call, link, request, hellos)))
    held.enter_context(call.guarded(session.check))
    call.state = session.describe_state
    mine = next(one for one in hellos if one.rank == call.rank)
    loaded = LoadedCheckpoint(
        checkpoint=order.checkpoint, version=version, engine=mine.instance, since=0.0
    )
    held.callback(server.learn, session, loaded)
    return session


def _expect_worker(
    call: Call, link: WorkerLink, request: Future[Any], hellos: Sequence[Hello]
) -> Callable[[], None]:
    """A guard: raises on the rank whose worker does not come, before the others' time is up. Once
    every rank's ``req_func`` has returned, a worker comes soon or never; before that, the rank that
    asks the engine may still be waiting for it."""
    told = False
    answered: float | None = None
    look_again_at = 0.0
    names_it = min(_NAMED_BEFORE, call.deadline.seconds / 10)
    device = next(one.device for one in hellos if one.rank == call.rank)
    nobody = f"no inference worker has connected to rank {call.rank}, for {device} at {link.url}"
    overdue = _overdue(call, nobody)

    def check() -> None:
        nonlocal told, answered, look_again_at
        if not told and request.done():
            call.tell(f"answered/{call.rank}", b"")
            told = True
        if link.has_worker:
            return
        if call.deadline.remaining() < names_it:
            raise _late_worker(call, request, nobody)
        if answered is not None:
            overdue(time.monotonic() - answered)
        elif told and time.monotonic() > look_again_at:
            look_again_at = time.monotonic() + _LOOK_AGAIN
            if call.store.check([f"answered/{rank}" for rank in call.members]):
                answered = time.monotonic()

    return check


def _overdue(call: Call, nobody: str) -> Callable[[float], None]:
    """Warns once, and raises once it is late, given the seconds since every rank's ``req_func``
    has returned: an engine that was asked in the background may still load."""
    comes_within = max(_COMES_WITHIN, call.deadline.seconds / 2)
    warned = False

    def look(seconds: float) -> None:
        nonlocal warned
        text = f"req_func has returned on every rank, and within {{:g}} s {nobody}"
        if seconds >= comes_within:
            late = f"{text.format(comes_within)}: was that engine asked?"
            raise EngineError(late, "worker_lost")
        if seconds >= _COMES_WITHIN and not warned:
            warned = True
            logger.warning("handshake: {}; waiting on", text.format(_COMES_WITHIN))

    return look


def _late_worker(call: Call, request: Future[Any], nobody: str) -> EngineError:
    waiting = f"gave up after {call.deadline.seconds:g} s waiting for {call.clock.phase}"
    asked = "has returned" if request.done() else "has not returned: does its engine answer?"
    return EngineError(f"{waiting}: {nobody}; this rank's req_func {asked}", "timeout")


# ---------------------------------------------------------------------- what is said about it


def _show_progress(
    call: Call, plan: TransferPlan, order: Order, server: Server, held: ExitStack
) -> None:
    call.clock.total_bytes = plan.total_bytes
    show = order.on_progress
    if show is None and server.here.draws_bars:
        show = held.enter_context(drawn_bar("update", plan.total_bytes))
    if show is not None:
        shown = show
        call.clock.on_advance = lambda: shown(call.clock.progress)
    log_detail(call.rank, "updating {}: {}", order.checkpoint, plan)


def _trace(call: Call, hellos: Sequence[Hello], order: Order, server: Server) -> RankTracer:
    """Note what this rank does. If the update fails, it writes its own part of the trace."""
    folder = next((one.trace for one in hellos if one.trace), "")
    tracer = RankTracer(call.rank, server.here.device_manager, exact=bool(folder))
    if folder:

        def write(failure: UpdateError) -> None:
            part = tracer.encode_failure(call.clock.history)
            failure.trace = _write_trace(folder, order, hellos, [part], failure)

        call.on_failure = write
    return tracer


def _collect_trace(
    call: Call, tracer: RankTracer, hellos: Sequence[Hello], order: Order
) -> str | None:
    """The file with all ranks' parts, on the rank that writes it."""
    writer = next((one for one in hellos if one.trace), None)
    if writer is None:
        return None
    call.begin("trace")
    call.tell(f"trace/{call.rank}", tracer.encode(call.clock.history))
    if call.rank != writer.rank:
        return None
    parts = call.read([f"trace/{rank}" for rank in call.members])
    return _write_trace(writer.trace, order, hellos, parts)


def _write_trace(
    folder: str,
    order: Order,
    hellos: Sequence[Hello],
    parts: Sequence[bytes],
    failure: UpdateError | None = None,
) -> str | None:
    """Failing to write it fails nothing else."""
    version = agreed_version(hellos)
    try:
        return str(write_trace(Path(folder), order.checkpoint, version, parts, failure))
    except (OSError, ValueError) as error:  # the latter: no name for a file
        logger.warning("the trace cannot be written into {}: {}", folder, error)
        return None


def _compare_ranks(call: Call, statement: dict[str, Any]) -> dict[str, dict[int, Any]]:
    """What every rank spent its time with so far, by phase and by the rank that it waited for; and
    what every engine states."""
    call.begin("comparison")
    mine = json.dumps([call.clock.seconds, call.clock.waited_for, statement]).encode()
    told = [json.loads(one) for one in call.all_gather("phases", mine)]
    names = ("by_rank", "waited_for_by_rank", "engines")
    columns = zip(*told, strict=True)
    return {n: dict(zip(call.members, c, strict=True)) for n, c in zip(names, columns, strict=True)}


def _report(
    call: Call,
    move: Move,
    session: WorkerSession,
    hellos: Sequence[Hello],
    order: Order,
    here: LocalRank,
    served: str,
) -> UpdateReport:
    compared: dict[str, Any] = {"engines": {call.rank: session.statement}}
    if order.compare_ranks:
        compared = _compare_ranks(call, session.statement)
    return UpdateReport(
        checkpoint_name=order.checkpoint,
        rank=call.rank,
        world_size=here.world_size,
        tensors=move.plan.tensor_count,
        buckets=len(move.plan.steps),
        bucket_bytes=move.plan.bucket_bytes,
        bytes=move.plan.total_bytes,
        skipped_tensors=len(move.left_out),
        skipped_bytes=move.skipped_bytes,
        version=agreed_version(hellos),
        way=move.way,
        way_reason="; ".join(one for one in (move.reason, served) if one),
        failed_instances=list(session.failed),
        gather_seconds=move.gathered.seconds,
        waited_for=call.clock.waited_for,
        stages=move.tracer.stages(),
        trace=_collect_trace(call, move.tracer, hellos, order),
        **compared,
    )
