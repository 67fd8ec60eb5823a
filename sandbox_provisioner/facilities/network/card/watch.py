"""watch.py - in the launching process: hears what becomes of our table, in a thread for all cards.

nf_tables tells of each change, and of a quota at the moment when it is used up. Whoever reloads a
firewall may flush all tables: then nothing holds the cards that there are but a rule of routing,
which knows nothing of the host's own addresses. So they are taken away.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sandbox_provisioner.descriptors import keep_from_children
from sandbox_provisioner.facilities.network.card import maker, netlink, ruleset
from sandbox_provisioner.facilities.network.card.maker import Prepared


@dataclass(frozen=True, slots=True)
class Watched:
    """A card, and what is to be done when it is *lost*, and when its quota is *used_up*."""

    card: Prepared
    lost: Callable[[], object]
    used_up: Callable[[], object]


class Watch:
    """The cards of this process. What is to be done for one is done once, in the thread."""

    def __init__(self) -> None:
        self.forget()
        keep_from_children(self)

    def forget(self) -> None:
        """In a child that was forked there is no thread."""
        self._watched: dict[str, Watched] = {}
        self._used_up: set[str] = set()
        self._lock = threading.Lock()
        self._runs = False

    def add(self, watched: Watched) -> None:
        """From now on, until `remove`."""
        key = ruleset.key_of(watched.card.pair.address)
        with self._lock:
            self._watched[key] = watched
            if not self._runs:
                self._runs = True
                changes = netlink.watch_tables()
                threading.Thread(
                    target=self._listen, args=(changes,), name="sandbox-cards", daemon=True
                ).start()
        self._look(key)  # something may have become of it before

    def remove(self, card: Prepared) -> None:
        """Its box has ended."""
        key = ruleset.key_of(card.pair.address)
        self._watched.pop(key, None)
        self._used_up.discard(key)

    def _listen(self, changes: socket.socket) -> None:
        while True:
            for key in self._concerned(netlink.names_told(changes)):
                self._look(key)

    def _concerned(self, told: set[str] | None) -> Iterator[str]:
        """Those whose quotas are told of; all of them where our table is, or too much was told to
        be kept."""
        for key in list(self._watched):
            if told is None or ruleset.TABLE in told or ruleset.quota_of(key) in told:
                yield key

    def _look(self, key: str) -> None:
        watched = self._watched.get(key)
        if watched is None:
            return
        found = maker.counts(watched.card.pair.address)
        if found is None:
            self._watched.pop(key, None)
            watched.lost()
        elif found.used_up and key not in self._used_up:
            self._used_up.add(key)
            watched.used_up()
