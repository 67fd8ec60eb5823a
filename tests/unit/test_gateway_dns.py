"""gateway/dns.py: what is asked of the name server; names.py: addresses that stand for names."""

from __future__ import annotations

import dnslib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_provisioner.gateway import dns, names
from sandbox_provisioner.gateway.refused import Refused

NAME = "data.example.org"


def query(name: str = NAME, kind: str = "A") -> dns.Question:
    return dns.read_query(dnslib.DNSRecord.question(name, kind).pack())


def test_a_question_is_read_in_small_letters_and_answered_as_it_was_written():
    question = query("Data.Example.ORG")
    assert (question.name, question.kind) == (NAME, dns.A_TYPE)
    answer = dnslib.DNSRecord.parse(dns.address_answer(question, "198.18.1.0"))
    assert (answer.header.id, answer.header.qr, answer.header.rcode) == (question.number, 1, 0)
    assert answer.q.qname == answer.rr[0].rname == "Data.Example.ORG."
    assert str(answer.rr[0].rdata) == "198.18.1.0"


def test_each_kind_of_answer_is_one():
    six = dnslib.DNSRecord.parse(dns.address_answer(query(kind="AAAA"), "fd53::1"))
    assert str(six.rr[0].rdata) == "fd53::1"
    reverse = dns.name_answer(query("1.0.18.198.in-addr.arpa", "PTR"), NAME)
    assert str(dnslib.DNSRecord.parse(reverse).rr[0].rdata) == f"{NAME}."
    for answer, code in ((dns.empty_answer, 0), (dns.no_such_name, 3), (dns.failed, 2)):
        parsed = dnslib.DNSRecord.parse(answer(query(kind="HTTPS")))
        assert (parsed.header.rcode, parsed.rr) == (code, [])


def test_a_query_with_more_than_its_question_is_answered():
    with_edns = dnslib.DNSRecord.question(NAME)
    with_edns.add_ar(dnslib.EDNS0(udp_len=1232))
    assert dns.read_query(with_edns.pack()).name == NAME


def _changed(**fields: int) -> bytes:
    record = dnslib.DNSRecord.question(NAME)
    for name, value in fields.items():
        setattr(record.header, name, value)
    return bytes(record.pack())


@pytest.mark.parametrize(
    "message",
    [
        b"",
        bytes(600),
        _changed(qr=1),
        _changed(opcode=4),
        dnslib.DNSRecord(questions=[dnslib.DNSQuestion(NAME)] * 2).pack(),
        dnslib.DNSRecord().pack(),
        dnslib.DNSRecord(q=dnslib.DNSQuestion(NAME, qclass=3)).pack(),
        dnslib.DNSRecord.question(NAME).pack()[:-3],
        bytes(4) + b"\0\1" + bytes(6) + b"\xc0\x0c" * 100,
        bytes(4) + b"\0\1" + bytes(6) + b"\x02\xff\xfe\0\0\1\0\1",
        bytes(4) + b"\0\1" + bytes(6) + b"\x50" + b"a" * 80 + b"\0\0\1\0\1",
        bytes(4) + b"\0\1" + bytes(6) + b"\x03a.b\0\0\1\0\1",
        bytes(4) + b"\0\1" + bytes(6) + (b"\x3f" + b"a" * 63) * 4 + b"\0\0\1\0\1",
    ],
)
def test_what_is_no_question_is_refused(message):
    with pytest.raises(Refused):
        dns.read_query(message)


@given(st.binary(max_size=600), st.booleans())
def test_whatever_comes_is_read_or_refused_and_answered(message, has_head):
    try:
        question = dns.read_query((bytes(4) + b"\0\1" + bytes(6) if has_head else b"") + message)
    except Refused:
        return
    dns.address_asked_for(question.name)
    answer = dnslib.DNSRecord.parse(dns.no_such_name(question))
    assert answer.q.qname == question.label


def test_the_address_of_a_reverse_query_is_read():
    nibbles = ".".join(reversed("fd53616e64626f780000000000000100"))
    assert dns.address_asked_for("0.1.18.198.in-addr.arpa") == "198.18.1.0"
    assert dns.address_asked_for(f"{nibbles}.ip6.arpa") == "fd53:616e:6462:6f78::100"
    for other in ("1.198.in-addr.arpa", "300.1.1.1.in-addr.arpa", "1.ip6.arpa", "in-addr.arpa"):
        assert dns.address_asked_for(other) is None


# -- the addresses that stand for names


def bound(table: names.Names, name: str, now: float = 0.0) -> names.Binding:
    binding = table.bind(name, now)
    assert binding is not None
    return binding


def test_a_name_keeps_its_addresses():
    table = names.Names()
    one, other = bound(table, "a.example"), bound(table, "b.example")
    assert (one.v4, one.v6) == ("198.18.1.0", "fd53:616e:6462:6f78::100")
    assert (other.v4, bound(table, "a.example")) == ("198.18.1.1", one)
    assert table.at(one.v4) is table.at(one.v6) is one
    for address in ("198.18.0.1", "198.18.1.2", "198.20.0.0", "8.8.8.8", "::1", "fd53::1"):
        assert table.at(address) is None


def test_an_address_that_somebody_may_use_goes_to_no_other_name():
    table = names.Names(most=2)
    one, other = bound(table, "a.example"), bound(table, "b.example")
    one.connections = 1
    assert table.bind("c.example", now=names.REST_SECONDS - 1) is None
    later = names.REST_SECONDS + 1
    third = bound(table, "c.example", later)
    assert table.at(other.v4) is None
    assert table.at(one.v4) is one
    assert third.v4 not in (one.v4, other.v4)
    assert table.bind("d.example", later) is None


def test_a_name_that_led_nowhere_takes_no_room():
    table = names.Names(most=1)
    table.forget(bound(table, "a.example"))
    assert bound(table, "b.example").number == 257


def test_addresses_go_round_and_leave_out_those_in_use(monkeypatch):
    monkeypatch.setattr(names, "_ADDRESSES", 259)
    table = names.Names(most=3)
    first = [bound(table, name).number for name in "abc"]
    assert first == [256, 257, 258]
    again = bound(table, "d", names.REST_SECONDS + 1)
    assert again.number == 256
    assert names.is_synthetic("198.18.0.1")
    assert not names.is_synthetic("8.8.8.8")
