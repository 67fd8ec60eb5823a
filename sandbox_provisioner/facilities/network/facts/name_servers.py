"""name_servers.py - whoever launches; reads only: whom this machine asks for names.

A box with a card asks the same servers. Where the machine asks itself, at an address that a box
cannot reach, systemd-resolved has a file with those that it asks in turn.
"""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.network.wish.addresses import Address, read_address

_RESOLV = Path("/etc/resolv.conf")
_BEHIND_IT = Path("/run/systemd/resolve/resolv.conf")
_MOST = 3  # resolv.conf(5): MAXNS


def name_servers(
    path: Path = _RESOLV, behind: Path = _BEHIND_IT, *, ipv6: bool = False
) -> tuple[Address, ...]:
    """Name servers that a box may ask, by IPv4, or with *ipv6* by that, too; () where this machine
    has none at all. HostError where it asks only itself."""
    found = _named_in(path)
    if found and all(address.is_loopback for address in found):
        found = _named_in(behind)
        if not found or all(address.is_loopback for address in found):
            raise HostError(
                attempt="find a name server that a kernel with a network card can ask",
                answer=f"{path} names only this machine itself, which a kernel cannot reach",
                remedy=f"Name a server of your network in {path}, use systemd-resolved, which "
                f'tells of those behind it in {behind}, or set network = "gateway".',
            )
    usable = [
        address for address in found
        if (ipv6 or isinstance(address, IPv4Address))
        and not (address.is_loopback or address.is_link_local)
    ]  # fmt: skip
    return tuple(usable[:_MOST])


def _named_in(path: Path) -> list[Address]:
    """The addresses behind "nameserver"; [] without such a file."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    words = [line.split() for line in lines]
    named = [line[1] for line in words if len(line) > 1 and line[0] == "nameserver"]
    # What is no address the C library leaves out as well.
    return [found for text in named if (found := read_address(text.partition("%")[0]))]
