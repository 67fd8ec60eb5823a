"""subscriber.py - in the server: what a kernel publishes under a few topics, read with bounds.

ZeroMQ's own sockets take in all that comes, before anybody reads it: a message has as many frames
as its sender likes, and is kept whole. Of who sends a frame above ZMQ_MAXMSGSIZE they end the
connection, as of a kernel with a table of 16 KiB. So we speak their protocol ourselves: ZMTP 3.0
(rfc.zeromq.org/spec/23), mechanism NULL, at a Unix socket. What nobody reads stays in the kernel,
and of what is read only short frames are kept, and a few of each message.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Any, Protocol

import zmq

from sandbox_provisioner.descriptors import is_readable

# A status message of ipykernel's has seven frames, the largest of some 400 bytes: a topic, a few
# identities, the signature and four dictionaries.
MOST_FRAMES = 16
FRAME_BYTES = 1 << 14
_AT_ONCE_BYTES = 1 << 16
# Of messages, with CURVE alone.
_WAITING = 128

_GREETING_BYTES = 64
# Signature, version 3.0, mechanism, not as server, and what fills it up.
_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
_MORE, _LONG, _COMMAND = 1, 2, 4
_IS_READY = b"\x05READY"
_READY = _IS_READY + b"\x0bSocket-Type\x00\x00\x00\x03SUB"
_SUBSCRIBE, _UNSUBSCRIBE = b"\x01", b"\x00"


class Source(Protocol):
    """What a kernel publishes; no thread may use it while another one does."""

    @property
    def closed(self) -> bool:
        """Whether nothing is to be read any more."""
        ...

    @property
    def is_subscribed(self) -> bool:
        """Whether the kernel is told of the topics. It may have to `receive` for that, when there
        is something to read."""
        ...

    def subscribe(self, topic: bytes) -> None:
        """Get what begins with *topic*, too."""
        ...

    def unsubscribe(self, topic: bytes) -> None:
        """Get nothing more by the subscription to *topic*."""
        ...

    def receive(self) -> list[bytes]:
        """The next message, up to a frame that is too long or one too many; [] where it takes
        another call to tell. BlockingIOError: nothing has come."""
        ...

    def fileno(self) -> int:
        """Of a descriptor that can be read when something has come."""
        ...

    def wait(self, seconds: float) -> bool:
        """Whether something comes, or an end, before so long. In any thread."""
        ...

    def close(self) -> None:
        """Hear no more."""
        ...


def subscriber(path: str, manager: Any) -> Source:
    """Of the kernel of *manager* whose iopub socket is at *path*; OSError if there is none."""
    if manager.curve_publickey is None:
        return Subscriber(path)
    return _Encrypted(path, manager)


class Subscriber:
    """Of a kernel that publishes in the clear."""

    def __init__(self, path: str) -> None:
        self.closed = False
        self.is_subscribed = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._is_greeted = False
        self._later = b""  # what may be said when the kernel is ready, and not before
        self._buffer = bytearray()
        self._to_skip = 0  # bytes of a frame that is too long,
        self._flags = 0  # which has these
        self._frames: list[bytes] = []
        self._is_cut = False
        try:
            self._socket.connect(path)
            self._socket.sendall(_GREETING + _frame(_COMMAND, _READY))
        except BaseException:
            self._socket.close()
            raise

    def subscribe(self, topic: bytes) -> None:
        """As `Source`."""
        self._send(_SUBSCRIBE + topic)

    def unsubscribe(self, topic: bytes) -> None:
        """As `Source`."""
        self._send(_UNSUBSCRIBE + topic)

    def _send(self, message: bytes) -> None:
        self._later += _frame(0, message)
        if self.is_subscribed:
            self._say()

    def _say(self) -> None:
        with contextlib.suppress(OSError):  # a kernel that reads nothing, or has gone
            self._socket.sendall(self._later)
        self._later = b""

    def fileno(self) -> int:
        """As `Source`."""
        return self._socket.fileno()

    def wait(self, seconds: float) -> bool:
        """As `Source`."""
        try:
            own = self._socket.dup()  # whose number nobody else gets meanwhile
        except OSError:
            return False
        with own:
            return is_readable(own.fileno(), seconds)

    def close(self) -> None:
        """As `Source`."""
        self.closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # whoever waits hears of it
        self._socket.close()

    def receive(self) -> list[bytes]:
        """As `Source`. Reads from the socket once."""
        is_read = False
        for _ in range(MOST_FRAMES):
            while (found := self._next()) is None:
                if is_read:
                    return []
                self._read()
                is_read = True
            flags, body = found
            if flags & _COMMAND:
                self._obey(body or b"")
            elif self._ends(flags, body):
                frames, self._frames, self._is_cut = self._frames, [], False
                return frames
        return []

    def _obey(self, command: bytes) -> None:
        if command.startswith(_IS_READY) and not self.is_subscribed:
            self.is_subscribed = True
            self._say()

    def _ends(self, flags: int, body: bytes | None) -> bool:
        """Whether it was the last frame of its message."""
        self._is_cut |= body is None or len(self._frames) == MOST_FRAMES
        if not self._is_cut and body is not None:
            self._frames.append(body)
        return not flags & _MORE

    def _read(self) -> None:
        try:
            data = self._socket.recv(_AT_ONCE_BYTES)
        except ConnectionError:
            data = b""
        if not data:
            raise BlockingIOError  # and never will anything come
        self._buffer += data

    def _next(self) -> tuple[int, bytes | None] | None:
        """Flags and body of the next frame, which is None if that is too long; None if it has not
        come yet."""
        if not self._is_greeted and not self._greet():
            return None
        if not self._to_skip:
            size_bytes = 8 if self._buffer[:1] and self._buffer[0] & _LONG else 1
            begin = 1 + size_bytes
            if len(self._buffer) < begin:
                return None
            flags, size = self._buffer[0], int.from_bytes(self._buffer[1:begin], "big")
            if size <= FRAME_BYTES:
                return self._whole(flags, begin, begin + size)
            del self._buffer[:begin]
            self._flags, self._to_skip = flags, size
        gone = min(self._to_skip, len(self._buffer))
        del self._buffer[:gone]
        self._to_skip -= gone
        return None if self._to_skip else (self._flags, None)

    def _whole(self, flags: int, begin: int, end: int) -> tuple[int, bytes] | None:
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[begin:end])
        del self._buffer[:end]
        return flags, body

    def _greet(self) -> bool:
        """Whether the other side has. One that does not speak our language is as one that is
        silent."""
        if len(self._buffer) < _GREETING_BYTES:
            return False
        version, mechanism = self._buffer[10], self._buffer[12:32]
        if version < _GREETING[10] or mechanism != _GREETING[12:32]:
            self._buffer.clear()
            return False
        del self._buffer[:_GREETING_BYTES]
        self._is_greeted = True
        return True


def _frame(flags: int, body: bytes) -> bytes:
    """A short one."""
    return bytes((flags, len(body))) + body


class _Encrypted:
    """Of a kernel with CURVE, which is ZeroMQ's affair: a frame that is too long ends the
    connection, and a message of many frames is kept."""

    def __init__(self, path: str, manager: Any) -> None:
        # Not SUB: that one throws away, within one call, as much as there is of other topics.
        context: zmq.Context[Any] = zmq.Context.instance()
        self._socket = context.socket(zmq.XSUB)
        self._socket.linger = 0
        self._socket.rcvhwm = _WAITING
        self._socket.maxmsgsize = FRAME_BYTES
        self._socket.curve_secretkey = manager.curve_secretkey
        self._socket.curve_publickey = manager.curve_publickey
        self._socket.curve_serverkey = manager.curve_publickey
        self._socket.connect(f"ipc://{path}")
        self._in_message = False  # whether the next frame goes on with one that we do not want

    @property
    def closed(self) -> bool:
        """As `Source`."""
        return bool(self._socket.closed)

    @property
    def is_subscribed(self) -> bool:
        """As `Source`."""
        return True

    def subscribe(self, topic: bytes) -> None:
        """As `Source`."""
        self._socket.send(_SUBSCRIBE + topic)

    def unsubscribe(self, topic: bytes) -> None:
        """As `Source`."""
        self._socket.send(_UNSUBSCRIBE + topic)

    def fileno(self) -> int:
        """As `Source`."""
        return int(self._socket.FD)

    def wait(self, seconds: float) -> bool:
        """As `Source`; needed by nobody, since it is subscribed from the beginning."""
        return bool(self._socket.poll(round(seconds * 1000)))

    def close(self) -> None:
        """As `Source`."""
        self._socket.close()

    def receive(self) -> list[bytes]:
        """As `Source`."""
        frames: list[bytes] = []
        while len(frames) < MOST_FRAMES:
            try:
                frames.append(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                raise BlockingIOError from None
            if not self._socket.rcvmore:
                skipped, self._in_message = self._in_message, False
                return [] if skipped else frames
        self._in_message = True
        return []
