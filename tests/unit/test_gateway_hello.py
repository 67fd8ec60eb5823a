"""gateway/gate.py with hello.py: what a TLS client says first."""

from __future__ import annotations

import ssl
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_provisioner.gateway.gate import First
from sandbox_provisioner.gateway.hello import RETRY
from sandbox_provisioner.gateway.refused import Refused

NAME = "data.example.org"


def hello_of(name: str | None) -> bytes:
    """What OpenSSL says first."""
    context = ssl.create_default_context()
    context.check_hostname = name is not None
    out = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return out.read()


def vector(size: int, data: bytes) -> bytes:
    return len(data).to_bytes(size, "big") + data


def names(*told: bytes, kind: int = 0) -> bytes:
    entries = b"".join(bytes([kind]) + vector(2, name) for name in told)
    return struct.pack("!H", 0) + vector(2, vector(2, entries))


def body(*extensions: bytes) -> bytes:
    """A ClientHello as little as it can be."""
    return bytes(2 + 32) + vector(1, b"") + vector(2, b"\x13\x01") + vector(1, b"\0") + (
        vector(2, b"".join(extensions))
    )  # fmt: skip


def message(content: bytes) -> bytes:
    return b"\x01" + vector(3, content)


def records(content: bytes, *sizes: int, kind: int = 0x16) -> bytes:
    """*content* in records of *sizes*, and one of the rest."""
    found = b""
    for size in (*sizes, len(content)):
        part, content = content[:size], content[size:]
        found += bytes([kind, 3, 1]) + vector(2, part) if part else b""
    return found


GOOD = records(message(body(names(NAME.encode()))))
SERVER_HELLO = records(b"\x02" + vector(3, b"\3\3" + bytes(32) + bytes(20)))
RETRY_HELLO = records(b"\x02" + vector(3, b"\3\3" + RETRY + bytes(20)))


def gate() -> First:
    return First(NAME, 443)


def why(data: bytes) -> str:
    with pytest.raises(Refused) as refused:
        gate().feed(data)
    return refused.value.why


def test_a_hello_that_names_the_name_may_go():
    for said in (hello_of(NAME), hello_of(NAME.upper()), hello_of(f"{NAME}."), GOOD):
        assert gate().feed(said) == said


@pytest.mark.parametrize("name", ["example.org", "evil.data.example.org", "data.example.or"])
def test_a_hello_that_names_another_is_refused(name):
    assert name in why(hello_of(name))


def test_a_hello_that_names_nobody_is_refused():
    assert "names no server" in why(hello_of(None))
    assert "names no server" in why(records(message(body())))
    assert "names no server" in why(records(message(body()[:-2])))


@pytest.mark.parametrize("version", [b"\0\0", b"\2\1", b"\4\0", b"\x0f\xff"])
@pytest.mark.parametrize("size", [1, 1000])
def test_a_hello_in_a_record_of_a_version_that_some_servers_overlook_is_refused(version, size):
    """Go's crypto/tls takes each below 0x1000 for a first record, and an alert before it."""
    evil = records(message(body(names(b"example.org"))), size)
    evil = evil[:1] + version + evil[3:]
    warning = records(b"\1\0", kind=0x15)
    for said in (evil, warning[:1] + version + warning[3:] + evil):
        assert "looks like TLS" in why(said)
        one = gate()
        assert one.feed(said[:5]) == b""
        with pytest.raises(Refused):
            one.feed(said[5:6])


def test_a_hello_may_be_in_pieces_of_any_size():
    said = records(message(body(names(NAME.encode()))), 1, 2, 1, 30)
    one = gate()
    for position in range(len(said) - 1):
        assert one.feed(said[position : position + 1]) == b""
        assert one.is_undecided
    assert one.feed(said[-1:]) == said


@pytest.mark.parametrize(
    "said",
    [
        records(message(body(names(NAME.encode(), b"example.org")))),
        records(message(body(names(NAME.encode()), names(b"example.org")))),
        records(message(body(names(NAME.encode(), kind=1)))),
        records(message(body(names(b"")))),
        records(message(body(names(NAME.encode() + b"\0")))),
        records(message(body(names("dáta.example.org".encode())))),
        records(message(body(names(NAME.encode())) + b"\0")),
        records(message(body(names(NAME.encode()))[:-1])),
        records(message(body(names(NAME.encode()))) + message(body(names(b"example.org")))),
        records(b"\x02" + vector(3, body(names(NAME.encode())))),
        records(b"\x01\xff\xff\xff" + bytes(100)),
        records(message(body(names(NAME.encode()))), *[1] * 40),
        records(message(bytes(30000)), *[16000] * 3),
        bytes([0x16, 3, 1, 0, 0]),
        bytes([0x16, 3, 1, 0xFF, 0xFF]),
    ],
)
def test_a_hello_that_may_be_read_in_two_ways_is_refused(said):
    assert why(said)


@pytest.mark.parametrize("extension", [0xFE0D, 0xFFCE, 0xFF02, 0xFF0A])
def test_a_hello_that_hides_another_is_refused(extension):
    hidden = struct.pack("!H", extension) + vector(2, b"hidden")
    assert "encrypted" in why(records(message(body(names(NAME.encode()), hidden))))


@pytest.mark.parametrize("kind", [0x14, 0x15, 0x17])
def test_what_is_tls_and_begins_with_no_hello_is_refused(kind):
    assert "without a hello" in why(records(b"\1", kind=kind) + GOOD)


@pytest.mark.parametrize("version", [b"\0\2", b"\3\1", b"\3\3"])
def test_a_hello_of_ssl_2_is_refused(version):
    said = b"\x80\x2e\x01" + version + bytes(40)
    assert "SSL 2" in why(said)
    one = gate()
    assert one.feed(said[:3]) == b""


def test_what_follows_a_hello_waits_for_the_server():
    one = gate()
    assert one.feed(GOOD) == GOOD
    assert one.wants_answer
    assert one.feed(b"early") == b""
    one.answer(SERVER_HELLO[:11])
    assert one.wants_answer
    one.answer(SERVER_HELLO[11:])
    assert one.is_open
    assert one.feed(b"more") == b"earlymore"


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400", b"\x15\x03\x03\0\2\2\x28", SERVER_HELLO])
def test_any_other_answer_lets_all_through(answer):
    one = gate()
    one.feed(GOOD)
    one.answer(answer)
    assert one.is_open


@pytest.mark.parametrize("between", [b"", records(b"\1", kind=0x14), records(b"x", kind=0x17)])
def test_a_second_hello_has_to_name_the_same(between):
    for name, may in ((NAME, True), ("example.org", False)):
        one = gate()
        one.feed(GOOD)
        for position in range(len(RETRY_HELLO)):
            if one.wants_answer:
                one.answer(RETRY_HELLO[position : position + 1])
        assert not one.is_open
        second = between + records(message(body(names(name.encode()))))
        if may:
            assert one.feed(second + b"x") == second + b"x"
            assert one.is_open
        else:
            with pytest.raises(Refused, match=r"example\.org"):
                one.feed(second)


@pytest.mark.parametrize("early", [records(bytes(40), *[1] * 40, kind=0x17),
                                   records(bytes(70000), *[16000] * 5, kind=0x17)])  # fmt: skip
def test_a_second_hello_does_not_take_forever(early):
    one = gate()
    one.feed(GOOD)
    one.answer(RETRY_HELLO)
    with pytest.raises(Refused):
        one.feed(early)


@given(st.lists(st.binary(max_size=80), max_size=8), st.binary(max_size=60), st.booleans())
def test_whatever_comes_is_judged_refused_or_held_back(pieces, answer, is_tls):
    one = First(NAME, 443)
    sent, released = b"", b""
    try:
        for piece in ([GOOD[:20]] if is_tls else []) + pieces:
            sent += piece
            released += one.feed(piece)
            if one.wants_answer:
                one.answer(answer)
                released += one.feed(b"")
    except Refused:
        return
    assert sent.startswith(released)


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_a_hello_with_one_byte_changed_names_the_name_or_is_refused(position, value):
    changed = bytearray(GOOD)
    changed[position] = value
    try:
        released = gate().feed(bytes(changed))
    except Refused:
        return
    at = GOOD.index(NAME.encode())
    is_in_name = at <= position < at + len(NAME)
    is_first = position in (0, 1)  # then it is no TLS, and no server takes it for such
    if released and is_in_name:
        assert chr(value).lower() == chr(GOOD[position]).lower()
    assert not released or is_first or NAME.encode() in bytes(changed).lower()
