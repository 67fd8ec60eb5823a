"""broker/peer.py - the daemon: who is at the other end of a connection, and what comes."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import fcntl
import os
import pwd
import socket
import struct
import sys
import termios
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sandbox_provisioner.broker.frames import BadFrame, Reader
from sandbox_provisioner.broker.wishes import MOST_DESCRIPTORS
from sandbox_provisioner.descriptors import is_readable
from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.ids.facts import is_given_away
from sandbox_provisioner.policy.person import group_name

_SO_PEERPIDFD = 77  # since Linux 6.5
_SCM_MAX_FD = 253  # unix(7): of one message
_LINGER = struct.Struct("2i")  # struct linger of socket(7)
_CREDENTIALS = struct.Struct("3i")  # struct ucred of unix(7)
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Peer:
    """Who asks: a user of this machine, as its files of users and groups tell."""

    name: str
    uid: int
    gid: int
    groups: frozenset[int]
    home: str

    @classmethod
    def of(cls, uid: int, gid: int) -> Peer:
        """The user *uid*, with the groups that the machine's files give; without a name there, the
        group *gid* alone. SpecError for an id that a user has besides the own one: each of many
        thousand would be one more user."""
        try:
            entry = pwd.getpwuid(uid)
        except KeyError:
            if is_given_away(uid):
                raise _has_many_ids(uid) from None
            return cls(str(uid), uid, gid, frozenset({gid}), "/")
        groups = frozenset(os.getgrouplist(entry.pw_name, entry.pw_gid))
        return cls(entry.pw_name, uid, entry.pw_gid, groups, entry.pw_dir)

    @property
    def group_names(self) -> tuple[str, ...]:
        """As a policy knows them."""
        return tuple(map(group_name, sorted(self.groups, key=lambda gid: (gid != self.gid, gid))))


def _has_many_ids(uid: int) -> SpecError:
    return SpecError(
        attempt="ask the sandbox broker",
        answer=f"uid {uid} is no user's own, but one of those that /etc/subuid gives somebody",
        remedy="Ask it as that user, not from a user namespace.",
    )


def credentials(connection: socket.socket) -> tuple[int, int, int]:
    """SO_PEERCRED of unix(7): pid, uid and gid of who connected, at that moment."""
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(told)
    return pid, uid, gid


def watched(connection: socket.socket) -> int:
    """A pidfd of who connected; OSError if that one has ended."""
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
    pid, uid, _ = credentials(connection)
    return _by_number(pid, uid)


def _by_number(pid: int, uid: int) -> int:
    """The same before Linux 6.5. A socket keeps no number from being given to another process, so
    this may be another one than connected; but it is one of that user's."""
    pidfd = os.pidfd_open(pid)
    try:
        # proc(5): the folder itself is of the effective uid, of what is not dumpable, too.
        owner = os.stat(f"/proc/{pid}").st_uid
        if owner != uid or is_readable(pidfd):  # while it lives the number is its own
            raise ProcessLookupError(errno.ESRCH, "who connected has ended")
    except BaseException:
        os.close(pidfd)
        raise
    return pidfd


class Connection:
    """One that was accepted, and the descriptors that came over it: all are closed with it.

    To close what a stranger has opened may take for ever: a TCP socket lingers (socket(7)), a file
    of FUSE waits for its server. So does to close a socket in whose queue there are descriptors,
    and to receive fewer than have come: Linux closes the others."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        connection.setblocking(False)
        self.fds: list[int] = []
        self.release = ""  # of who has written the message
        self.heard_bytes = 0

    async def message(self) -> dict[str, Any]:
        """The one message; BadFrame for anything else, and for more descriptors than any has."""
        reader, loop = Reader(), asyncio.get_running_loop()
        while True:
            try:
                chunk = self._receive(min(reader.wanted_bytes, _CHUNK))
            except BlockingIOError:  # most have come with the connection
                await _ready(loop.add_reader, loop.remove_reader, self.socket.fileno())
                continue
            if not chunk:
                raise BadFrame("it ended in the middle")
            self.heard_bytes += len(chunk)
            if (found := reader.take(chunk)) is not None:
                self.release = reader.release
                return found

    def _receive(self, most: int) -> bytes:
        """There is room for all that can come at once."""
        number = array.array("i")
        room = socket.CMSG_SPACE(_SCM_MAX_FD * number.itemsize)
        try:
            chunk, ancillary, flags, _ = self.socket.recvmsg(most, room, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            return b""
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self.fds += fds
        if flags & socket.MSG_CTRUNC or len(self.fds) > MOST_DESCRIPTORS:
            raise BadFrame("too many descriptors came with it, or none are left here")
        return chunk

    async def answer(self, text: bytes, fds: Sequence[int] = ()) -> None:
        """Send *text*, with *fds* at its first byte; OSError if nobody is there."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                sent = socket.send_fds(self.socket, [text], list(fds)) if fds else 0
                break
            except BlockingIOError:
                await _ready(loop.add_writer, loop.remove_writer, self.socket.fileno())
        if sent < len(text):  # or who has read all of it may have gone
            await loop.sock_sendall(self.socket, text[sent:])

    def is_quiet(self) -> bool:
        """Whether nothing has come so far; from any thread, while another one may be reading."""
        return not self._waiting_bytes() and not self.heard_bytes

    def _waiting_bytes(self) -> int:
        waiting = fcntl.ioctl(self.socket, termios.FIONREAD, bytes(4))
        return int.from_bytes(waiting, sys.byteorder)

    def is_empty_for_good(self) -> bool:
        """Hear no more, and tell whether nothing has come that was not read: then no descriptor
        has, and the socket is closed at once."""
        with contextlib.suppress(OSError):  # the other end has gone
            self.socket.shutdown(socket.SHUT_RDWR)
        return not self.fds and not self._waiting_bytes()

    def close(self) -> None:
        """Close it, and what came over it; not on a loop."""
        self.socket.close()
        close_all(self.fds)


def close_all(fds: list[int]) -> None:
    """Close what strangers have sent; not on a loop (see `Connection`)."""
    while fds:
        fd = fds.pop()
        _linger_no_more(fd)
        with contextlib.suppress(OSError):  # close(2): it is closed all the same
            os.close(fd)


def _linger_no_more(fd: int) -> None:
    """Whoever else has the socket may change that again; and to ask may take as long as to
    close."""
    with contextlib.suppress(OSError):
        made = socket.socket(fileno=fd)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER.pack(0, 0))
        finally:
            made.detach()


async def _ready(add: Any, remove: Any, fd: int) -> None:
    """Wait until *fd* can be read, or written; *add* and *remove* are the loop's."""
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def wake() -> None:
        if not done.done():
            done.set_result(None)

    add(fd, wake)
    try:
        await done
    finally:
        remove(fd)
