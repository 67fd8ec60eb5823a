"""counts.py - in the process of whoever is root and asks, reads only: what Linux has counted of a
card. It counts by itself, whoever has ended; nobody else has it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address

from sandbox_provisioner.facilities.network.card import netlink, nft, ruleset
from sandbox_provisioner.facilities.network.plan.netlink import attributes
from sandbox_provisioner.facilities.network.tell.counts import OTHERS, OfName, Traffic, added
from sandbox_provisioner.facilities.network.wish.addresses import Address

# Protocols that have ports, and the names of those that programs use without (IANA).
TCP, _UDP = 6, 17
_NAMES = {1: "ICMP", 58: "ICMP"}


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a connection goes, as the program meant it; *protocol* is the number of IP's."""

    address: Address
    port: int
    protocol: int = TCP

    @property
    def has_port(self) -> bool:
        """What has none has something else there, such as the type of an ICMP message."""
        return self.protocol in {TCP, _UDP}

    def label(self, names: Mapping[str, str]) -> str:
        """For counts and sentences; *names* are those that are known of addresses."""
        whom = names.get(str(self.address), str(self.address))
        if self.has_port:
            return f"[{whom}]:{self.port}" if ":" in whom else f"{whom}:{self.port}"
        return f"{whom} ({_NAMES.get(self.protocol, f'protocol {self.protocol}')})"


ByDestination = Mapping[Destination, OfName]


@dataclass(frozen=True, slots=True)
class Counts:
    """What a card has let through and refused. *used_up* tells that its quota is. Of destinations
    Linux keeps the first that were met."""

    up_bytes: int = 0
    down_bytes: int = 0
    connections: int = 0
    refused: int = 0
    used_up: bool = False
    by_destination: ByDestination = field(default_factory=dict)

    def traffic(self, names: Mapping[str, str], *, is_last: bool = False) -> Traffic:
        """The same as of any network, with the *names* that are known of addresses."""
        by_name: dict[str, OfName] = {}
        for destination, found in self.by_destination.items():
            label = destination.label(names)
            by_name[label] = added((found, by_name.get(label, OfName())))
        others = self._others(by_name.values())
        if others != OfName():
            by_name[OTHERS] = others
        return Traffic(
            up_bytes=self.up_bytes,
            down_bytes=self.down_bytes,
            connections=self.connections,
            refusals=self.refused,
            quota_used_up=self.used_up,
            unnamed=others.connections + others.refusals,
            names=by_name,
            is_last=is_last,
        )

    def _others(self, named: Iterable[OfName]) -> OfName:
        """What went elsewhere. The sums were read first, so that what is new since counts for
        nobody."""
        found = added(named)
        return OfName(
            up_bytes=max(0, self.up_bytes - found.up_bytes),
            down_bytes=max(0, self.down_bytes - found.down_bytes),
            connections=max(0, self.connections - found.connections),
            refusals=max(0, self.refused - found.refusals),
        )


def counts(address: IPv4Address) -> Counts | None:
    """What the card with *address* has counted; None where there is none. OSError."""
    try:
        found = sums(address)
        by_destination = _by_destination(ruleset.sets_of(ruleset.key_of(address)))
    except FileNotFoundError:
        return None
    return replace(found, by_destination=by_destination)


def sums(address: IPv4Address) -> Counts:
    """The same as a whole, not by destination; FileNotFoundError where there is no card."""
    key = ruleset.key_of(address)
    numbers = {name: _object(f"{name}-{key}", nft.COUNTER) for name in ruleset.COUNTERS}
    return Counts(
        up_bytes=_number(numbers["up"][_BYTES]),
        down_bytes=_number(numbers["down"][_BYTES]),
        connections=_number(numbers["connections"][_PACKETS]),
        refused=_number(numbers["refused"][_PACKETS]),
        used_up=is_used_up(address),
    )


# NFTA_COUNTER_BYTES, NFTA_COUNTER_PACKETS; NFTA_QUOTA_BYTES, NFTA_QUOTA_CONSUMED
_BYTES, _PACKETS, _ALLOWED, _CONSUMED = 1, 2, 1, 4
# NFTA_SET_ELEM_LIST_ELEMENTS, NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_EXPR, NFTA_DATA_VALUE, and
# NFTA_EXPR_DATA
_ELEMENTS, _KEY, _EXPRESSION, _VALUE, _DATA = 3, 1, 7, 1, 2


def refused(address: IPv4Address) -> dict[Destination, int]:
    """How often what was refused to the card with *address*, as far as that is told apart; OSError
    where there is none."""
    *_, name = ruleset.sets_of(ruleset.key_of(address))
    return {found: one.refusals for found, one in _by_destination([name]).items()}


def has_card(address: IPv4Address) -> bool:
    """Whether our table has one with *address*."""
    try:
        _object(f"up-{ruleset.key_of(address)}", nft.COUNTER)
    except FileNotFoundError:
        return False
    return True


def is_used_up(address: IPv4Address) -> bool:
    """Whether it has a quota, which is used up."""
    return _is_exceeded(ruleset.quota_of(ruleset.key_of(address)))


def bell_rings(address: IPv4Address) -> bool:
    """Whether anything was refused since its bell was made, or `silence_bell`."""
    return _is_exceeded(ruleset.bell_of(ruleset.key_of(address)))


def silence_bell(address: IPv4Address) -> None:
    """Let Linux tell of what is refused from now on; OSError where there is no card."""
    netlink.read(
        nft.RESET_OBJECT, _key_of_object(ruleset.bell_of(ruleset.key_of(address)), nft.QUOTA)
    )


def ipv6_of(key: str) -> IPv6Address | None:
    """The address of IPv6 that the card with *key* has: its end is that of IPv4."""
    for element in _listed(ruleset.ADDRESSES[6]):
        packed = attributes(attributes(element)[_KEY])[_VALUE]
        if packed[-4:] == bytes.fromhex(key):
            return IPv6Address(packed)
    return None


def has_quota(key: str) -> bool:
    """Whether the card with *key* has a quota."""
    try:
        _object(ruleset.quota_of(key), nft.QUOTA)
    except FileNotFoundError:
        return False
    return True


def _is_exceeded(name: str) -> bool:
    try:
        quota = _object(name, nft.QUOTA)
    except FileNotFoundError:
        return False
    return _number(quota[_CONSUMED]) >= _number(quota[_ALLOWED])


def _object(name: str, kind: int) -> dict[int, bytes]:
    """The data of that object of our table; FileNotFoundError where there is none."""
    (text,) = netlink.read(nft.GET_OBJECT, _key_of_object(name, kind))
    return attributes(attributes(text)[4])


def _key_of_object(name: str, kind: int) -> bytes:
    return nft.object_key(ruleset.TABLE, name, kind)


def _by_destination(names: Iterable[str]) -> dict[Destination, OfName]:
    """What the sets *names* have."""
    found: dict[Destination, OfName] = {}
    for name in names:
        for destination, one in _elements(name):
            found[destination] = added((one, found.get(destination, OfName())))
    return found


def _elements(name: str) -> Iterator[tuple[Destination, OfName]]:
    for element in _listed(name):
        parts = attributes(element)
        counter = attributes(attributes(parts[_EXPRESSION])[_DATA])
        key = attributes(parts[_KEY])[_VALUE]
        yield _counted(key, _number(counter[_BYTES]), _number(counter[_PACKETS]))


def _listed(name: str) -> Iterator[bytes]:
    for text in netlink.read(nft.GET_ELEMENT, nft.set_key(ruleset.TABLE, name), every=True):
        yield from netlink.listed(attributes(text).get(_ELEMENTS, b""))


def _counted(key: bytes, size: int, packets: int) -> tuple[Destination, OfName]:
    kind, protocol, packed, port = nft.DESTINATION_KEY.unpack(key)
    address = IPv6Address(packed)
    whom = Destination(address.ipv4_mapped or address, int.from_bytes(port, "big"), protocol)
    return whom, OfName(
        up_bytes=size * (kind == ruleset.UP),
        down_bytes=size * (kind == ruleset.DOWN),
        connections=packets * (kind == ruleset.CONNECTIONS),
        refusals=packets * (kind == ruleset.REFUSED),
    )


def _number(value: bytes) -> int:
    return int.from_bytes(value, "big")
