from __future__ import annotations

import base64
import contextlib
import gc
import json
import os
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.data_types import (
    MemoryBufferMetaList,
    MemoryBufferMetas,
    ParameterMeta,
    make_metas,
)
from checkpoint_engine.world import metas_file
from checkpoint_engine.world.metas_file import decode_metas, encode_metas, read_metas

# pickle.dump(ps.get_metas()) of METAS, as programs on the original's releases wrote it to a file.
PICKLE_OF_0_2_0 = base64.b64decode(
    b"gASVywEAAAAAAAB9lEsAjBRjaGVja3BvaW50X2VuZ2luZS5wc5SMFE1lbW9yeUJ1ZmZlck1ldGFMaXN0lJOU"
    b"KYGUfZQojAhfX2RpY3RfX5R9lCiMDnAycF9zdG9yZV9hZGRylIwOMTkyLjAuMi4xOjQ0NDSUjBhtZW1vcnlf"
    b"YnVmZmVyX21ldGFzX2xpc3SUXZRoAYwRTWVtb3J5QnVmZmVyTWV0YXOUk5QpgZR9lChoBn2UKIwFbWV0YXOU"
    b"XZRoAYwNUGFyYW1ldGVyTWV0YZSTlCmBlH2UKGgGfZQojARuYW1llIwBYZSMBWR0eXBllIwFdG9yY2iUjAhi"
    b"ZmxvYXQxNpSTlIwFc2hhcGWUjAV0b3JjaJSMBFNpemWUk5RLAksDhpSFlFKUdYwSX19weWRhbnRpY19leHRy"
    b"YV9flE6MF19fcHlkYW50aWNfZmllbGRzX3NldF9flI+UKGgYaBpoHpCMFF9fcHlkYW50aWNfcHJpdmF0ZV9f"
    b"lE51YmGMA3B0cpRNABCMBHNpemWUTQABdWglTmgmj5QoaCpoEWgpkGgoTnViYYwLcmRtYV9kZXZpY2WUjAZt"
    b"bHg1XzCUdWglTmgmj5QoaCxoCGgKkGgoTnVicy4="
)
PICKLE_OF_0_4_2 = base64.b64decode(
    b"gASV5wEAAAAAAAB9lEsAjBxjaGVja3BvaW50X2VuZ2luZS5kYXRhX3R5cGVzlIwUTWVtb3J5QnVmZmVyTWV0"
    b"YUxpc3SUk5QpgZR9lCiMCF9fZGljdF9flH2UKIwOcDJwX3N0b3JlX2FkZHKUjA4xOTIuMC4yLjE6NDQ0NJSM"
    b"GG1lbW9yeV9idWZmZXJfbWV0YXNfbGlzdJRdlGgBjBFNZW1vcnlCdWZmZXJNZXRhc5STlCmBlH2UKGgGfZQo"
    b"jAVtZXRhc5RdlGgBjA1QYXJhbWV0ZXJNZXRhlJOUKYGUfZQoaAZ9lCiMBG5hbWWUjAFhlIwFZHR5cGWUjAV0"
    b"b3JjaJSMCGJmbG9hdDE2lJOUjAVzaGFwZZSMBXRvcmNolIwEU2l6ZZSTlEsCSwOGlIWUUpSMDGFsaWduZWRf"
    b"c2l6ZZRNAAF1jBJfX3B5ZGFudGljX2V4dHJhX1+UTowXX19weWRhbnRpY19maWVsZHNfc2V0X1+Uj5QoaCVo"
    b"GGgaaB6QjBRfX3B5ZGFudGljX3ByaXZhdGVfX5ROdWJhjANwdHKUTQAQjARzaXpllE0AAXVoJk5oJ4+UKGgr"
    b"aBFoKpBoKU51YmGMC3JkbWFfZGV2aWNllIwGbWx4NV8wlHVoJk5oJ4+UKGgtaApoCJBoKU51YnMu"
)
METAS = {
    0: MemoryBufferMetaList(
        p2p_store_addr="192.0.2.1:4444",
        memory_buffer_metas_list=[
            MemoryBufferMetas(
                metas=[ParameterMeta(name="a", dtype=torch.bfloat16, shape=torch.Size([2, 3]))],
                ptr=4096,
                size=256,
            )
        ],
        rdma_device="mlx5_0",
    )
}


@pytest.mark.parametrize("data", [PICKLE_OF_0_2_0, PICKLE_OF_0_4_2], ids=["0.2.0", "0.4.2"])
def test_pickles_of_the_original_are_read(data: bytes) -> None:
    metas = decode_metas(data)
    assert metas == METAS
    assert type(metas[0].memory_buffer_metas_list[0].metas[0]) is ParameterMeta


@pytest.mark.parametrize("data", [PICKLE_OF_0_2_0, PICKLE_OF_0_4_2], ids=["0.2.0", "0.4.2"])
def test_what_programs_unpickle_themselves_has_the_newer_fields(data: bytes) -> None:
    """As ``ps.load_metas(pickle.load(file))`` does."""
    metas = pickle.loads(data)
    assert metas == METAS
    buffer = metas[0].memory_buffer_metas_list[0]
    assert (metas[0].lease, buffer.checksums, buffer.metas[0].aligned_size) == (None, None, 256)


def test_json_round_trip() -> None:
    assert decode_metas(encode_metas(METAS)) == METAS


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps({0: Hostile()}),
        pickle.dumps({0: MemoryBufferMetaList}),
        pickle.dumps([1]),
        pickle.dumps({0: {"p2p_store_addr": None}}),
        PICKLE_OF_0_2_0[:-20],
        PICKLE_OF_0_2_0.replace(b"bfloat16", b"bfloat17"),
        b"",
        b"{",
        b'{"0": {}}',
        b'{"x": null}',
    ],
)
def test_anything_else_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="metas"):
        decode_metas(data)


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, len(PICKLE_OF_0_2_0)))
def test_damaged_bytes_give_metas_or_a_value_error(noise: bytes, at: int) -> None:
    data = PICKLE_OF_0_2_0[:at] + noise + PICKLE_OF_0_2_0[at + len(noise) :]
    with contextlib.suppress(ValueError):
        assert isinstance(decode_metas(data), dict)


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_pickle_of_what_was_gathered(protocol: int) -> None:
    """Its objects share their sets of fields, and shapes."""
    kinds = [(torch.bfloat16, torch.Size([2, 3]), 256)]
    made = make_metas(["a", "b", "c"], kinds, [0, 0, 0])
    owned = MemoryBufferMetaList.model_construct(
        p2p_store_addr=None,
        memory_buffer_metas_list=[MemoryBufferMetas.model_construct(metas=made, ptr=1, size=768)],
        rdma_device="",
        lease=None,
    )
    read = decode_metas(pickle.dumps({0: owned}, protocol))
    assert [meta.name for meta in read[0].memory_buffer_metas_list[0].metas] == ["a", "b", "c"]


def json_of_owner(number: str = "0", **fields: Any) -> bytes:
    (owner,) = json.loads(encode_metas(METAS)).values()
    return json.dumps({number: owner | fields}).encode()


@pytest.mark.parametrize("number", ["-1", "00", "1_0", " 1", "+1", "9" * 4000, str(2**31 + 1), "x"])
def test_an_owner_that_is_no_rank_is_refused(number: str) -> None:
    with pytest.raises(ValueError, match="is not the number of an owner rank"):
        read_metas(json_of_owner(number))


def test_an_owner_that_is_named_twice_is_refused() -> None:
    one = json_of_owner()
    with pytest.raises(ValueError, match="owner 0 is named twice"):
        read_metas(one[:-1] + b"," + one[1:])


@pytest.mark.parametrize("field", ["p2p_store_addr", "rdma_device"])
def test_text_that_cannot_be_sent_on_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match="Invalid JSON"):
        read_metas(json_of_owner(**{field: "\ud800"}))
    (owned,) = read_metas(json_of_owner(**{field: "\U0001f600"})).values()
    assert getattr(owned, field) == "\U0001f600"


@pytest.mark.parametrize("value", [b"0", b"[]", b"{}", b'{"x":0}'])
@pytest.mark.parametrize("is_field", [True, False])
def test_many_small_values_are_refused_before_they_take_memory(
    value: bytes, is_field: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = b"[" + b",".join([value] * 700_000) + b"]"
    data = json_of_owner(x=1).replace(b'"x": 1', b'"x": ' + many) if is_field else many
    monkeypatch.setattr(metas_file, "_OWNERS", None)
    with pytest.raises(ValueError, match=r"lists and objects, .* commas: too many"):
        read_metas(data)


def test_the_metas_of_many_tensors_with_short_names_are_read() -> None:
    shape = torch.Size([3, 3, 3])
    tensors = [ParameterMeta(name=f"w{i}", dtype=torch.int8, shape=shape) for i in range(50_000)]
    buffer = MemoryBufferMetas(metas=tensors, ptr=0, size=256 * len(tensors))
    metas = {7: METAS[0].model_copy(update={"memory_buffer_metas_list": [buffer]})}
    data = encode_metas(metas)
    assert len(data) > 3 * metas_file._SMALL
    assert read_metas(data) == metas
    assert gc.isenabled()
