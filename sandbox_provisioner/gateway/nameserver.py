"""gateway/nameserver.py - runs in the gateway: answers what programs of one box ask of DNS.

No query leaves for a name that the rules refuse. One that they allow is looked up before it is
answered: a program learns at once, and by the usual error, that a name does not exist, and the
connection that follows finds the addresses at hand. Records of other types than addresses do not
exist here; HTTPS above all, which would bring keys for an encrypted hello.

May import: dns, lookups, loop, names, refused, facilities.network.wish.names.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from sandbox_provisioner.gateway import dns
from sandbox_provisioner.gateway.lookups import Found
from sandbox_provisioner.gateway.loop import ENDED, READ, WRITE, Group, Loop, Timer
from sandbox_provisioner.gateway.names import Binding, Names
from sandbox_provisioner.gateway.refused import Refused

PORT = 53
_MOST_ASKING = 64  # for one name, while it is looked up
_DATAGRAMS = 4
_ANCILLARY_BYTES = 256
_PACKET_INFO = {socket.IPPROTO_IP: 8, socket.IPPROTO_IPV6: socket.IPV6_PKTINFO}  # IP_PKTINFO
_IDLE_SECONDS = 10.0
_LENGTH_BYTES = 2

Reply = Callable[[bytes], None]


class Owner(Protocol):
    """The box whose programs ask."""

    loop: Loop
    group: Group
    names: Names
    has_ipv6: bool

    def may_ask(self, name: str, *, is_for_address: bool) -> bool:
        """Whether the rules allow *name*; if not it is counted, and the person is told."""

    def look_up(self, binding: Binding, then: Callable[[Found], None]) -> bool:
        """Let *then* have its addresses; False where too many wait for theirs."""

    def stream_ended(self, stream: Stream) -> None:
        """A connection to the name server is over."""


class NameServer:
    """That of one box."""

    def __init__(self, box: Owner) -> None:
        self._box = box
        self._asking: dict[str, list[tuple[dns.Question, Reply]]] = {}

    def ask(self, message: bytes, reply: Reply) -> None:
        """Answer *message* by *reply*, at once or later; never, where it is no query."""
        try:
            question = dns.read_query(message)
        except Refused:
            return
        if question.kind == dns.PTR_TYPE and question.name.endswith(".arpa"):
            reply(self._of_address(question))
        elif not self._box.may_ask(question.name, is_for_address=question.asks_for_address):
            reply(dns.no_such_name(question))
        elif not question.asks_for_address:
            reply(dns.empty_answer(question))
        else:
            self._find(question, reply)

    def _of_address(self, question: dns.Question) -> bytes:
        address = dns.address_asked_for(question.name)
        binding = self._box.names.at(address) if address else None
        if binding is None:
            return dns.no_such_name(question)
        return dns.name_answer(question, binding.name)

    def _find(self, question: dns.Question, reply: Reply) -> None:
        name = question.name
        if asking := self._asking.get(name):
            if len(asking) < _MOST_ASKING:
                asking.append((question, reply))
            return
        binding = self._box.names.bind(name, self._box.loop.now)
        if binding is None:
            reply(dns.failed(question))
            return
        self._asking[name] = [(question, reply)]
        if binding.is_fresh(self._box.loop.now):
            self._found(binding, Found(binding.addresses))
        elif not self._box.look_up(binding, lambda found: self._found(binding, found)):
            self._found(binding, Found((), failed=True))

    def _found(self, binding: Binding, found: Found) -> None:
        if not binding.addresses and not binding.connections:
            self._box.names.forget(binding)
        for question, reply in self._asking.pop(binding.name, ()):
            if found.failed:
                reply(dns.failed(question))
            elif not found.addresses:
                reply(dns.no_such_name(question))
            elif question.kind == dns.A_TYPE:
                reply(dns.address_answer(question, binding.v4))
            elif self._box.has_ipv6:
                reply(dns.address_answer(question, binding.v6))
            else:
                reply(dns.empty_answer(question))


class Datagrams:
    """A socket at which queries come one by one. Each is answered from the address that it went to,
    which tells the program that it is an answer (ip(7), IP_PKTINFO)."""

    def __init__(self, server: NameServer, listener: socket.socket) -> None:
        self._server = server
        self._listener = listener
        is_v6 = listener.family == socket.AF_INET6
        if is_v6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        with contextlib.suppress(OSError):  # one for IPv6 alone
            listener.setsockopt(socket.IPPROTO_IP, _PACKET_INFO[socket.IPPROTO_IP], 1)

    def on_event(self, _fd: int, _events: int) -> None:
        """Some have come."""
        for _ in range(_DATAGRAMS):
            try:
                message, ancillary, _, sender = self._listener.recvmsg(
                    dns.MOST_OF_QUERY + 1, _ANCILLARY_BYTES
                )
            except OSError:
                return
            asked = [(level, kind, _as_source(level, data)) for level, kind, data in ancillary
                     if _PACKET_INFO.get(level) == kind]  # fmt: skip
            self._server.ask(message, partial(self._reply, sender, asked))

    def _reply(self, sender: Any, asked: list[tuple[int, int, bytes]], answer: bytes) -> None:
        with contextlib.suppress(OSError):  # the asker may be gone, or the box
            self._listener.sendmsg([answer], asked, socket.MSG_DONTWAIT, sender)

    def on_mistake(self) -> None:
        """That query is lost."""


def _as_source(level: int, data: bytes) -> bytes:
    """struct in_pktinfo: interface, local address, the header's address; in6_pktinfo: address,
    interface. The same address, by whatever interface."""
    if level == socket.IPPROTO_IPV6:
        return data[:16] + bytes(4)
    return bytes(4) + data[8:12] + bytes(4)


class Stream:
    """A connection over which queries come, each behind its length (RFC 1035, 4.2.2); one is
    answered before the next is read."""

    def __init__(self, box: Owner, server: NameServer, client: socket.socket) -> None:
        self._box = box
        self._server = server
        self._client = client
        self._read = b""
        self._unsent = b""
        self._waits = False
        self._timer: Timer | None = None
        self.is_over = False
        self._watch()

    def _watch(self) -> None:
        """It may take so long with each step."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._box.loop.later(_IDLE_SECONDS, self.close)
        events = WRITE if self._unsent else READ
        if self._waits:
            self._box.group.forget(self._client.fileno())
        else:
            self._box.group.watch(self._client.fileno(), self, events)

    def on_event(self, _fd: int, events: int) -> None:
        """There is more, or room for more."""
        try:
            if self._unsent:
                self._unsent = self._unsent[self._client.send(self._unsent) :]
            elif events & (READ | ENDED):
                data = self._client.recv(dns.MOST_OF_QUERY)
                if not data:
                    raise ConnectionResetError
                self._read += data
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self._go_on()

    def _go_on(self) -> None:
        length = int.from_bytes(self._read[:_LENGTH_BYTES], "big")
        end = _LENGTH_BYTES + length
        if length > dns.MOST_OF_QUERY:
            self.close()
            return
        if not self._unsent and len(self._read) >= max(end, _LENGTH_BYTES + 1):
            message, self._read = self._read[_LENGTH_BYTES:end], self._read[end:]
            self._waits = True
            self._server.ask(message, self._reply)
        if not self.is_over:
            self._watch()

    def _reply(self, answer: bytes) -> None:
        if self.is_over:
            return
        self._waits = False
        self._unsent += len(answer).to_bytes(_LENGTH_BYTES, "big") + answer
        self._watch()

    def on_mistake(self) -> None:
        """It raised what nobody expects."""
        self.close()

    def reset(self) -> None:
        """The same."""
        self.close()

    def close(self) -> None:
        """End it; more than once is fine."""
        if self.is_over:
            return
        self.is_over = True
        if self._timer is not None:
            self._timer.cancel()
        self._box.group.forget(self._client.fileno())
        self._client.close()
        self._box.stream_ended(self)
