"""The sockets of this process, for libraries that do not show their own, who is at the other
end, and free ports."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import ipaddress
import os
import random
import selectors
import socket
import stat
import struct
import time
from collections.abc import Callable, Collection, Iterator

# Of classic BPF, see linux/filter.h: load a word, jump if it equals, return.
_LOAD, _JUMP_UNLESS_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NETWORK_HEADER, _PROTOCOL = 0xFFF00000, 0xFFFFF000  # SKF_NET_OFF; SKF_AD_OFF + SKF_AD_PROTOCOL
_DESTINATION = {4: (0x0800, 16), 6: (0x86DD, 24)}  # EtherType, offset of the address in the header
_ATTACH_FILTER = 26  # SO_ATTACH_FILTER, which Python does not name
_WHOLE_PACKET, _NOTHING = 0xFFFFFFFF, 0
_LOOK = 0.05  # seconds between two checks


def free_port_pair() -> int:
    """A free port of this host whose successor, where ranks meet, is free as well. Not one of those
    that the kernel gives to connections: the next might be taken by then."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000, 2)
        with contextlib.suppress(OSError), socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 1))
            return port


def is_of_this_user(connection: socket.socket) -> bool:
    """Whether a process of this one's user made the other end of a Unix socket."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", packed)
    return bool(uid == os.geteuid())


def unreachable(
    addresses: Collection[str], seconds: float, check: Callable[[], None]
) -> dict[str, str]:
    """Why nobody takes a TCP connection, of those ``host:port`` where nobody does in time. All are
    tried at once.

    Args:
        check: called while waiting; ends the wait by raising.
    """
    ends, failed = time.monotonic() + seconds, {}
    with contextlib.ExitStack() as held:
        selector = held.enter_context(selectors.DefaultSelector())
        for address in addresses:
            host, _, port = address.rpartition(":")
            family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
            one = held.enter_context(socket.socket(family))
            one.setblocking(False)
            try:
                code = one.connect_ex((host.strip("[]"), int(port)))
                if code not in (0, errno.EINPROGRESS):
                    failed[address] = os.strerror(code)
                    continue
                selector.register(one, selectors.EVENT_WRITE, address)
            except (OSError, ValueError) as error:  # no such name, or no port
                failed[address] = str(error)
        while selector.get_map() and time.monotonic() < ends:
            check()
            for key, _ in selector.select(_LOOK):
                selector.unregister(key.fileobj)
                one = key.fileobj  # type: ignore[assignment]  # all are sockets
                if code := one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    failed[key.data] = os.strerror(code)
        late = [key.data for key in selector.get_map().values()]
    return failed | dict.fromkeys(late, f"no answer within {seconds:g} s")


def connections() -> Iterator[socket.socket]:
    """Each TCP connection of this process, as a descriptor that is closed when the next is taken:
    keep a duplicate."""
    for one in _tcp_sockets():
        with contextlib.suppress(OSError):  # not connected
            if one.getpeername():
                yield one


def open_listeners() -> Iterator[tuple[int, socket.socket]]:
    """Each TCP socket of this process that listens on every interface, with its inode; its
    descriptor is closed when the next is taken."""
    for one in _tcp_sockets():
        is_listening = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if is_listening and ipaddress.ip_address(one.getsockname()[0]).is_unspecified:
            yield os.fstat(one.fileno()).st_ino, one


def listen_only_at(listener: socket.socket, address: str) -> None:
    """Have the kernel drop what is sent to a listening socket at another address of this host, as
    if the socket had been bound to ``address``. Connections that it accepts inherit that. Raises
    ``OSError`` where there are no socket filters."""
    ours = ipaddress.ip_address(address)
    protocol, offset = _DESTINATION[ours.version]
    words = enumerate(struct.unpack(f"!{len(ours.packed) // 4}I", ours.packed))
    places = [(_NETWORK_HEADER + offset + 4 * at, word) for at, word in words]
    wanted = [(_PROTOCOL, protocol), *places]
    program = [(_RETURN, 0, 0, _WHOLE_PACKET), (_RETURN, 0, 0, _NOTHING)]
    for place, value in reversed(wanted):
        skip = len(program) - 1  # to the last one
        program[:0] = [(_LOAD, 0, 0, place), (_JUMP_UNLESS_EQUAL, 0, skip, value)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in program))
    option = struct.pack("HP", len(program), ctypes.addressof(code))
    listener.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, option)


def _tcp_sockets() -> Iterator[socket.socket]:
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # closed meanwhile
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                with socket.socket(fileno=os.dup(fd)) as one:
                    if one.family in (socket.AF_INET, socket.AF_INET6):
                        yield one
