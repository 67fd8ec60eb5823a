"""links.py - in the launching process: the pair of interfaces, as messages for Linux.

They are compiled before there is a box, by pyroute2, which knows their formats; then `maker.py`
sends them as they are. So what waits for a card waits for Linux alone. The import of pyroute2 takes
0.2 s: only who makes a card loads this file.
"""

from __future__ import annotations

import functools
import socket
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from pyroute2 import IPBatch

from sandbox_provisioner.facilities.network.card.addresses import (
    GATEWAY,
    GATEWAY_IPV6,
    INSIDE,
    mac_of_box,
    mac_of_host,
    shown_mac,
)
from sandbox_provisioner.facilities.network.card.ruleset import (
    FIRST,
    MARK,
    PROHIBIT_ROUTE,
    SECOND,
)
from sandbox_provisioner.facilities.network.plan.netlink import (
    ACK,
    REQUEST,
    ROUTE,
    Messages,
    numbered,
)
from sandbox_provisioner.facilities.network.wish.addresses import Address, Block

_UP, _NO_ARP = 0x1, 0x80  # IFF_NOARP: it speaks no ARP, and drops what it hears of it
_MAIN = 254
# What TBF lets pass at once, and how much may wait.
_BURST_SECONDS, _QUEUE_SECONDS = 0.02, 0.1
_MOST_BYTES_A_SECOND = (1 << 32) - 1
_HEADER = struct.Struct("=IHHII")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A pair that shall be: *name* is that of the host's end, and *host* the namespace that it goes
    to, as seen from the box. *up_bits* may leave the box in a second, *down_bits* reach it; 0 is no
    limit. Without *ipv6* it has no address of that."""

    address: IPv4Address
    ipv6: IPv6Address | None = None
    name: str
    host: int
    mtu: int
    up_bits: int
    down_bits: int

    @property
    def own(self) -> list[tuple[Address, Address]]:
        """All its addresses, each with the neighbour that the box has for the world."""
        found: list[tuple[Address, Address]] = [(self.address, GATEWAY)]
        return [*found, (self.ipv6, GATEWAY_IPV6)] if self.ipv6 else found


Request = tuple[str, Callable[[Any], object]]


def compiled(requests: Iterable[Request]) -> Messages:
    """Messages that Linux does in their order: what each does, and the call of pyroute2 for it."""
    names, text = [], b""
    with IPBatch() as batch:
        for name, call in requests:
            call(batch)
            names.append(name)
            text += _numbered(bytes(batch.batch), len(names))
            batch.reset()
    return Messages(ROUTE, text, tuple(names))


def _numbered(compiled_one: bytes, number: int) -> bytes:
    _, kind, flags, _, _ = _HEADER.unpack_from(compiled_one)
    return numbered(kind, flags | REQUEST | ACK, compiled_one[_HEADER.size :], number)


def index_of(address: IPv4Address) -> int:
    """The number of both interfaces of *address*, each in its namespace: given before they are
    made, so that messages about them can be compiled. Linux gives such large ones to nobody."""
    return 1 << 29 | int(address) & (1 << 29) - 1


def making(pair: Pair) -> Messages:
    """From the box's namespace: make the pair, both ends down."""
    index, name = index_of(pair.address), f"{INSIDE} of {pair.name}"
    own = {"ifname": INSIDE, "index": index, "address": shown_mac(mac_of_box(pair.address))}
    peer = _peer_on_host(pair)
    make = (f"make {name}", lambda b: b.link("add", mtu=pair.mtu, IFLA_LINKINFO=peer, **own))
    return compiled([make])


def in_box(pair: Pair) -> Messages:
    """Then there: set up the box's end, of which the settings are written."""
    index, name = index_of(pair.address), f"{INSIDE} of {pair.name}"
    requests = [
        *_shape(index, name, pair.up_bits, pair.mtu),
        _up(index, name),
    ]
    for own, gateway in pair.own:
        requests += [
            _add(f"give {name} {own}", "addr", index=index, address=str(own), prefixlen=_all(own)),
            _neighbour(index, name, gateway, mac_of_host(pair.address)),
            _add(
                f"route all of {name} to {gateway}", "route", dst="default", gateway=str(gateway),
                oif=index, flags=["onlink"], family=_FAMILIES[own.version],
            ),
        ]  # fmt: skip
    return compiled(requests)


_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


def _add(name: str, what: str, **asked: Any) -> Request:
    return name, lambda b: getattr(b, what)("add", **asked)


def _up(index: int, name: str) -> Request:
    return f"bring {name} up", lambda b: b.link("set", index=index, **_RUNNING)


def _neighbour(index: int, name: str, whom: Address, mac: bytes) -> Request:
    fixed = {"ifindex": index, "state": "permanent", "family": _FAMILIES[whom.version]}
    return _add(f"tell {name} of {whom}", "neigh", dst=str(whom), lladdr=shown_mac(mac), **fixed)


def _all(address: Address) -> int:
    return address.max_prefixlen


def _peer_on_host(pair: Pair) -> dict[str, Any]:
    """In full, since pyroute2 gives a peer no number of its own."""
    names = [
        ["IFLA_IFNAME", pair.name],
        ["IFLA_NET_NS_FD", pair.host],
        ["IFLA_ADDRESS", shown_mac(mac_of_host(pair.address))],
        ["IFLA_MTU", pair.mtu],
    ]
    peer = ["VETH_INFO_PEER", {"index": index_of(pair.address), "attrs": names}]
    return {"attrs": [["IFLA_INFO_KIND", "veth"], ["IFLA_INFO_DATA", {"attrs": [peer]}]]}


_RUNNING = {"flags": _UP | _NO_ARP, "change": _UP | _NO_ARP}


def on_host(pair: Pair) -> Messages:
    """Then on the host: set up its end; what goes to the addresses leaves by it, to the one
    neighbour that it has."""
    index, name = index_of(pair.address), pair.name
    requests = [
        *_shape(index, name, pair.down_bits, pair.mtu),
        _up(index, name),
    ]
    for own, _ in pair.own:
        scope = {"scope": "link"} if own.version == 4 else {}  # IPv6 routes have none
        requests += [
            _neighbour(index, name, own, mac_of_box(pair.address)),
            _add(
                f"route {own} to {name}", "route", dst=f"{own}/{_all(own)}", oif=index,
                family=_FAMILIES[own.version], **scope,
            ),
        ]  # fmt: skip
    return compiled(requests)


def _shape(index: int, name: str, bits: int, mtu: int) -> list[Request]:
    """Let no more than *bits* leave in a second: tc-tbf(8). Before the interface is up, since Linux
    waits for all CPUs where it changes the queue of one that is."""
    if not bits:
        return []
    rate = min(bits // 8, _MOST_BYTES_A_SECOND)
    burst = max(int(rate * _BURST_SECONDS), 2 * mtu)
    limit = burst + max(int(rate * _QUEUE_SECONDS), 10 * mtu)
    queue = {"handle": 0x10000, "rate": rate, "burst": burst, "limit": limit}
    what = f"shape {name} to {bits} bits a second"
    return [(what, lambda b: b.tc("add", "tbf", index=index, **queue))]


def deletion(pair: Pair) -> Messages:
    """Delete both ends."""
    index = index_of(pair.address)
    return compiled([(f"delete {pair.name}", lambda b: b.link("del", index=index))])


def guards(pool: Block) -> tuple[Messages, ...]:
    """Rules of routing: what comes from *pool* without our mark goes nowhere. What this host sends
    for one of its addresses (a refusal, between two boxes) has no mark, and comes by `lo`."""
    source: dict[str, Any] = {"src": str(pool.network_address), "src_len": pool.prefixlen}
    source["family"] = _FAMILIES[pool.version]
    marked = {"fwmark": 0, "fwmask": MARK, "action": PROHIBIT_ROUTE}
    own = {"iifname": "lo", "table": _MAIN}
    return tuple(
        compiled([(f"add a rule of routing for {pool}", functools.partial(_add_rule, **rule))])
        for rule in (
            {"priority": FIRST, **source, **own},
            {"priority": SECOND, **source, **marked},
        )
    )


def _add_rule(batch: Any, **rule: Any) -> None:
    batch.rule("add", **rule)
