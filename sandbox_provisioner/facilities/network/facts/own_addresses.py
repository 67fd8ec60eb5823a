"""own_addresses.py - whoever launches; reads only: by which addresses this machine is reached."""

from __future__ import annotations

import contextlib
import re
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

# proc_net(5) has them, and getifaddrs(3) is not in Python's library.
_IPV4, _IPV6 = Path("/proc/self/net/fib_trie"), Path("/proc/self/net/if_inet6")
_LOCAL = re.compile(r"\|-- ([\d.]+)\n(?:\s+/\d+ .*\n)*?\s+/32 host LOCAL\n", re.ASCII)


def own_addresses(ipv4: Path = _IPV4, ipv6: Path = _IPV6) -> list[str]:
    """All of them, as text, but for those that every machine has. Where there is no file of a
    family this machine does not have that family."""
    found: set[str] = set()
    with contextlib.suppress(FileNotFoundError):
        found.update(_LOCAL.findall(ipv4.read_text()))
    with contextlib.suppress(FileNotFoundError):
        lines = ipv6.read_text().splitlines()
        found.update(str(IPv6Address(int(line.split()[0], 16))) for line in lines)
    return sorted(text for text in found if not _is_everywhere(ip_address(text)))


def _is_everywhere(address: IPv4Address | IPv6Address) -> bool:
    return address.is_loopback or address.is_link_local
