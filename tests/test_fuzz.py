"""A few hundred seeded inputs for each fuzz target; ``make fuzz`` runs many more."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))
import mutate
import targets
from torchrun import HERE, Forked


@pytest.mark.parametrize("name", list(targets.BY_NAME))
def test_a_few_hundred_inputs(name: str) -> None:
    target = targets.BY_NAME[name]
    try:
        for seed in target.seeds:
            target.run(seed)
        for data in mutate.inputs(target.seeds, 300, seed=7):
            targets.check(target, data)
    finally:
        targets.clean_up()


BOMBS = {
    "a memo of gigabytes": ("wire: handle", b"\x80\x04Nr\xff\xff\xff\x0f."),
    "a tuple of itself as a key": ("wire: bucket, None", b"\x80\x04N" + b"2\x86" * 60 + b"}"),
    "a tuple of itself, by memo": (
        "wire: bucket, None",
        b"\x80\x04N\x85\x94" + b"".join(b"h%c\x86\x94" % n for n in range(40)) + b".",
    ),
    "a long product": (
        "metas: JSON",
        b'{"0": {"p2p_store_addr": null, "rdma_device": "", "memory_buffer_metas_list": [{"ptr": 1,'
        b' "size": 1, "metas": [{"name": "w", "dtype": "int8", "shape": ['
        + b"9" * 4000
        + b", 9] }]}]}}",
    ),
    "deep JSON": ("gather: place", b"[" * 50_000),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(bomb: str, tmp_path: Path) -> None:
    """In a process of its own, with a gigabyte and a few seconds."""
    name, data = BOMBS[bomb]
    Forked(tmp_path, [str(HERE / "fuzz" / "bomb.py"), name, data[:60_000].hex()]).join(40)


def test_a_layout_that_expands_is_refused() -> None:
    import zlib

    from checkpoint_engine.planning.layouts import decode_layout

    with pytest.raises(ValueError, match="hold too much"):
        decode_layout(zlib.compress(bytes(64 << 20)))
