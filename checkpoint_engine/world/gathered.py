"""Who owns what of a checkpoint: gathered from all ranks of this world, or loaded from another."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from loguru import logger

from checkpoint_engine.data_types import (
    ColumnCopy,
    DataToGather,
    H2DBucket,
    MemoryBufferMetaList,
)
from checkpoint_engine.ground.details import log_detail
from checkpoint_engine.memory.checkpoints import Checkpoint
from checkpoint_engine.memory.checksum import Sums, check_sums, sum_of, sums_of
from checkpoint_engine.planning.columns import ColumnTensor, column_tensors
from checkpoint_engine.planning.layouts import (
    Layout,
    decode_layouts,
    decode_place,
    encode_layout,
    encode_place,
    known_digest,
    layouts_of,
    missing_layouts,
)
from checkpoint_engine.world.call import Call
from checkpoint_engine.world.hello import Hello

Metas = dict[int, MemoryBufferMetaList]
_SHOWN = 3


@dataclass(frozen=True)
class Gathered:
    """What one rank knows of the owners. Replaced as a whole, never changed.

    Attributes:
        name: the checkpoint; ``None``: nothing was gathered, or the metas were loaded.
        metas: of the ranks that own something.
        column_copies: what owners of this world hold a second time. Metas never say so: they are
            read by other releases.
        owned: the tensors of each of these.
        digest: equal on ranks that know the same.
        nics: the ranks of this world on each NIC.
        devices: identity of each rank's device.
        is_registered: whether any rank had registered the checkpoint.
        is_loaded: whether the metas come from another world.
        serial: the registration on this rank that was gathered.
        layout: digest of this rank's own layout.
        owner_layouts: digest of each rank's layout.
        layouts: all ranks' layouts by digest; the next gather sends those that are not among them.
        duplicates: names that several owners have, with equal content.
        seconds: what gathering took.
    """

    name: str | None = None
    metas: Metas = field(default_factory=dict)
    column_copies: Mapping[int, Sequence[ColumnCopy]] = field(default_factory=dict)
    owned: Mapping[int, Layout] = field(default_factory=dict)
    digest: str = ""
    nics: Mapping[str, set[int]] = field(default_factory=dict)
    devices: Mapping[int, str] = field(default_factory=dict)
    is_registered: bool = True
    is_loaded: bool = False
    serial: int = 0
    layout: str = ""
    owner_layouts: tuple[str, ...] = ()
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    duplicates: frozenset[str] = frozenset()
    seconds: float = 0.0

    @cached_property
    def owner_nics(self) -> dict[str, set[int]]:
        """The owners on each NIC."""
        return topology(
            (rank, owned.rdma_device, (owned.p2p_store_addr or "").rpartition(":")[0])
            for rank, owned in self.metas.items()
        )

    @cached_property
    def extent(self) -> tuple[int, int]:
        """Padded bytes of all owners' tensors, and of the largest one; every way asks."""
        each = [layout.extent for layout in self.owned.values()]
        return sum(total for total, _ in each), max((largest for _, largest in each), default=0)

    @cached_property
    def plan_basis(self) -> tuple[object, ...]:
        """Equal where the same tensors lie the same way in host buffers: plans hold then."""
        if self.is_loaded:
            return (self.digest,)
        sizes = [
            (rank, [buffer.size for buffer in owned.memory_buffer_metas_list])
            for rank, owned in self.metas.items()
        ]
        return (self.owner_layouts, sizes, self.owner_nics, self.duplicates)

    @cached_property
    def _sums(self) -> dict[int, Sums | None]:
        return {rank: sums_of(rank, owned) for rank, owned in self.metas.items()}

    def sum_of(self, owner: int, bucket: H2DBucket) -> tuple[int, int] | None:
        """What a bucket's bytes must add up to; see ``memory.checksum.sum_of``."""
        return sum_of(self._sums.get(owner), bucket)

    @cached_property
    def columns(self) -> dict[int, dict[str, ColumnTensor]]:
        """The tensors that each owner's column copies hold. Only those of the registration that its
        metas are of: another one's lease says nothing of them."""
        found: dict[int, dict[str, ColumnTensor]] = {}
        for rank, copies in self.column_copies.items():
            lease, layout = self.metas[rank].lease, self.owned[rank]
            found[rank] = {}
            for one in copies:
                if lease is not None and one.lease == lease.id:
                    found[rank] |= column_tensors(layout.buffers, one)
        return found

    def __str__(self) -> str:
        buffers = [b for owned in self.metas.values() for b in owned.memory_buffer_metas_list]
        tensors, nbytes = sum(len(b.metas) for b in buffers), sum(b.size for b in buffers)
        return f"{tensors} tensors, {nbytes / 1e9:.3f} GB, of {len(self.metas)} ranks"

    def check_usable(self, source: Checkpoint, remote: bool) -> None:
        """Raise unless this is of the checkpoint ``source``, and of what is registered here.

        Args:
            remote: whether it is to be read by P2P.
        """
        if remote and self.is_loaded:
            if not self.metas:
                raise RuntimeError(
                    "the metas that were loaded name no owner of weights: gather the checkpoint in "
                    "the world that registered it, and load its metas again"
                )
            return  # the leases of the other world tell whether they still hold
        if self.name == source.name and not self.is_registered:
            raise RuntimeError(
                f"no rank has registered {source.name!r}: call register_checkpoint() and "
                "gather_metas() again on all ranks"
            )
        if self.name != source.name:
            last = f"{self.name!r}" if self.is_registered else "None"
            raise RuntimeError(
                f"the metas of {source.name!r} have not been gathered (last: {last}): call "
                f"gather_metas({source.name!r}) on all ranks"
            )
        if source.layout_digest != self.layout:
            raise RuntimeError(
                f"checkpoint {source.name!r} changed on this rank since its metas were gathered: "
                "call gather_metas() again on all ranks"
            )
        if remote:
            self._check_readable(source.name)

    def _check_readable(self, name: str) -> None:
        unreadable = [rank for rank, owned in self.metas.items() if not owned.p2p_store_addr]
        if unreadable:
            raise RuntimeError(
                f"ranks {unreadable} own parts of {name!r} that cannot be read by P2P: they run "
                "without it, or could not register the memory (see their logs)"
            )

    def renewed(self, call: Call, hellos: Sequence[Hello], source: Checkpoint) -> Gathered:
        """The same after ranks have registered new values under the same name and layout: those
        say in their hellos where the values lie and what they add up to. Called by all members.

        Raises:
            ValueError: a tensor that several ranks own is not the same on them any more.
            RuntimeError: it cannot be compared, or the new values cannot be read by P2P.
        """
        news = {hello.rank: hello for hello in hellos if hello.place}
        if not news:
            return self
        found = {
            rank: decode_place(hello.place, self.layouts[hello.layout].buffers)
            for rank, hello in news.items()
            if rank in self.metas
        }
        renewed = {rank: _as_owner(one) for rank, one in found.items()}
        said = json.dumps([self.digest, *(hello.place for hello in hellos)])
        changed = replace(
            self,
            metas=self.metas | renewed,
            column_copies={**self.column_copies, **_column_copies(found)},
            digest=hashlib.sha256(said.encode()).hexdigest(),
            serial=source.serial,
        )
        remote = hellos[0].ranks is not None
        if remote:
            changed._check_readable(source.name)
        if self.duplicates and remote:
            raise RuntimeError(
                f"ranks {sorted(news)} have new values of {source.name!r}, of which several ranks "
                "own the same tensors: call gather_metas() again on all ranks, which compares them"
            )
        if self.duplicates:
            _agree_on_duplicates(call, source, changed.metas)
        return changed


def load(metas: Metas) -> Gathered:
    """The metas of another world, whose owners are to be read by P2P.

    Raises:
        ValueError: an owner has no P2P address; two owners have different tensors of one name;
            checksums or a lease are damaged.
    """
    owners = {rank: owned for rank, owned in metas.items() if owned.memory_buffer_metas_list}
    without = [rank for rank, owned in owners.items() if not owned.p2p_store_addr]
    if without:
        raise ValueError(
            f"owner ranks {without} have no P2P address: they run without P2P, or could not "
            "register this checkpoint for it (see their logs)"
        )
    for rank, owned in owners.items():
        _check_proofs(rank, owned)
    unleased = [rank for rank, owned in owners.items() if getattr(owned, "lease", None) is None]
    if unleased:
        logger.warning(
            "owner ranks {} gave no lease, as releases of the original do: if they change or drop "
            "the checkpoint while it is read, nobody notices",
            unleased,
        )
    layouts = layouts_of(owners)
    return Gathered(
        metas={rank: _as_owner(owned) for rank, owned in owners.items()},
        owned=layouts,
        digest=_digest(owners, layouts),
        is_loaded=True,
        duplicates=frozenset(_find_duplicates(owners)),
    )


def gather(call: Call, source: Checkpoint, before: Gathered) -> Gathered:
    """Learn what every rank owns. Called by all ranks.

    Args:
        source: what this rank owns.
        before: what was gathered last; layouts that all ranks know from it are not sent again.

    Raises:
        ValueError: no rank has registered the checkpoint, and none could join another world; or
            two ranks own different tensors of one name.
    """
    mine = Hello(
        call.rank,
        call.name,
        source.name,
        place=encode_place(source.owned),
        layout=source.layout_digest,
        known=known_digest(before.layouts),
    )
    hellos = call.exchange(mine)
    digests = tuple(hello.layout for hello in hellos)
    missing = missing_layouts(digests, [hello.known for hello in hellos], before.layouts)
    blobs = call.gather_from(missing, "layouts", source.layout)
    layouts = decode_layouts(digests, before.layouts, dict(zip(missing, blobs, strict=True)))
    found = {
        hello.rank: decode_place(hello.place, layouts[hello.layout].buffers) for hello in hellos
    }
    owners = {rank: one for rank, one in found.items() if one.memory_buffer_metas_list}
    for rank, owned in owners.items():
        _check_proofs(rank, owned)
    duplicates = before.duplicates
    if duplicates or digests != before.owner_layouts:  # otherwise there are none again
        duplicates = _agree_on_duplicates(call, source, owners)
    places = [hello.place + hello.layout for hello in hellos]
    gathered = Gathered(
        name=source.name,
        metas={rank: _as_owner(owned) for rank, owned in owners.items()},
        column_copies=_column_copies(owners),
        owned={rank: layouts[digests[rank]] for rank in owners},
        digest=hashlib.sha256("".join(places).encode()).hexdigest(),
        nics=topology((rank, one.rdma_device, one.host_ip) for rank, one in found.items()),
        devices={rank: one.device_uuid for rank, one in found.items()},
        is_registered=bool(owners) or _is_registered(call, source, found),
        serial=source.serial,
        layout=source.layout_digest,
        owner_layouts=digests,
        layouts=layouts,
        duplicates=duplicates,
        seconds=call.clock.elapsed,
    )
    log_detail(call.rank, "gathered {}: {}", source.name, gathered)
    return gathered


def topology(nics: Iterable[tuple[int, str, str]]) -> dict[str, set[int]]:
    """The ranks on each NIC, from every (rank, NIC, host). A rank without NIC reads for itself."""
    found: dict[str, set[int]] = defaultdict(set)
    for rank, nic, host in nics:
        found[f"{nic or f'rank-{rank}'}@{host}"].add(rank)
    return dict(found)


# ---------------------------------------------------------------------- parts of the above


def _digest(owners: Metas, layouts: Mapping[int, Layout]) -> str:
    """Of all that loaded metas say."""
    digest = hashlib.sha256()
    for rank, owned in owners.items():
        buffers = owned.memory_buffer_metas_list
        lease = getattr(owned, "lease", None)
        place = [rank, owned.p2p_store_addr, owned.rdma_device, lease and [lease.ptr, lease.id]]
        lies = [[one.ptr, one.size, getattr(one, "checksums", None)] for one in buffers]
        digest.update(json.dumps([place, lies]).encode())
        digest.update(encode_layout(layouts[rank]))
    return digest.hexdigest()


def _as_owner(owned: MemoryBufferMetaList) -> MemoryBufferMetaList:
    """What ``get_metas`` gives of a rank, and JSON files hold. ``getattr``: objects that pickles of
    the original hold lack newer fields."""
    return MemoryBufferMetaList.model_construct(
        p2p_store_addr=owned.p2p_store_addr,
        memory_buffer_metas_list=owned.memory_buffer_metas_list,
        rdma_device=owned.rdma_device,
        lease=getattr(owned, "lease", None),
    )


def _column_copies(found: Mapping[int, DataToGather]) -> dict[int, Sequence[ColumnCopy]]:
    """Also where there are none: they take the place of those before."""
    return {rank: one.column_copies for rank, one in found.items()}


def _check_proofs(rank: int, owned: MemoryBufferMetaList) -> None:
    """Raise ``ValueError`` for checksums or leases that nobody can have written."""
    for buffer in owned.memory_buffer_metas_list:
        check_sums(getattr(buffer, "checksums", None), f"the metas of owner {rank}")
    lease = getattr(owned, "lease", None)
    if lease is not None and not lease.is_whole:
        raise ValueError(f"the metas of owner {rank} hold a damaged lease: {lease.id!r:.80}")


def _is_registered(call: Call, source: Checkpoint, found: Mapping[int, DataToGather]) -> bool:
    """A checkpoint that nobody registered is a mistake, unless this world joins another."""
    if any(call.all_gather("registered", b"1" if source.serial else b"")):
        return True
    advice = "call register_checkpoint() before gather_metas()"
    if not any(one.p2p_store_addr for one in found.values()):
        raise ValueError(
            f"no rank has registered checkpoint {source.name!r}: {advice}. To join another world, "
            "ranks read from it by P2P, and no rank has P2P: is Mooncake installed, and P2P not "
            "switched off (PS_P2P=off, or a program sets _p2p_store to None)?"
        )
    if call.leads:
        logger.bind(rank=call.rank).warning(
            "no rank has registered checkpoint {}: {}", source.name, advice
        )
    return False


def _find_duplicates(owners: Mapping[int, MemoryBufferMetaList]) -> dict[str, list[int]]:
    """The owners of each name that several have.

    Raises:
        ValueError: they have different dtypes or shapes of it, or one owner has it twice.
    """
    tensors = [
        (rank, meta)
        for rank, owned in owners.items()
        for buffer in owned.memory_buffer_metas_list
        for meta in buffer.metas
    ]
    names = [meta.name for _, meta in tensors]
    if len(set(names)) == len(names):
        return {}
    several = {name for name, count in Counter(names).items() if count > 1}
    kinds: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    for rank, meta in tensors:
        if meta.name in several:
            kinds[meta.name].append((rank, f"{meta.dtype} {list(meta.shape)}"))
    for name, found in kinds.items():
        (first, kind), *others = found
        for rank, other_kind in others:
            if rank == first:
                raise ValueError(f"rank {rank} owns tensor {name!r} twice")
            if other_kind != kind:
                raise ValueError(
                    f"ranks {first} and {rank} own different tensors {name!r}: {kind} and "
                    f"{other_kind}; let one rank register it"
                )
    return {name: [rank for rank, _ in found] for name, found in kinds.items()}


def _agree_on_duplicates(
    call: Call, source: Checkpoint, owners: Mapping[int, MemoryBufferMetaList]
) -> frozenset[str]:
    """Tensors that several ranks own must be equal; one of them is sent then.

    Raises:
        ValueError: their content is different; names both ranks.
    """
    duplicates = _find_duplicates(owners)
    if not duplicates:
        return frozenset()
    holders = sorted({rank for ranks in duplicates.values() for rank in ranks})
    mine = source.hashes(duplicates.keys()) if call.rank in holders else {}
    said = call.gather_from(holders, "content", json.dumps(mine).encode())
    hashes = {rank: json.loads(blob) for rank, blob in zip(holders, said, strict=True)}
    for name, (first, *others) in duplicates.items():
        for rank in others:
            if hashes[rank][name] != hashes[first][name]:
                raise ValueError(
                    f"ranks {first} and {rank} own tensor {name!r} with different content: let one "
                    "rank register it, or give both the same values"
                )
    if call.leads:
        logger.bind(rank=call.rank).warning(
            "several ranks own the same {} tensors of {}, with equal content, and each is sent "
            "once: {}",
            len(duplicates),
            source.name,
            ", ".join(sorted(duplicates)[:_SHOWN]),
        )
    return frozenset(duplicates)
