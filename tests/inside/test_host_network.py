"""A box with the machine's own network, as the gateway has it: the rest is as of any box."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandbox_provisioner.spec import Network, NetworkWish

pytestmark = pytest.mark.requires("userns")


def looked_up(names):
    import os
    import socket

    kinds = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in os.listdir("/proc/self/ns")}
    found = [socket.getaddrinfo(name, 80)[0][4][0] for name in names]
    with open("/etc/resolv.conf") as file:
        return kinds, found, file.read()


def look(sandbox):
    lines = [line.split("#")[0].split() for line in Path("/etc/hosts").read_text().splitlines()]
    names = [words[1] for words in lines if len(words) > 1 and words[0] == "127.0.0.1"]
    with sandbox(network=NetworkWish(mode=Network.HOST)) as box:
        kinds, found, resolv = box.call(looked_up, names)
    shared = {kind for kind in kinds if kinds[kind] == os.readlink(f"/proc/self/ns/{kind}")}
    assert {kind for kind in shared if not kind.endswith("_for_children")} == {"net", "time"}
    assert names
    assert set(found) <= {"127.0.0.1", "::1"}
    assert resolv == Path("/etc/resolv.conf").read_text()


def test_it_has_the_machines_network_and_names_and_nothing_else_of_it(sandbox):
    look(sandbox)


@pytest.mark.ordinary_user
def test_an_ordinary_users_has_them_too(sandbox):
    look(sandbox)
