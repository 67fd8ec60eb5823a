"""watch.py - in the launching process: hears what becomes of our table, in a thread for all cards.

nf_tables tells of each change, and of a quota at the moment when it is used up. Whoever reloads a
firewall may flush all tables: then nothing holds the cards that there are but a rule of routing,
which knows nothing of the host's own addresses. So they are taken away.

A card's bell is a quota, too, which the first packet that is refused uses up. Once that was heard
it is silenced, but not sooner than after some seconds: so a kernel that floods is looked after as
seldom as one that does not.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address

from sandbox_provisioner.descriptors import keep_from_children
from sandbox_provisioner.facilities.network.card import counts, netlink, ruleset
from sandbox_provisioner.facilities.network.card.maker import Prepared

_BELL_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Watched:
    """A card, and what is to be done when it is *lost*, when its quota is *used_up*, and when it
    was *refused* something since."""

    card: Prepared
    lost: Callable[[], object]
    used_up: Callable[[], object]
    refused: Callable[[], object]

    @property
    def address(self) -> IPv4Address:
        """Of the card."""
        return self.card.pair.address


class Watch:
    """The cards of this process. What is to be done for one is done once, in the thread."""

    def __init__(self) -> None:
        self.forget()
        keep_from_children(self)

    def forget(self) -> None:
        """In a child that was forked there is no thread."""
        self._watched: dict[str, Watched] = {}
        self._used_up: set[str] = set()
        self._rung: dict[str, float] = {}  # when it is to be heard; the thread's own
        self._heard: dict[str, float] = {}
        self._lock = threading.Lock()
        self._runs = False

    def add(self, watched: Watched) -> None:
        """From now on, until `remove`."""
        key = ruleset.key_of(watched.address)
        with self._lock:
            self._watched[key] = watched
            if not self._runs:
                self._runs = True
                changes = netlink.watch_tables()
                threading.Thread(
                    target=self._listen, args=(changes,), name="sandbox-cards", daemon=True
                ).start()
        self._look(key)  # something may have become of it before
        with contextlib.suppress(OSError):
            counts.silence_bell(watched.address)  # it may have rung before, too
        watched.refused()

    def remove(self, card: Prepared) -> None:
        """Its box has ended."""
        key = ruleset.key_of(card.pair.address)
        self._watched.pop(key, None)
        self._used_up.discard(key)
        self._heard.pop(key, None)

    def _listen(self, changes: socket.socket) -> None:
        while True:
            told = netlink.names_told(changes, self._seconds_to_next())
            for key in self._concerned(told):
                with contextlib.suppress(OSError):  # there is more to be told
                    self._look(key)
            for key in self._ringing(told):
                self._rung[key] = self._heard.get(key, 0.0) + _BELL_SECONDS
            now = time.monotonic()
            for key in [key for key, when in self._rung.items() if when <= now]:
                self._hear(key)

    def _seconds_to_next(self) -> float | None:
        """Until a bell is to be heard; None where none rings."""
        times = [*self._rung.values()]
        return max(0.001, min(times) - time.monotonic()) if times else None

    def _concerned(self, told: set[str] | None) -> Iterator[str]:
        """Those whose quotas are told of; all of them where our table is, or too much was told to
        be kept."""
        for key in list(self._watched):
            if told is None or ruleset.TABLE in told or ruleset.quota_of(key) in told:
                yield key

    def _ringing(self, told: set[str] | None) -> Iterator[str]:
        """Those whose bells are told of. Linux tells of a bell that is made as well."""
        for key, watched in [*self._watched.items()]:
            if (told is None or ruleset.bell_of(key) in told) and key not in self._rung:
                with contextlib.suppress(OSError):
                    if counts.bell_rings(watched.address):
                        yield key

    def _hear(self, key: str) -> None:
        """What is refused from now on rings once more."""
        self._rung.pop(key, None)
        if watched := self._watched.get(key):
            self._heard[key] = time.monotonic()
            with contextlib.suppress(OSError):
                counts.silence_bell(watched.address)
                watched.refused()

    def _look(self, key: str) -> None:
        watched = self._watched.get(key)
        if watched is None:
            return
        if not counts.has_card(watched.address):
            self._watched.pop(key, None)
            watched.lost()
        elif key not in self._used_up and counts.is_used_up(watched.address):
            self._used_up.add(key)
            watched.used_up()
