"""ruleset.py - any process outside; pure: our one table, and what a card has in it.

The path of a packet; X is the address of the box in hexadecimal::

    from the box   prerouting   arrive-X   another source, or no IPv4: dropped. It gets our mark
                   forward      from-X     known connections, DNS to the host's resolvers, rules
                   input        host-X     the same for the host itself: rules that name the address
                                 └─ new-X  how many at once, how many a second
                                     └─ sent-X    the quota; is counted, and accepted
                   postrouting             gets the host's address
    to the box     forward, output   to-X  known connections, or those of other boxes whose rules
                                 └─ got-X  the quota; is counted, and accepted
    refused                    no-X     is counted, rings the bell, and is answered at once, as all
                                        cards answer: TCP by a reset, everything else by ICMP

What is counted is counted by destination, too, in sets of a bounded size that these rules fill:
so Linux has all of it, whoever reads it, and when. Our chains decide about our interfaces only;
what another table drops stays dropped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_network

from sandbox_provisioner.facilities.network.card import nft
from sandbox_provisioner.facilities.network.card.nft import Message
from sandbox_provisioner.facilities.network.plan.netlink import attributes
from sandbox_provisioner.facilities.network.wish.addresses import Address, Block

TABLE = "sandbox_provisioner"
# How our interfaces on the host are called; their address in hexadecimal comes behind it.
INTERFACE = "sbxc-"
# What has passed `arrive-X`. Without our table, which whoever reloads a firewall may have deleted,
# nothing has it, and a rule of routing refuses all of the pool.
MARK = 1 << 27
# The rules of routing come before those of anybody else, since the first that decides does; 0 is
# Linux's own, for `local`.
FIRST, SECOND = 1, 2
# How all cards answer what they refuse. Whoever changes what the table is made of changes its
# name, too.
_LAYOUT = "answer-3"
# What tells, to nf_tables, a chain of that name.
LAYOUT = nft.text(1, TABLE) + nft.text(3, _LAYOUT)
# Hooks and priorities of linux/netfilter.h and netfilter_ipv4.h. Ours come behind the usual ones,
# so that what another firewall has changed of a packet is what is judged.
_PREROUTING, _INPUT, _FORWARD, _OUTPUT, _POSTROUTING = range(5)
_BEFORE_TRACKING, _FILTER, _SOURCE_NAT = -300, 10, 100
_MAPS = ("arrive", "from", "host", "to")
ADDRESSES = {4: "addresses", 6: "addresses-ipv6"}
_PARTS = ("arrive", "from", "host", "new", "sent", "to", "got", "no")
_DNS = 53
COUNTERS = ("up", "down", "connections", "refused")
UP, DOWN, CONNECTIONS, REFUSED = range(len(COUNTERS))
# The sets that have them by destination. What was refused has one of its own: a kernel can try any
# number of addresses, and must not be able to hide behind them with whom it has spoken.
_PASSED, _REFUSED = "passed", "refused"
_BY_DESTINATION = {_PASSED: 3, _REFUSED: 1}
# Each takes 150 bytes, and 16 more for each CPU, that nobody is charged for.
MOST_DESTINATIONS = 256


@dataclass(frozen=True, slots=True)
class Reach:
    """Some destinations: *block*, all of it or with *ports* those of TCP and UDP, are *allowed*."""

    block: Block
    ports: tuple[int, ...] = ()
    allowed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What the table shall have for one box. *reaches* count in their order, and what none tells
    of is refused; *at_host* are those for the host's own addresses. Of *quota_bytes* 0 is none;
    *used_bytes* of them were used by former cards of the same kernel. Without *ipv6* it has no
    address of that."""

    address: IPv4Address
    ipv6: IPv6Address | None = None
    mac: bytes
    resolvers: tuple[Address, ...]
    reaches: tuple[Reach, ...]
    at_host: tuple[Reach, ...]
    quota_bytes: int
    used_bytes: int
    connections: int
    new_per_second: int
    comment: str

    @property
    def key(self) -> str:
        """How its chains are called."""
        return key_of(self.address)

    @property
    def own(self) -> list[Address]:
        """All its addresses."""
        return [self.address, self.ipv6] if self.ipv6 else [self.address]


def key_of(address: IPv4Address) -> str:
    """How the chains of *address* are called."""
    return f"{int(address):08x}"


def quota_of(key: str) -> str:
    """How the quota of the card with *key* is called."""
    return f"quota-{key}"


def bell_of(key: str) -> str:
    """How the object is called by which Linux tells, once, that something was refused: a quota
    that anything exceeds."""
    return f"bell-{key}"


def sets_of(key: str) -> tuple[str, ...]:
    """How the sets are called that have its counts by destination."""
    return tuple(f"{name}-{key}" for name in _BY_DESTINATION)


def table() -> list[Message]:
    """Our table, where there is none."""
    by = {name: nft.INCOMING + nft.by_map(name) for name in ("arrive", "from", "host")}
    to_box = nft.OUTGOING + nft.by_map("to")
    return [
        nft.new_table(TABLE),
        nft.new_chain(TABLE, _LAYOUT),
        _rule(_LAYOUT, nft.IS_TCP, nft.RESET),
        _rule(_LAYOUT, nft.PROHIBIT),
        *(nft.new_verdict_map(TABLE, name, number) for number, name in enumerate(_MAPS, 1)),
        *(
            nft.new_address_set(TABLE, name, len(_MAPS) + version, version)
            for version, name in ADDRESSES.items()
        ),
        *_base("prerouting", _PREROUTING, _BEFORE_TRACKING, by["arrive"]),
        *_base("forward-from", _FORWARD, _FILTER, by["from"]),
        *_base("forward-to", _FORWARD, _FILTER + 1, to_box),
        *_base("input", _INPUT, _FILTER, by["host"]),
        *_base("output", _OUTPUT, _FILTER, to_box),
        nft.base_chain(TABLE, "postrouting", _POSTROUTING, _SOURCE_NAT, "nat"),
        *_as_the_host(nft.IS_IPV4, nft.SOURCE, nft.DESTINATION, ADDRESSES[4]),
        *_as_the_host(nft.IS_IPV6, nft.SOURCE_IPV6, nft.DESTINATION_IPV6, ADDRESSES[6]),
    ]


def _as_the_host(family: bytes, source: bytes, destination: bytes, name: str) -> Iterator[Message]:
    """What leaves this host has its address; boxes know one another by their own."""
    ours, among_ours = source + nft.in_set(name), destination + nft.in_set(name)
    yield _rule("postrouting", family, ours, among_ours, nft.verdict(nft.ACCEPT))
    yield _rule("postrouting", family, ours, nft.MASQUERADE)


def _base(chain: str, hook: int, priority: int, expressions: bytes) -> Iterator[Message]:
    yield nft.base_chain(TABLE, chain, hook, priority)
    yield _rule(chain, expressions)


def _rule(chain: str, *expressions: bytes) -> Message:
    return nft.rule(TABLE, chain, *expressions)


def remove_table() -> list[Message]:
    """Remove it as a whole; EBUSY, and nothing is, where a card leads to the chain that answers."""
    return [
        nft.flush_chain(TABLE, _LAYOUT),
        nft.delete_chain(TABLE, _LAYOUT),
        nft.delete_table(TABLE),
    ]


def key_in(chain: str) -> str:
    """The key of the card that *chain* is of, once for each card; otherwise ""."""
    return chain.removeprefix("arrive-") if chain.startswith("arrive-") else ""


def chain_of(key: str) -> bytes:
    """What tells, to nf_tables, the chain that a card has if it has anything."""
    return nft.text(1, TABLE) + nft.text(3, f"arrive-{key}")


def interface_of(key: str) -> str:
    """The name on the host of the card whose chains have *key*."""
    return INTERFACE + key


def add(entry: Entry) -> list[Message]:
    """All that the table has for one box; what leads there comes last."""
    key = entry.key
    objects = [nft.new_counter(TABLE, f"{name}-{key}") for name in COUNTERS]
    objects.append(nft.new_quota(TABLE, bell_of(key), 1, 0))
    objects += [
        nft.new_destinations(TABLE, f"{name}-{key}", number, MOST_DESTINATIONS * kinds)
        for number, (name, kinds) in enumerate(_BY_DESTINATION.items(), 1)
    ]
    if entry.quota_bytes:
        quota = nft.new_quota(TABLE, quota_of(key), entry.quota_bytes, entry.used_bytes)
        objects.append(quota)
    chains = [nft.new_chain(TABLE, f"{part}-{key}", entry.comment) for part in _PARTS]
    lead = [nft.map_interface(TABLE, m, interface_of(key), f"{m}-{key}") for m in _MAPS]
    rules = (_arriving, _leaving, _to_host, _new, _counted, _coming, _refused)
    return [
        *objects,
        *chains,
        *(message for part in rules for message in part(entry)),
        *(nft.add_address(TABLE, ADDRESSES[own.version], own) for own in entry.own),
        *lead,
    ]


def remove(key: str, ipv6: IPv6Address | None, *, quota: bool) -> list[Message]:
    """What `add` has added."""
    chains = [f"{part}-{key}" for part in _PARTS]
    objects = [nft.delete_object(TABLE, f"{name}-{key}", nft.COUNTER) for name in COUNTERS]
    objects.append(nft.delete_object(TABLE, bell_of(key), nft.QUOTA))
    objects += [nft.delete_set(TABLE, name) for name in sets_of(key)]
    if quota:
        objects.append(nft.delete_object(TABLE, quota_of(key), nft.QUOTA))
    return [
        *(nft.unmap_interface(TABLE, name, interface_of(key)) for name in _MAPS),
        nft.remove_address(TABLE, ADDRESSES[4], IPv4Address(int(key, 16))),
        *([nft.remove_address(TABLE, ADDRESSES[6], ipv6)] if ipv6 else []),
        *(nft.flush_chain(TABLE, chain) for chain in chains),
        *(nft.delete_chain(TABLE, chain) for chain in chains),
        *objects,
    ]


def _arriving(entry: Entry) -> Iterator[Message]:
    chain, refused = f"arrive-{entry.key}", _count("refused", entry)
    drop = nft.verdict(nft.DROP)
    if entry.ipv6:
        for of_link in nft.OF_LINK:
            yield _rule(chain, of_link, drop)
        forged = nft.IS_IPV6 + nft.SOURCE_IPV6 + nft.differs(entry.ipv6.packed)
        yield _rule(chain, forged, refused, drop)
    else:
        yield _rule(chain, nft.NOT_IPV4, refused, drop)
    yield _rule(chain, nft.SOURCE_MAC, nft.differs(entry.mac), refused, drop)
    yield _rule(chain, nft.IS_IPV4, nft.SOURCE, nft.differs(entry.address.packed), refused, drop)
    yield _rule(chain, nft.mark(MARK))


def _leaving(entry: Entry) -> Iterator[Message]:
    yield from _judged(f"from-{entry.key}", entry, entry.reaches)


def _to_host(entry: Entry) -> Iterator[Message]:
    yield from _judged(f"host-{entry.key}", entry, entry.at_host)


def _judged(chain: str, entry: Entry, reaches: Sequence[Reach]) -> Iterator[Message]:
    new, sent, no = (_go(part, entry) for part in ("new", "sent", "no"))
    yield _rule(chain, nft.KNOWN, sent)
    yield _rule(chain, nft.INVALID, nft.verdict(nft.DROP))
    for resolver in entry.resolvers:
        for matched in _matches(Reach(ip_network(resolver), (_DNS,))):
            yield _rule(chain, matched, new)
    for reach in reaches:
        for matched in _matches(reach):
            yield _rule(chain, matched, new if reach.allowed else no)
    yield _rule(chain, no)


def _matches(reach: Reach) -> Iterator[bytes]:
    """The expressions for each way to be meant by *reach*."""
    block = nft.to_block(reach.block)
    if not reach.ports:
        yield block
    for port in reach.ports:
        for transport in (nft.TCP, nft.UDP):
            yield block + nft.to_port(transport, port)


def _new(entry: Entry) -> Iterator[Message]:
    chain, no = f"new-{entry.key}", _go("no", entry)
    yield _rule(chain, nft.more_connections_than(entry.connections), no)
    yield _rule(chain, nft.faster_than(entry.new_per_second), no)
    yield _rule(chain, _count("connections", entry))
    yield from _by_destination(chain, entry, _PASSED, CONNECTIONS)
    yield _rule(chain, _go("sent", entry))


def _counted(entry: Entry) -> Iterator[Message]:
    yield from _within_quota(f"sent-{entry.key}", entry, UP)


def _coming(entry: Entry) -> Iterator[Message]:
    chain, got = f"to-{entry.key}", _go("got", entry)
    yield _rule(chain, nft.KNOWN, got)
    yield _rule(chain, nft.NEW, nft.marked(MARK), got)
    yield _rule(chain, nft.verdict(nft.DROP))
    refusals = [nft.IS_RESET, nft.IS_UNREACHABLE]  # also of what the quota refuses
    for refusal in [*refusals, nft.IS_UNREACHABLE_IPV6] if entry.ipv6 else refusals:
        yield _rule(f"got-{entry.key}", refusal, nft.verdict(nft.ACCEPT))
    yield from _within_quota(f"got-{entry.key}", entry, DOWN)


def _within_quota(chain: str, entry: Entry, kind: int) -> Iterator[Message]:
    if entry.quota_bytes:
        used_up = nft.object_named(nft.QUOTA, quota_of(entry.key))
        yield _rule(chain, used_up, _go("no", entry))
    yield from _by_destination(chain, entry, _PASSED, kind)
    yield _rule(chain, _count(COUNTERS[kind], entry), nft.verdict(nft.ACCEPT))


def _refused(entry: Entry) -> Iterator[Message]:
    chain = f"no-{entry.key}"
    yield _rule(chain, _count("refused", entry))
    yield from _by_destination(chain, entry, _REFUSED, REFUSED)
    yield _rule(chain, nft.object_named(nft.QUOTA, bell_of(entry.key)))
    yield _rule(chain, nft.verdict(nft.GOTO, _LAYOUT))


def _by_destination(chain: str, entry: Entry, name: str, kind: int) -> Iterator[Message]:
    """Rules of their own: where the set is full, Linux goes on with the next one."""
    for own in entry.own:
        yield _rule(chain, nft.counted_by(f"{name}-{entry.key}", kind, own.version))


def _count(counter: str, entry: Entry) -> bytes:
    return nft.object_named(nft.COUNTER, f"{counter}-{entry.key}")


def _go(part: str, entry: Entry) -> bytes:
    return nft.verdict(nft.GOTO, f"{part}-{entry.key}")


# struct fib_rule_hdr: the length of the source is its third byte, the action its last but four.
_FROM_LENGTH, _ACTION, _RULE_HEADER = 2, 7, 12
_PRIORITY, _FROM_INTERFACE, _MASK = 6, 3, 16  # FRA_*
PROHIBIT_ROUTE = 8  # FR_ACT_PROHIBIT: the sender is told


def is_guard(rule: bytes) -> bool:
    """Whether a rule of routing, as Linux tells of it, is one of ours: `links.guards`."""
    if len(rule) < _RULE_HEADER or not rule[_FROM_LENGTH]:
        return False
    found = attributes(rule[_RULE_HEADER:])
    priority = int.from_bytes(found.get(_PRIORITY, b""), sys.byteorder)
    mask = int.from_bytes(found.get(_MASK, b""), sys.byteorder)
    if priority == FIRST:
        return found.get(_FROM_INTERFACE) == b"lo\0"
    return priority == SECOND and rule[_ACTION] == PROHIBIT_ROUTE and mask == MARK
