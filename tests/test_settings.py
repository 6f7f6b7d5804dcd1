"""The environment variables: what each may be, and what an error says of one that is not."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from checkpoint_engine import settings
from checkpoint_engine.settings import Variable

PACKAGE = Path(settings.__file__).parent
VARIABLES = {one.name: one for one in vars(settings).values() if isinstance(one, Variable)}
GIB = 1 << 30


@pytest.mark.parametrize(
    ("name", "default", "values"),
    [
        ("PS_MAX_BUCKET_SIZE_GB", 8 * GIB, {"0.5": GIB // 2, "1e1": 10 * GIB}),
        ("PS_MEM_FRACTION", 0.9, {"1": 1.0}),
        ("PS_RETAIN_HOST_MEMORY", True, {"0": False, "1": True}),
        ("PS_CHECKSUM", "on", {"on": "on", "off": "off"}),
        ("PS_CPU_TRANSPORT", "shared-memory", {"gloo": "gloo"}),
        ("PS_DEVICE", None, {"cpu": "cpu", "cuda": "cuda", "npu": "npu"}),
        ("PS_IPC_UIDS", set(), {"": set(), "0, 1000,": {0, 1000}}),
        ("PS_P2P_PROTOCOL", None, {"tcp": "tcp", "ascend_direct": "ascend_direct"}),
        ("PS_P2P", "on", {"on": "on", "off": "off"}),
        ("PS_P2P_HOST", None, {"127.0.0.1": "127.0.0.1"}),
        ("PS_LIVENESS_PORT", 0, {"19": 19, "65534": 65534}),
        ("PS_TRACE", "", {"/a b": "/a b"}),
        ("MASTER_PORT", None, {"1": 1, "65534": 65534}),
        (
            "MASTER_ADDR",
            None,
            {
                "10.0.0.1": "10.0.0.1",
                "node-1.x": "node-1.x",
                "[::1]": "::1",
            },
        ),
    ],
)
def test_values(
    monkeypatch: pytest.MonkeyPatch, name: str, default: Any, values: dict[str, Any]
) -> None:
    monkeypatch.delenv(name, raising=False)
    assert VARIABLES[name]() == default
    for text, value in values.items():
        monkeypatch.setenv(name, text)
        assert VARIABLES[name]() == value


@pytest.mark.parametrize(
    ("name", "texts", "allowed"),
    [
        ("PS_MAX_BUCKET_SIZE_GB", ["x", "0", "-1", "inf", "nan"], "a positive number"),
        ("PS_RETAIN_HOST_MEMORY", ["yes", "2"], "0 or 1"),
        ("PS_KEEP_GROUPS", ["-1", "on"], "0 or 1"),
        ("PS_IPC_ABSTRACT", ["true"], "0 or 1"),
        ("PS_CHECKSUM", ["maybe", "ON", ""], "one of on, off"),
        ("PS_REPLAY_CHECK", ["0", "x", "1.5"], "an integer of at least 1"),
        ("PS_CPU_DEVICE_BASE", ["-1"], "an integer of at least 0"),
        ("PS_IPC_UIDS", ["me", "-1", "1;2"], "user ids, as numbers with commas"),
        ("PS_P2P", ["", "0", "ON"], "one of on, off"),
        ("PS_P2P_HOST", ["", "localhost", "0.0.0.0", "::", "203.0.113.7"], "an IP address of this"),
        ("PS_P2P_PROTOCOL", ["rdam", "RDMA", ""], "one of rdma, efa, ascend_direct, tcp"),
        ("MASTER_PORT", ["65535", "0", "abc", ""], "a port from 1 to 65534: .* the next one"),
        ("MASTER_ADDR", ["", "a b", "a:1", "[a]", "http://a"], "a host name or an IP address"),
    ],
)
def test_texts_that_are_not_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, texts: list[str], allowed: str
) -> None:
    for text in texts:
        monkeypatch.setenv(name, text)
        with pytest.raises(ValueError, match=f"^{name} must be {allowed}.*, got '") as caught:
            VARIABLES[name]()
        assert str(caught.value).endswith(f"got {text!r}")


def test_every_variable_is_read_here() -> None:
    command = ["grep", "-rlE", "environ[.[]|getenv", "--include=*.py", "."]
    readers = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, check=True)
    assert readers.stdout.split() == ["./settings.py"]


def test_every_variable_is_documented() -> None:
    page = (PACKAGE.parent / "docs" / "reference" / "environment.md").read_text()
    assert [name for name in VARIABLES if f"`{name}`" not in page] == []
