"""facilities/network/plan.py - pure: a loopback and nothing else, and what tells programs so."""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_provisioner.plan import Start, Step


def bring_up(_start: Start) -> Iterator[Step]:
    """The interface that each network namespace begins with."""
    yield Step("loopback-up", (), "debugpy and forked output use 127.0.0.1, and hang without it")


def files(start: Start) -> Iterator[Step]:
    """hosts(5), hostname(5), resolv.conf(5), nsswitch.conf(5)."""
    host = start.request.spec.hostname
    yield Step("file", ("/etc/hosts", f"127.0.0.1 localhost {host}\n::1 localhost ip6-localhost\n"))
    yield Step("file", ("/etc/hostname", f"{host}\n"))
    yield Step("file", ("/etc/resolv.conf", "# This sandbox has no network.\n"))
    text = "passwd: files\ngroup: files\nhosts: files dns\n"
    yield Step("file", ("/etc/nsswitch.conf", text))
