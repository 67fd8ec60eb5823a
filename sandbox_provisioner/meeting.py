"""meeting.py - any process outside: a folder of unix sockets where a kernel and its clients meet.

The folder lies in that of the sandbox's record. The kernel binds its five sockets in it, under the
path at which it shows inside; then init seals it, and clients connect from outside.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sandbox_provisioner.plan import SOCKET_NAMES

PORTS = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")


@dataclass(frozen=True, slots=True)
class SocketFolder:
    """A `contract.MeetingPlace`: *outside* is the folder, *inside* the path at which the kernel
    sees it, *connections* the folder in which it sees its connection file. *links*, which were made
    elsewhere, go with the sandbox."""

    outside: Path
    inside: str
    connections: str
    links: list[Path] = field(default_factory=list)

    @property
    def for_clients(self) -> Mapping[str, str | int]:
        """Transport, ip and ports by which clients connect, as a connection file names them."""
        return _connection(str(self.outside))

    @property
    def for_kernel(self) -> Mapping[str, str | int]:
        """The same as the kernel has to bind them."""
        return _connection(self.inside)

    def connection_file(self, name: str) -> str:
        """The path at which the kernel reads its connection file *name*."""
        return f"{self.connections}/{name}"

    def mistake(self) -> str:
        """What is there besides the five sockets, or in their place; "" if nothing is. Init has
        looked at this from inside; here it is the server's own word."""
        try:
            with os.scandir(self.outside) as entries:
                found = [entry.name for entry, _ in zip(entries, range(10), strict=False)]
            right = sorted(found) == sorted(SOCKET_NAMES) and all(
                stat.S_ISSOCK(os.lstat(self.outside / name).st_mode) for name in found
            )
        except OSError:  # somebody removes them meanwhile
            right = False
        return "" if right else f"there is something else than its sockets in {self.outside}"

    def link(self, ip: str, ports: Mapping[str, int]) -> None:
        """Where the caller chose the *ip*: a symbolic link a socket, which connect(2) follows."""
        if ip == self.for_clients["ip"]:
            return
        for name, socket_name in zip(PORTS, SOCKET_NAMES, strict=True):
            link = Path(f"{ip}-{ports[name]}")
            link.unlink(missing_ok=True)
            link.symlink_to(self.outside / socket_name)
            self.links.append(link)


def _connection(folder: str) -> dict[str, str | int]:
    numbers = {name: number for number, name in enumerate(PORTS, 1)}
    return {"transport": "ipc", "ip": f"{folder}/s", **numbers}
