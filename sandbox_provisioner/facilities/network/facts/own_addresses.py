"""own_addresses.py - whoever launches; reads only: the addresses of this machine and of its hub."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from urllib.parse import urlsplit

# proc_net(5) has them, and getifaddrs(3) is not in Python's library.
_IPV4, _IPV6 = Path("/proc/self/net/fib_trie"), Path("/proc/self/net/if_inet6")
# A router has a million routes there; who dials asks Linux once more of each address.
_MOST_BYTES = 1 << 20
_LOCAL = re.compile(r"\|-- ([\d.]+)\n(?:\s+/\d+ .*\n)*?\s+/32 host LOCAL\n", re.ASCII)


def own_addresses(ipv4: Path = _IPV4, ipv6: Path = _IPV6) -> list[str]:
    """All of them, as text, but for those that every machine has. Where there is no file of a
    family this machine does not have that family."""
    found: set[str] = set()
    with contextlib.suppress(FileNotFoundError), ipv4.open() as file:
        found.update(_LOCAL.findall(file.read(_MOST_BYTES)))
    with contextlib.suppress(FileNotFoundError):
        lines = ipv6.read_text().splitlines()
        found.update(str(IPv6Address(int(line.split()[0], 16))) for line in lines)
    return sorted(text for text in found if not _is_everywhere(ip_address(text)))


def hub_addresses(environment: Mapping[str, str], warn: Callable[[str], None]) -> list[str]:
    """Those of the hub that has started a server with *environment*; none where there is none.
    Asks a name server perhaps; *warn* is told where there is a hub, and nobody knows it now."""
    url = environment.get("JUPYTERHUB_API_URL", "")
    try:
        host = urlsplit(url).hostname
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM) if host else []
    except (ValueError, OSError) as error:
        warn(
            f"The hub at {url} cannot be found now ({error}): a kernel can reach it where "
            'network_allow has "all", or a network that it is in.'
        )
        return []
    return sorted({str(where[0]).partition("%")[0] for *_, where in found})


def _is_everywhere(address: IPv4Address | IPv6Address) -> bool:
    return address.is_loopback or address.is_link_local
