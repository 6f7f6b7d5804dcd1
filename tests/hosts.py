"""Hosts of a small network, made of namespaces: each with an address, a host name and processes of
its own. They are joined by a bridge and share the file system."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from torchrun import Forked, ranks_of, results_in, socket_folder

MASTER_PORT = 29500  # every port of a new host is free
_NETWORK = "10.77.0"
_GATEWAY = f"{_NETWORK}.254"
_TOOLS = ("ip", "tc", "unshare", "nsenter")


class HostsUnavailableError(Exception):
    """This machine cannot make hosts; the text says what it lacks."""


class _Namespaces:
    """New namespaces, held by a process that ends with this one, however that ends."""

    def __init__(self, kinds: Sequence[str], owner: _Namespaces | None = None) -> None:
        """``owner``: whose user namespace they belong to, where this process is not root."""
        self._kinds = kinds
        self._owned = owner is not None or os.geteuid() != 0
        command = [] if owner is None else owner.entry(user_only=True)
        command += ["unshare", *(f"--{kind}" for kind in kinds)]
        if owner is None and self._owned:
            command += ["--user", "--map-root-user"]
        if "pid" in kinds:
            command += ["--fork", "--kill-child", "--mount-proc"]
        self._holder = subprocess.Popen(
            [*command, "sh", "-c", "echo; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        if not self._holder.stdout.readline():
            _, error = self._holder.communicate()
            raise HostsUnavailableError(
                "making hosts needs root (CAP_SYS_ADMIN), or user namespaces that anyone may "
                f"create: {error.strip()}"
            )
        self.pid = self._holder.pid if "pid" not in kinds else _child_of(self._holder.pid)

    def entry(self, user_only: bool = False) -> list[str]:
        """What to put before a command, so that it runs in here."""
        user = ["--user", "--preserve-credentials"] if self._owned else []
        kinds = [] if user_only else [f"--{kind}" for kind in self._kinds]
        return ["nsenter", "--target", str(self.pid), *user, *kinds] if user + kinds else []

    def files(self) -> list[str]:
        """What ``setns`` takes, in its order."""
        kinds = [*(["user"] if self._owned else []), *self._kinds]
        names = {"mount": "mnt"}
        return [f"/proc/{self.pid}/ns/{names.get(kind, kind)}" for kind in kinds]

    def shell(self, script: str) -> None:
        subprocess.run([*self.entry(), "sh", "-ec", script], check=True, timeout=20)

    def close(self) -> None:
        """Ends every process in a pid namespace along with it."""
        with contextlib.suppress(OSError):
            os.kill(self.pid, 9)
        self._holder.communicate(timeout=20)


def _child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


class Host:
    """One host of a ``Network``."""

    def __init__(
        self, address: str, number: int, switch: _Namespaces, names: Path, network: ExitStack
    ) -> None:
        self.address = address
        self._plug = f"host-{number}"
        self._switch = switch
        self._inside = _Namespaces(("net", "uts", "mount", "pid"), owner=_owner(switch))
        network.callback(self._inside.close)
        switch.shell(
            f"ip link add name {self._plug} type veth peer name eth0 netns {self._inside.pid}; "
            f"ip link set {self._plug} master lan up"
        )
        self._inside.shell(
            f"hostname host-{number}; ip link set lo up; {_address(address)}; ip link set eth0 up; "
            f"{'' if ':' in address else f'ip route add default via {_GATEWAY}; '}"
            f"mount --bind {names} /etc/hosts; mount --bind /dev/null /etc/resolv.conf"
        )

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a command on this host; it ends with the network at the latest."""
        return subprocess.Popen([*self._inside.entry(), *command], text=True, **options)

    def namespaces(self) -> list[str]:
        """For ``Forked``."""
        return self._inside.files()

    def slow_down(self, megabits: int) -> None:
        """From now on it sends no faster than that, in Mbit/s."""
        self._inside.shell(
            f"tc qdisc replace dev eth0 root tbf rate {megabits}mbit burst 64kb latency 100ms"
        )

    def full_speed(self) -> None:
        self._inside.shell("tc qdisc del dev eth0 root")

    def unplug(self) -> None:
        """Pull the cable: nothing arrives or leaves, and nobody is told."""
        self._switch.shell(f"ip link set {self._plug} down")

    def plug_in(self) -> None:
        self._switch.shell(f"ip link set {self._plug} up")

    def bytes_sent(self) -> int:
        for line in Path(f"/proc/{self._inside.pid}/net/dev").read_text().splitlines():
            if line.strip().startswith("eth0:"):
                return int(line.split(":")[1].split()[8])
        raise AssertionError(f"{self._plug} has no eth0")


def _address(address: str) -> str:
    if ":" in address:
        return f"ip addr add {address}/64 dev eth0 nodad"
    return f"ip addr add {address}/24 dev eth0"


def _owner(switch: _Namespaces) -> _Namespaces | None:
    return None if os.geteuid() == 0 else switch


class Network:
    """Hosts joined by a bridge; nothing of them can be seen from outside, or outlives this."""

    def __init__(self, hosts: int, ipv6: bool = False) -> None:
        """``ipv6``: and no other. Raises ``HostsUnavailableError`` where the machine cannot make
        them."""
        missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
        if missing:
            raise HostsUnavailableError(
                f"making hosts needs {missing}: install iproute2 and util-linux"
            )
        with ExitStack() as stack:
            switch = _Namespaces(("net",))
            stack.callback(switch.close)
            switch.shell(
                "ip link add name lan type bridge; ip link set lan up; "
                f"ip addr add {_GATEWAY}/24 dev lan"
            )
            names = Path(stack.enter_context(tempfile.TemporaryDirectory()), "hosts")
            prefix = "fd77::" if ipv6 else f"{_NETWORK}."
            addresses = {number: f"{prefix}{number}" for number in range(1, hosts + 1)}
            entries = [f"{address} host-{number}\n" for number, address in addresses.items()]
            names.write_text("".join(["127.0.0.1 localhost\n", *entries]))
            self.hosts = [Host(a, number, switch, names, stack) for number, a in addresses.items()]
            self._stack = stack.pop_all()

    def __enter__(self) -> list[Host]:
        return self.hosts

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()


class World:
    """A program on so many ranks of each of some hosts; the first has rank 0."""

    def __init__(
        self,
        hosts: Sequence[Host],
        folder: Path,
        command: Sequence[str],
        ranks_each: int,
        env: dict[str, str],
    ) -> None:
        """``command``: a Python script and its arguments; one more is the folder for results."""
        self._ranks = ranks_each * len(hosts)
        self._results = folder / "results"
        self._results.mkdir(parents=True)
        shared = {"PS_IPC_DIR": socket_folder(self), "MASTER_ADDR": hosts[0].address, **env}
        shared["MASTER_PORT"] = str(MASTER_PORT)
        self.variables = shared
        self._parts = [
            Forked(
                folder / str(place),
                [*command, str(self._results)],
                [own | shared for own in ranks_of(self._ranks, ranks_each, place)],
                host.namespaces(),
            )
            for place, host in enumerate(hosts)
        ]

    def wait(self, timeout: float = 50) -> list[dict[str, Any]]:
        """Every rank's result, in rank order. Fails with the whole output if a rank fails."""
        for part in self._parts:
            part.join(timeout)
        return results_in(self._results, self._ranks)

    @property
    def running(self) -> bool:
        return all(part.is_running() for part in self._parts)

    def output(self) -> str:
        return "\n".join(part.output() for part in self._parts)
