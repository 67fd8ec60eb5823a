"""maker.py - in the launching process of a root server: makes a card, and removes it.

::

    prepare    before there is a box: may this host have cards? An address, whose name in our table
               nobody else can take meanwhile; the rules; the messages for the pair
    attach     when the box's namespace has come: the pair, its addresses and routes
    take_away  the pair, when the box ends; remove, what our table has for it
               (a veth's end takes 19 ms)

What holds the box is there before an interface of it is up.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import importlib
import itertools
import os
import re
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.network.card import (
    addresses,
    counts,
    netlink,
    nft,
    ruleset,
    table,
)
from sandbox_provisioner.facilities.network.card.addresses import Taken
from sandbox_provisioner.facilities.network.card.ruleset import Entry, Reach
from sandbox_provisioner.facilities.network.facts import routes
from sandbox_provisioner.facilities.network.facts.ipv6 import has_ipv6
from sandbox_provisioner.facilities.network.facts.routes import Route
from sandbox_provisioner.facilities.network.plan.netlink import Messages, attributes
from sandbox_provisioner.facilities.network.wish.addresses import Address
from sandbox_provisioner.inside import kernel_calls as kernel

if TYPE_CHECKING:
    from sandbox_provisioner.facilities.network.card.links import Pair

_Value = TypeVar("_Value")
_NET = "/proc/thread-self/ns/net"
_MTU = 1500
_ATTEMPT = "give a kernel a network card"
_SETTINGS = Path("/proc/sys/net")
# ip-sysctl: a source is valid if what goes there leaves by the same interface; that is looked up
# with our mark, without which nothing of the pool has a way. Nobody is told of a shorter way, or
# believed.
_OF_HOST = {
    "forwarding": 1, "rp_filter": 1, "src_valid_mark": 1, "accept_redirects": 0,
    "send_redirects": 0,
}  # fmt: skip
# Of IPv6 an interface has the address that it is given, not one of the link's, and believes no
# router: what there is to know is told it.
_OF_IPV6 = {
    "addr_gen_mode": 1, "accept_ra": 0, "autoconf": 0, "accept_redirects": 0, "accept_dad": 0,
    "disable_ipv6": 0,
}  # fmt: skip
# Linux gets to it at once, or within a second where much goes on (linkwatch).
_PATIENCE_SECONDS = 2.0
_SIOCGIFMTU = 0x8921  # netdevice(7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a card shall be. *resolvers* are the host's name servers, *reaches* and *at_host* as of
    `Entry`, as are the bytes; of bits and bytes 0 is no limit. *owner* tells people, and `sweep`,
    whose it is."""

    sandbox_id: str
    pool: IPv4Network
    pool_ipv6: IPv6Network | None = None
    resolvers: tuple[Address, ...]
    reaches: tuple[Reach, ...]
    at_host: tuple[Reach, ...]
    up_bits: int
    down_bits: int
    quota_bytes: int
    used_bytes: int
    connections: int
    new_per_second: int
    owner: str


@dataclass(frozen=True, slots=True)
class Shape:
    """What cards may have in common."""

    pool: IPv4Network
    pool_ipv6: IPv6Network | None
    mtu: int
    up_bits: int
    down_bits: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """A card that has all but its interfaces; *pair* tells its address. Who has it calls `attach`,
    or not, and in the end `remove`."""

    shape: Shape
    pair: Pair
    making: Messages
    in_box: Messages
    on_host: Messages


def load() -> None:
    """Import what makes cards, which takes a while at the first time."""
    _links()


def prepare(order: Order, uplink: str) -> Prepared:
    """All of a card that does not need the box, on a host of which `check_host` has told *uplink*.
    HostError where there is no address left; OSError; then nothing is left."""
    mtu = _mtu_of(uplink) if uplink else _MTU
    shape = Shape(order.pool, order.pool_ipv6, mtu, order.up_bits, order.down_bits)
    ready = _ahead.pop(shape, None)
    address = _reserve(order, ready)
    try:
        table.guard(order.pool, order.pool_ipv6)  # with a card there it is not removed any more
        if ready and ready.pair.address == address:
            return ready
        return _compiled(shape, address)
    except BaseException:
        remove(address)
        raise


# By its shape, the next card: nothing but messages, so that nobody has to remove it.
_ahead: dict[Shape, Prepared] = {}
_MOST_AHEAD = 16


def compile_ahead(shape: Shape) -> None:
    """Make ready what the next card of *shape* needs: that takes 7 ms, and nobody waits now."""
    if len(_ahead) >= _MOST_AHEAD:
        _ahead.clear()
    if shape not in _ahead and (address := next(_candidates(shape.pool), None)):
        _ahead[shape] = _compiled(shape, address)


def _compiled(shape: Shape, address: IPv4Address, host: int = -1) -> Prepared:
    pair = _links().Pair(
        address=address,
        ipv6=_ipv6_of(address, shape.pool_ipv6),
        name=ruleset.interface_of(ruleset.key_of(address)),
        host=_own_namespace() if host < 0 else host,
        mtu=shape.mtu,
        up_bits=shape.up_bits,
        down_bits=shape.down_bits,
    )
    links = _links()
    return Prepared(shape, pair, links.making(pair), links.in_box(pair), links.on_host(pair))


def _ipv6_of(address: IPv4Address, pool: IPv6Network | None) -> IPv6Address | None:
    return addresses.ipv6_of(address, pool) if pool else None


@functools.cache
def _own_namespace() -> int:
    """Open as long as this process lives, since messages have its number."""
    return os.open(_NET, os.O_RDONLY | os.O_CLOEXEC)


def _links() -> ModuleType:
    """Its import takes 0.2 s, and most servers never make a card."""
    return importlib.import_module(f"{__package__}.links")


def check_host(
    pool: IPv4Network, own: Iterable[Address], pool_ipv6: IPv6Network | None = None
) -> str:
    """The interface by which this host reaches the world; our table is there then. HostError where
    this host cannot have cards of *pool*, or of *pool_ipv6*."""
    uplink = refuse_unfit_host(pool, own, pool_ipv6)
    table.make()
    return uplink


def refuse_unfit_host(
    pool: IPv4Network, own: Iterable[Address], pool_ipv6: IPv6Network | None = None
) -> str:
    """The interface by which this host reaches the world. HostError where it hands nothing on from
    there, or has a part of a pool for something else; nothing is changed."""
    own, found = [*own], routes.routes()
    uplink = routes.uplink(found)
    if uplink and not routes.forwards(uplink):
        raise _no_forwarding(uplink)
    addresses.refuse_collision(pool, _taken(found, own))
    if pool_ipv6:
        if not has_ipv6():
            raise _no_ipv6_here()
        if not routes.forwards_ipv6():
            raise _no_forwarding_of_ipv6(uplink)
        addresses.refuse_collision(pool_ipv6, _taken(routes.routes_ipv6(), own))
    return uplink


def _taken(found: Iterable[Route], own: Iterable[Address]) -> Iterator[Taken]:
    for address in own:
        yield Taken(ip_network(address), "an address")
    for route in found:
        if not route.interface.startswith(ruleset.INTERFACE):
            yield Taken(route.block, f"a route ({route.interface})")


def _no_ipv6_here() -> HostError:
    return HostError(
        attempt=f"{_ATTEMPT} with an address of IPv6",
        answer="this host has no IPv6, or its administrator has switched it off",
        remedy=(
            "Leave out network_ipv6, or switch it on:",
            "  sysctl -w net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.default.disable_ipv6=0",
        ),
    )


def _no_forwarding_of_ipv6(uplink: str) -> HostError:
    """A router believes no other one, unless it is told to (ip-sysctl: accept_ra)."""
    return HostError(
        attempt=f"{_ATTEMPT} with an address of IPv6",
        answer="this host forwards no IPv6 (net.ipv6.conf.all.forwarding is 0)",
        remedy=(
            "Let it forward, and write the settings to a file in /etc/sysctl.d; the first one is "
            "for a host that has its own address from a router:",
            f"  sysctl -w net.ipv6.conf.{uplink or 'eth0'}.accept_ra=2",
            "  sysctl -w net.ipv6.conf.all.forwarding=1",
            "Or leave out network_ipv6.",
        ),
    )


def _no_forwarding(uplink: str) -> HostError:
    """It makes a router of the host, for everybody who can send to that interface: whether it shall
    be one is the administrator's to decide."""
    setting = f"net.ipv4.conf.{uplink}.forwarding"
    return HostError(
        attempt=_ATTEMPT,
        answer=f"this host forwards nothing that comes in by {uplink} ({setting} is 0)",
        remedy=(
            "Let it forward, and write the setting to a file in /etc/sysctl.d:",
            f"  sysctl -w {setting}=1",
            'Or set network = "gateway", which needs no forwarding.',
        ),
    )


def _candidates(pool: IPv4Network) -> Iterator[IPv4Address]:
    return addresses.candidates(pool, secrets.randbelow(pool.num_addresses))


def _reserve(order: Order, ready: Prepared | None) -> IPv4Address:
    """An address that nobody has, that of *ready* first: our table has it from now on, for this
    card."""
    interfaces = {name for _, name in socket.if_nameindex()}
    first = [ready.pair.address] if ready else []
    for address in itertools.chain(first, _candidates(order.pool)):
        if ruleset.interface_of(ruleset.key_of(address)) not in interfaces:
            with contextlib.suppress(FileExistsError):
                table.add(ruleset.add(_entry(order, address)))
                return address
    raise addresses.no_address_left(order.pool)


def _entry(order: Order, address: IPv4Address) -> Entry:
    return Entry(
        address=address,
        ipv6=_ipv6_of(address, order.pool_ipv6),
        mac=addresses.mac_of_box(address),
        resolvers=order.resolvers,
        reaches=order.reaches,
        at_host=order.at_host,
        quota_bytes=order.quota_bytes,
        used_bytes=order.used_bytes,
        connections=order.connections,
        new_per_second=order.new_per_second,
        comment=order.owner,
    )


def _mtu_of(interface: str) -> int:
    request = struct.pack("16sI12x", interface.encode(), 0)
    with socket.socket(type=socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, _SIOCGIFMTU, request)
    return int(struct.unpack_from("=16xi", answer)[0])


def attach(card: Prepared, box: int) -> None:
    """Give *card* to the network namespace *box*; OSError, and then nothing is left."""
    try:
        refuse_own(box)
        with in_namespace(box, lambda: _set_up_inside(card)) as changes:
            _set_up_host(card)
            netlink.await_running(changes, _PATIENCE_SECONDS)
    except BaseException:
        remove(card.pair.address)
        raise


def _set_up_host(card: Prepared) -> None:
    try:
        name = card.pair.name
        _settle_ipv6(name, card.pair.ipv6)
        for setting, value in _OF_HOST.items():
            (_SETTINGS / "ipv4/conf" / name / setting).write_text(str(value))
        netlink.tell(card.on_host)
    except BaseException:
        _delete(card)
        raise


def _set_up_inside(card: Prepared) -> socket.socket:
    """The pair, and the box's end; what tells when that runs."""
    changes = netlink.watch_links()
    try:
        netlink.tell(card.making)
        _settle_ipv6(addresses.INSIDE, card.pair.ipv6)
        netlink.tell(card.in_box)
    except BaseException as error:
        changes.close()
        if not isinstance(error, FileExistsError):  # of an interface that is not ours
            _delete(card)
        raise
    return changes


def in_namespace(box: int, act: Callable[[], _Value]) -> _Value:
    """What *act* returns or raises in the network namespace *box*: in a thread of its own, since
    that is what has one."""
    found: list[_Value] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            kernel.setns(box, kernel.CLONE_NEWNET)
            found.append(act())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="sandbox-card")
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return found[0]


def take_away(card: Prepared) -> None:
    """Delete both ends of the pair, if they are there."""
    with contextlib.suppress(OSError):
        _delete(card)


def _delete(card: Prepared) -> None:
    """Both ends, from where either is."""
    netlink.tell(_links().deletion(card.pair))


def refuse_own(box: int) -> None:
    """Who sends us a namespace is of the *box*; it is never the host's own."""
    ours, theirs = os.stat(_NET), os.fstat(box)
    if (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino):
        raise OSError(errno.EINVAL, "the network namespace of the box is this host's own")


def _settle_ipv6(name: str, address: IPv6Address | None) -> None:
    """Without an address nothing of IPv6 is sent or taken by it; where Linux has none there is
    nothing to do."""
    folder = _SETTINGS / "ipv6/conf" / name
    settings = _OF_IPV6 if address else {"disable_ipv6": 1}
    for setting, value in settings.items() if folder.exists() else ():
        (folder / setting).write_text(str(value))


def _cards() -> dict[str, str]:
    """By their keys, the comments of all cards that our table has."""
    found = {}
    for text in netlink.read(nft.GET_CHAIN, every=True):
        parts = attributes(text)
        key = ruleset.key_in(_text(parts[3])) if _text(parts[1]) == ruleset.TABLE else ""
        if key:
            found[key] = _text(parts.get(12, b"")[2:])
    return found


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode()


def remove(address: IPv4Address) -> None:
    """Remove what our table has for *address*; more than once is fine. Its interfaces end with the
    box."""
    key = ruleset.key_of(address)
    if table.has_chain(ruleset.chain_of(key)):
        _remove(key)


def _remove(key: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # somebody else has done it
        ipv6 = counts.ipv6_of(key)
        netlink.apply(ruleset.remove(key, ipv6, quota=counts.has_quota(key)))


def owner(sandbox_id: str, pid: int, began: int) -> str:
    """What a card's comment says: of which sandbox it is, and which process, that began at *began*
    (proc(5), field 22), removes it."""
    return f"sandbox {sandbox_id} of process {pid} begun {began}"


_OWNER = re.compile(r"sandbox (\S+) of process (\d+) begun (\d+)", re.ASCII)


def sweep(lives: Callable[[int, int], bool]) -> list[str]:
    """Remove what our table has for boxes that have ended with whoever was to remove it: the ids of
    their sandboxes. *lives* tells, by pid and beginning, whether a process does."""
    interfaces = {name for _, name in socket.if_nameindex()}
    gone = []
    for key, comment in _cards().items():
        match = _OWNER.fullmatch(comment)
        is_cut_off = ruleset.interface_of(key) not in interfaces
        if match and is_cut_off and not lives(int(match[2]), int(match[3])):
            _remove(key)
            gone.append(match[1])
    return gone


def remove_those_of(sandbox_id: str) -> None:
    """Remove what our table has for the box of *sandbox_id*, which has ended; nothing where this
    host, or who asks, has none of it."""
    with contextlib.suppress(OSError):
        for key, comment in _cards().items():
            if (match := _OWNER.fullmatch(comment)) and match[1] == sandbox_id:
                _remove(key)


def try_one() -> None:
    """Make a card with all that one can have, between two namespaces that nobody else has, and let
    them go; OSError, which tells what this Linux lacks. Nothing of the host is touched."""
    with ThreadPoolExecutor(1) as thread:
        host, box = (thread.submit(_new_namespace).result() for _ in range(2))
    try:
        in_namespace(host, lambda: _try_in(host, box))
    finally:
        for fd in (host, box):
            os.close(fd)


def _new_namespace() -> int:
    kernel.unshare(kernel.CLONE_NEWNET)
    return os.open(_NET, os.O_RDONLY | os.O_CLOEXEC)


def _try_in(host: int, box: int) -> None:
    pool = IPv4Network("100.64.0.0/30")
    shape = Shape(pool, None, _MTU, 1_000_000, 1_000_000)
    order = Order(
        sandbox_id="", pool=pool, resolvers=(), reaches=(), at_host=(), up_bits=shape.up_bits,
        down_bits=shape.down_bits, quota_bytes=1, used_bytes=0, connections=1, new_per_second=1,
        owner="a trial",
    )  # fmt: skip
    netlink.apply(ruleset.table())
    table.guard(pool)
    attach(_compiled(shape, _reserve(order, None), host), box)
