"""gateway/connection.py - runs in the gateway: one connection of a program in a box, to its end.

::

    accepted ──▶ looked up ──▶ dialled ──▶ moving: up, client to server, judged at first; and down
                     └───────────┴────────────┴──▶ reset

What the server says flows at once. What the client says is read and shown to `First` until that
lets it pass; from then on, and always on the way down, it is moved unseen. Where one of the two
ends its half, the other is told so; where it resets the connection, so is the other one.

May import: gate, loop, meter, mover, names, refused.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from sandbox_provisioner.gateway.gate import Anything, First
from sandbox_provisioner.gateway.loop import ENDED, READ, WRITE, Group, Loop, Timer
from sandbox_provisioner.gateway.meter import OfOne
from sandbox_provisioner.gateway.mover import COPIED_BYTES, Share, Way
from sandbox_provisioner.gateway.names import Binding
from sandbox_provisioner.gateway.refused import Refused

# From a client's first byte, and from each request's, until it is judged.
FIRST_BYTES_SECONDS = 10.0
# For one address where others are left, and for all of a name.
_DIAL_SECONDS = 5.0
_LAST_DIAL_SECONDS = 30.0
_MOST_ADDRESSES = 8
_ESTABLISHED = b"\1"  # tcp(7), TCP_INFO: its first byte is the state, TCP_ESTABLISHED
_RESET = struct.pack("ii", 1, 0)  # socket(7), SO_LINGER: on, for 0 s: close(2) sends RST


@dataclass(frozen=True, slots=True)
class Target:
    """Where a program wanted to go: *address* as it asked for it, which stands for the name of
    *binding*, if any."""

    address: str
    port: int
    binding: Binding | None = None

    @property
    def name(self) -> str | None:
        """The name that it stands for."""
        return self.binding.name if self.binding else None

    @property
    def label(self) -> str:
        """For counts and sentences."""
        whom = self.name or self.address
        return f"[{whom}]:{self.port}" if ":" in whom else f"{whom}:{self.port}"


class Owner(Protocol):
    """The box of a connection."""

    loop: Loop
    group: Group
    share: Share

    def room(self, *, up: bool) -> int:
        """How many bytes may pass now."""

    def turn_bytes(self, *, up: bool) -> int:
        """How many one connection may move at a time."""

    def park(self, connection: Connection, *, up: bool) -> None:
        """Call `resume` when there is room."""

    def passed(self, connection: Connection, count: int, *, up: bool) -> None:
        """So much has passed."""

    def refuse(self, target: Target, why: str) -> None:
        """Count it, and tell the person."""

    def left(self, connection: Connection) -> None:
        """It has ended."""


class _Half:
    """One direction: its way, and why it does not go on, if so."""

    __slots__ = ("is_blocked", "is_done", "is_ended", "is_parked", "way")

    def __init__(self, source: socket.socket, sink: socket.socket, share: Share) -> None:
        self.way = Way(source, sink, share)
        self.is_blocked = False  # the sink takes nothing now
        self.is_parked = False  # the box's rate allows nothing now
        self.is_ended = False  # the source has said all
        self.is_done = False  # and the sink was told so

    @property
    def reads(self) -> bool:
        """Whether more of the source is wanted now."""
        return not (self.is_blocked or self.is_parked or self.is_ended)


class Connection:
    """A program's connection, and the one that was made for it."""

    def __init__(self, box: Owner, client: socket.socket, target: Target, counts: OfOne) -> None:
        self.target = target
        self.counts = counts
        self._box = box
        self._client = client
        self._server: socket.socket | None = None
        self._addresses: deque[str] = deque()
        self._timer: Timer | None = None
        self._up: _Half | None = None
        self._down: _Half | None = None
        name = target.name
        self._first = First(name, target.port) if name else Anything()
        self.is_over = False

    # -- the connection to the server

    def dial(self, addresses: Iterable[str]) -> None:
        """Connect to the first of *addresses*, which are judged already, that answers."""
        self._addresses.extend(list(addresses)[:_MOST_ADDRESSES])
        self._dial_next()

    def _dial_next(self) -> None:
        self._drop_server()
        while self._addresses and self._server is None and not self.is_over:
            self._begin_dialling(self._addresses.popleft())
        if self._server is None:
            self.reset()

    def _begin_dialling(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            server = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError:  # no descriptor is left, or this machine has no IPv6
            return
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        number = server.connect_ex((address, self.target.port))
        if number not in (0, errno.EINPROGRESS):
            server.close()
            return
        self._server = server
        if (
            server.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == _ESTABLISHED
        ):  # on this host
            self._dialled()
            return
        seconds = _DIAL_SECONDS if self._addresses else _LAST_DIAL_SECONDS
        self._set_timer(seconds, self._dial_next)
        self._box.group.watch(server.fileno(), self, WRITE)

    def _dialled(self) -> None:
        assert self._server is not None
        if self._server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._dial_next()
            return
        self._cancel_timer()
        self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._up = _Half(self._client, self._server, self._box.share)
        self._down = _Half(self._server, self._client, self._box.share)
        with self._reset_if_it_fails():
            self._pump(self._up)  # most clients have said something by now
            self._go_on()

    def _drop_server(self) -> None:
        self._cancel_timer()
        if self._server is not None:
            self._box.group.forget(self._server.fileno())
            self._server.close()
            self._server = None

    # -- events

    def on_event(self, fd: int, events: int) -> None:
        """One of the two sockets is ready."""
        if self._up is None or self._down is None:
            self._dialled()
            return
        with self._reset_if_it_fails():
            is_client = fd == self._client.fileno()
            from_here, to_here = (self._up, self._down) if is_client else (self._down, self._up)
            if events & (WRITE | ENDED) and to_here.is_blocked:
                to_here.is_blocked = False
                self._pump(to_here)
            if events & (READ | ENDED) and from_here.reads:
                self._pump(from_here)
            elif events & ENDED and not to_here.is_blocked:
                raise ConnectionResetError
            self._go_on()

    def on_mistake(self) -> None:
        """It raised what nobody expects."""
        self.reset()

    def resume(self, *, up: bool) -> None:
        """The box's rate has room again."""
        half = self._up if up else self._down
        if self.is_over or half is None:
            return
        half.is_parked = False
        with self._reset_if_it_fails():
            self._pump(half)
            self._go_on()

    @contextlib.contextmanager
    def _reset_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except Refused as refused:
            self._box.refuse(self.target, refused.why)
            self.reset()
        except OSError:
            self.reset()

    def _go_on(self) -> None:
        """Wait for what comes next; or it is over."""
        if self.is_over or self._up is None or self._down is None:
            return
        if self._up.is_done and self._down.is_done:
            self.close()
            return
        self._limit_first_bytes()
        self._watch()

    def _watch(self) -> None:
        assert self._up and self._down and self._server
        for fd, from_here, to_here in (
            (self._client.fileno(), self._up, self._down),
            (self._server.fileno(), self._down, self._up),
        ):
            events = READ * self._reads(from_here) | WRITE * to_here.is_blocked
            if events or (from_here.is_ended and not to_here.is_done):
                self._box.group.watch(fd, self, events)
            else:  # else its end would be told again and again
                self._box.group.forget(fd)

    def _reads(self, half: _Half) -> bool:
        """What a client says while its server has to answer first can wait where it is."""
        return half.reads and not (half is self._up and self._first.wants_answer)

    # -- bytes

    def _pump(self, half: _Half) -> None:
        """Move what there is, once: others want to move theirs as well."""
        half.way.flush()
        if half.way.is_empty and self._reads(half):
            self._take(half)
            half.way.flush()
        half.is_blocked = not half.way.is_empty
        if half.is_ended and not half.is_blocked and not half.is_done:
            half.is_done = True
            with contextlib.suppress(OSError):  # it has been reset meanwhile, which the other tells
                half.way.sink.shutdown(socket.SHUT_WR)

    def _take(self, half: _Half) -> None:
        is_up = half is self._up
        room = self._box.room(up=is_up)
        if not room:
            half.is_parked = True
            self._box.park(self, up=is_up)
            return
        most = min(room, self._box.turn_bytes(up=is_up))
        try:
            count = self._read(half, most, is_up=is_up)
        except BlockingIOError:
            return
        if count:
            self._box.passed(self, count, up=is_up)
        else:
            half.is_ended = True

    def _read(self, half: _Half, most: int, *, is_up: bool) -> int:
        if is_up and not self._first.is_open:
            return self._read_judged(half, most)
        if not is_up and self._first.wants_answer:
            return self._read_answer(half, most)
        return half.way.take(most)

    def _read_judged(self, half: _Half, most: int) -> int:
        data = self._client.recv(min(most, COPIED_BYTES))
        if not data and self._first.is_undecided:
            raise Refused("its client ended before it had said with whom it wants to speak")
        half.way.add(self._first.feed(data))
        return len(data)

    def _read_answer(self, half: _Half, most: int) -> int:
        data = half.way.source.recv(min(most, COPIED_BYTES))
        self._first.answer(data)
        half.way.add(data)
        if self._up is not None and not self._first.wants_answer:
            self._up.way.add(self._first.feed(b""))
            self._pump(self._up)
        return len(data)

    def _limit_first_bytes(self) -> None:
        """From when they begin: a client that says nothing waits for its server to begin."""
        if not self._first.is_undecided:
            self._cancel_timer()
        elif self._timer is None:
            self._set_timer(FIRST_BYTES_SECONDS, self._too_slow)

    def _too_slow(self) -> None:
        why = f"its client did not say within {FIRST_BYTES_SECONDS:g} s with whom it wants to speak"
        self._box.refuse(self.target, why)
        self.reset()

    # -- the end

    def reset(self) -> None:
        """End it as a connection that was lost ends."""
        for one in (self._client, self._server):
            if one is not None and one.fileno() >= 0:
                with contextlib.suppress(OSError):
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.close()

    def close(self) -> None:
        """End it; more than once is fine."""
        if self.is_over:
            return
        self.is_over = True
        self._cancel_timer()
        self._box.group.forget(self._client.fileno())
        self._client.close()
        self._drop_server()
        for half in (self._up, self._down):
            if half is not None:
                half.way.close()
        self._box.left(self)

    def _set_timer(self, seconds: float, then: Callable[[], None]) -> None:
        self._cancel_timer()
        self._timer = self._box.loop.later(seconds, then)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
