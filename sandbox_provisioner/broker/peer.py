"""broker/peer.py - the daemon: who is at the other end of a connection, and what comes."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import pwd
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sandbox_provisioner.broker.frames import BadFrame, Reader
from sandbox_provisioner.broker.wishes import MOST_DESCRIPTORS
from sandbox_provisioner.policy.person import group_name

_SO_PEERPIDFD = 77  # since Linux 6.5
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
        group *gid* alone."""
        try:
            entry = pwd.getpwuid(uid)
        except KeyError:
            return cls(str(uid), uid, gid, frozenset({gid}), "/")
        groups = frozenset(os.getgrouplist(entry.pw_name, entry.pw_gid))
        return cls(entry.pw_name, uid, entry.pw_gid, groups, entry.pw_dir)

    @property
    def group_names(self) -> tuple[str, ...]:
        """As a policy knows them."""
        return tuple(map(group_name, sorted(self.groups, key=lambda gid: (gid != self.gid, gid))))


def credentials(connection: socket.socket) -> tuple[int, int, int]:
    """SO_PEERCRED of unix(7): pid, uid and gid of who connected, at that moment."""
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(told)
    return pid, uid, gid


def watched(connection: socket.socket) -> int:
    """A pidfd of who connected; OSError if that one has ended. Before Linux 6.5 it is opened by the
    number: while the connection is open the other end has not been given up."""
    with contextlib.suppress(OSError):
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    return os.pidfd_open(credentials(connection)[0])


class Connection:
    """One that was accepted, and the descriptors that came over it: all are closed with it."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        connection.setblocking(False)
        self.fds: list[int] = []

    async def message(self) -> dict[str, Any]:
        """The one message; BadFrame for anything else, and for more descriptors than any has."""
        reader, loop = Reader(), asyncio.get_running_loop()
        while True:
            await _ready(loop.add_reader, loop.remove_reader, self.socket.fileno())
            chunk = self._receive(min(reader.wanted_bytes, _CHUNK))
            if not chunk:
                raise BadFrame("it ended in the middle")
            if (found := reader.take(chunk)) is not None:
                return found

    def _receive(self, most: int) -> bytes:
        """unix(7): what there is no room for Linux closes, and says so."""
        number = array.array("i")
        room = socket.CMSG_SPACE(MOST_DESCRIPTORS * number.itemsize)
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

    def close(self) -> None:
        """Close it, and what came over it."""
        self.socket.close()
        while self.fds:
            os.close(self.fds.pop())


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
