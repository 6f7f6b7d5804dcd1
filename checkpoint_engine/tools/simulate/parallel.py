"""What the workers of a model read of a checkpoint, by the rules that engines slice it by.

The rules go by names, as those of Hugging Face checkpoints. A worker's real needs are those that
its loader was seen to read; these stand in for them where there is no worker.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from operator import itemgetter
from typing import Any

import numpy as np

from checkpoint_engine.data_types import ParameterMeta, tensor_nbytes
from checkpoint_engine.ground.needs import Needs, Region, tensors_digest

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_BY_COLUMNS = re.compile(r"\.(o_proj|down_proj|out_proj|dense_4h_to_h|w2|fc2)\.")
_WHOLE = re.compile(r"norm|\.gate\.|\.q_a_proj\.|\.kv_a_proj_with_mqa\.")


@dataclass(frozen=True)
class Parallel:
    """How workers share a model.

    Attributes:
        tensor: ranks that share each layer, a slice of every matrix each. Rank r has slice
            r modulo this.
        expert: ranks that share the experts, in contiguous blocks of whole experts; experts are not
            sliced then. 1: experts are sliced as everything else.
    """

    tensor: int = 1
    expert: int = 1

    @property
    def ranks(self) -> int:
        """Of an instance."""
        return max(self.tensor, self.expert)

    def needs(self, tensors: Iterable[ParameterMeta], ranks: Iterable[int]) -> list[Needs]:
        """What the worker of each of these ranks reads. No two tensors have the same name."""
        named = [(meta.name, meta.dtype, tuple(meta.shape)) for meta in tensors]
        named.sort(key=itemgetter(0))
        experts = [_EXPERT.search(name) for name, _, _ in named]
        count = 1 + max((int(one[1]) for one in experts if one), default=0)
        groups: dict[_Group, int] = {}
        group_of = []
        for tensor, found in zip(named, experts, strict=True):
            block = None if found is None or self.expert == 1 else int(found[1]) * self.expert
            rule = _rule_of(tensor[0]) if block is None else _Rule.WHOLE
            group = rule, None if block is None else block // count, *tensor[1:]
            group_of.append(groups.setdefault(group, len(groups)))
        digest, every = tensors_digest(named), np.array(group_of, dtype=np.int64)
        return [self._told(digest, groups, every, rank) for rank in ranks]

    def _told(
        self, digest: str, groups: Iterable[_Group], group_of: np.ndarray, rank: int
    ) -> Needs:
        kinds: dict[tuple[Region, ...], int] = {}
        kind_of = [kinds.setdefault(self._regions(group, rank), len(kinds)) for group in groups]
        numbers = np.array(kind_of, dtype="<i4")[group_of]
        return Needs(digest, tuple(kinds), numbers.tobytes())

    def _regions(self, group: _Group, rank: int) -> tuple[Region, ...]:
        rule, block, dtype, shape = group
        if block is not None and block != rank % self.expert:
            return ()
        return _slice(rule, dtype, shape, rank % self.tensor, self.tensor)


class _Rule(Enum):
    """Along which dimension tensors are sliced."""

    WHOLE, ROWS, COLUMNS = range(3)


_Group = tuple[_Rule, int | None, Any, tuple[int, ...]]
"""Tensors that a rank reads alike: the block of experts that they belong to, dtype, shape."""


def _rule_of(name: str) -> _Rule:
    if _WHOLE.search(name):
        return _Rule.WHOLE
    return _Rule.COLUMNS if _BY_COLUMNS.search(name) else _Rule.ROWS


def _slice(
    rule: _Rule, dtype: Any, shape: tuple[int, ...], number: int, count: int
) -> tuple[Region, ...]:
    """A slice of a tensor. Where it cannot be split evenly, as the scales of blocks, slices
    overlap."""
    nbytes = tensor_nbytes(dtype, shape)
    if not nbytes:
        return ()
    if rule is _Rule.WHOLE or len(shape) < 2 or count == 1:
        return (Region(0, nbytes, (), ()),)
    length, repeats = shape[0], 1
    if rule is _Rule.COLUMNS:
        length, repeats = shape[-1], math.prod(shape[:-1])
    begin, end = number * length // count, -(-(number + 1) * length // count)
    unit = nbytes // repeats // length
    repeated = ((repeats,), (length * unit,)) if repeats > 1 else ((), ())
    return (Region(begin * unit, (end - begin) * unit, *repeated),)
