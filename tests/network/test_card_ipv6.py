"""A network card with an address of IPv6 as well, between a host and boxes of the tests' own."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from typing import Any

import pytest
from card_hosts import (
    CARRIED_6,
    GATE_6,
    HOST_6,
    METADATA_6,
    NAT64_6,
    NET,
    OTHER,
    OTHER_6,
    PRIVATE_6,
    PUBLIC,
    PUBLIC_6,
    apart,
    connect,
    eventually,
    listening,
    new_namespace,
    play_host,
    refusal,
    within,
    write,
)
from pyroute2 import IPRoute
from test_card import POOL, counted, order, read

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.network.card import addresses, counts, maker, reach
from sandbox_provisioner.facilities.network.card.maker import Order, Prepared
from sandbox_provisioner.facilities.network.wish.pool import POOL_IPV6
from sandbox_provisioner.facilities.network.wish.rules import Rules

pytestmark = pytest.mark.requires("root", "ipv6")
POOL_6 = IPv6Network(POOL_IPV6)


def dual(*allow: str, deny: tuple[str, ...] = (), **more: Any) -> Order:
    """A card with both families; all names lead to PUBLIC and PUBLIC_6."""
    rules = Rules.read(allow, deny, [str(POOL), str(POOL_6), HOST_6])

    def resolve(name: str) -> list[IPv4Address | IPv6Address]:
        return [IPv4Address(PUBLIC), IPv6Address(PUBLIC_6)]

    return order(
        pool_ipv6=POOL_6,
        reaches=tuple(reach.reaches(rules, resolve, ipv6=True)),
        at_host=tuple(reach.reaches_at_host(rules, resolve, ipv6=True)),
        **more,
    )


def prepared(wish: Order) -> Prepared:
    return maker.prepare(wish, maker.check_host(wish.pool, (), wish.pool_ipv6))


def new_card(box: int, *allow: str, **more: Any) -> Prepared:
    card = prepared(dual(*allow, **more))
    maker.attach(card, box)
    return card


@pytest.mark.parametrize(
    ("allow", "deny", "reached"),
    [
        (["all"], [], {PUBLIC, OTHER, PUBLIC_6, OTHER_6, GATE_6}),
        (["0.0.0.0/0"], [], {PUBLIC, OTHER}),
        (["::/0"], [], {PUBLIC_6, OTHER_6, GATE_6}),
        (["all"], [OTHER_6], {PUBLIC, OTHER, PUBLIC_6, GATE_6}),
        (["all"], ["::/0"], {PUBLIC, OTHER}),
        (["all", "fd00::/8", METADATA_6], [], {
            PUBLIC, OTHER, PUBLIC_6, OTHER_6, GATE_6, PRIVATE_6, METADATA_6,
        }),
        (["10.0.0.0/8", f"[{PUBLIC_6}]:81"], [], set()),
        (["data.example.org:80"], [], {PUBLIC, PUBLIC_6}),
        (["all"], ["data.example.org"], {OTHER, OTHER_6, GATE_6}),
        ([HOST_6], [], {HOST_6}),
        (["2a00:1::/64"], [], {GATE_6}),
    ],
)  # fmt: skip
def test_rules_mean_for_ipv6_what_they_mean_for_ipv4(
    allow: list[str], deny: list[str], reached: set[str]
):
    def host() -> set[str]:
        world, box = play_host(ipv6=True), new_namespace()
        new_card(box, *allow, deny=tuple(deny))
        tried = (PUBLIC, OTHER, PUBLIC_6, OTHER_6, PRIVATE_6, METADATA_6, CARRIED_6, NAT64_6)
        with (
            listening(world, ipv6=True),
            socket.create_server((HOST_6, 80), family=socket.AF_INET6),
        ):
            answers = {to: refusal(box, to) for to in (*tried, GATE_6, HOST_6)}
        assert {*answers.values()} <= {"", "Connection refused"}
        return {address for address, answer in answers.items() if not answer}

    assert apart(host) == reached


def test_a_box_is_seen_outside_as_its_host_and_its_traffic_is_counted_by_address():
    def host() -> None:
        world, box = play_host(ipv6=True), new_namespace()
        address = new_card(box, PUBLIC_6).pair.address
        with (
            listening(world, ipv6=True) as listener,
            connect(box, PUBLIC_6) as client,
            listener.accept()[0] as server,
        ):
            assert server.getpeername()[0] == HOST_6
            server.sendall(b"hello")
            assert client.recv(5) == b"hello"
        assert refusal(box, OTHER_6, 443) == "Connection refused"
        with udp(box) as client:
            client.connect((OTHER_6, 5000))
            client.send(b"ping")
            with pytest.raises(OSError) as caught:
                client.recv(10)
            assert caught.value.errno == errno.EACCES  # as Linux has it for that of IPv6
        assert echoed(box, PUBLIC_6) == 129  # the answer to an echo
        assert echoed(box, OTHER_6) == 1  # unreachable
        eventually(lambda: counted(address).refused == 3)
        names = counted(address).traffic({PUBLIC_6: "data.example.org"}).names
        assert names["data.example.org:80"].connections == 1
        assert names["data.example.org (ICMP)"].up_bytes > 0
        refused = {name: found.refusals for name, found in names.items() if found.refusals}
        assert refused == {
            f"[{OTHER_6}]:443": 1, f"[{OTHER_6}]:5000": 1, f"{OTHER_6} (ICMP)": 1,
        }  # fmt: skip

    apart(host)


@contextlib.contextmanager
def udp(namespace: int) -> Iterator[socket.socket]:
    made = within(namespace, lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
    made.settimeout(10)
    with made:
        yield made


def echoed(namespace: int, address: str) -> int:
    """The type of the ICMP message that an echo request brings."""
    kind = socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6
    with within(namespace, lambda: socket.socket(*kind)) as raw:
        raw.settimeout(10)
        raw.sendto(struct.pack("!BBHHH", 128, 0, 0, 1, 0), (address, 0))
        return raw.recv(200)[0]


def test_nobody_comes_to_a_box_and_it_believes_no_router_or_neighbour():
    """It has the one address that it was given, and fixed neighbours."""

    def host() -> None:
        world = play_host(ipv6=True)
        box = new_namespace()
        card = new_card(box, "all")
        own = str(card.pair.ipv6)
        in_box = [line.split() for line in within(box, lambda: read("if_inet6")).splitlines()]
        shown = [str(IPv6Address(int(words[0], 16))) for words in in_box if words[-1] == "eth0"]
        assert shown == [own]
        assert card.pair.name not in read("if_inet6")
        within(world, lambda: add_route(str(POOL_6), HOST_6))
        send(box, card, router_advertisement(), source="fe80::1", to_box=True)
        send(box, card, neighbour_advertisement(own), source=own)
        with listening(box, ipv6=True):
            for place in (host_namespace(), world):
                assert refusal(place, own, seconds=0.2) == "TimeoutError"
        assert "2a000bad" not in within(box, lambda: read("ipv6_route"))
        with IPRoute() as route:
            found = route.get_neighbours(family=socket.AF_INET6, ifindex=index_of(card))
            known = {one.get_attr("NDA_DST"): one.get_attr("NDA_LLADDR") for one in found}
        assert known == {own: addresses.mac_of_box(card.pair.address).hex(":")}

    apart(host)


def add_route(block: str, gateway: str) -> None:
    with IPRoute() as route:
        route.route("add", dst=block, gateway=gateway, family=socket.AF_INET6)


def host_namespace() -> int:
    return os.open(NET, os.O_RDONLY)


def index_of(card: Prepared) -> int:
    return socket.if_nametoindex(card.pair.name)


def router_advertisement() -> bytes:
    """With a prefix from which whoever believes it makes an address."""
    prefix = (
        struct.pack("!BBBBIII", 3, 4, 64, 0xC0, 3600, 3600, 0) + IPv6Address("2a00:bad::").packed
    )
    return struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0) + prefix


def neighbour_advertisement(address: str) -> bytes:
    """That somebody else has *address* now."""
    whose = struct.pack("!BB", 2, 1) + b"\x0a" * 6
    return struct.pack("!BBHI", 136, 0, 0, 0x60000000) + IPv6Address(address).packed + whose


def send(
    box: int,
    card: Prepared,
    message: bytes,
    *,
    source: str,
    to: str = "ff02::1",
    next_header: int = socket.IPPROTO_ICMPV6,
    to_box: bool = False,
) -> None:
    """A packet of IPv6 over the card, from the box, or from its host, as nobody inside can."""
    if next_header == socket.IPPROTO_ICMPV6:
        message = message[:2] + checksum(source, to, message) + message[4:]
    ends = IPv6Address(source).packed + IPv6Address(to).packed
    packet = struct.pack("!IHBB", 6 << 28, len(message), next_header, 255) + ends + message
    ours, theirs = addresses.mac_of_host(card.pair.address), addresses.mac_of_box(card.pair.address)
    place, name = (host_namespace(), card.pair.name) if to_box else (box, addresses.INSIDE)
    ends = theirs + ours if to_box else ours + theirs
    with within(place, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)) as raw:
        raw.bind((name, 0))
        raw.send(ends + struct.pack("!H", 0x86DD) + packet)


def checksum(source: str, to: str, message: bytes, protocol: int = socket.IPPROTO_ICMPV6) -> bytes:
    head = IPv6Address(source).packed + IPv6Address(to).packed
    text = head + struct.pack("!II", len(message), protocol) + message + bytes(len(message) % 2)
    total = sum(struct.unpack(f"!{len(text) // 2}H", text))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


def datagram(source: str, to: str, port: int, data: bytes = b"ping") -> bytes:
    text = struct.pack("!HHHH", 5001, port, 8 + len(data), 0) + data
    return text[:6] + checksum(source, to, text, socket.IPPROTO_UDP) + text[8:]


UDP, HOP_BY_HOP, ROUTING, FRAGMENT, OPTIONS = 17, 0, 43, 44, 60


def test_what_is_forged_or_hidden_behind_headers_does_not_come_through():
    """A source of somebody else's, extension headers before a port, and fragments of it."""

    def host() -> None:
        world, box = play_host(ipv6=True), new_namespace()
        card = new_card(box, f"[{PUBLIC_6}]:5000")
        own = str(card.pair.ipv6)

        def say(message: bytes, kind: int = UDP, source: str = own, to: str = PUBLIC_6) -> None:
            send(box, card, message, source=source, to=to, next_header=kind)

        with bound(world, PUBLIC_6, 5000) as allowed, bound(world, "::", 6000) as refused:
            for source in ("2a00:1:9::9", HOST_6, "fe80::9", "::", f"::ffff:{PUBLIC}", "::1"):
                say(datagram(source, PUBLIC_6, 5000, b"forged"), source=source)
            behind, plain = datagram(own, PUBLIC_6, 6000), datagram(own, PUBLIC_6, 5000)
            pad = bytes([UDP, 0, 1, 4, 0, 0, 0, 0])
            say(pad + behind, OPTIONS)
            say(pad + behind, HOP_BY_HOP)
            # A route by way of PUBLIC_6 to somebody else (types 0 and 4).
            for kind in (0, 4):
                way = bytes([UDP, 2, kind, 1, 0, 0, 0, 0]) + IPv6Address(OTHER_6).packed
                say(way + datagram(own, OTHER_6, 6000), ROUTING)
            for part in fragments(behind):
                say(part, FRAGMENT)
            # A first part that has no port in it, and one that another overlaps (RFC 5722).
            say(fragment(b"", 0, more=True), FRAGMENT)
            say(fragment(plain[:8] + bytes(8), 0, more=True, number=7), FRAGMENT)
            say(fragment(behind, 0, more=False, number=7), FRAGMENT)
            for part in fragments(plain):  # the control: what is allowed comes whole
                say(part, FRAGMENT)
            assert allowed.recv(100) == b"ping"
            say(pad + datagram(own, PUBLIC_6, 5000, b"pong"), OPTIONS)
            assert allowed.recv(100) == b"pong"
            for listener in (allowed, refused):
                listener.setblocking(False)
                with pytest.raises(BlockingIOError):
                    listener.recv(100)
        found = counts.refused(card.pair.address)
        assert found[counts.Destination(IPv6Address(PUBLIC_6), 6000, UDP)] >= 3

    apart(host)


@contextlib.contextmanager
def bound(namespace: int, address: str, port: int) -> Iterator[socket.socket]:
    with udp(namespace) as made:
        made.bind((address, port))
        yield made


def fragment(data: bytes, offset: int, *, more: bool, number: int = 9) -> bytes:
    return struct.pack("!BBHI", UDP, 0, offset | more, number) + data


def fragments(message: bytes) -> list[bytes]:
    """Two, of which the first has eight bytes: the ports, and no more."""
    number = struct.unpack_from("!H", message, 2)[0]
    return [
        fragment(message[:8], 0, more=True, number=number),
        fragment(message[8:], 8, more=False, number=number),
    ]


def test_another_tenant_is_reached_only_where_a_rule_names_it():
    def host() -> None:
        play_host(ipv6=True)
        one, other, third = new_namespace(), new_namespace(), new_namespace()
        address = str(new_card(other, "all").pair.ipv6)
        new_card(one, "all")
        new_card(third, f"[{address}]:80")
        with listening(other, ipv6=True):
            assert refusal(one, address) == "Connection refused"
            assert refusal(third, address) == ""

    apart(host)


def test_a_quota_counts_both_families_and_refuses_both():
    def host() -> None:
        world, box = play_host(ipv6=True), new_namespace()
        address = new_card(box, "all", quota_bytes=20_000).pair.address
        with listening(world, ipv6=True), connect(box, PUBLIC_6) as client:
            with pytest.raises(ConnectionError):
                while True:
                    client.sendall(bytes(1_000))
            for family in (PUBLIC, PUBLIC_6):
                assert refusal(box, family) == "Connection refused"
        assert counted(address).used_up

    apart(host)


def test_what_a_card_has_of_ipv6_goes_with_it():
    def host() -> None:
        play_host(ipv6=True)
        box = new_namespace()
        card = new_card(box, "all")
        assert counts.ipv6_of(card.pair.address.packed.hex()) == card.pair.ipv6
        maker.remove(card.pair.address)
        assert counts.ipv6_of(card.pair.address.packed.hex()) is None
        maker.take_away(card)
        maker.attach(prepared(dual("all")), box)

    apart(host)


def test_a_host_that_does_not_forward_ipv6_or_uses_the_pool_is_told_of():
    def host() -> None:
        play_host(ipv6=True)
        add_route("fd53:616e::/32", GATE_6)
        with pytest.raises(HostError, match=r"fd53:616e::/32 is a route \(up0\) of this host"):
            prepared(dual("all"))
        write("ipv6/conf/all/forwarding", "0")
        with pytest.raises(HostError, match=r"ipv6.conf.all.forwarding is 0") as caught:
            prepared(dual("all"))
        assert "sysctl -w net.ipv6.conf.all.forwarding=1" in caught.value.remedy
        write("ipv6/conf/all/disable_ipv6", "1")
        with pytest.raises(HostError, match="this host has no IPv6"):
            prepared(dual("all"))

    apart(host)
