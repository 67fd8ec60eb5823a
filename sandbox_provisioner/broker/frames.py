"""broker/frames.py - the daemon and its clients; pure: bytes and the messages in them.

A message is a JSON object behind its length, four bytes, the highest first. The reader has to be
given bytes of strangers: it keeps no more than one message, and tells at once of one that is none.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from sandbox_provisioner import __version__

MOST_BYTES = 1 << 18
VERSION = 1
RELEASE = __version__
_LONGEST_RELEASE = 32
_LENGTH = struct.Struct(">I")


class BadFrame(Exception):
    """What came is no message of ours; the text says why."""


class OtherVersion(BadFrame):
    """What came is of the *version* of another release."""

    def __init__(self, version: int) -> None:
        super().__init__(f"it is of version {version} of what is said here, and this is {VERSION}")
        self.version = version


def frame(message: dict[str, Any]) -> bytes:
    """*message* as it is sent; BadFrame if it is too long."""
    told = {"version": VERSION, "release": RELEASE, **message}
    text = json.dumps(told, allow_nan=False).encode("ascii")
    if len(text) > MOST_BYTES:
        raise BadFrame(f"it has {len(text)} bytes, and may have {MOST_BYTES}")
    return _LENGTH.pack(len(text)) + text


class Reader:
    """Puts one message together from what comes of it; *release* is then who wrote it, "" where
    that is not said."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self.release = ""

    @property
    def wanted_bytes(self) -> int:
        """How much may come: not a byte of what is behind the message is taken."""
        return self._end() - len(self._bytes)

    def _end(self) -> int:
        if len(self._bytes) < _LENGTH.size:
            return _LENGTH.size
        (length,) = _LENGTH.unpack_from(self._bytes)
        return _LENGTH.size + int(length)

    def take(self, chunk: bytes) -> dict[str, Any] | None:
        """The message once it is whole; BadFrame if it cannot become one."""
        if len(chunk) > self.wanted_bytes:
            raise BadFrame("there is more than one message")
        self._bytes += chunk
        if self._end() - _LENGTH.size > MOST_BYTES:
            raise BadFrame(f"it is to have more than {MOST_BYTES} bytes")
        whole = len(self._bytes) > _LENGTH.size or self._end() == len(self._bytes) > 0
        if self.wanted_bytes or not whole:
            return None
        found = message(bytes(self._bytes[_LENGTH.size :]))
        self.release = str(found.pop("release", ""))[:_LONGEST_RELEASE]
        return found


def message(text: bytes) -> dict[str, Any]:
    """The JSON object in *text*, of our version; BadFrame for anything else."""
    try:
        found = json.loads(text, parse_constant=_refuse, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise BadFrame(f"it is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadFrame("it is no object")
    version = found.pop("version", None)
    if type(version) is int and version != VERSION:
        raise OtherVersion(version)
    if version != VERSION or type(version) is not int:
        raise BadFrame("it tells no version")
    return found


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in an object")
    return found
