"""A gateway between a box and the world: what somebody does who wants it to fail."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer

import dnslib
import pytest
from test_gateway_for_real import echoes
from world import ECHO, UNHEARD, WEB, Box, Gateway, Hosts, World, when

pytestmark = pytest.mark.requires("root", "ordinary-user", "openssl")
NAME = "data.example.org"
PIPES = 8  # that a gateway may have made for good; a box has more descriptors
EVIL = b"GET / HTTP/1.1\r\nHost: evil.example.org\r\n\r\n"


@contextlib.contextmanager
def web_server(world: World) -> Iterator[list[str]]:
    """Python's own, at a port that is not known for it; the hosts that it was asked for."""
    hosts: list[str] = []
    server = ThreadingHTTPServer(("", 0), Hosts, bind_and_activate=False)
    server.socket.close()
    server.socket, server.hosts = world.listen(UNHEARD), hosts  # type: ignore[attr-defined]
    server.daemon_threads = True
    serving = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    serving.start()
    try:
        yield hosts
    finally:
        server.shutdown()
        serving.join()
        server.server_close()


def say_and_end(one: socket.socket, said: bytes) -> None:
    """All of it, and hear whatever comes."""
    with one, contextlib.suppress(OSError):
        one.sendall(said)
        one.shutdown(socket.SHUT_WR)
        while one.recv(1 << 16):
            pass


@pytest.mark.parametrize(
    "said",
    [
        b"\x1f" + EVIL,
        b"\xa0\x85" + EVIL,
        EVIL.replace(b"GET /", b"GET\xa0/"),
        EVIL.replace(b"GET /", b"GET\r/"),
        EVIL.replace(b"\r\n", b"\n"),
        EVIL.replace(b"evil", b"data") + EVIL,
    ],
)
def test_no_request_for_another_comes_by_what_a_server_overlooks(world, box, said):
    with web_server(world) as hosts:
        say_and_end(world.machine.call(lambda: socket.create_connection((WEB, UNHEARD))), said)
        assert "evil.example.org" in hosts  # without a gateway it does
        hosts.clear()
        say_and_end(box(allow=[NAME]).connect_to(NAME, UNHEARD), said)
    assert "evil.example.org" not in hosts


def test_with_a_box_its_network_namespace_goes(world, box):
    """An interface's other end goes with the namespace that it lies in."""
    inside = box(allow=[NAME])
    tid = inside.place.call(threading.get_native_id)
    world.place.ip(f"link add probe type veth peer name inside netns {tid}")
    one = inside.connect_to(NAME, ECHO)
    inside.place.close()
    one.close()
    assert "probe" in _interfaces(world)  # the listeners hold it
    inside.channel.close()
    when(lambda: _interfaces(world), lambda names: "probe" not in names)


def _interfaces(world: World) -> list[str]:
    return world.place.call(lambda: [name for _, name in socket.if_nameindex()])


def test_a_full_disk_takes_counts_and_nothing_else(world, box):
    before = world.gateway.descriptors()
    full = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
    inside = box(allow=[NAME], file=full)
    assert echoes(inside.connect_to(NAME, ECHO))
    inside.query("refused.example.org")
    assert "refused.example.org" in inside.sentence()
    inside.close()
    when(world.gateway.descriptors, lambda now: now <= before + PIPES)
    assert "No space left" not in world.gateway.log()


def test_a_first_process_that_says_anything_and_hears_nothing_harms_nobody(world, box):
    inside, other = box(allow=[NAME]), box(allow=[NAME])
    before = world.gateway.descriptors()
    here, there = os.pipe()
    one = socket.socket()
    for text in (b"listeners tcp4 tcp4", b"listeners", b"what", b"\xff" * 4000):
        socket.send_fds(inside.channel, [text], [here, one.fileno(), there] * 20)
    for fd in (here, there):
        os.close(fd)
    one.close()
    for number in range(400):  # a sentence each, as far as there is a budget
        assert inside.query(f"n{number}.example.com").header.rcode == dnslib.RCODE.NXDOMAIN
    assert echoes(inside.connect_to(NAME, ECHO))
    assert echoes(other.connect_to(NAME, ECHO))
    when(world.gateway.descriptors, lambda now: now <= before + 64 + PIPES)
    inside.close()
    when(world.gateway.descriptors, lambda now: now <= before + PIPES)


def test_a_server_that_is_killed_while_a_box_is_handed_over_leaves_no_gateway(world):
    gateway = Gateway(world)
    inside = Box(gateway, "last", allow=[NAME])
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fds = there.fileno(), inside.file.fileno()
    socket.send_fds(gateway.control, [b'box {"id": "half"}'], fds)
    for one in (gateway.control, here, there):
        one.close()
    assert echoes(inside.connect_to(NAME, ECHO))
    inside.close()
    gateway.process.wait(20)
    gateway.errors.close()


class Flood:
    """A box of whose programs one asks for names, and one each says something of `SAID` without an
    end, on one connection after the other."""

    SAID = (
        bytes(60_000),
        b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 9000,
        b"\x16\3\1",
        f"POST / HTTP/1.1\r\nHost: {NAME}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        + b"1\r\na\r\n" * 9000,
    )

    def __init__(self, inside: Box) -> None:
        self._inside = inside
        self._address = inside.address_of(NAME)
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask)]
        self._threads += [threading.Thread(target=self._say, args=(said,)) for said in self.SAID]

    def _ask(self) -> None:
        with self._inside.place.call(lambda: socket.socket(type=socket.SOCK_DGRAM)) as asker:
            for number in itertools.takewhile(lambda _: not self._is_over.is_set(), range(1 << 30)):
                query = dnslib.DNSRecord.question(f"n{number}.example.invalid").pack()
                asker.sendto(query, ("198.18.0.1", 53))

    def _say(self, said: bytes) -> None:
        while not self._is_over.is_set():
            with contextlib.suppress(OSError), self._inside.connect(self._address, ECHO) as one:
                one.setblocking(False)
                for _ in range(200):
                    one.send(said)

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()


def test_one_box_that_floods_keeps_no_other_from_its_work(box):
    flooding, working = box(allow=["all"]), box(allow=[NAME])
    with Flood(flooding):
        when(flooding.counts, lambda counts: counts.connections > 20)
        for _ in range(20):
            assert echoes(working.connect_to(NAME, ECHO))
