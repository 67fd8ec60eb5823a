"""gateway/box.py - runs in the gateway: one box: what its programs ask for, and what they get.

PID 1 of the box sends the sockets that listen inside, and keeps its end of the channel as long as
it lives. With that end all goes: connections, listeners (which keep the box's network namespace
alive) and the file of counts.

May import: everything in this room but main; facilities.network.tell.counts, inside.wire.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from sandbox_provisioner.facilities.network.tell.counts import Writer
from sandbox_provisioner.facilities.network.wish.rules import Rules, Verdict
from sandbox_provisioner.gateway.connection import Connection, Target
from sandbox_provisioner.gateway.listeners import Arrivals, is_listener
from sandbox_provisioner.gateway.lookups import MOST_WAITING, Found, Lookups
from sandbox_provisioner.gateway.loop import READ, Group, Loop, Timer
from sandbox_provisioner.gateway.machine import own_address
from sandbox_provisioner.gateway.meter import Bucket, Tally
from sandbox_provisioner.gateway.mover import Pipes, Share
from sandbox_provisioner.gateway.names import Binding, Names, is_synthetic
from sandbox_provisioner.gateway.nameserver import PORT as DNS_PORT
from sandbox_provisioner.gateway.nameserver import Datagrams, NameServer, Stream
from sandbox_provisioner.gateway.seats import Seats
from sandbox_provisioner.gateway.sentences import Sentences
from sandbox_provisioner.gateway.settings import Settings
from sandbox_provisioner.gateway.shaper import Line
from sandbox_provisioner.inside import wire

_MOST_OF_MESSAGE = 4096
_MOST_LISTENERS = 64
_MOST_VERDICTS = 1000
# Each leads to the machine's own name server, and may lead to anybody's.
LOOKUPS_PER_SECOND = 50
LOOKUPS_AT_ONCE = 200
_WRITE_SECONDS = 0.05
_WRITE_NAMES_SECONDS = 1.0
# So many names are written in 3 ms, in which nobody else is served.
_NAMES_A_SECOND = 500
_RESET = struct.pack("ii", 1, 0)


@dataclass(slots=True)
class Shared:
    """What all boxes have together."""

    loop: Loop
    lookups: Lookups
    seats: Seats
    pipes: Pipes = field(default_factory=Pipes)
    boxes: dict[str, Box] = field(default_factory=dict)


class Box:
    """One; *channel* leads to its PID 1, and the file *counts* is ours now."""

    def __init__(
        self, shared: Shared, settings: Settings, channel: socket.socket, counts: int
    ) -> None:
        self.settings = settings
        self.loop = shared.loop
        self.group = Group(shared.loop)
        self.share = Share(shared.pipes)
        self.names = Names()
        self.has_ipv6 = False
        self._shared = shared
        self._verdicts = Verdicts(settings.rules())
        self._channel = channel
        self._connections: set[Connection | Stream] = set()
        self._tally = Tally(settings.quota_bytes, settings.used_bytes)
        self._book = Book(shared.loop, counts, self._tally)
        self._sentences = Sentences(shared.loop, channel)
        self._server = NameServer(self)
        self._arrivals = Arrivals(self.loop, self.group, self._arrived, self._seconds_to_next)
        self._datagrams: list[socket.socket] = []
        self._up = Line(self.loop, settings.up_bits, up=True)
        self._down = Line(self.loop, settings.down_bits, up=False)
        most = settings.new_per_second
        self._new = Bucket(most, most, shared.loop.now) if most else None
        self._look_ups = Bucket(LOOKUPS_PER_SECOND, LOOKUPS_AT_ONCE, shared.loop.now)
        self.is_over = False
        channel.setblocking(False)
        self.group.watch(channel.fileno(), self, READ)
        self._book.changed()

    # -- from PID 1

    def on_event(self, _fd: int, _events: int) -> None:
        """PID 1 says something, or has ended."""
        try:
            text, fds, _, _ = socket.recv_fds(
                self._channel, _MOST_OF_MESSAGE, _MOST_LISTENERS, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            text, fds = b"", []
        if not text:
            self.close()
            return
        for fd in fds:
            self._listen(fd, is_wanted=wire.parts(text)[0] == wire.LISTENERS)

    def on_mistake(self) -> None:
        """What it said was nothing that we expect."""

    def _listen(self, fd: int, *, is_wanted: bool) -> None:
        """What a listener is for is its own to say; what is none is closed."""
        try:
            listener = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)
            return
        has_room = len(self._arrivals) + len(self._datagrams) < _MOST_LISTENERS
        if not (is_wanted and has_room and is_listener(listener)):
            listener.close()
            return
        self.has_ipv6 |= listener.family == socket.AF_INET6
        if listener.type == socket.SOCK_STREAM:
            self._arrivals.add(listener)
        else:
            listener.setblocking(False)
            self._datagrams.append(listener)
            self.group.watch(listener.fileno(), Datagrams(self._server, listener), READ)

    # -- connections

    def _seconds_to_next(self) -> float:
        """Until another connection may be taken in."""
        if self._new is None or self._new.available(self.loop.now):
            return 0.0
        return self._new.seconds_to(1)

    def _arrived(self, client: socket.socket, address: str, port: int) -> None:
        if self._new is not None:
            self._new.take(1)
        binding = self.names.at(address)
        target = Target(address, port, binding)
        if why := self._why_no_more():
            self.refuse(target, why)
            _reset(client)
        elif port == DNS_PORT:
            self._sit_down(Stream(self, self._server, client))
        elif binding is None and is_synthetic(address):
            self.refuse(target, "that address stands for no name, or not any more")
            _reset(client)
        elif binding is None:
            self._dial_address(client, target)
        else:
            self._dial_name(client, target, binding)

    def _why_no_more(self) -> str:
        """Why no connection may begin now, as a clause; "" if one may."""
        if self._tally.is_used_up:
            return _quota_is_used_up(self._tally.quota_bytes)
        most = self.settings.connections
        if most and len(self._connections) >= most:
            return f"this kernel has {most} connections, and network_connections allows no more"
        if not self._shared.seats.has_one_for(len(self._connections)):
            return "it has its share of the connections that the gateway of this server can have"
        return ""

    def _dial_address(self, client: socket.socket, target: Target) -> None:
        verdict = self._verdicts.of(None, target.address, target.port)
        if not verdict.allowed:
            self._refuse_verdict(target, verdict)
            _reset(client)
            return
        self._begin(client, target).dial([target.address])

    def _dial_name(self, client: socket.socket, target: Target, binding: Binding) -> None:
        connection = self._begin(client, target)
        binding.connections += 1

        def found(what: Found) -> None:
            self.loop.guarded(partial(self._dial_judged, connection, what.addresses), connection)

        if binding.is_fresh(self.loop.now):
            found(Found(binding.addresses))
        elif not self.look_up(binding, found):
            connection.reset()

    def _dial_judged(self, connection: Connection, addresses: tuple[str, ...]) -> None:
        """To those of *addresses* that the rules allow, and no other."""
        target = connection.target
        verdicts = [(self._verdicts.of(target.name, a, target.port), a) for a in addresses]
        allowed = [address for verdict, address in verdicts if verdict.allowed]
        if connection.is_over:
            return
        if verdicts and not allowed:
            self._refuse_verdict(target, verdicts[0][0])
        connection.dial(allowed)

    def _begin(self, client: socket.socket, target: Target) -> Connection:
        self._book.changed()
        connection = Connection(self, client, target, self._tally.connected(target.label))
        self._sit_down(connection)
        return connection

    def _sit_down(self, one: Connection | Stream) -> None:
        self._connections.add(one)
        self._shared.seats.taken += 1

    def _stand_up(self, one: Connection | Stream) -> None:
        self._connections.discard(one)
        self._shared.seats.taken -= 1

    def left(self, connection: Connection) -> None:
        """It has ended."""
        self._stand_up(connection)
        if binding := connection.target.binding:
            binding.connections -= 1
            binding.used_at = self.loop.now

    def stream_ended(self, stream: Stream) -> None:
        """A connection to the name server is over."""
        self._stand_up(stream)

    # -- names

    def may_ask(self, name: str, *, is_for_address: bool) -> bool:
        """Whether the rules allow *name*. Of records that no person asks for nobody is told."""
        verdict = self._verdicts.rules.judge_name(name)
        if not verdict.allowed:
            self._tally.refused(name)
            if is_for_address:
                self._sentences.say(name, verdict.sentence(name))
            self._book.changed()
        elif self.settings.audit:
            self._tally.of(name)
            self._book.changed()
        return verdict.allowed

    def look_up(self, binding: Binding, then: Callable[[Found], None]) -> bool:
        """Let *then* have its addresses; False where none may be looked up now."""
        if why := self._why_no_look_up():
            self._refuse_name(binding.name, why)
            return False

        def found(what: Found) -> None:
            if self.is_over:
                return
            if what.addresses:
                binding.addresses, binding.looked_up_at = what.addresses, self.loop.now
            self.loop.guarded(partial(then, what))

        self._look_ups.take(1)
        if self._shared.lookups.ask(self.settings.id, binding.name, found):
            return True
        self._refuse_name(binding.name, f"this kernel waits for {MOST_WAITING} other names")
        return False

    def _why_no_look_up(self) -> str:
        """As of connections: a look-up tells somebody the name."""
        if self._tally.is_used_up:
            return _quota_is_used_up(self._tally.quota_bytes)
        if not self._look_ups.available(self.loop.now):
            return f"this kernel looks up more than {LOOKUPS_PER_SECOND} names a second"
        return ""

    def _refuse_name(self, name: str, why: str) -> None:
        self._refuse(name, Verdict(allowed=False, why=why))

    # -- what is refused

    def refuse(self, target: Target, why: str) -> None:
        """Count it, and tell the person."""
        self._refuse_verdict(target, Verdict(allowed=False, why=why))

    def _refuse_verdict(self, target: Target, verdict: Verdict) -> None:
        self._refuse(target.label, verdict)

    def _refuse(self, label: str, verdict: Verdict) -> None:
        self._tally.refused(label)
        self._sentences.say(label, verdict.sentence(label))
        self._book.changed()

    # -- bytes

    def room(self, *, up: bool) -> int:
        """How many bytes may pass now."""
        return min((self._up if up else self._down).room(), self._tally.left_bytes)

    def turn_bytes(self, *, up: bool) -> int:
        """How many one connection may move at a time."""
        return (self._up if up else self._down).turn_bytes

    def park(self, connection: Connection, *, up: bool) -> None:
        """Let it go on when there is room; when the quota is used up there will be none."""
        if not self._tally.is_used_up:
            (self._up if up else self._down).park(connection)

    def passed(self, connection: Connection, count: int, *, up: bool) -> None:
        """So much has passed."""
        (self._up if up else self._down).passed(count)
        self._tally.passed(connection.counts, **{"up" if up else "down": count})
        self._book.changed()
        self._look_at_quota()

    def _look_at_quota(self) -> None:
        if self._tally.left_bytes or self._tally.is_used_up:
            return
        self._tally.is_used_up = True
        self._sentences.say(
            "", f"The network has ended: {_quota_is_used_up(self._tally.quota_bytes)}."
        )
        self.loop.later(0, self._end_connections)  # the last bytes are on their way still

    def _end_connections(self) -> None:
        for one in [*self._connections]:
            one.reset()

    def close(self) -> None:
        """All of it; more than once is fine."""
        if self.is_over:
            return
        self.is_over = True
        self._shared.boxes.pop(self.settings.id, None)
        self._shared.lookups.forget(self.settings.id)
        self._end_connections()
        self._arrivals.close()
        self.group.close()
        for one in (*self._datagrams, self._channel):
            one.close()
        self._up.close()
        self._down.close()
        self._book.close()


@dataclass(slots=True)
class Verdicts:
    """What *rules* say, kept as long as they hold: to judge takes as long as to dial."""

    rules: Rules
    _kept: dict[tuple[str | None, str, int, str], Verdict] = field(default_factory=dict)

    def of(self, name: str | None, address: str, port: int) -> Verdict:
        """As `Rules.judge`, with what is this machine's own by now."""
        own = own_address(address)
        asked = name, address, port, own
        if asked not in self._kept:
            if len(self._kept) >= _MOST_VERDICTS:
                self._kept.clear()
            rules = self.rules.with_own(own) if own else self.rules
            self._kept[asked] = rules.judge(name, address, port)
        return self._kept[asked]


class Book:
    """The file of counts *fd*, in which *tally* is to stand: soon after each change, and its names
    once a second at the most, or more seldom the more there are."""

    def __init__(self, loop: Loop, fd: int, tally: Tally) -> None:
        self._loop = loop
        self._fd = fd
        self._tally = tally
        self._writer = Writer(lambda data, position: os.pwrite(fd, data, position))
        self._timer: Timer | None = None
        self._names_timer: Timer | None = None

    def changed(self) -> None:
        """There is something new in it."""
        if self._timer is None:
            self._timer = self._loop.later(_WRITE_SECONDS, self._write)
        if self._names_timer is None:
            seconds = max(_WRITE_NAMES_SECONDS, len(self._tally.by_name) / _NAMES_A_SECOND)
            self._names_timer = self._loop.later(seconds, self._write_all)

    def _write(self) -> None:
        """Where the disk is full: with the next change."""
        self._timer = None
        with contextlib.suppress(OSError):
            self._writer.numbers(self._tally.traffic(with_names=False))

    def _write_all(self) -> None:
        self._names_timer = None
        with contextlib.suppress(OSError):
            self._writer.all(self._tally.traffic(with_names=True))

    def close(self) -> None:
        """Write the last of it."""
        for timer in (self._timer, self._names_timer):
            if timer is not None:
                timer.cancel()
        with contextlib.suppress(OSError):
            self._writer.all(replace(self._tally.traffic(with_names=True), is_last=True))
        os.close(self._fd)


def _quota_is_used_up(quota_bytes: int) -> str:
    return f"this kernel has used up its network_quota of {quota_bytes} bytes"


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    client.close()
