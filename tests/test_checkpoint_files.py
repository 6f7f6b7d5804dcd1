from __future__ import annotations

import io
import json
import os
import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loguru import logger
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from checkpoint_engine.memory import files as reader
from checkpoint_engine.memory.files import open_files
from checkpoint_engine.memory.folder import MissingFileError
from checkpoint_engine.memory.sources import (
    FileParts,
    TensorSource,
    file_of,
    natural_key,
    tensor_sources,
)


def write_safetensors(path: Path, header: dict[str, Any] | bytes, data: bytes) -> str:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return str(path)


ODD_F4 = "'w': F4 needs an even" if hasattr(torch, "float4_e2m1fn_x2") else "'F4', unknown to torch"


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_npy(path: Path, arrays: dict[str, Any], **changes: Any) -> str:
    """``arrays``: name to (tensor, tp_concat_dim); ``changes`` replace keys of every meta."""
    with path.open("wb") as file:
        for tensor, _ in arrays.values():
            np.save(file, stored(tensor))
    metas = [
        {
            "key": name,
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "type": torch.Tensor,
            "tp_concat_dim": dim,
            **changes,
        }
        for name, (tensor, dim) in arrays.items()
    ]
    Path(f"{path}.meta").write_bytes(pickle.dumps(metas))
    return str(path)


def stored(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """As numpy can hold it: dtypes that it lacks go as integers of the same size."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy()
    if tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point:
        return tensor.view(torch.uint8).numpy()
    return tensor.numpy()


@contextmanager
def warnings() -> Iterator[io.StringIO]:
    sink = io.StringIO()
    handler = logger.add(sink, level="WARNING")
    try:
        yield sink
    finally:
        logger.remove(handler)


def read(source: TensorSource) -> torch.Tensor:
    """The tensor, put together as ``FileParts`` says."""
    assert isinstance(source.data, FileParts)
    parts = []
    for part in source.data.parts:
        data = Path(part.path).read_bytes()[part.offset : part.offset + part.nbytes]
        parts.append(np.frombuffer(data, np.uint8).reshape(source.data.rows, -1))
    data = bytearray(np.concatenate(parts, axis=1).tobytes())
    return torch.frombuffer(data, dtype=torch.uint8).view(source.dtype).view(source.shape)


class TestNaturalKey:
    def test_layer_2_comes_before_layer_10(self) -> None:
        names = ["layers.10.w", "layers.2.w", "embed", "layers.2.b", "layers.1.w", "lm_head"]
        assert sorted(names, key=natural_key) == [
            "embed",
            "layers.1.w",
            "layers.2.b",
            "layers.2.w",
            "layers.10.w",
            "lm_head",
        ]

    @given(st.lists(st.text("ab.019٣²", max_size=6), unique=True))
    @settings(deadline=None, max_examples=200)
    def test_any_names_have_one_order(self, names: list[str]) -> None:
        ordered = sorted(names, key=natural_key)
        assert sorted(reversed(names), key=natural_key) == ordered
        assert len({(str(natural_key(name))) for name in names}) == len(names)


SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", None),
}


class TestSafetensors:
    def test_sharded_files_with_metadata(self, tmp_path: Path) -> None:
        tensors = {f"layers.{i}.w": torch.randn(3, i) for i in range(5)}  # one has no element
        tensors["scale"] = torch.tensor(3.5, dtype=torch.bfloat16)
        files = []
        for i in range(2):
            files.append(tmp_path / f"model-{i}.safetensors")
            part = dict(list(tensors.items())[i::2])
            save_file(part, files[-1], metadata={"format": "pt"})
        sources = open_files(files)
        assert set(sources) == set(tensors)
        for name, tensor in tensors.items():
            source = sources[name]
            assert (source.name, source.dtype, source.shape) == (name, tensor.dtype, tensor.shape)
            assert source.nbytes == tensor.nbytes
            assert source.nbytes == 0 or torch.equal(read(source), tensor)

    @pytest.mark.parametrize("code", SAFETENSORS_DTYPES)
    @pytest.mark.parametrize("shape", [[], [0, 3], [2, 3]])
    def test_every_dtype(self, tmp_path: Path, code: str, shape: list[int]) -> None:
        dtype = SAFETENSORS_DTYPES[code]
        if dtype is None:
            return  # this torch lacks it
        nbytes = int(np.prod(shape)) * dtype.itemsize
        header = {"w": entry(code, shape, 0, nbytes)}
        path = write_safetensors(tmp_path / "a.safetensors", header, bytes(nbytes))
        source = open_files([path])["w"]
        assert (source.dtype, list(source.shape), source.nbytes) == (dtype, shape, nbytes)

    def test_4_bit_floats_are_counted_in_pairs(self, tmp_path: Path) -> None:
        header = {"w": entry("F4", [3, 4], 0, 6)}
        path = write_safetensors(tmp_path / "a.safetensors", header, bytes(6))
        if hasattr(torch, "float4_e2m1fn_x2"):
            source = open_files([path])["w"]
            assert (source.dtype, source.shape) == (torch.float4_e2m1fn_x2, (3, 2))
        else:
            with pytest.raises(ValueError, match="'w' has dtype 'F4'"):
                open_files([path])

    def test_no_tensors_and_no_files(self, tmp_path: Path) -> None:
        path = write_safetensors(tmp_path / "a.safetensors", {"__metadata__": {"a": "b"}}, b"")
        assert open_files([path]) == {}
        assert open_files([]) == {}

    @pytest.mark.parametrize(
        ("header", "data", "says"),
        [
            ({"w": entry("F32", [2], 0, 8)}, b"1234", "'w'.*ends at byte .* file at"),
            ({"w": entry("F32", [2], 0, 8)}, bytes(12), "4 bytes behind the last tensor"),
            ({"w": entry("F32", [2], 0, 4)}, bytes(4), "'w'.*takes 8 bytes, .* 0 to 4"),
            ({"w": entry("F32", [2], 8, 0)}, bytes(8), "'w'.*says bytes 8 to 0"),
            ({"w": entry("F32", [2], -8, 0)}, bytes(8), "'w' begins at byte -8"),
            ({"w": entry("F32", [2], 4, 12)}, bytes(12), "'w' begins at byte"),
            (
                {"w": entry("F32", [2], 0, 8), "v": entry("F32", [2], 4, 12)},
                bytes(12),
                "'v' begins at byte",
            ),
            ({"w": entry("F99", [2], 0, 8)}, bytes(8), "'w' has dtype 'F99'"),
            ({"w": entry("F32", [-2], 0, 8)}, bytes(8), "'w' has the impossible shape"),
            ({"w": entry("F32", [2**70], 0, 8)}, bytes(8), "'w' has the impossible shape"),
            ({"w": entry("F32", [2**40, 2**40], 0, 8)}, bytes(8), "'w'.*takes"),
            ({"w": {"dtype": "F32", "shape": [2]}}, bytes(8), "'w': malformed header entry"),
            ({"w": 3}, b"", "'w': malformed header entry"),
            ({"": entry("F32", [2], 0, 8)}, bytes(8), "empty name"),
            ({"w": entry("F4", [3], 0, 1)}, bytes(1), ODD_F4),
            (b"[]", b"", "no JSON object"),
            (b"{nonsense", b"", "cannot be parsed"),
            (b"[" * 50_000, b"", "cannot be parsed"),
            (
                b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                b'"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
                b"1",
                "'w' is in it twice",
            ),
            ({"__metadata__": {"a": 1}}, b"", "refused by the safetensors library"),
        ],
    )
    def test_lying_headers(self, tmp_path: Path, header: Any, data: bytes, says: str) -> None:
        path = write_safetensors(tmp_path / "a.safetensors", header, data)
        with pytest.raises(ValueError, match=says) as caught:
            open_files([path])
        assert path in str(caught.value)

    @pytest.mark.parametrize("length", [0, 3, 8, 20, 200])
    def test_truncated_file(self, tmp_path: Path, length: int) -> None:
        path = tmp_path / "a.safetensors"
        save_file({"w": torch.randn(100)}, path)
        os.truncate(path, length)
        with pytest.raises(ValueError, match="truncated") as caught:
            open_files([path])
        assert str(path) in str(caught.value)

    @given(st.binary(max_size=200))
    @settings(deadline=None, max_examples=200)
    def test_any_bytes_give_a_value_error(
        self, tmp_path_factory: pytest.TempPathFactory, data: bytes
    ) -> None:
        path = tmp_path_factory.getbasetemp() / "any.safetensors"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=str(path)):
            open_files([path])

    def test_header_longer_than_the_library_allows(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        with path.open("wb") as file:
            file.write(struct.pack("<Q", 200_000_000))
            file.truncate(300_000_000)
        with pytest.raises(ValueError, match="200000000"):
            open_files([path])

    def test_missing_unreadable_and_unknown_files(self, tmp_path: Path) -> None:
        with pytest.raises(MissingFileError, match=r"no\.safetensors does not exist"):
            open_files([tmp_path / "no.safetensors"])
        (tmp_path / "folder.safetensors").mkdir()
        with pytest.raises(ValueError, match=r"folder\.safetensors cannot be opened"):
            open_files([tmp_path / "folder.safetensors"])
        with pytest.raises(ValueError, match=r"weights\.bin: not a checkpoint file"):
            open_files([tmp_path / "weights.bin"])

    def test_a_later_file_with_the_same_bytes_wins(self, tmp_path: Path) -> None:
        same = {"w": torch.randn(3, 5), "v": torch.tensor(float("nan")), "none": torch.ones(0, 2)}
        for name in ("c", "b", "a"):
            save_file(same | {name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
        files = [str(tmp_path / f"{name}.safetensors") for name in ("c", "b", "a")]
        with warnings() as warned:
            sources = open_files(files)
        assert {file_of(sources[name]) for name in same} == {files[-1]}
        assert sources.keys() == {*same, "a", "b", "c"}
        assert warned.getvalue().count("\n") == 1
        assert "'w'" in warned.getvalue()

    @pytest.mark.parametrize(
        ("other", "says"),
        [
            (torch.tensor([1.0, -0.0]), "different bytes"),
            (torch.tensor([1.0, 0.0], dtype=torch.float16), "different dtypes: .*32 and .*16"),
            (torch.tensor([[1.0, 0.0]]), "different shapes"),
            (torch.tensor([1, 0], dtype=torch.int32), "different dtypes"),
        ],
    )
    def test_different_tensors_of_one_name(
        self, tmp_path: Path, other: torch.Tensor, says: str
    ) -> None:
        save_file({"w": torch.tensor([1.0, 0.0])}, tmp_path / "a.safetensors")
        save_file({"w": other}, tmp_path / "b.safetensors")
        with pytest.raises(
            ValueError, match=rf"'w' is in both .*a\.safetensors and .*b\.safetensors, .*{says}"
        ):
            open_files([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])

    @pytest.mark.parametrize("at", [0, 99, -1])
    def test_every_byte_of_a_duplicate_counts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
    ) -> None:
        monkeypatch.setattr(reader, "_CHUNK", 64)
        tensor = torch.randint(0, 255, (1000,), dtype=torch.uint8)
        files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
        save_file({"w": tensor}, files[0])
        save_file({"first": torch.ones(7), "w": tensor}, files[1])
        assert open_files(files).keys() == {"w", "first"}
        tensor[at] += 1
        save_file({"first": torch.ones(7), "w": tensor}, files[1])
        with pytest.raises(ValueError, match="different bytes"):
            open_files(files)

    def test_duplicates_alone_are_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[str] = []
        digest = reader._digest

        def note_and_digest(source: TensorSource) -> bytes:
            read.append(source.name)
            return digest(source)

        monkeypatch.setattr(reader, "_digest", note_and_digest)
        files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
        for file in files:
            save_file({"w": torch.ones(2), file.stem: torch.ones(9)}, file)
        open_files(files)
        assert read == ["w", "w"]

    def test_a_duplicate_that_is_replaced_before_it_is_compared(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = [tmp_path / f"{name}.safetensors" for name in "abc"]
        for file in files:
            save_file({"w": torch.ones(2)}, file)
        check = reader._check_equal

        def replace_then_check(*args: Any) -> None:
            os.replace(files[2], files[0])
            check(*args)

        monkeypatch.setattr(reader, "_check_equal", replace_then_check)
        with pytest.raises(ValueError, match=r"a\.safetensors was replaced by another file"):
            open_files(files[:2])

    def test_no_file_stays_open(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        save_file({"w": torch.ones(2)}, path)
        before = os.listdir("/proc/self/fd")
        open_files([path])
        os.truncate(path, 20)
        with pytest.raises(ValueError, match="truncated"):
            open_files([path])
        assert os.listdir("/proc/self/fd") == before


class TestNpy:
    @pytest.mark.parametrize("dim", [0, 1, 2, -2])
    def test_shards_are_concatenated_in_rank_order(self, tmp_path: Path, dim: int) -> None:
        whole = {"w": torch.randn(4, 6, 4), "bf16": torch.randn(2, 2, 8).bfloat16()}
        shards = {name: torch.chunk(tensor, 2, dim) for name, tensor in whole.items()}
        files = [
            write_npy(tmp_path / f"m.tp.{r}.npy", {n: (s[r], dim) for n, s in shards.items()})
            for r in (1, 0)
        ]
        sources = open_files(files)
        for name, tensor in whole.items():
            assert torch.equal(read(sources[name]), tensor)

    def test_uneven_shards(self, tmp_path: Path) -> None:
        parts = [torch.randn(2, 3), torch.randn(2, 1)]
        files = [write_npy(tmp_path / f"m.tp.{r}.npy", {"w": (parts[r], 1)}) for r in (0, 1)]
        assert torch.equal(read(open_files(files)["w"]), torch.cat(parts, 1))

    def test_replicated_takes_the_lowest_rank(self, tmp_path: Path) -> None:
        files = [
            write_npy(tmp_path / f"m.tp.{r}.npy", {"w": (torch.full((2,), float(r)), -1)})
            for r in (2, 0, 1)
        ]
        assert read(open_files(files)["w"]).tolist() == [0, 0]

    def test_dtypes_and_scalars_without_a_rank(self, tmp_path: Path) -> None:
        tensors = {
            "half": torch.randn(3).half(),
            "fp8": torch.randn(4).to(torch.float8_e4m3fn),
            "bool": torch.tensor([True, False]),
            "c64": torch.randn(3, dtype=torch.complex64),
            "scalar": torch.tensor(2.5),
        }
        path = write_npy(tmp_path / "model.npy", {n: (t, -1) for n, t in tensors.items()})
        sources = open_files([path])
        for name, tensor in tensors.items():
            assert read(sources[name]).tolist() == tensor.tolist()

    def test_files_of_their_own_need_no_shards_of_others(self, tmp_path: Path) -> None:
        files = [write_npy(tmp_path / f"m.tp.{r}.npy", {"w": (torch.ones(2), 0)}) for r in (0, 1)]
        files.append(write_npy(tmp_path / "extra.npy", {"z": (torch.ones(2), 0)}))
        sources = open_files(files)
        assert (sources["w"].shape, sources["z"].shape) == ((4,), (2,))

    def test_warns_once(self, tmp_path: Path) -> None:
        files = [write_npy(tmp_path / f"m.tp.{r}.npy", {"w": (torch.ones(2), 0)}) for r in (0, 1)]
        with warnings() as warned:
            open_files(files)
        assert warned.getvalue().count("deprecated") == 1

    @pytest.mark.parametrize("ranks", [(1, 2), (0, 2), (1,)])
    def test_missing_rank(self, tmp_path: Path, ranks: tuple[int, ...]) -> None:
        files = [write_npy(tmp_path / f"m.tp.{r}.npy", {"w": (torch.ones(2), 0)}) for r in ranks]
        with pytest.raises(ValueError, match=r"'w': the shards of .* missing.*m\.tp\.\d\.npy"):
            open_files(files)

    def test_shard_missing_in_the_last_file(self, tmp_path: Path) -> None:
        ones = (torch.ones(2), 0)
        files = [
            write_npy(tmp_path / "m.tp.0.npy", {"w": ones, "z": ones}),
            write_npy(tmp_path / "m.tp.1.npy", {"w": ones}),
        ]
        with pytest.raises(ValueError, match=r"'z': the shards of tensor-parallel ranks \[1\]"):
            open_files(files)

    @pytest.mark.parametrize(
        ("first", "second", "says"),
        [
            ((torch.ones(2), 0), (torch.ones(2).half(), 0), "dtype torch.float32 in .*but .*16"),
            ((torch.ones(2), 0), (torch.ones(2), -1), "concat_dim 0 in .*but -1 in"),
            ((torch.ones(2, 2), 0), (torch.ones(2, 3), 0), "shape .*in .*but .*in"),
            ((torch.ones(2), -1), (torch.ones(3), -1), "shape .*in .*but .*in"),
            ((torch.ones(2), 1), (torch.ones(2), 1), "has no dimension 1"),
        ],
    )
    def test_shards_that_do_not_match(
        self, tmp_path: Path, first: Any, second: Any, says: str
    ) -> None:
        files = [
            write_npy(tmp_path / f"m.tp.{r}.npy", {"w": shard})
            for r, shard in enumerate((first, second))
        ]
        with pytest.raises(ValueError, match=says) as caught:
            open_files(files)
        assert "'w'" in str(caught.value)
        assert files[0] in str(caught.value)

    def test_duplicates(self, tmp_path: Path) -> None:
        ones = {"w": (torch.ones(2), 0)}
        files = [write_npy(tmp_path / f"{n}.tp.0.npy", ones) for n in ("a", "b")]
        with pytest.raises(ValueError, match=r"'w' of tensor-parallel rank 0 is in .*a\.tp\.0"):
            open_files(files)
        save_file({"w": torch.zeros(2)}, tmp_path / "c.safetensors")
        with pytest.raises(ValueError, match="'w' is in both"):
            open_files([files[0], tmp_path / "c.safetensors"])

    def test_shards_with_the_bytes_of_a_whole_tensor(self, tmp_path: Path) -> None:
        whole = torch.randn(4, 6)
        parts = torch.chunk(whole, 2, 1)
        files = [write_npy(tmp_path / f"m.tp.{r}.npy", {"w": (parts[r], 1)}) for r in (0, 1)]
        path = tmp_path / "whole.safetensors"
        save_file({"w": whole}, path)
        assert open_files([path, *files]).keys() == {"w"}
        save_file({"w": whole.flip(1)}, path)
        with pytest.raises(ValueError, match="different bytes"):
            open_files([path, *files])

    def test_rank_that_is_no_number(self, tmp_path: Path) -> None:
        path = write_npy(tmp_path / "a.b.c.d.npy", {"w": (torch.ones(2), 0)})
        with pytest.raises(ValueError, match=r"a\.b\.c\.d\.npy: the third .* not 'c'"):
            open_files([path])

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"shape": (3,)}, "'w' takes 12 bytes, its array has 8"),
            ({"shape": (-2,)}, "'w' has the impossible shape"),
            ({"dtype": "torch.float32"}, "'w' has dtype 'torch.float32'"),
            ({"tp_concat_dim": "0"}, "'w' has tp_concat_dim '0'"),
            ({"key": ""}, "key is a non-empty string"),
            ({"more": 1}, "an entry should have"),
        ],
    )
    def test_meta_that_lies(self, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
        path = write_npy(tmp_path / "a.npy", {"w": (torch.ones(2), 0)}, **changes)
        with pytest.raises(ValueError, match=says) as caught:
            open_files([path])
        assert path in str(caught.value)

    @pytest.mark.parametrize(
        ("array", "says"),
        [
            (np.asfortranarray(np.ones((2, 3), np.float32)), "in Fortran order"),
            (np.ones((2, 3), ">f4"), "only native numbers"),
            (np.array([None] * 6), "only native numbers"),
        ],
    )
    def test_arrays_that_cannot_be_read_in_place(
        self, tmp_path: Path, array: np.ndarray[Any, Any], says: str
    ) -> None:
        path = Path(write_npy(tmp_path / "a.npy", {"w": (torch.ones(2, 3), 0)}))
        np.save(path, array, allow_pickle=True)
        with pytest.raises(ValueError, match=f"'w'.*{says}"):
            open_files([path])

    @pytest.mark.parametrize("length", [0, 5, 60, 130])
    def test_truncated(self, tmp_path: Path, length: int) -> None:
        path = write_npy(tmp_path / "a.npy", {"w": (torch.ones(2), 0)})
        os.truncate(path, length)
        with pytest.raises(ValueError, match=r"a\.npy: .*'w'"):
            open_files([path])

    def test_more_arrays_than_metas(self, tmp_path: Path) -> None:
        path = write_npy(tmp_path / "a.npy", {"w": (torch.ones(2), 0)})
        with open(path, "ab") as file:
            np.save(file, np.ones(3))
        with pytest.raises(ValueError, match=r"a\.npy: .* bytes behind the 1 arrays"):
            open_files([path])

    def test_missing_meta(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.ones(3))
        with pytest.raises(MissingFileError, match=r"a\.npy\.meta does not exist"):
            open_files([tmp_path / "a.npy"])


class Evil:
    def __init__(self, *call: Any) -> None:
        self._call = call

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call[0], self._call[1:]


class TestRestrictedUnpickler:
    @pytest.mark.parametrize(
        "evil",
        [
            Evil(os.system, "touch {}"),
            Evil(eval, "open('{}', 'w')"),
            Evil(torch.load, "{}"),
            Evil(torch.Tensor, 10**12),
            Evil(np.ndarray, 10**12),
            Evil(torch.zeros, 3),
        ],
    )
    def test_refuses_calls(self, tmp_path: Path, evil: Evil) -> None:
        trace = tmp_path / "trace"
        evil._call = (evil._call[0], *(str(a).format(trace) for a in evil._call[1:]))
        np.save(tmp_path / "a.npy", np.ones(3))
        (tmp_path / "a.npy.meta").write_bytes(pickle.dumps([evil]))
        with pytest.raises(ValueError, match=r"a\.npy\.meta: cannot be unpickled"):
            open_files([tmp_path / "a.npy"])
        assert not trace.exists()

    @pytest.mark.parametrize("data", [b"", b"junk", pickle.dumps({"a": 1}), pickle.dumps([1])])
    def test_refuses_anything_else(self, tmp_path: Path, data: bytes) -> None:
        np.save(tmp_path / "a.npy", np.ones(3))
        (tmp_path / "a.npy.meta").write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.npy\.meta: "):
            open_files([tmp_path / "a.npy"])

    def test_knows_numpy_arrays_as_a_type(self, tmp_path: Path) -> None:
        path = write_npy(tmp_path / "a.npy", {"w": (torch.ones(2), 0)}, type=np.ndarray)
        assert open_files([path])["w"].shape == (2,)


def fake_tensor() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3)


class TestTensorSources:
    def test_tensors_of_any_form(self) -> None:
        tensors = {
            "parameter": torch.nn.Parameter(torch.ones(2)),
            "requires_grad": torch.ones(2, requires_grad=True) * 2,
            "transposed": torch.ones(2, 3).t(),
            "expanded": torch.ones(1, 3).expand(2, 3),
            "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
            "scalar": torch.tensor(1),
            "empty": torch.empty(0, 3),
        }
        sources = tensor_sources(tensors)
        for name, tensor in tensors.items():
            source = sources[name]
            assert (source.name, source.dtype, source.shape) == (name, tensor.dtype, tensor.shape)
            assert isinstance(source.data, torch.Tensor)
            assert not source.data.requires_grad
            assert source.data.data_ptr() == tensor.data_ptr()

    @pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")
    @pytest.mark.parametrize(
        ("value", "says"),
        [
            ([1, 2], "it is a list"),
            (np.ones(3), "it is a ndarray"),
            (torch.empty(3, device="meta"), "meta device"),
            (torch.eye(3).to_sparse(), "not dense"),
            (torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), "not dense"),
            (fake_tensor(), "no memory of its own"),
        ],
    )
    def test_values_without_bytes(self, value: Any, says: str) -> None:
        with pytest.raises(ValueError, match=f"'w' cannot be registered: .*{says}"):
            tensor_sources({"w": value})

    @pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:UserWarning")
    def test_quantized(self) -> None:
        value = torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)
        with pytest.raises(ValueError, match="'w' cannot be registered: it is quantized"):
            tensor_sources({"w": value})

    @pytest.mark.parametrize("name", ["", 3, None])
    def test_names(self, name: Any) -> None:
        with pytest.raises(ValueError, match="name is a non-empty string"):
            tensor_sources({name: torch.ones(2)})
