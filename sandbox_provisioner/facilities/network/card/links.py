"""links.py - in the launching process: the pair of interfaces, as messages for Linux.

They are compiled before there is a box, by pyroute2, which knows their formats; then `maker.py`
sends them as they are. So what waits for a card waits for Linux alone. The import of pyroute2 takes
0.2 s: only who makes a card loads this file.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from pyroute2 import IPBatch

from sandbox_provisioner.facilities.network.card.addresses import (
    GATEWAY,
    INSIDE,
    mac_of_box,
    mac_of_host,
    shown_mac,
)
from sandbox_provisioner.facilities.network.card.ruleset import MARK
from sandbox_provisioner.facilities.network.plan.netlink import (
    ACK,
    REQUEST,
    ROUTE,
    Messages,
    numbered,
)

_UP, _NO_ARP = 0x1, 0x80  # IFF_NOARP: it speaks no ARP, and drops what it hears of it
# Before those of anybody else, since the first that decides does; 0 is Linux's own, for `local`.
_FIRST, _SECOND = 1, 2
_MAIN = 254
_PROHIBIT = 8  # FR_ACT_PROHIBIT: the sender is told
# What TBF lets pass at once, and how much may wait.
_BURST_SECONDS, _QUEUE_SECONDS = 0.02, 0.1
_MOST_BYTES_A_SECOND = (1 << 32) - 1
_HEADER = struct.Struct("=IHHII")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A pair that shall be: *name* is that of the host's end, and *host* the namespace that it goes
    to, as seen from the box. *up_bits* may leave the box in a second, *down_bits* reach it; 0 is no
    limit."""

    address: IPv4Address
    name: str
    host: int
    mtu: int
    up_bits: int
    down_bits: int


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


def in_box(pair: Pair) -> Messages:
    """From the box's namespace: make the pair, down, and set up the box's end."""
    index, name = index_of(pair.address), f"{INSIDE} of {pair.name}"
    own = {"ifname": INSIDE, "index": index, "address": shown_mac(mac_of_box(pair.address))}
    neighbour = {"dst": str(GATEWAY), "lladdr": shown_mac(mac_of_host(pair.address))}
    return compiled(
        [
            (
                f"make {name}",
                lambda b: b.link("add", mtu=pair.mtu, IFLA_LINKINFO=_peer_on_host(pair), **own),
            ),
            *_shape(index, name, pair.up_bits, pair.mtu),
            (f"bring {name} up", lambda b: b.link("set", index=index, **_RUNNING)),
            (
                f"give {name} its address",
                lambda b: b.addr("add", index=index, address=str(pair.address), prefixlen=32),
            ),
            (
                f"tell {name} its neighbour",
                lambda b: b.neigh("add", ifindex=index, state="permanent", **neighbour),
            ),
            (
                f"route all of {name} to {GATEWAY}",
                lambda b: b.route(
                    "add", dst="default", gateway=str(GATEWAY), oif=index, flags=["onlink"]
                ),
            ),
        ]
    )


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
    """Then on the host: set up its end; what goes to the address leaves by it, to the one neighbour
    that it has."""
    index, name = index_of(pair.address), pair.name
    neighbour = {"dst": str(pair.address), "lladdr": shown_mac(mac_of_box(pair.address))}
    return compiled(
        [
            *_shape(index, name, pair.down_bits, pair.mtu),
            (
                f"bring {name} up",
                lambda b: b.link("set", index=index, **_RUNNING),
            ),
            (
                f"tell {name} its neighbour",
                lambda b: b.neigh("add", ifindex=index, state="permanent", **neighbour),
            ),
            (
                f"route {pair.address} to {name}",
                lambda b: b.route("add", dst=f"{pair.address}/32", oif=index, scope="link"),
            ),
        ]
    )


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


def guards(pool: IPv4Network) -> tuple[Messages, ...]:
    """Rules of routing: what comes from *pool* without our mark goes nowhere. What this host sends
    for one of its addresses (a refusal, between two boxes) has no mark, and comes by `lo`."""
    source = {"src": str(pool.network_address), "src_len": pool.prefixlen}
    marked = {"fwmark": 0, "fwmask": MARK, "action": _PROHIBIT}
    own = {"iifname": "lo", "table": _MAIN}
    return tuple(
        compiled([(f"add a rule of routing for {pool}", functools.partial(_add_rule, **rule))])
        for rule in (
            {"priority": _FIRST, **source, **own},
            {"priority": _SECOND, **source, **marked},
        )
    )


def _add_rule(batch: Any, **rule: Any) -> None:
    batch.rule("add", **rule)
