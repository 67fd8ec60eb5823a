"""A gateway between a box and the world: what clients say, limits, and how connections end."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator

import dnslib
import pytest
from test_gateway_for_real import echoes, heard, is_name_refused, is_reset
from world import ECHO, FIRST_BYTES_SECONDS, FLOOD, HTTP, TLS, UNHEARD, Box, World, when

pytestmark = pytest.mark.requires("root", "ordinary-user", "openssl")
NAME = "data.example.org"
GET = f"GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode()
EVIL = GET.replace(b"data", b"evil")


@contextlib.contextmanager
def spoken_tls(world: World, inside: Box, name: str | None) -> Iterator[ssl.SSLSocket]:
    context = ssl.create_default_context(cafile=str(world.certificate))
    context.check_hostname = name is not None
    with (
        inside.connect_to(NAME, TLS) as one,
        context.wrap_socket(one, server_hostname=name) as secure,
    ):
        yield secure


def answer_to(one: socket.socket, said: bytes) -> bytes:
    """The body of what a web server answers."""
    one.sendall(said)
    text = b""
    while b"\r\n\r\n" not in text:
        text += one.recv(1 << 16)
    head, _, body = text.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += one.recv(1 << 16)
    return body


# -- what a client says


def test_a_tls_client_that_names_the_name_comes_through(world, box):
    with spoken_tls(world, box(allow=[NAME]), NAME) as secure:
        secure.sendall(b"hello" * 10000)
        assert heard(secure, 5) == b"hello"
    assert world.sni == [NAME]


@pytest.mark.parametrize("name", ["evil.example.org", None])
def test_a_tls_client_that_names_another_or_nobody_says_nothing_to_its_server(world, box, name):
    inside = box(allow=["all"])
    with pytest.raises((ssl.SSLError, OSError)), spoken_tls(world, inside, name):
        pass
    assert world.sni == []
    assert "names" in inside.sentence()
    assert inside.counts_when(lambda counts: counts.names).names[f"{NAME}:443"].refusals == 1


def test_http_requests_for_the_name_come_through_in_any_framing(world, box):
    inside = box(allow=[NAME])
    post = f"POST / HTTP/1.1\r\nHost: {NAME}\r\n".encode()
    with inside.connect_to(NAME, HTTP) as one:
        assert answer_to(one, GET) == NAME.encode()
        body = bytes(200_000)
        assert answer_to(one, post + b"Content-Length: 200000\r\n\r\n" + body) == b"200000"
        chunks = b"5\r\nabcde\r\n1\r\nf\r\n0\r\n\r\n"
        assert answer_to(one, post + b"Transfer-Encoding: chunked\r\n\r\n" + chunks) == b"6"


def test_the_second_request_is_judged_as_the_first_one_is(world, box):
    inside = box(allow=[NAME])
    with inside.connect_to(NAME, HTTP) as one:
        assert answer_to(one, GET) == NAME.encode()
        one.sendall(EVIL)
        assert is_reset(one)
    assert "'evil.example.org'" in inside.sentence()
    assert world.hosts == [NAME]


def test_another_protocol_begins_where_the_server_agrees(box):
    upgrade = GET[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    with box(allow=[NAME]).connect_to(NAME, HTTP) as one:
        one.sendall(upgrade + b"\0early")
        text = b""
        while not text.endswith(b"\0early"):
            text += one.recv(1 << 16)
        assert text.startswith(b"HTTP/1.1 101")
        one.sendall(EVIL)
        assert heard(one, len(EVIL)) == EVIL


def test_who_begins_and_does_not_go_on_is_ended(box):
    inside = box(allow=[NAME])
    with inside.connect_to(NAME, HTTP) as one:
        begun = time.monotonic()
        one.sendall(GET[:10])
        assert is_reset(one)
        assert time.monotonic() - begun >= FIRST_BYTES_SECONDS - 0.1
    assert "did not say within" in inside.sentence()


# -- servers


def test_a_server_may_speak_first(world, box):
    with world.listen(UNHEARD) as listener, box(allow=[NAME]).connect_to(NAME, UNHEARD) as one:
        server, _ = listener.accept()
        with server:
            server.sendall(b"220 hello\r\n")
            assert heard(one, 11) == b"220 hello\r\n"
            one.sendall(b"EHLO me\r\n")
            assert heard(server, 9) == b"EHLO me\r\n"


def test_who_has_said_all_still_hears(box):
    count = 3_000_000
    with box(allow=[NAME]).connect_to(NAME, FLOOD) as one:
        one.sendall(b"0\n" + bytes(count))
        one.shutdown(socket.SHUT_WR)
        assert int(one.recv(100)) == count
        assert one.recv(1) == b""


def test_all_bytes_come_in_their_order_both_ways(box):
    data = b"".join(number.to_bytes(4, "big") for number in range(500_000))
    with box(allow=[NAME]).connect_to(NAME, ECHO) as one:
        sender = threading.Thread(target=one.sendall, args=(data,))
        sender.start()
        assert heard(one, len(data)) == data
        sender.join()


def _reset(one: socket.socket) -> None:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()


def test_a_reset_goes_to_the_other_side(world, box):
    inside = box(allow=[NAME])
    with world.listen(UNHEARD) as listener:
        for is_client in (True, False):
            one = inside.connect_to(NAME, UNHEARD)
            server, _ = listener.accept()
            here, there = (one, server) if is_client else (server, one)
            here.sendall(b"\0")
            assert there.recv(1) == b"\0"
            _reset(here)
            assert is_reset(there)
    assert is_name_refused(inside, NAME, UNHEARD)


def test_who_does_not_read_keeps_nobody_else_waiting(world, box):
    inside = box(allow=[NAME])
    with contextlib.ExitStack() as stack:
        for _ in range(40):  # more than there are pipes for one box
            deaf = stack.enter_context(inside.connect_to(NAME, FLOOD))
            deaf.sendall(b"100000000\n")
            assert deaf.recv(1)
        assert echoes(inside.connect_to(NAME, ECHO))
        assert echoes(box(allow=[NAME]).connect_to(NAME, ECHO))


# -- limits


def test_more_connections_than_allowed_are_refused(box):
    inside = box(allow=[NAME], connections=2)
    with inside.connect_to(NAME, ECHO), inside.connect_to(NAME, ECHO) as second:
        assert is_name_refused(inside, NAME, ECHO)
        assert "has 2 connections" in inside.sentence()
        assert echoes(second)
    when(lambda: _is_served(inside), bool)


def _is_served(inside: Box) -> bool:
    try:
        return echoes(inside.connect_to(NAME, ECHO))
    except ConnectionResetError:
        return False


def test_more_new_connections_than_allowed_wait(box):
    inside = box(allow=[NAME], new_per_second=20)
    address = inside.address_of(NAME)
    begun = time.monotonic()
    for _ in range(30):
        assert echoes(inside.connect(address, ECHO))
    assert time.monotonic() - begun > 0.45  # ten more than at once, at twenty a second


def test_a_rate_holds_in_each_direction(box):
    """That it is reached, too, tests/unit shows, where no machine can be too busy."""
    inside = box(allow=[NAME], down_bits=16_000_000, up_bits=8_000_000)
    with inside.connect_to(NAME, FLOOD) as one:
        begun = time.monotonic()
        one.sendall(b"1400000\n")
        heard(one, 1_400_000)
        assert time.monotonic() - begun > 0.48  # but for a burst of 0.2 s
        begun = time.monotonic()
        one.sendall(bytes(700_000))
        one.shutdown(socket.SHUT_WR)
        assert one.recv(100) == b"700000"
        assert time.monotonic() - begun > 0.48


def test_of_a_quota_what_was_used_before_is_gone(world, box):
    inside = box(allow=["*.example.org"], quota_bytes=1000, used_bytes=5000)
    assert inside.query(NAME).header.rcode == dnslib.RCODE.SERVFAIL
    assert "used up its network_quota of 1000 bytes" in inside.sentence()
    assert inside.counts_when(lambda counts: counts.refusals > 0).quota_used_up
    inside = box(allow=["*.example.org"], quota_bytes=100_000, used_bytes=90_000)
    with inside.connect_to(NAME, FLOOD) as one:
        one.sendall(b"10000000\n")
        count = 0
        with contextlib.suppress(ConnectionResetError):
            while data := one.recv(1 << 16):
                count += len(data)
    assert 0 < count <= 10_000


def test_when_the_quota_is_used_up_the_network_ends(world, box):
    inside = box(allow=["*.example.org"], quota_bytes=100_000)
    bystander = inside.connect_to(NAME, ECHO)
    with inside.connect_to(NAME, FLOOD) as one:
        one.sendall(b"10000000\n")
        count = 0
        with contextlib.suppress(ConnectionResetError):
            while data := one.recv(1 << 16):
                count += len(data)
        assert count <= 100_000
    assert is_reset(bystander)
    assert "used up its network_quota of 100000 bytes" in inside.sentence()
    assert is_name_refused(inside, NAME, ECHO)
    world.dns.asked.clear()
    assert inside.query("tells-a-secret.example.org").header.rcode == dnslib.RCODE.SERVFAIL
    assert world.dns.asked == []
    found = inside.counts_when(lambda counts: counts.refusals > 1)
    assert found.quota_used_up
    assert found.up_bytes + found.down_bytes == 100_000
