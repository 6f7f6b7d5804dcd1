"""Random loaders, plain against replayed: ``python tests/hostile_loaders.py --count 10000``.

A loader does a few things with each tensor that it is given. Some are copies; some look at values,
compute, keep state, use threads or memory that torch does not see. Five updates of one checkpoint
are loaded by one model plainly and by another through ``replayed``; every parameter, buffer and
plain tensor of the two must be the same after each, unless the update failed.
"""

from __future__ import annotations

import argparse
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from checkpoint_engine.replay import replayed

Action = Callable[["Hostile", torch.Tensor], Any]
Weights = list[tuple[str, torch.Tensor]]
SIDE = 4
UPDATES = 5
POOL = ThreadPoolExecutor(1)


class Part(torch.nn.Module):
    """``w`` is loaded; ``scale``, ``map`` and ``count`` some loaders write or look at."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(SIDE, SIDE, dtype=dtype), requires_grad=False)
        self.scale = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        self.register_buffer("map", torch.tensor([2, 0, 3, 1]))
        self.register_buffer("count", torch.zeros(2))


class Hostile(torch.nn.Module):
    """Does with each tensor what its name says, in order."""

    def __init__(self, dtypes: list[torch.dtype], program: dict[str, list[Action]]) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(map(Part, dtypes))
        self.program = program
        self.stash = torch.zeros(SIDE, SIDE)
        self.arrays = [part.count.numpy() for part in self.parts[:1]]
        self.kept: dict[str, Any] = {}
        self.arrived: set[str] = set()
        self.calls = 0
        self.name = ""

    def load_weights(self, weights: Weights) -> None:
        self.calls += 1
        for name, tensor in weights:
            self.name = name
            self.arrived.add(name)
            for action in self.program[name]:
                action(self, tensor)
        if self.arrived == self.program.keys():
            self.arrived.clear()


class Kind(NamedTuple):
    """A way to draw an action on a part; ``is_allowed``: it consists of copies alone."""

    draw: Callable[[random.Random, int], Action]
    is_allowed: bool
    fills_its_part: bool = False


KINDS: dict[str, Kind] = {}


def allowed(draw: Callable[[random.Random, int], Action]) -> Callable[[random.Random, int], Action]:
    """Fills ``w`` of its part."""
    KINDS[draw.__name__] = Kind(draw, True, True)
    return draw


def also_allowed(
    draw: Callable[[random.Random, int], Action],
) -> Callable[[random.Random, int], Action]:
    KINDS[draw.__name__] = Kind(draw, True)
    return draw


def forbidden(
    draw: Callable[[random.Random, int], Action],
) -> Callable[[random.Random, int], Action]:
    KINDS[draw.__name__] = Kind(draw, False)
    return draw


def flag(tensor: torch.Tensor) -> torch.Tensor:
    """A number of a tensor that is 0 or 1, as often as not what it was in the update before."""
    return tensor[0, 0]


# ---------------------------------------------------------------------- copies


@allowed
def whole(rng: random.Random, p: int) -> Action:
    return lambda m, t: m.parts[p].w.data.copy_(t)


@allowed
def turned(rng: random.Random, p: int) -> Action:
    turn = rng.choice([lambda t: t.t(), lambda t: t.mT, lambda t: t.permute(1, 0)])
    return lambda m, t: m.parts[p].w.data.copy_(turn(t))


@allowed
def in_rows(rng: random.Random, p: int) -> Action:
    order = rng.sample(range(SIDE), SIDE)

    def load(m: Hostile, t: torch.Tensor) -> None:
        for row, given in zip(order, t, strict=True):
            m.parts[p].w.data[row].copy_(given)

    return load


@allowed
def halved(rng: random.Random, p: int) -> Action:
    dim = rng.randrange(2)

    def load(m: Hostile, t: torch.Tensor) -> None:
        first, second = t.chunk(2, dim=dim)
        m.parts[p].w.data.narrow(dim, 2, 2).copy_(first)
        m.parts[p].w.data.narrow(dim, 0, 2).copy_(second)

    return load


@allowed
def padded(rng: random.Random, p: int) -> Action:
    rows, value = rng.randint(1, 3), rng.choice([0, 1.5, -1])

    def load(m: Hostile, t: torch.Tensor) -> None:
        m.parts[p].w.data[:rows] = t[:rows]
        m.parts[p].w.data[rows:].fill_(value)

    return load


@allowed
def by_clone(rng: random.Random, p: int) -> Action:
    dtype = rng.choice([torch.float64, torch.float16, torch.float32])
    return lambda m, t: m.parts[p].w.data.copy_(t.t().contiguous().to(dtype).clone())


@allowed
def joined(rng: random.Random, p: int) -> Action:
    at = rng.randint(1, 3)
    return lambda m, t: m.parts[p].w.data.copy_(torch.cat([t[at:], t[:at]]))


@allowed
def stacked(rng: random.Random, p: int) -> Action:
    dim = rng.randrange(2)
    return lambda m, t: m.parts[p].w.data.copy_(torch.stack(t.unbind(1), dim=dim))


@allowed
def reshaped(rng: random.Random, p: int) -> Action:
    return lambda m, t: m.parts[p].w.data.view(-1).copy_(t.t().reshape(2, -1).flatten())


@allowed
def by_a_new_tensor(rng: random.Random, p: int) -> Action:
    def load(m: Hostile, t: torch.Tensor) -> None:
        new = torch.empty_like(t) if rng_flag else torch.zeros(SIDE, SIDE, dtype=t.dtype)
        new.copy_(t)
        m.parts[p].w.data.copy_(new)

    rng_flag = rng.random() < 0.5
    return load


@allowed
def by_map(rng: random.Random, p: int) -> Action:
    """Looks at numbers of the model; the engine changes them at times."""

    def load(m: Hostile, t: torch.Tensor) -> None:
        for row in range(SIDE):
            m.parts[p].w.data[int(m.parts[p].map[row])].copy_(t[row])

    return load


@also_allowed
def scale_by_view(rng: random.Random, p: int) -> Action:
    return lambda m, t: m.parts[p].scale.data.copy_(t[1, :1])


@also_allowed
def scale_from_one(rng: random.Random, p: int) -> Action:
    return lambda m, t: m.parts[p].scale.data.fill_(t[1, 1])


@also_allowed
def looks_at_shapes(rng: random.Random, p: int) -> Action:
    return lambda m, t: None if t.shape[0] == len(t) == t.size(1) else m.kept.update(bad=1)


# ---------------------------------------------------------------------- values that leave


@forbidden
def number(rng: random.Random, p: int) -> Action:
    take = rng.choice([float, lambda t: t.item(), lambda t: t.tolist(), lambda t: t.numpy()[()]])
    return lambda m, t: m.parts[p].scale.data.fill_(float(take(t[1, 1])))


@forbidden
def branch(rng: random.Random, p: int) -> Action:
    look = rng.choice(
        [
            lambda t: bool(flag(t)),
            lambda t: flag(t) > 0.5,
            lambda t: flag(t).is_nonzero(),
            lambda t: torch.equal(flag(t), torch.ones(())),
            lambda t: torch.allclose(flag(t), torch.ones(())),
            lambda t: len(flag(t).nonzero()),
            lambda t: f"{flag(t)}" == "1.0",
            lambda t: torch.tensor([flag(t)]).tolist()[0],
            lambda t: np.asarray(flag(t)) > 0.5,
            lambda t: 1.0 in t[:1, :1],
            lambda t: int(flag(t)),
            lambda t: t.clone()[0, 0].item(),
            lambda t: t[0].argsort()[0].item() == 0,
            lambda t: float(t.sum()) > 8,
            lambda t: len(torch.tensor_split(t, torch.empty(1).copy_(flag(t)).long())[0]),
            lambda t: np.from_dlpack(t[:1])[0, 0] > 0.5,
            lambda t: t[0, 0].hash_tensor().item() if hasattr(t, "hash_tensor") else bool(flag(t)),
        ]
    )
    return lambda m, t: m.parts[p].w.data.copy_(t if look(t) else t.t())


@forbidden
def branch_on_what_was_written(rng: random.Random, p: int) -> Action:
    def load(m: Hostile, t: torch.Tensor) -> None:
        m.parts[p].w.data.copy_(t)
        if flag(m.parts[p].w) > 0.5:
            m.parts[p].w.data.copy_(t.t())

    return load


@forbidden
def branch_by_an_array(rng: random.Random, p: int) -> Action:
    def load(m: Hostile, t: torch.Tensor) -> None:
        m.parts[0].count.copy_(t[0, :2])
        m.parts[p].w.data.copy_(t if m.arrays[0][0] > 0.5 else t.t())

    return load


@forbidden
def index(rng: random.Random, p: int) -> Action:
    look = rng.choice(
        [
            lambda t: t[flag(t).long()],
            lambda t: t[int(flag(t))],
            lambda t: t.select(0, int(flag(t))),
            lambda t: t[t[0].argsort()][0],
            lambda t: t[t[:, 0] >= 0][0],
            lambda t: t.index_select(0, flag(t).long().view(1))[0],
            lambda t: t.narrow(0, int(flag(t)), 1)[0],
            lambda t: t.narrow(0, flag(t).long(), 1)[0],
            lambda t: t[flag(t).long() :][0],
            lambda t: t[flag(t).long(), :],
            lambda t: t[[2]][0],
            lambda t: t[((2, 1), (0, 3))].repeat(2),
            lambda t: t[True][0][2],
        ]
    )
    return lambda m, t: m.parts[p].w.data.copy_(look(t).expand(SIDE, SIDE))


@forbidden
def remembered(rng: random.Random, p: int) -> Action:
    """What one tensor says steers what is done with the next."""

    def load(m: Hostile, t: torch.Tensor) -> None:
        m.parts[p].w.data.copy_(t if m.kept.get("seen", True) else t.t())
        m.kept["seen"] = bool(flag(t))

    return load


# ---------------------------------------------------------------------- computing


@forbidden
def computed(rng: random.Random, p: int) -> Action:
    change = rng.choice(
        [
            lambda t: t * 2,
            lambda t: -t,
            lambda t: t.abs(),
            lambda t: t.flip(0),
            lambda t: t.sort()[0],
        ]
    )
    return lambda m, t: m.parts[p].w.data.copy_(change(t))


@forbidden
def added(rng: random.Random, p: int) -> Action:
    return lambda m, t: m.parts[p].w.data.add_(t.to(m.parts[p].w.dtype))


@forbidden
def elsewhere(rng: random.Random, p: int) -> Action:
    """The arrival of one tensor changes another's module."""
    other = rng.randrange(2)
    change = rng.choice(
        [
            lambda part: part.w.data.mul_(2),
            lambda part: part.count.add_(1),
            lambda part: part.count.zero_(),
            lambda part: part.w.data.zero_(),
            lambda part: part.w.data.copy_(part.w.data.t().clone()),
            lambda part: torch.clamp(part.w.data, 0, 1, out=part.w.data),
        ]
    )
    return lambda m, t: change(m.parts[other])


@forbidden
def lazily(rng: random.Random, p: int) -> Action:
    return lambda m, t: m.parts[p].w.data.copy_(
        torch.complex(t, t).conj().imag if p else t._neg_view()
    )


# ---------------------------------------------------------------------- state


@forbidden
def stashed(rng: random.Random, p: int) -> Action:
    def load(m: Hostile, t: torch.Tensor) -> None:
        m.parts[p].w.data.copy_(m.stash)
        m.stash.copy_(t)

    return load


@forbidden
def kept(rng: random.Random, p: int) -> Action:
    keep = rng.choice([lambda t: t.clone(), lambda t: t.t().clone(), lambda t: t.numpy().copy()])

    def load(m: Hostile, t: torch.Tensor) -> None:
        if m.kept.get("last") is not None:
            m.parts[p].w.data.copy_(torch.as_tensor(m.kept["last"]))
        m.kept["last"] = keep(t)

    return load


@forbidden
def when_complete(rng: random.Random, p: int) -> Action:
    """Counts in Python, and does more when everything is there."""
    then = rng.choice(
        [
            lambda m: m.parts[p].count.add_(1),
            lambda m: m.parts[0].w.data.mul_(2),
            lambda m: m.parts[p].scale.data.fill_(float(m.parts[p].w[0, 0])),
            lambda m: m.stash.copy_(m.parts[p].w.data),
        ]
    )

    def load(m: Hostile, t: torch.Tensor) -> None:
        m.parts[p].w.data.copy_(t)
        if m.arrived == m.program.keys():
            then(m)

    return load


@forbidden
def alternating(rng: random.Random, p: int) -> Action:
    def load(m: Hostile, t: torch.Tensor) -> None:
        m.kept[m.name] = not m.kept.get(m.name, False)
        m.parts[p].w.data.copy_(t if m.kept[m.name] else t.t())

    return load


@forbidden
def first_otherwise(rng: random.Random, p: int) -> Action:
    def load(m: Hostile, t: torch.Tensor) -> None:
        is_first = m.kept.setdefault((m.name, "first"), m.calls) == m.calls
        m.parts[p].w.data.copy_(t.t() if is_first else t)

    return load


@forbidden
def at_random(rng: random.Random, p: int) -> Action:
    return lambda m, t: m.parts[p].w.data.copy_(t if torch.rand(()) < 2 else t.t())


# ---------------------------------------------------------------------- threads, and other memory


def in_thread(rng: random.Random) -> Callable[[Callable[[], Any]], Any]:
    def start(function: Callable[[], Any]) -> Any:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(function()), name="of a loader")
        thread.start()
        thread.join()
        return found[0]

    def pool(function: Callable[[], Any]) -> Any:
        with ThreadPoolExecutor(1) as new:
            return new.submit(function).result()

    return rng.choice([start, pool, lambda function: POOL.submit(function).result()])


@forbidden
def thread_writes(rng: random.Random, p: int) -> Action:
    run = in_thread(rng)

    def load(m: Hostile, t: torch.Tensor) -> None:
        m.parts[p].w.data.copy_(t)
        run(lambda: m.parts[p].w.data.mul_(2))

    return load


@forbidden
def thread_looks(rng: random.Random, p: int) -> Action:
    run = in_thread(rng)
    return lambda m, t: m.parts[p].w.data.copy_(t if run(lambda: bool(flag(t))) else t.t())


@forbidden
def array_writes(rng: random.Random, p: int) -> Action:
    def load(m: Hostile, t: torch.Tensor) -> None:
        m.parts[p].w.data.copy_(t)
        m.arrays[0][:] += 1

    return load


@forbidden
def by_numpy(rng: random.Random, p: int) -> Action:
    def load(m: Hostile, t: torch.Tensor) -> None:
        staging = np.zeros((SIDE, SIDE), dtype=np.float32)
        torch.from_numpy(staging).copy_(t)
        m.parts[p].w.data.copy_(torch.from_numpy(staging * 2))

    return load


@forbidden
def replaced(rng: random.Random, p: int) -> Action:
    how = rng.random() < 0.5

    def load(m: Hostile, t: torch.Tensor) -> None:
        new = t.to(m.parts[p].w.dtype).clone()
        if how:
            m.parts[p].w.data = new
        else:
            m.parts[p].w = torch.nn.Parameter(new, requires_grad=False)

    return load


# ---------------------------------------------------------------------- running them


class Case(NamedTuple):
    kinds: list[str]
    make: Callable[[], Hostile]
    updates: list[list[Weights]]
    is_allowed: bool


def draw_case(seed: int) -> Case:
    rng = random.Random(seed)
    names = [f"t{n}" for n in range(rng.randint(2, 4))]
    dtypes = [rng.choice([torch.float32, torch.bfloat16]) for _ in names]
    wants_forbidden = rng.random() < 0.7
    chosen: dict[str, list[str]] = {}
    for name in names:
        fill = rng.choice([k for k, kind in KINDS.items() if kind.fills_its_part])
        extra = [k for k, kind in KINDS.items() if kind.is_allowed and not kind.fills_its_part]
        chosen[name] = [fill, *rng.sample(extra, rng.choice([0, 0, 1]))]
    if wants_forbidden:
        for _ in range(rng.randint(1, 2)):
            bad = rng.choice([k for k, kind in KINDS.items() if not kind.is_allowed])
            of = chosen[rng.choice(names)]
            of.insert(rng.randint(0, len(of)), bad) if rng.random() < 0.5 else of.append(bad)
    program = {
        name: [KINDS[kind].draw(rng, p) for kind in chosen[name]] for p, name in enumerate(names)
    }
    cuts = [_cut(rng, names)] * UPDATES
    if rng.random() < 0.3 and not wants_forbidden:
        cuts = [_cut(rng, names) for _ in range(UPDATES)]
    updates = [
        [[(name, _tensor(rng)) for name in bucket] for bucket in buckets] for buckets in cuts
    ]
    every = [kind for of in chosen.values() for kind in of]
    return Case(every, lambda: Hostile(dtypes, program), updates, not wants_forbidden)


def _cut(rng: random.Random, names: list[str]) -> list[list[str]]:
    buckets: list[list[str]] = [[]]
    for name in names:
        if buckets[-1] and rng.random() < 0.5:
            buckets.append([])
        buckets[-1].append(name)
    return buckets


def _tensor(rng: random.Random) -> torch.Tensor:
    tensor = torch.tensor([rng.randint(0, 9) for _ in range(SIDE * SIDE)], dtype=torch.float32)
    tensor[0] = float(rng.random() < 0.3)
    return tensor.view(SIDE, SIDE)


def tensors_of(model: Hostile) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
    yield "stash", model.stash


def run_case(case: Case, changes_maps: bool) -> tuple[list[str], list[str]]:
    """How each update was loaded, and what differed from a plain load without an error."""
    model, plain = case.make(), case.make()
    how, wrong = [], []
    for number, buckets in enumerate(case.updates):
        for one in (model, plain):
            one.parts[0].count.add_(number)  # as an engine at work does
            if changes_maps and number in (2, 3):
                one.parts[0].map.copy_(one.parts[0].map.roll(1))
        try:
            with replayed(model.load_weights) as load:
                for bucket in buckets:
                    load([(name, tensor.clone()) for name, tensor in bucket])
            how.append(load.report["loaded"])
        except RuntimeError:
            return [*how, "error"], wrong
        for bucket in buckets:
            plain.load_weights([(name, tensor.clone()) for name, tensor in bucket])
        for (name, got), (_, expected) in zip(tensors_of(model), tensors_of(plain), strict=True):
            if not torch.equal(got, expected):
                wrong.append(f"update {number}: {name}")
    return how, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=("on", "verify"), default="on")
    arguments = parser.parse_args()
    os.environ["PS_REPLAY"] = arguments.mode
    ends: Counter[tuple[bool, str]] = Counter()
    wrong = 0
    for seed in range(arguments.seed, arguments.seed + arguments.count):
        case = draw_case(seed)
        how, differs = run_case(case, changes_maps=seed % 2 == 0)
        ends[case.is_allowed, how[-1]] += 1
        if differs:
            wrong += 1
            print(f"seed {seed}: {case.kinds}: {how}: {differs}", flush=True)
    for (is_allowed, end), count in sorted(ends.items()):
        print(f"{'copies alone' if is_allowed else 'anything':13} {end:9} {count}")
    print(f"{arguments.count} loaders, {wrong} differ without an error")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
