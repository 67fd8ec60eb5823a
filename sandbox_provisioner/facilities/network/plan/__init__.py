"""plan - pure: which network a box has, and what tells programs of it."""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_provisioner.facilities.network.facts.resolver import ResolverPlace
from sandbox_provisioner.facilities.network.plan.local import every_address_is_ours
from sandbox_provisioner.facilities.network.plan.netlink import Messages
from sandbox_provisioner.facilities.network.plan.tables import PORT, who_gets_what
from sandbox_provisioner.plan import READ_ONLY, TAKE_REMEDY, Kind, Start, Step
from sandbox_provisioner.spec import Network

# Who asks is answered at any address; glibc asks this one, for both families at once, and does not
# wait long for a gateway that is gone (resolv.conf(5)).
NAMESERVER = "198.18.0.1"
_RESOLV = f"nameserver {NAMESERVER}\noptions edns0 timeout:3 attempts:2\n"
_NSSWITCH = "passwd: files\ngroup: files\nhosts: files dns\n"


def mode(start: Start) -> Network:
    """Which network the box of *start* has: a nursery, which is nobody's kernel, has none."""
    wished = start.request.spec.network.mode
    return Network.NONE if start.kind is Kind.NURSERY and wished is not Network.HOST else wished


def has_channel(start: Start) -> bool:
    """Whether PID 1 is given a channel to who makes its network, or dials for it."""
    return mode(start) in {Network.GATEWAY, Network.CARD}


def bring_up(start: Start) -> Iterator[Step]:
    """The interface that each network namespace begins with, and who is reached through it."""
    if mode(start) is Network.HOST:
        return
    why = "debugpy and forked output use 127.0.0.1, and hang without it"
    yield Step("loopback-up", (), why)
    if mode(start) is Network.GATEWAY:
        ipv6 = start.site.facts.ipv6
        yield _netlink(every_address_is_ours(ipv6=ipv6), "every address leads back into the box")
        yield _netlink(who_gets_what(), "all TCP and DNS to the listeners; all else is refused")
        kinds = ("tcp4", "udp4", "tcp6", "udp6") if ipv6 else ("tcp4", "udp4")
        yield Step("listen", tuple(f"{kind}:{PORT}" for kind in kinds))


def _netlink(messages: Messages, why: str) -> Step:
    words: tuple[str | bytes, ...] = (str(messages.protocol), messages.data, *messages.names)
    shown = (f"({len(messages.names)} messages)",)
    return Step("netlink", words, why, shown=shown, detail=messages.names)


def hand_out(start: Start) -> Iterator[Step]:
    """To who dials for the box, or makes its interface."""
    if mode(start) is Network.GATEWAY:
        why = "the gateway accepts on them; inside nobody has them any more"
        yield Step("hand-out-listeners", (), why, detail=tuple(_rules(start)))
    if mode(start) is Network.CARD:
        why = "an interface of its own, made by who may make one"
        yield Step("await-card", (), why, detail=tuple(_rules(start)))


def _rules(start: Start) -> Iterator[str]:
    """With whom the kernel may speak, for people: what a preset means here is in its place."""
    yield from (f"denies {rule}" for rule in start.request.spec.network.deny)
    yield from (f"allows {rule}" for rule in start.site.network_allow or ("nothing",))


def files(start: Start) -> Iterator[Step]:
    """hosts(5), hostname(5), resolv.conf(5), nsswitch.conf(5)."""
    host = start.request.spec.hostname
    if mode(start) is Network.HOST:
        yield Step("file", ("/etc/hostname", f"{host}\n"))
        return
    hosts = f"127.0.0.1 localhost {host}\n::1 localhost ip6-localhost\n"
    resolv = _RESOLV if has_channel(start) else "# This sandbox has no network.\n"
    yield Step("file", ("/etc/hosts", hosts))
    yield Step("file", ("/etc/hostname", f"{host}\n"))
    yield Step("file", ("/etc/resolv.conf", resolv))
    yield Step("file", ("/etc/nsswitch.conf", _NSSWITCH))


# -- the machine's own network


def take(start: Start) -> Iterator[Step]:
    """What the C library asks for a name."""
    for place in _resolver(start):
        if not place.link:
            words = (place.target, place.source, *READ_ONLY, "noexec")
            yield Step("take", words, "how this machine finds a name", TAKE_REMEDY)


def attach(start: Start) -> Iterator[Step]:
    """In place of `files`."""
    for place in _resolver(start):
        if place.link:
            yield Step("symlink", (place.target, place.link))
        else:
            yield Step("attach", (place.target,))


def _resolver(start: Start) -> tuple[ResolverPlace, ...]:
    return start.site.resolver if mode(start) is Network.HOST else ()
