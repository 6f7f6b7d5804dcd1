"""Pure planning: which rank of a host stages which bucket, from where, and which bytes of it.

Everything that crosses the network enters a host once: the bytes that any worker of the host reads,
in one rank's staging buffer. Buckets that a rank of the host owns are copied there.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from operator import itemgetter

import numpy as np

from checkpoint_engine.data_types import (
    BucketRange,
    H2DBucket,
    MemoryBufferMetaList,
    TensorPart,
    placed,
    tensor_nbytes,
)
from checkpoint_engine.ground.collector import collector_at_rest
from checkpoint_engine.ground.needs import Needs, Runs, digest_of_kinds, kinds_of, runs_of
from checkpoint_engine.planning.plan import Metas, Step, TransferPlan, in_rounds

SHORTEST_GAP = 8 << 10
"""Bytes between two ranges that are read along: over TCP a range costs Mooncake 0.1 ms."""


class Tensors:
    """The tensors of all owners in the order of their names, as needs count them. Made once for a
    plan of all buckets: it takes several times as long as the union of needs and ``share``.

    Attributes:
        digest: ``tensors_digest`` of them.
        sizes: the bytes of each.
    """

    def __init__(self, metas: Metas, buckets: Iterable[H2DBucket] = ()) -> None:
        """``buckets``: whose tensors are looked up at once."""
        self._places: dict[int, tuple[H2DBucket, np.ndarray]] = {}
        with collector_at_rest():
            self._read(metas)
            for bucket in buckets:
                self.places_of(bucket)

    def _read(self, metas: Metas) -> None:
        listed = [
            (meta.name, meta.dtype, meta.shape)
            for owned in metas.values()
            for buffer in owned.memory_buffer_metas_list
            for meta in buffer.metas
        ]
        listed.sort(key=itemgetter(0))
        self._place = dict(zip(map(itemgetter(0), listed), itertools.count()))
        if len(self._place) < len(listed):  # several owners have some of them
            listed = [listed[place] for place in self._place.values()]
            self._place = dict(zip(self._place, itertools.count()))
        kinds, kind_of = kinds_of(listed)
        self.digest = digest_of_kinds(list(self._place), kinds, kind_of)
        sizes = np.array([tensor_nbytes(*kind) for kind in kinds], dtype=np.int64)
        self.sizes = sizes[np.array(kind_of, dtype=np.int64)]

    def __len__(self) -> int:
        return len(self._place)

    def places_of(self, bucket: H2DBucket) -> np.ndarray:
        """Where the bucket's tensors are among all of them."""
        if id(bucket) not in self._places:
            places = np.array([self._place[meta.name] for meta in bucket.items], dtype=np.int64)
            self._places[id(bucket)] = bucket, places
        return self._places[id(bucket)][1]


class HostNeeds:
    """What the workers of one host read of each tensor, together."""

    def __init__(self, tensors: Tensors, needs: Sequence[Needs]) -> None:
        """
        Raises:
            ValueError: the needs are of other tensors.
        """
        if {one.tensors for one in needs} != {tensors.digest}:
            raise ValueError("the workers have stated what they need of other tensors")
        columns = [one.numbers for one in needs]
        if {len(column) for column in columns} != {len(tensors)}:
            raise ValueError("the workers have stated needs of another number of tensors")
        self._tensors = tensors
        first, self._alike = _distinct([*columns, tensors.sizes])
        self._runs = [
            runs_of(
                itertools.chain(*(one.kinds[one.numbers[at]] for one in needs)),
                int(tensors.sizes[at]),
                SHORTEST_GAP,
            )
            for at in first
        ]
        totals = np.array([int((ends - begins).sum()) for begins, ends in self._runs])
        self._needed = totals[self._alike]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return int(self._needed.sum())

    def share_of(self, bucket: H2DBucket) -> float:
        """Which part of a bucket's bytes is needed."""
        places = self._tensors.places_of(bucket)
        return float(self._needed[places].sum() / max(1, self._tensors.sizes[places].sum()))

    def runs_in(self, bucket: H2DBucket) -> Runs | None:
        """The bytes of a bucket that are needed, from its beginning; ``None``: all of them."""
        places = self._tensors.places_of(bucket)
        if (self._needed[places] == self._tensors.sizes[places]).all():
            return None
        begins, ends = [], []
        for (start, _), alike in zip(placed(bucket.items), self._alike[places], strict=True):
            some = self._runs[alike]
            begins.append(some[0] + start)
            ends.append(some[1] + start)
        found = np.concatenate(begins), np.concatenate(ends)
        return (
            _clipped(found, bucket.begin, bucket.size) if isinstance(bucket, TensorPart) else found
        )


def _distinct(columns: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Of each distinct row, the first place; of each place, the number of its row."""
    alike = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        numbers = _numbered(column)
        alike = _numbered(alike * (int(numbers.max(initial=0)) + 1) + numbers)
    first = np.zeros(int(alike.max(initial=-1)) + 1, np.int64)
    first[alike[::-1]] = np.arange(len(alike))[::-1]
    return first, alike


def _numbered(values: np.ndarray) -> np.ndarray:
    """The values, none of them negative, as the numbers of their places among the distinct ones."""
    largest = int(values.max(initial=0))
    if largest > 8 * len(values):  # a table of all that there might be would take more time
        return np.unique(values, return_inverse=True)[1]
    seen = np.zeros(largest + 1, dtype=bool)
    seen[values] = True
    return (np.cumsum(seen) - 1)[values]


def _clipped(runs: Runs, start: int, size: int) -> Runs:
    """What of the runs lies within ``size`` bytes from ``start`` on, counted from there."""
    begins, ends = (np.clip(one - start, 0, size) for one in runs)
    some = begins < ends
    return begins[some], ends[some]


def share(
    transfer: TransferPlan,
    hosts: Sequence[Sequence[int]],
    here: int,
    metas: Metas,
    duplicates: Set[str] = frozenset(),
    needs: HostNeeds | None = None,
) -> TransferPlan:
    """A plan of all buckets for one host: the receiver of each is the rank that stages it.

    What has to come from other hosts is dealt out so that each rank reads as much as the others, as
    far as whole buckets allow. Host number n asks the owners of host n + 1 first, then those of
    host n + 2, and so on: each host is asked by one other at a time.

    Args:
        hosts: the ranks of each.
        here: which of them it is.
        duplicates: names that several owners have, with equal content.
    """
    host_of = {rank: number for number, ranks in enumerate(hosts) for rank in ranks}
    distance = {rank: (host - here) % len(hosts) for rank, host in host_of.items()}
    holders = _holders(metas, duplicates)
    sources: dict[int, tuple[int, ...]] = {}
    local: list[Unit] = []
    remote: list[Unit] = []
    for unit in _units(transfer.steps):
        owners = sorted(holders(unit[0]), key=lambda rank: (distance[rank], rank))
        inside = [rank for rank in owners if rank in hosts[here]]
        (local if inside else remote).append(unit)
        sources |= {id(step.bucket): tuple(inside or owners) for step in unit}
    queues = _merged(
        _dealt(local, lambda unit: sources[id(unit[0].bucket)], None),
        _dealt(remote, lambda unit: hosts[here], needs),
        lambda unit: distance[sources[id(unit[0].bucket)][0]],
    )
    entries = [(rank, step.owner, step.bucket) for rank, some in queues.items() for step in some]
    numbers = {id(step.bucket): step.number for step in transfer.steps}
    steps = []
    for index, (_, (rank, owner, bucket)) in enumerate(in_rounds(entries)):
        held_by = sources[id(bucket)]
        held_by = (rank,) if rank in held_by else held_by
        steps.append(Step(rank, owner, bucket, index % 2, numbers[id(bucket)], held_by))
    return replace(transfer, steps=tuple(steps), needs=needs, messages={})


Unit = list[Step]
"""A bucket, or all parts of one tensor: one rank stages them, one behind the other."""


def _units(steps: Sequence[Step]) -> Iterator[Unit]:
    unit: Unit = []
    for step in steps:
        unit.append(step)
        if not isinstance(step.bucket, TensorPart) or step.bucket.is_last:
            yield unit
            unit = []


def _holders(metas: Metas, duplicates: Set[str]) -> Callable[[Step], list[int]]:
    """The owners of every tensor of a step's bucket."""
    owners: defaultdict[str, set[int]] = defaultdict(set)
    for rank, owned in metas.items() if duplicates else ():
        for buffer in owned.memory_buffer_metas_list:
            for meta in buffer.metas:
                if meta.name in duplicates:
                    owners[meta.name].add(rank)

    def find(step: Step) -> list[int]:
        if not owners:
            return [step.owner]
        every = [owners.get(meta.name, {step.owner}) for meta in step.bucket.items]
        return sorted(set.intersection({*every[0]}, *every[1:])) if every else [step.owner]

    return find


def _dealt(
    units: Sequence[Unit], candidates: Callable[[Unit], Sequence[int]], needs: HostNeeds | None
) -> dict[int, list[Unit]]:
    """The units of each rank: the largest first, to the candidate that has the least so far."""
    loads: defaultdict[int, float] = defaultdict(float)
    dealt: defaultdict[int, list[tuple[int, Unit]]] = defaultdict(list)
    weights = [sum(_weight(step.bucket, needs) for step in unit) for unit in units]
    for place in sorted(range(len(units)), key=lambda place: (-weights[place], place)):
        rank = min(candidates(units[place]), key=lambda rank: (loads[rank], rank))
        loads[rank] += weights[place]
        dealt[rank].append((place, units[place]))
    return {
        rank: [unit for _, unit in sorted(some, key=itemgetter(0))] for rank, some in dealt.items()
    }


def _weight(bucket: H2DBucket, needs: HostNeeds | None) -> float:
    return bucket.size * (1.0 if needs is None else needs.share_of(bucket))


def _merged(
    local: Mapping[int, list[Unit]],
    remote: Mapping[int, list[Unit]],
    distance: Callable[[Unit], int],
) -> dict[int, list[Step]]:
    """Each rank's steps. What comes from other hosts is spread evenly among what does not, so that
    the network is at work from the beginning to the end."""
    merged = {}
    for rank in sorted({*local, *remote}):
        some = [local.get(rank, []), sorted(remote.get(rank, []), key=distance)]
        places = [
            ((at + 0.5) / len(units), unit) for units in some for at, unit in enumerate(units)
        ]
        ordered = sorted(places, key=itemgetter(0))
        merged[rank] = [step for _, unit in ordered for step in unit]
    return merged


def as_held_by(owned: MemoryBufferMetaList, bucket: H2DBucket) -> H2DBucket:
    """The same tensors where another owner has them."""
    wanted = {meta.name for meta in bucket.items}
    places: dict[str, tuple[int, int]] = {}
    for index, buffer in enumerate(owned.memory_buffer_metas_list):
        for start, meta in placed(buffer.metas):
            if meta.name in wanted:
                places[meta.name] = index, start
    ranges = []
    for meta in bucket.items:
        index, start = places[meta.name]
        begin, nbytes = 0, meta.aligned_size
        if isinstance(bucket, TensorPart):
            begin, nbytes = bucket.begin, bucket.size
        room = owned.memory_buffer_metas_list[index].size - start - begin
        ranges.append(BucketRange(index, start + begin, min(nbytes, room)))
    return bucket.model_copy(update={"ranges": ranges})
