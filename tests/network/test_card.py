"""A network card: a pair of interfaces, between a host and boxes that are the tests' own."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from card_hosts import (
    GATE,
    HOST,
    METADATA,
    OTHER,
    PRIVATE,
    PUBLIC,
    RESOLVER,
    apart,
    connect,
    delete_our_table,
    dumped,
    eventually,
    listening,
    names_in_table,
    new_namespace,
    play_host,
    refusal,
    within,
    write,
)  # fmt: skip
from pyroute2 import IPRoute

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.network.card import (
    addresses,
    counts,
    maker,
    netlink,
    nft,
    reach,
    ruleset,
    table,
)
from sandbox_provisioner.facilities.network.card.maker import Order, Prepared
from sandbox_provisioner.facilities.network.plan.netlink import attributes
from sandbox_provisioner.facilities.network.tell.counts import OTHERS
from sandbox_provisioner.facilities.network.wish.rules import Rules
from sandbox_provisioner.records import start_time

pytestmark = pytest.mark.requires("root")
POOL = IPv4Network("100.64.0.0/10")
ID = "0123456789ab"


def order(*allow: str, deny: tuple[str, ...] = (), **more: Any) -> Order:
    """A card whose rules are *allow* and *deny*; all names lead to PUBLIC."""
    rules = Rules.read(allow, deny, [str(POOL), HOST])

    def resolve(name: str) -> list[IPv4Address]:
        return [IPv4Address(PUBLIC)]

    made = Order(
        sandbox_id=ID, pool=POOL, resolvers=(IPv4Address(RESOLVER),),
        reaches=tuple(reach.reaches(rules, resolve)),
        at_host=tuple(reach.reaches_at_host(rules, resolve)),
        up_bits=0, down_bits=0, quota_bytes=0, used_bytes=0, connections=512, new_per_second=100,
        owner=maker.owner(ID, os.getpid(), start_time(os.getpid())),
    )  # fmt: skip
    return replace(made, **more)


def prepared(wish: Order, *own: str) -> Prepared:
    return maker.prepare(wish, maker.check_host(wish.pool, map(IPv4Address, own)))


def new_card(box: int, *allow: str, **more: Any) -> IPv4Address:
    """The address of one that *box* has now."""
    card = prepared(order(*allow, **more))
    maker.attach(card, box)
    return card.pair.address


def counted(address: IPv4Address) -> counts.Counts:
    found = counts.counts(address)
    assert found
    return found


# -- with whom it speaks


def test_a_box_reaches_what_its_rules_name_and_nothing_else():
    def host() -> None:
        world, box = play_host(), new_namespace()
        new_card(box, f"{PUBLIC}:80")
        with listening(world) as listener:
            with connect(box, PUBLIC) as client, listener.accept()[0] as server:
                assert server.getpeername()[0] == HOST  # masqueraded
                server.sendall(b"hello")
                assert client.recv(5) == b"hello"
            for other in (OTHER, PRIVATE, METADATA, GATE, HOST):
                assert refusal(box, other) == "Connection refused", other
            assert refusal(box, PUBLIC, 81) == "Connection refused"

    apart(host)


@pytest.mark.parametrize(
    ("allow", "deny", "reached"),
    [
        (["all"], [], {PUBLIC, OTHER, GATE}),
        (["0.0.0.0/0"], [], {PUBLIC, OTHER, GATE}),
        (["all"], [OTHER], {PUBLIC, GATE}),
        (["all", "10.0.0.0/8"], [], {PUBLIC, OTHER, GATE, PRIVATE}),
        (["all", METADATA], [], {PUBLIC, OTHER, GATE, METADATA}),
        (["169.254.0.0/16"], [], set()),
        (["data.example.org"], [], {PUBLIC}),
        (["all"], ["data.example.org"], {OTHER, GATE}),
        ([HOST], [], {HOST}),
        (["20.0.0.0/24"], [], {GATE}),
        ([], [], set()),
    ],
)
def test_rules_mean_for_a_packet_what_they_mean_for_a_name(
    allow: list[str], deny: list[str], reached: set[str]
):
    def host() -> set[str]:
        world, box = play_host(), new_namespace()
        new_card(box, *allow, deny=tuple(deny))
        with listening(world), socket.create_server((HOST, 80)):
            tried = (PUBLIC, OTHER, PRIVATE, METADATA, GATE, HOST)
            return {address for address in tried if not refusal(box, address)}

    assert apart(host) == reached


def test_udp_and_icmp_work_as_ruled_and_are_refused_at_once():
    def host() -> None:
        world, box = play_host(), new_namespace()
        address = new_card(box, PUBLIC)
        with udp(world, (PUBLIC, 5000)) as server, udp(box) as client:
            client.sendto(b"ping", (PUBLIC, 5000))
            server.sendto(b"pong", server.recvfrom(10)[1])
            assert client.recv(10) == b"pong"
        with udp(box) as client:
            client.connect((OTHER, 5000))
            client.send(b"ping")
            with pytest.raises(OSError) as caught:
                client.recv(10)
            assert caught.value.errno == errno.EHOSTUNREACH
        assert echoed(box, PUBLIC) == 0  # the answer to an echo
        assert echoed(box, OTHER) == 3  # unreachable
        eventually(lambda: counted(address).refused == 2)

    apart(host)


@contextmanager
def udp(namespace: int, address: tuple[str, int] | None = None) -> Iterator[socket.socket]:
    made = within(namespace, lambda: socket.socket(type=socket.SOCK_DGRAM))
    made.settimeout(10)
    with made:
        if address:
            made.bind(address)
        yield made


def echoed(namespace: int, address: str) -> int:
    """The type of the ICMP message that an echo request brings."""
    kind = socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP
    with within(namespace, lambda: socket.socket(*kind)) as raw:
        raw.settimeout(10)
        raw.sendto(struct.pack("!BBHHH", 8, 0, 0xF7FE, 1, 0), (address, 0))
        return raw.recv(200)[20]


def test_of_name_servers_the_hosts_own_is_asked_and_no_other():
    def host() -> None:
        world, box = play_host(), new_namespace()
        new_card(box)
        with udp(world, (RESOLVER, 53)) as server, udp(box) as client:
            client.sendto(b"who is", (RESOLVER, 53))
            server.sendto(b"he is", server.recvfrom(10)[1])
            assert client.recv(10) == b"he is"
            client.connect((OTHER, 53))
            client.send(b"who is")
            with pytest.raises(OSError) as caught:
                client.recv(10)
            assert caught.value.errno == errno.EHOSTUNREACH
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.recv(10)
        with listening(world, 53):
            assert refusal(box, RESOLVER, 53) == ""
        assert refusal(box, RESOLVER, 80) == "Connection refused"

    apart(host)


def test_another_tenant_is_reached_only_where_a_rule_names_it():
    def host() -> None:
        play_host()
        one, other, third = new_namespace(), new_namespace(), new_namespace()
        address = new_card(other, "all")
        new_card(one, "all")
        new_card(third, f"{address}:80")
        with listening(other) as listener:
            assert refusal(one, str(address)) == "Connection refused"
            assert refusal(third, str(address)) == ""
            assert listener.accept()[1][0].startswith("100.")  # as who it is
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()

    apart(host)


def test_nobody_outside_opens_a_connection_into_a_box():
    def host() -> None:
        world, box = play_host(), new_namespace()
        address = str(new_card(box, "all"))
        within(world, lambda: add_route(f"{address}/32", HOST))
        with listening(box) as listener:
            for place in (world, os.open("/proc/thread-self/ns/net", os.O_RDONLY)):
                assert refusal(place, address, seconds=0.2) == "TimeoutError"
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()

    apart(host)


def add_route(block: str, gateway: str) -> None:
    with IPRoute() as route:
        route.route("add", dst=block, gateway=gateway)


# -- what it cannot forge


def test_a_forged_source_is_dropped_and_counted():
    def host() -> None:
        world, box = play_host(), new_namespace()
        address = new_card(box, "all")
        own = addresses.mac_of_box(address)
        with udp(world, (PUBLIC, 5000)) as server:
            for source, mac in (("100.64.9.9", own), (HOST, own), (str(address), b"\x0a" * 6)):
                send_frame(box, address, udp_packet(source), mac)
            send_frame(box, address, b"\x60" + bytes(39), own, kind=0x86DD)
            send_frame(box, address, udp_packet(str(address)), own)
            assert server.recvfrom(10)[1][0] == HOST
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.recvfrom(10)
        eventually(lambda: counted(address).refused == 3)  # of IPv6 the host's end takes nothing
        assert counted(address).connections == 1

    apart(host)


def udp_packet(source: str) -> bytes:
    """Four bytes to PUBLIC, port 5000, from *source*."""
    data = struct.pack("!HHHH", 5001, 5000, 12, 0) + b"ping"
    ends = socket.inet_aton(source) + socket.inet_aton(PUBLIC)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(data), 1, 0, 64, 17, 0) + ends
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    return head[:10] + struct.pack("!H", ~total & 0xFFFF) + head[12:] + data


def send_frame(
    box: int, address: IPv4Address, packet: bytes, mac: bytes, kind: int = 0x0800
) -> None:
    """As nobody inside can, who has no right to such a socket."""
    with within(box, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)) as raw:
        raw.bind((addresses.INSIDE, 0))
        raw.send(addresses.mac_of_host(address) + mac + struct.pack("!H", kind) + packet)


def test_arp_is_neither_heard_nor_answered():
    def host() -> None:
        world, box = play_host(), new_namespace()
        address = new_card(box, "all")
        with within(box, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)) as raw:
            raw.bind((addresses.INSIDE, 0x0806))
            wrong = b"\x0a" * 6
            for operation, target in ((1, IPv4Address(HOST)), (2, address)):
                body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + wrong + address.packed
                raw.send(b"\xff" * 6 + wrong + b"\x08\x06" + body + bytes(6) + target.packed)
            with listening(world):
                assert refusal(box, PUBLIC) == ""  # what was sent before has come
            raw.setblocking(False)
            with pytest.raises(BlockingIOError):
                raw.recv(100)
        with IPRoute() as route:
            (found,) = route.get_neighbours(dst=str(address))
            assert found.get_attr("NDA_LLADDR") == addresses.mac_of_box(address).hex(":")

    apart(host)


def test_ipv6_is_off_at_both_ends():
    def host() -> None:
        play_host()
        box = new_namespace()
        card = prepared(order("all"))
        maker.attach(card, box)
        for place, name in ((box, addresses.INSIDE), (host_namespace(), card.pair.name)):
            text = within(place, lambda: read("if_inet6"))
            assert name not in text, text

    apart(host)


def host_namespace() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def read(name: str) -> str:
    with open(f"/proc/thread-self/net/{name}") as file:
        return file.read()


# -- how much of it


def test_each_direction_is_as_fast_as_was_asked():
    def host() -> None:
        world, box = play_host(), new_namespace()
        new_card(box, "all", up_bits=20_000_000, down_bits=60_000_000)
        with connected(world, box) as (client, server):
            for sender, receiver, bits in ((client, server, 20e6), (server, client, 60e6)):
                # A busy machine may be slower for a while; TBF is never faster.
                measured = [shares(sender, receiver, bits)]
                while max(measured)[0] < 0.9 and len(measured) < 20:
                    measured.append(shares(sender, receiver, bits))
                assert max(measured)[0] >= 0.9, measured
                assert all(most <= 1.1 for _, most in measured), measured

    apart(host)


@contextmanager
def connected(world: int, box: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """The ends of a connection, that in *box* first."""
    with listening(world) as listener, connect(box, PUBLIC) as client, listener.accept()[0] as end:
        yield client, end


def shares(sender: socket.socket, receiver: socket.socket, bits: float) -> tuple[float, float]:
    """Of *bits* a second, how many go, measured for half a second, and how many go at the most.
    That counts from the beginning on: who takes the time in the middle may be late, and would find
    what has come meanwhile."""
    size = int(bits / 8 / 2)
    whole = size + size // 4
    with ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        sent = pool.submit(sender.sendall, bytes(whole))
        received(receiver, size // 4)  # what passes at once, and what waits
        middle = time.monotonic()
        received(receiver, size)
        end = time.monotonic()
        sent.result()
    return size * 8 / (end - middle) / bits, whole * 8 / (end - began) / bits


def test_a_used_up_quota_refuses_all_that_comes_then():
    def host() -> None:
        world, box = play_host(), new_namespace()
        address = new_card(box, "all", quota_bytes=20_000)
        with listening(world) as listener, connect(box, PUBLIC) as client:
            with listener.accept()[0], pytest.raises(ConnectionError):
                while True:  # the window is larger than the quota, so nobody has to read
                    client.sendall(bytes(1_000))
            assert refusal(box, PUBLIC) == "Connection refused"
        found = counted(address)
        assert found.used_up
        assert found.up_bytes + found.down_bytes <= 20_000

    apart(host)


def test_of_a_quota_what_was_used_before_is_gone():
    def host() -> None:
        world, box, spent = play_host(), new_namespace(), new_namespace()
        address = new_card(box, "all", quota_bytes=1 << 30, used_bytes=(1 << 30) - 20_000)
        new_card(spent, "all", quota_bytes=20_000, used_bytes=50_000)
        with listening(world) as listener, connect(box, PUBLIC) as client:
            assert not counted(address).used_up
            with listener.accept()[0], pytest.raises(ConnectionError):
                while True:
                    client.sendall(bytes(1_000))
            assert refusal(spent, PUBLIC) == "Connection refused"
        found = counted(address)
        assert found.used_up
        assert found.up_bytes + found.down_bytes <= 20_000

    apart(host)


def test_connections_are_capped_at_once_and_in_a_second():
    def host() -> None:
        world, box = play_host(), new_namespace()
        new_card(box, "all", connections=3)
        fast = new_namespace()
        new_card(fast, "all", new_per_second=4)
        with listening(world):
            held = [connect(box, PUBLIC) for _ in range(3)]
            assert refusal(box, PUBLIC) == "Connection refused"
            answers = [refusal(fast, PUBLIC) for _ in range(20)]
            assert answers[:4] == [""] * 4
            assert "Connection refused" in answers
            for one in held:
                one.close()

    apart(host)


def test_bytes_connections_and_refusals_are_counted():
    def host() -> None:
        world, box = play_host(), new_namespace()
        address = new_card(box, PUBLIC)
        assert counted(address) == counts.Counts()
        with connected(world, box) as (client, server):
            client.sendall(bytes(100_000))
            received(server, 100_000)
            server.sendall(bytes(500_000))
            received(client, 500_000)
        refusal(box, OTHER)
        eventually(lambda: counted(address).refused == 1)
        found = counted(address)
        assert found.connections == 1
        assert 100_000 < found.up_bytes < 200_000
        assert 500_000 < found.down_bytes < 600_000
        maker.remove(address)
        assert counts.counts(address) is None

    apart(host)


def test_who_tries_many_addresses_fills_a_bounded_table_and_hides_nothing_behind_it():
    def host() -> None:
        world, box = play_host(), new_namespace()
        address = new_card(box, "all", "10.9.9.9", new_per_second=100_000)
        with connected(world, box), udp(box) as client:
            for number in range(2000):
                with contextlib.suppress(OSError):  # what was sent before was refused
                    client.sendto(b"?", (f"10.0.{number >> 8}.{number & 255}", 7))
            eventually(lambda: counted(address).refused == 2000)
            with listening(world, 81):
                assert refusal(box, PRIVATE, 81) == ""
        told = counted(address).traffic({})
        assert sum(found.refusals for found in told.names.values()) == 2000
        named = [name for name, found in told.names.items() if found.refusals == 1]
        assert len(named) == ruleset.MOST_DESTINATIONS
        assert told.names[OTHERS].refusals == told.unnamed == 2000 - len(named)
        assert told.names[f"{PUBLIC}:80"].connections == 1
        assert told.names[f"{PRIVATE}:81"].connections == 1

    apart(host)


def test_linux_looks_through_what_it_counts_once_a_day():
    """Not each second, for each kernel."""

    def host() -> None:
        play_host()
        for name in ruleset.sets_of(ruleset.key_of(new_card(new_namespace()))):
            (found,) = netlink.read(nft.GET_SET, nft.set_key(ruleset.TABLE, name))
            assert int.from_bytes(attributes(found)[12], "big") == 24 * 3600 * 1000

    apart(host)


def test_a_bell_rings_once_until_it_is_silenced():
    def host() -> None:
        play_host()
        box = new_namespace()
        address = new_card(box)
        bell = ruleset.bell_of(ruleset.key_of(address))
        with contextlib.closing(netlink.watch_tables()) as changes:
            for _ in range(2):
                assert not counts.bell_rings(address)
                for _ in range(3):
                    assert refusal(box, OTHER) == "Connection refused"
                assert netlink.names_told(changes) == {bell}
                assert netlink.names_told(changes, 0.001) == set()
                assert counts.bell_rings(address)
                counts.silence_bell(address)

    apart(host)


def received(connection: socket.socket, size: int) -> None:
    connection.settimeout(30)
    while size:
        size -= len(connection.recv(min(size, 1 << 20)))


# -- what is made, and what is left


def test_fifty_cards_at_once_have_an_address_each():
    def host() -> None:
        world = play_host()
        boxes = [new_namespace() for _ in range(50)]
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda box: new_card(box, "all"), boxes))
        assert len(set(made)) == 50
        with listening(world):
            assert [refusal(box, PUBLIC) for box in boxes] == [""] * 50

    apart(host)


def test_a_card_ends_with_its_box():
    def host() -> None:
        play_host()
        box = new_namespace()
        with IPRoute() as route:
            route.bind()
            address = new_card(box, "all")
            os.close(box)
            wait_for_end(route, addresses.mac_of_host(address).hex(":"))
        assert not dumped("addr", str(address))
        maker.remove(address)
        maker.remove(address)  # more than once is fine
        assert not [name for name in names_in_table() if address.packed.hex() in name]

    apart(host)


def wait_for_end(route: IPRoute, mac: str) -> None:
    """Until Linux tells that the interface has gone."""
    while True:
        for message in route.get():
            if message["event"] == "RTM_DELLINK" and message.get_attr("IFLA_ADDRESS") == mac:
                return


def test_what_a_killed_maker_left_is_swept_and_nothing_else():
    def host() -> None:
        play_host()
        told, tell = os.pipe()
        maker_pid = os.fork()
        if not maker_pid:
            box = new_namespace()
            os.write(tell, new_card(box, "all").packed)
            signal.pause()
        left = IPv4Address(os.read(told, 4))
        living = new_card(new_namespace(), "all")
        with IPRoute() as route:
            route.bind()
            assert maker.sweep(lives) == []  # it lives
            os.kill(maker_pid, signal.SIGKILL)
            os.waitpid(maker_pid, 0)
            wait_for_end(route, addresses.mac_of_host(left).hex(":"))
        assert maker.sweep(lives) == [ID]
        assert counts.counts(left) is None
        assert counts.counts(living)
        assert maker.sweep(lives) == []

    apart(host)


def lives(pid: int, began: int) -> bool:
    return start_time(pid) == began


def test_an_interface_of_the_same_name_is_somebody_elses():
    def host() -> None:
        play_host()
        pool = IPv4Network("100.64.0.4/31")
        with IPRoute() as route:
            route.link("add", ifname="sbxc-64400004", kind="veth")
        card = prepared(order("all", pool=pool))
        assert card.pair.address == IPv4Address("100.64.0.5")
        with pytest.raises(HostError, match=r"100.64.0.4/31: all of them are taken"):
            prepared(order("all", pool=pool))
        maker.remove(card.pair.address)
        assert "arrive-64400005" not in names_in_table()

    apart(host)


def test_another_firewalls_tables_stay_as_they_are():
    def host() -> None:
        world, box = play_host(), new_namespace()
        others = [
            nft.new_table("filter"), nft.base_chain("filter", "forward", 2, 0),
            nft.rule("filter", "forward", nft.to_block(IPv4Network(OTHER)), nft.verdict(nft.DROP)),
        ]  # fmt: skip
        netlink.apply(others)
        before = rules_of("filter")
        address = new_card(box, "all")
        with listening(world):
            assert refusal(box, PUBLIC) == ""
            assert refusal(box, OTHER, seconds=0.2) == "TimeoutError"  # its word counts
        maker.remove(address)
        assert rules_of("filter") == before

    apart(host)


def test_a_firewall_that_drops_what_is_forwarded_is_told_of_unless_it_knows_us():
    def host() -> None:
        play_host()
        netlink.apply([nft.new_table("filter"), drops_all("forward")])
        with pytest.raises(HostError, match="table inet filter, chain forward") as caught:
            prepared(order("all"))
        assert "nft insert rule inet filter forward iifname 'sbxc-*'" in caught.value.remedy
        assert names_in_table() == ["forward"]
        known = nft.INCOMING + nft.equals(b"sbxc-") + nft.verdict(nft.ACCEPT)
        netlink.apply([nft.rule("filter", "forward", known)])
        prepared(order("all"))

    apart(host)


def drops_all(chain: str) -> nft.Message:
    made = nft.base_chain("filter", chain, 2, 0)
    accept, drop = nft.number(5, nft.ACCEPT), nft.number(5, nft.DROP)
    return replace(made, body=made.body.replace(accept, drop))


def test_a_trial_makes_a_whole_card_and_leaves_the_host_alone():
    def host() -> None:
        maker.try_one()
        assert names_in_table() == []
        assert [name for _, name in socket.if_nameindex()] == ["lo", *made_with_each_namespace()]

    apart(host)


def made_with_each_namespace() -> list[str]:
    return within(new_namespace(), lambda: [name for _, name in socket.if_nameindex()][1:])


def rules_of(table: str) -> list[bytes]:
    found = netlink.read(nft.GET_RULE, every=True)
    return [text for text in found if attributes(text)[1] == table.encode() + b"\0"]


def test_without_our_table_nothing_of_a_box_is_forwarded():
    """Whoever reloads a firewall may flush all tables."""

    def host() -> None:
        world, box = play_host(), new_namespace()
        new_card(box, "all")
        with listening(world):
            assert refusal(box, PUBLIC) == ""
            within(world, lambda: add_route(str(POOL), HOST))  # it would answer
            delete_our_table()
            for address in (PUBLIC, PRIVATE, METADATA):
                assert refusal(box, address, seconds=0.2), address
            new_card(new_box := new_namespace(), "all")  # makes it anew
            assert refusal(new_box, PUBLIC) == ""
            assert refusal(box, PUBLIC, seconds=0.2)

    apart(host)


# -- what all cards have together


def test_the_last_card_can_leave_a_host_as_it_was():
    def host() -> None:
        world, box = play_host(), new_namespace()
        assert not table.remove_unused()
        with IPRoute() as route:  # somebody else's, at the same places
            route.rule("add", priority=1, src="100.70.0.0", src_len=16, table=254)
            route.rule("add", priority=2, fwmark=5, fwmask=7, src="100.70.0.0", src_len=16)
        before = rules_of_routing()
        address = new_card(box, "all")
        assert len(rules_of_routing()) == len(before) + 2
        assert not table.remove_unused()
        with listening(world):
            assert refusal(box, PUBLIC) == ""
        maker.remove(address)
        assert table.remove_unused()
        assert names_in_table() == []
        assert rules_of_routing() == before
        new_card(new_box := new_namespace(), "all")
        with listening(world):
            assert refusal(new_box, PUBLIC) == ""

    apart(host)


def rules_of_routing() -> list[bytes]:
    return netlink.rules_where(bool)


def test_who_makes_a_card_while_another_server_removes_what_nobody_uses_has_a_whole_one():
    def host() -> None:
        world, is_over = play_host(), threading.Event()

        def remove() -> int:
            count = 0
            while not is_over.is_set():
                count += table.remove_unused()
            return count

        with ThreadPoolExecutor(2) as pool, listening(world):
            removers = [pool.submit(remove) for _ in range(2)]
            try:
                for _ in range(30):
                    box = new_namespace()
                    address = new_card(box, "all")
                    assert refusal(box, PUBLIC) == ""
                    eventually(lambda: len(netlink.rules_where(ruleset.is_guard)) == 2)
                    maker.remove(address)
                    os.close(box)
            finally:
                is_over.set()
            assert sum(remover.result() for remover in removers) > 1
        table.remove_unused()
        assert names_in_table() == []
        assert netlink.rules_where(ruleset.is_guard) == []

    apart(host)


# -- what this host cannot have


def test_a_host_that_forwards_nothing_is_told_of_and_left_as_it_is():
    def host() -> None:
        play_host()
        write("ipv4/conf/up0/forwarding", "0")
        with pytest.raises(HostError, match=r"net.ipv4.conf.up0.forwarding is 0") as caught:
            prepared(order("all"))
        assert "sysctl -w net.ipv4.conf.up0.forwarding=1" in caught.value.remedy
        assert "gateway" in caught.value.remedy
        assert names_in_table() == []
        with open("/proc/sys/net/ipv4/conf/up0/forwarding") as file:
            assert file.read() == "0\n"

    apart(host)


@pytest.mark.parametrize(
    ("pool", "told"),
    [
        ("10.0.0.0/8", r"10.1.0.0/16 is a route \(up0\) of this host"),
        ("192.168.0.0/16", r"192.168.7.7/32 is an address of this host"),
    ],
)
def test_a_pool_that_the_host_uses_is_refused_by_the_name_of_the_other(pool: str, told: str):
    def host() -> None:
        play_host()
        add_route("10.1.0.0/16", GATE)
        with pytest.raises(HostError, match=told):
            prepared(order("all", pool=IPv4Network(pool)), "192.168.7.7")
        assert names_in_table() == []

    apart(host)


def test_a_table_of_our_name_that_is_not_ours_is_left_alone():
    def host() -> None:
        play_host()
        netlink.apply([nft.new_table("sandbox_provisioner")])
        with pytest.raises(HostError, match=r"of another version of this program, or of somebody"):
            prepared(order("all"))
        assert names_in_table() == []

    apart(host)


def test_the_hosts_own_namespace_gets_no_card():
    def host() -> None:
        play_host()
        card = prepared(order("all"))
        with pytest.raises(OSError, match="this host's own"):
            maker.attach(card, host_namespace())
        assert not [name for name in names_in_table() if name.startswith("arrive")]

    apart(host)


def test_a_step_that_fails_leaves_nothing():
    def host() -> None:
        play_host()
        box = new_namespace()
        within(box, occupy_name)
        card = prepared(order("all"))
        with pytest.raises(OSError, match=r"make eth0 of sbxc-\w+: File exists"):
            maker.attach(card, box)
        assert not [name for name in names_in_table() if name.startswith("arrive")]
        assert not [name for _, name in socket.if_nameindex() if name.startswith("sbxc")]

    apart(host)


def occupy_name() -> None:
    with IPRoute() as route:
        route.link("add", ifname=addresses.INSIDE, kind="veth")
