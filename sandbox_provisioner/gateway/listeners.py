"""gateway/listeners.py - runs in the gateway: the sockets in a box at which its connections arrive.

May import: loop.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable

from sandbox_provisioner.gateway.loop import READ, Group, Loop, Timer

_AT_ONCE = 8
_NONE_LEFT = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_PAUSE_SECONDS = 0.2


def wanted_by(client: socket.socket) -> tuple[str, int]:
    """Where the program on the other end of *client* wanted to go: in the box every address is its
    own, so that a connection arrives at the very one (ip(7), IP_TRANSPARENT)."""
    address, port = client.getsockname()[:2]
    if ":" in address:
        own = ipaddress.IPv6Address(address.partition("%")[0])
        address = str(own.ipv4_mapped or own)
    return address, port


def is_listener(one: socket.socket) -> bool:
    """Whether connections or datagrams of IP can arrive at it; else nobody could wait for them."""
    if one.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    if one.type == socket.SOCK_STREAM:
        return bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    return one.type == socket.SOCK_DGRAM


class Arrivals:
    """The listeners of one box for TCP. *arrived* is called with each connection, and
    the address and the port that it was meant for."""

    def __init__(
        self,
        loop: Loop,
        group: Group,
        arrived: Callable[[socket.socket, str, int], None],
        seconds_to_next: Callable[[], float],
    ) -> None:
        self._loop = loop
        self._group = group
        self._arrived = arrived
        self._seconds_to_next = seconds_to_next
        self._listeners: dict[int, socket.socket] = {}
        self._pause: Timer | None = None

    def __len__(self) -> int:
        return len(self._listeners)

    def add(self, listener: socket.socket) -> None:
        """One more."""
        listener.setblocking(False)
        self._listeners[listener.fileno()] = listener
        if self._pause is None:
            self._group.watch(listener.fileno(), self, READ)

    def on_event(self, fd: int, _events: int) -> None:
        """Take in what has arrived, unless it is too soon: then it waits where it is."""
        for _ in range(_AT_ONCE):
            if seconds := self._seconds_to_next():
                self._wait(seconds)
                return
            try:
                client, _ = self._listeners[fd].accept()
            except OSError as error:
                if error.errno in _NONE_LEFT:
                    self._wait(_PAUSE_SECONDS)
                return
            client.setblocking(False)
            self._arrived(client, *wanted_by(client))

    def on_mistake(self) -> None:
        """That connection is lost, when its object is."""

    def _wait(self, seconds: float) -> None:
        for fd in self._listeners:
            self._group.forget(fd)
        self._pause = self._loop.later(seconds, self._go_on)

    def _go_on(self) -> None:
        self._pause = None
        for fd in self._listeners:
            self._group.watch(fd, self, READ)

    def close(self) -> None:
        """All of them; those keep the box's network namespace alive."""
        if self._pause is not None:
            self._pause.cancel()
        for fd, listener in self._listeners.items():
            self._group.forget(fd)
            listener.close()
        self._listeners.clear()
