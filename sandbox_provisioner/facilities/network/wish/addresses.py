"""addresses.py - any process outside, and the gateway; pure: what kind of place an address is.

Everything that is not public is *special*: it is reached only by a rule that names it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

Address = IPv4Address | IPv6Address
Block = IPv4Network | IPv6Network

# Addresses that a gateway gives to names, for one box each: nobody else has them (RFC 2544).
SYNTHETIC_IPV4 = IPv4Network("198.18.0.0/15")
SYNTHETIC_IPV6 = IPv6Network("fd53:616e:6462:6f78::/64")


@dataclass(frozen=True, slots=True)
class Special:
    """Addresses that are not public: all of *block* are *what*.

    *in_presets*: a name that a preset gives may lead there, since the machine's own configuration
    says so.
    """

    block: Block
    what: str
    in_presets: bool = False

    def has(self, address: Address) -> bool:
        """Whether *address* is one of them."""
        return address.version == self.block.version and address in self.block

    def is_named_by(self, block: Block) -> bool:
        """Whether a rule for *block* means these, and not all the world and them too."""
        return is_within(block, self.block)


def is_within(inner: Block, outer: Block) -> bool:
    """Whether all of *inner* lies in *outer*."""
    if isinstance(inner, IPv4Network):
        return isinstance(outer, IPv4Network) and inner.subnet_of(outer)
    return isinstance(outer, IPv6Network) and inner.subnet_of(outer)


# The registries of special-purpose addresses of IANA (RFC 6890), and where clouds answer for a
# machine, with its keys: docs of AWS, Google, Azure, Oracle and Alibaba.
_KINDS: tuple[tuple[str, bool, tuple[str, ...]], ...] = (
    ("an address of a cloud's metadata service", False, (
        "169.254.169.254/32", "169.254.170.2/32", "169.254.170.23/32", "168.63.129.16/32",
        "192.0.0.192/32", "100.100.100.200/32", "fd00:ec2::254/128", "fd00:ec2::23/128",
        "fd20:ce::254/128",
    )),
    ("a loopback address", False, ("127.0.0.0/8", "::1/128")),
    ("an address of no machine", False, ("0.0.0.0/8", "::/128", "100::/64", "100:0:0:1::/64")),
    ("a link-local address", False, ("169.254.0.0/16", "fe80::/10")),
    ("a multicast address", False, ("224.0.0.0/4", "ff00::/8")),
    ("the broadcast address", False, ("255.255.255.255/32",)),
    ("an address that sandboxes give to names", False, (
        str(SYNTHETIC_IPV4), str(SYNTHETIC_IPV6),
    )),
    ("a private address", True, (
        "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7", "fec0::/10",
    )),
    ("an address for examples", True, (
        "192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32", "3fff::/20",
    )),
    ("a reserved address", False, (
        "192.0.0.0/24", "192.88.99.0/24", "240.0.0.0/4", "2001::/23", "64:ff9b:1::/48",
        # Of IPv6 only 2000::/3 is given out.
        "::/3", "4000::/2", "8000::/2", "c000::/3", "e000::/4", "f000::/5", "f800::/6", "fe00::/9",
    )),
)  # fmt: skip
_ALL = sorted(
    (Special(ip_network(text), what, may) for what, may, texts in _KINDS for text in texts),
    key=lambda special: -special.block.prefixlen,
)
_SPECIAL = {version: [s for s in _ALL if s.block.version == version] for version in (4, 6)}
# The narrowest first.
SPECIAL_IPV4, SPECIAL_IPV6 = tuple(_SPECIAL[4]), tuple(_SPECIAL[6])
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052, 2.1
# What only carries an address of IPv4 within it: 6to4, Teredo, mapped ones, NAT64.
CARRIERS = tuple(map(IPv6Network, ("::ffff:0:0/96", str(_NAT64), "2002::/16", "2001::/32")))


def read_address(text: str) -> Address | None:
    """*text* as an address; None where it is none, or holds on one interface only."""
    try:
        return None if "%" in text else ip_address(text)
    except ValueError:
        return None


def meant_by(address: Address) -> Address:
    """Whom one reaches at *address*: where it carries an address of IPv4, that one."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else address)


def special_of(address: Address, own: Iterable[Special] = ()) -> Special | None:
    """What *address* is where it is not public, told by the narrowest block that has it; *own*
    come first."""
    for special in own:
        if special.has(address):
            return special
    return next((s for s in _SPECIAL[address.version] if address in s.block), None)


def own_special(text: str) -> Special:
    """One of this machine's own addresses, or a pool of sandboxes, as special; ValueError."""
    block = ip_network(text)
    is_one = block.prefixlen == block.max_prefixlen
    return Special(block, f"an address of {'this machine' if is_one else 'other sandboxes'}")
