"""What a rank says first in any collective call, and what the ranks must agree on."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from checkpoint_engine.errors import CollectiveError

_MUST_AGREE = (
    "call",
    "checkpoint",
    "ranks",
    "version",
    "on_instance_failure",
    "compare_ranks",
    "metas",
)
_terms = operator.attrgetter(*_MUST_AGREE)


@dataclass(frozen=True)
class Hello:
    """One rank's first words in a collective call.

    Attributes:
        rank: who speaks.
        call: the method of ``ParameterServer`` that was called.
        ranks: the members of a P2P update; ``None``: all ranks.
        version, on_instance_failure, compare_ranks: arguments of ``update``. ``None``: not given,
            which goes with any value.
        metas: digest of what this rank gathered or loaded.
        device: identity of this rank's device.
        place: what this rank owns and where, as ``layouts.encode_place`` made it.
        layout, known: digests of the layout of that, and of the layouts that this rank knows.
        address: of an update, where this rank's worker connects.
        free_bytes: memory that the buffers of an update may take.
        free_beside: memory for them and for a tensor that the worker puts together.
        memory: what ``free_bytes`` is of, for errors.
        bucket_cap: ``PS_MAX_BUCKET_SIZE_GB`` in bytes.
        nic, host: RDMA device and host that this rank reads through.
        joins_parts: whether the worker of the last update takes tensors in parts; ``None``: there
            was none.
        maps_peers: whether the worker of the last update mapped all ranks' staging buffers.
        neighbour: the host, and where ranks of the same host reach this one; empty: it shares no
            memory with them.
        transport: ``PS_TRANSPORT``.
        reads: the protocol by which this rank reads other hosts' memory; empty: it cannot.
        needs: digest of what the worker of the last update reads; empty: everything.
        knows: digests of the needs that this rank knows of others.
        gone: of an update of some ranks: those that are not there any more, as this rank has heard.
        group: id of the broadcast group that this rank kept from its last update.
        instance: the engine instance that this rank's worker belongs to.
        nonce: random; that of the first rank names the update, and the group if one is made.
        trace: the folder for a trace; empty: none.
        skips_equal: ``PS_SKIP_EQUAL``.
    """

    rank: int
    call: str
    checkpoint: str = ""
    ranks: tuple[int, ...] | None = None
    version: str | None = None
    on_instance_failure: str | None = None
    compare_ranks: bool | None = None
    metas: str | None = None
    device: str = ""
    place: str = ""
    layout: str = ""
    known: str = ""
    address: str = ""
    free_bytes: int = 0
    free_beside: int = 0
    memory: str = "device memory"
    bucket_cap: int = 0
    nic: str = ""
    host: str = ""
    joins_parts: bool | None = None
    maps_peers: bool = False
    neighbour: str = ""
    transport: str = ""
    reads: str = ""
    needs: str = ""
    knows: tuple[str, ...] = ()
    gone: tuple[int, ...] = ()
    group: str = ""
    instance: str = ""
    nonce: str = ""
    trace: str = ""
    skips_equal: bool = False

    def encode(self) -> bytes:
        return json.dumps(vars(self)).encode()

    @staticmethod
    def decode(blob: bytes) -> Hello:
        """Raises ``ValueError`` if no rank of this release said that: whoever reaches the store may
        write there."""
        try:
            return _adapter().validate_json(blob)
        except ValidationError as error:
            text = f"what the store holds for a rank was not written by one: {blob!r:.200}"
            raise ValueError(text) from error

    @staticmethod
    def decode_all(blobs: Sequence[bytes]) -> list[Hello]:
        """As ``decode``, of several; at once takes half as long."""
        try:
            hellos = _adapter_of_all().validate_json(b"[" + b",".join(blobs) + b"]")
        except ValidationError:
            hellos = []
        return hellos if len(hellos) == len(blobs) else [Hello.decode(blob) for blob in blobs]

    def terms(self) -> Hello:
        """The part that the ranks must agree on."""
        return Hello(self.rank, **{name: getattr(self, name) for name in _MUST_AGREE})

    @property
    def wish(self) -> str:
        """The call as its caller wrote it: ``update('step-8', ranks=[0])``."""
        arguments = [repr(self.checkpoint)] if self.checkpoint else []
        if self.ranks is not None:
            arguments.append(f"ranks={list(self.ranks)}")
        if self.version is not None:
            arguments.append(f"version={self.version!r}")
        if self.on_instance_failure == "continue":
            arguments.append("on_instance_failure='continue'")
        if self.compare_ranks:
            arguments.append("compare_ranks=True")
        return f"{self.call}({', '.join(arguments)})"

    def differs_from(self, other: Hello) -> bool:
        """Whether the two are not the same collective call. Options that one leaves out agree."""
        return any(
            mine != theirs and (name == "ranks" or None not in (mine, theirs))
            for name in _MUST_AGREE
            for mine, theirs in [(getattr(self, name), getattr(other, name))]
        )


@functools.cache
def _adapter() -> TypeAdapter[Hello]:
    return TypeAdapter(Hello)


@functools.cache
def _adapter_of_all() -> TypeAdapter[list[Hello]]:
    return TypeAdapter(list[Hello])


def disagreement(one: Hello, other: Hello, missing: Sequence[int] = ()) -> CollectiveError:
    """The error of two ranks whose calls do not go together; names who wants what."""
    first, second = sorted((one, other), key=lambda hello: hello.rank, reverse=True)
    if first.wish != second.wish:
        text = (
            f"rank {first.rank} is in {first.wish}, rank {second.rank} in {second.wish}: all ranks "
            "must make the same collective calls in the same order; after a call that failed on "
            "one rank, let all ranks skip that checkpoint"
        )
    else:
        text = (
            f"ranks {second.rank} and {first.rank} gathered other metas for {first.wish}: call "
            f"gather_metas({first.checkpoint!r}), or load_metas(), on all ranks"
        )
    return CollectiveError(text, "disagreement", missing, calls=[one.wish, other.wish])


def check_agreement(hellos: Sequence[Hello]) -> None:
    """Compare what all ranks of a call said.

    Raises:
        CollectiveError: two of them make different calls.
        ValueError: two of them are on one device.
    """
    versions = {hello.version: hello for hello in reversed(hellos) if hello.version is not None}
    kinds: dict[object, Hello] = {}
    for hello in hellos:  # mostly all are of one kind, and each rank compares all of them
        kinds.setdefault(_terms(hello), hello)
    for one in kinds.values():
        for other in (hellos[0], *versions.values()):  # one of each: equal ones agree with it
            if one.differs_from(other):
                raise disagreement(one, other)
    seen: dict[str, int] = {}
    for hello in hellos:
        other_rank = seen.setdefault(hello.device, hello.rank)
        if hello.device and other_rank != hello.rank:
            raise ValueError(
                f"ranks {other_rank} and {hello.rank} are both on device {hello.device}: give each "
                "rank a device of its own (gpu_count, CUDA_VISIBLE_DEVICES; on the cpu device "
                "LOCAL_WORLD_SIZE)"
            )


def agreed_version(hellos: Sequence[Hello]) -> str:
    """The id of an update, the same on every rank: the one that was given, else a random one."""
    given = [hello.version for hello in hellos if hello.version is not None]
    return given[0] if given else hellos[0].nonce
