"""addresses.py - any process outside; pure: the pool that cards have their addresses from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.network.wish.addresses import Block, is_within

# They are nobody's: the box has a fixed neighbour for each, and nothing answers there.
GATEWAY, GATEWAY_IPV6 = IPv4Address("169.254.1.1"), IPv6Address("fe80::1")
INSIDE = "eth0"
_ATTEMPT = "give a kernel a network card"


@dataclass(frozen=True, slots=True)
class Taken:
    """Addresses that are somebody's on this host; *by* is for a sentence."""

    block: Block
    by: str


def refuse_collision(pool: Block, taken: Iterable[Taken]) -> None:
    """HostError, which names it, where this host has a part of *pool* for something else."""
    for other in taken:
        if other.block.prefixlen and _overlap(other.block, pool):
            option, such = _OPTIONS[pool.version]
            raise HostError(
                attempt=f"{_ATTEMPT} with an address of {pool}",
                answer=f"{other.block} is {other.by} of this host",
                remedy=f"Set {option} to private addresses that neither this host nor its "
                f'network uses, such as "{such}".',
            )


_OPTIONS = {
    4: ("network_pool", "100.100.0.0/16"),
    6: ("network_pool_ipv6", "fd00:5a:2d::/64"),
}


def _overlap(one: Block, other: Block) -> bool:
    return is_within(one, other) or is_within(other, one)


def ipv6_of(address: IPv4Address, pool: IPv6Network) -> IPv6Address:
    """The one of *pool* that the card with *address* has: two cards never have the same."""
    return IPv6Address(int(pool.network_address) | int(address))


def candidates(pool: IPv4Network, start: int) -> Iterator[IPv4Address]:
    """All addresses of *pool*, from the one with number *start* on: an address that was given back
    comes again late, when nobody speaks with who had it before.

    Some programs take what ends in 0 or 255 for a whole network.
    """
    first, size = int(pool.network_address), pool.num_addresses
    for number in range(size):
        address = first + (start + number) % size
        if address & 0xFF not in {0, 0xFF}:
            yield IPv4Address(address)


def no_address_left(pool: IPv4Network) -> HostError:
    """All are taken."""
    return HostError(
        attempt=f"{_ATTEMPT} with an address of {pool}",
        answer="all of them are taken",
        remedy="End some kernels, or set network_pool to a larger range.",
    )


def mac_of_box(address: IPv4Address) -> bytes:
    """Of the end in the box: a locally administered one, which nobody else has here."""
    return b"\x0a\x53" + address.packed


def mac_of_host(address: IPv4Address) -> bytes:
    """Of the host's end."""
    return b"\x0e\x53" + address.packed


def shown_mac(mac: bytes) -> str:
    """As ip-link(8) writes it."""
    return mac.hex(":")
