"""What a network card is made of, and what is read of this machine for it."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.facilities.network.card import addresses, counts, reach
from sandbox_provisioner.facilities.network.card.ruleset import Reach
from sandbox_provisioner.facilities.network.facts import routes
from sandbox_provisioner.facilities.network.facts.name_servers import name_servers
from sandbox_provisioner.facilities.network.tell.counts import OfName, Traffic
from sandbox_provisioner.facilities.network.wish.network import Network, NetworkWish
from sandbox_provisioner.facilities.network.wish.pool import parse_pool
from sandbox_provisioner.facilities.network.wish.rules import Rules
from sandbox_provisioner.policy.meaning import parse
from sandbox_provisioner.policy.terms import Kind
from sandbox_provisioner.records import RecordFolder

ROUTES = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
wlan0\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0
eth0\t00000000\t0100000A\t0003\t0\t0\t100\t00000000\t0\t0\t0
eth0\t0000000A\t00000000\t0001\t0\t0\t100\t000000FF\t0\t0\t0
tun0\t0000400A\t00000000\t0000\t0\t0\t0\t0000FFFF\t0\t0\t0
"""


def test_routes_are_read_the_default_one_with_the_least_metric_first(tmp_path: Path):
    (tmp_path / "route").write_text(ROUTES)
    found = routes.routes(tmp_path / "route")
    assert routes.uplink(found) == "eth0"
    named = {(str(route.block), route.interface) for route in found}
    assert named == {("0.0.0.0/0", "eth0"), ("0.0.0.0/0", "wlan0"), ("10.0.0.0/8", "eth0")}
    assert routes.uplink([]) == ""


def test_name_servers_are_those_that_a_box_can_ask(tmp_path: Path):
    own, behind = tmp_path / "own", tmp_path / "behind"
    own.write_text("search example.org\nnameserver 10.0.0.1\nnameserver fd00::1\nnameserver x\n")
    assert name_servers(own, behind) == (IPv4Address("10.0.0.1"),)
    both = name_servers(own, behind, ipv6=True)
    assert [str(address) for address in both] == ["10.0.0.1", "fd00::1"]
    own.write_text("nameserver 127.0.0.53\n")
    with pytest.raises(HostError, match="names only this machine itself"):
        name_servers(own, behind)
    behind.write_text("nameserver 10.0.0.2\nnameserver 10.0.0.3\n")
    assert [str(address) for address in name_servers(own, behind)] == ["10.0.0.2", "10.0.0.3"]
    assert name_servers(behind.with_name("none"), behind) == ()


@pytest.mark.parametrize("text", ["100.64.0.0/8", "8.8.8.0/24", "100.64.0.1/10", "all", "fd00::/8"])
def test_a_pool_that_is_not_private_is_refused(text: str):
    with pytest.raises(SpecError, match="read network_pool"):
        parse_pool(text)


def test_a_pool_is_gone_through_once_without_what_ends_in_0_or_255():
    pool = parse_pool("10.0.0.0/23")
    found = [str(address) for address in addresses.candidates(pool, 300)]
    assert len(found) == len(set(found)) == 508
    assert found[0] == "10.0.1.44"
    assert not [address for address in found if address.endswith((".0", ".255"))]


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        ({"allow": ("*.example.org",)}, "a domain has no list of its hosts"),
        ({"allow": ("all",), "deny": ("*.example.org:443",)}, "a domain has no list of its hosts"),
        ({"audit": True}, "packets have addresses and no names"),
        ({"pool": "8.8.8.0/24"}, "its addresses may be somebody else's"),
        ({"ipv6": True, "pool_ipv6": "2a00::/64"}, "are not in fd00::/8"),
        ({"ipv6": True, "pool_ipv6": "fd00::/97"}, "which takes 32 bits"),
        ({"ipv6": True, "pool_ipv6": "10.0.0.0/8"}, "read network_pool_ipv6"),
    ],
)
def test_what_a_card_cannot_do_is_refused_before_anything_else(wish: dict[str, Any], told: str):
    with pytest.raises(SpecError, match=told):
        NetworkWish(mode=Network.CARD, **wish)


def test_the_last_counts_are_found_of_a_card_that_ends_while_one_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = RecordFolder(tmp_path)
    folder.note_card(IPv4Address("100.64.0.5"), {"20.1.0.1": "data.example.org"})

    def ends(_: IPv4Address) -> None:
        names = {"data.example.org:443": OfName(refusals=1)}
        folder.write_last_counts(Traffic(refusals=1, names=names, is_last=True))

    monkeypatch.setattr(counts, "counts", ends)
    found = folder.read_counts()
    assert found
    assert found.is_last
    assert found.names == {"data.example.org:443": OfName(refusals=1)}


def test_ipv6_is_of_a_network_and_a_gateway_has_it_anyway():
    with pytest.raises(SpecError, match="use network_ipv6"):
        NetworkWish(ipv6=True)
    assert NetworkWish(mode=Network.GATEWAY, ipv6=True).ipv6
    assert parse(Kind.FORCED, "network_ipv6", True) == {"network.ipv6": True}


def test_routes_of_ipv6_are_read(tmp_path: Path):
    zero = "0" * 32
    (tmp_path / "route").write_text(
        f"fd53616e{'0' * 24} 20 {zero} 00 {zero} 00000400 00000001 00000000 00000001     up0\n"
        f"{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200       lo\n"
    )
    (found,) = routes.routes_ipv6(tmp_path / "route")
    assert (str(found.block), found.interface) == ("fd53:616e::/32", "up0")


def test_a_name_leads_to_a_private_address_only_with_a_rule_for_that():
    def resolve(name: str) -> list[IPv4Address]:
        return [IPv4Address("10.0.0.1"), IPv4Address("20.0.0.1")]

    named = list(islice(reach.reaches(Rules.read(["a.example:443"]), resolve), 2))
    assert named[0] == Reach(IPv4Network("20.0.0.1/32"), (443,))
    assert not named[1].allowed
    named = reach.reaches(Rules.read(["a.example:443", "10.0.0.0/8"]), resolve)[:2]
    assert [str(one.block) for one in named] == ["10.0.0.1/32", "20.0.0.1/32"]
