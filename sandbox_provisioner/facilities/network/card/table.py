"""table.py - in the launching process of a root server: our table, and our rules of routing.

Both are there from the first card on. Who has made cards removes them at its end, and `jupyter
sandbox gc` does, if there are none any more, of whomever: Linux deletes no chain that somebody
leads to, and every card leads to the one that answers for all. So nobody needs a lock: either the
table has gone before a card is added, which makes it anew, or it stays.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.network.card import firewall, netlink, nft, ruleset
from sandbox_provisioner.facilities.network.plan.netlink import Messages
from sandbox_provisioner.facilities.network.wish.addresses import Block

# Somebody else's table, or card, may come or go between two looks, but hardly so often.
_TRIES = 50


def make() -> None:
    """Our table, where there is none; HostError where there is another one of its name."""
    if _is_there():
        return
    firewall.refuse_one_that_drops()
    for _ in range(_TRIES):
        with contextlib.suppress(FileExistsError):  # another server's was quicker
            netlink.apply(ruleset.table())
            return
        if _is_there():
            return
    raise HostError(
        attempt="give a kernel a network card",
        answer=f"there is a table inet {ruleset.TABLE} of another version of this program, or "
        "of somebody else",
        remedy=(
            "End the kernels that it is for, and delete it:",
            f"  nft delete table inet {ruleset.TABLE}",
        ),
    )


def _is_there() -> bool:
    """Whether there is our table, as this version makes it."""
    return has_chain(ruleset.LAYOUT)


def has_chain(name: bytes) -> bool:
    """Whether there is the chain that *name* tells to nf_tables."""
    try:
        return bool(netlink.read(nft.GET_CHAIN, name))
    except FileNotFoundError:
        return False


def add(messages: Sequence[nft.Message]) -> None:
    """All of *messages*, which add a card; if the table has been removed meanwhile, together with a
    new one. FileExistsError where there is such a card; OSError."""
    for _ in range(_TRIES):
        with contextlib.suppress(FileNotFoundError):
            netlink.apply(messages)
            return
        with contextlib.suppress(FileExistsError):
            netlink.apply([*ruleset.table(), *messages])
            return
    netlink.apply(messages)


def guard(pool: IPv4Network, pool_ipv6: IPv6Network | None = None) -> None:
    """Rules of routing for the pools, where they are not there; OSError."""
    for messages in (*_guards(pool), *(_guards(pool_ipv6) if pool_ipv6 else ())):
        _tell_once(messages)


@functools.cache
def _guards(pool: Block) -> tuple[Messages, ...]:
    links = importlib.import_module(f"{__package__}.links")  # see `maker.load`
    guards: tuple[Messages, ...] = links.guards(pool)
    return guards


def _tell_once(messages: Messages) -> None:
    with contextlib.suppress(FileExistsError):
        netlink.tell(messages)


def remove_unused() -> bool:
    """Remove our table and rules of routing, if there is no card; whether there was anything.
    OSError."""
    try:
        netlink.apply(ruleset.remove_table())
        removed = True
    except FileNotFoundError:
        removed = False  # somebody has, such as who flushes all tables
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    rules = netlink.rules_where(ruleset.is_guard)
    for rule in rules:
        with contextlib.suppress(FileNotFoundError):
            netlink.tell(netlink.deletion_of(rule))
    if _is_there():  # somebody has made a card meanwhile, who took these for theirs
        for rule in rules:
            _tell_once(netlink.addition_of(rule))
    return removed or bool(rules)
