"""tables.py - pure: who gets what a program sends, as one batch for nf_tables (linux/netfilter/
nf_tables.h).

As nft(8) would print it::

    table inet sandbox {
        chain catch {
            type filter hook prerouting priority mangle; policy accept;
            LOOPBACK accept
            meta l4proto tcp tproxy to :53 accept
        }
        chain refuse {
            type filter hook output priority filter; policy accept;
            LOOPBACK accept
            meta l4proto tcp accept
            udp dport 53 accept
            meta l4proto udp reject with icmpx port-unreachable
            reject with icmpx admin-prohibited
        }
    }

LOOPBACK is "to one of the box's own addresses": what programs inside say to one another is not
touched, nor is an answer to them. "tproxy" hands a connection to the listener at that port as it
is: its own address is the one that the program wanted. A redirect would have Linux track each
connection, which is memory that nobody is charged for; without it there is nothing to fill.
Refused is refused at once: the sender gets EPERM, and who waits for an answer ECONNREFUSED or
EHOSTUNREACH.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache

from sandbox_provisioner.facilities.network.plan.local import OWN_IPV4, OWN_IPV6
from sandbox_provisioner.facilities.network.plan.netlink import (
    ACK,
    APPEND,
    CREATE,
    NETFILTER,
    REQUEST,
    Messages,
    attribute,
    nested,
    numbered,
)

# No program inside may bind a port below 1024, so none is in its way.
PORT = 53
_DNS = struct.pack("!H", PORT)
_TABLE, _CATCH, _REFUSE = "sandbox", "catch", "refuse"
_INET, _IPV4, _IPV6 = 1, 2, 10  # NFPROTO_*
_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NEWTABLE, _NEWCHAIN, _NEWRULE = 0, 3, 6
_PREROUTING, _OUTPUT = 0, 3  # NF_INET_*
_MANGLE, _FILTER = -150, 0  # NF_IP_PRI_*
_ACCEPT = 1  # NF_ACCEPT
_VERDICT, _REGISTER = 0, 8  # NFT_REG_VERDICT, NFT_REG32_00
_FAMILY, _PROTOCOL = 15, 16  # NFT_META_NFPROTO, NFT_META_L4PROTO
_TCP, _UDP = 6, 17
_NETWORK, _TRANSPORT = 1, 2  # headers of a packet
_ICMPX, _PORT_UNREACHABLE, _ADMIN_PROHIBITED = 2, 1, 3  # NFT_REJECT_*
# How they are called, what they are and what of a family's header tells them: offset and bytes.
_LOOPBACK = (
    ("ip daddr 127.0.0.0/8", _IPV4, 16, b"\x7f"),
    (f"ip daddr {OWN_IPV4}", _IPV4, 16, OWN_IPV4.packed),
    ("ip6 daddr ::1", _IPV6, 24, bytes(15) + b"\1"),
    (f"ip6 daddr {OWN_IPV6}", _IPV6, 24, OWN_IPV6.packed),
)


@lru_cache
def who_gets_what() -> Messages:
    """The table, as one transaction: all of it or nothing."""
    parts = list(_parts())
    messages = [numbered(_BATCH_BEGIN, REQUEST, _head(0, _SUBSYSTEM), 0)]
    for number, (_, kind, flags, body) in enumerate(parts, 1):
        messages.append(numbered(_SUBSYSTEM << 8 | kind, REQUEST | ACK | flags, body, number))
    messages.append(numbered(_BATCH_END, REQUEST, _head(0, _SUBSYSTEM), len(parts) + 1))
    return Messages(NETFILTER, b"".join(messages), tuple(name for name, *_ in parts))


def _parts() -> Iterator[tuple[str, int, int, bytes]]:
    """What stands in an error, the kind of message, its flags and its body."""
    head = _head(_INET, 0)
    yield f"table {_TABLE}", _NEWTABLE, CREATE, head + _text(1, _TABLE)
    for chain, hook, priority in ((_CATCH, _PREROUTING, _MANGLE), (_REFUSE, _OUTPUT, _FILTER)):
        where = nested(4, _number(1, hook), _number(2, priority))
        body = _text(1, _TABLE) + _text(3, chain) + where + _text(7, "filter")
        yield f"chain {chain}", _NEWCHAIN, CREATE, head + body
        for name, expressions in _rules(chain):
            body = _text(1, _TABLE) + _text(2, chain) + nested(4, *expressions)
            yield f"{chain}: {name}", _NEWRULE, CREATE | APPEND, head + body


def _rules(chain: str) -> Iterator[tuple[str, tuple[bytes, ...]]]:
    """Of each rule its name, and its expressions."""
    tcp, udp = _is_protocol(_TCP), _is_protocol(_UDP)
    for name, family, offset, data in _LOOPBACK:
        yield f"{name} accept", (*_is_family(family), *_has(_NETWORK, offset, data), _accept())
    if chain == _CATCH:
        to = _value(_DNS), _expression("tproxy", _number(1, 0), _in(3))
        yield f"meta l4proto tcp tproxy to :{PORT} accept", (*tcp, *to, _accept())
        return
    yield "meta l4proto tcp accept", (*tcp, _accept())
    yield f"udp dport {PORT} accept", (*udp, *_has(_TRANSPORT, 2, _DNS), _accept())
    yield "meta l4proto udp reject", (*udp, _reject(_PORT_UNREACHABLE))
    yield "reject", (_reject(_ADMIN_PROHIBITED),)


def _head(family: int, about: int) -> bytes:
    """struct nfgenmsg."""
    return struct.pack("!BBH", family, 0, about)


def _text(kind: int, text: str) -> bytes:
    return attribute(kind, text.encode() + b"\0")


def _number(kind: int, value: int) -> bytes:
    """Numbers of nf_tables are in the network's order."""
    return attribute(kind, struct.pack("!I", value & 0xFFFF_FFFF))


def _in(kind: int) -> bytes:
    return _number(kind, _REGISTER)


def _expression(name: str, *attributes: bytes) -> bytes:
    """One of a rule's list: NFTA_LIST_ELEM, NFTA_EXPR_NAME, NFTA_EXPR_DATA."""
    return nested(1, _text(1, name), nested(2, *attributes))


def _is_family(family: int) -> tuple[bytes, bytes]:
    return _meta(_FAMILY), _equals(bytes((family,)))


def _is_protocol(protocol: int) -> tuple[bytes, bytes]:
    return _meta(_PROTOCOL), _equals(bytes((protocol,)))


def _has(header: int, offset: int, data: bytes) -> tuple[bytes, bytes]:
    """Whether *data* stands at *offset* of a packet's *header*."""
    where = _number(2, header), _number(3, offset), _number(4, len(data))
    return _expression("payload", _in(1), *where), _equals(data)


def _meta(key: int) -> bytes:
    return _expression("meta", _in(1), _number(2, key))


def _equals(data: bytes) -> bytes:
    return _expression("cmp", _in(1), _number(2, 0), nested(3, attribute(1, data)))


def _value(data: bytes) -> bytes:
    return _expression("immediate", _in(1), nested(2, attribute(1, data)))


def _accept() -> bytes:
    verdict = nested(2, _number(1, _ACCEPT))
    return _expression("immediate", _number(1, _VERDICT), nested(2, verdict))


def _reject(code: int) -> bytes:
    return _expression("reject", _number(1, _ICMPX), attribute(2, bytes((code,))))
