"""What the server says of a kernel to its gateway, and to who makes cards."""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import fields, replace
from ipaddress import IPv4Network
from unittest.mock import Mock

import pytest
from golden import REQUEST, ROOT, site_of

from sandbox_provisioner import gateway_life
from sandbox_provisioner.card_life import _CardServer
from sandbox_provisioner.descriptors import closing, private_pair
from sandbox_provisioner.facilities.network.card.ruleset import Reach
from sandbox_provisioner.facilities.network.facts.resolver import ResolverFiles
from sandbox_provisioner.gateway.settings import Settings, read_settings
from sandbox_provisioner.gateway_life import BoxOfGateway, RunningGateway, _rules_of
from sandbox_provisioner.spec import Network, NetworkWish


def test_the_gateway_knows_all_that_it_is_told_of_a_kernel():
    wish = NetworkWish(mode=Network.GATEWAY, allow=("example.org",), up_bits=1 << 20, audit=True)
    request = replace(REQUEST, spec=replace(REQUEST.spec, network=wish))
    told = _rules_of(request, replace(site_of(ROOT), network_allow=("data.example.org:443",)))
    settings = read_settings(json.dumps(told | {"id": "abc"}))
    assert (settings.allow, settings.up_bits, settings.audit) == (
        ("data.example.org:443",), 1 << 20, True,
    )  # fmt: skip
    of_machine = {"id", "own_addresses"}
    assert set(told) | of_machine == {field.name for field in fields(Settings)}


@pytest.mark.parametrize("may_write", [True, False])
def test_what_only_a_gateway_imports_is_compiled_once_where_that_may_be_kept(
    tmp_path, monkeypatch, may_write
):
    (tmp_path / "gateway").mkdir()
    (tmp_path / "gateway/main.py").write_text("")
    monkeypatch.setattr(gateway_life, "_PACKAGE", str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", not may_write)
    gateway_life._cache_code()
    kept = [path.stat().st_ino for path in tmp_path.glob("gateway/__pycache__/main.*.pyc")]
    assert len(kept) == may_write
    gateway_life._cache_code()
    assert kept == [path.stat().st_ino for path in tmp_path.glob("gateway/__pycache__/*")]


HUB = "http://hub.example:8081/hub/api"


def test_a_hub_that_nobody_knows_is_told_of_and_looked_for_at_the_next_start(monkeypatch):
    known, told = [], []

    def look_up(*_, **__):
        if not known:
            raise socket.gaierror("nobody knows it")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (known[0], 0))]

    monkeypatch.setenv("JUPYTERHUB_API_URL", HUB)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(ResolverFiles, "changed", lambda _: ())
    ours, theirs = private_pair()
    gateway = RunningGateway(Mock(), ours, told.append)

    def hub_that_is_told() -> bool:
        theirs.send(b"ok abc")
        gateway.take_in(BoxOfGateway("abc", {}, channel=0, counts=0))
        text, fds, _, _ = socket.recv_fds(theirs, 1 << 16, 2)
        with closing(fds):
            return "20.7.7.7" in json.loads(text.partition(b" ")[2])["own_addresses"]

    with ours, theirs:
        assert not hub_that_is_told()
        assert "nobody knows it" in told.pop()
        known.append("20.7.7.7")
        assert hub_that_is_told()
        known.clear()
        assert hub_that_is_told()
    assert not told


def test_a_card_does_not_reach_the_hub_though_all_is_allowed():
    wish = NetworkWish(mode=Network.CARD, allow=("all",))
    request = replace(REQUEST, spec=replace(REQUEST.spec, network=wish))
    environment = {"JUPYTERHUB_API_URL": "http://20.7.7.7:8081/hub/api"}
    site = replace(site_of(ROOT), network_allow=("all",), server_environment=environment)
    with socket.socket() as unused:
        order = _CardServer(request, Mock(), site, unused)._order(str)
    hub, everybody = Reach(IPv4Network("20.7.7.7/32"), allowed=False), IPv4Network("0.0.0.0/0")
    assert hub in order.reaches
    assert order.reaches.index(hub) < [one.block for one in order.reaches].index(everybody)
