from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loguru import logger
from safetensors.torch import save_file

from checkpoint_engine.memory.files import open_files, view_tensors
from checkpoint_engine.memory.sources import FileParts, FileSlice, TensorSource


def load_example() -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / "update.py"
    spec = importlib.util.spec_from_file_location("update_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


update = load_example()


def test_defaults() -> None:
    args = update.parse_args(["--checkpoint-path", "/models/x"])
    assert vars(args) == {
        "checkpoint_path": Path("/models/x"),
        "save_metas_file": None,
        "load_metas_file": None,
        "metas_url": None,
        "sleep_time": 0,
        "endpoint": "http://localhost:19730",
        "engine_kind": "vllm",
        "inference_parallel_size": 8,
        "checkpoint_name": "my-checkpoint-iter-0",
        "update_method": "broadcast",
        "uds": None,
        "custom_dist": None,
        "ready_timeout": 300,
    }


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--load-metas-file=b", "--metas-url=http://c"],
        ["--checkpoint-path=a", "--inference-parallel-size=0"],
        ["--checkpoint-path=a", "--update-method=magic"],
    ],
)
def test_arguments_that_contradict_each_other_are_refused(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        update.parse_args(argv)
    assert raised.value.code == 2
    assert "error: " in capsys.readouterr().err


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 50), max_size=40), world_size=st.integers(1, 9))
def test_ranks_share_the_tensors_by_bytes(sizes: list[int], world_size: int) -> None:
    sources = []
    for i, size in enumerate(sizes):
        part = FileParts((FileSlice(f"model-{i // 5}.safetensors", i, size),))
        sources.append(TensorSource(f"t{i}", torch.uint8, torch.Size([size]), part))
    shares = [update.split_by_bytes(sources, rank, world_size) for rank in range(world_size)]
    assert [source for share in shares for source in share] == sources
    most = max(sum(source.nbytes for source in share) for share in shares)
    assert most <= sum(sizes) / world_size + max(sizes, default=0)


TENSORS = {
    "lm_head": torch.arange(40, dtype=torch.float32),
    **{f"layers.{i}.w": torch.full((3, i), i, dtype=torch.bfloat16) for i in range(12)},
    "scale": torch.tensor(2.5),
}


INDEX = "model.safetensors.index.json"


def write_checkpoint(folder: Path, extra: bool = False) -> None:
    """Three files and their index; ``extra`` adds tensors and a file that the index leaves out."""
    names = list(TENSORS)
    files = {f"model-0000{i}.safetensors": names[i * 5 : i * 5 + 5] for i in range(3)}
    for file, held in files.items():
        tensors = {name: TENSORS[name] for name in held}
        if extra and file.endswith("1.safetensors"):
            tensors |= {"not.listed": torch.ones(2), "lm_head": torch.ones(3)}
        save_file(tensors, folder / file)
    if extra:
        save_file({"scale": torch.ones(3)}, folder / "consolidated.safetensors")
    weight_map = {name: file for file, held in files.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load(files: list[str], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What ``register_checkpoint`` takes from them."""
    return tensors | view_tensors(open_files(files).values())


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("extra", [False, True])
def test_an_indexed_checkpoint_is_loaded_once_over_all_ranks(
    tmp_path: Path, world_size: int, extra: bool
) -> None:
    write_checkpoint(tmp_path, extra)
    found: dict[str, torch.Tensor] = {}
    for rank in range(world_size):
        files, tensors, nbytes = update.load_share(tmp_path, rank, world_size)
        part = load(files, tensors)
        assert nbytes == sum(tensor.nbytes for tensor in part.values())
        assert found.keys().isdisjoint(part)
        found |= part
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_one_rank_reads_whole_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, extra=True)
    files, tensors, _ = update.load_share(tmp_path, 0, 1)
    assert files == [
        str(tmp_path / name) for name in (INDEX, *(f"model-0000{i}.safetensors" for i in range(3)))
    ]
    assert tensors == {}


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_without_an_index_the_files_are_shared(tmp_path: Path, world_size: int) -> None:
    for i in range(3):
        save_file({f"t{i}": torch.tensor([i])}, tmp_path / f"{i}.safetensors")
    shares = [update.load_share(tmp_path, rank, world_size)[0] for rank in range(world_size)]
    assert [f for share in shares for f in share] == [
        str(tmp_path / f"{i}.safetensors") for i in range(3)
    ]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not an index"),
        ("[]", "is not an index"),
        ('{"weight_map": {"gone": "model-00000.safetensors"}}', "tensor 'gone' is not in"),
        ('{"weight_map": {"a": "no.safetensors"}}', r"no\.safetensors"),
    ],
)
def test_a_wrong_index_is_named(tmp_path: Path, index: str, message: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(ValueError, match=message) as raised:
        update.load_share(tmp_path, 0, 1)
    assert str(tmp_path) in str(raised.value)


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} holds no"):
        update.load_share(tmp_path, 0, 1)
    with pytest.raises(ValueError, match="there is no such folder"):
        update.load_share(tmp_path / "none", 0, 1)


def test_metas_are_written_whole_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metas.json"
    update.write_atomically(path, b"{}")
    assert [file.name for file in tmp_path.iterdir()] == ["metas.json"]
    args: Any = update.parse_args([f"--load-metas-file={path}"])
    assert update.read_metas(args) == {}
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=f"{path}: not the metas"):
        update.read_metas(args)


def test_metas_count_where_there_is_a_path_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the original's example."""
    done: list[str] = []
    for call in ("send", "join"):
        monkeypatch.setattr(update.Job, call, lambda job, call=call: done.append(call))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("PS_DEVICE", "cpu")
    monkeypatch.setenv("PS_P2P", "off")
    for more in ([], ["--load-metas-file=b"], ["--metas-url=http://c"]):
        monkeypatch.setattr("sys.argv", ["update.py", "--checkpoint-path=a", *more])
        update.main()
    assert done == ["send", "join", "join"]


def test_without_torchrun_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("sys.argv", ["update.py", "--checkpoint-path=a"])
    with pytest.raises(
        SystemExit, match=r"RANK and WORLD_SIZE not set.*torchrun --nproc-per-node 8"
    ):
        update.main()


def test_what_scripts_read_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    """The original's lines, on every rank."""
    logged: list[str] = []
    sink = logger.add(lambda line: logged.append(line.record["message"]))
    try:
        job: Any = SimpleNamespace(rank=1, phase=update.Job.phase)
        with update.Job.phase(job, "gather", "Gather metas"):
            pass
    finally:
        logger.remove(sink)
    assert [re.sub(r"[0-9.]+", "N", line) for line in logged] == [
        "Gather metas duration: N seconds"
    ]
    assert capsys.readouterr().out == ""
