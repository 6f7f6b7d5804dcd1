from __future__ import annotations

import gc
import json
import pickle
import zlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from checkpoint_engine.data_types import (
    BucketRange,
    DataToGather,
    H2DBucket,
    Lease,
    MemoryBuffer,
    MemoryBufferMetaList,
    MemoryBufferMetas,
    ParameterMeta,
    align_up,
    tensor_nbytes,
)
from checkpoint_engine.planning.layouts import (
    Layout,
    decode_layout,
    decode_layouts,
    decode_place,
    encode_layout,
    encode_place,
    known_digest,
    layout_digest,
    missing_layouts,
)

ALL_METAS = TypeAdapter(dict[int, MemoryBufferMetaList])
DTYPES = sorted(
    {value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str
)


def gathered(*buffers: MemoryBufferMetas, **changes: Any) -> DataToGather:
    return DataToGather(
        **{
            "p2p_store_addr": None,
            "memory_buffer_metas_list": list(buffers),
            "rdma_device": "",
            "host_ip": "10.0.0.1",
            "device_uuid": "GPU-x",
            **changes,
        }
    )


def buffer_of(*metas: ParameterMeta, ptr: int = 0) -> MemoryBufferMetas:
    size = sum(meta.aligned_size for meta in metas)
    return MemoryBufferMetas(metas=list(metas), ptr=ptr, size=size)


def sent_and_received(data: DataToGather) -> DataToGather:
    layout = encode_layout(Layout.of([b.metas for b in data.memory_buffer_metas_list]))
    return decode_place(encode_place(data), decode_layout(layout).buffers)


names = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30),
    st.sampled_from(["", "layers.0.weight", "ünïcode\U0001f600", "two\nlines", "nul\0byte", '"\\']),
)
shapes = st.lists(st.integers(0, 1 << 20), max_size=4).map(torch.Size)
metas = st.builds(
    lambda name, dtype, shape: ParameterMeta(name=name, dtype=dtype, shape=shape),
    names,
    st.sampled_from(DTYPES),
    shapes,
)
buffers = st.builds(
    lambda metas, ptr: buffer_of(*metas, ptr=ptr),
    st.lists(metas, max_size=6),
    st.integers(0, (1 << 64) - 1),
)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(buffers, max_size=4),
    st.none() | st.just("10.0.0.1:4000"),
    st.sampled_from(["", "mlx5_0", "mlx5_0,mlx5_1"]),
    st.none() | st.just(Lease(ptr=(1 << 64) - 1, id="0a" * 16)),
)
def test_what_is_gathered_comes_back(
    sent: list[MemoryBufferMetas], store: str | None, nic: str, lease: Lease | None
) -> None:
    data = gathered(*sent, p2p_store_addr=store, rdma_device=nic, lease=lease)
    back = sent_and_received(data)
    assert back == data
    assert [type(meta.shape) for b in back.memory_buffer_metas_list for meta in b.metas] == [
        torch.Size for b in sent for _ in b.metas
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    data = gathered(buffer_of(ParameterMeta(name="w", dtype=dtype, shape=torch.Size([3, 2]))))
    (back,) = sent_and_received(data).memory_buffer_metas_list
    assert back.metas[0].dtype is dtype


def test_a_name_that_is_no_text_in_any_encoding() -> None:
    """A lone surrogate, as ``os.fsdecode`` makes them."""
    data = gathered(buffer_of(ParameterMeta(name="w\udc80", dtype=torch.int8, shape=())))
    assert sent_and_received(data) == data


def test_padding_that_is_not_ours_is_kept() -> None:
    meta = ParameterMeta(name="w", dtype=torch.int8, shape=torch.Size([1]), aligned_size=4096)
    same = ParameterMeta(name="v", dtype=torch.int8, shape=torch.Size([1]))
    (back,) = sent_and_received(gathered(buffer_of(meta, same))).memory_buffer_metas_list
    assert [one.aligned_size for one in back.metas] == [4096, 256]


def test_a_large_model_is_compact() -> None:
    kinds = [
        ("up", torch.bfloat16, (768, 2048)),
        ("down", torch.float8_e4m3fn, (2048, 768)),
        ("scale", torch.float32, (6, 16)),
    ]
    listed = [
        ParameterMeta(
            name=f"model.layers.{i // 100}.mlp.experts.{i % 100}.{kind}.weight",
            dtype=dtype,
            shape=torch.Size(shape),
        )
        for i in range(10_000)
        for kind, dtype, shape in [kinds[i % 3]]
    ]
    blob = encode_layout(Layout.of([listed]))
    assert len(blob) < 12 * len(listed)
    assert len(blob) < len(pickle.dumps(gathered(buffer_of(*listed)))) / 8
    assert decode_layout(blob).buffers == [listed]


def test_decoding_leaves_garbage_collection_as_it_was() -> None:
    blob = encode_layout(Layout.of([[ParameterMeta(name="w", dtype=torch.int8, shape=())]]))
    decode_layout(blob)
    assert gc.isenabled()
    gc.disable()
    try:
        decode_layout(blob)
        assert not gc.isenabled()
    finally:
        gc.enable()


LAYOUT: dict[str, Any] = {
    "counts": [1, 1],
    "kinds": [["torch.int8", [1], 256], ["torch.int8", [2], 256]],
    "names": ["v", "w"],
    "kind_of": [0, 1],
}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"kind_of": [0, -1]}, "one is missing"),
        ({"kind_of": [0, 2]}, "one is missing"),
        ({"kind_of": [0]}, "2 names, 1 of a kind"),
        ({"kind_of": [1, 1]}, "no tensor has it"),
        ({"counts": [1]}, "2 names"),
        ({"counts": [1, 2]}, "2 names"),
        ({"counts": [3, -1]}, "2 names"),
        ({"counts": [1, True]}, "integers"),
        ({"names": ["v", 3]}, "names are strings"),
        ({"kinds": [["torch.int8", [1], -1]] * 2}, "not a kind of tensor"),
    ],
)
def test_what_is_no_layout(damage: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        decode_layout(zlib.compress(json.dumps(LAYOUT | damage).encode()))


def test_a_layout_that_is_cut_off_or_followed_by_something() -> None:
    blob = zlib.compress(json.dumps(LAYOUT).encode())
    assert [len(buffer) for buffer in decode_layout(blob).buffers] == [1, 1]
    for damaged in (blob[:-1], blob + b"x", blob + blob):
        with pytest.raises(ValueError, match="cut off, or hold too much"):
            decode_layout(damaged)


def test_owners_with_nothing() -> None:
    assert sent_and_received(gathered()) == gathered()
    empty = gathered(buffer_of())
    assert sent_and_received(empty) == empty


# ---------------------------------------------------------------------- what need not be sent


def meta(name: str) -> ParameterMeta:
    return ParameterMeta(name=name, dtype=torch.int8, shape=torch.Size([1]))


class World:
    """Ranks that gather: what they own, and what each knows from the times before."""

    def __init__(self, size: int) -> None:
        self.known: list[dict[str, Layout]] = [{} for _ in range(size)]

    def gather(self, names: list[str]) -> list[int]:
        """The ranks whose layouts were sent; every rank's tensor has one of ``names``."""
        layouts = [encode_layout(Layout.of([[meta(name)]])) for name in names]
        digests = [layout_digest(layout) for layout in layouts]
        known_to = [known_digest(known) for known in self.known]
        missing = [missing_layouts(digests, known_to, known) for known in self.known]
        assert all(ranks == missing[0] for ranks in missing)  # or they would wait for each other
        received = {rank: layouts[rank] for rank in missing[0]}
        for rank, known in enumerate(self.known):
            self.known[rank] = decode_layouts(digests, known, received)
            found = [self.known[rank][digest].buffers for digest in digests]
            assert found == [[[meta(name)]] for name in names]
        return missing[0]


def test_only_layouts_that_changed_are_sent() -> None:
    world = World(3)
    assert world.gather(["a", "b", "c"]) == [0, 1, 2]
    assert world.gather(["a", "b", "c"]) == []
    assert world.gather(["a", "x", "c"]) == [1]
    assert world.gather(["c", "c", "a"]) == []
    assert world.gather(["c", "c", "x"]) == [2]  # forgotten, for it was in use no more


def test_a_rank_that_knows_less_is_sent_everything() -> None:
    world = World(3)
    world.gather(["a", "b", "c"])
    world.known[1] = {}  # its process was restarted
    assert world.gather(["a", "b", "c"]) == [0, 1, 2]
    assert world.gather(["a", "b", "c"]) == []


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from("abcd"), min_size=3, max_size=3), st.integers(-9, 2)),
        max_size=6,
    )
)
def test_ranks_always_agree_on_what_is_sent(steps: list[tuple[list[str], int]]) -> None:
    world = World(3)
    for names, restarted in steps:
        if restarted >= 0:
            world.known[restarted] = {}
        world.gather(names)


# ---------------------------------------------------------------------- as users store them


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.integers(0, 300), st.lists(buffers, max_size=2), max_size=3))
def test_metas_round_trip_through_json(world: dict[int, list[MemoryBufferMetas]]) -> None:
    listed = {
        rank: MemoryBufferMetaList(
            p2p_store_addr="h:1", memory_buffer_metas_list=held, rdma_device="mlx5_0"
        )
        for rank, held in world.items()
    }
    assert ALL_METAS.validate_json(ALL_METAS.dump_json(listed)) == listed
    assert pickle.loads(pickle.dumps(listed)) == listed


def test_the_form_in_json() -> None:
    meta = ParameterMeta(name="w", dtype=torch.bfloat16, shape=torch.Size([2, 3]))
    text = json.loads(ALL_METAS.dump_json({7: _owned(buffer_of(meta, ptr=9))}))
    assert text["7"].pop("lease") is None  # ours; readers of the original pass it over
    assert text["7"]["memory_buffer_metas_list"][0].pop("checksums") is None  # the same
    assert text == {
        "7": {
            "p2p_store_addr": None,
            "memory_buffer_metas_list": [
                {
                    "metas": [
                        {
                            "name": "w",
                            "dtype": "torch.bfloat16",
                            "shape": [2, 3],
                            "aligned_size": 256,
                        }
                    ],
                    "ptr": 9,
                    "size": 256,
                }
            ],
            "rdma_device": "",
        }
    }


def _owned(*held: MemoryBufferMetas) -> MemoryBufferMetaList:
    return MemoryBufferMetaList(
        p2p_store_addr=None, memory_buffer_metas_list=list(held), rdma_device=""
    )


def test_metas_of_release_0_2_get_their_padded_size() -> None:
    old = {
        "0": {
            "p2p_store_addr": "10.0.0.1:1",
            "rdma_device": None,
            "memory_buffer_metas_list": [
                {
                    "metas": [{"name": "w", "dtype": "torch.float32", "shape": [65]}],
                    "ptr": 1,
                    "size": 512,
                }
            ],
        }
    }
    read = ALL_METAS.validate_json(json.dumps(old))[0]
    assert read.memory_buffer_metas_list[0].metas[0].aligned_size == 512
    assert read.rdma_device == ""
    assert ParameterMeta(name="w", dtype=torch.int8, shape=torch.Size([])).aligned_size == 256


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "torch.nonsense"),
        ("dtype", "torch.load"),
        ("dtype", 3),
        ("shape", [1, -1]),
        ("shape", [1.5]),
        ("shape", "12"),
        ("shape", [True]),
        ("name", 3),
    ],
)
def test_metas_that_make_no_sense(field: str, value: Any) -> None:
    meta = {"name": "w", "dtype": "torch.int8", "shape": [1]} | {field: value}
    with pytest.raises(ValidationError):
        ParameterMeta.model_validate(meta)


@settings(deadline=None, max_examples=60)
@given(metas)
def test_metas_that_came_are_like_any_other(meta: ParameterMeta) -> None:
    """They are made without validation."""
    ((made,),) = decode_layout(encode_layout(Layout.of([[meta]]))).buffers
    assert made == meta
    assert made.model_dump_json() == meta.model_dump_json()
    assert pickle.loads(pickle.dumps(made)) == made.model_copy() == meta


def test_buckets_are_what_0_2_and_0_4_callers_make() -> None:
    meta = ParameterMeta(name="w", dtype=torch.int8, shape=torch.Size([3]), aligned_size=256)
    bucket = H2DBucket(size=256, ranges=[BucketRange(0, 512, 256)], items=[meta])
    assert bucket.ranges == [(0, 512, 256)]
    assert (bucket.ranges[0].idx, bucket.ranges[0].offset, bucket.ranges[0].size) == (0, 512, 256)
    memory = MemoryBuffer(buffer=torch.zeros(256, dtype=torch.uint8), size=256, metas=[meta])
    assert memory.manually_pinned is False


def test_sizes() -> None:
    assert [align_up(n) for n in (0, 1, 256, 257)] == [0, 256, 256, 512]
    assert tensor_nbytes(torch.complex64, (2, 3)) == 48
    assert tensor_nbytes(torch.bool, ()) == 1
