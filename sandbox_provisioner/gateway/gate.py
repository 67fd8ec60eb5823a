"""gateway/gate.py - pure, in the gateway: what a client says first, and who is to judge it.

On a connection that was made to a name, the first bytes tell the protocol: TLS names its server,
and HTTP its host, and either has to be that name. What is neither is let through: the connection
goes to that name alone. Until all is told, what the client says is held back.

May import: hello, head, refused.
"""

from __future__ import annotations

import re
from typing import Protocol

from sandbox_provisioner.gateway.head import TOKEN_CHARACTERS, Requests
from sandbox_provisioner.gateway.hello import RECORD_TYPES, Hellos
from sandbox_provisioner.gateway.refused import Refused

HTTP_PORT = 80
_MOST = 1 << 14
# What a server may overlook before a request, or take for the blank in one: Python's http.server
# goes by str.split(), which has all of these.
_BLANKS = b"\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0"
# In a first line: a request; one of HTTP/0.9 to a proxy; one that a careless proxy takes for such.
_REQUEST = re.compile(rb"HTTP/|\sHTTPS?://|^\s*CONNECT\s+\S+:", re.IGNORECASE)
# A message of LDAP (RFC 4511, 4.1.1) whose length is a blank: a bind without a name, and StartTLS.
_LDAP = re.compile(rb"0[\t-\r\x1c- ]\x02")
_TLS_MAJOR = 3
# Go's crypto/tls takes each version below this for that of a first record, and an alert before it.
_NO_TLS_MAJOR = 0x10
_HANDSHAKE_OF_HELLO, _ALERT = (0x16, 1), (0x15, b"\0\2")
_SSL2_HELLO = 1


class Judge(Protocol):
    """Who follows one protocol on one connection."""

    is_open: bool
    wants_answer: bool

    @property
    def is_undecided(self) -> bool:
        """Whether more of the client's bytes are needed to judge those that are held back."""

    def feed(self, data: bytes) -> bytes:
        """What may be sent, now that *data* has come as well; Refused."""

    def answer(self, data: bytes) -> None:
        """The first bytes of the server, as long as `wants_answer`; Refused."""


class Anything:
    """No more is looked at."""

    is_open = True
    wants_answer = False
    is_undecided = False

    def feed(self, data: bytes) -> bytes:
        """All of it."""
        return data

    def answer(self, data: bytes) -> None:
        """Nobody asks for it."""


class First:
    """The first bytes of a client that speaks with port *port* of *name*."""

    def __init__(self, name: str, port: int) -> None:
        self._name = name
        self._port = port
        self._held = b""
        self._judge: Judge | None = None

    @property
    def is_open(self) -> bool:
        """Whether nothing is looked at any more."""
        return self._judge is not None and self._judge.is_open

    @property
    def wants_answer(self) -> bool:
        """Whether the server's next bytes are to be shown to `answer`."""
        return self._judge is not None and self._judge.wants_answer

    @property
    def is_undecided(self) -> bool:
        """Whether more of the client's bytes are needed to judge those that are held back."""
        return bool(self._held) if self._judge is None else self._judge.is_undecided

    def feed(self, data: bytes) -> bytes:
        """What may be sent, now that *data* has come as well; Refused."""
        if self._judge is None:
            self._held += data
            self._judge = judge_of(self._held, self._name, self._port)
            if self._judge is None:
                return b""
            data, self._held = self._held, b""
        return self._judge.feed(data)

    def answer(self, data: bytes) -> None:
        """The first bytes of the server, as long as `wants_answer`; Refused."""
        if self._judge is not None:
            self._judge.answer(data)


def judge_of(first: bytes, name: str, port: int) -> Judge | None:
    """Who is to judge a client that begins with *first*; None where more has to be seen."""
    if port == HTTP_PORT:
        return Requests(name)
    if first and first[0] in RECORD_TYPES:
        return _of_tls(first, name)
    if _may_be_request(first):
        return _of_text(first, name)
    return _of_ssl2(first) if first[0] & 0x80 else Anything()


def _of_tls(first: bytes, name: str) -> Judge | None:
    if len(first) < 2:
        return None
    if first[1] == _TLS_MAJOR:
        return Hellos(name)
    if first[1] >= _NO_TLS_MAJOR:
        return Anything()
    if len(first) < 6:
        return None
    if (first[0], first[5]) == _HANDSHAKE_OF_HELLO or (first[0], first[3:5]) == _ALERT:
        raise Refused("what its client says looks like TLS, of a version that there is not")
    return Anything()


def _of_ssl2(first: bytes) -> Judge | None:
    """A hello in the form of SSL 2 (RFC 5246, E.2), which names no server."""
    is_other = first[2:3] not in (b"", bytes([_SSL2_HELLO])) or first[3:4] not in (
        b"", b"\0", bytes([_TLS_MAJOR]),
    )  # fmt: skip
    if is_other:
        return Anything()
    if len(first) < 4:
        return None
    raise Refused("its client begins with a hello of SSL 2, which names no server")


def _may_be_request(first: bytes) -> bool:
    """Whether it has a method in front, as far as it is there."""
    if _LDAP.match(first):
        return False
    text = first.lstrip(_BLANKS)
    after_method = text.lstrip(TOKEN_CHARACTERS)
    return not text or (after_method != text and after_method[:1] in _BLANKS)


def _of_text(first: bytes, name: str) -> Judge | None:
    """Whatever has a method and "HTTP/" in its first line, be it as wrong as it may."""
    line, end, _ = first.lstrip(_BLANKS).partition(b"\n")
    if _REQUEST.search(line):
        return Requests(name)
    if end:
        return Anything()
    if len(first) > _MOST:
        raise Refused("its client's first line is too long")
    return None
