"""A gateway between a box and the world: names, addresses and rules."""

from __future__ import annotations

import select
import socket
import time
from pathlib import Path

import dnslib
import pytest
from world import (
    ECHO,
    LOOKUPS_PER_SECOND,
    METADATA,
    PRIVATE,
    UNHEARD,
    WEB,
    WEB6,
    Box,
    when,
)  # fmt: skip

from sandbox_provisioner.facilities.network.tell.counts import MOST_BYTES
from sandbox_provisioner.gateway.box import LOOKUPS_AT_ONCE
from sandbox_provisioner.gateway.machine import own_address

pytestmark = pytest.mark.requires("root", "ordinary-user", "openssl")
NAME = "data.example.org"


def echoes(one: socket.socket) -> bool:
    with one:
        one.sendall(b"\0hello")
        return heard(one, 6) == b"\0hello"


def heard(one: socket.socket, count: int) -> bytes:
    """The next *count* bytes."""
    data = b""
    while len(data) < count:
        more = one.recv(count - len(data))
        assert more, data[-100:]
        data += more
    return data


def is_reset(one: socket.socket) -> bool:
    """Whether it ends as a connection that was lost does, and not in order."""
    with one:
        try:
            return one.recv(1) != b""
        except ConnectionResetError:
            return True


def is_refused(inside: Box, address: str, port: int) -> bool:
    """The same, or a little sooner: Linux in the box has connected it before a gateway hears."""
    try:
        return is_reset(inside.connect(address, port))
    except ConnectionResetError:
        return True


def is_name_refused(inside: Box, name: str, port: int) -> bool:
    """The same by name."""
    return is_refused(inside, inside.address_of(name), port)


# -- names


def test_a_connection_to_an_allowed_name_comes_through(box):
    inside = box(allow=[NAME])
    assert echoes(inside.connect_to(NAME, ECHO))
    assert echoes(inside.connect(inside.address_of(NAME, "AAAA"), ECHO))
    found = inside.counts_when(lambda counts: counts.names.get(f"{NAME}:{ECHO}"))
    assert (found.up_bytes, found.down_bytes, found.connections, found.refusals) == (12, 12, 2, 0)
    assert found.names[f"{NAME}:{ECHO}"].down_bytes == 12


def test_of_a_refused_name_nobody_outside_hears_and_the_person_does(box, world):
    inside = box(allow=[NAME, "*.example.edu"])
    for kind in ("A", "AAAA", "HTTPS", "TXT"):
        answer = inside.query("secret.example.org", kind)
        assert (answer.header.rcode, answer.rr) == (dnslib.RCODE.NXDOMAIN, [])
    assert world.dns.asked == []
    assert inside.sentence() == (
        "secret.example.org was refused: this kernel's network allows data.example.org and "
        "*.example.edu. Ask for it with network_allow."
    )
    inside.query("other.example.org")
    assert "other.example.org" in inside.sentence()  # and there was but one before
    assert inside.counts_when(lambda counts: counts.refusals == 5)


def test_a_name_is_looked_up_as_it_stands(box, world):
    inside = box(allow=["all"])
    with pytest.raises(KeyError, match="NXDOMAIN"):
        inside.address_of("nobody.example.org")
    assert set(world.dns.asked) == {"nobody.example.org"}  # and not below "search corp.example"
    assert echoes(inside.connect_to("in-hosts.example.org", ECHO))


def test_records_of_other_types_are_not_there(box, world):
    inside = box(allow=[NAME])
    for kind in ("HTTPS", "SVCB", "TXT", "MX", "ANY"):
        answer = inside.query(NAME, kind)
        assert (answer.header.rcode, answer.rr) == (0, [])
    assert world.dns.asked == []
    address = inside.address_of(NAME)
    reverse = ".".join(reversed(address.split("."))) + ".in-addr.arpa"
    assert inside.address_of(reverse, "PTR") == f"{NAME}."
    assert inside.query("8.8.8.8.in-addr.arpa", "PTR").header.rcode == dnslib.RCODE.NXDOMAIN


def test_any_name_server_is_this_one_by_tcp_too(box, world):
    inside = box(allow=[NAME])
    assert str(inside.query(NAME, server="8.8.8.8").rr[0].rdata) == inside.address_of(NAME)
    assert inside.query("x.example", server="2001:4860:4860::8888").header.rcode == 3
    query = dnslib.DNSRecord.question(NAME).pack()
    said = len(query).to_bytes(2, "big") + query
    with inside.connect("1.1.1.1", 53) as one:
        one.sendall(said[:5])
        one.sendall(said[5:] + said)
        for _ in range(2):
            text = heard(one, int.from_bytes(heard(one, 2), "big"))
            assert dnslib.DNSRecord.parse(text).rr
    with inside.connect("1.1.1.1", 53) as one:
        one.sendall(b"\xff\xff")
        assert one.recv(1) == b""


def test_a_name_that_nobody_answers_for_keeps_no_other_box_waiting(box, world):
    flooding, working = box(allow=["*.example.org"]), box(allow=["*.example.org"])
    names = [f"stuck-{number}.example.org" for number in range(100)]
    world.dns.stuck.update(names)
    with flooding.place.call(lambda: socket.socket(type=socket.SOCK_DGRAM)) as asker:
        for name in names:
            asker.sendto(dnslib.DNSRecord.question(name).pack(), ("198.18.0.1", 53))
        when(lambda: world.dns.asked, lambda asked: any(name in names for name in asked))
        assert echoes(working.connect_to(NAME, ECHO))
    world.dns.stuck.clear()


def test_a_box_looks_up_so_many_names_a_second_and_no_more(box, world):
    """They are allowed, and yet a message to whoever answers for their domain."""
    flooding, working = box(allow=["*.example.org"]), box(allow=[NAME])
    began = time.monotonic()
    codes = [flooding.query(f"n{number}.example.org").header.rcode for number in range(300)]
    most = LOOKUPS_AT_ONCE + LOOKUPS_PER_SECOND * (time.monotonic() - began + 1)
    assert set(codes[:LOOKUPS_AT_ONCE]) == {dnslib.RCODE.NXDOMAIN}
    assert LOOKUPS_AT_ONCE <= len(set(world.dns.asked)) <= most
    refused = codes.count(dnslib.RCODE.SERVFAIL)
    assert refused == 300 - len(set(world.dns.asked))
    assert "looks up more than 1 names a second" in flooding.sentence()
    assert flooding.counts_when(lambda counts: counts.refusals == refused)
    assert echoes(working.connect_to(NAME, ECHO))


# -- addresses


def test_an_address_is_reached_by_a_rule_for_addresses_alone(box):
    inside = box(allow=[NAME, f"{PRIVATE}/32:{ECHO}", "2606:2800::/32"])
    assert echoes(inside.connect(PRIVATE, ECHO))
    assert echoes(inside.connect(WEB6, ECHO))
    assert is_refused(inside, WEB, ECHO)
    assert f"{WEB}:{ECHO} was refused" in inside.sentence()
    assert is_refused(inside, PRIVATE, UNHEARD)
    found = inside.counts_when(lambda counts: len(counts.names) == 4)
    assert found.names[f"[{WEB6}]:{ECHO}"].connections == 1
    assert found.names[f"{WEB}:{ECHO}"].refusals == 1


@pytest.mark.parametrize(
    "address",
    [PRIVATE, METADATA, "0.0.0.0", "::ffff:10.7.7.7", "64:ff9b::a07:707", "::", "2002:a07:707::1"],
)
def test_what_is_not_public_is_refused_though_all_is_allowed(box, world, address):
    inside = box(allow=["all"])
    before = world.echo.accepted
    try:
        assert is_refused(inside, address, ECHO)
    except OSError:
        assert address in {"0.0.0.0", "::"}  # to Linux that is the box itself
    assert world.echo.accepted == before


@pytest.mark.parametrize("addresses", [[PRIVATE], ["127.0.0.1"], [METADATA], ["::ffff:a07:707"]])
def test_a_name_that_leads_to_what_is_not_public_is_refused(box, world, addresses):
    world.dns.zone["rebound.example.org"] = addresses
    inside = box(allow=["rebound.example.org"])
    before = world.echo.accepted
    assert is_name_refused(inside, "rebound.example.org", ECHO)
    assert "it leads to" in inside.sentence()
    assert world.echo.accepted == before


@pytest.mark.parametrize("address", ["93.184.216.99", "2606:2800:220::99"])
def test_an_address_that_the_machine_has_got_meanwhile_is_refused(box, world, address):
    """IPv6 makes a new one each day, a VPN when it comes up."""
    inside = box(allow=["all"], own_addresses=["172.31.255.2"])
    named = box(allow=["all", address])
    with world.listen_on_machine(ECHO) as listener:
        whole = f"{address}/{128 if ':' in address else 32}"
        world.machine.ip(f"address add {whole} dev lo")
        try:
            # Linux sets an address of IPv6 up a moment later.
            when(lambda: world.machine.call(lambda: own_address(address)), bool)
            assert is_refused(inside, address, ECHO)
            assert "an address of this machine" in inside.sentence()
            world.dns.zone["own.example.org"] = [address]
            assert is_name_refused(inside, "own.example.org", ECHO)
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()
            with named.connect(address, ECHO):
                when(lambda: select.select([listener], [], [], 0)[0], bool)
        finally:
            world.machine.ip(f"address del {whole} dev lo")


def test_of_a_name_with_several_addresses_the_allowed_ones_are_dialled(box, world):
    world.dns.zone["both.example.org"] = [PRIVATE, WEB]
    inside = box(allow=["both.example.org", f"{WEB6}/128"])
    assert echoes(inside.connect_to("both.example.org", ECHO))


def test_an_address_that_stands_for_no_name_is_refused(box):
    inside = box(allow=["all"])
    assert is_refused(inside, "198.18.99.99", ECHO)
    assert is_refused(inside, "fd53:616e:6462:6f78::99", ECHO)
    assert "stands for no name" in inside.sentence()


def test_an_address_stands_for_a_name_in_one_box_alone(box):
    one, other = box(allow=[NAME]), box(allow=[NAME])
    address = one.address_of(NAME)
    assert is_refused(other, address, ECHO)


def test_a_port_that_the_rule_has_not_is_refused(box):
    inside = box(allow=[f"{NAME}:443"])
    assert is_name_refused(inside, NAME, ECHO)
    assert "port 443" in inside.sentence()


def test_with_an_audit_each_name_that_was_wanted_is_noted(box):
    inside = box(allow=[NAME], audit=True)
    inside.query(NAME)
    inside.query("other.example.org")
    found = inside.counts_when(lambda counts: len(counts.names) == 2)
    assert (found.names[NAME].refusals, found.names["other.example.org"].refusals) == (0, 1)


# -- what the server says


def test_a_box_that_is_there_already_makes_way_for_its_kernels_next_start(world, box):
    """Somebody has kept its channel open, such as a child that the server has forked."""
    former = box(allow=[NAME, WEB])
    one = former.connect(WEB, ECHO)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        told = f'box {{"id": "{former.id}"}}', theirs.fileno(), former.file.fileno()
        assert world.gateway.say(*told) == f"ok {former.id}"
        assert is_reset(one)


def test_a_servers_mistakes_are_answered(world, box):
    inside = box()
    for text in ("", "what", 'box {"id": "x"}', "box [", "\xff"):
        if text:
            assert world.gateway.say(text).startswith("failed ")
    fds = inside.channel.fileno(), inside.file.fileno()
    assert "no rule!" in world.gateway.say('box {"id": "x", "allow": ["no rule!"]}', *fds)


def test_it_has_no_rights_and_gets_none(world):
    assert world.gateway.status("Uid").split() == ["54321"] * 4
    assert world.gateway.status("NoNewPrivs") == "1"
    assert int(world.gateway.status("CapEff"), 16) == 0
    limits = Path(f"/proc/{world.gateway.process.pid}/limits").read_text().splitlines()
    (files,) = [line.split()[3:5] for line in limits if line.startswith("Max file size")]
    assert files == [str(MOST_BYTES)] * 2


def test_with_a_box_all_goes_that_was_its(world, box):
    before = world.gateway.descriptors()
    inside = box(allow=[NAME])
    one = inside.connect_to(NAME, ECHO)
    assert world.gateway.descriptors() > before
    inside.channel.close()
    assert is_reset(one)
    when(world.gateway.descriptors, lambda now: now <= before)
    with pytest.raises(ConnectionRefusedError):
        inside.connect(WEB, ECHO)
