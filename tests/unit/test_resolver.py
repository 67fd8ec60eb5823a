"""Where the machine finds names: what a box with the machine's own network gets of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from golden import REQUEST, ROOT, site_of

from sandbox_provisioner import orders
from sandbox_provisioner.facilities.network.facts.ipv6 import has_ipv6
from sandbox_provisioner.facilities.network.facts.resolver import ResolverPlace, find_resolver
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


@pytest.mark.parametrize(
    ("every", "new", "answer"), [("0", "0", True), ("1", "0", False), ("0", "1", False)]
)
def test_boxes_have_ipv6_where_no_administrator_has_switched_it_off(tmp_path, every, new, answer):
    assert not has_ipv6(str(tmp_path))
    for name, text in (("all", every), ("default", new)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "disable_ipv6").write_text(f"{text}\n")
    assert has_ipv6(str(tmp_path)) is answer
