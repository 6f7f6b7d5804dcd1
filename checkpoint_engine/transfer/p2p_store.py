"""Reading other ranks' host memory with Mooncake's transfer engine.

The owner registers its buffers and grants a lease on them: a random id in a slot that the owner
overwrites before it gives the memory up. A reader looks at the slot before and after it reads, so
it never takes stale bytes for good ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from loguru import logger

from checkpoint_engine import settings
from checkpoint_engine.data_types import Lease
from checkpoint_engine.ground.deadline import Deadline, poll
from checkpoint_engine.ground.devices import DeviceManager, get_ip
from checkpoint_engine.ground.rdma import is_efa
from checkpoint_engine.ground.sockets import listen_only_at, open_listeners

_PORTS = range(15_000, 17_001)  # that Mooncake chooses from
_MIN_LEVEL, _FATAL = "_ZN3fLI17FLAGS_minloglevelE", 3  # of glog, which Mooncake logs with
_START_ATTEMPTS = 6
_FIRST_PAUSE = 0.1  # seconds; doubles with every attempt
_SLICE_BYTES = 32 << 20
_SLICES_UNDER_WAY = 4
_RANGES_UNDER_WAY = 32  # where they are short
_BYTES_UNDER_WAY = _SLICES_UNDER_WAY * _SLICE_BYTES
_LONGEST_READ = 600.0  # seconds, where the caller sets no end
_LAST_SLICES = 1.0  # seconds that a read which failed or was ended waits for its last slices
_AT_ONCE = 0.1  # seconds; a source that is gone takes longer to fail
_FINAL = (1, -1)  # Mooncake's status of a transfer that is over: arrived, failed
_SLOT_BYTES = 32
_SLOTS = mmap.PAGESIZE // _SLOT_BYTES
_starting = threading.Lock()  # one engine after the other, so that each finds its own listeners


class P2PError(RuntimeError):
    """A transfer or registration that Mooncake refused; the text has its code and both
    addresses."""

    kind = "p2p_failed"


class StaleSourceError(P2PError):
    """A source does not hold any more what its metas say."""

    kind = "source_changed"


class P2PStore:
    """This rank's transfer engine: what it offers to others, and how it reads from them.

    Attributes:
        protocol: ``rdma``, ``efa``, ``ascend_direct`` or ``tcp``.
        device: the NICs it uses, comma-joined; empty for ``tcp``.
    """

    def __init__(
        self,
        device_manager: DeviceManager | None = None,
        *,
        device: str = "",
        host: str | None = None,
    ) -> None:
        """Start the engine.

        Args:
            device: this rank's NIC, or several, comma-joined. Empty: there is none.
            host: the address that other ranks reach this one at.

        Raises:
            RuntimeError: Mooncake is missing or does not start; says what to install or set.
        """
        self._device_manager = DeviceManager() if device_manager is None else device_manager
        self.protocol = _choose_protocol(self._device_manager, device)
        self.device = device if self.protocol in ("rdma", "efa") else ""
        self._host = get_ip() if host is None else host
        self._engine = _start_engine(self._host, self.protocol, self.device)
        self._port = int(self._engine.get_rpc_port())
        self._registered: dict[str, int] = {}
        """The address of each block, by name."""
        self._unfinished: list[_Read] = []
        self._unfinished_lock = threading.Lock()
        # A page of lease ids, which others may read as long as this process lives.
        self._leases = mmap.mmap(-1, mmap.PAGESIZE)
        self._free_slots = list(range(_SLOTS))
        self._page = torch.frombuffer(self._leases, dtype=torch.uint8)
        self.register_named_tensors({"__leases__": self._page})

    @property
    def addr(self) -> str:
        """Where other ranks read from, ``host:port``."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{host}:{self._port}"

    @property
    def reads_into_device_memory(self) -> bool:
        """Whether a transfer may end in device memory; otherwise it goes through host memory."""
        return not self._device_manager.is_accelerator or self.protocol != "tcp"

    @property
    def needs_registered_targets(self) -> bool:
        """Whether memory that is read into must be registered too."""
        return self.protocol != "tcp"

    def register_named_tensors(self, named_tensors: Mapping[str, torch.Tensor]) -> None:
        """Let others read these tensors' memory. All of them are registered, or none.

        Raises:
            ValueError: a name is registered already.
            P2PError: the engine refused.
        """
        taken = [name for name in named_tensors if name in self._registered]
        if taken:
            raise ValueError(f"{taken[:3]} are registered for P2P already")
        with contextlib.ExitStack() as undo:
            for name, tensor in named_tensors.items():
                self._register(name, tensor.data_ptr(), tensor.nbytes)
                undo.callback(self.unregister_named_tensors, [name])
            undo.pop_all()

    def unregister_named_tensors(self, names: Sequence[str]) -> int:
        """Take that back; returns how many of ``names`` were registered.

        Raises:
            P2PError: the engine refused some, which stay registered; the others do not.
        """
        known = [name for name in dict.fromkeys(names) if name in self._registered]
        refused = []
        for name in known:
            if code := self._engine.unregister_memory(self._registered[name]):
                refused.append((name, code))
            else:
                del self._registered[name]
        if refused:
            raise P2PError(f"{self.addr} cannot unregister {refused[:3]} (name, code)")
        return len(known)

    def names(self) -> list[str]:
        """The names of the tensors whose memory others may read."""
        return [*self._registered]

    def grant(self) -> Lease:
        """A lease on what is registered for one checkpoint."""
        if not self._free_slots:
            raise P2PError(f"more than {_SLOTS} checkpoints are registered for P2P")
        start = self._free_slots.pop(0) * _SLOT_BYTES
        content = secrets.token_bytes(_SLOT_BYTES)
        self._leases[start : start + _SLOT_BYTES] = content
        return Lease(ptr=self._page.data_ptr() + start, id=content.hex())

    def revoke(self, lease: Lease) -> None:
        """From now on every reader of ``lease`` fails. Called before the memory is touched."""
        start = lease.ptr - self._page.data_ptr()
        self._leases[start : start + _SLOT_BYTES] = bytes(_SLOT_BYTES)
        self._free_slots.append(start // _SLOT_BYTES)

    def batch_transfer_sync_read(
        self,
        target_hostname: str,
        buf_ptrs: Sequence[int],
        remote_ptrs: Sequence[int],
        lens: Sequence[int],
        *,
        memory: torch.Tensor | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Read ``lens[i]`` bytes at ``remote_ptrs[i]`` of ``target_hostname`` into ``buf_ptrs[i]``.

        Args:
            memory: what ``buf_ptrs`` point into. A read that fails or is ended may still write: the
                store then keeps ``memory`` alive until that is over. Without it, the caller must.
            check: called while waiting; ends the read by raising. Default: ten minutes.

        Raises:
            P2PError: the transfer failed.
        """
        slices = _slices(buf_ptrs, remote_ptrs, lens)
        read = _Read(self._engine, target_hostname, slices, memory)
        ends = Deadline(_LONGEST_READ)
        try:
            poll(read.advance, check or (lambda: ends.check(f"a read from {target_hostname}")))
        finally:
            self._keep_until_over(read)
        if read.failure:
            raise P2PError(
                f"{self.addr} cannot read {sum(lens)} bytes from {target_hostname}: Mooncake's "
                f"{read.failure}; is that source alive, and its checkpoint still registered?"
            )

    def check_lease(
        self, owner: str, lease: Lease, check: Callable[[], None] | None = None
    ) -> None:
        """Raise unless the owner still holds what ``lease`` was granted on.

        Args:
            check: as in ``batch_transfer_sync_read``.

        Raises:
            StaleSourceError: another checkpoint, or none, is in its place.
            P2PError: it is gone.
        """
        if self._read_slot(owner, lease, check)[: len(lease.id) // 2].hex() != lease.id:
            raise StaleSourceError(
                f"source {owner} has unregistered or replaced the checkpoint since these metas "
                "were made: get its current metas"
            )

    def _read_slot(self, owner: str, lease: Lease, check: Callable[[], None] | None) -> bytes:
        """The lease slot in the owner's memory."""
        seen = torch.zeros(_SLOT_BYTES, dtype=torch.uint8)
        # Mooncake keeps connections over which a source has refused something; the next read over
        # each of them fails at once.
        for stale in reversed(range(_RANGES_UNDER_WAY + 1)):
            began = time.monotonic()
            try:
                self.batch_transfer_sync_read(
                    owner, [seen.data_ptr()], [lease.ptr], [_SLOT_BYTES], memory=seen, check=check
                )
                break
            except P2PError:
                if stale == 0 or time.monotonic() - began > _AT_ONCE:
                    raise
        return bytes(seen.tolist())

    def may_still_write(self, memory: torch.Tensor) -> bool:
        """Whether bytes of a read that was given up may still arrive in this memory's storage."""
        place = memory.untyped_storage().data_ptr()
        self.release_finished()
        kept = [read.memory for read in self._unfinished if read.memory is not None]
        return any(one.untyped_storage().data_ptr() == place for one in kept)

    def release_finished(self) -> None:
        """Let go of the memory of reads that were given up and are over by now."""
        with self._unfinished_lock:
            self._unfinished = [one for one in self._unfinished if not one.is_over()]

    def close(self) -> None:
        """Unregister everything and let the engine go, which ends what is under way."""
        kept = [read.memory for read in self._unfinished]
        try:
            self.unregister_named_tensors(list(self._registered))
        finally:
            self._unfinished = []
            self._engine = None
            del kept  # only now can nothing be written any more

    def _keep_until_over(self, read: _Read) -> None:
        """Hold on to what a read that is given up may still write into; drop what is over."""
        read.settle()
        with self._unfinished_lock:
            self._unfinished = [one for one in (*self._unfinished, read) if not one.is_over()]
            if read in self._unfinished:
                logger.warning(
                    "{} bytes of memory are kept, and not used again, until a read from {} that "
                    "was given up is over: late bytes may still arrive in them",
                    0 if read.memory is None else read.memory.untyped_storage().nbytes(),
                    read.source,
                )

    def _register(self, name: str, ptr: int, nbytes: int) -> None:
        code = self._engine.register_memory(ptr, nbytes)
        if code != 0:
            raise P2PError(
                f"{self.addr} cannot register {nbytes} bytes of {name!r} for P2P ({self.protocol} "
                f"{self.device}): Mooncake's code {code}; check the memlock limit (ulimit -l)"
            )
        self._registered[name] = ptr


@dataclass(eq=False)
class _Read:
    """One read, cut into slices of which a few are under way at a time.

    Mooncake's synchronous calls keep a core busy and give up after half a minute.

    Attributes:
        slices: the local address, the remote one and the bytes of each.
        memory: where the bytes arrive.
    """

    engine: Any
    source: str
    slices: Iterator[tuple[int, int, int]]
    memory: torch.Tensor | None
    failure: str = ""
    under_way: dict[int, int] = field(default_factory=dict)
    """The bytes of each batch."""

    def advance(self) -> bool:
        """Start the next slices; returns whether all have arrived, or one failed."""
        self._look()
        while not self.failure and self._has_room():
            following = next(self.slices, None)
            if following is None:
                break
            self._start(*following)
        return bool(self.failure) or not self.under_way

    def _has_room(self) -> bool:
        nbytes = sum(self.under_way.values())
        return len(self.under_way) < _RANGES_UNDER_WAY and nbytes < _BYTES_UNDER_WAY

    def is_over(self) -> bool:
        """Whether nothing that was started can write any more."""
        self._look()
        return not self.under_way

    def settle(self) -> None:
        """Wait a little for what is under way."""
        ends = time.monotonic() + _LAST_SLICES
        while not self.is_over() and time.monotonic() < ends:
            time.sleep(0.0002)

    def _start(self, local: int, remote: int, nbytes: int) -> None:
        # A batch of its own: the status that Mooncake gives of a batch is that of its first slice.
        batch = self.engine.batch_transfer_async_read(self.source, [local], [remote], [nbytes])
        if batch == 0:
            self.failure = "code 0 (no transfer)"
        else:
            self.under_way[batch] = nbytes

    def _look(self) -> None:
        """Ask for each status, until it is final: then Mooncake has freed the batch."""
        codes = {batch: self.engine.transfer_check_status(batch) for batch in self.under_way}
        self.under_way = {b: n for b, n in self.under_way.items() if codes[b] not in _FINAL}
        failed = [code for code in codes.values() if code < 0]
        if failed:
            self.failure = f"code {failed[0]}"


def _slices(
    local: Sequence[int], remote: Sequence[int], lens: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    for to, source, nbytes in zip(local, remote, lens, strict=True):
        for start in range(0, nbytes, _SLICE_BYTES):
            yield to + start, source + start, min(_SLICE_BYTES, nbytes - start)


def _choose_protocol(device_manager: DeviceManager, device: str) -> str:
    if chosen := settings.p2p_protocol():
        return chosen
    if device_manager.device_type == "npu":
        return "ascend_direct"
    if not device:
        return "tcp"
    return "efa" if is_efa(device.split(",")) else "rdma"


def _start_engine(host: str, protocol: str, device: str) -> Any:
    """A started engine; tries again where a port was taken between choosing and using it."""
    if ":" in host:
        settings.set_unless_set("MC_USE_IPV6", "1")  # Mooncake reads it when it is loaded
    for attempt in range(_START_ATTEMPTS):
        if attempt:
            time.sleep(_FIRST_PAUSE * 2 ** (attempt - 1))
        engine = _import_engine()()
        is_last = attempt == _START_ATTEMPTS - 1
        with _confined_to(host), contextlib.nullcontext() if is_last else _unheard():
            code = engine.initialize(host, "P2PHANDSHAKE", protocol, device)
        if code == 0:
            return engine
        del engine  # it holds ports and threads
    raise RuntimeError(
        f"Mooncake's transfer engine does not start at {host} with protocol {protocol!r} and "
        f"device {device!r}: code {code}; PS_P2P_PROTOCOL=tcp avoids RDMA"
    )


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Mooncake logs no errors meanwhile. Each of its starts looks its own segment up before there
    is one, and logs "Local segment descriptor not found" (``TransferMetadata::getSegmentDesc``)."""
    module = sys.modules.get("mooncake.engine")
    try:
        level = ctypes.c_int.in_dll(ctypes.CDLL(getattr(module, "__file__", None)), _MIN_LEVEL)
    except ValueError:  # built with another glog, or replaced in a test
        yield
        return
    before, level.value = level.value, _FATAL
    try:
        yield
    finally:
        level.value = before


@contextlib.contextmanager
def _confined_to(host: str) -> Iterator[None]:
    """Whatever Mooncake begins to listen at meanwhile, on every interface and without asking who
    is there, is reachable at ``host`` alone: it has no option for that."""
    with _starting:
        before = {inode for inode, _ in open_listeners()}
        yield
        for inode, listener in open_listeners():
            # Another thread of this program may have begun to listen at the same time.
            if inode in before or listener.getsockname()[1] not in _PORTS:
                continue
            try:
                listen_only_at(listener, host)
            except (OSError, ValueError) as error:
                logger.warning("P2P can be reached on every interface of this host: {}", error)


def _import_engine() -> Any:
    # Its failures reach us as codes; the rest is noise on every rank.
    settings.set_unless_set("MC_LOG_LEVEL", "ERROR")
    try:
        from mooncake.engine import TransferEngine
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "Mooncake is not installed: pip install 'checkpoint-engine[p2p]', or "
            "mooncake-transfer-engine-non-cuda on a machine without CUDA"
        ) from error
    except ImportError as error:
        raise RuntimeError(
            f"Mooncake cannot be loaded: {error}; {loading_advice(error)}"
        ) from error
    return TransferEngine


def loading_advice(error: ImportError) -> str:
    """What to do where Mooncake is installed and does not load."""
    if "libcu" in str(error):
        return (
            "this wheel is for CUDA, which is not here: pip uninstall mooncake-transfer-engine, "
            "pip install mooncake-transfer-engine-non-cuda"
        )
    return "on Debian and Ubuntu it needs the packages libibverbs1 and libnuma1"
