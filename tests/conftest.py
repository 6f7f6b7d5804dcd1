"""What all tests share."""

from __future__ import annotations

import fcntl
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
LONG_FILES = [
    f"test_{name}.py"
    for name in (
        "docs",
        "mini_engine",
        "verl",
        "hosts",
        "certify",
        "p2p_store",
        "shard_hosts",
        "join_example",
        "service",
        "update",
        "access",
        "clients",
        "weights_group",
        "p2p",
        "sglang",
        "vllm_releases",
        "control",
        "ray_example",
        "cli",
        "trace",
        "shard",
        "instances",
        "kubernetes",
        "cancel",
        "agreement",
        "foreign",
        "pin_memory",
        "owners",
        "packaging",
        "observe",
        "replay",
        "fuzz",
        "peers",
        "benchmarks",
        "checksum",
        "patches",
        "plan",
        "parts",
        "authenticator",
        "worker",
        "wire",
    )
]
"""Those whose tests take ten seconds or more together. They begin first, so that no process has a
long one left when there is nothing else to do."""
os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"  # torch's store looks up who connects


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """With pytest-xdist, tests marked ``alone`` wait until no other test runs, before their time
    begins. Who has the turn waits next, so that none waits for ever."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    with Path(__file__).open() as running, (HERE / "torchrun.py").open() as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(running, fcntl.LOCK_UN)  # also where a forked process has the file open


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish() -> None:
    """What torch and the tests' modules have made lives to the end: a collection, of which a test
    makes one, need not walk through it."""
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def torchrun_logs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """torchrun makes a folder for its logs and leaves it: let it be among the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PET_LOG_DIR", str(tmp_path_factory.mktemp("torchrun")))
        yield
