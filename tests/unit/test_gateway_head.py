"""gateway/gate.py with head.py: what an HTTP client says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_provisioner.gateway.gate import First
from sandbox_provisioner.gateway.refused import Refused

NAME = "data.example.org"
GET = b"GET /a HTTP/1.1\r\nHost: data.example.org\r\n\r\n"
EVIL = b"GET /a HTTP/1.1\r\nHost: example.org\r\n\r\n"


def request(first: str = "GET / HTTP/1.1", host: str | None = NAME, *fields: str) -> bytes:
    lines = [first, *([] if host is None else [f"Host: {host}"]), *fields, "", ""]
    return "\r\n".join(lines).encode("latin-1")


def why(data: bytes, port: int = 8080) -> str:
    with pytest.raises(Refused) as refused:
        First(NAME, port).feed(data)
    return refused.value.why


def passes(data: bytes, port: int = 8080) -> bool:
    return First(NAME, port).feed(data) == data


@pytest.mark.parametrize(
    "said",
    [
        GET,
        request(host=f"{NAME.upper()}:8080"),
        request(host=f"{NAME}."),
        request(f"GET http://{NAME}/x HTTP/1.1"),
        request(f"GET HTTP://{NAME}:80 HTTP/1.1"),
        request("OPTIONS * HTTP/1.1"),
        request("get /é HTTP/1.0"),
        b"\r\n" + GET,
        GET * 3,
        request("POST / HTTP/1.1", NAME, "Content-Length: 5") + b"12345" + GET,
        request("POST / HTTP/1.1", NAME, "Transfer-Encoding: Chunked")
        + b"5;x=y\r\n12345\r\n0\r\nA: b\r\n\r\n" + GET,
        request("POST / HTTP/1.1", NAME, f"Content-Length: {len(EVIL)}") + EVIL + GET,
    ],
)  # fmt: skip
def test_requests_for_the_name_may_go_whatever_their_bodies_hold(said):
    assert passes(said)
    one, released = First(NAME, 80), b""
    for position in range(len(said)):
        released += one.feed(said[position : position + 1])
    assert released == said


@pytest.mark.parametrize(
    "said",
    [
        EVIL,
        GET + EVIL,
        request(host=None),
        request(host=""),
        request("GET / HTTP/1.0", None),
        request(host=f"{NAME}, example.org"),
        request(host=f"{NAME}@example.org"),
        request(host=f"example.org#{NAME}"),
        request("GET / HTTP/1.1", NAME, "Host: example.org"),
        request("GET / HTTP/1.1", NAME, f"Host: {NAME}"),
        request("GET / HTTP/1.1", NAME, " example.org"),
        request("GET / HTTP/1.1", None, f"Host : {NAME}"),
        request("GET http://example.org/ HTTP/1.1"),
        request(f"GET http://{NAME}@example.org/ HTTP/1.1"),
        request(f"GET ftp://{NAME}/ HTTP/1.1"),
        request("GET example.org HTTP/1.1"),
        request(f"CONNECT {NAME}:443 HTTP/1.1"),
        request("CONNECT example.org:443 HTTP/1.1"),
        request("GET / HTTP/2.0"),
        request("GET / http/1.1"),
        request("GET  / HTTP/1.1"),
        request("GET\t/ HTTP/1.1"),
        request("GET\r/ HTTP/1.1"),
        request("GET\x1c/ HTTP/1.1"),
        request("GET\xa0/ HTTP/1.1"),
        b"\x1f" + GET,
        b"\x85" + EVIL,
        b"\xa0" + EVIL,
        b"CONNECT example.org:443\r\n\r\n",
        b"GET http://example.org/\r\n\r\n",
        request("GET / HTTP/1.1 "),
        request("GET /\x01 HTTP/1.1"),
        b" " + GET,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        GET.replace(b"\r\n", b"\n"),
        b"GET / HTTP/1.1\nHost: example.org\r\n\r\n",
        request("GET / HTTP/1.1", NAME, "X: a\rHost: example.org"),
        request("GET / HTTP/1.1", NAME, "X: a\x00"),
        request("GET / HTTP/1.1", NAME, "Content-Length: 1", "Content-Length: 1"),
        request("GET / HTTP/1.1", NAME, "Content-Length: 1, 1"),
        request("GET / HTTP/1.1", NAME, "Content-Length: +1"),
        request("GET / HTTP/1.1", NAME, "Content-Length: -1"),
        request("GET / HTTP/1.1", NAME, "Content-Length: 0x1"),
        request("GET / HTTP/1.1", NAME, "Content-Length: 1" + "0" * 30),
        request("GET / HTTP/1.1", NAME, "Content-Length: 1", "Transfer-Encoding: chunked"),
        request("GET / HTTP/1.1", NAME, "Transfer-Encoding: gzip, chunked"),
        request("GET / HTTP/1.1", NAME, "Transfer-Encoding: chunked", "Transfer-Encoding: x"),
        request("GET / HTTP/1.1", NAME, "Transfer-Encoding: \x0bchunked"),
        request("GET / HTTP/1.0", NAME, "Transfer-Encoding: chunked"),
        request("GET / HTTP/1.1", NAME, "Transfer-Encoding: chunked") + b"x\r\n",
        request("GET / HTTP/1.1", NAME, "Transfer-Encoding: chunked") + b"-1\r\n",
        request("GET / HTTP/1.1", NAME, "Transfer-Encoding: chunked") + b"1\r\nab",
        request("GET / HTTP/1.1", NAME, "Transfer-Encoding: chunked") + b"0\r\nno field\r\n",
        request("GET / HTTP/1.1", NAME, "Transfer-Encoding: chunked") + b"1" * 5000,
        b"GET /" + b"a" * 70000,
        request("GET / HTTP/1.1", NAME, "X:" + " " * 60000 + "\0"),  # in a moment, not in a year
    ],
)
def test_what_is_for_another_or_may_be_read_in_two_ways_is_refused(said):
    assert why(said, 8080)
    assert why(said, 80)


def test_nothing_of_a_request_for_another_goes():
    one = First(NAME, 80)
    assert one.feed(GET) == GET
    assert one.feed(EVIL[:-1]) == b""
    with pytest.raises(Refused, match=r"example\.org"):
        one.feed(EVIL[-1:])


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9.6 a\r\n",
        b"EHLO me\r\n",
        b"*1\r\n$4\r\nPING\r\n",
        b"\0\0\0\x08\x04\xd2\x16\x2f",
        b'{"jsonrpc": "2.0"}',
        bytes.fromhex("300c020101600702010304008000"),
        bytes.fromhex("301d02010177188016") + b"1.3.6.1.4.1.1466.20037",
        b"RFB 003.008\n",
        b"AMQP\0\0\x09\x01",
        b"GET /\r\n",
        b"\x16\x01\0\0\x01\0\0\0",
        b"\x15\x01\0\0\x03\0",
        b"\x16\x10",
        b"\xff\xff\x02",
        b"\x80\x00\x01\x09",
    ],
)
def test_any_other_protocol_goes_but_to_the_port_of_http(said):
    assert passes(said)
    one = First(NAME, 80)
    try:
        assert one.feed(said) == b""
    except Refused:
        return
    assert one.is_undecided


def test_what_may_become_a_request_is_held_back():
    one = First(NAME, 8080)
    for piece in (b"\r\n", b"GE", b"T ", b"/ HT"):
        assert one.feed(piece) == b""
        assert one.is_undecided
    assert First(NAME, 8080).feed(b"hello\n") == b"hello\n"


UPGRADE = request("GET / HTTP/1.1", NAME, "Connection: Upgrade", "Upgrade: websocket")


def upgraded(*answers: bytes, said: bytes = UPGRADE) -> First:
    one = First(NAME, 80)
    assert one.feed(said) == said
    assert one.wants_answer
    assert one.feed(b"more") == b""
    assert not one.is_undecided
    for answer in answers:
        one.answer(answer)
    return one


def test_another_protocol_begins_when_the_server_says_so():
    interim = b"HTTP/1.1 103 Hints\r\nA: b\r\n\r\n"
    for answers in (
        (b"HTTP/1.1 101 Switching\r\n",),
        (interim[:20], interim[20:], b"HTTP/1.1 101 \r\n"),
    ):
        one = upgraded(*answers)
        assert one.is_open
        assert one.feed(b"\0") == b"more\0"


def test_where_the_server_stays_with_http_requests_go_on_to_be_judged():
    one = upgraded(b"HTTP/1.1 200 OK\r\n")
    assert not one.is_open
    assert not one.wants_answer
    with pytest.raises(Refused):
        one.feed(EVIL)


@pytest.mark.parametrize(
    "asked",
    [b"h2c", b"websocket, h2c", b"x,\tH2C", b"h2c\r\nUpgrade: websocket",
     b"websocket\r\nUpgrade: h2c", b"TLS/1.0", b"HTTP/2.0, x"],
)  # fmt: skip
def test_what_could_name_another_host_unseen_is_not_switched_to(asked):
    with pytest.raises(Refused, match="requests are not followed"):
        upgraded(b"HTTP/1.1 101 Switching\r\n", said=UPGRADE.replace(b"websocket", asked))


def test_answers_have_an_end():
    with pytest.raises(Refused, match="too long"):
        upgraded(b"a" * 70000)


def test_a_later_request_for_another_protocol_is_no_way_out():
    one = First(NAME, 80)
    assert one.feed(GET + UPGRADE) == GET + UPGRADE
    assert not one.wants_answer
    with pytest.raises(Refused):
        one.feed(EVIL)


PIECES = st.sampled_from(
    [GET, EVIL, UPGRADE, b"\r\n", b"GET / HTTP/1.1\r\n", b"Host: data.example.org\r\n", b"\n",
     b"Host: example.org\r\n", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n",
     b"3\r\n", b"abc", b"0\r\n", b":", b" ", b"\0", b"HTTP/1.1"]
)  # fmt: skip


@given(st.lists(PIECES | st.binary(max_size=10), max_size=12), st.sampled_from([80, 8080]))
def test_whatever_comes_nothing_is_let_go_that_a_server_takes_for_a_request_to_another(
    pieces, port
):
    one, sent, released = First(NAME, port), b"", b""
    try:
        for piece in pieces:
            sent += piece
            released += one.feed(piece)
    except Refused:
        pass
    assert sent.startswith(released)
    if not one.is_open:
        assert _hosts_by_another_parser(released) <= {NAME.encode()}


def _hosts_by_another_parser(said: bytes) -> set[bytes]:
    """Those of the requests that a plain server finds, which stops at what it does not know."""
    hosts = set()
    while said:
        while said.startswith(b"\r\n"):
            said = said.removeprefix(b"\r\n")
        head, end, said = said.partition(b"\r\n\r\n")
        if not end:
            break
        fields = dict(
            line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line
        )
        hosts.add(fields.get(b"host", b"nobody").strip().partition(b":")[0])
        if fields.get(b"transfer-encoding", b"").strip() == b"chunked":
            while (size := said.partition(b"\r\n")[0]) and int(size.split(b";")[0] or b"0", 16):
                said = said.partition(b"\r\n")[2][int(size, 16) + 2 :]
            said = said.partition(b"\r\n\r\n")[2] if not said.startswith(b"0\r\n\r\n") else said[5:]
        else:
            said = said[int(fields.get(b"content-length", b"0") or b"0") :]
    return hosts
