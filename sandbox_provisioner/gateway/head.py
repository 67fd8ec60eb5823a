"""gateway/head.py - pure, in the gateway: the host that each HTTP request names, and if it may.

RFC 9112, strictly: what two servers may read in two ways is refused. A request is let go as soon as
its head is judged, and its body as it comes; where one ends and the next begins is followed.

A request for another protocol (Upgrade) holds back what comes after it until the server has
answered: with 101 all is let through, with anything else HTTP goes on. Only a connection's first
request can be one: which answer belongs to a later one would have to be found among the others.

May import: refused.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from sandbox_provisioner.gateway.refused import Refused

_MOST_OF_HEAD = 1 << 16
_MOST_OF_LINE = 1 << 12
_END_OF_HEAD = b"\r\n\r\n"
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
TOKEN_CHARACTERS = b"!#$%&'*+.^_`|~-" + bytes(range(48, 58)) + bytes(
    [*range(65, 91), *range(97, 123)]
)  # fmt: skip
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([!-~\x80-\xff]+) HTTP/1\.([01])")
_FIELD_NAME = re.compile(_TOKEN)
_CONTROLS = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_AUTHORITY = re.compile(rb"([A-Za-z0-9._-]+)(?::\d{0,5})?")
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)([/?#].*)?", re.IGNORECASE)
_LENGTH = re.compile(rb"\d{1,18}")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[^\x00-\x08\x0a-\x1f\x7f]*)?")
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})(?: .*)?")
_SWITCHING = 101
# In these a host could be named that nobody sees: RFC 7540, 3.2, and RFC 2817, 3.
_UNFOLLOWED = re.compile(rb"(?:h2|http|tls).*", re.DOTALL)
_SINGLE = {b"host", b"content-length", b"transfer-encoding"}


class Framing(NamedTuple):
    """What follows a head: *length* bytes, or chunks. *upgrade* is what else it wants to speak."""

    length: int
    is_chunked: bool
    upgrade: bytes


class Requests:
    """What an HTTP client sends to *name*, held back until each request is judged."""

    def __init__(self, name: str) -> None:
        self.is_open = False
        self.wants_answer = False
        self._name = name
        self._held = bytearray()
        self._body_left = 0
        self._next = self._head
        self._is_first = True
        self._upgrade = b""
        self._answer = b""

    @property
    def is_undecided(self) -> bool:
        """Whether more of the client's bytes are needed to judge those that are held back."""
        return bool(self._held) and not self.wants_answer

    def feed(self, data: bytes) -> bytes:
        """What may be sent, now that *data* has come as well; Refused."""
        self._held += data
        released = bytearray()
        while self._held and (count := self._step()):
            released += self._held[:count]
            del self._held[:count]
        return bytes(released)

    def answer(self, data: bytes) -> None:
        """The first bytes of the server, as long as `wants_answer`."""
        self._answer += data
        while self.wants_answer and (status := self._status()):
            if status == _SWITCHING:
                self._switch()
            elif 100 <= status < 200:  # others may come before the one that counts
                self._answer = self._answer.partition(_END_OF_HEAD)[2]
            else:
                self.wants_answer = False

    def _status(self) -> int:
        """The status of its first answer; 0 if that is not there yet."""
        line, end, _ = self._answer.partition(b"\r\n")
        if len(self._answer) > _MOST_OF_HEAD:
            raise Refused("its server's answer is too long")
        if not end:
            return 0
        status = _STATUS.fullmatch(line)
        number = int(status[1]) if status else 1000
        is_interim = 100 <= number < 200 and number != _SWITCHING
        return 0 if is_interim and _END_OF_HEAD not in self._answer else number

    def _switch(self) -> None:
        for protocol in self._upgrade.split(b","):
            if _UNFOLLOWED.fullmatch(protocol.strip()):
                raise Refused("it goes on in HTTP/2 or TLS, whose requests are not followed")
        self.is_open, self.wants_answer = True, False

    def _step(self) -> int:
        """How many of the bytes that are held may go; 0 where that cannot be told yet."""
        if self.is_open:
            return len(self._held)
        if self._body_left:
            count = min(self._body_left, len(self._held))
            self._body_left -= count
            return count
        return self._next()

    def _head(self) -> int:
        if self.wants_answer:
            return self._none_within(_MOST_OF_HEAD)
        if self._held.startswith(b"\r\n"):  # RFC 9112, 2.2: before a request it means nothing
            return 2
        end = self._held.find(_END_OF_HEAD)
        if end < 0:
            if self._held[-1:] == b"\n" and self._held[-2:] != b"\r\n":
                raise _ambiguous("a line that ends in another way")
            return self._none_within(_MOST_OF_HEAD)
        framing = read_head(bytes(self._held[:end]), self._name)
        self._body_left, self._upgrade = framing.length, framing.upgrade
        self._next = self._chunk if framing.is_chunked else self._head
        self.wants_answer = bool(framing.upgrade) and self._is_first
        self._is_first = False
        return end + len(_END_OF_HEAD)

    def _chunk(self) -> int:
        end = self._held.find(b"\r\n")
        if end < 0:
            return self._none_within(_MOST_OF_LINE)
        size = _CHUNK.fullmatch(bytes(self._held[:end]))
        if size is None or end > _MOST_OF_LINE:
            raise _ambiguous("a chunk without a size")
        self._body_left = int(size[1], 16)
        self._next = self._end_of_chunk if self._body_left else self._trailer
        return end + 2

    def _end_of_chunk(self) -> int:
        if not b"\r\n".startswith(self._held[:2]):
            raise _ambiguous("a chunk that is longer than its size")
        if len(self._held) < 2:
            return 0
        self._next = self._chunk
        return 2

    def _trailer(self) -> int:
        end = self._held.find(b"\r\n")
        if end < 0:
            return self._none_within(_MOST_OF_LINE)
        if end:
            _field(bytes(self._held[:end]))
        else:
            self._next = self._head
        return end + 2

    def _none_within(self, most: int) -> int:
        if len(self._held) > most:
            raise Refused("its client's HTTP request is too long")
        return 0


def read_head(head: bytes, name: str) -> Framing:
    """What follows the request *head*, which has no end in it; Refused unless all that it says of a
    host is *name*, and it can be read in one way only."""
    first, *lines = head.split(b"\r\n")
    line = _REQUEST_LINE.fullmatch(first)
    if line is None:
        raise _ambiguous("its first line is none of HTTP/1.1")
    _judge_target(line[1], line[2], name)
    fields = _fields(lines)
    _judge_host(fields.get(b"host"), name)
    is_chunked = _is_chunked(fields, is_old=line[3] == b"0")
    length = 0 if is_chunked else _length(fields)
    return Framing(length, is_chunked, fields.get(b"upgrade", b"").lower())


def _fields(lines: list[bytes]) -> dict[bytes, bytes]:
    """By their names in small letters; those that come more than once as one (RFC 9110, 5.3)."""
    found: dict[bytes, bytes] = {}
    for name, value in map(_field, lines):
        if name in _SINGLE and name in found:
            raise _ambiguous(f"more than one {name.decode()}")
        found[name] = found[name] + b", " + value if name in found else value
    return found


def _field(line: bytes) -> tuple[bytes, bytes]:
    """Its name in small letters, and its value. (One pattern for all of it would take forever to
    find that a line of blanks is none.)"""
    name, colon, value = line.partition(b":")
    if not (colon and _FIELD_NAME.fullmatch(name)) or _CONTROLS.search(value):
        raise _ambiguous("a field that is none")
    return name.lower(), value.strip(b" \t")


def _judge_target(method: bytes, target: bytes, name: str) -> None:
    if method.upper() == b"CONNECT":
        raise Refused("its client asks it to connect to somewhere else")
    if target == b"*" or target.startswith(b"/"):
        return
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None:
        raise _ambiguous("a target that is no path")
    _judge_host(absolute[1], name)


def _judge_host(host: bytes | None, name: str) -> None:
    if host is None:
        raise Refused("its client's HTTP request names no host")
    authority = _AUTHORITY.fullmatch(host)
    if authority is None or authority[1].decode().lower().rstrip(".") != name:
        told = host[:100].decode("ascii", "backslashreplace")
        raise Refused(f"its client's HTTP request is for {told!r}")


def _is_chunked(fields: dict[bytes, bytes], *, is_old: bool) -> bool:
    coding = fields.get(b"transfer-encoding")
    if coding is None:
        return False
    if coding.lower() != b"chunked" or is_old or b"content-length" in fields:
        raise _ambiguous("a body of no certain length")
    return True


def _length(fields: dict[bytes, bytes]) -> int:
    length = fields.get(b"content-length", b"0")
    if not _LENGTH.fullmatch(length):
        raise _ambiguous("a body of no certain length")
    return int(length)


def _ambiguous(what: str) -> Refused:
    return Refused(f"its client's HTTP request can be read in more than one way ({what})")
