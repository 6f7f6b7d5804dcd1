"""Which files and tensors a folder's checkpoint consists of: by its index, where it has one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from checkpoint_engine.errors import AccessError
from checkpoint_engine.memory.files import open_files, view_tensors
from checkpoint_engine.memory.folder import (
    MissingFileError,
    checkpoint_of,
    expand_folders,
    read_index,
    split_over_ranks,
)

INDEX = "model.safetensors.index.json"
FILES = {
    "model-1.safetensors": {"a": torch.arange(3), "b": torch.ones(2)},
    "model-2.safetensors": {"c": torch.zeros(4)},
}
TENSORS = {name: tensor for held in FILES.values() for name, tensor in held.items()}
WEIGHT_MAP = {name: file for file, held in FILES.items() for name in held}


def write_index(folder: Path, weight_map: Mapping[str, Any] = WEIGHT_MAP, name: str = INDEX) -> str:
    path = folder / name
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    path.mkdir()
    for file, held in FILES.items():
        save_file(held, path / file)
    write_index(path)
    return path


def holds(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def loaded(*files: str | Path) -> dict[str, torch.Tensor]:
    return view_tensors(open_files(files).values())


# ---------------------------------------------------------------------- with an index


def test_files_that_the_index_does_not_name_are_left_out(folder: Path) -> None:
    save_file({"a": torch.zeros(99)}, folder / "consolidated.safetensors")
    save_file({"b": torch.zeros(99)}, folder / "model-0.safetensors")
    assert checkpoint_of(folder) == [str(folder / name) for name in (INDEX, *FILES)]
    assert holds(loaded(folder), TENSORS)


def test_tensors_that_the_index_does_not_assign_to_their_file_are_left_out(folder: Path) -> None:
    stale = {"a": torch.full((5,), 9.0), "of no index": torch.ones(1)}
    save_file(FILES["model-2.safetensors"] | stale, folder / "model-2.safetensors")
    assert holds(loaded(folder), TENSORS)
    assert loaded(folder / "model-2.safetensors").keys() == {"c", *stale}


def test_an_index_among_files_selects_their_tensors(folder: Path) -> None:
    second = folder / "model-2.safetensors"
    save_file(FILES["model-2.safetensors"] | {"a": torch.ones(5)}, second)
    os.symlink(folder, folder.parent / "link")
    index = folder / INDEX
    for path in (
        second,
        folder / ".." / "link" / second.name,
        folder.parent / "link" / second.name,
    ):
        assert holds(loaded(index, path), FILES["model-2.safetensors"])
    with pytest.raises(ValueError, match="comes without the files that it names"):
        open_files([index])
    other = write_index(folder, {"a": second.name}, "other.safetensors.index.json")
    with pytest.raises(ValueError, match=rf"model-2.safetensors is in both .*{INDEX} and {other}"):
        open_files([index, second, other])


def test_links_to_files_elsewhere_are_files_of_the_folder(folder: Path) -> None:
    """As in the cache of Hugging Face."""
    snapshot = folder.parent / "snapshot"
    snapshot.mkdir()
    for name in (INDEX, *FILES):
        (snapshot / name).symlink_to(folder / name)
    assert holds(loaded(snapshot), TENSORS)


def test_files_in_folders_below_the_index(folder: Path) -> None:
    (folder / "below").mkdir()
    save_file({"d": torch.ones(1)}, folder / "below" / "x.safetensors")
    write_index(folder, {"d": "./below/x.safetensors", "c": "below/../model-2.safetensors"})
    assert holds(loaded(folder), {"d": torch.ones(1), "c": TENSORS["c"]})


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(MissingFileError, match=rf"{INDEX} names .*model-2\.safetensors, which"):
        checkpoint_of(folder)


def test_a_tensor_that_is_not_in_its_file_is_named(folder: Path) -> None:
    write_index(folder, WEIGHT_MAP | {"c": "model-1.safetensors"})
    with pytest.raises(ValueError, match=rf"'c' is not in .*model-1\.safetensors, to .*{INDEX}"):
        open_files([folder])


def test_the_usual_index_counts_where_there_are_several(folder: Path) -> None:
    others = ["x.safetensors.index.json", "y.safetensors.index.json"]
    for name in others:
        write_index(folder, {}, name)
    assert holds(loaded(folder), TENSORS)
    (folder / INDEX).unlink()
    with pytest.raises(ValueError, match=f"{folder} has 2 indexes .{', '.join(others)}. and none"):
        checkpoint_of(folder)
    (folder / others[0]).unlink()
    write_index(folder, WEIGHT_MAP, others[1])
    assert holds(loaded(folder), TENSORS)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("../x.safetensors", "outside the index's folder"),
        ("below/../../x.safetensors", "outside the index's folder"),
        ("/tmp/x.safetensors", "outside the index's folder"),
        ("..", "no safetensors file"),
        ("", "no safetensors file"),
        ("model.bin", "no safetensors file"),
        ("a\0.safetensors", "no safetensors file"),
        (["a.safetensors"], "no safetensors file"),
        (None, "no safetensors file"),
    ],
)
def test_an_index_names_files_of_its_folder_alone(folder: Path, entry: Any, says: str) -> None:
    index = write_index(folder, WEIGHT_MAP | {"d": entry})
    save_file({"d": torch.ones(1)}, folder.parent / "x.safetensors")
    with pytest.raises(ValueError, match=f"{index}: tensor 'd' .*{says}"):
        open_files([folder])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not an index"),
        ("[]", "is not an index"),
        ("{}", "is not an index"),
        ('{"weight_map": 3}', "is not an index"),
        ("[" * 100_000, "is not an index"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' is in it twice"),
        ('{"weight_map": {}}', "assigns no tensor"),
    ],
)
def test_a_malformed_index_is_named(folder: Path, text: str, says: str) -> None:
    (folder / INDEX).write_text(text)
    with pytest.raises(ValueError, match=says) as raised:
        checkpoint_of(folder)
    assert str(folder / INDEX) in str(raised.value)


def test_an_index_that_is_no_file(folder: Path) -> None:
    (folder / INDEX).unlink()
    os.mkfifo(folder / INDEX)
    with pytest.raises(ValueError, match="no regular file"):
        checkpoint_of(folder)


# ---------------------------------------------------------------------- without an index


def test_without_an_index_all_files_count(folder: Path) -> None:
    (folder / INDEX).unlink()
    np.save(folder / "ignored.npy", np.ones(3))
    assert checkpoint_of(folder) == [str(folder / name) for name in FILES]
    assert holds(loaded(folder), TENSORS)


def test_npy_files_count_where_there_are_no_safetensors(tmp_path: Path) -> None:
    for name in ("b.npy", "a.npy", "a.npy.meta", "config.json"):
        (tmp_path / name).touch()
    assert checkpoint_of(tmp_path) == [str(tmp_path / name) for name in ("a.npy", "b.npy")]


def test_what_is_no_folder_with_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path} holds no \*\.safetensors"):
        checkpoint_of(tmp_path)
    with pytest.raises(MissingFileError, match=f"{tmp_path}/none: .* there is no such folder"):
        checkpoint_of(tmp_path / "none")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ValueError, match=r"weights\.bin: not a checkpoint file"):
        checkpoint_of(tmp_path / "weights.bin")


def test_folders_and_files_may_be_mixed(folder: Path) -> None:
    more = folder / "more.safetensors"
    save_file({"d": torch.ones(1)}, more)
    assert expand_folders([more, folder]) == [str(more), *checkpoint_of(folder)]
    assert holds(loaded(more, folder), TENSORS | {"d": torch.ones(1)})


# ---------------------------------------------------------------------- sharing


def test_ranks_get_the_indexes_of_their_files_alone(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    save_file({"x": torch.ones(1), "y": torch.ones(1)}, other / "o.safetensors")
    write_index(other, {"x": "o.safetensors"})
    shares = split_over_ranks(expand_folders([folder, other]), 4)
    first, second, last = (
        [str(folder / INDEX), str(folder / "model-1.safetensors")],
        [str(folder / INDEX), str(folder / "model-2.safetensors")],
        [str(other / INDEX), str(other / "o.safetensors")],
    )
    assert shares == [[], first, second, last]
    assert loaded(*last).keys() == {"x"}


@settings(deadline=None)
@given(count=st.integers(0, 30), world_size=st.integers(1, 9))
def test_ranks_share_all_files_in_their_order(count: int, world_size: int) -> None:
    files = [f"/m/{number}.safetensors" for number in range(count)]
    shares = split_over_ranks(files, world_size)
    assert [file for share in shares for file in share] == files
    assert len(shares) == world_size
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_rank_gets_all_npy_files() -> None:
    """Each holds a shard of the same tensors."""
    files = ["/m/x.tp.0.npy", "/m/x.tp.1.npy", "/m/a.safetensors"]
    assert split_over_ranks(files, 2) == [["/m/a.safetensors"], files[:2]]


# ---------------------------------------------------------------------- folders that are allowed


def test_only_allowed_folders_are_read(folder: Path, tmp_path: Path) -> None:
    allowed = (os.path.realpath(folder),)
    assert open_files([folder], allowed).keys() == TENSORS.keys()
    outside = tmp_path / "checkpoint-not"
    outside.mkdir()
    save_file({"d": torch.ones(1)}, outside / "x.safetensors")
    write_index(outside, {"d": "x.safetensors"})
    (folder / "link").symlink_to(outside)
    for path in (outside, tmp_path / "none", folder / "link", folder / "..", "/proc/self"):
        with pytest.raises(AccessError, match="does not lie in a folder"):
            open_files([path], allowed)


@pytest.mark.parametrize("linked", [INDEX, "model-2.safetensors"])
def test_links_of_an_allowed_folder_must_not_lead_outside(
    folder: Path, tmp_path: Path, linked: str
) -> None:
    (folder / linked).rename(tmp_path / linked)
    (folder / linked).symlink_to(tmp_path / linked)
    with pytest.raises(AccessError, match=linked):
        open_files([folder], (os.path.realpath(folder),))


def test_an_index_outside_is_not_read(folder: Path) -> None:
    allowed = (os.path.realpath(folder / ".." / "other"),)
    with pytest.raises(AccessError, match=INDEX):
        read_index(str(folder / INDEX), allowed)
