"""A plan without some tensors, as workers hold them already."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Set
from dataclasses import replace
from operator import attrgetter

from checkpoint_engine.data_types import (
    BucketPiece,
    BucketRange,
    H2DBucket,
    TensorPart,
    align_up,
    unvalidated,
)
from checkpoint_engine.planning.plan import Step, TransferPlan, in_rounds

_FIELDS = {*BucketPiece.model_fields}


def without(transfer: TransferPlan, names: Set[str]) -> TransferPlan:
    """The same plan, but for the tensors of these ``names``.

    Every tensor keeps its receiver and its sources. A bucket ends before what is left out: its
    checksum is that of consecutive bytes. No bucket is larger than it was, but there may be more.
    """
    if not names:
        return transfer
    steps = list(transfer.steps)
    if transfer.first is not None:  # each rank has them in another order, and numbered alike
        steps.sort(key=attrgetter("number"))
    entries: list[tuple[int, int, H2DBucket]] = []
    sources: dict[int, tuple[int, ...]] = {}
    for step in steps:
        for bucket in _pieces(step.bucket, names):
            entries.append((step.receiver, step.owner, bucket))
            sources[id(bucket)] = step.sources
    # In rounds again: where ranks begin with another receiver each, and one has two buckets in a
    # row, the ranks would wait for each other.
    rounds = in_rounds(entries, transfer.first)
    left = tuple(
        Step(*entry, index % 2, number, sources[id(entry[2])])
        for index, (number, entry) in enumerate(rounds)
    )
    return replace(transfer, steps=left, messages={})


def _pieces(bucket: H2DBucket, names: Set[str]) -> Iterator[H2DBucket]:
    """What is sent of a bucket, in runs of consecutive tensors."""
    is_sent = [meta.name not in names for meta in bucket.items]
    if all(is_sent):
        yield bucket
    if len(set(is_sent)) < 2 or isinstance(bucket, TensorPart):
        return
    ends = [0, *itertools.accumulate(meta.aligned_size for meta in bucket.items)]
    for sent, run in itertools.groupby(range(len(is_sent)), key=is_sent.__getitem__):
        if sent:
            places = list(run)
            first, past = places[0], places[-1] + 1
            begin, end = ends[first], ends[past]
            what = {"size": end - begin, "ranges": _clipped(bucket, begin, end)}
            what |= {"items": bucket.items[first:past], "whole": bucket, "first": first}
            yield unvalidated(BucketPiece, what, _FIELDS)


def _clipped(bucket: H2DBucket, begin: int, end: int) -> list[BucketRange]:
    """Where the bytes from ``begin`` to ``end`` of a bucket lie in its owner's host memory."""
    found, position = [], 0
    for index, offset, size in bucket.ranges:
        first, past = max(begin - position, 0), min(end - position, size)
        if first < past:
            found.append(BucketRange(index, offset + first, past - first))
        position += align_up(size)  # a file mapped in place may end within padding
    return found
