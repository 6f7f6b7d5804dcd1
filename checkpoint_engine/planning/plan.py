"""Pure planning: how large a bucket is, what travels in it, who receives it and in which order.

A plan is frozen data, the same on every rank; ``pipeline.py`` executes it.
"""

from __future__ import annotations

import bisect
import itertools
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

from checkpoint_engine.data_types import (
    ALIGNMENT,
    BucketRange,
    H2DBucket,
    MemoryBufferMetaList,
    MemoryBufferMetas,
    ParameterMeta,
    TensorPart,
    align_up,
    placed,
    unvalidated,
)
from checkpoint_engine.ground.collector import collector_at_rest

LARGEST_WHOLE = 1 << 30
"""Tensors of more bytes than this are cut, where the workers can put them together again: the
double buffer and staging then take no more than three times this."""
SMALLEST_CUT = 1 << 20
"""Tensors of no more bytes than this are not cut, whatever bucket was asked for."""
_BUCKETS_OF_AN_UPDATE = 16

T = TypeVar("T")
Metas = Mapping[int, MemoryBufferMetaList]
Topology = Mapping[str, set[int]]


@dataclass(frozen=True)
class BucketSize:
    """How device memory is shared out: ``bytes`` per bucket, and whether owners stage the next
    one."""

    bytes: int
    staging: bool


Pace = tuple[int, int]
"""The smallest and the largest number of bytes that a bucket is best given, if memory allows.

Nothing overlaps with the way of the first bucket and with the loading of the last, so buckets
should be many; but each costs a round trip to the workers.
"""
DEVICE_PACE: Pace = (256 << 20, 1 << 30)
"""At 50 GB/s to the device, 256 MiB take 5 ms, and a round trip to a worker a fraction of one."""
HOST_PACE: Pace = (16 << 20, 16 << 20)
"""Shared memory is zeroed for every update, and small buckets stay in the processor's caches."""
_MAPPED_QUICKLY = 480 << 20
"""Bytes. To map so much of another GPU's memory takes the driver 1 ms; from 512 MiB on it takes 10,
for one process after the other (H200)."""
READ_PACE: Pace = (32 << 20, 1 << 30)
"""P2P reads over a network."""


def peer_pace(slots: int) -> Pace:
    """Every GPU is filled at its own 50 GB/s, while its peers read a bucket at 370. ``slots``: how
    many buckets a buffer holds that other ranks map."""
    return (120 << 20, _MAPPED_QUICKLY // slots)


class Step(NamedTuple):
    """One bucket on its way: ``receiver`` gets it from ``owner``, then broadcasts it into
    ``slot``, or stages it.

    ``number``: the same on all ranks, in whatever order they take the buckets. ``sources``: the
    ranks that have its bytes, in the order to be asked, where the owner is not the only one: the
    receiver itself, or others of other hosts.
    """

    receiver: int
    owner: int
    bucket: H2DBucket
    slot: int
    number: int = 0
    sources: tuple[int, ...] = ()


@dataclass(frozen=True)
class TransferPlan:
    """What one update moves, in order.

    Attributes:
        bucket_bytes: the size of each half of the double buffer.
        needs: what is read of the buckets, a ``shards.HostNeeds``; ``None``: everything.
        first: the receiver with which a round begins; ``None``: the same on all ranks.
        may_shrink: whether some tensors may be left out before it is executed.
        messages: what workers are told of its buckets, once that has been encoded.
    """

    steps: tuple[Step, ...]
    bucket_bytes: int
    staging: bool
    needs: Any = None
    first: int | None = None
    may_shrink: bool = False
    messages: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def total_bytes(self) -> int:
        return sum(step.bucket.size for step in self.steps)

    @property
    def tensor_count(self) -> int:
        return sum(
            len(step.bucket.items)
            for step in self.steps
            if not isinstance(step.bucket, TensorPart) or step.bucket.is_last
        )

    def __str__(self) -> str:
        size = f"{self.total_bytes / 1e9:.3f} GB in {len(self.steps)} buckets"
        return f"{self.tensor_count} tensors, {size} of up to {self.bucket_bytes / 1e6:.1f} MB"

    @property
    def cuts_tensors(self) -> bool:
        """Whether workers have to put tensors together."""
        return any(isinstance(step.bucket, TensorPart) for step in self.steps)

    def slots_for(self, buckets: int) -> int:
        """Of a buffer that so many of its buckets go through: two where there are two. One that
        lacks some of its tensors may become several."""
        return min(2, 2 * buckets if self.may_shrink else buckets)

    def loads_of(self, receiver: int) -> list[Step]:
        """The steps whose bytes ``receiver`` fetches, in order."""
        return [step for step in self.steps if step.receiver == receiver]


_BUCKET_FIELDS, _PART_FIELDS = ({*model.model_fields} for model in (H2DBucket, TensorPart))
_aligned_size = attrgetter("aligned_size")  # in ``map`` a loop that runs outside Python


def largest_tensor(metas: Metas) -> int:
    """The padded size in bytes of the largest tensor of any owner; 0 if there is none."""
    return extent(metas)[1]


def extent(metas: Metas) -> tuple[int, int]:
    """Padded bytes of all owners' tensors, and of the largest one; 0 if there is none."""
    total = largest = 0
    for owned in metas.values():
        for buffer in owned.memory_buffer_metas_list:
            sizes = list(map(_aligned_size, buffer.metas))
            total, largest = total + sum(sizes), max(largest, max(sizes, default=0))
    return total, largest


def bucket_size(
    free_bytes: int,
    largest: int,
    cap: int,
    may_cut: bool = False,
    shares: int = 3,
    beside: int | None = None,
    memory: str = "device memory",
) -> BucketSize:
    """Divide ``free_bytes`` of memory into a double buffer and, where it fits, staging.

    Args:
        free_bytes: what every rank can spare: the minimum over the ranks.
        largest: padded size of the largest tensor, which must fit one bucket.
        cap: upper bound that the user set for a bucket.
        may_cut: whether it need not: then it takes memory of its own, where it is put together.
        shares: how many buckets all buffers take, staging included.
        beside: bytes for the buffers and that memory together. Default: ``free_bytes``.
        memory: what ``free_bytes`` is of, for the error.

    Raises:
        ValueError: the largest tensor does not fit even without staging.
    """
    share = free_bytes // (shares * ALIGNMENT) * ALIGNMENT
    staging = largest <= share
    limit = share if staging else free_bytes // (2 * ALIGNMENT) * ALIGNMENT
    is_huge = largest > min(max(cap, SMALLEST_CUT), LARGEST_WHOLE, limit)
    left = min(free_bytes, (free_bytes if beside is None else beside) - largest)
    if may_cut and is_huge and left >= shares * SMALLEST_CUT:
        return bucket_size(left, SMALLEST_CUT, cap, shares=shares)
    if largest > limit:
        raise ValueError(
            f"the largest tensor takes {largest} bytes, but the rank with the least memory can "
            f"spare {free_bytes} bytes, which allows buckets of {limit}: free {memory} or "
            "raise mem_fraction (PS_MEM_FRACTION)"
        )
    capped = max(cap // ALIGNMENT * ALIGNMENT, largest, ALIGNMENT)
    return BucketSize(min(capped, limit), staging)


def plan_transfer(
    metas: Metas,
    size: BucketSize,
    local_topo: Topology,
    remote_topo: Topology,
    ranks: Sequence[int] | None = None,
    may_cut: bool = False,
    duplicates: Set[str] = frozenset(),
    first: int | None = None,
) -> TransferPlan:
    """The whole update as data: buckets cut, receivers assigned, dealt out in rounds.

    In every round each receiver has at most one bucket, so that all of them fetch their next one
    while the others' are being broadcast.

    Args:
        size: of a bucket, see ``paced``.
        may_cut: whether a tensor that is larger than a bucket may travel in parts.
        duplicates: names that several owners have; the first owner sends them.
        first: the receiver with which a round begins; the others follow in a circle. Not where
            tensors travel in parts: ranks that began differently would wait for each other.
    """
    options = (ranks, may_cut, duplicates)
    with collector_at_rest():
        rounds = in_rounds(_buckets(metas, size.bytes, local_topo, remote_topo, *options), first)
        steps = tuple(
            Step(*entry, index % 2, number) for index, (number, entry) in enumerate(rounds)
        )
    largest_bucket = max((align_up(step.bucket.size) for step in steps), default=0)
    return TransferPlan(steps, max(largest_bucket, ALIGNMENT), size.staging, first=first)


def paced(size: BucketSize, pace: Pace, extent: tuple[int, int], may_cut: bool) -> BucketSize:
    """The best bucket that ``size`` allows for tensors of that ``extent``."""
    smallest, largest = pace
    total, tensor = extent
    share = align_up(total // _BUCKETS_OF_AN_UPDATE)
    tensor = min(tensor, LARGEST_WHOLE) if may_cut else tensor
    best = max(min(max(share, smallest), largest), tensor)
    return replace(size, bytes=min(size.bytes, best))


def gen_h2d_buckets(
    global_metas: Metas,
    bucket_size: int,
    local_topo: Topology,
    remote_topo: Topology,
    ranks: Sequence[int] | None = None,
) -> list[tuple[int, int, H2DBucket]]:
    """Cut every owner's tensors into buckets: ``(receiver_rank, owner_rank, bucket)``, by owner.

    Without ``ranks`` the owner is its own receiver (broadcast). With ``ranks``, the receivers are
    chosen among them by ``assign_receiver_ranks`` (P2P).

    Raises:
        ValueError: a tensor is larger than ``bucket_size``, or no rank can receive.
    """
    return _buckets(global_metas, bucket_size, local_topo, remote_topo, ranks)


def _buckets(
    metas: Metas,
    bucket_size: int,
    local_topo: Topology,
    remote_topo: Topology,
    ranks: Sequence[int] | None,
    may_cut: bool = False,
    duplicates: Set[str] = frozenset(),
) -> list[tuple[int, int, H2DBucket]]:
    cut: list[tuple[int, H2DBucket]] = []
    sent: set[str] = set()
    for owner, owned in metas.items():
        buffers = owned.memory_buffer_metas_list
        cut += [(owner, b) for b in _cut(owner, buffers, bucket_size, may_cut, sent)]
        if duplicates:
            sent |= duplicates & {meta.name for b in buffers for meta in b.metas}
    if not ranks:
        return [(owner, owner, bucket) for owner, bucket in cut]
    members = set(ranks)
    receivers = {nic: on & members for nic, on in local_topo.items() if on & members}
    return assign_receiver_ranks(cut, receivers, remote_topo)


def assign_receiver_ranks(
    buckets: Sequence[tuple[int, T]], local_topo: Topology, remote_topo: Topology
) -> list[tuple[int, int, T]]:
    """Spread the reading of ``(owner_rank, bucket)`` over receivers so that no owner NIC is read
    twice at once.

    The receivers are the lowest rank of each local NIC, at most as many as there are owner NICs.
    Buckets, interleaved over the owners' NICs, are dealt to them in rounds; a round ends early when
    the next bucket's NIC already serves one of that round.

    Raises:
        ValueError: there are buckets but no receiver, or an owner is on no NIC.
    """
    if not buckets:
        return []
    receivers = [min(ranks) for ranks in local_topo.values() if ranks][: len(remote_topo)]
    if not receivers:
        raise ValueError(
            f"{len(buckets)} buckets but no rank to receive them: local topology "
            f"{dict(local_topo)}, owners' topology {dict(remote_topo)}"
        )
    assigned: list[tuple[int, int, T]] = []
    busy: set[str] = set()
    for nic, owner, bucket in _interleaved(buckets, remote_topo):
        if nic in busy or len(busy) == len(receivers):
            busy.clear()
        assigned.append((receivers[len(busy)], owner, bucket))
        busy.add(nic)
    return assigned


def to_named_tensor(metas: Iterable[ParameterMeta], offset: int = 0) -> list[dict]:
    """What a worker is told of a bucket that starts at ``offset`` of the double buffer."""
    return [
        {"name": meta.name, "dtype": meta.dtype, "shape": meta.shape, "offset": start}
        for start, meta in placed(metas, offset)
    ]


def _cut(
    owner: int,
    buffers: Sequence[MemoryBufferMetas],
    bucket_size: int,
    may_cut: bool,
    sent: Set[str],
) -> Iterator[H2DBucket]:
    """Fill buckets with consecutive tensors of one owner; a bucket may span its host buffers.

    ``sent``: tensors of earlier owners, which are left out. A bucket ends before them: its
    checksum is that of consecutive bytes.
    """
    items = list(itertools.chain.from_iterable(buffer.metas for buffer in buffers))
    ends = list(itertools.accumulate(map(_aligned_size, items)))
    left_out = [index for index, meta in enumerate(items) if meta.name in sent] if sent else []
    # Where each buffer begins when all tensors lie end to end, and where the last one ends.
    counts = itertools.accumulate(len(buffer.metas) for buffer in buffers)
    begins, number = [0, *(ends[count - 1] if count else 0 for count in counts)], 0
    for first, past in itertools.pairwise([-1, *left_out, len(items)]):
        run = _cut_run(owner, items, ends, (first + 1, past), bucket_size, may_cut)
        for start, stop, tensors in run:
            pieces = range(start, stop, bucket_size) if start < stop else (start,)
            for begin in pieces:
                end = min(begin + bucket_size, stop)
                ranges, number = _ranges(buffers, begins, number, begin, end)
                what: dict[str, Any] = {"size": end - begin, "ranges": ranges, "items": tensors}
                if len(pieces) == 1:
                    yield unvalidated(H2DBucket, what, _BUCKET_FIELDS)
                else:
                    what |= {"begin": begin - start, "total": stop - start}
                    yield unvalidated(TensorPart, what, _PART_FIELDS)


def _cut_run(
    owner: int,
    items: list[ParameterMeta],
    ends: Sequence[int],
    run: tuple[int, int],
    bucket_size: int,
    may_cut: bool,
) -> Iterator[tuple[int, int, list[ParameterMeta]]]:
    """The tensors from ``run[0]`` to before ``run[1]``, as many at a time as a bucket takes, or one
    that is larger: where they begin and end among the owner's bytes, and which."""
    first, past = run
    start = ends[first - 1] if first else 0
    while first < past:
        last = bisect.bisect_right(ends, start + bucket_size, lo=first, hi=past)
        if last == first and not may_cut:
            raise ValueError(
                f"tensor {items[first].name!r} of rank {owner} takes {items[first].aligned_size} "
                f"bytes, more than a bucket of {bucket_size}"
            )
        last = max(last, first + 1)
        stop = ends[last - 1]
        yield start, stop, items[first:last]
        first, start = last, stop


def _ranges(
    buffers: Sequence[MemoryBufferMetas], begins: Sequence[int], number: int, start: int, end: int
) -> tuple[list[BucketRange], int]:
    """The host ranges of the bytes ``start..end`` of an owner, looking from buffer ``number`` on.

    A buffer may end short of its last tensor's padding (a file mapped in place): its range is
    then as much shorter.
    """
    ranges = []
    while start < end:
        while begins[number + 1] <= start:
            number += 1
        stop = min(end, begins[number + 1])
        offset = start - begins[number]
        nbytes = min(stop - start, buffers[number].size - offset)
        ranges.append(BucketRange(number, offset, nbytes))
        start = stop
    return ranges, number


def in_rounds(
    buckets: Sequence[tuple[int, int, H2DBucket]], first: int | None = None
) -> Iterator[tuple[int, tuple[int, int, H2DBucket]]]:
    """``(receiver, owner, bucket)``, one of each receiver in turn, and its number."""
    queues: defaultdict[int, deque[tuple[int, int, H2DBucket]]] = defaultdict(deque)
    for entry in buckets:
        queues[entry[0]].append(entry)
    numbers = itertools.count(1)
    while queues:
        turn = [(next(numbers), entry) for queue in queues.values() for entry in _whole(queue)]
        if first is not None and not any(isinstance(e[2], TensorPart) for _, e in turn):
            turn.sort(key=lambda numbered: (numbered[1][0] < first, numbered[1][0]))
        yield from turn
        # One receiver may have a thousand buckets more than the others.
        for receiver in [receiver for receiver, queue in queues.items() if not queue]:
            del queues[receiver]


def _whole(
    queue: deque[tuple[int, int, H2DBucket]],
) -> list[tuple[int, int, H2DBucket]]:
    """The next bucket, or all parts of a tensor: a worker shall put together one at a time."""
    entries = [queue.popleft()]
    while isinstance(part := entries[-1][2], TensorPart) and not part.is_last and queue:
        entries.append(queue.popleft())
    return entries


def _interleaved(
    buckets: Sequence[tuple[int, T]], topology: Topology
) -> Iterator[tuple[str, int, T]]:
    """The buckets as ``(nic, owner, bucket)``, one of each owner NIC in turn."""
    nic_of = {rank: nic for nic, ranks in topology.items() for rank in ranks}
    queues: dict[str, deque[tuple[str, int, T]]] = {nic: deque() for nic in topology}
    for owner, bucket in buckets:
        if owner not in nic_of:
            raise ValueError(f"rank {owner} owns a bucket but is on no NIC of {dict(topology)}")
        queues[nic_of[owner]].append((nic_of[owner], owner, bucket))
    while any(queues.values()):
        for queue in queues.values():
            if queue:
                yield queue.popleft()
