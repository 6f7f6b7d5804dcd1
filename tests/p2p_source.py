"""A process whose memory others read: ``p2p_source.py BYTES FOLDER``. It says in the folder where
its memory is, and revokes the lease on it when a file ``revoke`` appears there."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

from checkpoint_engine.p2p_store import P2PStore


def pattern(nbytes: int) -> torch.Tensor:
    """Bytes that count up, modulo 251."""
    return (torch.arange(nbytes, dtype=torch.int32) % 251).to(torch.uint8)


def main(nbytes: int, folder: Path) -> None:
    store = P2PStore(host="127.0.0.1")
    memory = pattern(nbytes)
    store.register_named_tensors({"memory": memory})
    lease = store.grant()
    place = {"address": store.addr, "ptr": memory.data_ptr(), "lease": lease.model_dump()}
    (folder / "new").write_text(json.dumps(place | {"pid": os.getpid()}))
    (folder / "new").rename(folder / "place")
    while not (folder / "revoke").exists():
        time.sleep(0.01)
    store.revoke(lease)
    (folder / "revoked").touch()
    time.sleep(600)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
