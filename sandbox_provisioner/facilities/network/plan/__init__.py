"""plan - pure: which network a box has, and what tells programs of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.network.facts.resolver import ResolverPlace
from sandbox_provisioner.facilities.network.plan.local import every_address_is_ours
from sandbox_provisioner.facilities.network.plan.netlink import Messages
from sandbox_provisioner.facilities.network.plan.tables import PORT, who_gets_what
from sandbox_provisioner.facilities.network.wish.rules import Rules
from sandbox_provisioner.plan import READ_ONLY, TAKE_REMEDY, Kind, Start, Step
from sandbox_provisioner.spec import Network

# Who asks is answered at any address; glibc asks this one, for both families at once, and does not
# wait long for a gateway that is gone (resolv.conf(5)).
NAMESERVER = "198.18.0.1"
_RESOLV = f"nameserver {NAMESERVER}\noptions edns0 timeout:3 attempts:2\n"
# Where Linux hands nothing over: what a rule without ports is listened for at, and how many ports.
# A message has room for so many descriptors (inside/kernel_calls.py).
_USUAL_PORTS = (80, 443)
_MOST_PORTS = 100
_NSSWITCH = "passwd: files\ngroup: files\nhosts: files dns\n"


def mode(start: Start) -> Network:
    """Which network the box of *start* has: a nursery, which is nobody's kernel, has none."""
    wished = start.request.spec.network.mode
    return Network.NONE if start.kind is Kind.NURSERY and wished is not Network.HOST else wished


def bring_up(start: Start) -> Iterator[Step]:
    """The interface that each network namespace begins with, and who is reached through it."""
    if mode(start) is Network.HOST:
        return
    why = "debugpy and forked output use 127.0.0.1, and hang without it"
    yield Step("loopback-up", (), why)
    if mode(start) is Network.GATEWAY:
        yield from _caught(start)


def _caught(start: Start) -> Iterator[Step]:
    """Where all that programs send is caught: by one listener for all ports, or, where Linux hands
    nothing over, by one for each port that a rule names."""
    ipv6 = start.site.facts.machine.ipv6
    yield _netlink(every_address_is_ours(ipv6=ipv6), "every address leads back into the box")
    if why := start.site.catch_obstacle:
        ports, why = ports_of(start.site.network_allow), f"no other ports, since {why}"
    else:
        ports, why = (PORT,), ""
        yield _netlink(who_gets_what(), "all TCP and DNS to the listeners; all else is refused")
    families = "46" if ipv6 else "4"
    names = (f"tcp{family}:{port}" for family in families for port in ports)
    yield Step("listen", (*names, *(f"udp{family}:{PORT}" for family in families)), why)


def ports_of(allow: Iterable[str]) -> tuple[int, ...]:
    """The ports that the rules *allow* name, and DNS; where one names none, those of the web.
    HostError if there are more than can be listened at."""
    ports = {PORT}
    for rule in Rules.read(allow).allow:
        ports.update(rule.ports or _USUAL_PORTS)
    if len(ports) > _MOST_PORTS:
        raise HostError(
            attempt=f"listen for a kernel at the {len(ports)} ports that network_allow names",
            answer="Linux hands over nothing here (see jupyter sandbox doctor), so that each needs "
            f"listeners of its own, and these are for {_MOST_PORTS} at the most",
            remedy="Name fewer ports, or have nf_tables loaded, which needs one for all: "
            "sudo modprobe -a nf_tables nft_tproxy nft_reject_inet",
        )
    return tuple(sorted(ports))


def trial(*, ipv6: bool) -> Iterator[Step]:
    """Of `bring_up` what not every Linux can do, in a network namespace that nobody has."""
    yield Step("loopback-up")
    yield _netlink(every_address_is_ours(ipv6=ipv6), "every address leads back into the box")
    yield _netlink(who_gets_what(), "all TCP and DNS to the listeners; all else is refused")


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
    yield Step("file", ("/etc/hosts", hosts))
    yield Step("file", ("/etc/hostname", f"{host}\n"))
    yield Step("file", ("/etc/resolv.conf", _resolv(start)))
    yield Step("file", ("/etc/nsswitch.conf", _NSSWITCH))


def _resolv(start: Start) -> str:
    if mode(start) is Network.GATEWAY:
        return _RESOLV
    if mode(start) is Network.CARD:
        return "".join(f"nameserver {address}\n" for address in start.site.name_servers)
    return "# This sandbox has no network.\n"


def check(start: Start) -> None:
    """HostError where whoever starts the kernel may not make interfaces."""
    if mode(start) is Network.CARD and not start.site.facts.privileged:
        raise HostError(
            attempt='use network = "card"',
            answer="only the machine's own root may make network interfaces on it",
            remedy='Set network = "gateway", which needs no rights, or have root start kernels for '
            "users: a broker does that.",
        )


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
