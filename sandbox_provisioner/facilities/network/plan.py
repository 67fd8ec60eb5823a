"""facilities/network/plan.py - pure: a loopback and nothing else, and what tells programs so."""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_provisioner.plan import READ_ONLY, TAKE_REMEDY, Start, Step
from sandbox_provisioner.spec import Network

_NSSWITCH = "passwd: files\ngroup: files\nhosts: files dns\n"


def is_hosts(start: Start) -> bool:
    """Whether it is the machine's own network that the box has."""
    return start.request.spec.network.mode is Network.HOST


def bring_up(start: Start) -> Iterator[Step]:
    """The interface that each network namespace begins with."""
    if not is_hosts(start):
        yield Step(
            "loopback-up", (), "debugpy and forked output use 127.0.0.1, and hang without it"
        )


def files(start: Start) -> Iterator[Step]:
    """hosts(5), hostname(5), resolv.conf(5), nsswitch.conf(5)."""
    host = start.request.spec.hostname
    if is_hosts(start):
        yield Step("file", ("/etc/hostname", f"{host}\n"))
        return
    yield Step("file", ("/etc/hosts", f"127.0.0.1 localhost {host}\n::1 localhost ip6-localhost\n"))
    yield Step("file", ("/etc/hostname", f"{host}\n"))
    yield Step("file", ("/etc/resolv.conf", "# This sandbox has no network.\n"))
    yield Step("file", ("/etc/nsswitch.conf", _NSSWITCH))


# -- the machine's own network


def take(start: Start) -> Iterator[Step]:
    """What the C library asks for a name."""
    for place in start.site.resolver:
        if not place.link:
            words = (place.target, place.source, *READ_ONLY, "noexec")
            yield Step("take", words, "how this machine finds a name", TAKE_REMEDY)


def attach(start: Start) -> Iterator[Step]:
    """In place of `files`."""
    for place in start.site.resolver:
        if place.link:
            yield Step("symlink", (place.target, place.link))
        else:
            yield Step("attach", (place.target,))
