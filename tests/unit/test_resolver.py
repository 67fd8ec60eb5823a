"""Where the machine finds names: what a box with the machine's own network gets of it."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from golden import REQUEST, ROOT, site_of

from sandbox_provisioner import orders
from sandbox_provisioner.facilities.network.facts.ipv6 import has_ipv6
from sandbox_provisioner.facilities.network.facts.resolver import (
    ResolverFiles,
    ResolverPlace,
    by_descriptor,
    find_resolver,
)
from sandbox_provisioner.spec import Network, NetworkWish


@pytest.fixture
def machine(tmp_path):
    """With systemd-resolved, as most have it."""
    for name in ("etc", "run/systemd/resolve"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("etc/hosts", "etc/nsswitch.conf", "run/systemd/resolve/stub-resolv.conf"):
        (tmp_path / name).touch()
    (tmp_path / "etc/resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    return tmp_path


def test_a_file_that_is_replaced_whenever_the_network_changes_is_shown_by_a_link(machine):
    stub = "/run/systemd/resolve/stub-resolv.conf"
    assert find_resolver(str(machine)) == (
        ResolverPlace("/run/systemd/resolve", "/run/systemd/resolve"),
        ResolverPlace("/etc/hosts", "/etc/hosts"),
        ResolverPlace("/etc/nsswitch.conf", "/etc/nsswitch.conf"),
        ResolverPlace("/etc/resolv.conf", "/etc/resolv.conf", stub),
    )


def test_a_file_of_its_own_is_shown_itself(machine):
    (machine / "etc/resolv.conf").unlink()
    (machine / "etc/resolv.conf").touch()
    assert ResolverPlace("/etc/resolv.conf", "/etc/resolv.conf") in find_resolver(str(machine))


def test_a_box_with_the_machines_network_makes_none_and_finds_names_as_the_machine_does(machine):
    spec = replace(REQUEST.spec, network=NetworkWish(mode=Network.HOST))
    site = replace(site_of(ROOT), resolver=find_resolver(str(machine)))
    steps = orders.compile_for(replace(REQUEST, spec=spec), site).steps
    words = [(step.verb, *step.words) for step in steps]
    assert ("unshare", "mount", "pid", "ipc", "uts", "cgroup") in words
    assert "loopback-up" not in {verb for verb, *_ in words}
    assert ("attach", "/etc/hosts") in words
    assert ("symlink", "/etc/resolv.conf", "/run/systemd/resolve/stub-resolv.conf") in words
    made = [step.words[0] for step in steps if step.verb == "file"]
    assert [path for path in made if path.startswith("/etc/host")] == ["/etc/hostname"]
    (limits,) = (step.words for step in steps if step.verb == "own-limits")
    assert not [word for word in limits if word.startswith("net/")]


def test_a_gateway_has_a_file_of_its_own_by_a_descriptor_that_another_one_can_take(machine):
    assert by_descriptor(find_resolver(str(machine)))[1:] == (
        ResolverPlace("/etc/hosts", "/etc/hosts", "/proc/self/fd/10"),
        ResolverPlace("/etc/nsswitch.conf", "/etc/nsswitch.conf", "/proc/self/fd/11"),
        ResolverPlace(
            "/etc/resolv.conf", "/etc/resolv.conf", "/run/systemd/resolve/stub-resolv.conf"
        ),
    )


def test_a_file_that_was_replaced_or_written_is_told_once(machine):
    hosts, files = machine / "etc/hosts", ResolverFiles(str(machine))

    def told():
        return [(path, os.stat(fd).st_ino) for path, fd in files.changed()]

    assert ("/etc/hosts", hosts.stat().st_ino) in told()
    assert told() == []
    hosts.rename(machine / "former")
    hosts.write_text("192.0.2.1 data.example.org\n")
    assert told() == [("/etc/hosts", hosts.stat().st_ino)]
    hosts.write_text("192.0.2.1 other.example.org\n")
    assert [path for path, _ in told()] == ["/etc/hosts"]
    hosts.unlink()
    assert told() == []


@pytest.mark.parametrize(
    ("every", "new", "answer"), [("0", "0", True), ("1", "0", False), ("0", "1", False)]
)
def test_boxes_have_ipv6_where_no_administrator_has_switched_it_off(tmp_path, every, new, answer):
    assert not has_ipv6(str(tmp_path))
    for name, text in (("all", every), ("default", new)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "disable_ipv6").write_text(f"{text}\n")
    assert has_ipv6(str(tmp_path)) is answer
