"""local.py - pure: what makes every address the box's own, as messages of rtnetlink(7).

A route of type "local" for all addresses: whatever a program sends to comes back through the
loopback interface, to who listens inside. Nothing can leave, since there is nothing else.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address

from sandbox_provisioner.facilities.network.plan.netlink import (
    ACK,
    CREATE,
    EXCLUSIVE,
    REQUEST,
    ROUTE,
    Messages,
    attribute,
    numbered,
)

# The C library, asked with AI_ADDRCONFIG, finds addresses of a family only where an interface has
# one that is no loopback address (getaddrinfo(3)). The first is made for that: RFC 7600, 4.8.
OWN_IPV4, OWN_IPV6 = IPv4Address("192.0.0.8"), IPv6Address("fd53:616e:6462:6f77::1")
# Where programs appear to come from, so that answers are plain loopback traffic.
_FROM = {4: IPv4Address("127.0.0.1").packed, 6: IPv6Address("::1").packed}
_FAMILIES = {4: 2, 6: 10}  # AF_INET, AF_INET6
_LOOPBACK = 1  # the first interface of each network namespace
_NEWADDR, _NEWROUTE, _DELROUTE = 20, 24, 25
# linux/rtnetlink.h: the table "local", made at boot, in this host; a route that delivers here.
_TABLE_LOCAL, _PROTOCOL_BOOT, _SCOPE_HOST, _TYPE_LOCAL = 255, 3, 254, 2
_IFA_ADDRESS, _IFA_LOCAL, _RTA_INTERFACE, _RTA_SOURCE = 1, 2, 4, 7
_FLAGS = REQUEST | ACK | CREATE | EXCLUSIVE


@lru_cache
def every_address_is_ours(*, ipv6: bool) -> Messages:
    """An address that is no loopback address, and the route, for each family that there is."""
    own: tuple[IPv4Address | IPv6Address, ...] = (OWN_IPV4, OWN_IPV6) if ipv6 else (OWN_IPV4,)
    parts = [(f"address {address} of lo", _NEWADDR, _address(address)) for address in own]
    for version in (address.version for address in own):
        everything = "0.0.0.0/0" if version == 4 else "::/0"
        parts.append((f"route local {everything} dev lo", _NEWROUTE, _route(version)))
    data = b"".join(
        numbered(kind, _FLAGS, body, number) for number, (_, kind, body) in enumerate(parts, 1)
    )
    return Messages(ROUTE, data, tuple(name for name, _, _ in parts))


def no_address_is_ours() -> tuple[Messages, ...]:
    """What takes the routes away again, each apart: there may be none of IPv6."""
    return tuple(
        Messages(
            ROUTE,
            numbered(_DELROUTE, REQUEST | ACK, _route(version), 1),
            (f"delete the local route of IPv{version}",),
        )
        for version in _FAMILIES
    )


def _address(address: IPv4Address | IPv6Address) -> bytes:
    """struct ifaddrmsg, for this one address."""
    family, data = _FAMILIES[address.version], address.packed
    head = struct.pack("=BBBBI", family, address.max_prefixlen, 0, 0, _LOOPBACK)
    return head + attribute(_IFA_LOCAL, data) + attribute(_IFA_ADDRESS, data)


def _route(version: int) -> bytes:
    """struct rtmsg; the length of the prefix is 0."""
    kind = _TABLE_LOCAL, _PROTOCOL_BOOT, _SCOPE_HOST, _TYPE_LOCAL
    head = struct.pack("=BBBBBBBBI", _FAMILIES[version], 0, 0, 0, *kind, 0)
    interface = attribute(_RTA_INTERFACE, struct.pack("=I", _LOOPBACK))
    return head + interface + attribute(_RTA_SOURCE, _FROM[version])
