"""stand_in.py - in the test process: somebody in the gateway's place, who has the box's listeners.

It answers nothing by itself: a test accepts, and says what it likes.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from sandbox_provisioner.inside import wire
from sandbox_provisioner.launch import LocalLauncher

PATIENCE_SECONDS = 30.0


class StandIn:
    """One end of a box's network channel, and the listeners that came through it, by kind."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.listeners: dict[str, socket.socket] = {}

    def take(self) -> None:
        """What PID 1 has handed out."""
        self.channel.settimeout(PATIENCE_SECONDS)
        text, fds, _, _ = socket.recv_fds(self.channel, 4096, 16)
        word, names = wire.parts(text)
        assert word == wire.LISTENERS, text
        for name, fd in zip(names.split(), fds, strict=True):
            self.listeners[name] = socket.socket(fileno=fd)
            self.listeners[name].settimeout(PATIENCE_SECONDS)

    def accept(self, kind: str = "tcp4") -> tuple[socket.socket, Any]:
        """A program's connection, and whom it is meant for."""
        connection, _ = self.listeners[kind].accept()
        return connection, connection.getsockname()[:2]

    def answer(self, text: bytes, kind: str = "udp4") -> bytes:
        """Answer one datagram with *text*, from the address that was asked."""
        asked, about, _, who = self.listeners[kind].recvmsg(4096, 256)
        self.listeners[kind].sendmsg([text], about, 0, who)
        return asked

    def close(self) -> None:
        """The gateway is gone."""
        for one in (self.channel, *self.listeners.values()):
            one.close()


@contextlib.contextmanager
def in_place_of_the_gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """For the one start that comes next."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    look = LocalLauncher.look

    def given(launcher: LocalLauncher, *arguments: Any) -> Any:
        site, tree = look(launcher, *arguments)
        return replace(site, held={wire.NETWORK: theirs.fileno()}), tree

    stand_in = StandIn(ours)
    monkeypatch.setattr(LocalLauncher, "look", given)
    try:
        with theirs:
            yield stand_in
    finally:
        stand_in.close()
