"""gateway/dns.py - pure, in the gateway: what a program asks of the name server, and its answers.

Messages are dnslib's (RFC 1035). Of a query only the head and the one question are read.

May import: dnslib, refused.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from dnslib import AAAA, CLASS, PTR, QTYPE, RCODE, RR, A, DNSHeader, DNSQuestion, DNSRecord
from dnslib.dns import DNSError
from dnslib.label import DNSBuffer, DNSLabel

from sandbox_provisioner.gateway.refused import Refused

MOST_OF_QUERY = 512
# Programs ask again after that; the address that they have stays theirs for longer.
TTL_SECONDS = 60
# What rests of a message behind its head: the root's name, a type and a class.
_LEAST = 12 + 5
_REVERSE = re.compile(r"(?:[0-9a-f]{1,3}\.)+(?:in-addr|ip6)\.arpa")
_IPV6_NIBBLES = 32
# RFC 1035, 2.3.4: 255 bytes, with the root's; dnslib writes two less.
_MOST_OF_LABEL, _MOST_OF_NAME = 63, 253

A_TYPE: int = QTYPE.A
AAAA_TYPE: int = QTYPE.AAAA
PTR_TYPE: int = QTYPE.PTR


class Question(NamedTuple):
    """A query: its number, whom it asks for (in small letters), the type of record, and how the
    name was written."""

    number: int
    name: str
    kind: int
    wants_recursion: bool
    label: DNSLabel

    @property
    def asks_for_address(self) -> bool:
        """Whether what it wants is an address."""
        return self.kind in (A_TYPE, AAAA_TYPE)


def read_query(message: bytes) -> Question:
    """What *message* asks; Refused where it is no query of one question."""
    if not _LEAST <= len(message) <= MOST_OF_QUERY:
        raise Refused("a query of that length is none")
    buffer = DNSBuffer(message)
    try:
        header = DNSHeader.parse(buffer)
        question = DNSQuestion.parse(buffer)
    except (DNSError, ValueError) as error:  # DNSLabelError and UnicodeError are a ValueError
        raise Refused(f"a query that cannot be read: {error}") from None
    if header.get_qr() or header.get_opcode() or header.q != 1:
        raise Refused("no query, or none of one question")
    if question.qclass != CLASS.IN:
        raise Refused("a query of another class than IN")
    labels = question.qname.label
    # dnslib reads longer labels than there are, and could not write them again.
    if any(len(label) > _MOST_OF_LABEL or b"." in label for label in labels):
        raise Refused("a name that is none")
    if sum(map(len, labels)) + len(labels) > _MOST_OF_NAME:
        raise Refused("a name that is too long")
    name = str(question.qname).rstrip(".").lower()
    return Question(header.id, name, question.qtype, bool(header.get_rd()), question.qname)


def address_asked_for(name: str) -> str | None:
    """The address in the name of a PTR query; None where there is none."""
    if not _REVERSE.fullmatch(name):
        return None
    *parts, kind, _ = name.split(".")
    parts.reverse()
    try:
        if kind == "in-addr":
            return str(IPv4Address(".".join(parts)))
        if len(parts) == _IPV6_NIBBLES:
            return str(IPv6Address(int("".join(parts), 16)))
    except ValueError:
        pass
    return None


def address_answer(question: Question, address: str) -> bytes:
    """That *address* is the one asked for."""
    data = AAAA(address) if question.kind == AAAA_TYPE else A(address)
    return _answer(question, RR(question.label, question.kind, ttl=TTL_SECONDS, rdata=data))


def name_answer(question: Question, name: str) -> bytes:
    """That *name* belongs to the address asked for."""
    return _answer(question, RR(question.label, PTR_TYPE, ttl=TTL_SECONDS, rdata=PTR(name)))


def empty_answer(question: Question) -> bytes:
    """That the name exists, without a record of that type."""
    return _answer(question)


def no_such_name(question: Question) -> bytes:
    """NXDOMAIN."""
    return _answer(question, code=RCODE.NXDOMAIN)


def failed(question: Question) -> bytes:
    """SERVFAIL: to be asked again."""
    return _answer(question, code=RCODE.SERVFAIL)


def _answer(question: Question, *records: RR, code: int = 0) -> bytes:
    header = DNSHeader(id=question.number, qr=1, ra=1, rd=int(question.wants_recursion))
    header.set_rcode(code)
    asked = DNSQuestion(question.label, question.kind)
    return bytes(DNSRecord(header, questions=[asked], rr=list(records)).pack())
