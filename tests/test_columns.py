"""Column copies: that reading out of them gives the bytes that reading the plain buffers does."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from base64 import b64encode
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from checkpoint_engine.data_types import (
    ColumnCopy,
    DataToGather,
    MemoryBufferMetaList,
    MemoryBufferMetas,
    ParameterMeta,
)
from checkpoint_engine.ground.checksum import FORMULA
from checkpoint_engine.ground.devices import DeviceManager
from checkpoint_engine.ground.needs import Needs, Region, runs_of
from checkpoint_engine.memory import checksum
from checkpoint_engine.memory.columns import CopiedColumns, copy_columns
from checkpoint_engine.memory.host_memory import HostMemory
from checkpoint_engine.memory.sources import tensor_sources
from checkpoint_engine.planning import columns, shards
from checkpoint_engine.planning.columns import Columns, column_tensors, encode_parts
from checkpoint_engine.planning.layouts import layouts_of
from checkpoint_engine.planning.plan import BucketSize, plan_transfer
from checkpoint_engine.planning.shards import HostNeeds, Tensors
from checkpoint_engine.transfer import remote_loader
from checkpoint_engine.transfer.remote_loader import RemoteLoader

quick = settings(deadline=None, max_examples=300)
CPU = torch.device("cpu")
GAP = 100


class SameProcess:
    """A store whose other ranks' memory is this process's."""

    reads_into_device_memory = True

    def batch_transfer_sync_read(
        self, _: str, to: Sequence[int], at: Sequence[int], lens: Sequence[int], **__: Any
    ) -> None:
        for one in zip(to, at, lens, strict=True):
            ctypes.memmove(*one)


@st.composite
def tensors(draw: Any) -> dict[str, torch.Tensor]:
    """Matrices, most of which can be cut into parts, and others."""
    found = {}
    for index in range(draw(st.integers(2, 6))):
        dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]))
        rows = draw(st.sampled_from([32, 64, 64, 32, 3]))
        columns = draw(st.sampled_from([64, 96, 128]))
        shape = draw(st.sampled_from([*[(rows, columns)] * 4, (2, rows, columns), (rows,)]))
        size = torch.Size(shape).numel() * dtype.itemsize
        bits = torch.randint(0, 256, (size,), dtype=torch.uint8)
        found[f"t{index}"] = bits.view(dtype).view(shape)
    return found


def columns_from(tensor: torch.Tensor, begin: int, end: int) -> Region:
    row = tensor.shape[-1] * tensor.dtype.itemsize
    return Region(begin, end - begin, (tensor.nbytes // row,), (row,))


@st.composite
def read_of(draw: Any, tensor: torch.Tensor) -> list[Region]:
    """What a host reads of a tensor: columns mostly, of which some are a tensor-parallel rank's."""
    kind = draw(st.sampled_from([*["columns"] * 9, "odd", "all", "none", "rows"]))
    row = tensor.shape[-1] * tensor.dtype.itemsize
    if kind == "none":
        return []
    if kind == "all" or tensor.dim() == 1:
        return [Region(0, tensor.nbytes, (), ())]
    if kind == "rows":
        return [Region(0, draw(st.integers(1, tensor.nbytes)), (), ())]
    width = row // draw(st.sampled_from([2, 4]))
    if kind == "odd":
        begin = draw(st.integers(0, row - 1))
        return [columns_from(tensor, begin, draw(st.integers(begin + 1, row)))]
    first = draw(st.integers(0, row // width - 1))
    ranks = range(first, min(first + draw(st.sampled_from([1, 1, 2])), row // width))
    return [columns_from(tensor, rank * width, (rank + 1) * width) for rank in ranks]


def needs_of(named: dict[str, torch.Tensor], read: dict[str, list[Region]]) -> Needs:
    needs = Needs.of({(n, t.dtype, tuple(t.shape)): read[n] for n, t in named.items()})
    assert needs is not None
    return needs


class Owner:
    """Rank 0, that holds these tensors, and what hosts read of them."""

    def __init__(self, named: dict[str, torch.Tensor], bucket_bytes: int = 1 << 18) -> None:
        self.named = named
        self.memory = HostMemory("cpu")
        self.buffers = self.memory.fill(tensor_sources(named))
        told = [
            MemoryBufferMetas(metas=b.metas, ptr=b.buffer.data_ptr(), size=b.size)
            for b in self.buffers
        ]
        self.owned = MemoryBufferMetaList(
            p2p_store_addr="here", memory_buffer_metas_list=told, rdma_device=""
        )
        nics = {"rank-0": {0}}
        size = BucketSize(bucket_bytes, True)
        self.plan = plan_transfer({0: self.owned}, size, nics, nics, may_cut=True)
        self.tensors = Tensors(self.plan.steps, layouts_of({0: self.owned}))

    def host(self, *read: dict[str, list[Region]]) -> HostNeeds:
        return HostNeeds(self.tensors, [needs_of(self.named, one) for one in read])

    def wanted(self, needs: HostNeeds) -> dict[str, Columns]:
        return {
            meta.name: some
            for step in self.plan.steps
            for meta, some in zip(step.bucket.items, needs.columns_in(step.bucket), strict=True)
            if some is not None
        }

    def copies(self, wanted: dict[str, Columns]) -> dict[str, columns.ColumnTensor]:
        """As another rank hears of them."""
        self.copied = [*copy_columns(self.memory, self.buffers, wanted, lambda _: None)]
        buffers = [buffer.metas for buffer in self.buffers]
        found: dict[str, columns.ColumnTensor] = {}
        for one in self.copied:
            checksum.add_sums([one.memory])
            found |= column_tensors(buffers, told(one))
        return found

    def read(
        self,
        needs: HostNeeds,
        copies: dict[str, columns.ColumnTensor],
        store: Any = SameProcess(),  # noqa: B008  # it has no state
        manager: Any = DeviceManager("cpu"),  # noqa: B008
    ) -> tuple[int, int]:
        """Compare what is read of each bucket with its tensors. Returns how many bytes were read,
        and how many tensors out of copies."""
        loader = RemoteLoader(store, {0: self.owned}, manager, CPU)
        nbytes = by_columns = 0
        try:
            for step in self.plan.steps:
                part = needs.read_by_columns(step.bucket, copies)
                target = torch.randint(0, 256, (step.bucket.size,), dtype=torch.uint8)
                runs = needs.runs_in(step.bucket)
                by_owner = {} if part is None else {0: part}
                nbytes += loader.read_any({0: step.bucket}, target, runs, by_owner)
                by_columns += 0 if part is None else len(part[1])
                self.check(step.bucket.items, target, getattr(step.bucket, "begin", 0))
        finally:
            loader.close()
        return nbytes, by_columns

    def check(self, items: Sequence[ParameterMeta], target: torch.Tensor, begin: int) -> None:
        start = -begin
        for meta in items:
            plain = self.named[meta.name].contiguous().view(-1).view(torch.uint8)
            for first, past in zip(*self.exact[meta.name], strict=True):
                low, high = max(first + start, 0), min(past + start, len(target))
                if low < high:
                    assert torch.equal(target[low:high], plain[low - start : high - start])
            start += meta.aligned_size

    def reads(self, *read: dict[str, list[Region]]) -> HostNeeds:
        """The needs of workers of a host, which ``read`` is checked by from now on."""
        self.exact = {
            name: runs_of(itertools.chain(*(one[name] for one in read)), tensor.nbytes, 0)
            for name, tensor in self.named.items()
        }
        return self.host(*read)


def told(one: CopiedColumns) -> ColumnCopy:
    return ColumnCopy(
        idx=one.index,
        ptr=one.memory.buffer.data_ptr(),
        size=one.memory.size,
        parts=encode_parts(one.parts),
        checksums=one.memory.checksums,
        lease="",
    )


@quick
@given(st.data(), tensors(), st.sampled_from([1 << 13, 1 << 16]))
def test_the_needed_bytes_are_the_same(
    data: Any, named: dict[str, torch.Tensor], size: int
) -> None:
    """The owner's host and the reader's workers read whatever they like."""
    with mock.patch.object(shards, "SHORTEST_GAP", GAP):
        owner = Owner(named, size)
        there = {name: data.draw(read_of(tensor)) for name, tensor in named.items()}
        here = [
            {name: data.draw(read_of(tensor)) for name, tensor in named.items()}
            for _ in range(data.draw(st.integers(1, 2)))
        ]
        copies = owner.copies(owner.wanted(owner.host(there)))
        needs = owner.reads(*here)
        plain, none = owner.read(needs, {})
        read, by_columns = owner.read(needs, copies)
    assert none == 0
    assert read < plain if by_columns else read == plain
    event(f"{bool(copies)} copies, {by_columns} tensors read out of them")


def matrix(rows: int = 64, row: int = 1024) -> torch.Tensor:
    return torch.randint(0, 256, (rows, row), dtype=torch.uint8)


def halves(named: dict[str, torch.Tensor], *places: int, parts: int = 2) -> dict[str, list[Region]]:
    return {
        name: [
            columns_from(one, place * one.shape[1] // parts, (place + 1) * one.shape[1] // parts)
            for place in places
        ]
        for name, one in named.items()
    }


@pytest.mark.parametrize(
    ("parts", "theirs", "ours"),
    [(2, [0], [1]), (2, [1], [1]), (4, [0, 1], [2, 3]), (4, [0], [1, 2]), (8, [2], [0])],
)
def test_just_the_needed_bytes_are_read(parts: int, theirs: list[int], ours: list[int]) -> None:
    named = {"a": matrix(), "b": matrix(256, 512)}
    owner = Owner(named)
    copies = owner.copies(owner.wanted(owner.host(halves(named, *theirs, parts=parts))))
    assert copies.keys() == named.keys()
    needs = owner.reads(halves(named, *ours, parts=parts))
    total = sum(one.nbytes for one in named.values())
    assert owner.read(needs, copies) == (total * len(ours) // parts, len(named))


def test_columns_that_are_apart_are_read_plain() -> None:
    named = {"a": matrix()}
    owner = Owner(named)
    copies = owner.copies(owner.wanted(owner.host(halves(named, 0, parts=4))))
    plain = 64 * 1024 - 256
    assert owner.read(owner.reads(halves(named, 1, 3, parts=4)), copies) == (plain, 0)


def test_whole_buckets_are_read_plain() -> None:
    """Where gaps are read along from the first byte to the last, workers are told that the bucket
    is whole."""
    named = {"a": matrix()}
    owner = Owner(named)
    copies = owner.copies(owner.wanted(owner.host(halves(named, 0, parts=4))))
    needs = owner.reads(halves(named, 0, 3, parts=4))
    assert needs.runs_in(owner.plan.steps[0].bucket) is None
    assert owner.read(needs, copies) == (named["a"].nbytes, 0)


@pytest.mark.parametrize(
    "other",
    [
        {"a": matrix().view(32, 2048)},
        {"a": matrix().view(torch.bfloat16)},  # the same row
        {"a": matrix().view(-1)},
        {"b": matrix()},
    ],
)
def test_other_tensors_are_copied_by_their_rows_or_not(other: dict[str, torch.Tensor]) -> None:
    """Of the same name, in the checkpoint that is registered next."""
    wanted = {"a": Columns(1024, 0, 512)}
    copies = Owner(other).copies(wanted)
    tensor = other.get("a")
    fits = tensor is not None and tensor.dim() == 2 and tensor[0].nbytes == 1024
    assert (copies.keys() == {"a"}) == fits


@pytest.mark.parametrize(
    "some",
    [
        Columns(1024, 0, 100),  # 4 bytes each
        Columns(1024, 0, 1024),
        Columns(1000, 0, 500),
        Columns(1024, 0, 64),  # 192 bytes each
        Columns(1024, 0, 8),
    ],
)
def test_columns_that_are_no_parts_are_not_copied(some: Columns) -> None:
    owner = Owner({"a": matrix(3)})
    assert owner.copies({"a": some}) == {}
    assert owner.copied == []


def test_large_matrices_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "LARGEST_MATRIX", 64 * 1024 - 1)
    assert Owner({"a": matrix()}).copies({"a": Columns(1024, 0, 512)}) == {}


def test_changed_bytes_are_noticed() -> None:
    named = {"a": matrix(), "b": matrix()}
    owner = Owner(named)
    copies = owner.copies(owner.wanted(owner.host(halves(named, 0))))
    needs = owner.reads(halves(named, 1))
    owner.read(needs, copies)
    (copied,) = owner.copied
    copied.memory.buffer[-1] ^= 1  # of the last half of b
    with pytest.raises(ValueError, match="the bytes of columns from here"):
        owner.read(needs, copies)
    owner.read(owner.reads(halves(named, 0)), copies)  # the other part


def test_columns_pass_through_host_memory_on_their_way_to_a_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[str] = []
    stream = SimpleNamespace(synchronize=lambda: waited.append("stream"))
    event = SimpleNamespace(synchronize=lambda: None, record=lambda: None)
    device = SimpleNamespace(
        set_device=lambda _: None,
        Stream=lambda: stream,
        Event=lambda: event,
        stream=lambda _: contextlib.nullcontext(),
    )
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **o: empty(*size, **o))
    monkeypatch.setattr(remote_loader, "_BOUNCE_BYTES", 4096)
    named = {"a": matrix(), "b": matrix(256, 512), "c": torch.rand(100)}
    read = {"c": [Region(0, 400, (), ())]}
    both = {name: named[name] for name in "ab"}
    owner = Owner(named)
    copies = owner.copies(owner.wanted(owner.host(read | halves(both, 0))))
    needs = owner.reads(read | halves(both, 1))
    store = SimpleNamespace(
        reads_into_device_memory=False,
        batch_transfer_sync_read=SameProcess().batch_transfer_sync_read,
    )
    manager = SimpleNamespace(is_accelerator=True, device_module=device)
    total = sum(one.nbytes for one in both.values()) // 2 + 400
    assert owner.read(needs, copies, store, manager) == (total, 2)
    assert len(waited) == 2  # for what was read, and for what was put in its place


@quick
@given(
    st.integers(0, 2),
    st.integers(0, 1 << 17),
    st.text() | st.lists(st.integers(0, 255), max_size=4).map(encode_parts),
    st.none()
    | st.text()
    | st.binary(max_size=64).map(lambda b: f"{FORMULA}:{b64encode(b).decode()}"),
)
def test_anything_else_is_refused_as_well(
    idx: int, size: int, parts: str, sums: str | None
) -> None:
    told = ColumnCopy(idx=idx, ptr=1, size=size, parts=parts, checksums=sums, lease="")
    meta = ParameterMeta(name="a", dtype=torch.uint8, shape=torch.Size((64, 1024)))
    with contextlib.suppress(ValueError):
        found = column_tensors([[meta], [meta, meta]], told)
        assert size == (1 << 16) * len(found)


@pytest.mark.parametrize(
    "change",
    [
        {"idx": 1},
        {"size": 1},
        {"parts": ""},
        {"parts": "?"},
        {"parts": encode_parts([2])},
        {"parts": encode_parts([2, 2, 2])},
        {"parts": encode_parts([2, 3])},
        {"parts": encode_parts([0, 2])},
        {"parts": encode_parts([255, 255])},
        {"checksums": "odd factors, 2047:AAAA"},
        {"checksums": "odd factors, 2047:"},
    ],
)
def test_what_is_no_copy_of_a_buffer_is_refused(change: dict[str, Any]) -> None:
    named = {"a": matrix(), "b": matrix()}
    owner = Owner(named)
    owner.copies(owner.wanted(owner.host(halves(named, 0))))
    copy = told(owner.copied[0])
    buffers = [buffer.metas for buffer in owner.buffers]
    assert column_tensors(buffers, copy).keys() == named.keys()
    with pytest.raises(ValueError, match="not the column copy of a buffer"):
        column_tensors(buffers, copy.model_copy(update=change))


def test_a_release_that_announces_none_is_read_plain() -> None:
    said = DataToGather(
        p2p_store_addr=None,
        memory_buffer_metas_list=[],
        rdma_device="",
        host_ip="192.0.2.1",
        device_uuid="GPU-1",
    )
    older = said.model_dump_json(exclude={"column_copies"})
    assert DataToGather.model_validate_json(older, strict=True) == said
