"""Send a checkpoint into running inference engines: the main job, one rank per inference worker.

    torchrun --nproc-per-node 8 examples/update.py --checkpoint-path /models/qwen \\
        --update-method all --save-metas-file metas.json --sleep-time 300

New engines, with ranks in a world of their own, take the weights from the memory of those ranks:

    torchrun --nproc-per-node 8 examples/update.py --load-metas-file metas.json
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from loguru import logger

from checkpoint_engine.client import REQUESTS, fetch_metas, wait_until_ready
from checkpoint_engine.distributed import use_backend
from checkpoint_engine.memory.files import open_files, view_tensors
from checkpoint_engine.memory.folder import INDEX, checkpoint_of, split_over_ranks
from checkpoint_engine.memory.sources import FileParts, TensorSource, file_of, natural_key
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.world.metas_file import Metas, decode_metas, encode_metas


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Send a checkpoint into running inference engines."
    )
    add = parser.add_argument
    add("--checkpoint-path", type=Path, help="folder of the checkpoint")
    add("--save-metas-file", type=Path, help="write for --load-metas-file who owns what")
    add("--load-metas-file", type=Path, help="take the weights from the ranks that wrote this, "
        "also where --checkpoint-path is given")  # fmt: skip
    add("--metas-url", help="the same, from a server's /v1/metas; PS_HTTP_TOKEN is sent")
    add("--sleep-time", type=float, default=0, help="seconds to stay alive for others to read from")
    add("--endpoint", default="http://localhost:19730",
        help="of the engine; by default %(default)s")  # fmt: skip
    add("--engine-kind", choices=list(REQUESTS), default="vllm")
    add("--inference-parallel-size", type=int, default=8,
        help="workers per engine; by default %(default)s")  # fmt: skip
    add("--checkpoint-name", default="my-checkpoint-iter-0")
    add("--update-method", choices=["broadcast", "p2p", "all"], default="broadcast")
    add("--uds", help="Unix socket of the engine, where it does not listen on TCP")
    add("--custom-dist", help="a backend of checkpoint_engine.distributed, instead of torch's")
    add("--ready-timeout", type=float, default=300,
        help="seconds that the engine may take to be up; by default %(default)s")  # fmt: skip
    args = parser.parse_args(argv)
    metas = [args.load_metas_file, args.metas_url]
    if None not in metas:
        parser.error("give one of --load-metas-file and --metas-url")
    if args.checkpoint_path is None and metas == [None, None]:
        parser.error("give --checkpoint-path, --load-metas-file or --metas-url")
    if args.inference_parallel_size < 1:
        parser.error("--inference-parallel-size must be at least 1")
    return args


def main() -> None:
    args = parse_args()
    if missing := [name for name in ("RANK", "WORLD_SIZE") if name not in os.environ]:
        sys.exit(
            f"{' and '.join(missing)} not set: start one process per worker, as torchrun does: "
            f"torchrun --nproc-per-node {args.inference_parallel_size} {' '.join(sys.argv)}"
        )
    use_backend(args.custom_dist)
    job = Job(args, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    if args.load_metas_file is None and args.metas_url is None:
        job.send()
    else:
        job.join()
    time.sleep(args.sleep_time)


class Job:
    """This rank's part of the job. Every rank of the world does the same steps."""

    def __init__(self, args: argparse.Namespace, rank: int, world_size: int) -> None:
        self.args = args
        self.rank = rank
        self.world_size = world_size
        self.ps = ParameterServer(auto_pg=True)
        told = {"weight_version": args.checkpoint_name} if args.engine_kind == "vllm" else {}
        self.ask_engine = REQUESTS[args.engine_kind](
            args.endpoint,
            inference_parallel_size=args.inference_parallel_size,
            uds=args.uds,
            **told,
        )

    def send(self) -> None:
        """Load the checkpoint, a part on each rank, and send it to the engines."""
        args, name = self.args, self.args.checkpoint_name
        with self.phase("register", "Register checkpoint") as done:
            files, tensors, nbytes = load_share(args.checkpoint_path, self.rank, self.world_size)
            self.ps.register_checkpoint(name, files=files, named_tensors=tensors)
            done(nbytes)
        self.gather("Gather metas")
        if args.save_metas_file is not None and self.rank == 0:
            write_atomically(args.save_metas_file, encode_metas(self.ps.get_metas()))
        if args.update_method in ("broadcast", "all"):
            self.update("broadcast", None, "Update weights without setting ranks")
        if args.update_method in ("p2p", "all"):
            self.update("p2p", self.first_engine(), "Update weights with setting ranks")

    def join(self) -> None:
        """Take the weights from the memory of another world's ranks."""
        self.ps.register_checkpoint(self.args.checkpoint_name)
        self.gather("Gather metas before join")
        self.ps.load_metas(read_metas(self.args))
        text = f"Update weights with setting ranks as range(0, {self.world_size}) by using p2p"
        self.update("p2p", list(range(self.world_size)), text)

    def gather(self, text: str) -> None:
        """Learn who owns what, once the engines are up: this is where ranks start to wait."""
        if self.leads_engine():
            with self.phase("wait", "Wait for the engine"):
                health, seconds = f"{self.args.endpoint}/health", self.args.ready_timeout
                logger.info(f"Wait up to {seconds:g} seconds for {self.args.uds or health}")
                try:
                    wait_until_ready(health, seconds, self.args.uds)
                except TimeoutError as error:
                    sys.exit(f"rank {self.rank}: {error}")
        with self.phase("gather", text):
            self.ps.gather_metas(self.args.checkpoint_name)

    def update(self, method: str, ranks: list[int] | None, text: str) -> None:
        with self.phase(method, text) as done:
            name = self.args.checkpoint_name
            done(self.ps.update(name, self.ask_engine, ranks=ranks).bytes)

    def leads_engine(self) -> bool:
        workers: int = self.args.inference_parallel_size
        return self.rank % workers == 0

    def first_engine(self) -> list[int]:
        return list(range(min(self.args.inference_parallel_size, self.world_size)))

    @contextmanager
    def phase(self, name: str, text: str) -> Iterator[Callable[[int], None]]:
        """Time a step: rank 0 prints it, and all ranks log it as the original's example does. The
        step may say how many bytes it moved."""
        moved = 0

        def done(nbytes: int) -> None:
            nonlocal moved
            moved = nbytes

        start = time.perf_counter()
        yield done
        seconds = time.perf_counter() - start
        logger.info(f"{text} duration: {seconds:.2f} seconds")
        if self.rank == 0:
            rate = f" {moved / 1e9:8.3f} GB {moved / 1e9 / seconds:7.2f} GB/s" if moved else ""
            print(f"{name:<9} {seconds:8.3f} s{rate}", flush=True)


def load_share(
    folder: Path, rank: int, world_size: int
) -> tuple[list[str], dict[str, torch.Tensor], int]:
    """This rank's part of a checkpoint: whole files, tensors out of shared ones, and its bytes.

    With an index the tensors are split over the ranks, without one the files are.
    """
    files = checkpoint_of(folder)
    if not files[0].endswith(INDEX):
        mine = split_over_ranks(files, world_size)[rank]
        return mine, {}, sum(source.nbytes for source in open_files(mine).values())
    stored = list(open_files(files).values())
    share = split_by_bytes(stored, rank, world_size)
    whole = whole_files(share, stored)
    rest = [source for source in share if file_of(source) not in whole]
    mine = [files[0], *whole] if whole else []
    return mine, view_tensors(rest), sum(source.nbytes for source in share)


def offset_of(source: TensorSource) -> int:
    """Where a tensor of a safetensors file begins."""
    return cast(FileParts, source.data).parts[0].offset


def split_by_bytes(
    sources: Sequence[TensorSource], rank: int, world_size: int
) -> list[TensorSource]:
    """This rank's part: contiguous in the files, of about as many bytes as the others' parts."""
    in_order = sorted(sources, key=lambda s: (natural_key(file_of(s)), offset_of(s)))
    total = sum(source.nbytes for source in sources)
    share, begin = [], 0
    for source in in_order:
        owner = min(begin * world_size // max(total, 1), world_size - 1)
        if owner == rank:
            share.append(source)
        begin += source.nbytes
    return share


def whole_files(share: Sequence[TensorSource], stored: Sequence[TensorSource]) -> list[str]:
    """The files all of whose tensors are in ``share``: these can be read straight into place."""
    mine = {source.name for source in share}
    shared = {file_of(source) for source in stored if source.name not in mine}
    return list(dict.fromkeys(file for file in map(file_of, share) if file not in shared))


def read_metas(args: argparse.Namespace) -> Metas:
    if args.metas_url is not None:
        is_ours = args.metas_url.endswith("/v1/metas")  # not a file that somebody else serves
        token = os.environ.get("PS_HTTP_TOKEN", "").strip() if is_ours else ""
        return fetch_metas(args.metas_url, token=token or None)
    try:
        return decode_metas(args.load_metas_file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{args.load_metas_file}: {error}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Whoever waits for the file never sees half of it."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_bytes(data)
    unfinished.replace(path)


if __name__ == "__main__":
    main()
