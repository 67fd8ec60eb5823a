"""facilities/sockets/inside.py - runs in PID 1: the folder of the kernel's sockets is to be sealed.

May import: os, select, stat, inside.kernel_calls, lookup, watcher, wire.
May raise: OSError (with every operand in its text).
"""

from __future__ import annotations

import os
import select
import stat

from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.lookup import STRAIGHT
from sandbox_provisioner.inside.watcher import Watcher

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from collections.abc import Iterable

    from sandbox_provisioner.inside.box import Box
    from sandbox_provisioner.inside.watcher import Init

# More than what an inotify instance keeps: 16384 events (inotify(7), max_queued_events).
_EVENTS_BYTES = 1 << 20
_CHUNK = 4096
_LISTEN_SOON_MS = 1


class Sockets:
    """The folder *fd*, whose *path* the kernel of user *uid* knows it by, the *names* that it binds
    there, and what tells of them."""

    def __init__(self) -> None:
        self.fd = self.events = self.uid = -1
        self.path = ""
        self.names: tuple[str, ...] = ()

    def watch(self) -> None:
        """Before the kernel can put anything there."""
        if self.names:
            self.events = kernel.watch_directory(self.fd)


def seal_after(box: Box, path: str, uid: str, *names: str) -> None:
    """Once the kernel of user *uid* listens on all sockets *names*, init makes *path* read-only."""
    sockets = box.part(Sockets)
    sockets.uid, sockets.names, sockets.path = int(uid), names, path
    # To look into the directory, and to make its mount read-only.
    box.rights_until_sealed = kernel.CAP_DAC_READ_SEARCH, kernel.CAP_SYS_ADMIN
    if box.namespaces:
        flags = os.O_RDONLY | os.O_DIRECTORY
        sockets.fd = kernel.openat2(box.mounts.root_fd, path.lstrip("/"), flags, STRAIGHT)
    else:
        sockets.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


class Seal(Watcher):
    """Makes the socket directory read-only once the kernel listens on all of its sockets.

    Until then the kernel can write to it, on the host's disk and past tmp_limit, so whatever else
    is put there, if only for a moment, ends the sandbox. Without a mount of our own it stays as it
    is, and is watched to the end; the rules of Landlock then let the kernel make sockets in it and
    nothing else, no link to a socket of somebody else's.
    """

    def __init__(self, box: Box) -> None:
        sockets = box.part(Sockets)
        self.directory = sockets.fd
        self.path = sockets.path
        self.names = sockets.names
        self.uid = sockets.uid
        self.is_mount = box.namespaces
        self.is_closed = False
        self.events = sockets.events

    def begin(self, init: Init) -> None:
        """The start is over when the server has been told of the seal."""
        init.is_starting = True

    def waits(self) -> Iterable[tuple[int, int]]:
        """Nothing more when the kernel can make nothing there."""
        return ((self.events, select.POLLIN),) if self.events >= 0 else ()

    def patience(self) -> int | None:
        """No event tells that a socket listens."""
        return _LISTEN_SOON_MS if not self.is_closed and self.bound() else None

    def serve(self, init: Init, ready: dict[int, int]) -> None:
        """End what misuses the directory; close it once the kernel listens."""
        if self.events in ready and self.misused(_CHUNK):
            init.give_up(wire.SOCKETS_MISUSED)
        if not self.is_closed and self.bound() and self.listening():
            self._end_start(init)

    def _end_start(self, init: Init) -> None:
        """Everything is bound: close the directory, give up CAP_SYS_ADMIN, tell the server."""
        try:
            self.close()
            if self.misused():  # just before
                init.give_up(wire.SOCKETS_MISUSED)
            init.narrow_rights()
            answer = [wire.SEALED]
        except OSError as error:
            answer = [wire.UNSEALED, str(error)]
        init.end_start(*answer)
        self.is_closed = True
        if self.is_mount:
            # The end of an inotify instance waits for a grace period of SRCU, some 15 ms.
            os.close(self.events)
            self.events = -1

    def misused(self, most: int = _EVENTS_BYTES) -> bool:
        """Whether *most* bytes of what has happened tell of anything but the making of sockets.

        Nobody can open a socket's name (open(2): ENXIO), so what is opened is something else. A
        file that never had a name (O_TMPFILE) is opened as "#NUMBER".
        """
        while most > 0:
            try:
                told = os.read(self.events, _CHUNK)
            except BlockingIOError:
                return False
            most -= len(told)
            if any(self._is_foreign(mask, name) for mask, name in kernel.changes(told)):
                return True
        return False

    def _is_foreign(self, mask: int, name: str) -> bool:
        if mask == kernel.IN_Q_OVERFLOW:
            return True  # nobody knows what
        # Without a name it is the directory itself that was opened, to be listed.
        return bool(name) and (mask != kernel.IN_CREATE or name not in self.names)

    def bound(self) -> bool:
        """Whether each name is a socket of the kernel's user, and no link to somebody else's."""
        for name in self.names:
            try:
                status = os.stat(name, dir_fd=self.directory, follow_symlinks=False)
            except FileNotFoundError:
                return False
            if not stat.S_ISSOCK(status.st_mode) or status.st_uid != self.uid:
                return False
        return True

    def listening(self) -> bool:
        """bind(2) makes the file; listen(2) comes just after it, and tells nobody.

        /proc/net/unix (unix(7)): "Num: RefCount Protocol Flags Type St Inode Path"; the flag 10000
        is that of a listening socket. A client that connects before it waits 100 ms to try again.
        """
        # By the whole path: where the network namespace is shared, other kernels stand here too.
        waiting = {os.fsencode(f"{self.path}/{name}") for name in self.names}
        with open("/proc/net/unix", "rb", buffering=0) as table:
            for line in table.readall().splitlines():
                words = line.split()
                if len(words) == 8 and words[3] == b"00010000":
                    waiting.discard(words[7])
        return not waiting

    def close(self) -> None:
        if self.is_mount:
            kernel.mount_setattr(self.directory, add=kernel.MOUNT_RDONLY, recursive=False)
        os.close(self.directory)
        self.is_closed = True


VERBS = (seal_after,)
