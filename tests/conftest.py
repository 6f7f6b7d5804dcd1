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


def pytest_collection_finish() -> None:
    """All that is imported, and the tests themselves, live to the end: let the garbage collector no
    longer look at them. To learn a loader is to collect four times, each a tenth of a second."""
    gc.collect()
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
