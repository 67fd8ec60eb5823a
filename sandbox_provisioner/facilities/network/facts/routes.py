"""routes.py - whoever launches; reads only: by which way this machine reaches others.

proc_net(5): the main table of IPv4, of the network namespace of the calling thread.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

_ROUTES = Path("/proc/thread-self/net/route")
_SETTINGS = Path("/proc/sys/net/ipv4/conf")
_UP = 0x1  # RTF_UP


@dataclass(frozen=True, slots=True)
class Route:
    """Packets to *block* leave by *interface*; the default route's block is everything."""

    block: IPv4Network
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


def _address(text: str) -> IPv4Address:
    """Four bytes in the machine's order, in hexadecimal."""
    return IPv4Address(struct.pack("=I", int(text, 16)))


def uplink(found: list[Route]) -> str:
    """The interface by which the machine reaches the world; "" where it does not."""
    return next((route.interface for route in found if not route.block.prefixlen), "")


def forwards(interface: str, settings: Path = _SETTINGS) -> bool:
    """Whether Linux hands on what comes in there for others."""
    return (settings / interface / "forwarding").read_text().strip() == "1"
