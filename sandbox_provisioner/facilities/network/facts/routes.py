"""routes.py - whoever launches; reads only: by which way this machine reaches others.

proc_net(5): the main table of IPv4, and all of IPv6, of the calling thread's network namespace.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path

from sandbox_provisioner.facilities.network.wish.addresses import Block

_ROUTES = Path("/proc/thread-self/net/route")
_ROUTES_IPV6 = Path("/proc/thread-self/net/ipv6_route")
_SETTINGS = Path("/proc/sys/net/ipv4/conf")
_FORWARDS_IPV6 = Path("/proc/sys/net/ipv6/conf/all/forwarding")
_UP = 0x1  # RTF_UP


@dataclass(frozen=True, slots=True)
class Route:
    """Packets to *block* leave by *interface*; the default route's block is everything."""

    block: Block
    interface: str


def routes(path: Path = _ROUTES) -> list[Route]:
    """All routes, the default one with the least metric before other default ones."""
    lines = path.read_text().splitlines()[1:]
    found = sorted(map(str.split, lines), key=lambda words: int(words[6]))
    return [
        Route(IPv4Network((_address(words[1]), str(_address(words[7])))), words[0])
        for words in found
        if int(words[3], 16) & _UP
    ]


def routes_ipv6(path: Path = _ROUTES_IPV6) -> list[Route]:
    """Those of IPv6, in no order; of an address of the machine's own the interface is lo."""
    found = map(str.split, path.read_text().splitlines())
    return [
        Route(IPv6Network((int(words[0], 16), int(words[1], 16)), strict=False), words[9])
        for words in found
        if int(words[8], 16) & _UP
    ]


def _address(text: str) -> IPv4Address:
    """Four bytes in the machine's order, in hexadecimal."""
    return IPv4Address(struct.pack("=I", int(text, 16)))


def uplink(found: list[Route]) -> str:
    """The interface by which the machine reaches the world; "" where it does not."""
    return next((route.interface for route in found if not route.block.prefixlen), "")


def forwards(interface: str, settings: Path = _SETTINGS) -> bool:
    """Whether Linux hands on what comes in there for others."""
    return (settings / interface / "forwarding").read_text().strip() == "1"


def forwards_ipv6(setting: Path = _FORWARDS_IPV6) -> bool:
    """Whether it hands on packets of IPv6, which is one setting for all interfaces (ip-sysctl)."""
    return setting.read_text().strip() == "1"
