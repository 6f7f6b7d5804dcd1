"""Every code block of README.md and docs/ is run, page by page, but for those in ``EXCEPTED``.

A page's Python blocks share one namespace; one with a title is written to that file instead, for
the shell blocks that follow. Links between files are followed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from loguru import logger

from torchrun import free_port_pair

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])

ENGINE = "needs vLLM with a model, on GPUs"
CLUSTER = "needs several GPUs, and a checkpoint"
MACHINE = "needs a service at this place"
INSTALLS = "installs, or is CI itself"
EXCEPTED = {
    ("README.md", "pip install vllm"): INSTALLS,
    ("README.md", "VLLM_SERVER_DEV_MODE=1 vllm serve"): ENGINE,
    ("README.md", "torchrun --nproc-per-node 1 examples/update.py"): ENGINE,
    ("README.md", "curl http://localhost:19730/weight_info"): ENGINE,
    ("README.md", "make demo"): INSTALLS,
    ("README.md", "pip install ."): INSTALLS,
    ("README.md", "# the running world writes down"): CLUSTER,
    ("README.md", "checkpoint-engine doctor"): "needs a model and a checkpoint",
    ("README.md", "mkdir -p ~/ps"): CLUSTER,
    ("README.md", "export PS_SERVERS="): CLUSTER,
    ("vllm.md", "VLLM_SERVER_DEV_MODE=1 vllm serve"): ENGINE,
    ("vllm.md", "torchrun --nproc-per-node 8"): CLUSTER,
    ("vllm.md", "curl http://localhost:19730/collective_rpc"): ENGINE,
    ("sglang.md", "pip install sglang"): INSTALLS,
    ("sglang.md", "python -m sglang.launch_server"): "needs SGLang with a model, on GPUs",
    ("sglang.md", "torchrun --nproc-per-node 2 update_sglang.py"): "the same",
    ("plugins.md", "VLLM_SERVER_DEV_MODE=1 vllm serve"): ENGINE,
    ("plugins.md", "torchrun --nproc-per-node 1"): ENGINE,
    ("plugins.md", "export PS_ENGINE_TOKEN"): ENGINE,
    ("plugins.md", "PS_METAS_URL="): ENGINE,
    ("certify.md", "checkpoint-engine certify /models"): ENGINE,
    ("join.md", "# the running world writes down"): CLUSTER,
    ("join.md", "# the new one reads"): CLUSTER,
    ("multi-node.md", "torchrun --nnodes 4"): CLUSTER,
    ("multi-node.md", "checkpoint-engine plan /path"): "needs a checkpoint",
    ("containers.md", "torchrun --nproc-per-node 8"): CLUSTER,
    ("containers.md", "export PS_HTTP_TOKEN"): CLUSTER,
    ("observe.md", "checkpoint-engine doctor"): "needs a checkpoint",
    ("observe.md", "ssh -L"): MACHINE,
    ("observe.md", "curl --unix-socket"): MACHINE,
}


@dataclass(frozen=True)
class Block:
    language: str
    title: str
    code: str

    @property
    def first_line(self) -> str:
        return self.code.strip().partition("\n")[0]


def blocks_of(page: Path) -> list[Block]:
    """Fenced blocks of a language; in README.md indented ones too, which are for a shell."""
    text = page.read_text()
    fence = re.compile(r"^```(\w+)(?: title=\"([^\"]*)\")?\n(.*?)^```$", re.M | re.S)
    found = [(one.start(), Block(one[1], one[2] or "", one[3])) for one in fence.finditer(text)]
    if page.name == "README.md":
        rest = fence.sub(lambda one: " \n" * one[0].count("\n"), text)
        for one in re.finditer(r"(?:^    .*\n(?:\n(?=    ))?)+", rest, re.M):
            found.append((len(found) * 10**6, Block("bash", "", one[0].replace("\n    ", "\n"))))
    return [block for _, block in sorted(found, key=lambda each: each[0])]


def excepted(page: Path, block: Block) -> bool:
    return any(page.name == name and block.first_line.startswith(start) for name, start in EXCEPTED)


class Reader:
    """Does what a page says, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port_pair()
        self._sessions: list[int] = []
        self._names: dict[str, object] = {"__name__": "page"}
        bin_folder = folder / ".bin"
        bin_folder.mkdir()
        self._script(bin_folder / "checkpoint-engine", "from checkpoint_engine.cli import main")
        self._script(
            bin_folder / "torchrun",
            "from torch.distributed.run import main",
            f"--master-port={free_port_pair()}",
        )
        python = bin_folder / "python"  # a link would not find the packages of its environment
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        (folder / "examples").symlink_to(ROOT / "examples")
        self._environment = {
            **os.environ,
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PS_DEVICE": "cpu",
            "PS_IPC_DIR": str(folder),
            "OMP_NUM_THREADS": "1",
        }

    @staticmethod
    def _script(path: Path, statement: str, *arguments: str) -> None:
        lines = [f"#!{sys.executable}", "import sys", statement]
        lines += ['if __name__ == "__main__":']  # as pip writes it: processes may be spawned
        lines += [f"    sys.argv[1:1] = {list(arguments)!r}", "    main()"]
        path.write_text("\n".join(lines) + "\n")
        path.chmod(0o755)

    def run(self, block: Block) -> None:
        code = block.code.replace("19730", str(self._port))
        if block.title:
            (self._folder / block.title).write_text(code)
        elif block.language == "python":
            exec(compile(code, block.first_line, "exec"), self._names)
        else:
            assert block.language == "bash", block
            self._run_shell(code)

    def _run_shell(self, code: str) -> None:
        with open(self._folder / "output.txt", "w+") as output:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", code],
                cwd=self._folder,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._sessions.append(process.pid)
            status = process.wait(timeout=100)
            output.seek(0)
            assert status == 0, f"{code}\n{output.read()}"

    def close(self) -> None:
        """End what was left running in the background."""
        for session in self._sessions:
            try:
                os.killpg(session, signal.SIGTERM)
            except ProcessLookupError:
                continue


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("PS_DEVICE", "cpu")
    made = Reader(tmp_path)
    for variable in ("RANK", "WORLD_SIZE"):
        made._environment.pop(variable)
    yield made
    made.close()
    logger.disable("checkpoint_engine.ground.details")  # which a page switches on


@pytest.mark.timeout(180)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks(page: Path, reader: Reader) -> None:
    for block in blocks_of(page):
        if not excepted(page, block):
            reader.run(block)


def test_every_exception_is_of_a_block_that_there_is() -> None:
    found = {(page.name, block.first_line) for page in PAGES for block in blocks_of(page)}
    for name, start in EXCEPTED:
        assert any(page == name and line.startswith(start) for page, line in found), (name, start)


def test_blocks_are_found() -> None:
    assert len(blocks_of(ROOT / "docs" / "tutorial.md")) >= 9
    assert len(blocks_of(ROOT / "README.md")) >= 10


def test_no_block_is_written_in_another_way() -> None:
    """Plain fences hold what a program prints."""
    for page in PAGES:
        opened = re.findall(r"^\s*(?:```|~~~)[ \t]*\S.*", page.read_text(), re.M)
        known = re.findall(r"^```\w+(?: title=\"[^\"]*\")?$", page.read_text(), re.M)
        assert len(opened) == len(known), page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            slugs = [re.sub(r"[^\w]+", "-", heading.lower()).strip("-") for heading in headings]
            assert anchor in slugs, target


def test_files_that_the_text_names_are_there() -> None:
    for page in PAGES:
        for name in re.findall(
            r"`((?:examples|benchmarks|tests|patches|docs)/[\w./-]+)`", page.read_text()
        ):
            assert (ROOT / name).exists(), f"{page.name} names {name}"
