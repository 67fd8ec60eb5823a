"""nft.py - any process outside; pure: messages for nf_tables, as bytes.

linux/netfilter/nf_tables.h has the numbers. A rule is a list of *expressions*: each loads, compares
or decides, and the first that does not hold ends the rule. pyroute2 lacks named objects, and has a
quota of two bytes; so the few messages that we need are written here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from sandbox_provisioner.facilities.network.plan.netlink import (
    ACK,
    APPEND,
    CREATE,
    EXCLUSIVE,
    REQUEST,
    attribute,
    nested,
    numbered,
)

INET = 1  # NFPROTO_INET: both IPv4 and IPv6
IPV4, IPV6 = 2, 10
_DUMP = 0x300  # NLM_F_DUMP of linux/netlink.h
_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_BATCH_BEGIN, _BATCH_END = 16, 17
(NEW_TABLE, GET_TABLE, DELETE_TABLE, NEW_CHAIN, GET_CHAIN, DELETE_CHAIN, NEW_RULE, GET_RULE,
 DELETE_RULE, NEW_SET, GET_SET, DELETE_SET, NEW_ELEMENT, GET_ELEMENT,
 DELETE_ELEMENT) = range(15)  # fmt: skip
NEW_OBJECT, GET_OBJECT, DELETE_OBJECT, RESET_OBJECT = 18, 19, 20, 21
COUNTER, QUOTA = 1, 2  # NFT_OBJECT_*
DROP, ACCEPT, JUMP, GOTO = 0, 1, -3, -4
_VERDICT_REGISTER, _REGISTER = 0, 1


def text(kind: int, value: str) -> bytes:
    """A name, which ends with a NUL."""
    return attribute(kind, value.encode() + b"\0")


def number(kind: int, value: int) -> bytes:
    """32 bits in the order of the network."""
    return attribute(kind, struct.pack("!i" if value < 0 else "!I", value))


def big(kind: int, value: int) -> bytes:
    """64 bits."""
    return attribute(kind, struct.pack("!Q", value))


@dataclass(frozen=True, slots=True)
class Message:
    """One message; *what* it does, for an error."""

    what: str
    kind: int
    flags: int
    body: bytes
    family: int = INET

    def encoded(self, sequence: int) -> bytes:
        """With its header, as number *sequence*."""
        return _encode(_SUBSYSTEM << 8 | self.kind, self.flags, sequence, self.family, 0, self.body)


def _encode(kind: int, flags: int, sequence: int, family: int, resource: int, body: bytes) -> bytes:
    head = struct.pack("!BBH", family, 0, resource)
    return numbered(kind, REQUEST | flags, head + body, sequence)


def batch(messages: Sequence[Message]) -> bytes:
    """All of *messages* or none of them; that with index N has the sequence number N + 1.

    Linux tells of each that fails; of those that do not, only the last one is acknowledged.
    """
    begin = _encode(_BATCH_BEGIN, 0, 0, 0, _SUBSYSTEM, b"")
    end = _encode(_BATCH_END, 0, len(messages) + 1, 0, _SUBSYSTEM, b"")
    last = replace(messages[-1], flags=messages[-1].flags | ACK)
    numbered = enumerate((*messages[:-1], last), 1)
    return begin + b"".join(message.encoded(number) for number, message in numbered) + end


# -- what there is in a table


def new_table(table: str) -> Message:
    """EEXIST where it is there."""
    return Message(f"make the table {table}", NEW_TABLE, CREATE | EXCLUSIVE, text(1, table))


def delete_table(table: str) -> Message:
    """With all that it has."""
    return Message(f"delete the table {table}", DELETE_TABLE, 0, text(1, table))


def new_chain(table: str, chain: str, comment: str = "") -> Message:
    """One that others jump to. nft(8) shows its *comment* (libnftnl: NFTNL_UDATA_CHAIN_COMMENT)."""
    body = text(1, table) + text(3, chain)
    if comment:
        value = comment.encode() + b"\0"
        body += attribute(12, struct.pack("BB", 0, len(value)) + value)
    return Message(f"make the chain {chain}", NEW_CHAIN, CREATE | EXCLUSIVE, body)


def base_chain(table: str, chain: str, hook: int, priority: int, kind: str = "filter") -> Message:
    """One that packets come to at *hook*; what no rule decides goes on."""
    where = nested(4, number(1, hook), number(2, priority))
    body = text(1, table) + text(3, chain) + where + number(5, ACCEPT) + text(7, kind)
    return Message(f"make the chain {chain}", NEW_CHAIN, CREATE | EXCLUSIVE, body)


def delete_chain(table: str, chain: str) -> Message:
    """It has to be empty, and nobody may jump to it."""
    return Message(f"delete the chain {chain}", DELETE_CHAIN, 0, text(1, table) + text(3, chain))


def rule(table: str, chain: str, *expressions: bytes) -> Message:
    """At the end of *chain*."""
    body = text(1, table) + text(2, chain) + nested(4, *expressions)
    return Message(f"add a rule to {chain}", NEW_RULE, CREATE | APPEND, body)


def flush_chain(table: str, chain: str) -> Message:
    """Delete all of its rules."""
    return Message(f"flush the chain {chain}", DELETE_RULE, 0, text(1, table) + text(2, chain))


# The types of keys are for nft(8) alone, which shows sets by them.
_IFNAME = 41
_ADDRESSES = {4: (7, 4), 6: (8, 16)}  # with how many bytes
_MAP, _TO_VERDICTS = 0x8, 0xFFFFFF00
_OF_THIS_MACHINE = struct.pack("=BBI", 0, 4, 1)  # libnftnl: NFTNL_UDATA_SET_KEYBYTEORDER


def new_verdict_map(table: str, name: str, identifier: int) -> Message:
    """From the name of an interface to a chain."""
    body = text(1, table) + text(2, name) + number(3, _MAP) + number(4, _IFNAME) + number(5, 16)
    body += number(6, _TO_VERDICTS) + number(7, 0) + number(10, identifier)
    body += attribute(13, _OF_THIS_MACHINE)
    return Message(f"make the map {name}", NEW_SET, CREATE | EXCLUSIVE, body)


def new_address_set(table: str, name: str, identifier: int, version: int) -> Message:
    """A set of addresses of IP's *version*."""
    kind, size = _ADDRESSES[version]
    body = text(1, table) + text(2, name) + number(3, 0) + number(4, kind) + number(5, size)
    body += number(10, identifier)
    return Message(f"make the set {name}", NEW_SET, CREATE | EXCLUSIVE, body)


# What a set of destinations is looked up by: which of its counts, the protocol, the address as one
# of IPv6, and the port; each begins at a register of four bytes.
DESTINATION_KEY = struct.Struct("=IBxxx16s2sxx")
_MARK, _PROTOCOL_TYPE, _IPV6_ADDRESS, _PORT = 19, 12, 8, 13  # the types of its parts
_KEY_TYPE = _MARK << 18 | _PROTOCOL_TYPE << 12 | _IPV6_ADDRESS << 6 | _PORT
_FILLED_BY_RULES = 0x20 | 0x10  # NFT_SET_EVAL, and NFT_SET_TIMEOUT, without which is no interval
# Linux looks through such a set each second for what is too old; here nothing ever is.
_LOOKED_THROUGH_MS = 24 * 3600 * 1000


def new_destinations(table: str, name: str, identifier: int, most: int) -> Message:
    """A set that rules fill (`counted_by`), with *most* destinations."""
    body = text(1, table) + text(2, name) + number(3, _FILLED_BY_RULES) + number(4, _KEY_TYPE)
    body += number(5, DESTINATION_KEY.size) + nested(9, number(1, most)) + number(10, identifier)
    body += number(12, _LOOKED_THROUGH_MS)
    return Message(f"make the set {name}", NEW_SET, CREATE | EXCLUSIVE, body)


def delete_set(table: str, name: str) -> Message:
    """With all that it has; no rule may name it."""
    return Message(f"delete the set {name}", DELETE_SET, 0, text(1, table) + text(2, name))


def set_key(table: str, name: str) -> bytes:
    """What tells one set, where its elements are asked for."""
    return text(1, table) + text(2, name)


def _element(kind: int, flags: int, table: str, name: str, parts: bytes) -> Message:
    word = "add to" if kind == NEW_ELEMENT else "remove from"
    body = text(1, table) + text(2, name) + nested(3, nested(1, parts))
    return Message(f"{word} {name}", kind, flags, body)


def map_interface(table: str, name: str, interface: str, chain: str) -> Message:
    """In the map *name*, *interface* leads to *chain*."""
    parts = nested(1, attribute(1, name_bytes(interface))) + nested(2, _verdict(GOTO, chain))
    return _element(NEW_ELEMENT, CREATE | EXCLUSIVE, table, name, parts)


def unmap_interface(table: str, name: str, interface: str) -> Message:
    """It leads nowhere any more."""
    parts = nested(1, attribute(1, name_bytes(interface)))
    return _element(DELETE_ELEMENT, 0, table, name, parts)


def add_address(table: str, name: str, address: IPv4Address | IPv6Address) -> Message:
    """To the set *name*."""
    parts = nested(1, attribute(1, address.packed))
    return _element(NEW_ELEMENT, CREATE | EXCLUSIVE, table, name, parts)


def remove_address(table: str, name: str, address: IPv4Address | IPv6Address) -> Message:
    """From the set *name*."""
    return _element(DELETE_ELEMENT, 0, table, name, nested(1, attribute(1, address.packed)))


def new_counter(table: str, name: str) -> Message:
    """A named one, which many rules count in."""
    data = big(1, 0) + big(2, 0)
    return _object(table, name, COUNTER, data)


def new_quota(table: str, name: str, most_bytes: int, used_bytes: int) -> Message:
    """A named one; a rule goes on by it when more than that was counted (NFT_QUOTA_F_INV).
    *used_bytes* count already; more than all of them would be EINVAL (nft_quota_do_init)."""
    consumed = big(4, min(used_bytes, most_bytes))
    return _object(table, name, QUOTA, big(1, most_bytes) + number(2, 1) + consumed)


def _object(table: str, name: str, kind: int, data: bytes) -> Message:
    body = text(1, table) + text(2, name) + number(3, kind) + nested(4, data)
    return Message(f"make the object {name}", NEW_OBJECT, CREATE | EXCLUSIVE, body)


def object_key(table: str, name: str, kind: int) -> bytes:
    """What tells one object."""
    return text(1, table) + text(2, name) + number(3, kind)


def delete_object(table: str, name: str, kind: int) -> Message:
    """No rule may name it."""
    body = object_key(table, name, kind)
    return Message(f"delete the object {name}", DELETE_OBJECT, 0, body)


def get(kind: int, body: bytes = b"", family: int = INET, *, every: bool = False) -> Message:
    """Ask for one thing, or for *every* one."""
    return Message("read the tables", kind, _DUMP if every else ACK, body, family)


# -- expressions: what a rule loads


def _expression(name: str, *attributes: bytes) -> bytes:
    return nested(1, text(1, name), nested(2, *attributes))


def name_bytes(interface: str) -> bytes:
    """The name of an interface as nf_tables compares it."""
    return interface.encode().ljust(16, b"\0")


def _meta(key: int) -> bytes:
    return _expression("meta", number(1, _REGISTER), number(2, key))


INCOMING, OUTGOING, PROTOCOL, TRANSPORT = _meta(6), _meta(7), _meta(15), _meta(16)
CONNECTION_STATE = _expression("ct", number(1, _REGISTER), number(2, 0))


def _payload(base: int, offset: int, length: int) -> bytes:
    where = number(2, base), number(3, offset), number(4, length)
    return _expression("payload", number(1, _REGISTER), *where)


SOURCE_MAC, SOURCE, DESTINATION = _payload(0, 6, 6), _payload(1, 12, 4), _payload(1, 16, 4)
SOURCE_IPV6, DESTINATION_IPV6 = _payload(1, 8, 16), _payload(1, 24, 16)
_FIRST_OF_SOURCE_IPV6 = _payload(1, 8, 2)
DESTINATION_PORT = _payload(2, 2, 2)


# -- what it compares


def _compare(operator: int, value: bytes) -> bytes:
    return _expression(
        "cmp", number(1, _REGISTER), number(2, operator), nested(3, attribute(1, value))
    )


def equals(value: bytes) -> bytes:
    """Go on where what was loaded is *value*."""
    return _compare(0, value)


def differs(value: bytes) -> bytes:
    """Go on where it is not."""
    return _compare(1, value)


def masked(mask: bytes, xor: bytes = b"") -> bytes:
    """What was loaded, AND *mask*, XOR *xor*."""
    length = number(3, len(mask))
    value = nested(4, attribute(1, mask)), nested(5, attribute(1, xor or bytes(len(mask))))
    return _expression("bitwise", number(1, _REGISTER), number(2, _REGISTER), length, *value)


# In a register the state is a number of the machine's own order: NF_CT_STATE_BIT.
_INVALID, _ESTABLISHED, _RELATED, _NEW = 1, 2, 4, 8


def _state(bits: int) -> bytes:
    return CONNECTION_STATE + masked(struct.pack("=I", bits)) + differs(bytes(4))


KNOWN, INVALID, NEW = _state(_ESTABLISHED | _RELATED), _state(_INVALID), _state(_NEW)
NOT_IPV4, IS_IPV4 = PROTOCOL + differs(bytes([IPV4])), PROTOCOL + equals(bytes([IPV4]))
IS_IPV6 = PROTOCOL + equals(bytes([IPV6]))
TCP, UDP, _ICMP, _ICMPV6 = 6, 17, 1, 58
IS_TCP = TRANSPORT + equals(bytes([TCP]))

_FLAGS, _RESET_FLAG, _UNREACHABLE = _payload(2, 13, 1), bytes([0x04]), bytes([3])
IS_RESET = IS_TCP + _FLAGS + masked(_RESET_FLAG) + equals(_RESET_FLAG)
_ICMP_TYPE, _UNREACHABLE_IPV6 = _payload(2, 0, 1), bytes([1])
IS_UNREACHABLE = TRANSPORT + equals(bytes([_ICMP])) + _ICMP_TYPE + equals(_UNREACHABLE)
IS_UNREACHABLE_IPV6 = TRANSPORT + equals(bytes([_ICMPV6])) + _ICMP_TYPE + equals(_UNREACHABLE_IPV6)
# What a host says of itself on its link, of which a card has no use: from ::, or fe80::/10.
OF_LINK = (
    IS_IPV6 + SOURCE_IPV6 + equals(bytes(16)),
    IS_IPV6 + _FIRST_OF_SOURCE_IPV6 + masked(b"\xff\xc0") + equals(b"\xfe\x80"),
)


def to_block(block: IPv4Network | IPv6Network) -> bytes:
    """Go on where the destination lies in *block*."""
    family = IS_IPV4 if isinstance(block, IPv4Network) else IS_IPV6
    if not block.prefixlen:
        return family
    destination = DESTINATION if isinstance(block, IPv4Network) else DESTINATION_IPV6
    mask = b"" if block.prefixlen == block.max_prefixlen else masked(block.netmask.packed)
    return family + destination + mask + equals(block.network_address.packed)


def to_port(transport: int, port: int) -> bytes:
    """Go on where it is for that port."""
    to = DESTINATION_PORT + equals(struct.pack("!H", port))
    return TRANSPORT + equals(bytes([transport])) + to


def in_set(name: str) -> bytes:
    """Go on where what was loaded is in the set *name*."""
    return _expression("lookup", text(1, name), number(2, _REGISTER))


def by_map(name: str) -> bytes:
    """Go where the map *name* leads what was loaded; on where it leads nowhere."""
    register = number(3, _VERDICT_REGISTER)
    return _expression("lookup", text(1, name), number(2, _REGISTER), register)


_FIRST_WORD = 8  # NFT_REG32_00: registers of four bytes, of which larger ones are made
_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96, before an address of IPv4
_ORIGINAL = attribute(3, b"\0")  # as the program meant it: NFTA_CT_DIRECTION
_PROTOCOL, _TO_PORT, _TO_IPV4, _TO_IPV6 = 10, 12, 20, 22  # NFT_CT_*


def _load(word: int, value: bytes) -> bytes:
    register = number(1, _FIRST_WORD + word)
    return _expression("immediate", register, nested(2, attribute(1, value)))


def _of_connection(word: int, key: int) -> bytes:
    return _expression("ct", number(1, _FIRST_WORD + word), number(2, key), _ORIGINAL)


_DESTINATIONS = {
    4: _load(2, _MAPPED) + _of_connection(5, _TO_IPV4),
    6: _of_connection(2, _TO_IPV6),
}


def counted_by(name: str, kind: int, version: int) -> bytes:
    """Count, by the destination of the connection of IP's *version* that a packet belongs to, as
    *kind* in the set *name*. Where the set is full, or there is no such connection, the rule ends
    there."""
    begin = _load(0, struct.pack("=I", kind)) + _of_connection(1, _PROTOCOL)
    counter = nested(7, text(1, "counter"), nested(2))
    count = _expression("dynset", text(1, name), number(3, 0), number(4, _FIRST_WORD), counter)
    return begin + _DESTINATIONS[version] + _of_connection(6, _TO_PORT) + count


def more_connections_than(most: int) -> bytes:
    """Go on where there are more at once: `ct count over`."""
    return _expression("connlimit", number(1, most), number(2, 1))


def faster_than(per_second: int) -> bytes:
    """Go on where it was passed more often: `limit rate over`; as many again may come at once."""
    rate = big(1, per_second) + big(2, 1) + number(3, per_second)
    return _expression("limit", rate, number(4, 0), number(5, 1))


# -- what it does


def object_named(kind: int, name: str) -> bytes:
    """Count in that counter; or go on where that quota is used up."""
    return _expression("objref", number(1, kind), text(2, name))


def mark(bit: int) -> bytes:
    """Set *bit* in the packet's mark, and leave the others alone."""
    loaded = _meta(3)
    changed = masked(struct.pack("=I", ~bit & 0xFFFFFFFF), struct.pack("=I", bit))
    return loaded + changed + _expression("meta", number(2, 3), number(3, _REGISTER))


def marked(bit: int) -> bytes:
    """Go on where the packet has *bit* in its mark."""
    return _meta(3) + masked(struct.pack("=I", bit)) + differs(bytes(4))


MASQUERADE = _expression("masq")
_BY_RESET, _BY_ICMP, _PROHIBITED = 1, 2, 3
RESET = _expression("reject", number(1, _BY_RESET))
PROHIBIT = _expression("reject", number(1, _BY_ICMP), attribute(2, bytes([_PROHIBITED])))


def _verdict(code: int, chain: str = "") -> bytes:
    return nested(2, number(1, code), text(2, chain) if chain else b"")


def verdict(code: int, chain: str = "") -> bytes:
    """Decide: DROP, ACCEPT, or JUMP or GOTO to *chain*."""
    register = number(1, _VERDICT_REGISTER)
    return _expression("immediate", register, nested(2, _verdict(code, chain)))
