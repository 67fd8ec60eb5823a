"""stand_in.py - in the test process: somebody in the gateway's place, who has the box's listeners.

It answers nothing by itself: a test accepts, and says what it likes.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from dnslib import QTYPE, RCODE, RR, A, DNSRecord

from sandbox_provisioner.inside import wire
from sandbox_provisioner.launch import LocalLauncher

PATIENCE_SECONDS = 30.0


class StandIn:
    """One end of a box's network channel, and the listeners that came through it, by kind: to a
    start it is what the gateway is (`ledger.Attachment`)."""

    def __init__(self, channel: socket.socket, theirs: socket.socket) -> None:
        """*theirs* is PID 1's end, for its start to be given."""
        self.channel = channel
        self.theirs = theirs
        self.listeners: dict[str, socket.socket] = {}
        self.at: dict[tuple[str, int], socket.socket] = {}
        self._threads: list[threading.Thread] = []

    @property
    def fd(self) -> int:
        """PID 1's end."""
        return self.theirs.fileno()

    def register(self, *_: object) -> None:
        """Nobody has to be told."""

    async def joined(self) -> None:
        """Nor waited for."""

    def close(self) -> None:
        """The channel is PID 1's own from here on."""
        self.theirs.close()

    def take(self) -> None:
        """What PID 1 has handed out."""
        self.channel.settimeout(PATIENCE_SECONDS)
        text, fds, _, _ = socket.recv_fds(self.channel, 4096, 253)
        word, names = wire.parts(text)
        assert word == wire.LISTENERS, text
        for name, fd in zip(names.split(), fds, strict=True):
            one = socket.socket(fileno=fd)
            one.settimeout(PATIENCE_SECONDS)
            self.at[name, one.getsockname()[1]] = self.listeners[name] = one

    def accept(self, kind: str = "tcp4") -> tuple[socket.socket, Any]:
        """A program's connection, and whom it is meant for."""
        connection, _ = self.listeners[kind].accept()
        return connection, connection.getsockname()[:2]

    def answer(self, text: bytes, kind: str = "udp4") -> bytes:
        """Answer one datagram with *text*, from the address that was asked."""
        asked, about, _, who = self.listeners[kind].recvmsg(4096, 256)
        self.listeners[kind].sendmsg([text], about, 0, who)
        return asked

    def answer_names(self, known: Mapping[str, str]) -> list[str]:
        """Answer all questions for names from now on, in a thread, by *known*; the names come into
        the list that is returned."""
        asked: list[str] = []

        def serve() -> None:
            while (found := self.listeners["udp4"].recvmsg(4096, 256))[0]:
                text, about, _, who = found
                question = DNSRecord.parse(text)
                name, kind = str(question.q.qname).rstrip("."), question.q.qtype
                asked.append(name)
                reply = question.reply()
                if name not in known:
                    reply.header.rcode = RCODE.NXDOMAIN
                elif kind == QTYPE.A:
                    reply.add_answer(RR(name, rdata=A(known[name])))
                self.listeners["udp4"].sendmsg([reply.pack()], about, 0, who)

        self.listeners["udp4"].settimeout(None)
        self._threads.append(threading.Thread(target=serve))
        self._threads[-1].start()
        return asked

    def end(self) -> None:
        """The gateway is gone."""
        if self._threads:
            with contextlib.suppress(OSError):  # it has no peer, and wakes up all the same
                self.listeners["udp4"].shutdown(socket.SHUT_RD)
            self._threads.pop().join()
        for one in (self.theirs, self.channel, *self.at.values()):
            one.close()


@contextlib.contextmanager
def in_place_of_the_gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """For the one start that comes next."""
    stand_in = StandIn(*socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    monkeypatch.setattr(LocalLauncher, "attachment", lambda *_: stand_in)
    try:
        yield stand_in
    finally:
        stand_in.end()
