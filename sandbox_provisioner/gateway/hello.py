"""gateway/hello.py - pure, in the gateway: the server that a TLS client names, and if it may.

A client names it in its ClientHello (RFC 8446, 4.1.2), which comes as plain text in one record or
in several, in the extension server_name (RFC 6066, 3). A server may ask for a second one by a
HelloRetryRequest (RFC 8446, 4.1.4), and some take the name from that: it is judged as well.

An encrypted ClientHello hides another name behind the one that can be read. Nobody who looks names
up by the gateway is given the key for one, so that it is refused, with what pretends to be one.

May import: refused.
"""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_provisioner.gateway.refused import Refused

_HANDSHAKE = 0x16
_CHANGE_CIPHER_SPEC = 0x14
_APPLICATION_DATA = 0x17
RECORD_TYPES = range(0x14, 0x18)
_RECORD_HEAD = 5
_MOST_OF_RECORD = 1 << 14
# A hello of today has 2 KB at the most, with a key that stands quantum computers.
_MOST_OF_HELLO = 1 << 15
_MOST_RECORDS = 32
_MOST_HELD = 2 * _MOST_OF_HELLO  # with early data before a second hello
_CLIENT_HELLO = 1
_SERVER_HELLO = 2
_SERVER_NAME = 0
# The extension of RFC 9849, and of the drafts before it: ESNI, and ECH's up to the eighth.
_ENCRYPTED = {0xFE0D, 0xFFCE, *range(0xFF02, 0xFF0B)}
# RFC 8446, 4.1.3: the "random" of a ServerHello that is a HelloRetryRequest.
RETRY = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
# The record's head, the message's, a version.
_BEFORE_RANDOM = _RECORD_HEAD + 4 + 2


class Hellos:
    """What a TLS client sends to *name*, held back until its hellos are judged."""

    def __init__(self, name: str) -> None:
        self.is_open = False
        self.wants_answer = False
        self._name = name
        self._held = bytearray()
        self._answer = b""
        self._is_second = False

    @property
    def is_undecided(self) -> bool:
        """Whether more of the client's bytes are needed to judge those that are held back."""
        return bool(self._held) and not self.wants_answer

    def feed(self, data: bytes) -> bytes:
        """What may be sent, now that *data* has come as well; Refused."""
        self._held += data
        if self.wants_answer:
            return self._within_bound()
        end = len(self._held) if self.is_open else self._end_of_hello()
        released = bytes(self._held[:end])
        del self._held[:end]
        return released

    def answer(self, data: bytes) -> None:
        """The first bytes of the server, as long as `wants_answer`."""
        self._answer += data[: _BEFORE_RANDOM + len(RETRY)]
        if self._is_retry():
            self._is_second, self.wants_answer = True, False
        elif not self._may_be_retry():
            self.is_open, self.wants_answer = True, False

    def _is_retry(self) -> bool:
        return self._may_be_retry() and len(self._answer) >= _BEFORE_RANDOM + len(RETRY)

    def _may_be_retry(self) -> bool:
        """As far as its bytes are there."""
        start = self._answer
        random = start[_BEFORE_RANDOM : _BEFORE_RANDOM + len(RETRY)]
        is_hello = start[:1] in (b"", bytes([_HANDSHAKE])) and start[5:6] in (
            b"", bytes([_SERVER_HELLO]),
        )  # fmt: skip
        return is_hello and RETRY.startswith(random)

    def _within_bound(self) -> bytes:
        if len(self._held) > _MOST_OF_HELLO:
            raise Refused("its client goes on before the server has answered to its TLS hello")
        return b""

    def _end_of_hello(self) -> int:
        """Where the hello ends, once it is whole and judged; 0 before."""
        if len(self._held) > _MOST_HELD:
            raise Refused("its client's TLS hello is too long")
        start = self._passed() if self._is_second else 0
        found = _message(bytes(self._held[start:]))
        if found is None:
            return 0
        message, length = found
        _judge(message, self._name)
        # After a retry nothing can follow but what is encrypted.
        self.is_open, self.wants_answer = self._is_second, not self._is_second
        return len(self._held) if self.is_open else start + length

    def _passed(self) -> int:
        """Past the records that may come before a second hello: early data, and what is sent for
        the sake of old middleboxes (RFC 8446, D.4)."""
        start = 0
        for number, (kind, _, end) in enumerate(_records(bytes(self._held)), 1):
            if kind not in (_CHANGE_CIPHER_SPEC, _APPLICATION_DATA):
                break
            if number > _MOST_RECORDS:
                raise Refused(
                    "its client goes on without the second TLS hello that it was asked for"
                )
            start = end
        return start


def _records(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Each whole record: its type, its content, where it ends; Refused where it is none."""
    start = 0
    while len(data) >= start + _RECORD_HEAD:
        kind, major = data[start], data[start + 1]
        length = int.from_bytes(data[start + 3 : start + 5], "big")
        end = start + _RECORD_HEAD + length
        if kind not in RECORD_TYPES or major != 3 or not 0 < length <= _MOST_OF_RECORD + 256:
            raise Refused("what its client says looks like TLS, and is none")
        if len(data) < end:
            return
        yield kind, data[start + _RECORD_HEAD : end], end
        start = end


def _message(data: bytes) -> tuple[bytes, int] | None:
    """The first handshake message, put together from its records, and where those end; None if it
    is not whole yet."""
    if data and data[0] != _HANDSHAKE:
        raise Refused("what its client says looks like TLS, and begins without a hello")
    message = b""
    for number, (kind, content, end) in enumerate(_records(data), 1):
        message += content
        if kind != _HANDSHAKE or message[0] != _CLIENT_HELLO or number > _MOST_RECORDS:
            raise Refused("what its client says looks like TLS, and begins without a hello")
        length = 4 + int.from_bytes(message[1:4], "big")
        if len(message) < 4:
            continue
        if length > _MOST_OF_HELLO:
            raise Refused("its client's TLS hello is too long")
        if len(message) > length:
            raise Refused("its client's TLS hello is followed by another message")
        if len(message) == length:
            return message[4:], end
    return None


def _judge(hello: bytes, name: str) -> None:
    """Refused unless *hello*, the body of a ClientHello, names *name* and hides nothing."""
    told = server_name(hello)
    if told is None:
        raise Refused("its client's TLS hello names no server")
    if told.lower().rstrip(".") != name:
        raise Refused(f"its client's TLS hello names {_shown(told)}")


def _shown(told: str) -> str:
    return repr(told if len(told) < 100 else f"{told[:100]}...")


def server_name(hello: bytes) -> str | None:
    """What it names, if anything; Refused where it cannot be read, or hides something."""
    body = _Reader(hello)
    body.take(2 + 32)
    body.vector(1)  # session
    body.vector(2)  # cipher suites
    body.vector(1)  # compressions
    if body.is_at_end:
        return None
    extensions = _Reader(body.vector(2))
    body.end()
    names = []
    while not extensions.is_at_end:
        kind, content = extensions.number(2), extensions.vector(2)
        if kind in _ENCRYPTED:
            raise Refused("its client's TLS hello is encrypted (ECH), or pretends to be")
        if kind == _SERVER_NAME:
            names.append(_name_in(content))
    if len(names) > 1:
        raise Refused("its client's TLS hello names more than one server")
    return names[0] if names else None


def _name_in(extension: bytes) -> str:
    outer = _Reader(extension)
    entries = _Reader(outer.vector(2))
    outer.end()
    kind, name = entries.number(1), entries.vector(2)
    entries.end()
    if kind != 0 or not name.isascii() or not name:
        raise Refused("its client's TLS hello names a server in a way that is not known")
    return name.decode("ascii")


class _Reader:
    """Bytes, taken from the front; Refused where there are not as many."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def is_at_end(self) -> bool:
        """Whether all was taken."""
        return self._at == len(self._data)

    def take(self, count: int) -> bytes:
        """The next *count* bytes."""
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise _unreadable()
        self._at += count
        return taken

    def number(self, size: int) -> int:
        """A number of *size* bytes."""
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> bytes:
        """Bytes behind their count, which has *size* bytes."""
        return self.take(self.number(size))

    def end(self) -> None:
        """Refused if there is more."""
        if not self.is_at_end:
            raise _unreadable()


def _unreadable() -> Refused:
    return Refused("its client's TLS hello cannot be read")
