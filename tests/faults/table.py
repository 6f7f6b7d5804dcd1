"""The table: which fault strikes at which step, and how the calls must end on the other ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from fault_fleet import RANKS, Fleet
from programs_of_faults import BUCKETS_PER_RANK
from safetensors.torch import save_file
from steps import Fault

FIRST, MIDDLE, LAST = 1, RANKS * BUCKETS_PER_RANK // 2, RANKS * BUCKETS_PER_RANK
BUCKETS = {"first bucket": FIRST, "middle bucket": MIDDLE, "last bucket": LAST}
SHORT = 2.0  # seconds; the deadline where nothing but a deadline can end the call
LONG = 20.0  # never to be used up

Options = Mapping[str, Any]
Hook = Callable[[Fleet], None]


def nothing(fleet: Fleet) -> None:
    """For cases without a hook."""


@dataclass(frozen=True)
class Case:
    """One fault at one step.

    Attributes:
        call: what the ranks do when it strikes.
        says: pattern of the error; of what ``meanwhile`` raised, where the call succeeds.
        on: the ranks whose call must end with that error; those that died are left out.
        callers: the ranks that make the call.
        inject: the fault, where it happens in a process of the fleet.
        each, of_rank: options of the call, for all ranks or one.
        before, during, after: what the test itself does, before the call, once the fault has
            struck, and when the call is over.
        failed: the call succeeds and names this rank's instance as failed.
    """

    fault: str
    step: str
    says: str
    inject: Fault | None = None
    call: str = "update"
    on: tuple[int, ...] = tuple(range(RANKS))
    callers: tuple[int, ...] = tuple(range(RANKS))
    timeout: float = LONG
    each: Options = field(default_factory=dict)
    of_rank: Mapping[int, Options] = field(default_factory=dict)
    before: Hook = nothing
    during: Hook = nothing
    after: Hook = nothing
    succeeds: bool = False
    failed: int | None = None

    @property
    def name(self) -> str:
        return f"{self.fault}, {self.step}"

    @property
    def kills(self) -> int | None:
        """The server rank that dies."""
        fault = self.inject
        dies = fault is not None and not fault.of_worker and fault.action in ("kill", "terminate")
        return fault.rank if fault is not None and dies else None

    @property
    def stops(self) -> int | None:
        """The server rank that is stopped until the others have answered."""
        fault = self.inject
        stops = fault is not None and not fault.of_worker and fault.action == "stop"
        return fault.rank if fault is not None and stops else None


# ---------------------------------------------------------------------- server ranks


def _server_steps(action: str, rank: int, **rest: Any) -> list[tuple[str, str, Fault]]:
    """(step's name, call, fault) of everything that a server rank does."""
    plain = ["start", "buffers", "handshake", "release", "post hook"]
    return [
        ("register", "register_and_gather", Fault(action, "register", rank)),
        ("gather", "gather", Fault(action, "gather", rank)),
        *((step, "update", Fault(action, step, rank)) for step in plain),
        *((name, "update", Fault(action, "bucket", rank, nth)) for name, nth in BUCKETS.items()),
    ]


def killed_servers() -> list[Case]:
    cases = [
        Case("kill -9 of a server rank", step, "rank 1 is gone", fault, call)
        for step, call, fault in _server_steps("kill", 1)
    ]
    cases += [
        Case("kill -9 of rank 0, the store's host", step, "rank 0", fault, call)
        for step, call, fault in _server_steps("kill", 0)
        if step in ("gather", "handshake", "middle bucket", "post hook")
    ]
    cases.append(
        Case(
            "SIGTERM to a server rank",
            "middle bucket",
            "rank 2 is gone",
            Fault("terminate", "bucket", 2, MIDDLE),
        )
    )
    return cases


def stopped_servers() -> list[Case]:
    cases = [
        Case("SIGSTOP of a server rank", step, "gave up after", fault, call, timeout=SHORT)
        for step, call, fault in _server_steps("stop", 1)
        if step != "buffers"
    ]
    cases += [
        Case(
            "SIGSTOP of rank 0, the store's host",
            step,
            "rank 0, which hosts the store|gave up after|are gone",
            fault,
            call,
            timeout=SHORT,
        )
        for step, call, fault in _server_steps("stop", 0)
        if step in ("gather", "middle bucket", "post hook")
    ]
    return cases


def interrupted_servers() -> list[Case]:
    return [
        Case(
            "Ctrl-C on a server rank",
            step,
            "KeyboardInterrupt" if step != "register" else "KeyboardInterrupt|did not join",
            fault,
            call,
            on=(1,) if step == "register" else tuple(range(RANKS)),
            callers=(1,) if step == "register" else tuple(range(RANKS)),
        )
        for step, call, fault in _server_steps("interrupt", 1)
    ]


def failing_servers() -> list[Case]:
    return [
        Case("a server rank raises", step, "injected here", fault, call)
        for step, call, fault in _server_steps("raise", 1)
        if step != "register"
    ]


# ---------------------------------------------------------------------- workers


def _worker_steps(action: str, rank: int) -> list[tuple[str, Fault]]:
    plain = ["handshake", "release", "post hook"]
    return [
        *((step, Fault(action, step, rank, of_worker=True)) for step in plain),
        *(
            (name, Fault(action, "bucket", rank, nth, of_worker=True))
            for name, nth in BUCKETS.items()
        ),
    ]


def workers() -> list[Case]:
    gone = "hung up|closed its connection"
    raises = f"injected here|{gone}"
    interrupted = f"KeyboardInterrupt|{gone}"  # its engine lives on and answers with a traceback
    return [
        *(Case("kill -9 of a worker", s, gone, fault) for s, fault in _worker_steps("kill", 1)),
        *(
            Case("SIGSTOP of a worker", s, "gave up after", fault, timeout=SHORT)
            for s, fault in _worker_steps("stop", 2)
        ),
        *(Case("a worker raises", s, raises, fault) for s, fault in _worker_steps("raise", 0)),
        *(
            Case(f"{name} to a worker", "middle bucket", text, fault)
            for name, text, fault in (
                ("SIGTERM", gone, Fault("terminate", "bucket", 1, MIDDLE, of_worker=True)),
                ("Ctrl-C", interrupted, Fault("interrupt", "bucket", 1, MIDDLE, of_worker=True)),
            )
        ),
    ]


def tolerated_workers() -> list[Case]:
    """The update goes on for the other instances."""
    return [
        Case(
            f"{what}, the others go on",
            step,
            text,
            fault,
            timeout=4.0 if fault.action == "stop" else LONG,
            each={"continue_": True},
            succeeds=True,
            failed=fault.rank,
        )
        for what, action, text in (
            ("kill -9 of a worker", "kill", "hung up|closed its connection"),
            ("a worker raises", "raise", "injected here|hung up|closed its connection"),
            ("SIGSTOP of a worker", "stop", "half of the time"),
        )
        for step, fault in _worker_steps(action, 1)
        if action != "stop" or step == "middle bucket"
    ]


# ---------------------------------------------------------------------- memory that is shared


def peers() -> list[Case]:
    """While workers read the staging buffers of other ranks."""
    gone = "hung up|closed its connection"
    of_server = [("offer", 3), ("taken", MIDDLE), ("let go", 1)]
    of_worker = [("mapping", 1), ("read", MIDDLE)]  # of a bucket of rank 2
    return [
        *(
            Case(fault, step, says, Fault(action, step, 1, nth), timeout=timeout)
            for fault, action, says, timeout in (
                ("kill -9 of an owner", "kill", "rank 1 is gone", LONG),
                ("SIGSTOP of an owner", "stop", "gave up after", SHORT),
                ("an owner raises", "raise", "injected here", LONG),
            )
            for step, nth in of_server
        ),
        *(
            Case(fault, step, says, Fault(action, step, 1, nth, of_worker=True), timeout=timeout)
            for fault, action, says, timeout in (
                ("kill -9 of a reader", "kill", gone, LONG),
                ("SIGSTOP of a reader", "stop", "gave up after", SHORT),
                ("a reader raises", "raise", f"injected here|{gone}", LONG),
            )
            for step, nth in of_worker
        ),
    ]


# ---------------------------------------------------------------------- requests


def requests() -> list[Case]:
    def of(step: str, request: str, says: str, timeout: float = LONG) -> Case:
        return Case(
            f"req_func {request}", step, says, timeout=timeout, of_rank={1: {"request": request}}
        )

    return [
        of("handshake", "raises", "no such engine"),
        of("handshake", "hangs", "gave up after", SHORT),
        of(
            "handshake",
            "never reaches the engine",
            "rank 1 during handshake: .*no inference worker has connected to rank 1",
            SHORT,
        ),
        of("post hook", "raises at the end", "answered nonsense"),
        *(
            Case(
                f"the engine {what}",
                "handshake",
                says,
                timeout=timeout,
                before=lambda fleet, path=path: fleet.serve_http(path),
                of_rank={1: {"request": "http"}},
            )
            for what, path, says, timeout in (
                ("answers HTTP 500", "500", "500 .*the engine is broken", LONG),
                ("answers late", "slow", "gave up after|no answer from", SHORT),
                ("breaks off its answer", "cut", "no answer from", LONG),
                ("refuses the connection", "", "no answer from .* is it up", LONG),
            )
        ),
    ]


# ---------------------------------------------------------------------- memory and files


def _write(fleet: Fleet, name: str = "victim.safetensors") -> str:
    path = fleet.folder / name
    save_file({f"t{i}": torch.ones(1000) for i in range(4)}, path)
    return str(path)


def _files(fault: str, says: str, make: Callable[[Fleet], str], **rest: Any) -> Case:
    """Registering a file on rank 1 alone."""
    return Case(
        fault,
        "register",
        says,
        call="register_files",
        on=(1,),
        callers=(1,),
        of_rank={1: {"name": "files", "make": make}},
        **rest,
    )


def files() -> list[Case]:
    def missing(fleet: Fleet) -> str:
        return str(fleet.folder / "nowhere.safetensors")

    def truncated(fleet: Fleet) -> str:
        path = _write(fleet)
        os.truncate(path, os.path.getsize(path) - 1000)
        return path

    def lying(fleet: Fleet) -> str:
        path = fleet.folder / "victim.safetensors"
        path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
        return str(path)

    def unreadable(fleet: Fleet) -> str:
        path = fleet.folder / "unreadable.safetensors"
        path.unlink(missing_ok=True)
        path.symlink_to("/proc/self/mem")  # reading address 0 is an I/O error
        return str(path)

    def folder(fleet: Fleet) -> str:
        path = fleet.folder / "folder.safetensors"
        path.mkdir(exist_ok=True)
        return str(path)

    return [
        _files("missing file", "nowhere.safetensors", missing),
        _files("truncated file", "victim.safetensors", truncated),
        _files("lying header", "victim.safetensors", lying),
        _files("read error (EIO)", "unreadable.safetensors", unreadable),
        _files("a folder for a file", "folder.safetensors", folder),
        _files(
            "file truncated while it is read",
            "truncated since it was opened",
            _write,
            inject=Fault("truncate", "register", 1),
        ),
    ]


def memory() -> list[Case]:
    def limited(what: str, value: int) -> tuple[Hook, Hook]:
        return (
            lambda fleet: fleet.call(1, "limit", what=what, value=value),
            lambda fleet: fleet.call(1, "limit", what=what, value=0),
        )

    little_memory = limited("RLIMIT_AS", 64 << 20)
    few_files = limited("RLIMIT_NOFILE", 1)
    return [
        Case(
            "one rank out of device memory",
            "start",
            "largest tensor",
            before=lambda fleet: fleet.call(1, "scarce", fraction=1e-9),
            after=lambda fleet: fleet.call(1, "scarce", fraction=0.9),
        ),
        Case(
            "/dev/shm full",
            "start",
            "largest tensor",
            before=lambda fleet: fleet.call(1, "fill_shared_memory", leave=1 << 18),
            after=lambda fleet: fleet.call(1, "empty_shared_memory"),
        ),
        Case(
            "/dev/shm full",
            "buffers",
            "no room for a buffer",
            Fault("fill /dev/shm", "buffers", 1),
            after=lambda fleet: fleet.call(1, "empty_shared_memory"),
        ),
        Case(
            "one rank out of host memory",
            "register",
            "MemoryError|cannot map|RuntimeError",
            call="register_large",
            on=(1,),
            callers=(1,),
            each={"nbytes": 1 << 30},
            before=little_memory[0],
            after=little_memory[1],
        ),
        Case(
            "one rank out of descriptors",
            "start",
            r"has only \d+ file descriptors left and needs \d+: .*ulimit",
            before=few_files[0],
            after=few_files[1],
        ),
    ]


# ---------------------------------------------------------------------- calls at once


def at_once() -> list[Case]:
    def during(what: str, method: str, args: tuple[Any, ...], says: str) -> Case:
        return Case(
            what,
            "handshake",
            says,
            of_rank={1: {"meanwhile": (method, args)}},
            succeeds=True,
        )

    return [
        during("two updates at once", "update", (2.0,), "^BusyError: update refused"),
        during("gather during an update", "gather", ("good",), "^BusyError: gather_metas refused"),
        during("unregister during an update", "unregister", ("good",), "^BusyError: .*try again"),
        during("register during an update", "register", (5, "other"), "^$"),
        during("register again during an update", "register", (5,), "^ValueError: .*already"),
        Case(
            "update of a checkpoint that changed",
            "start",
            "changed on this rank|gathered other metas",
            before=lambda fleet: fleet.call(1, "replace", seed=3),
        ),
    ]


# ---------------------------------------------------------------------- ranks that disagree


def disagreements() -> list[Case]:
    def on_device(device: str) -> Hook:
        def pretend(fleet: Fleet) -> None:
            for rank in (1, 2):
                fleet.call(rank, "pretend_device", device=device)

        return pretend

    return [
        Case(
            f"rank {rank} updates from another checkpoint",
            "start",
            rf"rank {rank} .*'another'|'another'.* rank {rank} |in update\('another'",
            of_rank={rank: {"name": "another"}},
        )
        for rank in (0, 1)
    ] + [
        Case(
            "one rank goes on without failed engines",
            "start",
            "on_instance_failure='continue'",
            of_rank={2: {"continue_": True}},
        ),
        Case(
            "two ranks on one device",
            "start",
            "ranks 1 and 2 are both on device CPU-shared",
            before=on_device("CPU-shared"),
            after=on_device(""),
        ),
    ]


# ---------------------------------------------------------------------- P2P


def _p2p(fault: str, says: str, during: Hook, step: str = "P2P read", **rest: Any) -> Case:
    """Ranks 0 and 1 read from all; rank 2 takes no part, and is what they read from."""
    options: dict[str, Any] = {"inject": Fault("pause", "P2P read", 0, 3), **rest}
    return Case(
        fault,
        step,
        says,
        on=(0, 1),
        callers=(0, 1),
        each={"ranks": [0, 1]},
        during=during,
        **options,
    )


def p2p() -> list[Case]:
    def go(fleet: Fleet) -> None:
        (fleet.folder / "go").touch()

    def unregister(fleet: Fleet) -> None:
        fleet.call(2, "unregister")
        go(fleet)

    def replace(fleet: Fleet) -> None:
        fleet.call(2, "replace", seed=9)
        go(fleet)

    def kill(fleet: Fleet) -> None:
        fleet.kill_server(2)
        go(fleet)

    def stop(fleet: Fleet) -> None:
        fleet.stop_server(2)
        go(fleet)

    left = "unregistered or replaced|cannot read"
    return [
        _p2p("a P2P source unregisters", left, unregister),
        _p2p("a P2P source replaces the checkpoint", left, replace),
        _p2p("kill -9 of a P2P source", "rank 2 is gone|cannot read", kill),
        _p2p("SIGSTOP of a P2P source", "gave up after", stop, timeout=SHORT),
        *(
            _p2p(fault, says, nothing, inject=inject, timeout=timeout)
            for fault, says, inject, timeout in (
                ("kill -9 of a receiver", "rank 1 is gone", Fault("kill", "P2P read", 1, 2), LONG),
                ("a receiver raises", "injected here", Fault("raise", "P2P read", 1, 2), LONG),
                ("SIGSTOP of a receiver", "gave up", Fault("stop", "P2P read", 1, 2), SHORT),
            )
        ),
        _p2p(
            "kill -9 of a worker, in a P2P update",
            "hung up|closed its connection",
            nothing,
            "middle bucket",
            inject=Fault("kill", "bucket", 1, 5, of_worker=True),
        ),
    ]


# ---------------------------------------------------------------------- bytes


def corruption() -> list[Case]:
    """In the buffer that a worker loads from, and in host memory after it was registered."""
    wrong = "not those that were registered"
    in_buffer = [
        Case(
            f"{how} in the IPC buffer",
            step,
            wrong,
            Fault("corrupt", "bucket", 1, nth, of_worker=True),
            of_rank={1: {"corruption": how}},
        )
        for how, (step, nth) in zip(("bit", "zero", "swap"), BUCKETS.items(), strict=True)
    ]
    in_memory = [
        Case(
            f"{how} in host memory",
            "first bucket" if ranks is None else "P2P read",
            wrong,
            before=lambda fleet, how=how: fleet.call(2, "spoil", how=how),
            each={} if ranks is None else {"ranks": ranks},
            on=tuple(range(RANKS)) if ranks is None else (0, 1),
            callers=tuple(range(RANKS)) if ranks is None else (0, 1),
        )
        for how, ranks in (("bit", None), ("zero", None), ("swap", None), ("double", [0, 1]))
    ]
    return [*in_buffer, *in_memory]


def miscounted() -> list[Case]:
    """Buckets that are lost or doubled, where nothing else would notice."""

    def of(what: str, says: str, action: str, step: str, of_worker: bool) -> list[Case]:
        return [
            Case(what, name, says, Fault(action, step, 1, nth, of_worker))
            for name, nth in BUCKETS.items()
        ]

    times = r"bucket \d+ of .* was loaded %d times"
    overwritten = "|not those that were registered"  # meanwhile, by the bucket after the next
    return [
        *of("a bucket is not loaded", times % 0, "skip", "load", True),
        *of("a bucket is loaded twice", times % 2, "twice", "load", True),
        *of("a bucket is sent twice", times % 2 + overwritten, "twice", "bucket", False),
    ]


def loaders() -> list[Case]:
    """Engines that got every byte and cannot have loaded it, on all workers or on one."""

    def learn(fleet: Fleet) -> None:
        for number in (1, 2):
            fleet.call_all("update", version=f"learned-{number}", odd="changes")

    def again(odd: str) -> Hook:
        def update(fleet: Fleet) -> None:
            fleet.call_all("update", version="again", odd=odd)
            fleet.check_workers(fleet.seed, "again")

        return update

    def woken(fleet: Fleet) -> None:
        for rank in range(RANKS):
            fleet.ask_worker(rank, "wake")
        again("asleep")(fleet)

    return [
        Case(
            "a loader that knows no name",
            "post hook",
            "none of 36 tensors was written into the model",
            of_rank={1: {"odd": "knows no name"}},
        ),
        Case(
            "a loader that changes after it was learned",
            "second bucket",
            "wrote something else than was recorded .*: update again, it will not be replayed",
            each={"odd": "changes"},
            before=learn,
            after=again("changes"),
        ),
        Case(
            "an engine that is asleep",
            "handshake",
            "this engine is asleep",
            each={"odd": "asleep"},
            after=woken,
        ),
    ]


TABLE: list[Case] = [
    *killed_servers(),
    *stopped_servers(),
    *interrupted_servers(),
    *failing_servers(),
    *workers(),
    *tolerated_workers(),
    *peers(),
    *requests(),
    *files(),
    *memory(),
    *at_once(),
    *disagreements(),
    *p2p(),
    *corruption(),
    *miscounted(),
    *loaders(),
]

assert len({case.name for case in TABLE}) == len(TABLE)
assert all(case.timeout <= LONG for case in TABLE)
