"""Pure planning: which rank of a host stages which bucket, from where, and which bytes of it.

Everything that crosses the network enters a host once: the bytes that any worker of the host reads,
in one rank's staging buffer. Buckets that a rank of the host owns are copied there.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np

from checkpoint_engine.data_types import (
    BucketPiece,
    BucketRange,
    H2DBucket,
    MemoryBufferMetaList,
    TensorPart,
    placed,
    tensor_nbytes,
)
from checkpoint_engine.errors import CollectiveError
from checkpoint_engine.ground.needs import Needs, Runs, digest_of_kinds, runs_of
from checkpoint_engine.planning.columns import ColumnRead, Columns, ColumnTensor, short_rows
from checkpoint_engine.planning.layouts import Layout
from checkpoint_engine.planning.plan import Metas, Step, TransferPlan, in_rounds

SHORTEST_GAP = 8 << 10
"""Bytes between two ranges that are read along: over TCP a range costs Mooncake 0.1 ms."""


class Tensors:
    """The tensors that a plan of all buckets moves, as columns in the order of their names: so
    needs count them. A large model has hundreds of thousands, and the first update waits for this.

    Attributes:
        digest: ``tensors_digest`` of them.
        sizes: the bytes of each.
    """

    def __init__(self, steps: Iterable[Step], owners: Mapping[int, Layout]) -> None:
        """``owners``: what each of them has, also tensors that another one sends."""
        met: dict[tuple[Any, tuple[int, ...]], int] = defaultdict(itertools.count().__next__)
        kinds_of = {
            owner: np.array([met[kind[:2]] for kind in own.kinds], np.int64)[own.kind_of]
            for owner, own in owners.items()
        }
        names: list[str] = []
        kind_of = [np.zeros(0, np.int64)]
        self._ends = [0]
        self._numbers: dict[int, tuple[H2DBucket, int]] = {}
        past = dict.fromkeys(owners, 0)  # of each, behind the tensors that it has sent
        for number, unit in enumerate(_units(sorted(steps, key=attrgetter("number")))):
            for step in unit:
                self._numbers[id(step.bucket)] = step.bucket, number
            owner, items = unit[0].owner, unit[0].bucket.items
            begin = owners[owner].names.index(items[0].name, past[owner])
            past[owner] = end = begin + len(items)
            names += owners[owner].names[begin:end]
            kind_of.append(kinds_of[owner][begin:end])
            self._ends.append(len(names))
        self._read(names, np.concatenate(kind_of), list(met))

    def _read(
        self, names: list[str], alike: np.ndarray, kinds: Sequence[tuple[Any, tuple[int, ...]]]
    ) -> None:
        """
        Args:
            names: bucket by bucket, that of a tensor that travels in parts once.
            alike: of each name, the number of its kind.
        """
        ordered = sorted(range(len(names)), key=names.__getitem__)
        order = np.fromiter(ordered, np.int64, len(names))
        self._places = np.empty_like(order)
        self._places[order] = np.arange(len(order))
        kind_of = alike[order]
        in_turn = np.argsort(_first_places(kind_of))  # kinds are numbered as they are met
        listed = [kinds[kind] for kind in in_turn]
        kind_of = np.argsort(in_turn)[kind_of]
        by_name = itemgetter(*ordered)(names) if len(names) > 1 else names
        self.digest = digest_of_kinds(by_name, listed, kind_of)
        self.sizes = np.array([tensor_nbytes(*kind) for kind in listed], dtype=np.int64)[kind_of]

    def __len__(self) -> int:
        return len(self._places)

    def places_of(self, bucket: H2DBucket) -> np.ndarray:
        """Where the bucket's tensors are among all of them."""
        if isinstance(bucket, BucketPiece):
            return self.places_of(bucket.whole)[bucket.first :][: len(bucket.items)]
        number = self.number_of(bucket)
        return self._places[self._ends[number] : self._ends[number + 1]]

    def number_of(self, bucket: H2DBucket) -> int:
        """Where the bucket is among all buckets, the parts of one tensor counted as one."""
        return self._numbers[id(bucket)][1]

    def per_bucket(self, column: np.ndarray) -> list[int]:
        """The sum of a column over the tensors of each bucket; see ``number_of``."""
        sums = np.zeros(len(column) + 1, np.int64)
        np.cumsum(column[self._places], out=sums[1:])
        return list(np.diff(sums[self._ends]).tolist())


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
        regions = [
            [region for one in needs for region in one.kinds[one.numbers[at]]] for at in first
        ]
        sizes = tensors.sizes[first].tolist()
        both = list(zip(regions, sizes, strict=True))
        self._runs = [runs_of(some, size, SHORTEST_GAP) for some, size in both]
        totals = [int((ends - begins).sum()) for begins, ends in self._runs]
        self._columns = [
            short_rows(some, size, total, SHORTEST_GAP)
            for (some, size), total in zip(both, totals, strict=True)
        ]
        self._needed = np.array(totals, dtype=np.int64)[self._alike]
        sums = zip(*map(tensors.per_bucket, (self._needed, tensors.sizes)), strict=True)
        self._shares = [needed / max(1, nbytes) for needed, nbytes in sums]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return int(self._needed.sum())

    def share_of(self, bucket: H2DBucket) -> float:
        """Which part of a bucket's bytes is needed."""
        return self._shares[self._tensors.number_of(bucket)]

    def runs_in(self, bucket: H2DBucket, but: Container[int] = ()) -> Runs | None:
        """The bytes of a bucket that are needed, from its beginning; ``None``: all of them.

        ``but``: places of tensors in the bucket that are read in another way.
        """
        places = self._tensors.places_of(bucket)
        if (self._needed[places] == self._tensors.sizes[places]).all():
            return None
        begins, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        both = zip(placed(bucket.items), self._alike[places], strict=True)
        for index, ((start, _), alike) in enumerate(both):
            if index not in but:
                some = self._runs[alike]
                begins.append(some[0] + start)
                ends.append(some[1] + start)
        found = np.concatenate(begins), np.concatenate(ends)
        return (
            _clipped(found, bucket.begin, bucket.size) if isinstance(bucket, TensorPart) else found
        )

    def columns_in(self, bucket: H2DBucket) -> list[Columns | None]:
        """Of each tensor of a bucket the columns that are needed, if it has short rows."""
        places = self._tensors.places_of(bucket)
        return [self._columns[alike] for alike in self._alike[places]]

    def read_by_columns(
        self, bucket: H2DBucket, copies: Mapping[str, ColumnTensor]
    ) -> tuple[Runs, list[ColumnRead]] | None:
        """As which runs a bucket is read, and what of it out of column copies of its owner;
        ``None``: all of it as runs. Bytes of a whole bucket are compared with sums of plain ones,
        and a tensor that travels in parts has its columns in all of them."""
        if not copies or isinstance(bucket, TensorPart) or self.runs_in(bucket) is None:
            return None
        reads: dict[int, ColumnRead] = {}
        both = zip(placed(bucket.items), self.columns_in(bucket), strict=True)
        for index, ((at, meta), columns) in enumerate(both):
            tensor = copies.get(meta.name)
            if columns is None or tensor is None or tensor.meta != meta:
                continue
            if (read := tensor.read(at, columns)) is not None:
                reads[index] = read
        rest = self.runs_in(bucket, reads)
        return (rest, [*reads.values()]) if reads and rest is not None else None


def _distinct(columns: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Of each distinct row, the first place; of each place, the number of its row."""
    alike = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        largest = int(column.max(initial=0))
        if largest > len(column):  # as sizes are: their products would overflow
            column = _numbered(column)
            largest = int(column.max(initial=0))
        alike = _numbered(alike * (largest + 1) + column)
    return _first_places(alike), alike


def _first_places(numbers: np.ndarray) -> np.ndarray:
    """Where each of the numbers, from 0 on, comes first."""
    first = np.zeros(int(numbers.max(initial=-1)) + 1, np.int64)
    first[numbers[::-1]] = np.arange(len(numbers))[::-1]
    return first


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
    outside: Sequence[Sequence[int]] = (),
    gone: Set[int] = frozenset(),
) -> TransferPlan:
    """A plan of all buckets for one host: the receiver of each is the rank that stages it.

    What has to come from other hosts is dealt out so that each rank reads as much as the others, as
    far as whole buckets allow. Host number n asks the owners of host n + 1 first, then those of
    host n + 2, and so on: each host is asked by one other at a time.

    Args:
        hosts: the ranks of each that take part.
        here: which of them it is.
        duplicates: names that several owners have, with equal content.
        outside: the owners that take no part, those of each host. They are only read. All owners,
            where they are ranks of another world: then their numbers are of that.
        gone: the owners that nobody can read any more.

    Raises:
        CollectiveError: only they have a bucket that is needed.
    """
    distance = _distances(hosts, here, outside)
    find_holders = holders(metas, duplicates)
    sources: dict[int, tuple[int, ...]] = {}
    local: list[Unit] = []
    remote: list[Unit] = []
    for unit in _units(transfer.steps):
        owners = find_holders(unit[0])
        if len(owners) > 1:
            owners.sort(key=lambda rank: (distance[rank], rank))
        if gone:
            owners = _not_gone(owners, gone, unit[0].bucket, needs)
        near = [rank for rank in owners if distance[rank] == 0]
        (local if near else remote).append(unit)
        for step in unit:
            sources[id(step.bucket)] = tuple(near or owners)
    queues = _merged(
        _dealt(local, lambda unit: sources[id(unit[0].bucket)], hosts[here], None),
        _dealt(remote, lambda unit: hosts[here], hosts[here], needs),
        lambda unit: distance[sources[id(unit[0].bucket)][0]],
    )
    entries = [(rank, step.owner, step.bucket) for rank, some in queues.items() for step in some]
    numbers = {id(step.bucket): step.number for step in transfer.steps}
    steps = []
    for index, (_, (rank, owner, bucket)) in enumerate(in_rounds(entries)):
        held_by = sources[id(bucket)]
        if distance.get(rank) == 0 and rank in held_by:
            held_by = (rank,)
        steps.append(Step(rank, owner, bucket, index % 2, numbers[id(bucket)], held_by))
    return replace(transfer, steps=tuple(steps), needs=needs, messages={})


def _distances(
    hosts: Sequence[Sequence[int]], here: int, outside: Sequence[Sequence[int]]
) -> dict[int, int]:
    """How late this host asks each owner; 0: it is a rank of this host."""
    found = {
        rank: (number - here) % len(hosts) for number, ranks in enumerate(hosts) for rank in ranks
    }
    for number, ranks in enumerate(outside):
        found |= dict.fromkeys(ranks, len(hosts) + (number - here) % len(outside))
    return found


def _not_gone(
    owners: list[int], gone: Set[int], bucket: H2DBucket, needs: HostNeeds | None
) -> list[int]:
    left = [rank for rank in owners if rank not in gone]
    if left:
        return left
    if needs is None or needs.share_of(bucket) > 0.0:
        name = bucket.items[0].name
        text = (
            f"rank {owners[0]} is gone, and no other rank owns {name!r} and what travels with it: "
            "start that rank again, register the checkpoint there and gather it on all ranks, or "
            "load the metas of a world that holds it"
        )
        raise CollectiveError(text, "rank_gone", rank=owners[0])
    return owners  # nobody reads it


Unit = list[Step]
"""A bucket, or all parts of one tensor: one rank stages them, one behind the other."""


def _units(steps: Iterable[Step]) -> Iterator[Unit]:
    unit: Unit = []
    for step in steps:
        unit.append(step)
        if not isinstance(step.bucket, TensorPart) or step.bucket.is_last:
            yield unit
            unit = []


def holders(metas: Metas, duplicates: Set[str]) -> Callable[[Step], list[int]]:
    """The owners of every tensor of a step's bucket, in a list of its own."""
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
        return list(set.intersection({*every[0]}, *every[1:])) if every else [step.owner]

    return find


def _dealt(
    units: Sequence[Unit],
    candidates: Callable[[Unit], Sequence[int]],
    ranks: Sequence[int],
    needs: HostNeeds | None,
) -> dict[int, list[Unit]]:
    """The units of each of ``ranks``: the largest first, to the candidate that has the least."""
    loads = {rank: (0.0, rank) for rank in ranks}
    dealt: defaultdict[int, list[tuple[int, Unit]]] = defaultdict(list)
    weights = [sum([_weight(step.bucket, needs) for step in unit]) for unit in units]
    for place in sorted(range(len(units)), key=lambda place: (-weights[place], place)):
        load, rank = min(map(loads.__getitem__, candidates(units[place])))
        loads[rank] = load + weights[place], rank
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


class AsHeld:
    """Buckets where each of several owners has them."""

    def __init__(self, metas: Metas) -> None:
        self._metas = metas
        self._places: dict[int, Places] = {}

    def by(self, owner: int, step: Step) -> H2DBucket:
        if owner == step.owner:
            return step.bucket
        owned = self._metas[owner]
        if owner not in self._places:
            self._places[owner] = places_in(owned)
        return as_held_by(owned, self._places[owner], step.bucket)


Places = dict[str, tuple[int, int]]
"""Of each tensor of an owner, the number of its host buffer, and where it begins there."""


def places_in(owned: MemoryBufferMetaList) -> Places:
    """Where the tensors of an owner lie. Takes long for many: made once for all buckets."""
    return {
        meta.name: (index, start)
        for index, buffer in enumerate(owned.memory_buffer_metas_list)
        for start, meta in placed(buffer.metas)
    }


def as_held_by(owned: MemoryBufferMetaList, places: Places, bucket: H2DBucket) -> H2DBucket:
    """The same tensors where another owner, with these ``places``, has them."""
    ranges = []
    for meta in bucket.items:
        index, start = places[meta.name]
        begin, nbytes = 0, meta.aligned_size
        if isinstance(bucket, TensorPart):
            begin, nbytes = bucket.begin, bucket.size
        room = owned.memory_buffer_metas_list[index].size - start - begin
        ranges.append(BucketRange(index, start + begin, min(nbytes, room)))
    return bucket.model_copy(update={"ranges": ranges})
