"""card_life.py - in the launching process: the network card of each kernel that has one, from its
start to its end. Only the machine's own root may make them.

::

    start of a kernel ──socketpair──▶ one end to PID 1, which sends its namespace, and waits
                                      the other to a thread, which has a card ready by then
    "up"              ──▶ PID 1       the kernel can begin
    "say SENTENCE"    ──▶ PID 1       something was refused, its quota is used up, or somebody has
                                      deleted our table
    its end           ◀── PID 1       the box has ended: the thread writes down what was counted,
                                      and removes the card and what our table has for it

The server may end before: a card that is there needs nobody, and what it leaves is swept.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from ipaddress import IPv6Network, ip_address

from sandbox_provisioner.descriptors import is_readable, private_pair
from sandbox_provisioner.errors import HostError, LaunchError, SandboxError
from sandbox_provisioner.facilities.network.card import (
    connections,
    counts,
    firewall,
    maker,
    reach,
    refusals,
    table,
)
from sandbox_provisioner.facilities.network.card.maker import Order, Prepared
from sandbox_provisioner.facilities.network.card.watch import Watch, Watched
from sandbox_provisioner.facilities.network.facts.name_servers import name_servers
from sandbox_provisioner.facilities.network.facts.own_addresses import hub_addresses, own_addresses
from sandbox_provisioner.facilities.network.tell.pace import Pace
from sandbox_provisioner.facilities.network.wish.addresses import Address
from sandbox_provisioner.facilities.network.wish.pool import parse_pool, parse_pool_ipv6
from sandbox_provisioner.facilities.network.wish.rules import Rules
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.kernel_calls import receive_descriptors
from sandbox_provisioner.plan import LaunchRequest, Site
from sandbox_provisioner.records import RecordFolder, start_time
from sandbox_provisioner.spec import NetworkWish
from sandbox_provisioner.sweeping import after_removal
from sandbox_provisioner.units import format_bytes

_LOOK_UPS = 8
# The start that the card is for goes on meanwhile.
_QUIET_SECONDS = 0.2
_STEP = "network-card"
Warn = Callable[[str], None]


class CardAttachment:
    """The network of one start: `ledger.Attachment`."""

    def __init__(self, request: LaunchRequest, warn: Warn) -> None:
        """Its channel; meanwhile what makes cards is loaded."""
        self._request = request
        self._warn = warn
        self._ours, self._theirs = private_pair()
        self._made: Future[None] = Future()
        self._is_served = False
        _begin(maker.load)

    @property
    def fd(self) -> int:
        """PID 1's end."""
        return self._theirs.fileno()

    def register(self, folder: RecordFolder, site: Site) -> None:
        """Begin with the card. HostError where this host cannot have any."""
        if not site.facts.privileged:
            return  # `orders.check` refuses it
        wish = self._request.spec.network
        uplink = maker.check_host(parse_pool(wish.pool), _own(), _pool_ipv6(wish))
        after_removal(_remove_unused)
        server = _CardServer(self._request, folder, site, self._ours)
        self._is_served = True
        _begin(lambda: server.serve(uplink, self._made, self._warn))

    async def joined(self) -> None:
        """Return when the kernel has its card; SandboxError if it cannot have one."""
        await asyncio.wrap_future(self._made)

    def close(self) -> None:
        """Close our copy of PID 1's end; ours is the thread's."""
        self._theirs.close()
        if not self._is_served:
            self._ours.close()


def _begin(act: Callable[[], None]) -> None:
    """In a thread that nobody waits for: one that serves a kernel lives as long as that."""
    threading.Thread(target=act, name="sandbox-card", daemon=True).start()


def _remove_unused() -> None:
    with contextlib.suppress(OSError):  # `jupyter sandbox gc` does it then
        table.remove_unused()


def _pool_ipv6(wish: NetworkWish) -> IPv6Network | None:
    return parse_pool_ipv6(wish.pool_ipv6) if wish.ipv6 else None


def _own() -> list[Address]:
    return [ip_address(address) for address in own_addresses()]


def obstacle(wish: NetworkWish) -> SandboxError | str:
    """Why this host cannot have the cards of *wish*, "" if it can; nothing is changed."""
    try:
        maker.try_one()
        maker.refuse_unfit_host(parse_pool(wish.pool), _own(), _pool_ipv6(wish))
        firewall.refuse_one_that_drops()
        name_servers()
    except SandboxError as error:
        return error
    except OSError as error:
        return str(error.strerror or error)
    return ""


class _CardServer:
    """Serves one kernel, in a thread."""

    def __init__(
        self, request: LaunchRequest, folder: RecordFolder, site: Site, channel: socket.socket
    ) -> None:
        self._request = request
        self._folder = folder
        self._site = site
        self._channel = channel
        self._rules = Rules()
        self._names: dict[str, str] = {}
        self._telling = threading.Lock()

    def serve(self, uplink: str, made: Future[None], warn: Warn) -> None:
        """From the card's making to the box's end."""
        with self._channel, contextlib.ExitStack() as held:
            try:
                card, box = self._make(uplink, warn, held)
            except Exception as error:
                self._tell(wire.FAILED, str(error))
                made.set_exception(_told(error))
                return
            made.set_result(None)
            if not is_readable(self._channel.fileno(), _QUIET_SECONDS):
                maker.compile_ahead(card.shape)
            self._wait_for_end(card, box)
            try:
                self._end(card)
            except OSError as error:
                warn(f"What the network card of a kernel has left cannot be removed: {error}")

    def _end(self, card: Prepared) -> None:
        if found := counts.counts(card.pair.address):
            self._folder.write_last_counts(found.traffic(self._names, is_last=True))
        # A connection that was open when the box ended says goodbye still. Nobody forwards that any
        # more, and the card would stay as long as Linux tries: for minutes. Without it Linux gives
        # up at once (tcp_orphan_retries in net/ipv4/tcp_timer.c: there is no way to the other end).
        maker.take_away(card)
        maker.remove(card.pair.address)

    def _make(self, uplink: str, warn: Warn, held: contextlib.ExitStack) -> tuple[Prepared, int]:
        card = maker.prepare(self._order(warn), uplink)
        try:
            box = self._receive_namespace()
            held.callback(os.close, box)
            maker.attach(card, box)
            self._folder.note_card(card.pair.address, self._names)
        except BaseException:
            maker.remove(card.pair.address)
            raise
        self._tell(wire.UP)
        return card, box

    def _order(self, warn: Warn) -> Order:
        wish = self._request.spec.network
        pool, pool_ipv6 = parse_pool(wish.pool), _pool_ipv6(wish)
        own = *own_addresses(), *hub_addresses(self._site.server_environment, warn)
        pools = [str(pool), *([str(pool_ipv6)] if pool_ipv6 else [])]
        rules = Rules.read(self._site.network_allow, wish.deny, [*pools, *own])
        addresses = _look_up(rules, warn, ipv6=wish.ipv6)
        self._rules, self._names = rules, refusals.names_of(addresses)
        sandbox_id = self._request.sandbox_id
        return Order(
            sandbox_id=sandbox_id,
            pool=pool,
            pool_ipv6=pool_ipv6,
            resolvers=self._site.name_servers,
            reaches=tuple(reach.reaches(rules, addresses.__getitem__, ipv6=wish.ipv6)),
            at_host=tuple(reach.reaches_at_host(rules, addresses.__getitem__, ipv6=wish.ipv6)),
            up_bits=wish.up_bits,
            down_bits=wish.down_bits,
            quota_bytes=wish.quota_bytes,
            used_bytes=wish.used_bytes,
            connections=wish.connections,
            new_per_second=wish.new_per_second,
            owner=maker.owner(sandbox_id, os.getpid(), start_time(os.getpid())),
        )

    def _receive_namespace(self) -> int:
        """That of the box, as PID 1 sends it; OSError where that has ended."""
        _, fds = receive_descriptors(self._channel.fileno())
        if not fds:
            raise OSError("the kernel has ended before it had a network")
        return fds[0]

    def _tell(self, word: str, *rest: str) -> None:
        """What PID 1 has no room for, since it is frozen, is lost: one thread speaks for all."""
        with contextlib.suppress(OSError):  # PID 1 has ended
            message = wire.message(word, *rest)[: wire.LONGEST]
            self._channel.send(message, socket.MSG_DONTWAIT)

    def _wait_for_end(self, card: Prepared, box: int) -> None:
        """Until PID 1 has ended; meanwhile the card may be lost, or its quota used up."""
        wish = self._request.spec.network
        told = refusals.Refusals(self._rules, wish, self._names, Pace(time.monotonic()))
        _watch.add(
            Watched(
                card,
                lost=partial(self._lose, card),
                used_up=partial(self._cut_off, card, box),
                refused=partial(self._tell_refusals, card, told),
            )
        )
        try:
            with contextlib.suppress(ConnectionError):  # it has not read what we said
                while self._channel.recv(wire.LONGEST):
                    pass
        finally:
            _watch.remove(card)

    def _lose(self, card: Prepared) -> None:
        maker.take_away(card)
        self._tell(wire.SAY, _LOST)

    def _cut_off(self, card: Prepared, box: int) -> None:
        own = [address for address, _ in card.pair.own]
        with contextlib.suppress(OSError):  # the box has ended
            maker.in_namespace(box, lambda: connections.end_connections(own))
        size = format_bytes(self._request.spec.network.quota_bytes)
        self._tell(wire.SAY, f"This kernel has sent and received {size}, which is {_QUOTA}")

    def _tell_refusals(self, card: Prepared, told: refusals.Refusals) -> None:
        address = card.pair.address
        # Where the box has ended there is nothing more to be found.
        with self._telling, contextlib.suppress(FileNotFoundError):
            sums, found = counts.sums(address), counts.refused(address)
            if not sums.used_up:  # which was told
                for sentence in told.new(sums.refused, found, time.monotonic()):
                    self._tell(wire.SAY, sentence)


_watch = Watch()
_LOST = (
    "This kernel has no network any more: somebody has deleted the rules that held its network "
    "card. The kernel goes on without; a new one gets a new network."
)
_QUOTA = (
    "all that network_quota allows it: its connections have ended, and new ones are refused. Ask "
    "for more with network_quota."
)


def _told(error: Exception) -> SandboxError:
    if isinstance(error, SandboxError):
        return error
    return LaunchError(
        attempt="give the kernel a network card",
        answer=str(error),
        remedy='See jupyter sandbox doctor, or set network = "gateway".',
        step=_STEP,
    )


def _look_up(rules: Rules, warn: Warn, *, ipv6: bool) -> dict[str, list[Address]]:
    """The addresses of all names of *rules*. A name that leads nowhere now opens nothing; HostError
    where it was to be refused."""
    denied = {rule.name for rule in rules.deny if rule.name}
    names = {rule.name for rule in rules.allow if rule.name} | denied
    found: dict[str, list[Address]] = {}
    family, what = (socket.AF_UNSPEC, "address") if ipv6 else (socket.AF_INET, "address of IPv4")
    look_up = partial(_addresses_of, family=family)
    with ThreadPoolExecutor(_LOOK_UPS) as pool:
        for name, addresses in zip(names, pool.map(look_up, names), strict=True):
            if not addresses and name in denied:
                raise HostError(
                    attempt=f"find the addresses of {name}, which network_deny has",
                    answer="this machine's name servers tell none",
                    remedy="Name the addresses themselves, or leave it out.",
                )
            if not addresses:
                warn(f"{name} has no {what} now: this kernel will not reach it.")
            found[name] = addresses
    return found


def _addresses_of(name: str, family: int) -> list[Address]:
    try:
        found = socket.getaddrinfo(name, None, family, socket.SOCK_STREAM)
    except OSError:
        return []
    return [*dict.fromkeys(ip_address(str(entry[4][0]).partition("%")[0]) for entry in found)]
